"""Fusion: from one vector for each modality, any of which may be absent, to one vector for the window.

Each takes ``vectors`` float32 ``[B, M, D]`` with zeros in the rows of absent modalities, ``present`` bool ``[B, M]``
and what each branch gave, in the order in which the modalities are stacked. Each gives a finite answer for any
subset; for the empty one it is the same for all windows, the prior.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from models.attention import Transformer, head_count, positions
from models.branches import Encoded

LAYERS = 2
"""Blocks of the attention fusion."""


class Fused(NamedTuple):
    """A window as one vector, and as tokens for a decoder to attend to."""

    vector: Tensor
    """float32 ``[B, D]``."""
    tokens: Tensor
    """float32 ``[B, N, D]``, zeros where not there."""
    mask: Tensor
    """bool ``[B, N]``."""


class ConcatFusion(nn.Module):
    """``F_fused = σ(W_f [F_video; F_audio; F_text] + b)``, the sigmoid of one linear layer over the joined vectors.

    An absent modality is a vector of zeros, so it adds nothing inside the sigmoid. The order of the stack is that
    of ``MODALITIES``; the formula does not depend on it.
    """

    def __init__(self, width: int, modalities: int) -> None:
        super().__init__()
        self.weight = nn.Linear(modalities * width, width)

    def forward(self, vectors: Tensor, present: Tensor, encoded: Sequence[Encoded]) -> Fused:
        """See the module."""
        return Fused(torch.sigmoid(self.weight(vectors.flatten(1))), vectors, present)


class GatedFusion(nn.Module):
    """Gated multimodal units (Arevalo et al., ICLR 2017 workshop) for any number of modalities.

    Each modality's hidden vector is weighted, element by element, by a gate that looks at all modalities. The gates
    are a softmax over the modalities that are there, so the weight of an absent one goes to the others.
    """

    def __init__(self, width: int, modalities: int) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(modalities))
        self.gate = nn.Linear(modalities * width, modalities * width)

    def forward(self, vectors: Tensor, present: Tensor, encoded: Sequence[Encoded]) -> Fused:
        """See the module."""
        hidden = torch.stack([torch.tanh(layer(vectors[:, n])) for n, layer in enumerate(self.hidden)], dim=1)
        score = self.gate(vectors.flatten(1)).reshape(vectors.shape)
        there = present[:, :, None]
        gates = torch.where(there, score, torch.finfo(score.dtype).min).softmax(dim=1)
        gates = torch.where(there, gates, 0.0)
        return Fused((gates * hidden).sum(dim=1), vectors, present)


class AttentionFusion(nn.Module):
    """A transformer over all tokens in time of all modalities (in the manner of Gabeur et al., ECCV 2020).

    A modality that is absent is told by one learned token of its own. The window's vector is that of a learned
    token that attends to all.
    """

    def __init__(self, width: int, token_widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.enter = nn.ModuleList(nn.Sequential(nn.LayerNorm(size), nn.Linear(size, width)) for size in token_widths)
        self.kind = nn.Parameter(torch.randn(len(token_widths), width) * 0.02)
        self.absent = nn.Parameter(torch.randn(len(token_widths), width) * 0.02)
        self.window = nn.Parameter(torch.randn(width) * 0.02)
        self.mix = Transformer(width, LAYERS, head_count(width), dropout)

    def forward(self, vectors: Tensor, present: Tensor, encoded: Sequence[Encoded]) -> Fused:
        """See the module."""
        batch, _, width = vectors.shape
        tokens = [self.window.expand(batch, 1, width), self.absent.expand(batch, -1, width)]
        visible = [torch.ones_like(present[:, :1]), ~present]
        for number, (part, enter) in enumerate(zip(encoded, self.enter, strict=True)):
            x = enter(part.tokens) + self.kind[number]
            tokens.append(x + positions(x.shape[1], width, x))
            visible.append(part.mask & present[:, number : number + 1])
        mask = torch.cat(visible, dim=1)
        mixed = self.mix(torch.cat(tokens, dim=1), mask)
        kept = torch.where(mask[:, :, None], mixed, 0.0)
        return Fused(kept[:, 0], kept[:, 1:], mask[:, 1:])


Fusion = ConcatFusion | GatedFusion | AttentionFusion


def build_fusion(
    kind: Literal["concat", "gated", "attention"], width: int, token_widths: Sequence[int], dropout: float
) -> Fusion:
    """The fusion of that kind for modalities whose tokens have these widths."""
    if kind == "concat":
        return ConcatFusion(width, len(token_widths))
    if kind == "gated":
        return GatedFusion(width, len(token_widths))
    return AttentionFusion(width, token_widths, dropout)


def drop_modalities(present: Tensor, chance: float) -> Tensor:
    """bool ``[B, M]`` with each modality hidden by that chance, but never the last one of a row (ModDrop: Neverova
    et al., TPAMI 2016). Uses torch's random numbers."""
    draw = torch.rand(present.shape, device=present.device)
    kept = present & (draw >= chance)
    # Where all were hidden, the one that came closest to staying stays.
    luckiest = torch.where(present, draw, -1.0).argmax(dim=1, keepdim=True)
    stays = torch.zeros_like(present).scatter(1, luckiest, True) & present
    return torch.where(kept.any(dim=1, keepdim=True), kept, stays)
