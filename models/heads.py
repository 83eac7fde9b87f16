"""The heads of the five tasks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention import Transformer, positions
from models.tokens import END, PAD, START

DECODER_WIDTH = 64
"""Channels of the segmentation decoder."""


class LabelHead(nn.Module):
    """Class or action: one linear layer on the fused vector."""

    def __init__(self, width: int, labels: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, labels))

    def forward(self, fused: Tensor) -> Tensor:
        """float32 ``[B, D]`` to logits ``[B, labels]``."""
        logits: Tensor = self.layers(fused)
        return logits


class EmbeddingHead(nn.Module):
    """Retrieval: a vector's place in the shared space (Radford et al., ICML 2021)."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, embedding)

    def forward(self, vector: Tensor) -> Tensor:
        """float32 ``[B, D]`` to float32 ``[B, E]`` of unit length."""
        return F.normalize(self.project(vector), dim=1)


class SeparableConv(nn.Module):
    """Depthwise 3x3 and pointwise convolution with batch normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """float32 ``[B, C, H, W]`` to the same shape."""
        out: Tensor = self.layers(x)
        return out


class PyramidDecoder(nn.Module):
    """Maps at strides 4 to 32 to class logits at stride 4 (Lin et al., CVPR 2017; Kirillov et al., CVPR 2019).

    ``channels`` are those of the maps, finest first.
    """

    def __init__(self, channels: Iterable[int], classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        sizes = tuple(channels)
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(size, DECODER_WIDTH, 1, bias=False), nn.BatchNorm2d(DECODER_WIDTH))
            for size in sizes
        )
        self.context = nn.Conv2d(sizes[-1], DECODER_WIDTH, 1)
        self.smooth = nn.ModuleList(SeparableConv(DECODER_WIDTH) for _ in sizes)
        self.refine = SeparableConv(DECODER_WIDTH)
        self.drop = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(DECODER_WIDTH, classes, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps ``[B, C, H/4, W/4]`` and coarser, finest first, to float32 logits ``[B, classes, H/4, W/4]``."""
        x = torch.relu(self.context(maps[-1].mean(dim=(2, 3), keepdim=True)))
        for level in range(len(maps) - 1, -1, -1):
            side = self.lateral[level](maps[level])
            if level < len(maps) - 1:
                x = F.interpolate(x, size=side.shape[2:], mode="bilinear", align_corners=False)
            x = self.smooth[level](torch.relu(side + x))
        logits: Tensor = self.classify(self.drop(self.refine(x)))
        return logits


class DialogueHead(nn.Module):
    """Answers about a window: a small autoregressive transformer (after Vaswani et al., NeurIPS 2017).

    The window's fused tokens and the question are a prefix that every position of the answer attends to; the answer
    attends to itself causally (prefix language model: Raffel et al., JMLR 2020). The output layer shares the
    weights of the embedding (Press and Wolf, EACL 2017).
    """

    def __init__(self, memory: int, vocabulary: int, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.width = width
        self.enter = nn.Linear(memory, width)
        self.embed = nn.Embedding(vocabulary, width, padding_idx=PAD)
        self.kind = nn.Parameter(torch.randn(3, width) * 0.02)
        self.mix = Transformer(width, layers, heads, dropout)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        with torch.no_grad():
            self.embed.weight[PAD].zero_()

    def forward(self, memory: Tensor, there: Tensor, question: Tensor, answer: Tensor) -> Tensor:
        """Logits of the token that follows each token of the answer: float32 ``[B, A, vocabulary]``.

        ``memory`` float32 ``[B, N, D]`` with ``there`` bool ``[B, N]``; ``question`` int64 ``[B, Q]``, 0 is padding;
        ``answer`` int64 ``[B, A]``, beginning with the start token.
        """
        prefix = torch.cat([self.enter(memory) + self.kind[0], self._words(question, 1)], dim=1)
        x = torch.cat([prefix, self._words(answer, 2)], dim=1)
        shown = torch.cat([there, question != PAD, torch.ones_like(answer, dtype=torch.bool)], dim=1)
        at = torch.arange(x.shape[1], device=x.device)
        reachable = (at[None] <= at[:, None]) | (at[None] < prefix.shape[1])
        mixed = self.mix(x, shown[:, None] & reachable[None])[:, prefix.shape[1] :]
        return F.linear(mixed, self.embed.weight, self.bias)

    @torch.no_grad()
    def generate(self, memory: Tensor, there: Tensor, question: Tensor, max_length: int) -> Tensor:
        """The likeliest next token, again and again: int64 ``[B, at most max_length]``.

        An answer ends with the end token, and padding after it; one that ``max_length`` cuts off has none.
        """
        answer = torch.full((len(memory), 1), START, dtype=torch.int64, device=memory.device)
        done = torch.zeros(len(memory), dtype=torch.bool, device=memory.device)
        for _ in range(max_length):
            logits = self.forward(memory, there, question, answer)[:, -1]
            logits[:, [PAD, START]] = -torch.inf
            token = torch.where(done, PAD, logits.argmax(dim=1))
            answer = torch.cat([answer, token[:, None]], dim=1)
            done = done | (token == END)
            if bool(done.all()):
                break
        return answer[:, 1:]

    def _words(self, tokens: Tensor, kind: int) -> Tensor:
        x: Tensor = self.embed(tokens) * self.width**0.5 + self.kind[kind]
        return x + positions(tokens.shape[1], self.width, x)
