"""What the learning modes add to plain supervision: labels from the averaged model, and scores from a teacher."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.config import HeadConfig
from models.objective import Batch
from models.types import VOID, Inputs, Targets

_COUNTED = ("tokens", "question", "answer")
"""Inputs whose second axis is as long as the longest text of the batch."""


def pseudo_labels(logits: dict[str, Tensor], heads: Sequence[HeadConfig], threshold: float) -> dict[str, Tensor]:
    """Labels that a model is sure of, as ``Targets.heads`` gives them, for ``class`` and ``action`` heads.

    A single-label row gets its best label when that scores at least ``threshold`` and is unknown otherwise (FixMatch:
    Sohn et al., NeurIPS 2020); each label of a multi-label row "is" from ``threshold`` on and "is not" up to
    ``1 - threshold``.
    """
    found = {}
    for head in heads:
        if head.kind not in ("class", "action") or head.name not in logits:
            continue
        scores = logits[head.name].float().sigmoid() if head.multi_label else logits[head.name].float().softmax(dim=1)
        unknown = torch.full_like(scores, float("nan"))
        if head.multi_label:
            low = torch.where(scores <= 1 - threshold, 0.0, unknown)
            found[head.name] = torch.where(scores >= threshold, 1.0, low)
        else:
            best = torch.zeros_like(scores).scatter_(1, scores.argmax(dim=1, keepdim=True), 1.0)
            found[head.name] = torch.where(scores.amax(dim=1, keepdim=True) >= threshold, best, unknown)
    return found


def with_pseudo_labels(
    labelled: tuple[Inputs, Targets],
    unlabelled: tuple[Inputs, Targets],
    logits: dict[str, Tensor],
    heads: Sequence[HeadConfig],
    threshold: float,
) -> Batch:
    """One batch of rows with labels and rows without, which learn the labels that ``logits`` are sure of.

    ``logits`` are another model's answers to the rows without labels, by head (see ``pseudo_labels``).
    """
    before, after = rows_of(*labelled), rows_of(*unlabelled)
    pseudo = {
        name: torch.cat([labels.new_full((before, labels.shape[1]), float("nan")), labels])
        for name, labels in pseudo_labels(logits, heads, threshold).items()
    }
    return Batch(*join(labelled, unlabelled), pseudo, after)


def without_labels(targets: Targets) -> Targets:
    """The same batch with nothing known of it."""
    heads = {
        name: torch.full_like(value, float("nan") if value.is_floating_point() else VOID)
        for name, value in targets.heads.items()
    }
    return Targets(heads, targets.weight, targets.index)


def join(one: tuple[Inputs, Targets], other: tuple[Inputs, Targets]) -> tuple[Inputs, Targets]:
    """Two batches as one, rows of ``one`` first. What only one has is absent, or unknown, in the other's rows."""
    sizes = (rows_of(*one), rows_of(*other))
    joined = {}
    for name in Inputs.__slots__:
        joined[name] = _joined(getattr(one[0], name), getattr(other[0], name), sizes, 0.0, padded=name in _COUNTED)
    heads = {}
    for name in {**one[1].heads, **other[1].heads}:
        parts = (one[1].heads.get(name), other[1].heads.get(name))
        whole = next(part for part in parts if part is not None).is_floating_point()
        heads[name] = _joined(*parts, sizes, float("nan") if whole else VOID, padded=not whole)
    weight = _joined(one[1].weight, other[1].weight, sizes, 1.0, padded=False)
    index = _joined(one[1].index, other[1].index, sizes, -1, padded=False)
    return Inputs(**joined), Targets({name: value for name, value in heads.items() if value is not None}, weight, index)


def rows_of(inputs: Inputs, targets: Targets) -> int:
    """How many rows a batch has."""
    tensors = [getattr(inputs, name) for name in Inputs.__slots__] + [targets.index, *targets.heads.values()]
    return len(next(tensor for tensor in tensors if tensor is not None))


def _joined(
    one: Tensor | None, other: Tensor | None, sizes: tuple[int, int], fill: float, *, padded: bool
) -> Tensor | None:
    some = one if one is not None else other
    if some is None:
        return None
    parts = [
        some.new_full((size, *some.shape[1:]), fill) if part is None else part
        for part, size in zip((one, other), sizes, strict=True)
    ]
    if padded and some.dim() == 2:
        length = max(part.shape[1] for part in parts)
        parts = [torch.cat([p, p.new_full((len(p), length - p.shape[1]), fill)], dim=1) for p in parts]
    return torch.cat(parts)
