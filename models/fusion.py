"""The window head: what eight samples and two seconds of sound say together.

Video is summed up over time by its mean and its spread (Moving pictures differ from standing ones by the
latter), sound by a small CNN; the two meet as ``F_fused = relu(W_f [F_video; F_audio])``. A modality that is
absent is replaced by a learned vector, so any subset works, and the answer does not depend on what the
absent one's tensors hold.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.audio import EMBEDDING, AudioEncoder, LogMel
from models.backbones.frame import FEATURES
from models.labels import ACTIONS, SOUNDS

VIDEO_WIDTH = 192
FUSED = 128


OUTPUTS = (
    "action",
    "class",
    "action_without_video",
    "action_without_audio",
    "class_without_video",
    "class_without_audio",
)
"""Names of the window graph's outputs, in order."""


class TemporalEncoder(nn.Module):
    """Features of a window's samples to one vector, samples that are missing left out."""

    centre: Tensor
    scale: Tensor

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(FEATURES))
        self.register_buffer("scale", torch.ones(FEATURES))
        self.drop = nn.Dropout(dropout)
        self.project = nn.Linear(FEATURES, VIDEO_WIDTH)
        self.before = nn.Linear(VIDEO_WIDTH, VIDEO_WIDTH, bias=False)
        self.after = nn.Linear(VIDEO_WIDTH, VIDEO_WIDTH, bias=False)
        self.out = nn.Sequential(nn.Dropout(dropout), nn.Linear(3 * VIDEO_WIDTH, EMBEDDING), nn.ReLU())

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """float32 ``[B, T, 2560]`` and ``[B, T]`` (1 present, 0 missing) to ``[B, EMBEDDING]``."""
        present = (mask > 0)[:, :, None]
        weight = present.to(features.dtype)
        # ``where``, not a product: a missing sample may hold anything, infinity too.
        known = torch.where(present, (features - self.centre) * self.scale, torch.zeros_like(features))
        x = torch.relu(self.project(self.drop(known))) * weight
        gap = torch.zeros_like(x[:, :1])
        neighbours = self.before(torch.cat([gap, x[:, :-1]], 1)) + self.after(torch.cat([x[:, 1:], gap], 1))
        x = torch.relu(x + neighbours) * weight
        count = weight.sum(dim=1).clamp(min=1.0)
        mean = x.sum(dim=1) / count
        spread = ((x - mean[:, None]).square() * weight).sum(dim=1) / count
        pooled = torch.cat([mean, torch.sqrt(spread + 1e-4), x.amax(dim=1)], dim=1)
        vector: Tensor = self.out(pooled)
        return vector


class WindowHead(nn.Module):
    """Features, sound and what is present of each to logits, with and without each modality."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.logmel = LogMel()
        self.temporal = TemporalEncoder(dropout)
        self.audio = AudioEncoder()
        self.no_video = nn.Parameter(torch.zeros(EMBEDDING))
        self.no_audio = nn.Parameter(torch.zeros(EMBEDDING))
        self.fuse = nn.Sequential(nn.Linear(2 * EMBEDDING, FUSED), nn.ReLU(), nn.Dropout(dropout))
        self.action = nn.Linear(FUSED, len(ACTIONS))
        self.sound = nn.Linear(EMBEDDING, len(SOUNDS))

    def encode(self, features: Tensor, frame_mask: Tensor, audio: Tensor, audio_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Video and audio vectors, each ``[B, EMBEDDING]``; absent ones are the learned vectors."""
        return self.encode_spectrogram(features, frame_mask, self.logmel(audio), audio_mask)

    def encode_spectrogram(
        self, features: Tensor, frame_mask: Tensor, spectrogram: Tensor, audio_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As ``encode``, from the log-mel spectrogram ``[B, MELS, frames]``."""
        seen = (frame_mask.amax(dim=1) > 0)[:, None]
        heard = (audio_mask > 0)[:, None]
        video = torch.where(seen, self.temporal(features, frame_mask), self.no_video)
        if self.training:
            return video, self._hear(spectrogram, heard[:, 0])
        return video, torch.where(heard, self.audio(spectrogram), self.no_audio)

    def _hear(self, spectrogram: Tensor, heard: Tensor) -> Tensor:
        """Only what is there goes through the network: normalisation by batch must not count what is not."""
        sound = self.no_audio.expand(len(heard), -1).clone()
        # Batch statistics need two items.
        if int(heard.sum()) > 1:
            sound[heard] = self.audio(spectrogram[heard])
        return sound

    def judge(self, video: Tensor, sound: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of actions ``[..., 16]`` and of sounds ``[..., 11]`` from vectors ``[..., EMBEDDING]``.

        Sounds are judged by ear alone: no recording here shows what makes them, so a picture could only mislead.
        """
        return self.action(self.fuse(torch.cat([video, sound], dim=-1))), self.sound(sound)

    def forward(self, features: Tensor, frame_mask: Tensor, audio: Tensor, audio_mask: Tensor) -> tuple[Tensor, ...]:
        """Logits in the order of ``OUTPUTS``.

        ``features`` float32 ``[B, T, 2560]``, ``frame_mask`` ``[B, T]``, ``audio`` ``[B, N]`` at 16 kHz,
        ``audio_mask`` ``[B]``.
        """
        video, sound = self.encode(features, frame_mask, audio, audio_mask)
        blind = self.no_video.expand_as(video)
        deaf = self.no_audio.expand_as(sound)
        # One pass of the small fusion part over all three cases.
        actions, sounds = self.judge(torch.stack([video, blind, video]), torch.stack([sound, sound, deaf]))
        action, action_blind, action_deaf = actions.unbind(0)
        heard, heard_blind, heard_deaf = sounds.unbind(0)
        return action, heard, action_blind, action_deaf, heard_blind, heard_deaf
