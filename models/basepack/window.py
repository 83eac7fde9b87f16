"""The window head: what sixteen samples and two seconds of sound say together.

Actions are judged by experts that were each trained alone and are added (products of experts, Hinton 2002): one sees
what changes, one at which height it changes, one around which joints, one how things look, and one hears. Each is
logistic regression, which is all that a few hundred clips can teach without being learned by heart: on the mean and the
spread over time of the frozen features (moving pictures differ from standing ones by the latter), or on the embedding
of the sound. What is absent adds nothing, so any subset works, and the contribution of each modality is a plain
difference. For serving, those that see are one product.

Sounds are judged by ear alone: no recording here shows what makes them, so a picture could only mislead.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.audio import EMBEDDING, LogMel
from models.backbones.frame import EfficientNetLite0
from models.basepack.labels import ACTIONS
from models.basepack.sound import Ear, SoundNet
from models.basepack.watch import FEATURES

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
    """Square roots of mean and deviation over a window's samples, those that are missing left out.

    Roots, because a few features that shout would drown the others (Perronnin et al., ECCV 2010).
    float32 ``[B, T, FEATURES]``, not negative, and ``[B, T]`` (1 present, 0 missing) to ``[B, POOLED]``; zeros when all
    are missing.
    """
    present = (mask > 0)[:, :, None]
    weight = present.to(features.dtype)
    count = weight.sum(dim=1).clamp(min=1.0)
    # ``where``, not a product: a missing sample may hold anything, infinity too.
    known = torch.where(present, features, torch.zeros_like(features))
    mean = known.sum(dim=1) / count
    spread = ((known - mean[:, None]).square() * weight).sum(dim=1) / count
    return torch.cat([mean.sqrt(), spread.sqrt().sqrt()], dim=1)


class WindowHead(nn.Module):
    """Features, sound and what is present of each to logits, with and without each modality."""

    centre: Tensor

    def __init__(self, trunk: EfficientNetLite0) -> None:
        super().__init__()
        self.logmel = LogMel()
        self.ear = Ear(trunk)
        self.sound = SoundNet()
        self.register_buffer("centre", torch.zeros(POOLED))
        self.see = nn.Linear(POOLED, len(ACTIONS))
        self.hear = nn.Linear(EMBEDDING, len(ACTIONS))
        self.prior = nn.Parameter(torch.zeros(len(ACTIONS)))

    def judge(self, features: Tensor, frame_mask: Tensor, heard: Tensor, audio_mask: Tensor) -> tuple[Tensor, ...]:
        """As ``forward``, from the features ``[B, SOUND_FEATURES]`` that ``ear`` gives."""
        there = (audio_mask > 0)[:, None]
        embedding = self.sound.encoder(heard)
        by_sight, by_ear = self.experts(pool(features, frame_mask), frame_mask.amax(dim=1), embedding, audio_mask)
        silent = self.sound.classify(torch.zeros_like(embedding))
        sound = torch.where(there, self.sound.classify(embedding), silent)
        return (
            self.prior + by_sight + by_ear,
            sound,
            self.prior + by_ear,
            self.prior + by_sight,
            sound.clone(),
            silent,
        )

    def experts(self, pooled: Tensor, seen: Tensor, embedding: Tensor, heard: Tensor) -> tuple[Tensor, Tensor]:
        """What sight and ear add to the prior, each float32 ``[B, 20]``, zeros where absent.

        ``pooled`` ``[B, POOLED]``, ``embedding`` ``[B, EMBEDDING]``; ``seen`` and ``heard`` ``[B]``, 0 for absent.
        """
        sight, noise = self.see(pooled - self.centre), self.hear(embedding)
        by_sight = torch.where(seen[:, None] > 0, sight, torch.zeros_like(sight))
        by_ear = torch.where(heard[:, None] > 0, noise, torch.zeros_like(noise))
        return by_sight, by_ear

    def forward(self, features: Tensor, frame_mask: Tensor, audio: Tensor, audio_mask: Tensor) -> tuple[Tensor, ...]:
        """Logits in the order of ``OUTPUTS``.

        ``features`` float32 ``[B, T, FEATURES]``, ``frame_mask`` ``[B, T]``, ``audio`` ``[B, N]`` at 16 kHz,
        ``audio_mask`` ``[B]``.
        """
        return self.judge(features, frame_mask, self.ear(self.logmel(audio)), audio_mask)
