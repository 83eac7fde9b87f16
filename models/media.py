"""Recordings read for training, by the same sampling rules that the service lives by.

A sample at time t is the newest frame with pts at or before t, unless it is older than the larger of one
sampling period and 1.5 times the recording's own frame interval; then it is missing. Times are integer
nanoseconds from the first frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np
from av.audio.resampler import AudioResampler
from av.container import InputContainer
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from models.audio import SAMPLE_RATE
from models.errors import DataError

NS_PER_S = 1_000_000_000
Images = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """A decoded recording."""

    pts_ns: NDArray[np.int64]
    """int64 ``[F]`` presentation times from the first frame on, ascending."""
    images: Images
    """uint8 ``[F, H, W, 3]`` RGB."""
    frame_interval_ns: int
    """Nominal; 0 when the file does not say."""
    audio: NDArray[np.float32] | None
    """float32 ``[N]`` mono at 16 kHz from the time of the first frame on; ``None`` without an audio track."""

    @property
    def duration_ns(self) -> int:
        """Until the last frame has been shown for its interval."""
        return int(self.pts_ns[-1]) + self.frame_interval_ns


def read_clip(path: Path, width: int, height: int, *, seconds: float = float("inf")) -> Clip:
    """Decode a video file, every frame scaled to ``width`` x ``height`` as the service scales it.

    Raises ``DataError`` when the file is absent, broken or holds no video.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path} holds no video; take it out of the table or replace the file")
            pts, images, interval = _video(container, width, height, seconds)
        if not pts:
            raise DataError(f"{path} holds no picture that can be decoded; replace the file")
        audio = read_audio(path, origin_ns=pts[0], seconds=seconds)
    except (av.error.FFmpegError, OSError) as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); replace the file") from error
    return Clip(np.array(pts, np.int64) - pts[0], np.stack(images), interval, audio)


def _video(container: InputContainer, width: int, height: int, seconds: float) -> tuple[list[int], list[Images], int]:
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    scaler = VideoReformatter()
    pts: list[int] = []
    images: list[Images] = []
    for frame in container.decode(stream):
        if frame.pts is None or frame.time_base is None:
            continue
        time_ns = frame.pts * frame.time_base.numerator * NS_PER_S // frame.time_base.denominator
        if pts and time_ns - pts[0] > seconds * NS_PER_S:
            break
        if pts and time_ns <= pts[-1]:
            continue  # Some recorders write a time twice; the service keeps the first.
        scaled = scaler.reformat(frame, width, height, format="rgb24", interpolation=Interpolation.FAST_BILINEAR)
        pts.append(time_ns)
        images.append(np.asarray(scaled.to_ndarray(), np.uint8))
    return pts, images, _interval_ns(stream.average_rate)


def _interval_ns(rate: Fraction | None) -> int:
    return NS_PER_S * rate.denominator // rate.numerator if rate else 0


def read_audio(path: Path, *, origin_ns: int = 0, seconds: float = float("inf")) -> NDArray[np.float32] | None:
    """Mono float32 at 16 kHz from ``origin_ns`` on, gaps as zeros; ``None`` when there is no audio track.

    Raises ``DataError`` when the file is absent or broken.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                return None
            runs = _audio_runs(container, origin_ns, seconds)
    except (av.error.FFmpegError, OSError) as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); replace the file") from error
    end = max((at + len(samples) for at, samples in runs), default=0)
    audio = np.zeros(max(end, 0), np.float32)
    for at, samples in runs:
        skip = max(0, -at)
        audio[at + skip : at + len(samples)] = samples[skip:]
    return audio


def _audio_runs(container: InputContainer, origin_ns: int, seconds: float) -> list[tuple[int, NDArray[np.float32]]]:
    """Each decoded run with its place in samples from ``origin_ns``."""
    resampler = AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
    runs: list[tuple[int, NDArray[np.float32]]] = []
    for frame in container.decode(container.streams.audio[0]):
        for piece in resampler.resample(frame):
            if piece.pts is None or piece.time_base is None:
                continue
            time_ns = piece.pts * piece.time_base.numerator * NS_PER_S // piece.time_base.denominator - origin_ns
            if time_ns > seconds * NS_PER_S:
                return runs
            runs.append((time_ns * SAMPLE_RATE // NS_PER_S, piece.to_ndarray()[0].astype(np.float32)))
    return runs


def read_image(path: Path, width: int, height: int, *, indices: bool = False) -> Images:
    """uint8 ``[height, width, 3]`` RGB, or with ``indices`` a mask uint8 ``[height, width]`` by nearest pixel.

    Raises ``DataError`` when the file is absent or broken.
    """
    try:
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
    except (av.error.FFmpegError, OSError, StopIteration) as error:
        raise DataError(f"{path} cannot be read as an image ({error}); replace the file") from error
    if indices:
        mask = frame.to_ndarray()
        rows = (np.arange(height) * 2 + 1) * mask.shape[0] // (2 * height)
        columns = (np.arange(width) * 2 + 1) * mask.shape[1] // (2 * width)
        return np.ascontiguousarray(mask[rows[:, None], columns[None]], np.uint8)
    scaled = frame.reformat(width, height, format="rgb24", interpolation=Interpolation.FAST_BILINEAR)
    return np.asarray(scaled.to_ndarray(), np.uint8)


def sample_times(duration_ns: int, fps: int, phase_ns: int = 0) -> NDArray[np.int64]:
    """int64 times of the samples of a recording: every ``1/fps`` seconds from ``phase_ns`` on."""
    period = NS_PER_S // fps
    return np.arange(phase_ns, max(duration_ns, phase_ns + 1), period, dtype=np.int64)


def pick_frames(
    pts_ns: NDArray[np.int64], times_ns: NDArray[np.int64], *, period_ns: int, frame_interval_ns: int
) -> NDArray[np.int64]:
    """int64 index of the frame for each sample time, -1 where it is missing."""
    index = np.searchsorted(pts_ns, times_ns, side="right") - 1
    age = times_ns - pts_ns[np.maximum(index, 0)]
    too_old = age > max(period_ns, frame_interval_ns * 3 // 2)
    return np.where((index < 0) | too_old, -1, index)


def sample_pairs(
    clip: Clip, *, fps: int, lookback_ns: int, phase_ns: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sample times int64 ``[S]`` and frame indices int64 ``[S, 2]``, the earlier frame first, -1 where missing.

    Where only the earlier frame is missing the later one stands in for it: no motion.
    """
    times = sample_times(clip.duration_ns, fps, phase_ns)
    period_ns, interval_ns = NS_PER_S // fps, clip.frame_interval_ns
    current = pick_frames(clip.pts_ns, times, period_ns=period_ns, frame_interval_ns=interval_ns)
    earlier = pick_frames(clip.pts_ns, times - lookback_ns, period_ns=period_ns, frame_interval_ns=interval_ns)
    return times, np.stack([np.where((earlier < 0) | (current < 0), current, earlier), current], axis=1)
