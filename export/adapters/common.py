"""What the adapters share: preprocessing and answers around a network, weights from files."""

from __future__ import annotations

import hashlib
import importlib
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from engines.manifest import Mode, file_sha256
from export.adapters.describe import GRAPH, Description, HeadSpec, Picture, Sound
from export.build import ExportError, Graph, GraphToExport, PackToWrite

FOREIGN_ERRORS = (
    RuntimeError,
    TypeError,
    ValueError,
    IndexError,
    KeyError,
    AttributeError,
    OSError,
    ImportError,
    SafetensorError,
)
"""What code that is not ours may raise when its input or its files do not suit it."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What goes with the name of a model."""

    weights: Path | None = None
    """Its weights, where they are not part of what is named."""
    describe: Path | None = None
    """YAML file with what the model's own files do not say, see ``describe.Description``."""
    name: str | None = None
    """Name of the pack, in place of the described one."""
    mode: Mode | None = None
    """How it is to be run; by default staged where the network encodes frame by frame, and on clips otherwise."""

    def stated_name(self) -> dict[str, str]:
        """The name as what is stated over everything else."""
        return {} if self.name is None else {"name": self.name}


class Pictures(nn.Module):
    """From frames as the service has them to what a network takes: crop, colours, layout."""

    gain: Tensor
    offset: Tensor

    def __init__(self, spec: Picture) -> None:
        super().__init__()
        self.spec = spec
        mean, std = torch.tensor(spec.mean, dtype=torch.float64), torch.tensor(spec.std, dtype=torch.float64)
        self.register_buffer("gain", (1 / (spec.divide_by * std)).float())
        self.register_buffer("offset", (-mean / std).float())

    def forward(self, frames: Tensor) -> Tensor:
        """uint8 ``[B, T, H, W, 3]`` to float32 in the network's layout."""
        height, width = self.spec.seen
        top, left = middle(self.spec.height, height), middle(self.spec.width, width)
        x = frames[:, :, top : top + height, left : left + width].float()
        if self.spec.channels == "bgr":
            x = x.flip(-1)
        x = x * self.gain + self.offset
        layout = self.spec.layout
        if "T" not in layout:
            return x[:, 0].permute(*("BHWC".index(axis) for axis in layout)).contiguous()
        return x.permute(*("BTHWC".index(axis) for axis in layout)).contiguous()


def middle(whole: int, part: int) -> int:
    """Where the middle part begins, rounded as torchvision's centre crop."""
    return round((whole - part) / 2)


class Waveform(nn.Module):
    """From sound as the service has it to what a network takes."""

    def __init__(self, spec: Sound) -> None:
        super().__init__()
        self.channel = spec.layout == "BCN"

    def forward(self, audio: Tensor) -> Tensor:
        """float32 ``[B, N]`` to itself, or to ``[B, 1, N]``."""
        return audio[:, None] if self.channel else audio


