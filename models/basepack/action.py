"""Fitting the action head: logistic regression on pooled frozen features, with an L2 penalty.

A convex problem with one answer: nothing to stop early, nothing to average, and no luck with the seed but for
the sounds that windows are mixed with. A network that was trained on top of the same features knew the training
clips by heart and was worse on groups that it had not seen.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from models.audio import EMBEDDING, compress
from models.backbones.frame import HEAD_CHANNELS
from models.basepack.batches import Mixer
from models.basepack.config import ActionFit
from models.basepack.window import POOLED, WindowHead, pool
from models.losses import known_bce

BATCH = 64
FLOOR = 0.05
"""Added to deviations, so that features that hardly ever move are not blown up."""


def minimise(linear: nn.Linear, inputs: Tensor, loss: Callable[[Tensor], Tensor], penalty: float, steps: int) -> None:
    """Fit ``linear`` in place by L-BFGS from zero; ``loss`` is of the logits of all ``inputs``, float32 ``[N, D]``."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(linear(inputs)) + penalty * linear.weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]


def fit_action(head: WindowHead, mixer: Mixer, config: ActionFit, seed: int) -> None:
    """Set ``centre``, ``see``, ``hear`` and ``prior`` of ``head``; its audio encoder is only used.

    Every window of the mixer counts once, by its weight, with picture and sound dropped as the mixer does.
    """
    video, seen, audio, heard, targets = _inputs(head, mixer, np.random.default_rng([seed, 1]))
    centre, spread = _statistics(video, seen)
    middle, width = _statistics(audio, heard)
    scale = _prior_scale(config.frame_scale) / spread
    gain = config.audio_scale / width
    inputs = torch.cat([(video - centre) * scale * seen, seen, (audio - middle) * gain * heard, heard], dim=1)
    weights = torch.from_numpy(mixer.weights).float() * len(mixer.weights)
    linear = nn.Linear(inputs.shape[1], targets.shape[1])
    minimise(linear, inputs, lambda logits: known_bce(logits, targets, weights), config.penalty, config.iterations)
    with torch.no_grad():
        see, seen_bias, hear, heard_bias = torch.split(linear.weight, [POOLED, 1, EMBEDDING, 1], dim=1)
        # The standardisation goes into the weights: what is served is one product.
        head.centre.copy_(centre)
        head.see.weight.copy_(see * scale)
        head.see.bias.copy_(seen_bias[:, 0])
        head.hear.weight.copy_(hear * gain)
        head.hear.bias.copy_(heard_bias[:, 0] - head.hear.weight @ middle)
        head.prior.copy_(linear.bias)


def rescale(head: WindowHead, slope: Tensor, offset: Tensor) -> None:
    """Put a slope and an offset per label, float32 ``[16]`` each, into the weights of ``head``."""
    with torch.no_grad():
        for linear in (head.see, head.hear):
            linear.weight.mul_(slope[:, None])
            linear.bias.mul_(slope)
        head.prior.mul_(slope).add_(offset)


def _inputs(head: WindowHead, mixer: Mixer, random: np.random.Generator) -> tuple[Tensor, ...]:
    """Pooled video ``[N, POOLED]``, seen ``[N, 1]``, embedding ``[N, EMBEDDING]``, heard ``[N, 1]``, targets."""
    rows = []
    for first in range(0, len(mixer.weights), BATCH):
        batch = mixer.batch(range(first, min(first + BATCH, len(mixer.weights))), random)
        with torch.no_grad():
            video = pool(batch.features, batch.frame_mask)
            audio = head.audio(compress(batch.power))
        seen = batch.frame_mask.amax(dim=1, keepdim=True)
        rows.append((video, seen, audio, (batch.audio_mask > 0).float()[:, None], batch.actions))
    return tuple(torch.cat(column) for column in zip(*rows, strict=True))


def _statistics(values: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and floored deviation ``[D]`` of the rows of ``values`` that are there."""
    known = values[there[:, 0] > 0]
    return known.mean(dim=0), known.std(dim=0, correction=0) + FLOOR


def _prior_scale(frame_scale: float) -> Tensor:
    """``[POOLED]``: the looks of a place say little about what happens in it; its differences do."""
    part = torch.cat([torch.full((HEAD_CHANNELS,), frame_scale), torch.ones(HEAD_CHANNELS)])
    return part.repeat(2)
