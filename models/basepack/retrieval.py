"""Retrieval: a sentence finds the moments that it tells of.

Two towers into one space (Radford et al., ICML 2021): a window's frozen video features and the embedding of its sound,
each by one linear layer, added; and the words of a sentence. Trained by symmetric InfoNCE with a learned temperature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from models.audio import EMBEDDING
from models.backbones.frame import HEAD_CHANNELS
from models.basepack.fit import pace
from models.basepack.text_tower import BagOfWords, HashedWords
from models.basepack.window import POOLED, pool
from models.errors import DataError
from models.losses import info_nce
from models.progress import Report

SPACE = 64
"""Length of an embedding in the shared space."""
START_TEMPERATURE = 0.07
MAX_SCALE = 50.0
"""Largest 1/temperature."""
FLOOR = 0.05
"""Added to deviations."""
Floats = NDArray[np.float32]


class RetrievalHead(nn.Module):
    """Windows and sentences to unit vectors whose product says how well they fit."""

    video_centre: Tensor
    video_scale: Tensor
    audio_centre: Tensor
    audio_scale: Tensor

    def __init__(self, text: nn.Module | None = None, text_width: int = 64, video: int = POOLED) -> None:
        super().__init__()
        for name, length in (("video", video), ("audio", EMBEDDING)):
            self.register_buffer(f"{name}_centre", torch.zeros(length))
            self.register_buffer(f"{name}_scale", torch.ones(length))
        self.see = nn.Linear(video, SPACE, bias=False)
        self.hear = nn.Linear(EMBEDDING, SPACE, bias=False)
        self.prior = nn.Parameter(torch.zeros(SPACE))
        self.text = BagOfWords(HashedWords().buckets, text_width) if text is None else text
        self.say = nn.Linear(text_width, SPACE)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / START_TEMPERATURE)))

    def embed_clip(self, features: Tensor, frame_mask: Tensor, audio: Tensor, audio_mask: Tensor) -> Tensor:
        """Windows float32 ``[B, SPACE]`` of unit length.

        ``features`` float32 ``[B, T, D]``, ``frame_mask`` ``[B, T]`` (1 present, 0 missing), ``audio`` the sound's
        embedding ``[B, EMBEDDING]``, ``audio_mask`` ``[B]`` (0 where there is no sound).
        """
        return self.embed_pooled(pool(features, frame_mask), frame_mask.amax(dim=1), audio, audio_mask)

    def embed_pooled(self, pooled: Tensor, seen: Tensor, audio: Tensor, heard: Tensor) -> Tensor:
        """As ``embed_clip`` from pooled features ``[B, POOLED]``; ``seen`` and ``heard`` ``[B]``, 0 for absent."""
        sight = self.see((pooled.square() - self.video_centre) * self.video_scale)
        noise = self.hear((audio - self.audio_centre) * self.audio_scale)
        zero = torch.zeros_like(sight)
        both = torch.where(seen[:, None] > 0, sight, zero) + torch.where(heard[:, None] > 0, noise, zero)
        return F.normalize(both + self.prior, dim=1)

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Sentences int64 ``[B, L]``, 0 for padding, to float32 ``[B, SPACE]`` of unit length."""
        return F.normalize(self.say(self.text(tokens)), dim=1)


@dataclass(frozen=True, slots=True, eq=False)
class Captioned:
    """A recording with what is said of it."""

    name: str
    """File."""
    dataset: str
    group: str
    """Of its data set; never on both sides of a split."""
    meaning: str
    """Recordings of one meaning are no rivals in training: a label, or the sentence itself."""
    captions: tuple[str, ...]
    """To train on."""
    query: str
    """To ask with when the recording is held out."""
    answer: str
    """A query is answered by any recording with its own ``answer``."""
    video: Floats
    """Pooled features of its windows, float32 ``[W, POOLED]``; no rows for a sound."""
    audio: Floats
    """Embeddings of its windows' sound, float32 ``[V, EMBEDDING]``; no rows for a silent recording."""
    plain: int = 0
    """Of ``video``, and of ``audio`` where both are there, the first so many are the windows of the service."""
    extra: tuple[str, ...] = field(default=())
    """More sentences of its meaning to train on, drawn less often."""


@dataclass(frozen=True, slots=True)
class RetrievalFit:
    """How the head is trained."""

    steps: int = 300
    batch: int = 96
    learning_rate: float = 3e-3
    weight_decay: float = 0.2
    frame_scale: float = 0.3
    """Scale of the frames' own features against their differences', as for actions."""
    video_dropout: float = 0.3
    audio_dropout: float = 0.2
    borrowed: float = 0.5
    """Chance that a picture is heard with some other recording's sound track, or none: a track is no hint."""


