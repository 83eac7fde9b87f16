"""Stretches of recordings, decoded as the service decodes them, however long the file is.

Times are integer nanoseconds from the file's first frame; of a file without video, from its first sample of sound.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from models.audio import SAMPLE_RATE
from models.errors import DataError
from models.media import NS_PER_S, Images

Samples = NDArray[np.float32]
_SEEK_NS = 10 * NS_PER_S
"""A stretch that begins later than this is sought, not decoded up to."""
_LEAD_NS = 2 * NS_PER_S
"""How far before a stretch decoding begins after a seek."""
_SNAP = 5 * SAMPLE_RATE // 1000
"""Sound that is this many samples from where the last ended follows it without a seam, as in the service."""
_BREAK_NS = 10_000_000
"""Sound whose pts is this far from where it was due begins a new run."""


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """What a file holds."""

    video: bool
    """Moving pictures, or one."""
    audio: bool
    """A track of sound."""
    still: bool
    """One picture without a duration."""
    duration_ns: int
    """From the first frame until the last has been shown; 0 of a picture."""


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """What was decoded of a file."""

    pts_ns: NDArray[np.int64]
    """int64 ``[F]`` times of the frames, ascending."""
    images: Images
    """uint8 ``[F, H, W, 3]`` RGB."""
    frame_interval_ns: int
    """Nominal; 0 when the file does not say."""
    audio: Samples
    """float32 ``[N]`` mono at 16 kHz, zeros where nothing is."""
    audio_start_ns: int
    """Time of its first sample."""
    covered: NDArray[np.int64]
    """int64 ``[R, 2]`` first and end index of each run of ``audio`` that was there."""


def probe(path: Path) -> MediaInfo:
    """Look through a file's packets without decoding. Raises ``DataError`` when it is broken or holds neither."""
    try:
        with av.open(str(path)) as container:
            video, audio = _pictures(container), container.streams.audio[:1]
            if not video and not audio:
                raise DataError(f"{path} holds neither pictures nor sound; take it out of the manifest or replace it")
            still = bool(video) and ("_pipe" in container.format.name or container.format.name == "image2")
            if still:
                return MediaInfo(True, False, True, 0)
            duration_ns = _duration(path, container, (*video, *audio)[0])
    except (av.error.FFmpegError, OSError) as error:
        raise _unreadable(path, error) from error
    return MediaInfo(bool(video), bool(audio), False, duration_ns)


def _pictures(container: InputContainer) -> list[VideoStream]:
    """The video stream, if there is one; a song's cover is none."""
    streams = container.streams.video[:1]
    return [stream for stream in streams if not stream.disposition & Disposition.attached_pic]


def _duration(path: Path, container: InputContainer, stream: av.stream.Stream) -> int:
    packets = [packet for packet in container.demux(stream) if packet.pts is not None and not packet.is_discard]
    if not packets:
        raise DataError(f"{path} holds nothing that can be decoded; replace the file")
    # A file that was cut off while it was copied still opens, and its header tells how much there should be.
    if len(packets) < 0.98 * stream.frames - 1:
        raise DataError(f"{path} is cut short: {len(packets)} of {stream.frames} packets are there; replace the file")
    interval_ns = _interval_ns(stream) if isinstance(stream, VideoStream) else 0
    ends = [_packet_ns(packet) + (interval_ns or _packet_ns(packet, of="duration")) for packet in packets]
    return max(ends) - min(_packet_ns(packet) for packet in packets)


def _packet_ns(packet: Packet[av.stream.Stream], of: str = "pts") -> int:
    return _to_ns(getattr(packet, of) or 0, packet.time_base)


