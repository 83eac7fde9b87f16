"""Scores of whole recordings, cut into windows as the service cuts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from models.audio import compress
from models.basepack.batches import (
    MEL_FRAMES,
    MEL_RATE,
    NONE,
    LabelledMel,
    Window,
    cut_mel,
    service_windows,
    window_features,
)
from models.basepack.cache import Encoded
from models.basepack.labels import ACTIONS, SOUNDS
from models.basepack.window import WindowHead
from models.losses import IGNORE

Floats = NDArray[np.float32]
BATCH = 64
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
    """float32 ``[N, 16]``."""
    targets: NDArray[np.int8]
    """int8 ``[N, 16]``: 1, 0, -1 unknown."""


@dataclass(frozen=True, slots=True, eq=False)
class SoundScores:
    """Windows of sound with the logits of their classes."""

    logits: Floats
    """float32 ``[N, 11]``."""
    targets: NDArray[np.int64]
    """int64 ``[N]``."""
    clips: NDArray[np.int64]
    """int64 ``[N]``: number of the ESC-10 recording, -1 for windows of video recordings."""


def score_actions(
    head: WindowHead, encoded: Sequence[Encoded], windows_of: Callable[[Encoded], list[Window]] = service_windows
) -> ActionScores:
    """Actions in every window, with the recordings' own sound."""
    windows = tuple(window for item in encoded for window in windows_of(item))
    return ActionScores(windows, score_windows(head, windows)[0], _stack([w.targets for w in windows]))


def score_windows(head: WindowHead, windows: Sequence[Window]) -> tuple[Floats, Floats]:
    """Logits of actions float32 ``[N, 16]`` and of sounds float32 ``[N, 11]``."""
    actions: list[Floats] = [np.zeros((0, len(ACTIONS)), np.float32)]
    sounds: list[Floats] = [np.zeros((0, len(SOUNDS)), np.float32)]
    for first in range(0, len(windows), BATCH):
        part = windows[first : first + BATCH]
        features, masks = zip(*(window_features(window) for window in part), strict=True)
        powers, coverage = zip(*(own_sound(window) for window in part), strict=True)
        with torch.inference_mode():
            action, heard, *_ = head.judge(
                torch.from_numpy(np.stack(features)),
                torch.from_numpy(np.stack(masks)),
                compress(torch.from_numpy(np.stack(powers))),
                torch.tensor(coverage),
            )
        actions.append(action.numpy())
        sounds.append(heard.numpy())
    return np.concatenate(actions), np.concatenate(sounds)


def own_sound(window: Window) -> tuple[Floats, float]:
    """Mel power of the recording's own sound under a window, and the share covered."""
    if window.encoded.mel is None:
        return np.zeros((64, MEL_FRAMES), np.float32), 0.0
    return cut_mel(window.encoded.mel, round(window.start_s * MEL_RATE))


def score_sounds(head: WindowHead, sounds: Sequence[LabelledMel], encoded: Sequence[Encoded]) -> SoundScores:
    """Sounds in every window of ESC-10 recordings, and in the tracks of video recordings, where there are none."""
    cuts, targets, clips = sound_windows(sounds, encoded)
    logits = []
    for first in range(0, len(cuts), BATCH):
        spectrogram = compress(torch.from_numpy(cuts[first : first + BATCH]))
        with torch.inference_mode():
            logits.append(head.sound(head.audio(spectrogram)).numpy())
    return SoundScores(np.concatenate(logits), targets, clips)


def sound_windows(
    sounds: Sequence[LabelledMel], encoded: Sequence[Encoded]
) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
    """Mel power float32 ``[N, 64, 100]``, class and number of the ESC-10 recording (-1: a video's track)."""
    rows: list[tuple[Floats, int, int]] = []
    for number, sound in enumerate(sounds):
        loudest = sound.power.sum(axis=0).max()
        for first in range(0, sound.power.shape[1] - MEL_FRAMES + 1, MEL_RATE // 2):
            cut, _ = cut_mel(sound.power, first)
            share = cut.sum(axis=0).max() / max(loudest, 1e-12)
            label = sound.label if share >= AUDIBLE else NONE if share < INAUDIBLE else IGNORE
            rows.append((cut, label, number))
    for item in encoded:
        if item.mel is not None:
            rows += [(own_sound(window)[0], NONE, -1) for window in service_windows(item)]
    kept = [row for row in rows if row[1] != IGNORE]
    cuts, targets, clips = zip(*kept, strict=True)
    return np.stack(cuts), np.array(targets, np.int64), np.array(clips, np.int64)


def _stack(targets: list[NDArray[np.int8]]) -> NDArray[np.int8]:
    return np.stack(targets) if targets else np.zeros((0, len(ACTIONS)), np.int8)
