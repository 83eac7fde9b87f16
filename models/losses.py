"""Losses that leave out what is not known."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

IGNORE = -1
"""Class index of an item that says nothing about its class."""


def known_bce(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Binary cross-entropy over the labels that are known.

    ``logits`` float32 ``[B, L]``, ``targets`` int8 ``[B, L]``: 1, 0, or -1 for unknown. Zero when none is known.
    ``weights`` float32 ``[B]``, about 1 in the mean, say how much each item counts.
    """
    known = (targets >= 0).float()
    if weights is not None:
        known = known * weights[:, None]
    losses = F.binary_cross_entropy_with_logits(logits, targets.clamp(min=0).float(), reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1)


def known_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.05) -> Tensor:
    """Cross-entropy over the items whose class is known.

    ``logits`` float32 ``[B, C]``, ``targets`` int64 ``[B]`` with ``IGNORE`` for unknown. Zero when none is known.
    """
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE, label_smoothing=smoothing, reduction="sum")
    return losses / (targets != IGNORE).sum().clamp(min=1)
