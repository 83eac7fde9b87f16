"""The window head: what eight samples and two seconds of sound say together.

Actions are judged by ``sigmoid(W [F_video; F_audio] + b)``. ``F_video`` is the mean and the spread over time of the
frozen features (moving pictures differ from standing ones by the latter), ``F_audio`` the embedding of a small CNN.
One linear layer is all that a few hundred clips can teach without being learned by heart. What is absent adds
nothing, so any subset works, and the contribution of each modality is a plain difference.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.audio import EMBEDDING, AudioEncoder, LogMel
from models.backbones.frame import FEATURES
from models.basepack.labels import ACTIONS, SOUNDS

POOLED = 2 * FEATURES
"""Length of a window's video features: mean, then spread."""

OUTPUTS = (
    "action",
    "class",
    "action_without_video",
    "action_without_audio",
    "class_without_video",
    "class_without_audio",
)
"""Names of the window graph's outputs, in order."""


def pool(features: Tensor, mask: Tensor) -> Tensor:
    """Mean and standard deviation over a window's samples, those that are missing left out.

    float32 ``[B, T, 2560]`` and ``[B, T]`` (1 present, 0 missing) to ``[B, POOLED]``; zeros when all are missing.
    """
    present = (mask > 0)[:, :, None]
    weight = present.to(features.dtype)
    count = weight.sum(dim=1).clamp(min=1.0)
    # ``where``, not a product: a missing sample may hold anything, infinity too.
    known = torch.where(present, features, torch.zeros_like(features))
    mean = known.sum(dim=1) / count
    spread = ((known - mean[:, None]).square() * weight).sum(dim=1) / count
    return torch.cat([mean, spread.sqrt()], dim=1)


class WindowHead(nn.Module):
    """Features, sound and what is present of each to logits, with and without each modality."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.logmel = LogMel()
        self.audio = AudioEncoder()
        self.sound = nn.Linear(EMBEDDING, len(SOUNDS))
        self.register_buffer("centre", torch.zeros(POOLED))
        self.see = nn.Linear(POOLED, len(ACTIONS))
        self.hear = nn.Linear(EMBEDDING, len(ACTIONS))
        self.prior = nn.Parameter(torch.zeros(len(ACTIONS)))

    def judge(
        self, features: Tensor, frame_mask: Tensor, spectrogram: Tensor, audio_mask: Tensor
    ) -> tuple[Tensor, ...]:
        """As ``forward``, from the log-mel spectrogram ``[B, MELS, frames]``."""
        seen = (frame_mask.amax(dim=1) > 0)[:, None]
        heard = (audio_mask > 0)[:, None]
        sight = self.see(pool(features, frame_mask) - self.centre)
        embedding = self.audio(spectrogram)
        by_sight = torch.where(seen, sight, torch.zeros_like(sight))
        noise = self.hear(embedding)
        by_ear = torch.where(heard, noise, torch.zeros_like(noise))
        # Sounds are judged by ear alone: no recording here shows what makes them, so a picture could only mislead.
        silent = self.sound(torch.zeros_like(embedding))
        sound = torch.where(heard, self.sound(embedding), silent)
        return (
            self.prior + by_sight + by_ear,
            sound,
            self.prior + by_ear,
            self.prior + by_sight,
            sound.clone(),
            silent,
        )

    def forward(self, features: Tensor, frame_mask: Tensor, audio: Tensor, audio_mask: Tensor) -> tuple[Tensor, ...]:
        """Logits in the order of ``OUTPUTS``.

        ``features`` float32 ``[B, T, 2560]``, ``frame_mask`` ``[B, T]``, ``audio`` ``[B, N]`` at 16 kHz,
        ``audio_mask`` ``[B]``.
        """
        return self.judge(features, frame_mask, self.logmel(audio), audio_mask)
