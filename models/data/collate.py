"""One sample, and a batch of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.types import VOID, Inputs, Targets


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One window; the fields are those of ``Inputs`` and ``Targets`` without the batch axis."""

    row: int
    """Number of its row in the manifest, from 0."""
    start_ns: int
    """Where the window begins in its file, before any random change."""
    video: Tensor | None = None
    video_mask: Tensor | None = None
    audio: Tensor | None = None
    audio_mask: Tensor | None = None
    tokens: Tensor | None = None
    question: Tensor | None = None
    answer: Tensor | None = None
    heads: dict[str, Tensor] = field(default_factory=dict)


def collate(samples: Sequence[Sample]) -> tuple[Inputs, Targets]:
    """A batch of samples of one data set; texts are padded to the longest."""
    inputs = Inputs(
        video=_stack([s.video for s in samples]),
        video_mask=_stack([s.video_mask for s in samples]),
        audio=_stack([s.audio for s in samples]),
        audio_mask=_stack([s.audio_mask for s in samples]),
        tokens=_pad([s.tokens for s in samples], 0),
        question=_pad([s.question for s in samples], 0),
        answer=_pad([s.answer for s in samples], 0),
    )
    heads = {}
    for name in samples[0].heads:
        values = [sample.heads[name] for sample in samples]
        stacked = _pad(values, VOID) if values[0].dim() == 1 and not values[0].is_floating_point() else _stack(values)
        assert stacked is not None
        heads[name] = stacked
    index = torch.tensor([sample.row for sample in samples], dtype=torch.int64)
    return inputs, Targets(heads, torch.ones(len(samples)), index)


def collate_pairs(pairs: Sequence[tuple[Sample, Sample]]) -> tuple[tuple[Inputs, Targets], tuple[Inputs, Targets]]:
    """Batches of the weak and of the strong views, row by row of the same windows."""
    return collate([weak for weak, _ in pairs]), collate([strong for _, strong in pairs])


def _stack(values: Sequence[Tensor | None]) -> Tensor | None:
    there = [value for value in values if value is not None]
    return torch.stack(there) if len(there) == len(values) else None


def _pad(values: Sequence[Tensor | None], filler: int) -> Tensor | None:
    """int64 ``[L]`` each to ``[B, longest]``."""
    there = [value for value in values if value is not None]
    if len(there) != len(values):
        return None
    return torch.nn.utils.rnn.pad_sequence(there, batch_first=True, padding_value=filler)
