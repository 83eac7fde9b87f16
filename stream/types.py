"""The values that flow through the service.

All are immutable and compared by identity. Times are integer nanoseconds: ``pts`` on the source's
media timeline, ``arrival``/``closed``/… on the process's monotonic clock, ``wall`` since 1970 UTC.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class ClockOrigin(StrEnum):
    """Where a source's capture time comes from, best first."""

    RTCP_SR = "rtcp_sr"
    """RTP sender reports: the camera's own wall clock."""
    PTS = "pts"
    """A wall-clock time recorded in the file, plus pts."""
    ARRIVAL = "arrival"
    """When the media reached this process; late by the unknown network and camera delay."""


@dataclass(frozen=True, slots=True)
class CaptureClock:
    """Maps a source's media timeline to UTC: ``capture wall ns = pts_ns + offset_ns``."""

    origin: ClockOrigin
    """Where the mapping comes from."""
    uncertainty_ms: float
    """Half-width of the error to be expected."""
    offset_ns: int
    """UTC of media time zero."""


def _short(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, tuple) and len(value) > 4:
        return f"<{len(value)} items>"
    return repr(value)


class _ShapedRepr:
    """repr that shows arrays as dtype and shape."""

    __slots__ = ()

    def __repr__(self) -> str:
        body = ", ".join(f"{f.name}={_short(getattr(self, f.name))}" for f in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({body})"


def _check_array(owner: str, array: NDArray[Any], dtype: type[np.generic], shape: tuple[int | None, ...]) -> None:
    """Raise ``ValueError`` unless ``array`` has this dtype and shape (``None`` is any size)."""
    fits = len(array.shape) == len(shape) and all(
        want is None or have == want for have, want in zip(array.shape, shape, strict=True)
    )
    if array.dtype != dtype or not fits:
        raise ValueError(f"{owner} must be {np.dtype(dtype)}{list(shape)}, got {array.dtype}{list(array.shape)}")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class EpochStart(_ShapedRepr):
    """A stretch of unbroken media begins; everything after it belongs to it, until the next one."""

    source_id: str
    """The source."""
    epoch: int
    """Counts up from 0 within one run of the source."""
    identity: str
    """Names this stretch for event ids: the capture time of its start for a live source; for a
    recording something that is the same at every replay."""
    origin_ns: int
    """pts of the first video frame (of the first audio sample where there is no video); windows and
    samples are counted from here."""
    has_video: bool
    """Whether frames will come."""
    has_audio: bool
    """Whether audio will come."""
    frame_interval_ns: int
    """The source's own nominal frame interval; 0 when it does not say."""
    clock: CaptureClock
    """Media time to UTC, as known at the start."""
    live: bool
    """Whether media arrives in its own time; a recording read as fast as possible does not."""
    arrival_ns: int
    """When the first media arrived."""
    reason: str = "start"
    """Why the epoch began: start, reconnect, pts_jump, wrap, resolution, codec, loop."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Frame(_ShapedRepr):
    """One decoded, scaled picture that some pack samples."""

    source_id: str
    """The source."""
    epoch: int
    """Its epoch."""
    seq: int
    """Number of the decoded frame within the epoch (those not sampled count too)."""
    pts_ns: int
    """Presentation time."""
    arrival_ns: int
    """When its packet arrived."""
    image: NDArray[np.uint8]
    """uint8 ``[H, W, 3]`` RGB. The size tells which inputs it was scaled for."""

    def __post_init__(self) -> None:
        _check_array("Frame.image", self.image, np.uint8, (None, None, 3))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class AudioChunk(_ShapedRepr):
    """A run of audio samples, resampled and mixed down."""

    source_id: str
    """The source."""
    epoch: int
    """Its epoch."""
    pts_ns: int
    """Presentation time of the first sample."""
    arrival_ns: int
    """When its packet arrived."""
    sample_rate: int
    """Samples per second."""
    samples: NDArray[np.float32]
    """float32 ``[N]`` mono, -1..1."""

    def __post_init__(self) -> None:
        _check_array("AudioChunk.samples", self.samples, np.float32, (None,))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class TextItem(_ShapedRepr):
    """A caption, transcript or note that belongs to a stretch of the media timeline."""

    source_id: str
    """The source."""
    epoch: int
    """Its epoch."""
    pts_ns: int
    """When it begins."""
    end_ns: int
    """When it is over; ``pts_ns`` for what was said at an instant."""
    arrival_ns: int
    """When it arrived."""
    text: str
    """What it says."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Progress(_ShapedRepr):
    """Video is complete up to (not including) ``pts_ns``: a later frame was decoded, sampled or not."""

    source_id: str
    """The source."""
    epoch: int
    """Its epoch."""
    pts_ns: int
    """pts of the newest decoded frame."""
    arrival_ns: int
    """When that frame's packet arrived."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ClockUpdate(_ShapedRepr):
    """A better mapping to UTC is known (a first sender report came, or drift moved it)."""

    source_id: str
    """The source."""
    epoch: int
    """Its epoch."""
    clock: CaptureClock
    """The mapping from here on."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class EpochEnd(_ShapedRepr):
    """No more media will come in this epoch."""

    source_id: str
    """The source."""
    epoch: int
    """Its epoch."""
    reason: str
    """end_of_stream, lost, removed, or the reason of the epoch that follows."""
    arrival_ns: int
    """When that was known."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Elapsed(_ShapedRepr):
    """A recording that is replayed faster than it was made says how late it is: all that arrived before was emitted."""

    source_id: str
    """The source."""
    epoch: int
    """Its epoch."""
    arrival_ns: int
    """Time of arrival of what comes next."""


MediaItem = EpochStart | Frame | AudioChunk | TextItem | Progress | ClockUpdate | Elapsed | EpochEnd
"""What a source emits, in this order: ``EpochStart``, media, ``EpochEnd``, ``EpochStart``, …"""

Emit = Callable[[MediaItem], None]
"""Takes one item from a source's thread; may block (back-pressure), raises ``Stopped`` when the source must end."""


class Stopped(Exception):
    """Unwinds a source's thread after it was told to stop; not an error."""


class StopFlag(Protocol):
    """What a source polls to learn that it must end (``threading.Event`` is one)."""

    def is_set(self) -> bool:
        """Whether to end."""
        ...

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep up to ``timeout`` seconds, or until told to end."""
        ...


class Source(Protocol):
    """One connection to one camera or file. It never retries: its owner does."""

    @property
    def source_id(self) -> str:
        """The source's name."""
        ...

    def run(self, emit: Emit, stop: StopFlag) -> None:
        """Deliver until the end of the stream or ``stop``; blocks.

        Returns at the end of a recording or when stopped. Raises ``SourceError`` when a live source is lost,
        cannot be reached or cannot be decoded.
        """
        ...


@dataclass(frozen=True, slots=True)
class WindowKey:
    """Identity of a window: which source, which stretch of it, whose window, which one."""

    source_id: str
    """The source."""
    epoch: int
    """Its epoch."""
    pack: str
    """Pack that the window was cut for."""
    branch: str
    """Branch of the pack."""
    index: int
    """Window number within the epoch; it starts at ``origin + index x hop``."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ClipWindow(_ShapedRepr):
    """A closed half-open window ``[start_ns, end_ns)`` of a source's media timeline."""

    key: WindowKey
    """Identity."""
    start_ns: int
    """First instant."""
    end_ns: int
    """First instant after."""
    sample_ns: NDArray[np.int64]
    """int64 ``[T]`` sample times."""
    frame_pts_ns: NDArray[np.int64]
    """int64 ``[T, L]`` pts of the frame used for each sample (L = 2 with look-back, the earlier
    first), -1 where missing."""
    frames: tuple[Frame | None, ...]
    """``T x L`` frames, row by row; ``None`` where missing. Windows share frames, they never copy."""
    audio: NDArray[np.float32] | None
    """float32 ``[N]``, zeros where not covered; ``None`` when the branch takes no audio."""
    audio_coverage: float
    """Share of the window's audio samples that arrived, 0..1."""
    missing_frames: int
    """Samples for which there was no frame."""
    text: tuple[str, ...]
    """Context text that falls into the window."""
    clock: CaptureClock
    """Media time to UTC when the window closed."""
    arrival_ns: int
    """Arrival of the newest media that the window needed (monotonic)."""
    closed_ns: int
    """When it closed (monotonic)."""
    waited_ns: int
    """How much of that it spent waiting for the late modality."""

    def __post_init__(self) -> None:
        _check_array("ClipWindow.sample_ns", self.sample_ns, np.int64, (None,))
        _check_array("ClipWindow.frame_pts_ns", self.frame_pts_ns, np.int64, (len(self.sample_ns), None))
        if len(self.frames) != self.frame_pts_ns.size:
            raise ValueError(f"ClipWindow.frames must have {self.frame_pts_ns.size} entries, got {len(self.frames)}")
        if self.audio is not None:
            _check_array("ClipWindow.audio", self.audio, np.float32, (None,))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Prediction(_ShapedRepr):
    """What one head says of one window."""

    key: WindowKey
    """The window."""
    head: str
    """Name of the head."""
    scores: NDArray[np.float32] | None
    """float32 ``[labels]`` probabilities, for action and class heads."""
    contributions: dict[str, NDArray[np.float32]]
    """Per modality float32 ``[labels]``: how much the probability falls when that modality is taken away."""
    mask: NDArray[np.uint8] | None
    """uint8 ``[h, w]`` class index, for segmentation heads."""
    embedding: NDArray[np.float32] | None
    """float32 ``[D]``, for embedding heads."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Event(_ShapedRepr):
    """One CloudEvent, ready to be published. ``data`` holds plain JSON values."""

    id: str
    """Idempotency key: the same for the same fact, however often it is made or sent."""
    type: str
    """``io.sightwire.{kind}.{phase}.v1``."""
    source: str
    """``/sources/{id}``."""
    time: str
    """Capture time, RFC 3339 UTC with microseconds."""
    subject: str
    """The label."""
    kind: str
    """action, class, segmentation or source: names the channel."""
    data: dict[str, Any]
    """The payload that the JSON Schema describes."""
    capture_wall_ns: int
    """Capture time again, for latency."""
    made_ns: int
    """When it was made (monotonic)."""
