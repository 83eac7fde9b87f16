"""What all video backbones have in common."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.attention import masked_mean

FLOOR = 1e-12
"""Least variance: the square root has no slope at zero."""


class Sequence(NamedTuple):
    """Tokens over time, and which of them are there."""

    tokens: Tensor
    """float32 ``[B, T', D]``, zeros where not there."""
    mask: Tensor
    """bool ``[B, T']``."""


class Backbone(nn.Module):
    """Frames to tokens over time. Subclasses take raw frames: colours are normalised inside."""

    features: int
    """Length ``D`` of a token."""

    def forward(self, video: Tensor, mask: Tensor) -> Sequence:
        """uint8 or float32 0..255 ``[B, T, H, W, 3]`` and ``[B, T]`` (1 there, 0 missing) to tokens."""
        raise NotImplementedError

    classifier: str | None = None
    """Name of the published network's last layer, which is there only when asked for by ``classes``."""

    def pretrained(self) -> nn.Module:
        """The part that starting weights are for, and that ``frozen`` holds still."""
        return self

    def classify(self, vector: Tensor) -> Tensor:
        """float32 ``[B, D]`` to the published network's logits ``[B, classes]``."""
        raise NotImplementedError

    def scores(self, video: Tensor, mask: Tensor) -> Tensor:
        """As ``forward``, to the published network's logits ``[B, classes]``, averaged over time."""
        return self.classify(masked_mean(*self(video, mask)))


def pool(sequence: Sequence) -> Tensor:
    """Mean and standard deviation over the tokens that are there, ``[B, 2 D]``; zeros where none is.

    A moving scene differs from a standing one by the deviation; with one token it is zero.
    """
    # In half precision the least variance would be zero, and its slope infinite.
    tokens, mask = sequence.tokens.float(), sequence.mask
    mean = masked_mean(tokens, mask)
    variance = masked_mean((tokens - mean[:, None]).square(), mask)
    spread = torch.where(mask.any(dim=1)[:, None], variance.clamp(min=FLOOR).sqrt(), 0.0)
    return torch.cat([mean, spread], dim=1)


def hold(video: Tensor, mask: Tensor) -> Tensor:
    """Missing frames replaced by the newest one before them (by the first one, where none is before).

    ``[B, T, ...]`` and ``[B, T]`` to float32 ``[B, T, ...]``; rows without any frame hold zeros. A convolution over
    time can't leave frames out, and a black one would look like a cut.
    """
    batch, length = mask.shape
    there = mask > 0
    at = torch.arange(length, device=video.device)
    back = at[:, None] - at[None]
    cost = torch.where(back >= 0, back, length - back)[None] + torch.where(there, 0, 4 * length)[:, None]
    nearest = cost.argmin(dim=2) + torch.arange(batch, device=video.device)[:, None] * length
    held = video.flatten(0, 1).index_select(0, nearest.flatten()).reshape(video.shape).float()
    seen = there.any(dim=1).reshape(-1, *(1 for _ in video.shape[1:]))
    return torch.where(seen, held, 0)


def normalised(video: Tensor, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Tensor:
    """float32 ``[B, T, H, W, 3]`` to ``[B, 3, T, H, W]`` with these means subtracted, over these deviations."""
    centred = (video - torch.tensor(mean, device=video.device)) / torch.tensor(deviation, device=video.device)
    return centred.permute(0, 4, 1, 2, 3)


def whole(tokens: Tensor, mask: Tensor) -> Sequence:
    """Tokens ``[B, T', D]`` of a backbone that mixes frames in time: all there where a row has any frame."""
    there = (mask > 0).any(dim=1)[:, None].expand(-1, tokens.shape[1])
    return Sequence(torch.where(there[:, :, None], tokens, 0.0), there)


def scaled(channels: int, multiplier: float) -> int:
    """A number of channels for a width multiplier, at least two."""
    return max(2, round(channels * multiplier))
