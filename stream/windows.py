"""Sliding windows over a source's media timeline. Sans-I/O: media items and ``now`` in, windows out.

The rules are those of the media timeline, never of arrival: a window is half-open ``[start, end)``,
starts at ``origin + index x hop``, takes for each sample time the newest frame with pts at or before it
(unless that is too old, see ``sampling.max_age_ns``), and its audio by sample index. It closes when video
and audio have both passed its end. The late modality is given a grace: in media time, so that a recording
gives the same windows at any speed, and for a live source in arrival time too, so that a stalled track
cannot hold windows back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.manifest import NS_PER_S, Branch
from stream.accounting import Ledger
from stream.tracks import AudioTrack, FrameTrack
from stream.types import (
    AudioChunk,
    CaptureClock,
    ClipWindow,
    ClockUpdate,
    Elapsed,
    EpochEnd,
    EpochStart,
    Frame,
    MediaItem,
    Progress,
    TextItem,
    WindowKey,
)

QUIET_NS = 5 * NS_PER_S
"""A track that is this far behind has fallen silent: windows do not wait for it until it speaks again."""
TEXTS_KEPT = 256
"""More texts than any window holds; a source that sends more loses the oldest."""
RECORDING_GRACE_NS = 5 * NS_PER_S
"""Media time a recording's late modality is given at least: files interleave coarsely, and nobody waits."""


@dataclass(frozen=True, slots=True)
class Grace:
    """How long a window waits for the late modality."""

    media_ns: int
    """In media time."""
    arrival_ns: int | None
    """In arrival time; ``None`` for recordings, whose windows must not depend on the machine's speed."""


