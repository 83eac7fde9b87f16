"""Weights averaged over training's steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

Tensors = tuple[Tensor, ...] | list[Tensor]
Average = Callable[[Tensors, Tensors, Tensor | int], None]


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of ``model``, buffers included, that ``update_parameters`` moves towards it (Tarvainen and Valpola,
    Mean teachers are better role models, NeurIPS 2017). It is in evaluation mode and needs no gradient."""
    copy = AveragedModel(model, multi_avg_fn=_average(decay), use_buffers=True)
    return copy.eval().requires_grad_(False)


def _average(decay: float) -> Average:
    @torch.no_grad()
    def average(averages: Tensors, current: Tensors, steps: Tensor | int) -> None:
        # In the first steps the average would still be that of the random start.
        kept = min(decay, (1 + int(steps)) / (10 + int(steps)))
        for mean, value in zip(averages, current, strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, 1 - kept)
            else:
                mean.copy_(value)

    return average
