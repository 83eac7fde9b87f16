"""Where capture time comes from, and what names an epoch."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from stream.clock import NS_PER_MS, NS_PER_S, Clock
from stream.types import CaptureClock, ClockOrigin

ARRIVAL_UNCERTAINTY_MS = 200.0
"""Camera, encoder and network delay are unknown."""
FILE_TAG_UNCERTAINTY_MS = 1000.0
"""A file's creation time has whole seconds."""
SENDER_REPORT_UNCERTAINTY_MS = 5.0
"""The camera's own clock may be wrong, but it is the camera's."""
PLAUSIBLE_NS = 3600 * NS_PER_S
"""A sender whose clock is further off than this was never set."""
DRIFT_NS = 5 * NS_PER_MS
"""A mapping that moves by less than this is not worth telling."""


class Capture(Protocol):
    """Gives an epoch its clock and its name."""

    @property
    def live(self) -> bool:
        """Whether media arrives in its own time."""
        ...

    def clock(self, pts_ns: int, arrival_ns: int) -> CaptureClock:
        """Media time to UTC, as known when the first media of an epoch arrived."""
        ...

    def identity(self, epoch: int, origin_ns: int, clock: CaptureClock) -> str:
        """Name of the epoch for event ids (``EpochStart.identity``)."""
        ...

    def jumped(self) -> None:
        """Media time has jumped: what was known of the old timeline means nothing now."""
        ...

    def sender_report(self, offset_ns: int) -> CaptureClock | None:
        """Take the mapping of a sender report; returns the clock if it is news worth telling."""
        ...


class LiveCapture:
    """A source in its own time: by sender reports once there is one, else by arrival.

    ``uncertainty_ms`` is that of arrival.
    """

    live = True

    def __init__(
        self, clock: Clock, uncertainty_ms: float = ARRIVAL_UNCERTAINTY_MS, fingerprint: str | None = None
    ) -> None:
        """``fingerprint`` names the content of a recording that is played once in its own time."""
        self._clock = clock
        self._fingerprint = fingerprint
        self._uncertainty_ms = uncertainty_ms
        self._told: CaptureClock | None = None
        self._offset_ns: int | None = None
        self._unconfirmed_ns: int | None = None

    def sender_report(self, offset_ns: int) -> CaptureClock | None:
        """See ``Capture``."""
        unconfirmed_ns, self._unconfirmed_ns = self._unconfirmed_ns, offset_ns
        # FFmpeg gives a single packet a wrong pts now and then: two in a row must agree.
        if unconfirmed_ns is None or abs(offset_ns - unconfirmed_ns) >= DRIFT_NS:
            return None
        told = self._told
        if told is not None and abs(offset_ns - told.offset_ns) > PLAUSIBLE_NS:
            return None
        self._offset_ns = offset_ns
        if told is not None and told.origin is ClockOrigin.RTCP_SR and abs(told.offset_ns - offset_ns) < DRIFT_NS:
            return None
        self._told = CaptureClock(ClockOrigin.RTCP_SR, SENDER_REPORT_UNCERTAINTY_MS, offset_ns)
        return self._told

    def jumped(self) -> None:
        """See ``Capture``."""
        self._offset_ns = self._unconfirmed_ns = self._told = None

    def clock(self, pts_ns: int, arrival_ns: int) -> CaptureClock:
        """See ``Capture``."""
        self._told = _by_arrival(self._clock, pts_ns, arrival_ns, self._uncertainty_ms)
        if self._offset_ns is not None and abs(self._offset_ns - self._told.offset_ns) <= PLAUSIBLE_NS:
            self._told = CaptureClock(ClockOrigin.RTCP_SR, SENDER_REPORT_UNCERTAINTY_MS, self._offset_ns)
        return self._told

    def identity(self, epoch: int, origin_ns: int, clock: CaptureClock) -> str:
        """Capture time of the epoch's start in µs since 1970; for a recording, what is the same at every replay."""
        if self._fingerprint is not None:
            return recording_identity(self._fingerprint, origin_ns, epoch)
        return str((origin_ns + clock.offset_ns) // 1000)


@dataclass(frozen=True, slots=True)
class RecordingCapture:
    """A recording read as fast as possible: by its creation time where it has one."""

    source_clock: Clock
    fingerprint: str
    """Names the recording's content."""
    created_ns: int | None = None
    """UTC of media time zero, from the file's tag."""

    @property
    def live(self) -> bool:
        """See ``Capture``."""
        return False

    def clock(self, pts_ns: int, arrival_ns: int) -> CaptureClock:
        """See ``Capture``."""
        if self.created_ns is not None:
            return CaptureClock(ClockOrigin.PTS, FILE_TAG_UNCERTAINTY_MS, self.created_ns)
        return _by_arrival(self.source_clock, pts_ns, arrival_ns, ARRIVAL_UNCERTAINTY_MS)

    def identity(self, epoch: int, origin_ns: int, clock: CaptureClock) -> str:
        """The same at every replay: content, start and number of the epoch."""
        return recording_identity(self.fingerprint, origin_ns, epoch)

    def jumped(self) -> None:
        """See ``Capture``; the tag speaks of the file's start, whatever its timestamps do."""

    def sender_report(self, offset_ns: int) -> CaptureClock | None:
        """See ``Capture``; recordings have none."""
        return None


def recording_identity(fingerprint: str, origin_ns: int, epoch: int) -> str:
    """Name of a stretch of a recording: its content, and where the stretch starts."""
    return f"rec:{fingerprint}:{origin_ns}:{epoch}"


def _by_arrival(clock: Clock, pts_ns: int, arrival_ns: int, uncertainty_ms: float) -> CaptureClock:
    wall_at_arrival_ns = clock.wall_ns() - (clock.monotonic_ns() - arrival_ns)
    return CaptureClock(ClockOrigin.ARRIVAL, uncertainty_ms, wall_at_arrival_ns - pts_ns)


def creation_time_ns(tag: str | None) -> int | None:
    """UTC in ns of a container's ``creation_time`` tag; ``None`` when absent, unreadable or plainly unset."""
    if not tag:
        return None
    try:
        when = datetime.fromisoformat(tag)
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    # Muxers without a clock write 1904 or 1970.
    if when.year < 1980:
        return None
    return int(when.timestamp()) * NS_PER_S + when.microsecond * 1000
