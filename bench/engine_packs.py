"""The published 3D networks at full size, as packs: what ``bench.engines`` compares engines on.

Nobody's trained weights are at hand here, so these are drawn from a seed, and the normalisation layers are given the
statistics of real windows. Speed does not depend on the weights; how much int8 loses does, a little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.common import BenchError
from engines.manifest import NS_PER_S, Branch, Head, HeadKind, Manifest, Mode, VideoInput
from engines.types import Array
from export.build import GraphToExport, PackToWrite, Progress, write_pack
from export.clips import RawWindow, default_clips, open_recording, windows_of
from models.backbones.base import Backbone
from models.backbones.c3d import C3D
from models.backbones.i3d import I3D
from models.backbones.r3d import R3D

GRAPH = "video"
FRAMES = 16
FPS = 8
WINDOWS_PER_CLIP = 2
SEED = 0
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "actions"
CLIPS = (
    "ut-interaction/seq01_handshake_04.mp4",
    "ut-interaction/seq12_punch_10.mp4",
    "gmdcsa24/Subject_1_Fall_14.mp4",
)


@dataclass(frozen=True, slots=True)
class VideoNetwork:
    """A network to measure."""

    name: str
    """What figures call it."""
    make: Callable[[], Backbone]
    """With its last layer."""
    classes: int
    """Labels of the published network."""
    side: int
    """Height and width of a frame."""
    frames: int = FRAMES
    """Frames of a clip."""

    def branch(self) -> Branch:
        """Windows of ``frames`` at ``FPS``, each half over the one before."""
        window_ns = self.frames * NS_PER_S // FPS
        labels = tuple(f"class {n}" for n in range(self.classes))
        return Branch(
            name="clip",
            mode=Mode.CLIP,
            window_ns=window_ns,
            hop_ns=window_ns // 2,
            video=VideoInput(width=self.side, height=self.side, fps=Fraction(FPS)),
            graph=GRAPH,
            heads=(Head(name="action", kind=HeadKind.ACTION, output="logits", labels=labels, activation="softmax"),),
        )


NETWORKS = (
    VideoNetwork("c3d", lambda: C3D(112, 112, classes=487), 487, 112),
    VideoNetwork("i3d", lambda: I3D(classes=400), 400, 224),
    VideoNetwork("r2plus1d", lambda: R3D(factored=True, classes=400), 400, 112),
)
"""As published, but for I3D's 64 frames: here it takes 16 as the others do."""


class _Scored(nn.Module):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        return self.backbone.scores(frames, frame_mask)


def real_clips() -> tuple[Path, ...]:
    """People at home and in a car park; where the data is absent, the recordings that every user can get."""
    found = tuple(DATA / name for name in CLIPS)
    return found if all(path.is_file() for path in found) else default_clips()


def write_video_pack(network: VideoNetwork, folder: Path, clips: Sequence[Path], progress: Progress) -> Manifest:
    """Write the network's pack with a parity report. Raises what ``export.build.write_pack`` raises."""
    torch.manual_seed(SEED)
    backbone = network.make()
    windows = real_windows(network, clips)
    _settle(backbone, windows)
    example = {
        "frames": torch.zeros(2, network.frames, network.side, network.side, 3, dtype=torch.uint8),
        "frame_mask": torch.ones(2, network.frames),
    }
    pack = PackToWrite(
        name=network.name,
        version="0",
        checkpoint_sha256=_hash(backbone),
        graphs=(GraphToExport(GRAPH, _Scored(backbone).eval(), example, ("logits",)),),
        branches=(network.branch(),),
        description="Untrained, for benchmarks.",
    )
    return write_pack(pack, folder, clips=clips, progress=progress)


def real_windows(network: VideoNetwork, clips: Sequence[Path]) -> list[dict[str, Array]]:
    """Inputs of the graph, batch 1, cut from real clips. Raises ``engines.errors.ParityMissing``."""
    cut = windows_of([open_recording(path) for path in clips], network.branch(), WINDOWS_PER_CLIP)
    return [_tensors(window) for windows in cut for window in windows[:-1]]


def _tensors(window: RawWindow) -> dict[str, Array]:
    tensors = window.tensors()
    if tensors.keys() != {"frames", "frame_mask"}:
        raise BenchError(f"a window holds {sorted(tensors)}, not frames and their mask")
    return tensors


def _settle(backbone: Backbone, windows: Sequence[dict[str, Array]]) -> None:
    """Running statistics from real windows; fresh ones would let values grow from layer to layer."""
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm3d)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    frames = torch.from_numpy(np.concatenate([window["frames"] for window in windows[:4]]))
    with torch.no_grad():
        backbone.train()(frames, torch.ones(frames.shape[:2]))
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
    backbone.eval()


def _hash(backbone: Backbone) -> str:
    digest = sha256()
    for name, value in backbone.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()
