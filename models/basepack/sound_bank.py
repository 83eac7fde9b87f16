"""What the sound network is trained on: thousands of two-second mixtures, each with what the teacher hears in it.

Every fold of ESC-10 has mixtures of its own, made of its recordings and of a quarter of the sound tracks alone, so
that a network that holds one fold out has met nothing of it, neither in a mixture nor by way of the teacher. Where
there is a teacher, it hears each mixture itself ("a good teacher is patient and consistent", Beyer et al., CVPR 2022).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.audio import SAMPLE_RATE, LogMel
from models.basepack import shape
from models.basepack.cache import Advance
from models.basepack.labels import SOUNDS
from models.basepack.teacher import Teacher
from models.errors import DataError

FOLDS = ("1", "2", "3", "4")
"""ESC-10's folds that are here."""
NONE = SOUNDS.index("none")
WINDOW = shape.AUDIO_SAMPLES
AUDIBLE_DB = 20.0
"""A cut is of its recording's class when its loudest tenth of a second is at most this far below the loudest."""
VERSION = 1
"""Rises when mixtures are made in another way."""
Floats = NDArray[np.float32]
_EDGE = 0.15
_SPEED = 0.15


@dataclass(frozen=True, slots=True, eq=False)
class Waveform:
    """A recording to draw from."""

    samples: Floats
    """float32 ``[N]`` mono at 16 kHz."""
    label: int
    """Index into ``SOUNDS``; ``NONE`` for the sound track of a video."""
    fold: str
    """Of ``FOLDS``; no mixture joins two."""


