"""Features of a frozen frame encoder, computed by ONNX Runtime: several times faster than training's own network."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from models.backbones.frame import FEATURES, HEAD_CHANNELS, EfficientNetLite0, FrameEncoder
from models.backbones.temporal import PictureEncoder
from models.config import VideoConfig
from models.errors import DataError

Floats = NDArray[np.float32]
_BATCH = 8


class Encoder(Protocol):
    """What turns samples into the features that ``Inputs.video`` may hold instead of frames."""

    checksum: str
    """Changes with the weights: cached features are named by it."""
    features: int
    """``D``."""

    def encode(self, frames: NDArray[np.uint8]) -> Floats:
        """uint8 ``[S, H, W, 3]``, with look-back ``[S, 2, H, W, 3]``, to float32 ``[S, D]``."""
        ...


class FrozenFeatures:
    """The encoder of ``FrameBackbone`` with the weights that its trunk has now; the same numbers to about 1e-5.

    ``D`` is 1280, with look-back 2560. The graph is kept in ``folder``; only the first of several processes makes it.
    Made before data loaders start, it may be used in each of them: the session opens on first use.
    """

    def __init__(self, trunk: EfficientNetLite0, video: VideoConfig, folder: Path) -> None:
        pairs = video.lookback_ms is not None
        self.checksum = _checksum(trunk)
        self.features = FEATURES if pairs else HEAD_CHANNELS
        name = f"frames-{video.width}x{video.height}{'-pairs' if pairs else ''}-{self.checksum}.onnx"
        self._path = folder / name
        self._session: onnxruntime.InferenceSession | None = None
        if not self._path.is_file():
            shape = (2, *((2,) if pairs else ()), video.height, video.width, 3)
            _export(FrameEncoder(trunk) if pairs else PictureEncoder(trunk), shape, self._path)

    def encode(self, frames: NDArray[np.uint8]) -> Floats:
        """See ``Encoder``."""
        if self._session is None:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            providers = ["CPUExecutionProvider"]
            self._session = onnxruntime.InferenceSession(self._path, options, providers=providers)
        starts = range(0, len(frames), _BATCH)
        parts = [self._session.run(None, {"frames": frames[at : at + _BATCH]})[0] for at in starts]
        return np.concatenate(parts)


def _checksum(trunk: EfficientNetLite0) -> str:
    digest = hashlib.sha256()
    for parameter in trunk.parameters():
        digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _export(module: nn.Module, shape: tuple[int, ...], path: Path) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    training = module.training
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module.eval(),
                (torch.zeros(shape, dtype=torch.uint8),),
                part,
                input_names=["frames"],
                opset_version=18,
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},),
                external_data=False,
                verbose=False,
            )
        part.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror or error}); set data.cache elsewhere") from error
    finally:
        module.train(training)
