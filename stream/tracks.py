"""What a source's open windows may still need: frames by pts, audio samples by index. Sans-I/O."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

from engines.manifest import NS_PER_S, VideoInput
from stream.accounting import Hop
from stream.sampling import max_age_ns
from stream.types import EpochStart, Frame

SNAP_NS = 5_000_000
"""Audio whose pts is this close to where the last chunk ended follows it without a seam: containers round pts."""


class FrameTrack:
    """The frames of one size that open windows may still need, ordered by pts."""

    def __init__(self, video: VideoInput, epoch: EpochStart, hop: Hop) -> None:
        self.video = video
        self.watermark_ns = epoch.origin_ns - 1
        self._max_age_ns = max_age_ns(video, epoch.frame_interval_ns)
        self._frames: list[Frame] = []
        self._pts: list[int] = []
        self._used: set[int] = set()
        self._horizon_ns = epoch.origin_ns - self._reach_ns
        self._hop = hop

    @property
    def _reach_ns(self) -> int:
        """How far before a window's start its oldest frame may lie."""
        return self._max_age_ns + (self.video.lookback_ns or 0)

    def add(self, frame: Frame) -> None:
        """Keep a frame, wherever it belongs by pts; one that no open window can use is dropped and counted."""
        self._hop.entered += 1
        self.watermark_ns = max(self.watermark_ns, frame.pts_ns)
        at = bisect_right(self._pts, frame.pts_ns)
        if frame.pts_ns < self._horizon_ns:
            self._hop.drop("late")
        elif at and self._pts[at - 1] == frame.pts_ns:
            self._hop.drop("duplicate")
        else:
            self._frames.insert(at, frame)
            self._pts.insert(at, frame.pts_ns)

    def pick(self, sample_ns: int) -> tuple[Frame | None, ...]:
        """Frame (with look-back: earlier frame, frame) for a sample time; ``None`` where missing.

        Where only the earlier one is missing (the stream has just begun) the frame stands in for it: no motion.
        """
        current = self._newest(sample_ns)
        if self.video.lookback_ns is None:
            return (current,)
        if current is None:
            return (None, None)
        return (self._newest(sample_ns - self.video.lookback_ns) or current, current)

    def _newest(self, time_ns: int) -> Frame | None:
        at = bisect_right(self._pts, time_ns) - 1
        if at < 0 or time_ns - self._pts[at] > self._max_age_ns:
            return None
        self._used.add(self._pts[at])
        return self._frames[at]

    def forget_before(self, start_ns: int) -> None:
        """Let go of frames that no window from ``start_ns`` on can use."""
        self._horizon_ns = start_ns - self._reach_ns
        self._release(bisect_right(self._pts, self._horizon_ns - 1))

    def clear(self) -> None:
        """Let go of everything."""
        self._release(len(self._pts))

    def _release(self, count: int) -> None:
        used = sum(1 for pts in self._pts[:count] if pts in self._used)
        self._used.difference_update(self._pts[:count])
        self._hop.left += used
        self._hop.drop("unsampled", count - used)
        del self._frames[:count], self._pts[:count]


class AudioTrack:
    """The samples that open windows may still need, by sample index from the epoch's origin."""

    def __init__(self, sample_rate: int, epoch: EpochStart, capacity_ns: int, hop: Hop) -> None:
        self.sample_rate = sample_rate
        self._origin_ns = epoch.origin_ns
        self._samples = np.zeros(capacity_ns * sample_rate // NS_PER_S, np.float32)
        self._covered = np.zeros(len(self._samples), np.bool_)
        self._base = 0
        self._next = 0
        self._started = False
        self._hop = hop

    @property
    def watermark_ns(self) -> int:
        """End of the newest audio."""
        return self._origin_ns + self._next * NS_PER_S // self.sample_rate if self._started else self._origin_ns - 1

    def index_at(self, time_ns: int) -> int:
        """Nearest sample index of a media time."""
        return (2 * (time_ns - self._origin_ns) * self.sample_rate + NS_PER_S) // (2 * NS_PER_S)

    def place(self, pts_ns: int) -> int:
        """Index where a chunk goes: right after the last one when its pts agrees within ``SNAP_NS``."""
        index = self.index_at(pts_ns)
        tolerance = SNAP_NS * self.sample_rate // NS_PER_S
        return self._next if self._started and abs(index - self._next) <= tolerance else index

    def write(self, index: int, samples: NDArray[np.float32]) -> None:
        """Put samples at an index; what was there first stays, what no open window can use is dropped."""
        self._hop.entered += len(samples)
        self._started = True
        self._next = max(self._next, index + len(samples))
        first = max(index, self._base)
        last = min(index + len(samples), self._base + len(self._samples))
        if first >= last:
            self._hop.drop("outside", len(samples))
            return
        span = slice(first - self._base, last - self._base)
        free = ~self._covered[span]
        taken = int(np.count_nonzero(free))
        self._samples[span][free] = samples[first - index : last - index][free]
        self._covered[span] = True
        self._hop.left += taken
        self._hop.drop("outside", len(samples) - (last - first))
        self._hop.drop("duplicate", (last - first) - taken)

    def cut(self, start_ns: int, count: int) -> tuple[NDArray[np.float32], float]:
        """``count`` samples from ``start_ns`` (zeros where nothing came) and the covered share."""
        first = self.index_at(start_ns) - self._base
        covered = self._covered[first : first + count]
        return self._samples[first : first + count].copy(), float(np.count_nonzero(covered)) / count

    def forget_before(self, start_ns: int) -> None:
        """Move the buffer on, so that it begins at ``start_ns``."""
        shift = self.index_at(start_ns) - self._base
        if shift <= 0:
            return
        keep = max(0, len(self._samples) - shift)
        for buffer in (self._samples, self._covered):
            buffer[:keep] = buffer[len(buffer) - keep :]
            buffer[keep:] = 0
        self._base += shift