@dataclass(frozen=True, slots=True, eq=False)
class Bank:
    """Mixtures."""

    power: NDArray[np.float16]
    """Log of mel power, float16 ``[N, 64, 100]``."""
    labels: Floats
    """float32 ``[N, 11]``: shares of the classes, summing to one."""
    teacher: NDArray[np.float16]
    """The teacher's scores float16 ``[N, 521]`` in 0..1; ``[N, 0]`` without a teacher."""
    pair: NDArray[np.bool_]
    """bool ``[N]``: two classes are in it."""

    def __len__(self) -> int:
        return len(self.power)

    @classmethod
    def joined(cls, parts: Sequence[Bank]) -> Bank:
        """Several banks as one."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__slots__))


def fold_bank(
    waveforms: Sequence[Waveform],
    fold: str,
    size: int,
    teacher: Teacher | None,
    folder: Path,
    *,
    seed: int = 0,
    advance: Advance = lambda: None,
) -> Bank:
    """The mixtures of one fold, from the cache or else made and kept. Raises ``DataError`` for a fold without any."""
    own = [item for item in waveforms if item.fold == fold]
    path = folder / f"sounds-{fold}-{_key(own, size, seed, teacher.checksum if teacher else '')}.npz"
    if not path.is_file():
        _write(path, _make(own, fold, size, teacher, seed, advance))
    stored = np.load(path)
    return Bank(stored["power"], stored["labels"], stored["teacher"], stored["pair"])


def _make(own: list[Waveform], fold: str, size: int, teacher: Teacher | None, seed: int, advance: Advance) -> Bank:
    draw = _Drawer(own, fold)
    mel = LogMel()
    rows = []
    for number in range(size):
        audio, labels, pair = draw(np.random.default_rng([seed, int(fold), number]))
        with torch.inference_mode():
            power = torch.log(mel.power(torch.from_numpy(audio)[None])[0] + 1e-6).numpy()
        said = np.zeros(0, np.float16) if teacher is None else teacher.scores(audio).astype(np.float16)
        rows.append((power.astype(np.float16), labels, said, np.bool_(pair)))
        advance()
    return Bank(*(np.stack(column) for column in zip(*rows, strict=True)))


class _Drawer:
    """Draws a mixture: waveform float32 ``[32000]``, labels float32 ``[11]``, whether two classes are in it."""

    def __init__(self, own: list[Waveform], fold: str) -> None:
        self._classes = [c for c in ([w.samples for w in own if w.label == label] for label in range(NONE)) if c]
        self._names = [label for label in range(NONE) if any(w.label == label for w in own)]
        self._tracks = [w.samples for w in own if w.label == NONE]
        if not self._classes:
            raise DataError(f"ESC-10's fold {fold} has no sounds; get the data again")

    def __call__(self, random: np.random.Generator) -> tuple[Floats, Floats, bool]:
        kind = random.random()
        labels = np.zeros(len(SOUNDS), np.float32)
        pair = False
        if kind < 0.75:
            place, audio = self._event(random)
            share = 1.0
            if pair := kind > 0.5 and len(self._classes) > 1:
                other, second = self._event(random)
                share = float(random.beta(1.0, 1.0)) if other != place else 1.0
                audio = _level(audio) * np.sqrt(share) + _level(second) * np.sqrt(1 - share)
                labels[self._names[other]] += 1 - share
            elif random.random() < 0.6:
                audio = _level(audio) + _level(self._background(random)) * 10 ** (random.uniform(-30, -3) / 20)
            labels[self._names[place]] += share
        else:
            audio = self._background(random)
            labels[NONE] = 1.0
        return _loudness(audio.astype(np.float32), random), labels, pair

    def _event(self, random: np.random.Generator) -> tuple[int, Floats]:
        place = int(random.integers(len(self._classes)))
        members = self._classes[place]
        return place, audible_cut(members[random.integers(len(members))], random)

    def _background(self, random: np.random.Generator) -> Floats:
        if not self._tracks or random.random() < 0.2:
            return _hiss(random)
        track = self._tracks[random.integers(len(self._tracks))]
        return _cut(track, int(random.integers(0, max(1, len(track) - WINDOW + 1))), random)


def audible_cut(samples: Floats, random: np.random.Generator, tries: int = 6) -> Floats:
    """A random cut float32 ``[32000]`` that holds some of the sound: many recordings are mostly padding."""
    levels = _levels(samples)
    floor = levels.max() * 10 ** (-AUDIBLE_DB / 10)
    edge = int(WINDOW * _EDGE)
    first = 0
    for _ in range(tries):
        first = int(random.integers(-edge, max(1, len(samples) - WINDOW + edge)))
        if levels[max(0, first) // STEP : (first + WINDOW) // STEP].max(initial=0.0) > floor:
            return _cut(samples, first, random)
    return _cut(samples, int(levels.argmax()) * STEP - WINDOW // 2, random)


STEP = SAMPLE_RATE // 10


def _levels(samples: Floats) -> Floats:
    """Mean power of each tenth of a second."""
    padded = np.pad(samples, (0, -len(samples) % STEP))
    levels: Floats = np.square(padded).reshape(-1, STEP).mean(axis=1)
    return levels


def _cut(samples: Floats, first: int, random: np.random.Generator) -> Floats:
    """``[32000]`` from ``first`` on, played somewhat faster or slower, silence outside."""
    speed = random.uniform(1 - _SPEED, 1 + _SPEED) if random.random() < 0.5 else 1.0
    times = first + np.arange(WINDOW) * speed
    cut: Floats = np.interp(times, np.arange(len(samples)), samples, left=0.0, right=0.0).astype(np.float32)
    return cut


def _level(audio: Floats) -> Floats:
    """At unit root mean square over its louder parts."""
    level = np.sqrt(_levels(audio).max())
    return audio / max(float(level), 1e-5)


def _loudness(audio: Floats, random: np.random.Generator) -> Floats:
    """At another level, mostly a moderate one, never clipped."""
    peak = float(np.abs(audio).max())
    return audio * np.float32(10 ** (random.uniform(-26, 0) / 20) / peak) if peak > 1e-4 else audio


def _hiss(random: np.random.Generator) -> Floats:
    """Silence, or a microphone that hears nothing."""
    if random.random() < 0.3:
        return np.zeros(WINDOW, np.float32)
    noise = random.standard_normal(WINDOW).astype(np.float32)
    # From white to brown: recorders differ in the tone of their own noise.
    keep = random.uniform(0.0, 0.98)
    spectrum = np.fft.rfft(noise)
    spectrum /= np.abs(1 - keep * np.exp(-1j * np.linspace(0, np.pi, len(spectrum))))
    return (np.fft.irfft(spectrum, WINDOW) * 10 ** random.uniform(-4.5, -2)).astype(np.float32)


def _key(own: Sequence[Waveform], size: int, seed: int, teacher: str) -> str:
    digest = hashlib.sha256(repr((VERSION, size, seed, teacher, WINDOW)).encode())
    for item in own:
        digest.update(item.samples.tobytes() + bytes([item.label]))
    return digest.hexdigest()[:16]


def _write(path: Path, bank: Bank) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, power=bank.power, labels=bank.labels, teacher=bank.teacher, pair=bank.pair)
    part.replace(path)
