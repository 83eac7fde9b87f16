"""Which media belongs to one unbroken timeline. Sans-I/O: integer nanoseconds in, verdicts out.

Video drives: a frame that leaves the timeline (backwards, or far forwards) starts a new epoch. Audio beside
video never does; audio that fits neither where video is nor where audio was is held until video follows it,
because after a jump the two streams do not change over at the same packet.
"""

from __future__ import annotations

from enum import Enum
from fractions import Fraction

from stream.clock import NS_PER_S

JUMP_NS = 5 * NS_PER_S
"""A step forward of more than this is a jump, not a pause."""
BACKSTEP_NS = NS_PER_S // 2
"""A step back of less than this is a corrected or shuffled timestamp: what is not newer is left out."""
WRAPS_NS = tuple((1 << bits) * NS_PER_S // 90_000 for bits in (32, 33))
"""Where 90 kHz timestamps of RTP (32 bits) and MPEG-TS (33 bits) start again."""


def to_ns(ticks: int, time_base: Fraction) -> int:
    """Nanoseconds (rounded down) of a time in units of ``time_base`` seconds, by integer maths."""
    return ticks * time_base.numerator * NS_PER_S // time_base.denominator


class Step(Enum):
    """What a time stamp means for the epoch."""

    FOLLOWS = "follows"
    """Belongs to the running epoch."""
    LATE = "late"
    """Lies a little before what was already there."""
    JUMP = "pts_jump"
    """Belongs to another timeline."""
    WRAP = "wrap"
    """Belongs to another timeline because the source's counter ran over."""


class Timeline:
    """Follows where video and audio are within one epoch.

    ``jump_ns`` is the widest pause that does not break the epoch. ``left_ns`` is where the previous epoch broke
    off, if by a jump: audio nearer to it than to this epoch is a straggler.
    """

    def __init__(self, jump_ns: int = JUMP_NS, left_ns: int | None = None) -> None:
        self.video_ns: int | None = None
        """pts of the newest frame."""
        self.audio_ns: int | None = None
        """End of the newest audio."""
        self._jump_ns = jump_ns
        self._left_ns = left_ns

    @property
    def position_ns(self) -> int | None:
        """The newest media of the epoch; ``None`` before any."""
        return max((at for at in (self.video_ns, self.audio_ns) if at is not None), default=None)

    def _near(self, at_ns: int, pts_ns: int) -> bool:
        return at_ns - BACKSTEP_NS <= pts_ns <= at_ns + self._jump_ns

    def see_video(self, pts_ns: int) -> Step:
        """Judge a frame, and move on to it if it follows."""
        last_ns = self.video_ns
        if last_ns is not None:
            if last_ns - BACKSTEP_NS <= pts_ns <= last_ns:
                return Step.LATE
            # Video may pause for long while audio goes on: that is no jump.
            with_audio = self.audio_ns is not None and pts_ns > last_ns and self._near(self.audio_ns, pts_ns)
            if not with_audio and not self._near(last_ns, pts_ns):
                return self._kind_of_jump(last_ns, pts_ns)
        self.video_ns = pts_ns
        return Step.FOLLOWS

    def see_audio(self, start_ns: int, end_ns: int) -> Step:
        """Judge a run of samples, and move on to its end if it follows."""
        if not self._audio_fits(start_ns):
            return self._kind_of_jump(self.position_ns or 0, start_ns)
        self.audio_ns = end_ns
        return Step.FOLLOWS

    def _audio_fits(self, start_ns: int) -> bool:
        if self.audio_ns is not None:
            if start_ns < self.audio_ns - BACKSTEP_NS:
                return False
            if start_ns <= self.audio_ns + self._jump_ns:
                return True
        if self.video_ns is None:
            return self.audio_ns is None
        distance_ns = abs(start_ns - self.video_ns)
        straggler = self._left_ns is not None and abs(start_ns - self._left_ns) < distance_ns
        return distance_ns <= self._jump_ns and not straggler

    def _kind_of_jump(self, from_ns: int, to_ns: int) -> Step:
        wrapped = any(abs(to_ns + period - from_ns) <= self._jump_ns for period in WRAPS_NS)
        return Step.WRAP if wrapped else Step.JUMP


class SampleCounter:
    """Exact times for a run of audio: samples are counted from an anchor, since containers round each pts.

    ``tolerance_ns`` is how far the container may disagree before the anchor is set again.
    """

    def __init__(self, sample_rate: int, tolerance_ns: int = 10_000_000) -> None:
        self._rate = sample_rate
        self._tolerance_ns = tolerance_ns
        self._anchor_ns: int | None = None
        self._count = 0

    @property
    def next_ns(self) -> int | None:
        """Time of the next sample; ``None`` before the first anchor."""
        if self._anchor_ns is None:
            return None
        return self._anchor_ns + self._count * NS_PER_S // self._rate

    def breaks(self, pts_ns: int | None) -> bool:
        """Whether ``pts_ns`` disagrees with the count, so that a new anchor is needed."""
        if pts_ns is None:
            return False
        expected_ns = self.next_ns
        return expected_ns is None or abs(pts_ns - expected_ns) > self._tolerance_ns

    def anchor(self, pts_ns: int) -> None:
        """Count from here."""
        self._anchor_ns, self._count = pts_ns, 0

    def take(self, count: int) -> int:
        """Count ``count`` samples on; returns the time of the first. Raises ``ValueError`` before an anchor."""
        start_ns = self.next_ns
        if start_ns is None:
            raise ValueError("samples counted before the first anchor")
        self._count += count
        return start_ns