def read_stretch(path: Path, size: tuple[int, int] | None, start_ns: int, end_ns: int, *, sound: bool) -> Stretch:
    """Decode ``[start_ns, end_ns)`` of a file, frames scaled to ``size`` (width, height) as the service scales them.

    The frame on show at ``start_ns`` comes first. Without ``size`` no frame is kept, without ``sound`` no sample is.
    Raises ``DataError`` when the file is absent or broken.
    """
    times: list[int] = []
    images: list[Images] = []
    interval_ns, origin_ns = 0, None
    audio_start_ns = max(0, start_ns)
    try:
        with av.open(str(path)) as container:
            for stream in _pictures(container):
                interval_ns = _interval_ns(stream)
                origin_ns, frames = _from(container, stream, start_ns)
                if size is not None:
                    scaler = VideoReformatter()
                    for time_ns, frame in _on_show(frames, start_ns, end_ns):
                        times.append(time_ns)
                        images.append(_scaled(scaler, frame, size))
        runs = _runs(path, origin_ns, audio_start_ns, end_ns) if sound else []
    except (av.error.FFmpegError, OSError) as error:
        raise _unreadable(path, error) from error
    width, height = size or (0, 0)
    stacked = np.stack(images) if images else np.zeros((0, height, width, 3), np.uint8)
    audio, covered = _join(runs, (end_ns - audio_start_ns) * SAMPLE_RATE // NS_PER_S)
    return Stretch(np.array(times, np.int64), stacked, interval_ns, audio, audio_start_ns, covered)


def _from(
    container: InputContainer, stream: VideoStream, start_ns: int
) -> tuple[int | None, Iterable[tuple[int, VideoFrame]]]:
    """Time of the file's first frame, and timed frames from it, or from a little before ``start_ns``."""
    stream.codec_context.thread_count = 1
    frames = _timed(container, stream)
    first = next(frames, None)
    if first is None:
        return None, []
    origin_ns = first[0]
    if start_ns > _SEEK_NS:
        _seek(container, stream, origin_ns + start_ns - _LEAD_NS)
        frames = _timed(container, stream)
        first = next(frames, None)
        if first is None or first[0] > origin_ns + start_ns:
            # A file without a usable index: from the beginning, then.
            container.seek(0)
            frames = _timed(container, stream)
            first = next(frames, None)
    return origin_ns, _ascending(first, frames, origin_ns)


def _seek(container: InputContainer, stream: av.stream.Stream, time_ns: int) -> None:
    base = stream.time_base or Fraction(1, 1000)
    container.seek(time_ns * base.denominator // (NS_PER_S * base.numerator), stream=stream)


def _timed(container: InputContainer, stream: VideoStream) -> Iterator[tuple[int, VideoFrame]]:
    for frame in container.decode(stream):
        if frame.pts is not None and frame.time_base is not None:
            yield _to_ns(frame.pts, frame.time_base), frame


def _ascending(
    first: tuple[int, VideoFrame] | None, rest: Iterator[tuple[int, VideoFrame]], origin_ns: int
) -> Iterator[tuple[int, VideoFrame]]:
    """Frames from the origin; of those with the same time the first, as the service keeps it."""
    if first is None:
        return
    last_ns = first[0]
    yield last_ns - origin_ns, first[1]
    for time_ns, frame in rest:
        if time_ns > last_ns:
            last_ns = time_ns
            yield time_ns - origin_ns, frame


def _on_show(frames: Iterable[tuple[int, VideoFrame]], start_ns: int, end_ns: int) -> Iterator[tuple[int, VideoFrame]]:
    held: tuple[int, VideoFrame] | None = None
    for time_ns, frame in frames:
        if time_ns >= end_ns:
            break
        if time_ns > start_ns and held is not None:
            yield held
        held = time_ns, frame
    if held is not None:
        yield held


def _scaled(scaler: VideoReformatter, frame: VideoFrame, size: tuple[int, int]) -> Images:
    scaled = scaler.reformat(frame, *size, format="rgb24", interpolation=Interpolation.FAST_BILINEAR)
    return np.asarray(scaled.to_ndarray(), np.uint8)


def _runs(path: Path, origin_ns: int | None, start_ns: int, end_ns: int) -> list[tuple[int, Samples]]:
    """Each resampled piece with its place in samples from ``start_ns``."""
    runs: list[tuple[int, Samples]] = []
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return runs
        stream = container.streams.audio[0]
        if start_ns > _SEEK_NS and origin_ns is not None:
            _seek(container, stream, origin_ns + start_ns - _LEAD_NS)
        for time_ns, samples in _resampled(container.decode(stream)):
            origin_ns = time_ns if origin_ns is None else origin_ns
            first = _sample(time_ns - origin_ns - start_ns)
            if time_ns - origin_ns >= end_ns:
                break
            if first + len(samples) > 0:
                runs.append((first, samples))
    return runs


def _resampled(frames: Iterable[AudioFrame]) -> Iterator[tuple[int, Samples]]:
    """Mono pieces with their times, counted from the first sample of each unbroken run: containers round each pts."""
    run: _Run | None = None
    for frame in frames:
        time_ns = None if frame.pts is None or frame.time_base is None else _to_ns(frame.pts, frame.time_base)
        if run is None or run.breaks(frame.sample_rate, time_ns):
            if run is not None:
                yield from run.feed(None)
            run = _Run(frame.sample_rate, time_ns if time_ns is not None else 0 if run is None else run.due_ns)
        yield from run.feed(frame)
    if run is not None:
        yield from run.feed(None)


class _Run:
    """Sound without a break, resampled; the filter's look-ahead does not move it in time."""

    def __init__(self, rate: int, anchor_ns: int) -> None:
        self._rate, self._anchor_ns = rate, anchor_ns
        self._taken = self._given = 0
        # Channels are averaged, as in the service: FFmpeg's own weights for float overshoot.
        self._resampler = AudioResampler("flt", "mono", SAMPLE_RATE, options={"rematrix_maxval": "1.0"})

    @property
    def due_ns(self) -> int:
        return self._anchor_ns + self._taken * NS_PER_S // self._rate

    def breaks(self, rate: int, time_ns: int | None) -> bool:
        return rate != self._rate or (time_ns is not None and abs(time_ns - self.due_ns) > _BREAK_NS)

    def feed(self, frame: AudioFrame | None) -> Iterator[tuple[int, Samples]]:
        """Pieces with their times; ``None`` is the end."""
        if frame is not None:
            self._taken += frame.samples
            frame.pts, frame.time_base = None, Fraction(1, self._rate)
        for piece in self._resampler.resample(frame):
            samples = piece.to_ndarray()[0].astype(np.float32)
            time_ns = self._anchor_ns + self._given * NS_PER_S // SAMPLE_RATE
            self._given += len(samples)
            yield time_ns, np.clip(samples, -1.0, 1.0)


def _join(runs: list[tuple[int, Samples]], count: int) -> tuple[Samples, NDArray[np.int64]]:
    """One waveform of at most ``count`` samples; what was there first stays."""
    audio = np.zeros(max(0, min(count, max((at + len(s) for at, s in runs), default=0))), np.float32)
    covered: list[list[int]] = []
    end = None
    for at, samples in runs:
        first = at if end is None or abs(at - end) > _SNAP else end
        skip = max(0, (end or 0) - first, -first)
        part = samples[skip : max(skip, len(audio) - first)]
        first += skip
        audio[first : first + len(part)] = part
        end = max(end or 0, first + len(part))
        if covered and covered[-1][1] == first:
            covered[-1][1] = end
        elif len(part):
            covered.append([first, end])
    return audio, np.array(covered, np.int64).reshape(-1, 2)


def _sample(time_ns: int) -> int:
    """Nearest sample index of a time."""
    return (2 * time_ns * SAMPLE_RATE + NS_PER_S) // (2 * NS_PER_S)


def _to_ns(time: int, base: Fraction) -> int:
    return time * base.numerator * NS_PER_S // base.denominator


def _interval_ns(stream: VideoStream) -> int:
    rate = stream.average_rate
    return NS_PER_S * rate.denominator // rate.numerator if rate else 0


def _unreadable(path: Path, error: av.error.FFmpegError | OSError) -> DataError:
    return DataError(f"{path} cannot be read ({error.strerror or error}); replace the file")