class Wrapped(nn.Module):
    """A network between its preprocessing and the answers that a pack gives."""

    def __init__(self, network: nn.Module, heads: Mapping[str, HeadSpec]) -> None:
        super().__init__()
        self.network = network
        self.heads = dict(heads)

    def answer(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the network takes to one tensor for each head."""
        result = self.network(*inputs)
        return tuple(finish(_pick(result, head, n), head) for n, head in enumerate(self.heads.values()))


class VideoGraph(Wrapped):
    """A network that sees."""

    def __init__(self, network: nn.Module, heads: Mapping[str, HeadSpec], pictures: Picture) -> None:
        super().__init__(network, heads)
        self.pictures = Pictures(pictures)

    def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
        """uint8 ``[B, T, H, W, 3]`` to the heads' tensors."""
        return self.answer(self.pictures(frames))


class AudioGraph(Wrapped):
    """A network that hears."""

    def __init__(self, network: nn.Module, heads: Mapping[str, HeadSpec], sound: Sound) -> None:
        super().__init__(network, heads)
        self.waveform = Waveform(sound)

    def forward(self, audio: Tensor) -> tuple[Tensor, ...]:
        """float32 ``[B, N]`` to the heads' tensors."""
        return self.answer(self.waveform(audio))


class BothGraph(Wrapped):
    """A network that takes pictures, then sound."""

    def __init__(self, network: nn.Module, heads: Mapping[str, HeadSpec], pictures: Picture, sound: Sound) -> None:
        super().__init__(network, heads)
        self.pictures = Pictures(pictures)
        self.waveform = Waveform(sound)

    def forward(self, frames: Tensor, audio: Tensor) -> tuple[Tensor, ...]:
        """uint8 ``[B, T, H, W, 3]`` and float32 ``[B, N]`` to the heads' tensors."""
        return self.answer(self.pictures(frames), self.waveform(audio))


def _pick(result: Any, head: HeadSpec, place: int) -> Tensor:
    """A head's tensor of what a network returned: one tensor, a mapping, or a sequence."""
    if isinstance(result, Mapping):
        result = result[head.output] if head.output is not None else list(result.values())[place]
    elif isinstance(result, Sequence):
        result = result[int(head.output) if head.output is not None else place]
    if not isinstance(result, Tensor):
        raise TypeError(f"output {head.output or place} is {type(result).__name__}, not a tensor")
    return result


def finish(value: Tensor, head: HeadSpec) -> Tensor:
    """An output as a pack gives it: float32 logits or embedding, or uint8 class indices."""
    if head.kind == "segmentation":
        return (value if head.gives == "classes" else value.argmax(dim=1)).to(torch.uint8)
    value = value.float()
    if head.gives == "probabilities":
        # The inverse of the activation that the runtime applies.
        known = value.clamp(TINY, 1 - TINY)
        return torch.logit(known) if head.activation == "sigmoid" else known.log()
    return value


TINY = 1e-7
"""Probabilities are kept this far from 0 and 1."""


def wrap(network: nn.Module, description: Description) -> GraphToExport:
    """A network as the graph of a pack. Raises ``ExportError`` when what it gives is not what is described."""
    video, audio, heads = description.video, description.audio, description.heads
    if description.states:
        raise ExportError(
            f"{description.name}: states can be described of ONNX files only; export the model as one, with its states "
            "as inputs and outputs"
        )
    example: dict[str, Tensor] = {}
    if video is not None:
        example["frames"] = torch.zeros(2, video.frames, video.height, video.width, 3, dtype=torch.uint8)
    if audio is not None:
        example["audio"] = torch.zeros(2, description.audio_samples())
    if video is not None and audio is not None:
        module: nn.Module = BothGraph(network, heads, video, audio)
    elif video is not None:
        module = VideoGraph(network, heads, video)
    else:
        assert audio is not None
        module = AudioGraph(network, heads, audio)
    graph = GraphToExport(GRAPH, module.eval().requires_grad_(False), example, tuple(heads))
    _check(graph, description)
    return graph


def _check(graph: GraphToExport, description: Description) -> None:
    try:
        with torch.inference_mode():
            outputs = graph.module(*graph.example.values())
    except FOREIGN_ERRORS as error:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in graph.example.items())
        raise ExportError(
            f"{description.name}: the model does not take {shapes} as described ({first_line(error)}); "
            "correct layout, frames, size or output in its description"
        ) from error
    for (name, head), value in zip(description.heads.items(), outputs, strict=True):
        check_output(f"{description.name}: head {name}", head, tuple(value.shape), classes=_classes(value, head))
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ExportError(f"{description.name}: head {name} gives NaN or infinity on black; its weights are broken")


def _classes(value: Tensor, head: HeadSpec) -> int | None:
    return None if head.kind == "segmentation" else int(value.shape[-1])


def check_output(where: str, head: HeadSpec, shape: tuple[int, ...], classes: int | None) -> None:
    """Raise ``ExportError`` unless an output of this shape and number of classes suits its head."""
    rank = 3 if head.kind == "segmentation" else 2
    if len(shape) != rank:
        wanted = {3: "a mask [batch, height, width]", 2: "[batch, values]"}[rank]
        raise ExportError(f"{where} comes out as {list(shape)}, not {wanted}; correct its kind or output")
    if head.labels and classes is not None and classes != len(head.labels):
        raise ExportError(f"{where} gives {classes} scores for {len(head.labels)} labels; correct its labels")