class WindowCutter:
    """Cuts the windows of one branch out of one epoch of one source."""

    def __init__(self, pack: str, branch: Branch, epoch: EpochStart, grace: Grace, ledger: Ledger) -> None:
        self._pack = pack
        self._branch = branch
        self._epoch = epoch
        self._grace = grace
        self._index = 0
        self._any_closed = False
        self._passed_at_ns: int | None = None
        self._arrival_ns = epoch.arrival_ns
        self.clock: CaptureClock = epoch.clock
        self.frames: FrameTrack | None = None
        self.audio: AudioTrack | None = None
        if branch.video is not None:
            self.frames = FrameTrack(branch.video, epoch, ledger.hop(epoch.source_id, "window_frames"))
        if branch.audio is not None:
            # A window may wait `grace` beyond its end; pieces of at most one hop are written at a time.
            capacity_ns = branch.window_ns + 2 * branch.hop_ns + grace.media_ns + NS_PER_S
            hop = ledger.hop(epoch.source_id, "window_audio_samples")
            self.audio = AudioTrack(branch.audio.sample_rate, epoch, capacity_ns, hop)
        self._texts: list[TextItem] = []
        self._text_hop = ledger.hop(epoch.source_id, "window_texts")
        self._wants_video = branch.video is not None and epoch.has_video
        self._wants_audio = branch.audio is not None and epoch.has_audio

    @property
    def idle(self) -> bool:
        """Whether this epoch has nothing that the branch looks at."""
        return not (self._wants_video or self._wants_audio)

    @property
    def _start_ns(self) -> int:
        return self._epoch.origin_ns + self._index * self._branch.hop_ns

    @property
    def _end_ns(self) -> int:
        return self._start_ns + self._branch.window_ns

    def push(self, item: Frame | AudioChunk | Progress, now_ns: int) -> list[ClipWindow]:
        """Take media; return the windows that it closes."""
        self._arrival_ns = item.arrival_ns
        match item:
            case AudioChunk():
                if self.audio is None or not self._wants_audio:
                    return []
                return self._push_audio(self.audio, item, now_ns)
            case Frame():
                if self.frames is None:
                    return []
                height, width, _ = item.image.shape
                if (width, height) == (self.frames.video.width, self.frames.video.height):
                    self.frames.add(item)
            case Progress():
                if self.frames is not None:
                    self.frames.watermark_ns = max(self.frames.watermark_ns, item.pts_ns)
        return self.poll(now_ns)

    def push_text(self, item: TextItem) -> None:
        """Keep a text for every window that it falls into; one whose windows are closed comes too late."""
        self._text_hop.entered += 1
        if self.idle or max(item.end_ns, item.pts_ns + 1) <= self._start_ns:
            self._text_hop.drop("late")
            return
        if len(self._texts) >= TEXTS_KEPT:
            del self._texts[0]
            self._text_hop.drop("overflow")
        self._texts.append(item)

    def _texts_until(self, end_ns: int) -> tuple[str, ...]:
        """Those of the window that ends then, in the order of their times."""
        return tuple(item.text for item in sorted(self._texts, key=lambda item: item.pts_ns) if item.pts_ns < end_ns)

    def _forget_texts(self, before_ns: int | None = None) -> None:
        kept = (
            [] if before_ns is None else [item for item in self._texts if max(item.end_ns, item.pts_ns + 1) > before_ns]
        )
        self._text_hop.left += len(self._texts) - len(kept)
        self._texts = kept

    def _push_audio(self, track: AudioTrack, chunk: AudioChunk, now_ns: int) -> list[ClipWindow]:
        """Write a chunk piece by piece, closing windows in between, so that one of any length fits the buffer."""
        if chunk.sample_rate != track.sample_rate:
            raise ValueError(f"audio at {chunk.sample_rate} Hz where the branch takes {track.sample_rate} Hz")
        closed: list[ClipWindow] = []
        index = track.place(chunk.pts_ns)
        piece = max(1, self._branch.hop_ns * track.sample_rate // NS_PER_S)
        for offset in range(0, len(chunk.samples), piece):
            at_ns = self._epoch.origin_ns + (index + offset) * NS_PER_S // track.sample_rate
            closed += self._close_while_behind(at_ns, now_ns)
            track.write(index + offset, chunk.samples[offset : offset + piece])
            closed += self.poll(now_ns)
        return closed

    def _close_while_behind(self, leader_ns: int, now_ns: int) -> list[ClipWindow]:
        closed = []
        while leader_ns >= self._end_ns + self._grace.media_ns:
            closed.append(self._close(now_ns))
        return closed

    def poll(self, now_ns: int) -> list[ClipWindow]:
        """Windows that can close by ``now_ns``."""
        if self.idle:
            return []
        closed = []
        while self._may_close(now_ns):
            closed.append(self._close(now_ns))
        return closed

    def _watermarks(self) -> list[int]:
        marks = []
        if self._wants_video and self.frames is not None:
            marks.append(self.frames.watermark_ns)
        if self._wants_audio and self.audio is not None:
            marks.append(self.audio.watermark_ns)
        return marks

    def _may_close(self, now_ns: int) -> bool:
        marks = self._watermarks()
        leader_ns, laggard_ns = max(marks), min(marks)
        if leader_ns < self._end_ns:
            return False
        if self._passed_at_ns is None:
            self._passed_at_ns = now_ns
        if laggard_ns >= self._end_ns or leader_ns >= self._end_ns + self._grace.media_ns:
            return True
        if leader_ns - laggard_ns >= QUIET_NS:
            return True
        deadline_ns = self.deadline_ns
        return deadline_ns is not None and now_ns >= deadline_ns

    @property
    def deadline_ns(self) -> int | None:
        """When ``poll`` should be called if nothing more arrives; ``None`` when there is nothing to wait for."""
        if self._passed_at_ns is None or self._grace.arrival_ns is None:
            return None
        return self._passed_at_ns + self._grace.arrival_ns

    def finish(self, now_ns: int) -> list[ClipWindow]:
        """The epoch is over: close what is complete, and a clip shorter than one window if half of it is there."""
        closed: list[ClipWindow] = []
        if not self.idle:
            media_end_ns = max(self._watermarks())
            if self._wants_video and self.frames is not None:
                # The last frame is on show for one interval.
                media_end_ns = max(media_end_ns, self.frames.watermark_ns + self._epoch.frame_interval_ns)
            while self._end_ns <= media_end_ns:
                closed.append(self._close(now_ns))
            if not self._any_closed and media_end_ns - self._start_ns >= self._branch.window_ns // 2:
                closed.append(self._close(now_ns))
        if self.frames is not None:
            self.frames.clear()
        self._forget_texts()
        return closed

    def _close(self, now_ns: int) -> ClipWindow:
        start_ns, end_ns = self._start_ns, self._end_ns
        sample_ns, rows = self._sample(start_ns)
        audio, coverage = None, 0.0
        if self.audio is not None and self._branch.audio is not None:
            audio, coverage = self.audio.cut(start_ns, self._branch.audio.samples_in(self._branch.window_ns))
        lookbacks = len(rows[0]) if rows else 1
        pts = [-1 if frame is None else frame.pts_ns for row in rows for frame in row]
        window = ClipWindow(
            key=WindowKey(self._epoch.source_id, self._epoch.epoch, self._pack, self._branch.name, self._index),
            start_ns=start_ns,
            end_ns=end_ns,
            sample_ns=sample_ns,
            frame_pts_ns=np.array(pts, np.int64).reshape(len(rows), lookbacks),
            frames=tuple(frame for row in rows for frame in row),
            audio=audio,
            audio_coverage=coverage,
            missing_frames=sum(1 for row in rows if row[-1] is None),
            text=self._texts_until(end_ns),
            clock=self.clock,
            arrival_ns=self._arrival_ns,
            closed_ns=now_ns,
            waited_ns=0 if self._passed_at_ns is None else now_ns - self._passed_at_ns,
        )
        self._advance()
        return window

    def _sample(self, start_ns: int) -> tuple[NDArray[np.int64], list[tuple[Frame | None, ...]]]:
        if self.frames is None:
            return np.zeros(0, np.int64), []
        video = self.frames.video
        first = video.samples_in(start_ns - self._epoch.origin_ns)
        numbers = range(first, first + video.samples_in(self._branch.window_ns))
        times = [self._epoch.origin_ns + video.sample_time_ns(n) for n in numbers]
        return np.array(times, np.int64), [self.frames.pick(time_ns) for time_ns in times]

    def _advance(self) -> None:
        self._index += 1
        self._any_closed = True
        self._passed_at_ns = None
        self._forget_texts(self._start_ns)
        if self.frames is not None:
            self.frames.forget_before(self._start_ns)
        if self.audio is not None:
            self.audio.forget_before(self._start_ns)


@dataclass(frozen=True, slots=True)
class Watch:
    """One branch of one pack, to be cut for a source."""

    pack: str
    branch: Branch


class SourceWindows:
    """Cuts all windows of one source, epoch after epoch; no window crosses an epoch."""

    def __init__(self, watches: Sequence[Watch], grace: Grace, ledger: Ledger) -> None:
        self._watches = tuple(watches)
        self._grace = grace
        self._ledger = ledger
        self._cutters: list[WindowCutter] = []

    def push(self, item: MediaItem, now_ns: int) -> list[ClipWindow]:
        """Take one item from the source; return the windows that it closes, oldest end first."""
        closed: list[ClipWindow] = []
        match item:
            case EpochStart():
                closed = self._finish(now_ns)
                grace = self._grace if item.live else Grace(max(self._grace.media_ns, RECORDING_GRACE_NS), None)
                self._cutters = [
                    WindowCutter(watch.pack, watch.branch, item, grace, self._ledger) for watch in self._watches
                ]
            case EpochEnd():
                closed = self._finish(now_ns)
            case ClockUpdate():
                for cutter in self._cutters:
                    cutter.clock = item.clock
            case Elapsed():
                while (due_ns := self.deadline_ns) is not None and due_ns < item.arrival_ns:
                    closed += self.poll(due_ns)
                closed += self.poll(item.arrival_ns)
            case TextItem():
                for cutter in self._cutters:
                    cutter.push_text(item)
            case _:
                for cutter in self._cutters:
                    closed += cutter.push(item, now_ns)
        return sorted(closed, key=lambda window: window.end_ns)

    def poll(self, now_ns: int) -> list[ClipWindow]:
        """Windows whose grace is over by ``now_ns``."""
        return [window for cutter in self._cutters for window in cutter.poll(now_ns)]

    @property
    def deadline_ns(self) -> int | None:
        """When to call ``poll`` if nothing more arrives."""
        return min((d for cutter in self._cutters if (d := cutter.deadline_ns) is not None), default=None)

    def _finish(self, now_ns: int) -> list[ClipWindow]:
        closed = [window for cutter in self._cutters for window in cutter.finish(now_ns)]
        self._cutters = []
        return closed
