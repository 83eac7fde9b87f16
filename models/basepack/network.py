"""The base pack's networks, and its weights on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.backbones.frame import EfficientNetLite0
from models.basepack.joints import JointFinder
from models.basepack.labels import ACTIONS, SCENE, SOUNDS
from models.basepack.scene_net import PyramidDecoder, SceneSegmenter
from models.basepack.watch import WatchEncoder
from models.basepack.window import WindowHead
from models.errors import WeightsError

WEIGHTS_FILE = "base.safetensors"
CALIBRATION_FILE = "base.json"
METRICS_FILE = "metrics.json"
VERSION = "4"


class BaseModel(nn.Module):
    """Everything the base pack computes. The graphs that are exported are its parts, not copies of them."""

    def __init__(self, trunk: EfficientNetLite0 | None = None) -> None:
        super().__init__()
        self.trunk = trunk or EfficientNetLite0()
        self.joints = JointFinder()
        self.window = WindowHead(self.trunk)
        self.decoder = PyramidDecoder()

    @property
    def encoder(self) -> WatchEncoder:
        """Graph ``encoder``: one sample to its features."""
        return WatchEncoder(self.trunk, [self.joints])

    @property
    def segmenter(self) -> SceneSegmenter:
        """Graph ``segmentation``: one frame to its mask."""
        return SceneSegmenter(self.trunk, self.decoder)

    def forward(self, frames: Tensor, frame_mask: Tensor, audio: Tensor, audio_mask: Tensor) -> tuple[Tensor, ...]:
        """The whole ``watch`` model on raw windows: what the staged graphs together must equal.

        ``frames`` uint8 ``[B, T, 2, H, W, 3]``, ``frame_mask`` float32 ``[B, T]``, ``audio`` float32 ``[B, N]``,
        ``audio_mask`` float32 ``[B]``. Returns logits in the order of ``fusion.OUTPUTS``.
        """
        features = self.encoder(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        out: tuple[Tensor, ...] = self.window(features, frame_mask, audio, audio_mask)
        return out


@dataclass(frozen=True, slots=True)
class Calibration:
    """What turns logits into decisions; found on validation data, stored beside the weights."""

    action_temperature: float = 1.0
    class_temperature: float = 1.0
    thresholds: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    """Per head, per label: the score over which an event starts, and the one under which it ends."""
    version: str = VERSION

    def write(self, folder: Path) -> None:
        """Write ``base.json`` into a weights folder."""
        (folder / CALIBRATION_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Calibration:
        """Read ``base.json``. Raises ``WeightsError`` when it is absent or malformed."""
        path = folder / CALIBRATION_FILE
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            thresholds = {
                head: {label: (float(on), float(off)) for label, (on, off) in labels.items()}
                for head, labels in stored.pop("thresholds").items()
            }
            calibration = cls(thresholds=thresholds, **stored)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"{path} cannot be read ({error}); run `sightwire train`") from error
        calibration.check(path)
        return calibration

    def check(self, path: Path) -> None:
        """Raise ``WeightsError`` when a threshold is for a label that no head has."""
        known = {"action": ACTIONS, "class": SOUNDS, "segmentation": SCENE}
        for head, labels in self.thresholds.items():
            unknown = set(labels) - set(known.get(head, ()))
            if unknown:
                raise WeightsError(f"{path}: head {head} has no label {sorted(unknown)[0]}; run `sightwire train`")


def save_weights(model: BaseModel, folder: Path) -> str:
    """Store the weights as half precision safetensors and return the file's sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items() if _stored(name)}
    path = folder / WEIGHTS_FILE
    # One entry only: the order of several differs from run to run, and the file's hash with it.
    save_file(state, path, metadata={"pack": f"base {VERSION}"})
    path.chmod(0o644)  # The library makes it readable for its owner alone.
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_weights(folder: Path) -> tuple[BaseModel, str]:
    """The model in evaluation mode with the weights of a folder, and the sha256 of their file.

    Raises ``WeightsError`` when the file is absent or is not of this architecture.
    """
    path = folder / WEIGHTS_FILE
    model = BaseModel()
    try:
        state = {name: tensor.float() for name, tensor in load_file(path).items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
    except FileNotFoundError:
        raise WeightsError(f"no weights at {path}; run `sightwire train models/configs/base.yaml`") from None
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(f"{path} is not a weights file of the base pack ({reason}); train it again") from error
    odd = [name for name in missing if _stored(name)] + list(unexpected)
    if odd:
        raise WeightsError(f"{path} is of another architecture ({odd[0]}); train it again")
    return model.eval().requires_grad_(False), hashlib.sha256(path.read_bytes()).hexdigest()


def _stored(name: str) -> bool:
    """Batch counters of normalisation layers mean nothing after training; the ear's trunk is the model's own."""
    return not name.endswith("num_batches_tracked") and not name.startswith("window.ear.trunk.")
