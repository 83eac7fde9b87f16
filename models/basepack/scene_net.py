"""The segmentation decoder: a light feature pyramid over the frozen trunk."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import heads
from models.backbones.frame import PYRAMID, EfficientNetLite0
from models.basepack.labels import SCENE


class PyramidDecoder(heads.PyramidDecoder):
    """The general decoder for the trunk's maps and the base pack's classes."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__(PYRAMID.values(), len(SCENE), dropout)


class SceneSegmenter(nn.Module):
    """One frame to a mask of class indices; the whole graph of the ``scene`` branch."""

    def __init__(self, trunk: EfficientNetLite0, decoder: PyramidDecoder) -> None:
        super().__init__()
        self.trunk = trunk
        self.decoder = decoder

    def logits(self, frames: Tensor) -> Tensor:
        """uint8 ``[B, 1, H, W, 3]`` to float32 ``[B, 11, H, W]``."""
        pictures = frames[:, 0].float().permute(0, 3, 1, 2)
        return F.interpolate(self.decoder(self.trunk.pyramid(pictures)), scale_factor=4.0, mode="bilinear")

    def forward(self, frames: Tensor) -> Tensor:
        """uint8 ``[B, 1, H, W, 3]`` to uint8 class indices ``[B, H, W]``."""
        return self.logits(frames).argmax(dim=1).to(torch.uint8)
