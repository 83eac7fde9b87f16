"""What the frozen parts of the network make of the data, computed once and kept on disk.

The trunk is not trained, so its features of every sample are computed once, for several *variants* of each
recording: shifted sampling grids, mirrored, cropped, recoloured, seen by a moving camera. Files are named by a
hash of everything that they depend on; a changed recording, variant or trunk never meets a stale entry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.audio import LogMel
from models.basepack import shape
from models.basepack.camera import MARGIN, draw_path, film, still_clip
from models.basepack.frozen import FrozenEncoder
from models.basepack.tables import ORDINARY, STILLS, Recording
from models.basepack.watch import FEATURES
from models.errors import DataError
from models.media import Clip, Images, read_audio, read_clip, read_image, sample_pairs

Advance = Callable[[], None]
"""Called after each file."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of looking at a recording."""

    phase_ns: int = 0
    """Shift of the sampling grid."""
    mirror: bool = False
    """Left and right exchanged."""
    seed: int | None = None
    """Draws a crop and colours; none without."""


PLAIN = Variant()
VARIANTS = (PLAIN, Variant(mirror=True), Variant(62_500_000, seed=1))
"""The first is what the service sees; evaluation uses it alone."""


@dataclass(frozen=True, slots=True)
class Moving:
    """A recording, or a picture, seen through a camera that moves."""

    seed: int
    """Draws the camera's path."""
    phase_ns: int = 0
    """Shift of the sampling grid."""


MOVING = (Moving(4),)
"""Beside ``VARIANTS``: whatever happens goes on happening while the camera moves."""
STILL_VARIANTS = (Moving(1), Moving(2, 125_000_000))
"""Pictures have no other."""
AnyVariant = Variant | Moving