def fit_retrieval(
    clips: Sequence[Captioned], head: RetrievalHead, words: HashedWords, fit: RetrievalFit, seed: int, report: Report
) -> RetrievalHead:
    """Train ``head`` in place. Raises ``DataError`` without two recordings to tell apart."""
    if len({clip.meaning for clip in clips}) < 2:
        raise DataError("retrieval needs recordings of at least two captions; give the data sets that have them")
    torch.manual_seed(seed)
    _standardise(head, clips, fit.frame_scale)
    weights = _weights(clips)
    tracks = [clip.audio for clip in clips if len(clip.audio) and len(clip.video)]
    decayed = [p for p in head.parameters() if p.ndim > 1]
    free = [p for p in head.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": fit.weight_decay}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=fit.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pace(step, fit.steps))
    random = np.random.default_rng(seed)
    head.train()
    for step in range(fit.steps):
        picked = [clips[n] for n in random.choice(len(clips), fit.batch, p=weights)]
        video, seen, audio, heard = _draw(picked, tracks, fit, random)
        tokens = words.encode([_caption(clip, random) for clip in picked])
        meanings = np.unique([clip.meaning for clip in picked], return_inverse=True)[1]
        same = torch.from_numpy(meanings[:, None] == meanings[None])
        video = F.dropout(video, fit.video_dropout)
        moment = head.embed_pooled(video, seen, F.dropout(audio, fit.audio_dropout), heard)
        loss = info_nce(moment, head.embed_text(tokens), head.log_scale.exp().clamp(max=MAX_SCALE), same)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        report("retrieval", step + 1, fit.steps, float(loss.detach()))
    return head.eval().requires_grad_(False)


def _standardise(head: RetrievalHead, clips: Sequence[Captioned], frame_scale: float) -> None:
    video = np.concatenate([clip.video for clip in clips if len(clip.video)] or [np.zeros((1, POOLED), np.float32)])
    audio = np.concatenate([clip.audio for clip in clips if len(clip.audio)] or [np.zeros((1, EMBEDDING), np.float32)])
    length = len(head.video_centre)
    video = np.square(video)
    head.video_centre.copy_(torch.from_numpy(video.mean(axis=0)))
    # The looks of a place say little about what happens in it; its differences do.
    prior = torch.ones(length)
    prior.view(2, -1)[:, :HEAD_CHANNELS] = frame_scale
    # Of unit length in the mean, so that neither modality drowns the other.
    head.video_scale.copy_(prior / (torch.from_numpy(video.std(axis=0)) + FLOOR) / length**0.5)
    head.audio_centre.copy_(torch.from_numpy(audio.mean(axis=0)))
    head.audio_scale.copy_(1.0 / (torch.from_numpy(audio.std(axis=0)) + FLOOR) / EMBEDDING**0.5)


def _weights(clips: Sequence[Captioned]) -> NDArray[np.float64]:
    """Every data set by the root of its number, and in it every meaning by the root of its own."""
    sets, meanings = (np.array([getattr(clip, name) for clip in clips]) for name in ("dataset", "meaning"))
    weights = np.array([1 / np.sqrt((meanings == meaning).sum()) for meaning in meanings])
    for dataset in np.unique(sets):
        own = sets == dataset
        weights[own] *= np.sqrt(own.sum()) / weights[own].sum()
    normalised: NDArray[np.float64] = weights / weights.sum()
    return normalised


def _caption(clip: Captioned, random: np.random.Generator) -> str:
    pool_of = clip.extra if clip.extra and random.random() < 0.4 else clip.captions
    return pool_of[random.integers(len(pool_of))]


def _draw(
    picked: Sequence[Captioned], tracks: Sequence[Floats], fit: RetrievalFit, random: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A window of each: pooled features, seen, sound, heard."""
    video = np.zeros((len(picked), POOLED), np.float32)
    audio = np.zeros((len(picked), EMBEDDING), np.float32)
    seen, heard = np.zeros(len(picked), np.float32), np.zeros(len(picked), np.float32)
    for row, clip in enumerate(picked):
        sound = clip.audio
        if len(clip.video):
            video[row], seen[row] = clip.video[random.integers(len(clip.video))], 1.0
            if random.random() < fit.borrowed:
                sound = tracks[int(random.integers(len(tracks)))] if tracks and random.random() < 0.5 else sound[:0]
        if len(sound):
            audio[row], heard[row] = sound[random.integers(len(sound))], 1.0
    return torch.from_numpy(video), torch.from_numpy(seen), torch.from_numpy(audio), torch.from_numpy(heard)


def embed_recording(head: RetrievalHead, clip: Captioned) -> Floats:
    """Mean of the embeddings of a recording's windows, of unit length, float32 ``[SPACE]``."""
    count = clip.plain if len(clip.video) else len(clip.audio)
    video = clip.video[:count] if len(clip.video) else np.zeros((count, POOLED), np.float32)
    audio = clip.audio[:count] if len(clip.audio) else np.zeros((count, EMBEDDING), np.float32)
    with torch.inference_mode():
        windows = head.embed_pooled(
            torch.from_numpy(video),
            torch.full((count,), float(len(clip.video) > 0)),
            torch.from_numpy(audio),
            torch.full((count,), float(len(clip.audio) > 0)),
        )
        mean: Floats = F.normalize(windows.mean(dim=0), dim=0).numpy()
    return mean


def embed_sentences(head: RetrievalHead, words: HashedWords, texts: Sequence[str]) -> Floats:
    """float32 ``[N, SPACE]`` of unit length."""
    with torch.inference_mode():
        embedded: Floats = head.embed_text(words.encode(texts)).numpy()
    return embedded
