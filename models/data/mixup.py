"""Mixup of a batch that may lack modalities and labels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.types import VOID, Inputs, Targets


def mixup(inputs: Inputs, targets: Targets, alpha: float, generator: np.random.Generator) -> tuple[Inputs, Targets]:
    """Blend each row with another, picture, sound and labels alike (Zhang et al., ICLR 2018).

    The share is drawn from Beta(``alpha``, ``alpha``). Rows are blended where both hold the same modalities and
    the same heads are known of both; rows with text, a question or a mask stay as they are, since those cannot
    be blended. So no NaN spreads.
    """
    some = next((x for x in (inputs.video_mask, inputs.audio_mask, inputs.tokens) if x is not None), None)
    if alpha <= 0 or some is None:
        return inputs, targets
    batch = len(some)
    partner = torch.from_numpy(generator.permutation(batch)).to(some.device)
    share = torch.from_numpy(generator.beta(alpha, alpha, batch).astype(np.float32)).to(some.device)
    known, fixed = _signature(inputs, targets), _unmixable(inputs, targets, batch)
    alone = (known != known[partner]).any(dim=1) | fixed | fixed[partner]
    if inputs.video_mask is not None:
        mask = inputs.video_mask
        alone |= (mask > 0).any(dim=1) & ~(mask * mask[partner] > 0).any(dim=1)
    share = torch.where(alone, torch.ones_like(share), share)
    mixed = Inputs(
        video=_blend(inputs.video, partner, share),
        # A sample that is missing on one side holds nothing to blend.
        video_mask=_where_mixed(inputs.video_mask, partner, share),
        audio=_blend(inputs.audio, partner, share),
        audio_mask=_blend(inputs.audio_mask, partner, share),
        tokens=inputs.tokens,
        question=inputs.question,
        answer=inputs.answer,
    )
    heads = {
        name: _blend(value, partner, share) if value.is_floating_point() else value
        for name, value in targets.heads.items()
    }
    weight = _blend(targets.weight, partner, share)
    return mixed, Targets({name: value for name, value in heads.items() if value is not None}, weight, targets.index)


def _signature(inputs: Inputs, targets: Targets) -> Tensor:
    """bool ``[B, K]``: which modalities are there and which labels are known."""
    parts = []
    if inputs.video_mask is not None:
        parts.append(inputs.video_mask.any(dim=1, keepdim=True))
    if inputs.audio_mask is not None:
        parts.append((inputs.audio_mask > 0)[:, None])
    parts += [~value.isnan() for value in targets.heads.values() if value.is_floating_point()]
    if not parts:
        some = inputs.tokens
        assert some is not None
        parts.append(torch.ones(len(some), 1, dtype=torch.bool, device=some.device))
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def _unmixable(inputs: Inputs, targets: Targets, batch: int) -> Tensor:
    """bool ``[B]``: rows with something that is not a number to be blended."""
    out = torch.zeros(batch, dtype=torch.bool)
    for tokens in (inputs.tokens, inputs.question, inputs.answer):
        if tokens is not None:
            out = out.to(tokens.device) | (tokens != 0).any(dim=1)
    for value in targets.heads.values():
        if not value.is_floating_point():
            out = out.to(value.device) | (value != VOID).flatten(1).any(dim=1)
    return out


def _blend(value: Tensor | None, partner: Tensor, share: Tensor) -> Tensor | None:
    if value is None:
        return None
    weight = share.reshape(-1, *(1 for _ in value.shape[1:]))
    mine = value.float()
    # ``where``: unknown values (NaN) of a row that stays alone must not reach it through a product with zero.
    return torch.where(weight == 1.0, mine, weight * mine + (1.0 - weight) * mine[partner])


def _where_mixed(mask: Tensor | None, partner: Tensor, share: Tensor) -> Tensor | None:
    return None if mask is None else torch.where((share == 1.0)[:, None], mask, mask * mask[partner])
