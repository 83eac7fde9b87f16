"""The sound networks, one for each fold held out and one of all, and what those say of the fold they have not heard."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.audio import LogMel
from models.basepack import captions
from models.basepack.baselines import fit_logistic
from models.basepack.batches import MEL_FRAMES
from models.basepack.cache import Advance
from models.basepack.sound import (
    CLIP_HOP,
    FrozenEar,
    Heard,
    SoundFit,
    SoundNet,
    clip_features,
    clip_scores,
    fit_sound,
    guess,
    hear_bank,
)
from models.basepack.sound_bank import FOLDS, NONE, WINDOW, Waveform, fold_bank
from models.basepack.tables import STILLS, Recording, Sound
from models.basepack.teacher import STRETCH, Teacher, zero_shot
from models.errors import DataError
from models.losses import known_cross_entropy
from models.media import read_audio
from models.metrics import bootstrap
from models.progress import Report

MIXTURES = 6000
"""Of each fold."""
AUDIBLE_LOG = 0.92
"""In log-mel: a window counts for the baseline's training when its loudest band is at most 20 dB below the loudest."""
Floats = NDArray[np.float32]


def read_waveforms(sounds: Sequence[Sound], recordings: Sequence[Recording]) -> list[Waveform]:
    """ESC-10's recordings, and the tracks of videos dealt to its folds by group. Raises ``DataError``."""
    found = [Waveform(read_sound(sound), sound.label, sound.fold) for sound in sounds]
    groups: dict[str, list[str]] = {}
    for recording in recordings:
        groups.setdefault(recording.dataset, []).append(recording.group)
    for recording in recordings:
        audio = None if recording.dataset == STILLS else read_audio(recording.path, seconds=recording.seconds)
        if audio is not None and audio.size:
            place = sorted(set(groups[recording.dataset])).index(recording.group) % len(FOLDS)
            found.append(Waveform(audio, NONE, FOLDS[place]))
    return found


def read_sound(sound: Sound) -> Floats:
    """The waveform float32 ``[N]``, at least a window long. Raises ``DataError`` when there is none."""
    audio = read_audio(sound.path)
    if audio is None or not audio.size:
        raise DataError(f"{sound.path} holds no sound; replace the file")
    return np.pad(audio, (0, max(0, WINDOW - len(audio))))


def hear_all(
    waveforms: Sequence[Waveform],
    ear: FrozenEar,
    cache: Path,
    report: Report,
    *,
    mixtures: int = MIXTURES,
    teacher: Teacher | None = None,
) -> dict[str, Heard]:
    """The mixtures of every fold as the trunk hears them; a minute for each fold, then from the cache."""
    heard = {}
    for fold in FOLDS:
        advance = _counter(report, f"sounds of fold {fold}", mixtures)
        bank = fold_bank(waveforms, fold, mixtures, teacher, cache, advance=advance)
        heard[fold] = hear_bank(bank, ear, int(fold), cache)
    return heard


def _counter(report: Report, stage: str, total: int) -> Advance:
    done = count(1)
    return lambda: report(stage, next(done), total, None)


def train_sounds(
    heard: dict[str, Heard], fit: SoundFit, seed: int, report: Report
) -> tuple[SoundNet, dict[str, SoundNet]]:
    """The network of all folds, which is shipped, and by fold the one that has not heard it."""
    held_out = {}
    for fold in FOLDS:
        rest = Heard.joined([heard[other] for other in FOLDS if other != fold])
        held_out[fold] = fit_sound(rest, fit, seed, report, f"sound without fold {fold}")
    return fit_sound(Heard.joined([heard[fold] for fold in FOLDS]), fit, seed, report), held_out


def sound_results(
    held_out: dict[str, SoundNet], sounds: Sequence[Sound], ear: FrozenEar, teacher: Teacher | None = None
) -> dict[str, float]:
    """``esc10_accuracy`` with ``_low`` and ``_high`` (bootstrap over source recordings), and its baselines.

    Each recording is judged whole by the network that has not heard its fold. ``esc10_accuracy_baseline`` is that of
    the teacher without training, where there is one; ``esc10_accuracy_logmel`` of logistic regression.
    """
    waveforms = [read_sound(sound) for sound in sounds]
    truth = np.array([sound.label for sound in sounds])
    pairs = zip(sounds, waveforms, strict=True)
    scores = np.stack([clip_scores(held_out[sound.fold], clip_features(audio, ear)) for sound, audio in pairs])
    right = guess(scores) == truth
    over = bootstrap(lambda rows: float(right[rows].mean()), [captions.source_of(sound) for sound in sounds])
    plain = guess(log_mel_scores(sounds, waveforms)) == truth
    results = {
        "esc10_accuracy": over.value,
        "esc10_accuracy_low": over.low,
        "esc10_accuracy_high": over.high,
        "esc10_accuracy_logmel": float(plain.mean()),
    }
    if teacher is not None:
        said = np.stack([teacher.scores(audio, 1 + (len(audio) - STRETCH) * 2 // STRETCH) for audio in waveforms])
        results["esc10_accuracy_baseline"] = float((zero_shot(said, teacher.names).argmax(axis=1) == truth).mean())
    return {name: round(value, 4) for name, value in results.items()}


def log_mel_scores(sounds: Sequence[Sound], waveforms: Sequence[Floats]) -> Floats:
    """The baseline by fold: logistic regression on mean and deviation of log-mel, ``[N, 10]`` over whole recordings."""
    mel = LogMel()
    windows = []
    for audio in waveforms:
        with torch.inference_mode():
            levels = mel(torch.from_numpy(audio)[None])[0].numpy()
        starts = range(0, levels.shape[1] - MEL_FRAMES + 1, CLIP_HOP)
        windows.append(np.stack([levels[:, at : at + MEL_FRAMES] for at in starts]))
    loud = [cuts.max(axis=(1, 2)) > cuts.max() - AUDIBLE_LOG for cuts in windows]
    plain = [np.concatenate([cuts.mean(axis=2), cuts.std(axis=2)], axis=1) for cuts in windows]
    scores = np.zeros((len(sounds), NONE), np.float32)
    for fold in sorted({sound.fold for sound in sounds}):
        learned = [n for n, sound in enumerate(sounds) if sound.fold != fold]
        inputs = np.concatenate([plain[n][loud[n]] for n in learned])
        truth = np.concatenate([np.full(loud[n].sum(), sounds[n].label, np.int64) for n in learned])
        model = fit_logistic(inputs, truth, NONE, known_cross_entropy)
        for n, sound in enumerate(sounds):
            if sound.fold == fold:
                scores[n] = torch.from_numpy(model.scores(plain[n])).softmax(dim=1).mean(dim=0).numpy()
    return scores
