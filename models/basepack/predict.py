"""Scores of whole recordings, cut into windows as the service cuts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from models.audio import compress
from models.basepack.batches import MEL_FRAMES, MEL_RATE, NONE, Window, cut_mel, service_windows
from models.basepack.cache import Encoded, encode_sound
from models.basepack.hearing import own_sound
from models.basepack.sound import FrozenEar, SoundNet
from models.basepack.sound_bank import FOLDS
from models.basepack.tables import Sound
from models.losses import IGNORE

Floats = NDArray[np.float32]
AUDIBLE = 0.02
"""A window of an ESC-10 recording counts as its class when its loudest instant has at least this share of the
recording's loudest, as ``none`` under …"""
INAUDIBLE = 1e-4
"""… this share; between the two it is left out."""


@dataclass(frozen=True, slots=True, eq=False)
class ActionScores:
    """Windows of video recordings with the logits of their actions."""

    windows: tuple[Window, ...]
    """The windows."""
    logits: Floats
    """float32 ``[N, 20]``."""
    targets: NDArray[np.int8]
    """int8 ``[N, 20]``: 1, 0, -1 unknown."""


@dataclass(frozen=True, slots=True, eq=False)
class SoundScores:
    """Windows of sound with the logits of their classes."""

    logits: Floats
    """float32 ``[N, 11]``."""
    targets: NDArray[np.int64]
    """int64 ``[N]``."""


def score_sounds(
    nets: Mapping[str, SoundNet], ear: FrozenEar, sounds: Sequence[Sound], encoded: Sequence[Encoded]
) -> SoundScores:
    """Windows of ESC-10 recordings, and of the tracks of video recordings, where there are none of its sounds.

    ``nets`` by the fold that they have not heard; tracks are dealt to the folds as in training.
    """
    rows: list[tuple[str, Floats, int]] = []
    for sound in sounds:
        rows += [(sound.fold, cut, label) for cut, label in _cuts(encode_sound(sound.path), sound.label)]
    for item, fold in zip(encoded, track_folds(encoded), strict=True):
        if item.mel is not None:
            rows += [(fold, own_sound(window)[0], NONE) for window in service_windows(item)]
    folds, cuts, targets = zip(*rows, strict=True)
    features = ear.hear(compress(torch.from_numpy(np.stack(cuts))).numpy())
    logits = np.zeros((len(rows), NONE + 1), np.float32)
    for fold, net in nets.items():
        own = np.array([name == fold for name in folds])
        with torch.inference_mode():
            logits[own] = net(torch.from_numpy(features[own])).numpy()
    return SoundScores(logits, np.array(targets, np.int64))


def track_folds(encoded: Sequence[Encoded]) -> list[str]:
    """ESC-10's fold whose mixtures hold a recording's track."""
    groups: dict[str, list[str]] = {}
    for item in encoded:
        groups.setdefault(item.recording.dataset, []).append(item.recording.group)
    places = {name: sorted(set(members)) for name, members in groups.items()}
    return [FOLDS[places[i.recording.dataset].index(i.recording.group) % len(FOLDS)] for i in encoded]


def _cuts(power: Floats, label: int) -> list[tuple[Floats, int]]:
    loudest = max(float(power.sum(axis=0).max()), 1e-12)
    found = []
    for first in range(0, max(1, power.shape[1] - MEL_FRAMES + 1), MEL_RATE // 2):
        cut, _ = cut_mel(power, first)
        share = float(cut.sum(axis=0).max()) / loudest
        found.append((cut, label if share >= AUDIBLE else NONE if share < INAUDIBLE else IGNORE))
    return [row for row in found if row[1] != IGNORE]
