"""Recordings with their sentences, what a sentence finds among those held out, and what simpler means find."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
import torch
from numpy.typing import NDArray

from models.audio import EMBEDDING
from models.basepack import captions
from models.basepack.baselines import fit_logistic
from models.basepack.batches import service_windows, window_features
from models.basepack.cache import Encoded
from models.basepack.labels import SOUNDS
from models.basepack.retrieval import Captioned
from models.basepack.sound_bank import FOLDS
from models.basepack.tables import Sound
from models.basepack.watch import TRUNK_FEATURES
from models.basepack.window import pool
from models.losses import known_cross_entropy
from models.metrics import Interval, bootstrap_each, recall_at, retrieval_ranks

CAPTIONED = ("fights", "gmdcsa24", "ut-interaction", "weizmann")
Floats = NDArray[np.float32]
Hear = Callable[[Encoded], Floats]
"""Embeddings of the sound under a recording's service windows, float32 ``[W, EMBEDDING]``; no rows without a track."""


def captioned_videos(recordings: Sequence[Encoded], sentences: Mapping[str, str], hear: Hear) -> list[Captioned]:
    """The recordings that are said something of. ``sentences`` are GMDCSA24's by file name."""
    found = []
    for number, item in enumerate(recordings):
        recording = item.recording
        if recording.dataset not in CAPTIONED:
            continue
        features, masks = zip(*(window_features(window) for window in service_windows(item)), strict=True)
        trunk = torch.from_numpy(np.stack(features)[..., :TRUNK_FEATURES])
        pooled = pool(trunk, torch.from_numpy(np.stack(masks))).numpy()
        if captions.is_template(recording):
            meaning = recording.spans[0].label
            texts, asked = captions.TRAIN[meaning], captions.TEST[meaning]
            query = asked[number % len(asked)]
        else:
            meaning = query = sentences[recording.path.name]
            texts = (query,)
        names = (recording.path.name, recording.dataset, recording.group)
        found.append(Captioned(*names, meaning, texts, query, meaning, pooled, hear(item)))
    return found


def captioned_sounds(
    sounds: Sequence[Sound], embeddings: Sequence[Floats], titles: Mapping[str, str]
) -> list[Captioned]:
    """ESC-10's recordings that have a title; ``embeddings`` of their windows float32 ``[V, EMBEDDING]`` each."""
    found = []
    for sound, audio in zip(sounds, embeddings, strict=True):
        title = captions.title_of(sound, titles)
        if title is not None:
            names = (sound.path.name, "esc10", captions.source_of(sound))
            nothing = np.zeros((0, 0), np.float32)
            label = SOUNDS[sound.label]
            extra = captions.SOUND_SENTENCES[label]
            found.append(Captioned(*names, label, (title,), title, title, nothing, audio, extra=extra))
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What queries found among the recordings held out with them."""

    ranks: NDArray[np.int64]
    """int64 ``[Q]`` of the best right answer, from 1."""
    chance: dict[int, Floats]
    """By k, the chance of a right answer among k drawn blindly, ``[Q]``."""
    groups: tuple[str, ...]
    """Data set and group of each query."""
    datasets: tuple[str, ...]

    @classmethod
    def joined(cls, parts: Sequence[Answers]) -> Answers:
        """Of several folds, each with its own gallery."""
        return cls(
            np.concatenate([part.ranks for part in parts]),
            {k: np.concatenate([part.chance[k] for part in parts]) for k in (1, 5)},
            tuple(group for part in parts for group in part.groups),
            tuple(dataset for part in parts for dataset in part.datasets),
        )


def answers(similarity: Floats, clips: Sequence[Captioned]) -> Answers:
    """Of a similarity ``[N, N]`` of each recording's query (rows) with each recording."""
    said = np.array([clip.answer for clip in clips])
    relevant = said[:, None] == said[None]
    count, size = relevant.sum(axis=1), len(clips)
    chance = {k: np.array([_blind(size, int(n), min(k, size)) for n in count], np.float32) for k in (1, 5)}
    groups = tuple(f"{clip.dataset} {clip.group}" for clip in clips)
    return Answers(retrieval_ranks(similarity, relevant), chance, groups, tuple(clip.dataset for clip in clips))


def _blind(size: int, right: int, drawn: int) -> float:
    return 1 - comb(size - right, drawn) / comb(size, drawn)


def recalls(found: Answers) -> dict[str, Interval]:
    """``retrieval_r1`` and ``retrieval_r5`` with intervals over groups."""
    one, five = bootstrap_each(
        lambda rows: np.array([recall_at(found.ranks[rows], 1), recall_at(found.ranks[rows], 5)]), found.groups
    )
    return {"retrieval_r1": one, "retrieval_r5": five}


def by_labels(train: Sequence[Captioned], test: Sequence[Captioned]) -> Floats:
    """The baseline, ``[N, N]`` as ``answers`` takes: words to labels and recordings to labels by logistic regression.

    A query and a recording fit by the chance that both are of one label.
    """
    labels = sorted({clip.meaning for clip in train})
    number = {label: n for n, label in enumerate(labels)}
    return _words(train, [clip.query for clip in test], number) @ _recordings(train, test, number).T


def _words(train: Sequence[Captioned], queries: Sequence[str], number: Mapping[str, int]) -> Floats:
    """Chances of labels ``[Q, L]`` from which words are in a query."""
    pairs = sorted({(text, clip.meaning) for clip in train for text in (*clip.captions, *clip.extra)})
    known = {word: n for n, word in enumerate(sorted({word for text, _ in pairs for word in text.split()}))}
    truth = np.array([number[meaning] for _, meaning in pairs], np.int64)
    model = fit_logistic(_bag([text for text, _ in pairs], known), truth, len(number), known_cross_entropy)
    return _softmax(model.scores(_bag(queries, known)))


def _bag(texts: Sequence[str], known: Mapping[str, int]) -> Floats:
    out = np.zeros((len(texts), len(known)), np.float32)
    for row, text in enumerate(texts):
        out[row, [known[word] for word in text.split() if word in known]] = 1.0
    return out


def _recordings(train: Sequence[Captioned], test: Sequence[Captioned], number: Mapping[str, int]) -> Floats:
    """Chances of labels ``[N, L]`` from a recording's mean features; sounds and videos each by their own model."""
    out = np.zeros((len(test), len(number)), np.float32)
    for kind in (True, False):
        places = [n for n, clip in enumerate(test) if (len(clip.video) > 0) == kind]
        learned = [clip for clip in train if (len(clip.video) > 0) == kind]
        if places and learned:
            truth = np.array([number[clip.meaning] for clip in learned], np.int64)
            model = fit_logistic(np.stack([_mean(clip) for clip in learned]), truth, len(number), known_cross_entropy)
            out[places] = _softmax(model.scores(np.stack([_mean(test[n]) for n in places])))
    return out


def _mean(clip: Captioned) -> Floats:
    rows: Floats = clip.video if len(clip.video) else clip.audio
    mean: Floats = rows.mean(axis=0)
    return mean


def _softmax(logits: Floats) -> Floats:
    chances: Floats = torch.from_numpy(logits).softmax(dim=1).numpy()
    return chances


def fold_of_sound(sound: Sound) -> int:
    """Number of an ESC-10 recording's fold, from 0."""
    return FOLDS.index(sound.fold)


def no_sound(item: Encoded) -> Floats:
    """For ``captioned_videos``: as if no recording had a track."""
    return np.zeros((0, EMBEDDING), np.float32)