def pack_of(description: Description, checkpoint_sha256: str, graphs: tuple[Graph, ...], **more: Any) -> PackToWrite:
    """A foreign model's pack."""
    return PackToWrite(
        name=description.name,
        version=description.version,
        checkpoint_sha256=checkpoint_sha256,
        licence=description.licence,
        description=description.description,
        graphs=graphs,
        branches=(description.branch(),),
        **more,
    )


def first_line(error: BaseException) -> str:
    """An error of foreign code in one line."""
    if isinstance(error, KeyError):
        return f"no {error}"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def read_state(path: Path) -> dict[str, Tensor]:
    """Weights from a safetensors file. Raises ``ExportError`` when it is absent, broken, or a pickle."""
    refuse_pickle(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{path} is not a whole safetensors file ({first_line(error)}); write it anew") from error


def read_published(path: Path) -> dict[str, Tensor]:
    """Weights from a safetensors file, or from a ``.pth`` that holds nothing but tensors.

    Raises ``ExportError`` when it is absent, broken, or holds other objects: those run code when they are read.
    """
    if path.suffix not in (".pth", ".pt"):
        return read_state(path)
    _need_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise ExportError(
            f"{path} holds more than tensors, or is broken; save its state_dict() as safetensors"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ExportError(f"{path} is not a state_dict; save the model's state_dict() as safetensors")
    return state


def refuse_pickle(path: Path) -> None:
    """Raise ``ExportError`` when a file is absent, or is a pickle by its first bytes."""
    _need_file(path)
    with path.open("rb") as file:
        head = file.read(4)
    # PyTorch's archives are zip files with a pickle inside; older ones and plain pickles begin with PROTO.
    if head[:2] == b"PK" or head[:1] == b"\x80":
        raise ExportError(f"{path} is a pickle, which can run any code; save the state_dict() as safetensors")


def _need_file(path: Path) -> None:
    if not path.is_file():
        raise ExportError(f"no weights at {path}; correct the path")


def load_state(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Fill a module with weights, each as float32 or as the module has it.

    Raises ``ExportError`` naming ``path`` and the first parameter that does not fit.
    """
    expected = module.state_dict()
    for name, tensor in state.items():
        if name in expected and expected[name].shape != tensor.shape:
            there, here = list(tensor.shape), list(expected[name].shape)
            raise ExportError(f"{path}: {name} is {there}, the model's is {here}; correct the labels or the weights")
    shared = {expected[name].data_ptr() for name in state if name in expected}
    for name, tensor in expected.items():
        # Of tensors that a module shares the library of safetensors stores one.
        if name not in state and not name.endswith("num_batches_tracked") and tensor.data_ptr() not in shared:
            raise ExportError(f"{path} has no parameter {name}: it is of another model; give this model's weights")
    if odd := sorted(set(state) - set(expected)):
        raise ExportError(
            f"{path} has a parameter {odd[0]} too many: it is of another model; give this model's weights"
        )
    module.load_state_dict(dict(state), strict=False)


def files_sha256(paths: Sequence[Path]) -> str:
    """The hash of a file, or of several files' hashes in the order of their names."""
    if len(paths) == 1:
        return file_sha256(paths[0])
    lines = [f"{file_sha256(path)}  {path.name}\n" for path in sorted(paths)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def import_extra(name: str) -> ModuleType:
    """A library of the extra ``hub``. Raises ``ExportError`` when it is not installed or does not load."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ExportError(f"exporting this needs the package {error.name}; pip install 'sightwire[hub]'") from error
    except (ImportError, RuntimeError, OSError) as error:
        raise ExportError(f"the package {name} does not load ({first_line(error)}); install it anew") from error


def import_torchvision() -> ModuleType:
    """torchvision. Raises ``ExportError`` when it is not installed or does not load.

    Its compiled operators are for detection, which no model here does. Where they do not load (PyPI has them for
    CUDA only, beside a PyTorch for CPUs), its import stops at registrations for two of them; declared, they let it by.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise ExportError(f"torchvision does not load ({first_line(error)}); install one for this torch") from error
    except ImportError:
        return import_extra("torchvision")
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return import_extra("torchvision")
