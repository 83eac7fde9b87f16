"""Windows of a manifest's rows as the graphs of a branch take them, by the service's rules of sampling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.manifest import Branch, VideoInput
from models.data.decode import MediaInfo, Stretch, probe, read_stretch
from models.data.manifest import Row
from models.data.windows import cut_windows, take_audio, take_frames
from models.errors import DataError
from models.media import NS_PER_S, read_image

_CHUNK_NS = 10 * NS_PER_S
"""A row is decoded in pieces of about this length, so that a long recording needs no more memory than a short one."""


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Some windows of one row; samples that several share are there once."""

    frames: NDArray[np.uint8]
    """uint8 ``[S, H, W, 3]``, with look-back ``[S, 2, H, W, 3]``; black where missing."""
    present: NDArray[np.bool_]
    """bool ``[S]``."""
    samples: NDArray[np.int64]
    """int64 ``[W, T]``: number of each window's samples."""
    audio: NDArray[np.float32]
    """float32 ``[W, N]``, zeros where not covered."""
    coverage: NDArray[np.float32]
    """float32 ``[W]``: covered share of the sound."""

    def clips(self) -> NDArray[np.uint8]:
        """uint8 ``[W, T, …]``: every window's frames; a missing sample repeats the nearest one that is there."""
        here = self.present[self.samples]
        place = np.arange(self.samples.shape[1])
        distance = np.abs(place[:, None] - place[None, :])[None] + np.where(here, 0, len(place))[:, None, :]
        nearest = distance.argmin(axis=2)
        return self.frames[np.take_along_axis(self.samples, nearest, axis=1)]


def row_windows(where: str, row: Row, branch: Branch) -> Iterator[Windows]:
    """The windows of a row in order, at least one.

    Raises ``DataError`` naming ``where``, when the file is broken, the row lies outside it, or it holds nothing that
    the branch takes.
    """
    try:
        info = probe(row.path)
        _check_usable(row, info, branch)
        starts = _starts(row, info, branch)
        at_once = max(1, _CHUNK_NS // branch.hop_ns)
        for first in range(0, len(starts), at_once):
            yield _read(row, info, branch, starts[first : first + at_once])
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _check_usable(row: Row, info: MediaInfo, branch: Branch) -> None:
    taken = [name for name, spec in (("pictures", branch.video), ("sound", branch.audio)) if spec is not None]
    held = [name for name, there in (("pictures", info.video), ("sound", info.audio)) if there]
    if not set(taken) & set(held):
        raise DataError(
            f"{row.path.name} holds no {' and no '.join(taken)}, which branch {branch.name} takes; "
            "take the label or mask out of the row"
        )


def _starts(row: Row, info: MediaInfo, branch: Branch) -> list[int]:
    if info.still:
        return [0]
    start_ns = round((row.start or 0.0) * NS_PER_S)
    end_ns = info.duration_ns if row.end is None else min(round(row.end * NS_PER_S), info.duration_ns)
    if end_ns <= start_ns:
        length = f"{info.duration_ns / NS_PER_S:.2f} s"
        raise DataError(f"the row starts at {row.start:g} s, {row.path.name} ends at {length}; correct start")
    hop_ns = branch.hop_ns
    return cut_windows(start_ns, end_ns, info.duration_ns, window_ns=branch.window_ns, hop_ns=hop_ns)


def _read(row: Row, info: MediaInfo, branch: Branch, starts: list[int]) -> Windows:
    video = branch.video if info.video else None
    lookback_ns = (video.lookback_ns or 0) if video is not None else 0
    first_ns, end_ns = starts[0] - lookback_ns, starts[-1] + branch.window_ns
    size = None if video is None else (video.width, video.height)
    if info.still:
        stretch = _still(row, size)
    else:
        stretch = read_stretch(row.path, size, first_ns, end_ns, sound=branch.audio is not None)
    frames, present, samples = _video(stretch, branch, info, starts)
    audio = np.zeros((len(starts), 0), np.float32)
    coverage = np.zeros(len(starts), np.float32)
    if branch.audio is not None:
        heard = [take_audio(stretch, start, branch.window_ns) for start in starts]
        audio = np.stack([samples for samples, _ in heard])
        coverage = np.array([share for _, share in heard], np.float32)
    return Windows(frames, present, samples, audio, coverage)


def _video(
    stretch: Stretch, branch: Branch, info: MediaInfo, starts: list[int]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.int64]]:
    video = branch.video
    if video is None:
        return np.zeros((0, 0, 0, 3), np.uint8), np.zeros(0, bool), np.zeros((len(starts), 0), np.int64)
    offsets = [video.sample_time_ns(n) for n in range(video.samples_in(branch.window_ns))]
    times, samples = np.unique(np.array(starts)[:, None] + np.array(offsets)[None], return_inverse=True)
    samples = samples.reshape(len(starts), len(offsets)).astype(np.int64)
    if not info.video:
        return np.zeros((len(times), *_shape(video)), np.uint8), np.zeros(len(times), bool), samples
    period_ns = video.sample_time_ns(1)
    frames, mask = take_frames(stretch, times, period_ns=period_ns, lookback_ns=video.lookback_ns)
    return frames, mask > 0, samples


def _shape(video: VideoInput) -> tuple[int, ...]:
    pair = () if video.lookback_ns is None else (2,)
    return (*pair, video.height, video.width, 3)


def _still(row: Row, size: tuple[int, int] | None) -> Stretch:
    assert size is not None
    picture = read_image(row.path, *size)[None]
    return Stretch(np.zeros(1, np.int64), picture, 0, np.zeros(0, np.float32), 0, np.zeros((0, 2), np.int64))
