"""The per-frame encoder with a temporal head: each sample is encoded alone, then samples are set in relation.

What is computed per sample can be shared by all windows that hold it, or computed once and cached.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.attention import Transformer, head_count, positions
from models.backbones.base import Backbone, Sequence
from models.backbones.frame import FEATURES, HEAD_CHANNELS, EfficientNetLite0, FrameEncoder

WIDTH = 256
"""Length of the temporal head's tokens."""
LAYERS = 1
DROPOUT = 0.1


class PictureEncoder(nn.Module):
    """Features of one sample that is a single frame."""

    def __init__(self, trunk: EfficientNetLite0) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, frames: Tensor) -> Tensor:
        """uint8 ``[B, H, W, 3]`` to float32 ``[B, 1280]``."""
        features: Tensor = self.trunk(frames.float().permute(0, 3, 1, 2))
        return features


class TemporalHead(nn.Module):
    """Samples' features to tokens that know of each other and of their order."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, WIDTH))
        self.mix = Transformer(WIDTH, LAYERS, head_count(WIDTH), DROPOUT)

    def forward(self, features: Tensor, mask: Tensor) -> Sequence:
        """float32 ``[B, T, D]`` and ``[B, T]`` (1 there, 0 missing) to tokens ``[B, T, WIDTH]``."""
        there = mask > 0
        # ``where``, not a product: a missing sample may hold anything, infinity too.
        known = torch.where(there[:, :, None], features, 0.0)
        x = self.enter(known)
        tokens = self.mix(x + positions(x.shape[1], WIDTH, x), there)
        return Sequence(torch.where(there[:, :, None], tokens, 0.0), there)


class FrameBackbone(Backbone):
    """EfficientNet-Lite0 on each sample (Tan and Le, ICML 2019), then a small transformer over the samples.

    Samples are frames, or pairs of a frame and an earlier one whose difference is looked at too. Takes raw samples
    ``[B, T, H, W, 3]`` or ``[B, T, 2, H, W, 3]``, or their cached features float32 ``[B, T, D]`` with ``D`` 1280 or
    2560; gives tokens ``[B, T, 256]``, one for each sample.
    """

    features = WIDTH

    def __init__(self, trunk: EfficientNetLite0, *, pairs: bool) -> None:
        super().__init__()
        self.encoder = FrameEncoder(trunk) if pairs else PictureEncoder(trunk)
        self.head = TemporalHead(FEATURES if pairs else HEAD_CHANNELS)

    def forward(self, video: Tensor, mask: Tensor) -> Sequence:
        """Raw samples or cached features, and ``[B, T]``, to tokens ``[B, T, 256]``."""
        features = video if video.dim() == 3 else self.encode(video, mask)
        out: Sequence = self.head(features, mask)
        return out

    def encode(self, video: Tensor, mask: Tensor) -> Tensor:
        """Raw samples and ``[B, T]`` to features float32 ``[B, T, D]``: what may be cached."""
        there = (mask > 0).reshape(*mask.shape, *(1 for _ in video.shape[2:]))
        known = torch.where(there, video, 0)
        features: Tensor = self.encoder(known.flatten(0, 1))
        return features.reshape(*mask.shape, -1)

    def pyramid(self, frames: Tensor) -> list[Tensor]:
        """uint8 or float32 ``[B, H, W, 3]`` to the trunk's maps at strides 4 to 32, for a dense decoder."""
        return self.pretrained().pyramid(frames.float().permute(0, 3, 1, 2))

    def pretrained(self) -> EfficientNetLite0:
        """The trunk; the temporal head is always learned."""
        return self.encoder.trunk


def random_trunk() -> EfficientNetLite0:
    """An untrained trunk. Without normalisation layers the variance must be kept by the weights (He et al., 2015)."""
    trunk = EfficientNetLite0()
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return trunk