@dataclass(frozen=True, slots=True, eq=False)
class Track:
    """One variant of a recording, encoded."""

    features: NDArray[np.float16]
    """float16 ``[S, width]``, the width that of the encoder; zeros where missing."""
    present: NDArray[np.bool_]
    """bool ``[S]``."""
    phase_s: float
    """Time of the first sample in seconds."""
    moving: bool = False
    """Seen by a camera that was made to move."""


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A recording as training sees it."""

    recording: Recording
    """Where it came from."""
    tracks: tuple[Track, ...]
    """One for each variant."""
    mel: NDArray[np.float32] | None
    """Mel power float32 ``[64, frames]`` at 50 frames a second; ``None`` without an audio track."""
    duration_s: float
    """Length."""


def encode_variants(recording: Recording, encoder: FrozenEncoder, folder: Path) -> Encoded:
    """All that training sees of a recording. Raises ``DataError``."""
    if recording.dataset == STILLS:
        return encode_recording(recording, encoder, folder, STILL_VARIANTS)
    plain = encode_recording(recording, encoder, folder, VARIANTS if recording.dataset in ORDINARY else (PLAIN,))
    moving = encode_recording(recording, encoder, folder, MOVING)
    return Encoded(recording, plain.tracks + moving.tracks, plain.mel, plain.duration_s)


def encode_recording(
    recording: Recording, encoder: FrozenEncoder, folder: Path, variants: Sequence[AnyVariant] = VARIANTS
) -> Encoded:
    """From the cache, else computed and kept. Raises ``DataError``."""
    path = folder / f"{recording.dataset}-{recording.path.stem}-{_key(recording.path, encoder, *variants)}.npz"
    if not path.is_file():
        _write(path, _compute(recording, encoder, variants))
    stored = np.load(path)
    tracks = tuple(
        Track(stored[f"features{n}"], stored[f"present{n}"], variant.phase_ns / 1e9, moving=isinstance(variant, Moving))
        for n, variant in enumerate(variants)
    )
    return Encoded(recording, tracks, stored["mel"] if stored["mel"].size else None, float(stored["duration_s"]))


def _compute(
    recording: Recording, encoder: FrozenEncoder, variants: Sequence[AnyVariant]
) -> dict[str, NDArray[np.generic]]:
    plain = _clip(recording, shape.WATCH_SIZE)
    arrays: dict[str, NDArray[np.generic]] = {"duration_s": np.array(plain.duration_ns / 1e9)}
    arrays["mel"] = mel_power(plain.audio) if plain.audio is not None and plain.audio.size else np.zeros(0, np.float32)
    for n, variant in enumerate(variants):
        if isinstance(variant, Moving):
            present, frames = _moving(recording, variant)
        else:
            present, frames = _fixed(recording, variant, plain)
        features = np.zeros((len(present), encoder.width), np.float16)
        features[present] = encoder.encode(frames)
        arrays[f"features{n}"], arrays[f"present{n}"] = features, present
    return arrays


def _clip(recording: Recording, size: int) -> Clip:
    if recording.dataset == STILLS:
        return still_clip(read_image(recording.path, size, size), recording.seconds)
    return read_clip(recording.path, size, size, seconds=recording.seconds)


def _fixed(recording: Recording, variant: Variant, plain: Clip) -> tuple[NDArray[np.bool_], Images]:
    """Which samples there are, bool ``[S]``, and their frames, uint8 ``[P, 2, H, W, 3]``."""
    clip = plain if variant.seed is None else _augmented(recording, variant.seed)
    _, pairs = sample_pairs(clip, fps=shape.WATCH_FPS, lookback_ns=shape.LOOKBACK_NS, phase_ns=variant.phase_ns)
    present = pairs[:, 1] >= 0
    images = clip.images[:, :, ::-1] if variant.mirror else clip.images
    return present, images[pairs[present]]


def _moving(recording: Recording, variant: Moving) -> tuple[NDArray[np.bool_], Images]:
    """As ``_fixed``."""
    clip = _clip(recording, int(shape.WATCH_SIZE * MARGIN))
    _, pairs = sample_pairs(clip, fps=shape.WATCH_FPS, lookback_ns=shape.LOOKBACK_NS, phase_ns=variant.phase_ns)
    present = pairs[:, 1] >= 0
    shown = pairs[present].reshape(-1)
    path = draw_path(np.random.default_rng([variant.seed, *recording.path.name.encode()]))
    seen = film(clip.images[shown], clip.pts_ns[shown], path, shape.WATCH_SIZE)
    return present, seen.reshape(-1, 2, *seen.shape[1:])


def _augmented(recording: Recording, seed: int) -> Clip:
    """The recording cropped (at another aspect ratio) and recoloured, the same for all its frames."""
    random = np.random.default_rng([seed, *recording.path.name.encode()])
    size = shape.WATCH_SIZE
    width, height = random.integers(size, size * 5 // 4, 2)
    clip = read_clip(recording.path, int(width), int(height), seconds=recording.seconds)
    left, top = random.integers(0, width - size + 1), random.integers(0, height - size + 1)
    cropped = clip.images[:, top : top + size, left : left + size]
    return Clip(clip.pts_ns, recolour(cropped, random), clip.frame_interval_ns, None)


def recolour(images: Images, random: np.random.Generator) -> Images:
    """Other exposure, gamma and white balance, by a table of 256 values for each channel."""
    levels = np.arange(256) / 255
    gamma, gain, balance = random.uniform(0.7, 1.4), random.uniform(0.75, 1.25), random.uniform(0.9, 1.1, 3)
    table = np.clip(levels[:, None] ** gamma * gain * balance * 255, 0, 255).astype(np.uint8)
    grey = random.random() < 0.15
    out = np.stack([table[:, c][images[..., c]] for c in range(3)], axis=-1)
    return np.repeat(out.mean(axis=-1, keepdims=True).astype(np.uint8), 3, axis=-1) if grey else out


def encode_sound(path: Path) -> NDArray[np.float32]:
    """Mel power float32 ``[64, frames]`` of a sound file. Raises ``DataError``."""
    audio = read_audio(path)
    if audio is None or not audio.size:
        raise DataError(f"{path} holds no sound; replace the file")
    return mel_power(audio)


def mel_power(audio: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mel power float32 ``[64, frames]`` of a waveform float32 ``[N]``."""
    with torch.inference_mode():
        power: NDArray[np.float32] = LogMel().power(torch.from_numpy(audio)[None])[0].numpy()
    return power


def encode_all(
    recordings: Sequence[Recording], encoder: FrozenEncoder, folder: Path, advance: Advance = lambda: None
) -> Iterator[Encoded]:
    """Each recording encoded. Raises ``DataError``."""
    for recording in recordings:
        yield encode_variants(recording, encoder, folder)
        advance()


def _key(path: Path, encoder: FrozenEncoder, *parts: object) -> str:
    """Hash of a file's content, the trunk and everything else that the entry depends on."""
    digest = hashlib.sha256(path.read_bytes())
    digest.update(
        repr((parts, shape.WATCH_SIZE, shape.WATCH_FPS, shape.LOOKBACK_NS, FEATURES, encoder.checksum)).encode()
    )
    return digest.hexdigest()[:16]


def _write(path: Path, arrays: dict[str, NDArray[np.generic]]) -> None:
    """Whole or not at all: a run that is interrupted leaves no half entry."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    part.replace(path)
