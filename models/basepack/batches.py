"""Windows cut from encoded recordings, and the random mixtures of picture and sound that training sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.audio import MELS, SAMPLE_RATE, STEP
from models.backbones.frame import FEATURES
from models.basepack import network
from models.basepack.cache import Encoded
from models.basepack.labels import ACTIONS, SOUNDS
from models.basepack.targets import Targets, nothing_happens, window_targets
from models.losses import IGNORE

MEL_RATE = SAMPLE_RATE // STEP
MEL_FRAMES = network.AUDIO_SAMPLES // STEP
WINDOW_S = network.WATCH_WINDOW_NS / 1e9
MIN_PRESENT = 6
"""Samples a window must have, unless its recording is shorter."""
NONE = SOUNDS.index("none")
Mel = NDArray[np.float32]

_SHARES = {"fights": 0.35, "gmdcsa24": 0.2, "ut-interaction": 0.2, "weizmann": 0.15}
_BACKGROUND_SHARE = 0.1
"""How often training draws from each data set; the last is for those that only show what is not there."""


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """A window of one track of a recording."""

    encoded: Encoded
    """The recording."""
    track: int
    """Variant."""
    first: int
    """Number of its first sample in the track; negative when it begins before the recording."""
    targets: Targets
    """int8 ``[16]``."""

    @property
    def start_s(self) -> float:
        """Its start in the recording."""
        return self.encoded.tracks[self.track].phase_s + self.first / network.WATCH_FPS


@dataclass(frozen=True, slots=True, eq=False)
class LabelledMel:
    """An encoded sound."""

    power: Mel
    """float32 ``[64, frames]``."""
    label: int
    """Index into ``SOUNDS``."""
    fold: str
    """ESC-10's fold."""
    name: str
    """File."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Tensors of one update."""

    features: Tensor
    """float32 ``[B, 8, 2560]``."""
    frame_mask: Tensor
    """float32 ``[B, 8]``."""
    power: Tensor
    """Mel power float32 ``[B, 64, 100]``."""
    audio_mask: Tensor
    """float32 ``[B]``."""
    actions: Tensor
    """int8 ``[B, 16]``."""
    sounds: Tensor
    """int64 ``[B]``."""


def service_windows(encoded: Encoded) -> list[Window]:
    """The windows that the service would cut: no augmentation, one every half second."""
    return _windows(encoded, 0, range(0, max(1, len(encoded.tracks[0].present)), 2))


def calibration_windows(encoded: Encoded) -> list[Window]:
    """``service_windows``, and the same of the tracks whose camera moves."""
    moving = [n for n, track in enumerate(encoded.tracks) if track.moving and n > 0]
    tracks = [_windows(encoded, n, range(0, max(1, len(encoded.tracks[n].present)), 2)) for n in moving]
    return service_windows(encoded) + [window for windows in tracks for window in windows]


def training_windows(encoded: Encoded) -> list[Window]:
    """Windows of every variant at every sample, also those that hang over the ends a little."""
    found = []
    for track in range(len(encoded.tracks)):
        count = len(encoded.tracks[track].present)
        found += _windows(encoded, track, range(MIN_PRESENT - network.WATCH_SAMPLES, max(1, count)))
    return found


def _windows(encoded: Encoded, track: int, firsts: range) -> list[Window]:
    present = encoded.tracks[track].present
    least = min(MIN_PRESENT, int(present.sum()))
    phase_s = encoded.tracks[track].phase_s
    found = []
    for first in firsts:
        if least and int(present[max(0, first) : max(0, first + network.WATCH_SAMPLES)].sum()) >= least:
            start_s = phase_s + first / network.WATCH_FPS
            targets = window_targets(encoded.recording, start_s, start_s + WINDOW_S)
            found.append(Window(encoded, track, first, targets))
    return found


