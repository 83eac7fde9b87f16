"""Which frames are looked at: sample times on the media timeline, and the frames they fall on.

Decoding and windowing share these rules, so that a frame is scaled only when some window will ask for it.
Pure functions of pts: the same recording gives the same samples however it arrives.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engines.manifest import NS_PER_S, VideoInput

Size = tuple[int, int]
"""Width and height in pixels."""


def first_sample_at_or_after(video: VideoInput, offset_ns: int) -> int:
    """Number of the first sample whose time, counted from the grid's origin, is at least ``offset_ns``."""
    # floor(y) >= x holds exactly when y >= x for an integer x, so the floor in sample_time_ns needs no care.
    return max(0, -(-offset_ns * video.fps.numerator // (NS_PER_S * video.fps.denominator)))


def max_age_ns(video: VideoInput, frame_interval_ns: int) -> int:
    """Age over which a frame is too old to stand for a sample: the larger of one sampling period and
    1.5 times the source's own frame interval."""
    return max(video.sample_time_ns(1), frame_interval_ns * 3 // 2)


@dataclass(frozen=True, slots=True)
class FrameSelector:
    """Decides which decoded frames of one epoch are converted, and to which sizes."""

    inputs: tuple[VideoInput, ...]
    """Video inputs of every branch that watches the source."""
    origin_ns: int
    """Origin of the sampling grids (``EpochStart.origin_ns``)."""
    frame_interval_ns: int
    """``EpochStart.frame_interval_ns``."""

    def sizes(self, pts_ns: int, next_pts_ns: int | None) -> frozenset[Size]:
        """Sizes wanted of the frame that is on show in ``[pts_ns, next_pts_ns)``.

        ``next_pts_ns`` is ``None`` for the last frame of an epoch.
        """
        return frozenset(
            (video.width, video.height) for video in self.inputs if self._is_sampled(video, pts_ns, next_pts_ns)
        )

    def _is_sampled(self, video: VideoInput, pts_ns: int, next_pts_ns: int | None) -> bool:
        if next_pts_ns is None:
            next_pts_ns = pts_ns + max_age_ns(video, self.frame_interval_ns)
        shown_from, shown_until = pts_ns - self.origin_ns, next_pts_ns - self.origin_ns
        for lookback_ns in (0, video.lookback_ns):
            if lookback_ns is None:
                continue
            n = first_sample_at_or_after(video, shown_from + lookback_ns)
            if video.sample_time_ns(n) - lookback_ns < shown_until:
                return True
        return False


def distinct_inputs(inputs: Iterable[VideoInput]) -> tuple[VideoInput, ...]:
    """The inputs without repeats, in their first order."""
    return tuple(dict.fromkeys(inputs))
