"""Retrieval: a sentence finds the moments that it tells of.

Two towers into one space with an axis for each meaning that training has met (a label, or a sentence of its own). What
is seen, what is heard and what is said are each judged by logistic regression; an embedding is the chances of the
meanings, scaled to unit length, so the product of two is high where both are likely of one meaning. A contrastive
loss in place of this found less, and beside it nothing more: docs/decisions/0007.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from models.audio import EMBEDDING
from models.basepack.action import minimise
from models.basepack.text_tower import BagOfWords, HashedWords
from models.basepack.watch import TRUNK_FEATURES
from models.basepack.window import pool
from models.errors import DataError
from models.losses import known_cross_entropy

FLOOR = 0.05
"""Added to deviations."""
TEMPERATURE = 4.0
"""Of the chances of a window: how sure it is must not be lost in the scaling to unit length."""
SIGHT = 2 * TRUNK_FEATURES
"""Length of a window's features that retrieval reads: what the trunk alone gives."""
Floats = NDArray[np.float32]


class RetrievalHead(nn.Module):
    """Windows and sentences to unit vectors whose product says how well they fit."""

    video_centre: Tensor
    video_scale: Tensor
    audio_centre: Tensor
    audio_scale: Tensor

    def __init__(self, meanings: int, words: HashedWords | None = None, video: int = SIGHT) -> None:
        super().__init__()
        for name, length in (("video", video), ("audio", EMBEDDING)):
            self.register_buffer(f"{name}_centre", torch.zeros(length))
            self.register_buffer(f"{name}_scale", torch.ones(length))
        self.see = nn.Linear(video, meanings)
        # One more: a sound that nothing is said of.
        self.hear = nn.Linear(EMBEDDING, meanings + 1)
        self.say = BagOfWords((words or HashedWords()).buckets, meanings)

    def embed_clip(self, features: Tensor, frame_mask: Tensor, audio: Tensor, audio_mask: Tensor) -> Tensor:
        """Windows float32 ``[B, meanings]`` of unit length; zeros where there is neither picture nor sound.

        ``features`` float32 ``[B, T, D]``, ``frame_mask`` ``[B, T]`` (1 present, 0 missing), ``audio`` the sound's
        embedding ``[B, EMBEDDING]``, ``audio_mask`` ``[B]`` (0 where there is no sound).
        """
        return self.embed_pooled(pool(features, frame_mask), frame_mask.amax(dim=1), audio, audio_mask)

    def embed_pooled(self, pooled: Tensor, seen: Tensor, audio: Tensor, heard: Tensor) -> Tensor:
        """As ``embed_clip`` from pooled features ``[B, SIGHT]``; ``seen`` and ``heard`` ``[B]``, 0 for absent."""
        sight = self.see((pooled - self.video_centre) * self.video_scale)
        noise = self.hear((audio - self.audio_centre) * self.audio_scale)
        by_sight = (sight / TEMPERATURE).softmax(dim=1)
        by_ear = (noise / TEMPERATURE).softmax(dim=1)[:, :-1]
        zero = torch.zeros_like(by_sight)
        both = torch.where(seen[:, None] > 0, by_sight, zero) + torch.where(heard[:, None] > 0, by_ear, zero)
        return F.normalize(both, dim=1)

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Sentences int64 ``[B, L]``, 0 for padding, to float32 ``[B, meanings]`` of unit length."""
        return F.normalize(self.say(tokens).softmax(dim=1), dim=1)


@dataclass(frozen=True, slots=True, eq=False)
class Captioned:
    """A recording with what is said of it."""

    name: str
    """File."""
    dataset: str
    group: str
    """Of its data set; never on both sides of a split."""
    meaning: str
    """An axis of the space: a label, or the sentence itself."""
    captions: tuple[str, ...]
    """To train on."""
    query: str
    """To ask with when the recording is held out."""
    answer: str
    """A query is answered by any recording with its own ``answer``."""
    video: Floats
    """Pooled features of its windows as the service cuts them, float32 ``[W, SIGHT]``; no rows for a sound."""
    audio: Floats
    """Embeddings of its windows' sound, float32 ``[V, EMBEDDING]``; no rows for a silent recording."""
    extra: tuple[str, ...] = field(default=())
    """More sentences of its meaning to train on."""


@dataclass(frozen=True, slots=True)
class RetrievalFit:
    """Penalties on the squared weights of each regression, chosen within training folds."""

    video: float = 1e-3
    """Of what is seen, standardised."""
    audio: float = 1e-3
    """Of what is heard, standardised."""
    text: float = 1e-5
    """Of what is said."""
    iterations: int = 60
    """Of L-BFGS, at the most."""


def fit_retrieval(clips: Sequence[Captioned], words: HashedWords, fit: RetrievalFit) -> RetrievalHead:
    """The head for these recordings; nothing is random. Raises ``DataError`` without two meanings to tell apart."""
    axes = {meaning: axis for axis, meaning in enumerate(sorted({clip.meaning for clip in clips}))}
    if len(axes) < 2:
        raise DataError("retrieval needs recordings of at least two captions; give the data sets that have them")
    head = RetrievalHead(len(axes), words)
    seen = [clip for clip in clips if len(clip.video)]
    video = _standardised([clip.video for clip in seen], head.video_centre, head.video_scale)
    _regress(head.see, video, [axes[clip.meaning] for clip in seen], fit.video, fit.iterations)
    heard = [clip for clip in clips if len(clip.audio)]
    audio = _standardised([clip.audio for clip in heard], head.audio_centre, head.audio_scale)
    # The sentence of a video tells of the picture, not of the track under it.
    sounds = [len(axes) if len(clip.video) else axes[clip.meaning] for clip in heard]
    _regress(head.hear, audio, sounds, fit.audio, fit.iterations)
    said = sorted({(text, axes[clip.meaning]) for clip in clips for text in (*clip.captions, *clip.extra)})
    linear = nn.Linear(words.buckets + 1, len(axes))
    _regress(linear, words.bags([text for text, _ in said]), [axis for _, axis in said], fit.text, fit.iterations)
    head.say.take(linear)
    return head.eval().requires_grad_(False)


def _standardised(recordings: Sequence[Floats], centre: Tensor, scale: Tensor) -> Tensor:
    """The mean of each recording's windows, float32 ``[N, D]``, standardised; ``centre`` and ``scale`` are set."""
    means = torch.zeros(0, len(centre))
    if recordings:
        means = torch.from_numpy(np.stack([windows.mean(axis=0) for windows in recordings]))
        centre.copy_(means.mean(dim=0))
        scale.copy_(1.0 / (means.std(dim=0, correction=0) + FLOOR))
    return (means - centre) * scale


def _regress(linear: nn.Linear, inputs: Tensor, axes: Sequence[int], penalty: float, iterations: int) -> None:
    truth = torch.tensor(axes, dtype=torch.int64)
    minimise(linear, inputs, lambda logits: known_cross_entropy(logits, truth), penalty, iterations)


def embed_recording(head: RetrievalHead, clip: Captioned) -> Floats:
    """Mean of the embeddings of a recording's windows, of unit length, float32 ``[meanings]``."""
    count = len(clip.video) or len(clip.audio)
    video = clip.video if len(clip.video) else np.zeros((count, SIGHT), np.float32)
    audio = clip.audio if len(clip.audio) else np.zeros((count, EMBEDDING), np.float32)
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
    """float32 ``[N, meanings]`` of unit length."""
    with torch.inference_mode():
        embedded: Floats = head.embed_text(words.encode(texts)).numpy()
    return embedded
