"""I3D: Inception-v1 with its kernels inflated in time."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.base import Backbone, Sequence, hold, normalised, scaled, whole

MIXED = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}
"""Channels of the branches: 1x1; 1x1 then 3x3; 1x1 then 3x3; pooling then 1x1 (Szegedy et al., CVPR 2015)."""
DROPOUT = 0.5
Triple = tuple[int, int, int]


class Unit3D(nn.Module):
    """Convolution, normalisation, rectifier; padded as TensorFlow's ``SAME`` does, which depends on the size."""

    def __init__(self, inputs: int, outputs: int, kernel: Triple = (1, 1, 1), stride: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(inputs, outputs, kernel, stride, bias=False)
        # As in the published network; PyTorch's defaults are 1e-5 and 0.1.
        self.bn = nn.BatchNorm3d(outputs, eps=1e-3, momentum=0.01)
        self.kernel, self.stride = kernel, (stride, stride, stride)
        nn.init.kaiming_normal_(self.conv3d.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """float32 ``[B, C, T, H, W]`` to ``[B, C', T/stride, H/stride, W/stride]``, rounded up."""
        return F.relu(self.bn(self.conv3d(pad_same(x, self.kernel, self.stride))))


class Inception(nn.Module):
    """Four branches side by side, joined in this order."""

    def __init__(self, inputs: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        cube = (3, 3, 3)
        self.b0 = Unit3D(inputs, widths[0])
        self.b1a, self.b1b = Unit3D(inputs, widths[1]), Unit3D(widths[1], widths[2], cube)
        self.b2a, self.b2b = Unit3D(inputs, widths[3]), Unit3D(widths[3], widths[4], cube)
        self.b3b = Unit3D(inputs, widths[5])
        self.outputs = widths[0] + widths[2] + widths[4] + widths[5]

    def forward(self, x: Tensor) -> Tensor:
        """float32 ``[B, C, T, H, W]`` to ``[B, C', T, H, W]``."""
        pooled = max_pool_same(x, (3, 3, 3), (1, 1, 1))
        branches = [self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)]
        return torch.cat(branches, dim=1)


class Logits(nn.Module):
    """The published network's last layer, a 1x1x1 convolution; here on one vector."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(inputs, classes, 1)

    def forward(self, vector: Tensor) -> Tensor:
        """float32 ``[B, D]`` to ``[B, classes]``."""
        return F.linear(vector, self.conv3d.weight.flatten(1), self.conv3d.bias)


class I3D(Backbone):
    """Inflated Inception-v1 (Carreira and Zisserman, CVPR 2017), in the layout of the Kinetics RGB weights for PyTorch.

    Takes ``[B, T, H, W, 3]`` of any size (published: 224 x 224, 64 frames at 25 per second); gives tokens
    ``[B, ceil(T/8) - 1, 1024]`` (one where that is less): like the published network's pooling of 2 x 7 x 7, each is
    the mean of two neighbours in time and of the whole picture. With ``classes`` (400 in Kinetics) there is the
    layer ``logits``, and ``scores`` is the published network's output before the softmax, averaged over time.
    """

    classifier = "logits"

    def __init__(self, *, multiplier: float = 1.0, classes: int | None = None) -> None:
        super().__init__()
        first, second = scaled(64, multiplier), scaled(192, multiplier)
        self.Conv3d_1a_7x7 = Unit3D(3, first, (7, 7, 7), 2)
        self.Conv3d_2b_1x1 = Unit3D(first, first)
        self.Conv3d_2c_3x3 = Unit3D(first, second, (3, 3, 3))
        channels = second
        for name, widths in MIXED.items():
            block = Inception(channels, tuple(scaled(width, multiplier) for width in widths))
            self.add_module(f"Mixed_{name}", block)
            channels = block.outputs
        self.features = channels
        self.drop = nn.Dropout(DROPOUT)
        self.logits = Logits(channels, classes) if classes else None

    def forward(self, video: Tensor, mask: Tensor) -> Sequence:
        """As ``Backbone.forward``; tokens ``[B, T', 1024]``."""
        x = normalised(hold(video, mask), (127.5,) * 3, (127.5,) * 3)
        x = max_pool_same(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
        x = max_pool_same(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        x = max_pool_same(self._mixed(x, "3b", "3c"), (3, 3, 3), (2, 2, 2))
        x = max_pool_same(self._mixed(x, "4b", "4c", "4d", "4e", "4f"), (2, 2, 2), (2, 2, 2))
        over_time = self._mixed(x, "5b", "5c").mean(dim=(3, 4)).transpose(1, 2)
        if over_time.shape[1] > 1:
            over_time = (over_time[:, :-1] + over_time[:, 1:]) / 2
        return whole(over_time, mask)

    def classify(self, vector: Tensor) -> Tensor:
        """float32 ``[B, 1024]`` to logits ``[B, classes]``."""
        assert self.logits is not None
        logits: Tensor = self.logits(self.drop(vector))
        return logits

    def _mixed(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = self.get_submodule(f"Mixed_{name}")(x)
        return x


def pad_same(x: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    """Zeros around ``[B, C, T, H, W]`` so that the output's sizes are the input's over the stride, rounded up."""
    edges = []
    for size, wide, step in zip(x.shape[2:], kernel, stride, strict=True):
        total = max(wide - (size % step or step), 0)
        edges.append((total // 2, total - total // 2))
    # ``pad`` counts from the last axis.
    return F.pad(x, tuple(chain.from_iterable(reversed(edges))))


def max_pool_same(x: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    """Maximum with ``SAME`` padding. The border of zeros never wins: what is pooled was rectified."""
    return F.max_pool3d(pad_same(x, kernel, stride), kernel, stride)
