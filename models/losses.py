"""Losses that leave out what is not known."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from models.types import VOID

IGNORE = -1
"""Class index of an item that says nothing about its class."""
TINY = 1e-7
"""Below this a chance counts as this, so that its powers have a slope."""


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


def single_label_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    class_weights: Tensor | None = None,
    focal_gamma: float = 0.0,
    smoothing: float = 0.0,
    sample_weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy against distributions over labels, mean over the rows whose label is known; zero without any.

    ``logits``, ``targets`` float32 ``[B, C]``; a row of ``targets`` with a NaN is unknown. ``class_weights`` ``[C]``
    scale each label's term, ``sample_weights`` ``[B]`` each row's. ``focal_gamma`` over 0 turns each label's term
    into ``-(1 - p)^gamma log p`` (Lin et al., Focal loss for dense object detection, ICCV 2017). ``smoothing`` moves
    that share of a target to all labels alike (Szegedy et al., CVPR 2016).
    """
    known = ~targets.isnan().any(dim=1)
    targets = _smoothed(targets.nan_to_num(0.0), smoothing, logits.shape[1])
    log_p = _wide(logits).log_softmax(dim=1)
    terms = -targets * log_p
    if focal_gamma:
        terms = terms * (-torch.expm1(log_p)).clamp(min=TINY) ** focal_gamma
    if class_weights is not None:
        terms = terms * class_weights
    return _mean(terms.sum(dim=1), known, sample_weights)


def multi_label_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    label_weights: Tensor | None = None,
    focal_gamma: float = 0.0,
    smoothing: float = 0.0,
    sample_weights: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy of each label, mean over the entries that are known; zero without any.

    ``logits``, ``targets`` float32 ``[B, L]``, targets 0..1 with NaN for unknown. ``label_weights`` ``[2, L]`` scale
    the terms of "is not" and "is". Focal term, smoothing and ``sample_weights`` as for ``single_label_loss``.
    """
    known = ~targets.isnan()
    logits = _wide(logits)
    targets = _smoothed(targets.nan_to_num(0.0), smoothing, 2)
    positive, negative = -targets * F.logsigmoid(logits), -(1 - targets) * F.logsigmoid(-logits)
    if focal_gamma:
        p, q = logits.sigmoid().clamp(min=TINY), (-logits).sigmoid().clamp(min=TINY)
        positive, negative = positive * q**focal_gamma, negative * p**focal_gamma
    if label_weights is not None:
        positive, negative = positive * label_weights[1], negative * label_weights[0]
    rows = None if sample_weights is None else sample_weights[:, None].expand_as(logits)
    return _mean(positive + negative, known, rows)


def class_balanced_weights(counts: Tensor, beta: float) -> Tensor:
    """Weights of labels by their effective number of samples, 1 in the mean over the labels that there are.

    ``counts`` ``[..., C]``, samples of each label; a label without any weighs 0. ``(1 - beta) / (1 - beta^n)``
    (Cui et al., Class-balanced loss based on effective number of samples, CVPR 2019); ``beta`` 0 weighs all alike.
    """
    counts = counts.double()
    weights = torch.where(counts > 0, (1 - beta) / (1 - beta ** counts.clamp(min=1)), torch.zeros(()).double())
    present = (counts > 0).sum(dim=-1, keepdim=True).clamp(min=1)
    return (weights * present / weights.sum(dim=-1, keepdim=True).clamp(min=1e-12)).float()


def segmentation_loss(logits: Tensor, targets: Tensor, *, class_weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of pixels, mean over those with a class; zero without any.

    ``logits`` float32 ``[B, C, h, w]``, enlarged to the mask where they are smaller; ``targets`` int64 ``[B, H, W]``
    with ``VOID`` for unknown.
    """
    logits = _wide(logits)
    if logits.shape[2:] != targets.shape[1:]:
        logits = F.interpolate(logits, size=targets.shape[1:], mode="bilinear", align_corners=False)
    losses = F.cross_entropy(logits, targets, weight=class_weights, ignore_index=VOID, reduction="none")
    return losses.sum() / (targets != VOID).sum().clamp(min=1)


def dialogue_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of an answer's tokens, mean over those that count; zero without any.

    ``logits`` float32 ``[B, A, vocabulary]``, ``targets`` int64 ``[B, A]`` with ``VOID`` where no token follows.
    """
    losses = F.cross_entropy(_wide(logits).flatten(0, 1), targets.flatten(), ignore_index=VOID, reduction="sum")
    return losses / (targets != VOID).sum().clamp(min=1)


def distillation_loss(logits: Tensor, scores: Tensor, temperature: float, *, multi_label: bool = False) -> Tensor:
    """Divergence of the student's from the teacher's softened distribution, mean over the rows with scores.

    ``logits`` float32 ``[B, C]``, ``scores`` float32 ``[B, C]`` the teacher's probabilities; a row with NaN has none.
    Both are softened by ``temperature`` and the divergence is multiplied by its square, so that gradients keep their
    size (Hinton et al., Distilling the knowledge in a neural network, arXiv:1503.02531). With ``multi_label`` each
    label is a distribution of its own over "is" and "is not".
    """
    known = ~scores.isnan().any(dim=1)
    scores, logits = scores.nan_to_num(0.5).clamp(1e-7, 1.0), _wide(logits)
    if multi_label:
        scores = torch.stack([scores, (1 - scores).clamp(min=1e-7)], dim=2)
        student = torch.stack([F.logsigmoid(logits / temperature), F.logsigmoid(-logits / temperature)], dim=2)
    else:
        student = (logits / temperature).log_softmax(dim=1)
    teacher = (scores.log() / temperature).log_softmax(dim=2 if multi_label else 1)
    rows = (teacher.exp() * (teacher - student)).flatten(1).sum(dim=1) * temperature**2
    return _mean(rows, known, None)


def info_nce(a: Tensor, b: Tensor, scale: Tensor | float, same: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE: row n of ``a`` is to find row n of ``b`` among all rows, and the other way round.

    ``a``, ``b`` float32 ``[N, E]`` of unit length, ``scale`` = 1/temperature. ``same`` bool ``[N, N]`` marks rows of
    one meaning (the same file, the same caption): off the diagonal these count neither as match nor as rival.
    Zero with fewer than two rows. (van den Oord et al., arXiv:1807.03748; symmetric as in Radford et al., ICML 2021.)
    """
    if len(a) < 2:
        return (a.sum() + b.sum()) * 0.0
    similarity = _wide(a) @ _wide(b).T * scale
    if same is not None:
        rival = same & ~torch.eye(len(a), dtype=torch.bool, device=a.device)
        similarity = similarity.masked_fill(rival, float("-inf"))
    truth = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(similarity, truth) + F.cross_entropy(similarity.T, truth)) / 2


def _wide(x: Tensor) -> Tensor:
    """Single precision at least: sums over many labels in half precision lose the small ones."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _smoothed(targets: Tensor, smoothing: float, labels: int) -> Tensor:
    return targets * (1 - smoothing) + smoothing / labels if smoothing else targets


def _mean(losses: Tensor, known: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of the known ones, weighted; zero, but still of the graph, without any."""
    counted = known.float() if weights is None else known.float() * weights
    return (losses * counted).sum() / counted.sum().clamp(min=1e-6)