def window_features(window: Window) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features float32 ``[8, 2560]`` and mask float32 ``[8]``."""
    track = window.encoded.tracks[window.track]
    features = np.zeros((network.WATCH_SAMPLES, FEATURES), np.float32)
    mask = np.zeros(network.WATCH_SAMPLES, np.float32)
    begin, end = max(0, window.first), min(len(track.present), window.first + network.WATCH_SAMPLES)
    features[begin - window.first : end - window.first] = track.features[begin:end]
    mask[begin - window.first : end - window.first] = track.present[begin:end]
    return features, mask


def cut_mel(power: Mel, first: int) -> tuple[Mel, float]:
    """Mel frames ``[first, first + 100)`` float32 ``[64, 100]``, silence outside, and the share covered."""
    out = np.zeros((MELS, MEL_FRAMES), np.float32)
    begin, end = max(0, first), min(power.shape[1], first + MEL_FRAMES)
    if end > begin:
        out[:, begin - first : end - first] = power[:, begin:end]
    return out, max(0, end - begin) / MEL_FRAMES


class Mixer:
    """Draws batches: windows of the video data under sounds that may or may not be their own.

    A recording's own track, another's, an ESC-10 sound over either, silence and no track at all are drawn with
    probabilities that do not depend on what is seen; so neither "has a track" nor a recorder's hiss can stand
    in for an action, and a sound is learned over many backgrounds.
    """

    def __init__(
        self, windows: Sequence[Window], sounds: Sequence[LabelledMel], *, video_dropout: float, audio_dropout: float
    ) -> None:
        self._windows = windows
        self._sounds = sounds
        self._weights = _sampling_weights(windows)
        self._video_dropout = video_dropout
        self._audio_dropout = audio_dropout
        tracks = {id(w.encoded): w.encoded.mel for w in windows}
        self._backgrounds = [mel for mel in tracks.values() if mel is not None]
        self._by_label = [[sound for sound in sounds if sound.label == label] for label in range(NONE)]

    def draw(self, random: np.random.Generator, size: int) -> Batch:
        """One batch."""
        return self.batch(random.choice(len(self._windows), size, p=self._weights), random)

    @property
    def weights(self) -> NDArray[np.float64]:
        """How likely each window is drawn, float64 ``[N]``."""
        return self._weights

    def batch(self, picked: Sequence[int] | NDArray[np.int64], random: np.random.Generator) -> Batch:
        """The windows of these numbers, each with a sound drawn for it."""
        items = [self._item(self._windows[index], random) for index in picked]
        features, frame_mask, power, audio_mask, actions, sounds = zip(*items, strict=True)
        return Batch(
            torch.from_numpy(np.stack(features)),
            torch.from_numpy(np.stack(frame_mask)),
            torch.from_numpy(np.stack(power)),
            torch.tensor(audio_mask, dtype=torch.float32),
            torch.from_numpy(np.stack(actions)),
            torch.tensor(sounds, dtype=torch.int64),
        )

    def _item(
        self, window: Window, random: np.random.Generator
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], Mel, float, Targets, int]:
        features, mask = window_features(window)
        if random.random() < 0.1:
            mask *= random.random(mask.shape) > 0.25
        targets = window.targets
        if random.random() < self._video_dropout or not mask.any():
            mask = np.zeros_like(mask)
            targets = nothing_happens()
            targets[ACTIONS.index("fight")] = IGNORE
        power, coverage, sound = self._sound(window, random)
        return features * mask[:, None], mask, power, coverage, targets, sound

    def _sound(self, window: Window, random: np.random.Generator) -> tuple[Mel, float, int]:
        silence = np.zeros((MELS, MEL_FRAMES), np.float32)
        draw = (random.random() - self._audio_dropout) / (1 - self._audio_dropout)
        if draw < 0:
            return silence, 0.0, IGNORE
        if draw < 0.5:
            return self._event(window, random)
        if draw < 0.9:
            return self._background(window, random), 1.0, NONE
        # Digital silence, or the hiss of a microphone that hears nothing.
        hiss = random.exponential(1.0, silence.shape).astype(np.float32) * 10 ** random.uniform(-7, -3.5)
        return (silence if random.random() < 0.5 else hiss), 1.0, NONE

    def _event(self, window: Window, random: np.random.Generator) -> tuple[Mel, float, int]:
        sound = self._pick(random)
        power = distort(_audible_cut(sound.power, random), random)
        if random.random() < 0.6:
            behind = self._background(window, random)
            level = (power.mean() + 1e-9) / (behind.mean() + 1e-9)
            power = power + behind * min(float(level), 1e3) * 10 ** random.uniform(-3.0, -0.3)
        return power, 1.0, sound.label

    def _pick(self, random: np.random.Generator) -> LabelledMel:
        classes = [sounds for sounds in self._by_label if sounds]
        sounds = classes[random.integers(len(classes))]
        return sounds[random.integers(len(sounds))]

    def _background(self, window: Window, random: np.random.Generator) -> Mel:
        own = window.encoded.mel
        if own is not None and random.random() < 0.5:
            return distort(cut_mel(own, round(window.start_s * MEL_RATE))[0], random)
        if not self._backgrounds:
            return np.zeros((MELS, MEL_FRAMES), np.float32)
        mel = self._backgrounds[random.integers(len(self._backgrounds))]
        first = int(random.integers(0, max(1, mel.shape[1] - MEL_FRAMES + 1)))
        return distort(cut_mel(mel, first)[0], random)


def _audible_cut(power: Mel, random: np.random.Generator, tries: int = 6) -> Mel:
    """A random cut that holds some of the sound: many recordings are mostly padding."""
    loudest = power.sum(axis=0).max()
    for _ in range(tries):
        first = int(random.integers(-MEL_FRAMES // 4, max(1, power.shape[1] - MEL_FRAMES * 3 // 4)))
        cut, _ = cut_mel(power, first)
        if cut.sum(axis=0).max() > 0.05 * loudest:
            return cut
    return cut_mel(power, max(0, int(power.sum(axis=0).argmax()) - MEL_FRAMES // 2))[0]


def distort(power: Mel, random: np.random.Generator) -> Mel:
    """Other loudness, tone and bandwidth, and small gaps (SpecAugment: Park et al., Interspeech 2019)."""
    bins = np.linspace(-0.5, 0.5, MELS)
    decibels = random.uniform(-22, 8) + random.uniform(-10, 10) * bins + random.uniform(-8, 8) * np.abs(bins)
    if random.random() < 0.3:
        decibels = np.where(np.arange(MELS) >= random.integers(36, MELS), decibels - 60, decibels)
    out = power * (10 ** (decibels / 10))[:, None].astype(np.float32)
    if random.random() < 0.5:
        at, width = random.integers(0, MEL_FRAMES - 16), random.integers(1, 16)
        out[:, at : at + width] *= 1e-4
    if random.random() < 0.5:
        at, width = random.integers(0, MELS - 8), random.integers(1, 8)
        out[at : at + width] *= 1e-4
    return out


def _sampling_weights(windows: Sequence[Window]) -> NDArray[np.float64]:
    """Each data set at its share; within it rare combinations of labels more often than their number says."""
    keys = [(w.encoded.recording.dataset, (w.targets == 1).tobytes()) for w in windows]
    counts = Counter(keys)
    weights = np.array([counts[key] ** -0.7 for key in keys])
    datasets = np.array([key[0] for key in keys])
    for dataset in np.unique(datasets):
        chosen = datasets == dataset
        weights[chosen] *= _SHARES.get(str(dataset), _BACKGROUND_SHARE) / weights[chosen].sum()
    normalised: NDArray[np.float64] = weights / weights.sum()
    return normalised
