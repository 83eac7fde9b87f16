"""R3D-18 and R(2+1)D-18: residual networks over space and time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.backbones.base import Backbone, Sequence, hold, normalised, scaled, whole

MEAN = (0.43216 * 255, 0.394666 * 255, 0.37645 * 255)
DEVIATION = (0.22803 * 255, 0.22145 * 255, 0.216989 * 255)
"""Of Kinetics, as the published weights were trained with."""
WIDTHS = (64, 128, 256, 512)
STEM_MIDDLE = 45
"""Channels between the stem's two convolutions in R(2+1)D."""


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut (He et al., CVPR 2016), over space and time."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, factored: bool) -> None:
        super().__init__()
        # As many channels between the two factors as make the block as large as one with full kernels.
        middle = inputs * outputs * 27 // (inputs * 9 + 3 * outputs) if factored else None
        self.conv1 = nn.Sequential(
            _conv(inputs, outputs, middle, stride), nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)
        )
        self.conv2 = nn.Sequential(_conv(outputs, outputs, middle, 1), nn.BatchNorm3d(outputs))
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv3d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm3d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """float32 ``[B, C, T, H, W]`` to ``[B, C', T/stride, H/stride, W/stride]``, rounded up."""
        shortcut = x if self.downsample is None else self.downsample(x)
        return torch.relu(self.conv2(self.conv1(x)) + shortcut)


class R3D(Backbone):
    """R3D-18, or with ``factored`` R(2+1)D-18 (Tran et al., CVPR 2018), in torchvision's layout of parameters.

    Takes ``[B, T, H, W, 3]`` of any size (published: 112 x 112, 16 frames); gives tokens ``[B, ceil(T/8), 512]``.
    With ``classes`` (400 in Kinetics) there is the layer ``fc``, and ``scores`` is torchvision's output.
    """

    classifier = "fc"

    def __init__(self, *, factored: bool, multiplier: float = 1.0, classes: int | None = None) -> None:
        super().__init__()
        widths = [scaled(width, multiplier) for width in WIDTHS]
        self.stem = _factored_stem(widths[0], scaled(STEM_MIDDLE, multiplier)) if factored else _stem(widths[0])
        inputs = widths[0]
        for number, outputs in enumerate(widths, start=1):
            first = ResidualBlock(inputs, outputs, 1 if number == 1 else 2, factored=factored)
            second = ResidualBlock(outputs, outputs, 1, factored=factored)
            self.add_module(f"layer{number}", nn.Sequential(first, second))
            inputs = outputs
        self.features = inputs
        self.fc = nn.Linear(inputs, classes) if classes else None
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, video: Tensor, mask: Tensor) -> Sequence:
        """As ``Backbone.forward``; tokens ``[B, ceil(T/8), 512]``."""
        x = self.stem(normalised(hold(video, mask), MEAN, DEVIATION))
        for number in range(1, len(WIDTHS) + 1):
            x = self.get_submodule(f"layer{number}")(x)
        over_time = x.mean(dim=(3, 4)).transpose(1, 2)
        return whole(over_time, mask)

    def classify(self, vector: Tensor) -> Tensor:
        """float32 ``[B, 512]`` to logits ``[B, classes]``."""
        assert self.fc is not None
        logits: Tensor = self.fc(vector)
        return logits


def _conv(inputs: int, outputs: int, middle: int | None, stride: int) -> nn.Module:
    """A 3x3x3 kernel; with ``middle`` channels one over space, then one over time."""
    if middle is None:
        return nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(
        nn.Conv3d(inputs, middle, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False),
        nn.BatchNorm3d(middle),
        nn.ReLU(inplace=True),
        nn.Conv3d(middle, outputs, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False),
    )


def _stem(outputs: int) -> nn.Sequential:
    conv = nn.Conv3d(3, outputs, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False)
    return nn.Sequential(conv, nn.BatchNorm3d(outputs), nn.ReLU(inplace=True))


def _factored_stem(outputs: int, middle: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(3, middle, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False),
        nn.BatchNorm3d(middle),
        nn.ReLU(inplace=True),
        nn.Conv3d(middle, outputs, (3, 1, 1), 1, (1, 0, 0), bias=False),
        nn.BatchNorm3d(outputs),
        nn.ReLU(inplace=True),
    )
