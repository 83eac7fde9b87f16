"""The contrastive part of the loss: what a window shows, sounds like and is said to be lies together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.losses import info_nce
from models.types import Inputs, Targets

START_TEMPERATURE = 0.07
MAX_SCALE = 100.0
"""Largest 1/temperature; beyond it a batch's hardest pair alone would count (Radford et al., ICML 2021)."""


class Contrast(nn.Module):
    """Symmetric InfoNCE over each pair of modalities, over all processes, with a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / START_TEMPERATURE)))

    def forward(self, embeddings: Mapping[str, Tensor], same: Tensor) -> Tensor:
        """Mean over the pairs of modalities that at least two rows have; zero, but of the graph, without any.

        ``embeddings`` by modality float32 ``[B, E]`` of unit length, zeros where the modality is absent; ``same``
        int64 ``[B, K]``, a number for each of K senses in which rows may be alike: rows that share one that is not
        negative are no rivals. Every process must call with the same names and shapes, and gets the loss of all rows.
        """
        # A parameter beyond its bounds has no gradient, so the parameter itself is held inside them.
        with torch.no_grad():
            self.log_scale.clamp_(0.0, math.log(MAX_SCALE))
        scale = self.log_scale.exp()
        rows = {name: gather_rows(value) for name, value in embeddings.items()}
        alike = same_rows(gather_rows(same))
        # Sums in bfloat16 would blur the nearest rivals.
        with torch.autocast(alike.device.type, enabled=False):
            losses = [_pair_loss(rows[a], rows[b], scale, alike) for a, b in combinations(rows, 2)]
        found = [loss for loss in losses if loss is not None]
        if not found:
            return scale * 0.0 + sum((value.sum() * 0.0 for value in rows.values()), torch.zeros_like(scale))
        return torch.stack(found).mean()


def _pair_loss(a: Tensor, b: Tensor, scale: Tensor, alike: Tensor) -> Tensor | None:
    both = (a.detach().abs().sum(dim=1) > 0) & (b.detach().abs().sum(dim=1) > 0)
    if int(both.sum()) < 2:
        return None
    return info_nce(a[both], b[both], scale, alike[both][:, both])


def gather_rows(rows: Tensor) -> Tensor:
    """``[B, ...]`` to ``[processes x B, ...]``, in the order of processes; gradients flow back to their owners."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    """Every process weighs the rows of all, so that the gradients of a row from all processes are added."""

    @staticmethod
    def forward(_: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        summed = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed.chunk(dist.get_world_size())[dist.get_rank()]


def likeness(inputs: Inputs, targets: Targets) -> Tensor:
    """int64 ``[B, 2]``: the manifest's row, and a number that equal captions share; -1 where there is none."""
    device = next(value.device for name in Inputs.__slots__ if (value := getattr(inputs, name)) is not None)
    size = next(len(value) for name in Inputs.__slots__ if (value := getattr(inputs, name)) is not None)
    nothing = torch.full((size,), -1, dtype=torch.int64, device=device)
    index = nothing if targets.index is None else targets.index
    if inputs.tokens is None:
        return torch.stack([index, nothing], dim=1)
    # A polynomial of the ids modulo 2^64: equal captions always agree, others by chance of about 1 in 2^60.
    powers = torch.ones(inputs.tokens.shape[1], dtype=torch.int64, device=device)
    powers[1:] = 6364136223846793005
    code = (inputs.tokens * powers.cumprod(0)).sum(dim=1) & 0x7FFF_FFFF_FFFF_FFFF
    return torch.stack([index, torch.where(inputs.tokens.any(dim=1), code, nothing)], dim=1)


def same_rows(codes: Tensor) -> Tensor:
    """bool ``[N, N]`` from ``[N, K]``: rows that share a number, not negative, in some sense."""
    equal = (codes[:, None] == codes[None]) & (codes[:, None] >= 0)
    return equal.any(dim=2)
