"""The transformer pieces that text, time, fusion and dialogue share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HIDDEN = -1e4
"""Added to the score of what must not be attended to: zero after the softmax in any precision, and never NaN."""


class Block(nn.Module):
    """Self-attention and a two-layer network, each normalised before and added (Vaswani et al., NeurIPS 2017;
    Xiong et al., ICML 2020 for the order)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """float32 ``[B, L, D]``, bool ``[B, L]`` or ``[B, L, L]`` (query, key) to ``[B, L, D]``."""
        x = x + self.drop(self._attend(self.norm_attention(x), visible))
        out: Tensor = x + self.drop(self.mlp(self.norm_mlp(x)))
        return out

    def _attend(self, x: Tensor, visible: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if visible.dim() == 2:
            visible = visible[:, None]
        bias = torch.where(visible, 0.0, HIDDEN).to(x.dtype)[:, None]
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=bias)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return out


class Transformer(nn.Module):
    """Blocks, then a last normalisation."""

    def __init__(self, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """As ``Block.forward``."""
        for block in self.blocks:
            x = block(x, visible)
        out: Tensor = self.norm(x)
        return out


def positions(length: int, width: int, like: Tensor) -> Tensor:
    """Sines and cosines of the position (Vaswani et al., NeurIPS 2017): ``[length, width]``, as ``like`` is stored."""
    half = (width + 1) // 2
    rate = torch.exp(torch.arange(half, device=like.device) * (-math.log(10_000.0) / half))
    angle = torch.arange(length, device=like.device)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)[:, :width].to(like.dtype)


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """float32 ``[B, L, D]`` and bool ``[B, L]`` to ``[B, D]``: the mean over what is there, zeros where nothing is."""
    known = torch.where(mask[:, :, None], tokens, 0.0)
    return known.sum(dim=1) / mask.sum(dim=1).clamp(min=1)[:, None].to(tokens.dtype)


def head_count(width: int) -> int:
    """As many heads as divide the width, at most four."""
    return math.gcd(width, 4)
