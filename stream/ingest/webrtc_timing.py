"""RTP timestamps of several tracks on one media timeline. Sans-I/O: packets' times in, media times out.

Each track counts in units of its own, from a number of its own. What ties two tracks together is the sender's clock,
which its RTCP sender reports tell for each (RFC 3550, 6.4.1); before both have reported, it is the time of arrival.
The picture leads: its times are fixed by its first packet, and sound is moved to where it belongs beside it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from stream.clock import NS_PER_S

REPORTS_NS = 20 * NS_PER_S
"""Over how long the earliest of the sender's reports counts. Some senders (aiortc is one) stamp a report with the time
at which a packet was sent, not at which it was captured: late by whatever kept them busy, never early."""
REPORTS_MOST = 64
"""Reports that are kept: a sender whose clock stands still must not fill the memory."""
REPORTS_LEAST = 4
"""Reports that count however old they are."""
CLOCK_SET_NS = NS_PER_S
"""Reports further apart than this: the sender's clock has been set."""
FASTEST_NS = 10 * NS_PER_S
"""Over how long the packet that came through fastest tells the offset of arrival; long enough to meet one that did not
queue, short enough for clocks that drift."""
ASTRAY_NS = 3600 * NS_PER_S
"""A track whose times have moved against arrival by more than this since it began: its sender counts from elsewhere."""
NTP_TO_UNIX_S = 2_208_988_800


def ntp_to_unix_ns(ntp: int) -> int:
    """UTC in ns since 1970 of a 64-bit NTP time: seconds since 1900 and their 32-bit fraction."""
    return ((ntp >> 32) - NTP_TO_UNIX_S) * NS_PER_S + ((ntp & 0xFFFFFFFF) * NS_PER_S >> 32)


