"""The segmentation decoder: a light feature pyramid over the frozen trunk."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.frame import PYRAMID, EfficientNetLite0
from models.basepack.labels import SCENE

WIDTH = 64


class SeparableConv(nn.Module):
    """Depthwise 3x3 and pointwise convolution with batch normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """float32 ``[B, C, H, W]`` to the same shape."""
        out: Tensor = self.layers(x)
        return out


class PyramidDecoder(nn.Module):
    """Maps at strides 4 to 32 to class logits at stride 4 (Lin et al., CVPR 2017; Kirillov et al., CVPR 2019)."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH))
            for channels in PYRAMID.values()
        )
        self.context = nn.Conv2d(PYRAMID[6], WIDTH, 1)
        self.smooth = nn.ModuleList(SeparableConv(WIDTH) for _ in PYRAMID)
        self.refine = SeparableConv(WIDTH)
        self.drop = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(WIDTH, len(SCENE), 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Four maps, finest first, to float32 logits ``[B, 11, H/4, W/4]``."""
        x = torch.relu(self.context(maps[-1].mean(dim=(2, 3), keepdim=True)))
        for level in range(len(maps) - 1, -1, -1):
            side = self.lateral[level](maps[level])
            if level < len(maps) - 1:
                x = F.interpolate(x, size=side.shape[2:], mode="bilinear", align_corners=False)
            x = self.smooth[level](torch.relu(side + x))
        logits: Tensor = self.classify(self.drop(self.refine(x)))
        return logits


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
