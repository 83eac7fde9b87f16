"""Frozen networks run by ONNX Runtime: on a processor several times faster than PyTorch's depthwise convolutions."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.backbones.frame import EfficientNetLite0
from models.basepack import shape
from models.basepack.joints import JOINT_FEATURES, JointFinder
from models.basepack.watch import TRUNK_FEATURES, WatchEncoder

BATCH = 8
Floats = NDArray[np.float32]


class FrozenEncoder:
    """Encodes samples in batches; the same numbers as ``WatchEncoder`` to about 1e-5."""

    def __init__(
        self, trunk: EfficientNetLite0, folder: Path, threads: int = 2, *, finders: Sequence[JointFinder]
    ) -> None:
        self.checksum = checksum(trunk, *finders)
        self.width = TRUNK_FEATURES + len(finders) * JOINT_FEATURES
        example = torch.zeros(2, 2, shape.WATCH_SIZE, shape.WATCH_SIZE, 3, dtype=torch.uint8)
        path = folder / f"watch-{self.checksum}.onnx"
        self._session = _session(WatchEncoder(trunk, finders), example, path, threads)

    def encode(self, frames: NDArray[np.uint8]) -> Floats:
        """uint8 ``[S, 2, H, W, 3]`` to float32 ``[S, width]``."""
        starts = range(0, len(frames), BATCH)
        parts = [self._session.run(None, {"frames": frames[first : first + BATCH]})[0] for first in starts]
        return np.concatenate(parts) if parts else np.zeros((0, self.width), np.float32)


class FrozenPyramid:
    """The maps that the segmentation decoder reads; the same numbers as ``EfficientNetLite0.pyramid``."""

    def __init__(self, trunk: EfficientNetLite0, folder: Path, threads: int = 2) -> None:
        example = torch.zeros(2, shape.SCENE_HEIGHT, shape.SCENE_WIDTH, 3, dtype=torch.uint8)
        self._session = _session(_Pyramid(trunk), example, folder / f"pyramid-{checksum(trunk)}.onnx", threads)

    def encode(self, frames: NDArray[np.uint8]) -> Sequence[Floats]:
        """uint8 ``[B, 240, 320, 3]`` to four maps float32 ``[B, C, H/s, W/s]``, strides 4 to 32."""
        maps: Sequence[Floats] = self._session.run(None, {"frames": frames})
        return maps


class FrozenMaps:
    """The maps of a frame that finders of joints read."""

    def __init__(self, trunk: EfficientNetLite0, folder: Path, threads: int = 2) -> None:
        self.checksum = checksum(trunk)
        example = torch.zeros(2, shape.WATCH_SIZE, shape.WATCH_SIZE, 3, dtype=torch.uint8)
        self._session = _session(_Pyramid(trunk), example, folder / f"maps-{self.checksum}.onnx", threads)

    def encode(self, frames: NDArray[np.uint8]) -> tuple[Floats, Floats]:
        """uint8 ``[S, H, W, 3]``, at least one, to float32 ``[S, 112, 10, 10]`` and ``[S, 320, 5, 5]``."""
        starts = range(0, len(frames), BATCH)
        parts = [self._session.run(None, {"frames": frames[first : first + BATCH]})[2:] for first in starts]
        middle, last = zip(*parts, strict=True)
        return np.concatenate(middle), np.concatenate(last)


class _Pyramid(nn.Module):
    def __init__(self, trunk: EfficientNetLite0) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.trunk.pyramid(frames.float().permute(0, 3, 1, 2)))


def checksum(*networks: nn.Module) -> str:
    """Short hash of weights."""
    digest = hashlib.sha256()
    for network in networks:
        for tensor in (*network.parameters(), *network.buffers()):
            digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _session(module: nn.Module, example: Tensor, path: Path, threads: int) -> onnxruntime.InferenceSession:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        _export(module, example, part)
        part.replace(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _export(module: nn.Module, example: Tensor, path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            (example,),
            path,
            input_names=["frames"],
            opset_version=18,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
            external_data=False,
            verbose=False,
        )
