"""What passes between data, networks, losses and measures: one batch of windows, its targets, and the answers.

Every tensor's first axis is the batch. What a window does not have (no sound, no text, no label) is said by a mask
or by NaN, never by leaving the row out, so a batch may mix samples of any modalities and any labels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

ModalityName = Literal["video", "audio", "text"]
MODALITIES: tuple[ModalityName, ...] = ("video", "audio", "text")
"""The order in which modalities are stacked, everywhere."""

VOID = -1
"""Index of a mask's pixels that have no class, and of answers' tokens that no loss falls on."""


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What a model sees. A modality that the model does not take, or the data set does not have, is ``None``."""

    video: Tensor | None = None
    """uint8 (or float32 0..255) ``[B, T, H, W, 3]`` RGB; with look-back ``[B, T, 2, H, W, 3]``, the earlier frame
    first; or, where a frozen frame encoder's output is cached, its features float32 ``[B, T, D]``."""
    video_mask: Tensor | None = None
    """float32 ``[B, T]``: 1 where a sample is there, 0 where it is missing; a row of zeros is "no video"."""
    audio: Tensor | None = None
    """float32 ``[B, N]`` mono waveform in -1..1, zeros where not covered."""
    audio_mask: Tensor | None = None
    """float32 ``[B]``: the covered share of the window's sound, 0 is "no audio"."""
    tokens: Tensor | None = None
    """int64 ``[B, L]`` token ids, 0 is padding; a row of zeros is "no text"."""
    question: Tensor | None = None
    """int64 ``[B, Q]`` token ids of a question about the window, 0 is padding; dialogue only."""
    answer: Tensor | None = None
    """int64 ``[B, A]`` the answer so far, beginning with the start token; dialogue only (teacher forcing)."""

    def to(self, device: object) -> Inputs:
        """The same on another device."""
        return Inputs(*(_to(getattr(self, name), device) for name in Inputs.__slots__))


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """What is known of a batch."""

    heads: dict[str, Tensor] = field(default_factory=dict)
    """By head name. ``class`` and ``action`` heads: float32 ``[B, labels]``, for a single-label head a distribution
    over labels (one-hot, or soft by mixup, pseudo-label or teacher), for a multi-label head 0..1 each; NaN is
    unknown (for a single-label head the whole row). ``segmentation``: int64 ``[B, h, w]`` class indices, ``VOID``
    where unknown. ``dialogue``: int64 ``[B, A]``, the token that follows each of ``Inputs.answer``, ``VOID`` where
    none. ``embedding`` heads have no targets: the pairs in the batch are."""
    weight: Tensor | None = None
    """float32 ``[B]``: how much each sample counts, about 1 in the mean."""
    index: Tensor | None = None
    """int64 ``[B]``: row of the manifest."""

    def to(self, device: object) -> Targets:
        """The same on another device."""
        heads = {name: value.to(device) for name, value in self.heads.items()}  # type: ignore[call-overload]
        return Targets(heads, _to(self.weight, device), _to(self.index, device))


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """What a model answers."""

    fused: Tensor
    """float32 ``[B, D]``."""
    fused_tokens: Tensor
    """float32 ``[B, M, D]``: one token for each modality (and each sample in time, for attention); dialogue attends
    to these."""
    present: Tensor
    """bool ``[B, 3]``, in the order of ``MODALITIES``: what the answer rests on, after modality dropout."""
    embeddings: dict[ModalityName, Tensor]
    """float32 ``[B, E]`` of unit length in the shared space, for each modality the model takes; rows of absent
    modalities hold zeros."""
    logits: dict[str, Tensor]
    """By head name: float32 ``[B, labels]``; segmentation ``[B, classes, h, w]``; dialogue ``[B, A, vocabulary]``;
    an embedding head ``[B, E]`` of unit length, of the fused window."""


def _to(value: Tensor | None, device: object) -> Tensor | None:
    return None if value is None else value.to(device)  # type: ignore[call-overload]
