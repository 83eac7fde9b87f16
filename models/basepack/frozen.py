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
from models.basepack.watch import FEATURES, WatchEncoder

BATCH = 8
Floats = NDArray[np.float32]


class FrozenEncoder:
    """Encodes samples in batches; the same numbers as ``WatchEncoder`` to about 1e-5."""

    def __init__(self, trunk: EfficientNetLite0, folder: Path, threads: int = 2) -> None:
        self.checksum = checksum(trunk)
        example = torch.zeros(2, 2, shape.WATCH_SIZE, shape.WATCH_SIZE, 3, dtype=torch.uint8)
        path = folder / f"watch-{self.checksum}.onnx"
        self._session = _session(WatchEncoder(trunk), example, path, threads)

    def encode(self, frames: NDArray[np.uint8]) -> Floats:
        """uint8 ``[S, 2, H, W, 3]`` to float32 ``[S, FEATURES]``."""
        starts = range(0, len(frames), BATCH)
        parts = [self._session.run(None, {"frames": frames[first : first + BATCH]})[0] for first in starts]
        return np.concatenate(parts) if parts else np.zeros((0, FEATURES), np.float32)


class FrozenPyramid:
    """The maps that the segmentation decoder reads; the same numbers as ``EfficientNetLite0.pyramid``."""

    def __init__(self, trunk: EfficientNetLite0, folder: Path, threads: int = 2) -> None:
        example = torch.zeros(2, shape.SCENE_HEIGHT, shape.SCENE_WIDTH, 3, dtype=torch.uint8)
        self._session = _session(_Pyramid(trunk), example, folder / f"pyramid-{checksum(trunk)}.onnx", threads)

    def encode(self, frames: NDArray[np.uint8]) -> Sequence[Floats]:
        """uint8 ``[B, 240, 320, 3]`` to four maps float32 ``[B, C, H/s, W/s]``, strides 4 to 32."""
        maps: Sequence[Floats] = self._session.run(None, {"frames": frames})
        return maps


class _Pyramid(nn.Module):
    def __init__(self, trunk: EfficientNetLite0) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, frames: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.trunk.pyramid(frames.float().permute(0, 3, 1, 2)))


def checksum(trunk: EfficientNetLite0) -> str:
    """Short hash of the trunk's weights."""
    digest = hashlib.sha256()
    for parameter in trunk.parameters():
        digest.update(parameter.detach().contiguous().numpy().tobytes())
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