class Unwrapped:
    """Continues a counter of ``bits`` bits beyond where it starts again."""

    def __init__(self, bits: int) -> None:
        self._size = 1 << bits
        self.newest: int | None = None
        """The highest seen."""

    def see(self, value: int) -> int:
        """The value whose low bits these are and that lies nearest to the newest."""
        full = self.peek(value)
        if self.newest is None or full > self.newest:
            self.newest = full
        return full

    def peek(self, value: int) -> int:
        """As ``see``, without moving on."""
        if self.newest is None:
            return value
        ahead = (value - self.newest) % self._size
        return self.newest + (ahead if ahead < self._size // 2 else ahead - self._size)


@dataclass(slots=True, eq=False)
class _Fastest:
    """The smallest value of the last one to two periods."""

    started_ns: int = 0
    current: int | None = None
    before: int | None = None

    def see(self, value: int, now_ns: int) -> int:
        if self.current is None or now_ns - self.started_ns >= FASTEST_NS:
            self.before, self.current, self.started_ns = self.current, value, now_ns
        self.current = min(self.current, value)
        return self.current if self.before is None else min(self.before, self.current)


class TrackClock:
    """The times of one track."""

    def __init__(self, rate: int) -> None:
        """``rate`` is that of the RTP timestamps, in Hz."""
        self.rate = rate
        """Hz."""
        self._ticks = Unwrapped(32)
        self._fastest = _Fastest()
        self._reported: deque[tuple[int, int]] = deque(maxlen=REPORTS_MOST)
        """UTC and offset of each report."""
        self.arrival_offset_ns: int | None = None
        """Monotonic time of arrival minus the track's own time, for a packet that came through fast."""
        self._first_offset_ns: int | None = None

    @property
    def wall_offset_ns(self) -> int | None:
        """Sender's UTC minus the track's own time; ``None`` before its first report."""
        return min((offset_ns for _, offset_ns in self._reported), default=None)

    @property
    def newest_ns(self) -> int:
        """The newest packet's time on the track's own timeline; 0 before any."""
        return self._own_ns(self._ticks.newest or 0)

    def packet(self, timestamp: int, arrival_ns: int) -> int:
        """A packet came; returns its time on the track's own timeline, in ns."""
        own_ns = self._own_ns(self._ticks.see(timestamp))
        if self._first_offset_ns is None:
            self._first_offset_ns = arrival_ns - own_ns
        self.arrival_offset_ns = self._fastest.see(arrival_ns - own_ns, arrival_ns)
        return own_ns

    def is_astray(self, timestamp: int, arrival_ns: int) -> bool:
        """Whether a packet's time has nothing to do with those before it."""
        if self._first_offset_ns is None:
            return False
        return abs(arrival_ns - self.own_ns(timestamp) - self._first_offset_ns) > ASTRAY_NS

    def own_ns(self, timestamp: int) -> int:
        """The track's own time of a timestamp, in ns."""
        return self._own_ns(self._ticks.peek(timestamp))

    def report(self, ntp: int, timestamp: int) -> None:
        """A sender report came: at that NTP time its clock stood at this timestamp. None counts before media.

        A sender without a clock reports 0 (RFC 3550, 6.4.1), which ties nothing together.
        """
        if self._ticks.newest is None or not ntp:
            return
        wall_ns = ntp_to_unix_ns(ntp)
        offset_ns, reported = wall_ns - self.own_ns(timestamp), self._reported
        if reported and abs(offset_ns - reported[-1][1]) > CLOCK_SET_NS:
            reported.clear()
        reported.append((wall_ns, offset_ns))
        while len(reported) > REPORTS_LEAST and wall_ns - reported[0][0] > REPORTS_NS:
            reported.popleft()

    def _own_ns(self, ticks: int) -> int:
        return ticks * NS_PER_S // self.rate


@dataclass(slots=True, eq=False)
class MediaClock:
    """Puts one video and one audio track on one timeline, which starts near 0 with the first packet."""

    video: TrackClock | None = None
    audio: TrackClock | None = None
    _zero_ns: int | None = field(default=None, init=False)
    """Arrival of media time 0."""
    _video_ns: int | None = field(default=None, init=False)
    """Media time minus the video track's own."""
    _audio_ns: int | None = field(default=None, init=False)

    def restart_video(self, rate: int) -> None:
        """Another sender's video begins."""
        self.video, self._video_ns = TrackClock(rate), None

    def restart_audio(self, rate: int) -> None:
        """Another sender's audio begins."""
        self.audio, self._audio_ns = TrackClock(rate), None

    def video_packet(self, timestamp: int, arrival_ns: int) -> None:
        """A packet of video came. One that is astray begins the track anew, where arrival has it."""
        assert self.video is not None
        if self.video.is_astray(timestamp, arrival_ns):
            self.restart_video(self.video.rate)
        self.video.packet(timestamp, arrival_ns)

    def audio_packet(self, timestamp: int, arrival_ns: int) -> None:
        """The same for sound."""
        assert self.audio is not None
        if self.audio.is_astray(timestamp, arrival_ns):
            self.restart_audio(self.audio.rate)
        self.audio.packet(timestamp, arrival_ns)

    def video_pts_ns(self, timestamp: int) -> int:
        """Media time of a picture, one of whose packets came."""
        assert self.video is not None
        if self._video_ns is None:
            self._video_ns = self._by_arrival_ns(self.video)
        return self.video.own_ns(timestamp) + self._video_ns

    def audio_pts_ns(self, timestamp: int) -> int:
        """Media time of a packet of sound that came."""
        assert self.audio is not None
        if self._video_ns is not None and self.video is not None:
            self._audio_ns = self._video_ns + self._apart_ns(self.video, self.audio)
        elif self._audio_ns is None:
            self._audio_ns = self._by_arrival_ns(self.audio)
        return self.audio.own_ns(timestamp) + self._audio_ns

    def wall_offset_ns(self) -> int | None:
        """Sender's UTC minus media time; ``None`` before its first report."""
        for track, offset_ns in ((self.video, self._video_ns), (self.audio, self._audio_ns)):
            if track is not None and offset_ns is not None and track.wall_offset_ns is not None:
                return track.wall_offset_ns - offset_ns
        return None

    def now_ns(self, arrival_ns: int) -> int | None:
        """Media time of what is captured as something else arrives; ``None`` before any media."""
        for track, offset_ns in ((self.video, self._video_ns), (self.audio, self._audio_ns)):
            if track is not None and offset_ns is not None and track.arrival_offset_ns is not None:
                return arrival_ns - track.arrival_offset_ns + offset_ns
        return None

    def _by_arrival_ns(self, track: TrackClock) -> int:
        assert track.arrival_offset_ns is not None
        if self._zero_ns is None:
            self._zero_ns = track.arrival_offset_ns + track.newest_ns
        return track.arrival_offset_ns - self._zero_ns

    @staticmethod
    def _apart_ns(video: TrackClock, audio: TrackClock) -> int:
        """How far the audio track's own time must be moved to be the video track's own."""
        if video.wall_offset_ns is not None and audio.wall_offset_ns is not None:
            return audio.wall_offset_ns - video.wall_offset_ns
        assert video.arrival_offset_ns is not None and audio.arrival_offset_ns is not None
        return audio.arrival_offset_ns - video.arrival_offset_ns
