"""One branch for each modality: from what a window holds of it to tokens over time and one vector."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.attention import masked_mean
from models.audio import EMBEDDING, AudioEncoder, LogMel, SpecAugment, compress
from models.backbones.base import Backbone, pool
from models.config import AudioConfig
from models.text import TextEncoder
from models.tokens import PAD
from models.types import Inputs


class Encoded(NamedTuple):
    """A modality, encoded. Rows without it hold zeros."""

    vector: Tensor
    """float32 ``[B, vector_width]``."""
    tokens: Tensor
    """float32 ``[B, T', token_width]``."""
    mask: Tensor
    """bool ``[B, T']``: which tokens are there."""


class Branch(nn.Module):
    """A modality's network. ``given`` picks its inputs, ``forward`` takes them."""

    vector_width: int
    token_width: int

    def given(self, inputs: Inputs) -> tuple[Tensor, ...] | None:
        """This modality's tensors, in the order of ``forward``; ``None`` when the batch has none."""
        raise NotImplementedError

    def present(self, *given: Tensor) -> Tensor:
        """bool ``[B]``: which rows have the modality."""
        raise NotImplementedError

    def empty(self, batch: int, like: Tensor) -> Encoded:
        """What stands for a modality that no row has."""
        mask = torch.zeros(batch, 0, dtype=torch.bool, device=like.device)
        return Encoded(like.new_zeros(batch, self.vector_width), like.new_zeros(batch, 0, self.token_width), mask)


class VideoBranch(Branch):
    """A backbone and pooling over time."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.token_width = backbone.features
        self.vector_width = 2 * backbone.features

    def given(self, inputs: Inputs) -> tuple[Tensor, ...] | None:
        """``video`` and ``video_mask``; without a mask all samples are there."""
        if inputs.video is None:
            return None
        mask = inputs.video_mask
        return inputs.video, torch.ones(inputs.video.shape[:2], device=inputs.video.device) if mask is None else mask

    def present(self, *given: Tensor) -> Tensor:
        """bool ``[B]``: rows with any sample."""
        return (given[1] > 0).any(dim=1)

    def forward(self, video: Tensor, mask: Tensor) -> Encoded:
        """As ``Inputs.video`` and ``Inputs.video_mask``."""
        sequence = self.backbone(video, mask)
        return Encoded(pool(sequence), sequence.tokens, sequence.mask)


class AudioBranch(Branch):
    """Log-mel spectrogram, its augmentation, and a small CNN."""

    def __init__(self, config: AudioConfig, spec_augment: float) -> None:
        super().__init__()
        self.logmel = LogMel()
        self.augment = SpecAugment(spec_augment)
        self.encoder = AudioEncoder(config.widths, config.dropout)
        self.token_width = config.widths[-1]
        self.vector_width = EMBEDDING

    def given(self, inputs: Inputs) -> tuple[Tensor, ...] | None:
        """``audio`` and ``audio_mask``; without a mask all sound is there."""
        if inputs.audio is None:
            return None
        mask = inputs.audio_mask
        return inputs.audio, torch.ones(inputs.audio.shape[0], device=inputs.audio.device) if mask is None else mask

    def present(self, *given: Tensor) -> Tensor:
        """bool ``[B]``: rows with any sound."""
        return given[1] > 0

    def forward(self, audio: Tensor, mask: Tensor) -> Encoded:
        """As ``Inputs.audio`` and ``Inputs.audio_mask``."""
        there = self.present(audio, mask)
        known = torch.where(there[:, None], audio, 0.0)
        maps = self.encoder.over_time(self.augment(compress(self.logmel.power(known))))
        return _known(self.encoder.summarise(maps), maps.transpose(1, 2), there[:, None].expand(-1, maps.shape[2]))


class TextBranch(Branch):
    """The text's network, or one that takes its place (see ``TextEncoder``)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.token_width = self.vector_width = int(encoder.features)  # type: ignore[arg-type]

    def given(self, inputs: Inputs) -> tuple[Tensor, ...] | None:
        """``tokens``."""
        return None if inputs.tokens is None else (inputs.tokens,)

    def present(self, *given: Tensor) -> Tensor:
        """bool ``[B]``: rows with any token."""
        return (given[0] != PAD).any(dim=1)

    def forward(self, tokens: Tensor) -> Encoded:
        """As ``Inputs.tokens``. An encoder that gives one vector gives one token of it."""
        there = tokens != PAD
        if isinstance(self.encoder, TextEncoder):
            over = self.encoder.over_tokens(tokens)
            return Encoded(masked_mean(over, there), over, there)
        sentence = self.encoder(tokens)
        return _known(sentence, sentence[:, None], there.any(dim=1)[:, None])


def _known(vector: Tensor, tokens: Tensor, mask: Tensor) -> Encoded:
    """With zeros where nothing is there."""
    row = mask.any(dim=1)[:, None]
    return Encoded(
        torch.where(row, vector, 0.0),
        torch.where(mask[:, :, None], tokens, 0.0),
        mask,
    )
