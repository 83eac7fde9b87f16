"""Turns decoded pictures and samples into the items of ``stream.types``. Sans-I/O: no PyAV in here.

A frame is held until the next one arrives, because only then is known for which sample times it is the newest;
just the frames that some pack samples are rendered. An epoch opens with its first frame (with its first audio
where there is no video), so audio that is decoded earlier waits, for about a second of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from engines.manifest import VideoInput
from stream.clock import NS_PER_MS, NS_PER_S
from stream.ingest.audio import AudioHold, AudioJoiner, AudioRun, Samples
from stream.ingest.capture import Capture
from stream.ingest.stats import DecodeStats
from stream.ingest.timeline import JUMP_NS, Step, Timeline
from stream.sampling import FrameSelector, Size, distinct_inputs, first_sample_at_or_after
from stream.types import AudioChunk, ClockUpdate, Emit, EpochEnd, EpochStart, Frame, Progress, TextItem

P = TypeVar("P")
"""A decoded picture, before conversion."""
Shape = tuple[int, int, str]
"""Width, height and pixel format of decoded pictures."""

PROGRESS_NS = 100 * NS_PER_MS
"""Longest stretch of media without a ``Progress``."""
VIDEO_WAIT_NS = 10 * NS_PER_S
"""Audio alone for this long opens an epoch without video, though the source announced one."""


@dataclass(frozen=True, slots=True)
class Tracks:
    """What the source announces, as far as somebody wants it."""

    video: bool
    """Whether pictures will come."""
    sample_rate: int | None
    """Rate of the audio handed in; ``None`` when none will come."""
    frame_interval_ns: int = 0
    """Nominal; 0 when not announced: then the first two frames tell."""


@dataclass(frozen=True, slots=True, eq=False)
class _Held(Generic[P]):
    pts_ns: int
    arrival_ns: int
    picture: P


class Assembler(Generic[P]):
    """Emits ``EpochStart``, media, ``EpochEnd``, … for one run of one source.

    ``render(picture, width, height)`` gives a contiguous uint8 ``[height, width, 3]`` RGB array. Whatever
    ``emit`` and ``render`` raise passes through.
    """

    def __init__(
        self,
        source_id: str,
        inputs: tuple[VideoInput, ...],
        tracks: Tracks,
        capture: Capture,
        render: Callable[[P, int, int], NDArray[np.uint8]],
        emit: Emit,
        stats: DecodeStats,
        first_epoch: int = 0,
        first_reason: str = "start",
    ) -> None:
        self._source_id = source_id
        self._inputs = distinct_inputs(inputs)
        self._tracks = tracks
        self._capture = capture
        self._render = render
        self._emit = emit
        self._stats = stats
        self._epoch = first_epoch
        self._reason = first_reason
        self._selector: FrameSelector | None = None
        self._with_video = tracks.video
        self._shape: Shape | None = None
        self._held: _Held[P] | None = None
        self._seq = 0
        self._shown: set[Size] = set()
        """Sizes in which the held frame has been emitted already."""
        self._shown_ns = 0
        self._progress_due_ns = 0
        self._jump_ns = max(JUMP_NS, 3 * tracks.frame_interval_ns)
        self._timeline = Timeline(self._jump_ns)
        rate = tracks.sample_rate or 0
        # Joined runs keep the items few.
        self._joiner = AudioJoiner(rate, PROGRESS_NS)
        self._early = AudioHold(rate)

    @property
    def live(self) -> bool:
        """Whether media comes in its own time."""
        return self._capture.live

    @property
    def next_epoch(self) -> int:
        """Number of the epoch that would open next."""
        return self._epoch if self._selector is None else self._epoch + 1

    def video(self, pts_ns: int, arrival_ns: int, shape: Shape, picture: P) -> None:
        """Take the next picture in presentation order."""
        self._stats.frames_decoded += 1
        if shape != self._shape:
            self._change_shape(shape, arrival_ns)
            # Only now: what was held of another size has been rendered.
            self._stats.picture_size = shape[:2]
        step = self._timeline.see_video(pts_ns)
        if step is Step.LATE:
            self._stats.frames_late += 1
            return
        if step is not Step.FOLLOWS:
            self._break(step.value, arrival_ns)
            self._timeline.see_video(pts_ns)
        held, self._held = self._held, _Held(pts_ns, arrival_ns, picture)
        if self._selector is None:
            if held is None and not self._tracks.frame_interval_ns:
                return
            first = held or self._held
            interval_ns = self._tracks.frame_interval_ns or pts_ns - first.pts_ns
            self._open(first.pts_ns, first.arrival_ns, interval_ns, video=True)
        if held is not None:
            self._settle(held, pts_ns)
        if pts_ns >= self._progress_due_ns:
            self._progress(pts_ns, arrival_ns)

    def passed(self, until_ns: int, arrival_ns: int) -> None:
        """No picture before ``until_ns`` comes any more: what there is between is left undecoded."""
        held = self._held
        if self._selector is None or held is None or until_ns <= held.pts_ns or until_ns < self._progress_due_ns:
            return
        self._show(held, until_ns)
        self._progress(until_ns, arrival_ns)

    def audio(self, pts_ns: int, arrival_ns: int, samples: Samples) -> None:
        """Take the next samples."""
        if not len(samples):
            return
        run = AudioRun(pts_ns, arrival_ns, samples)
        if self._selector is None:
            if self._tracks.video:
                self._hold(run)
                if pts_ns - (self._early.since_ns or 0) >= VIDEO_WAIT_NS:
                    self._open_without_video()
                return
            self._open(pts_ns, arrival_ns, 0, video=False)
        self._place(run)

    def text(self, pts_ns: int, end_ns: int, arrival_ns: int, text: str) -> bool:
        """Take a text of ``[pts_ns, end_ns)``, or of an instant; tells whether there is an epoch that it can be of."""
        if self._selector is None:
            return False
        # What was said before the first picture belongs to it.
        start_ns = max(pts_ns, self._selector.origin_ns)
        self._emit(TextItem(self._source_id, self._epoch, start_ns, max(end_ns, start_ns), arrival_ns, text))
        return True

    def hand_over_audio(self) -> None:
        """Emit the audio that is still being joined: no more is at hand, and a live window must not wait for it."""
        self._emit_audio(self._joiner.flush())

    def audio_due_ns(self, after_ns: int) -> int:
        """Media time up to which audio may be gathered without keeping a window waiting: the next sample time."""
        if self._selector is None or not self._with_video:
            return after_ns
        return self._next_sample_ns(after_ns)

    def sender_report(self, offset_ns: int) -> None:
        """Take a mapping of media time to UTC that the sender reported: ``UTC = pts + offset_ns``."""
        clock = self._capture.sender_report(offset_ns)
        if clock is not None and self._selector is not None:
            self._emit(ClockUpdate(self._source_id, self._epoch, clock))

    def end(self, reason: str, arrival_ns: int) -> None:
        """No more media will come: flush what is held and end the epoch."""
        if self._selector is None and self._held is None and self._early.runs:
            self._open_without_video()
        self._close(reason, arrival_ns)
        self._stats.audio_samples_dropped += sum(len(run.samples) for run in self._early.take())

    def _change_shape(self, shape: Shape, arrival_ns: int) -> None:
        before, self._shape = self._shape, shape
        if before is not None:
            self._break("resolution" if before[:2] != shape[:2] else "codec", arrival_ns)
        elif self._selector is not None:
            # Video came so late that audio went ahead without it.
            self._break("codec", arrival_ns)

    def _break(self, reason: str, arrival_ns: int) -> None:
        self._stats.resyncs += 1
        left_ns = self._timeline.position_ns
        self._close(reason, arrival_ns)
        jumped = reason in (Step.JUMP.value, Step.WRAP.value)
        if jumped:
            self._capture.jumped()
        self._timeline = Timeline(self._jump_ns, left_ns if jumped else None)
        self._reason = reason

    def _open(self, origin_ns: int, arrival_ns: int, interval_ns: int, *, video: bool) -> None:
        clock = self._capture.clock(origin_ns, arrival_ns)
        self._selector = FrameSelector(self._inputs, origin_ns, interval_ns)
        self._with_video = video
        self._seq = 0
        self._emit(
            EpochStart(
                source_id=self._source_id,
                epoch=self._epoch,
                identity=self._capture.identity(self._epoch, origin_ns, clock),
                origin_ns=origin_ns,
                has_video=video,
                has_audio=self._tracks.sample_rate is not None,
                frame_interval_ns=interval_ns,
                clock=clock,
                live=self._capture.live,
                arrival_ns=arrival_ns,
                reason=self._reason,
            )
        )
        self._shown_ns = origin_ns - 1
        self._progress_due_ns = origin_ns + 1
        for run in self._early.take():
            self._place(run)

    def _open_without_video(self) -> None:
        """No second frame came, or not even a first."""
        if self._held is not None:
            self._open(self._held.pts_ns, self._held.arrival_ns, 0, video=True)
            return
        first = self._early.runs[0]
        self._open(first.pts_ns, first.arrival_ns, 0, video=False)

    def _close(self, reason: str, arrival_ns: int) -> None:
        held, self._held = self._held, None
        if held is not None:
            if self._selector is None:
                self._open(held.pts_ns, held.arrival_ns, self._tracks.frame_interval_ns, video=True)
            self._settle(held, None)
            if held.pts_ns > self._shown_ns:
                self._progress(held.pts_ns, held.arrival_ns)
        if self._selector is None:
            return
        self._emit_audio(self._joiner.flush())
        self._emit(EpochEnd(self._source_id, self._epoch, reason, arrival_ns))
        self._selector = None
        self._epoch += 1

    def _settle(self, held: _Held[P], next_pts_ns: int | None) -> None:
        """Emit a frame in every size wanted, now that it is known how long it is on show."""
        self._show(held, next_pts_ns)
        self._seq += 1
        self._stats.frames_sampled += bool(self._shown)
        self._stats.frames_skipped += not self._shown
        self._shown = set()

    def _show(self, held: _Held[P], until_ns: int | None) -> None:
        """Emit the held frame in the sizes wanted of it up to then, each once."""
        assert self._selector is not None
        sizes = self._selector.sizes(held.pts_ns, until_ns) - self._shown
        if sizes:
            self._progress_due_ns = held.pts_ns
        for width, height in sizes:
            self._shown.add((width, height))
            image = self._render(held.picture, width, height)
            self._stats.frames_emitted += 1
            self._emit(Frame(self._source_id, self._epoch, self._seq, held.pts_ns, held.arrival_ns, image))

    def _progress(self, pts_ns: int, arrival_ns: int) -> None:
        """Tell how far video is, and choose when to tell again: at the next sample time, where windows close."""
        self._progress_due_ns = self._next_sample_ns(pts_ns)
        self._shown_ns = pts_ns
        self._emit(Progress(self._source_id, self._epoch, pts_ns, arrival_ns))

    def _next_sample_ns(self, after_ns: int) -> int:
        """The first sample time after this one, but at most ``PROGRESS_NS`` later."""
        assert self._selector is not None
        origin_ns = self._selector.origin_ns
        due_ns = after_ns + PROGRESS_NS
        for video in self._inputs:
            sample = first_sample_at_or_after(video, after_ns + 1 - origin_ns)
            due_ns = min(due_ns, origin_ns + video.sample_time_ns(sample))
        return due_ns

    def _place(self, run: AudioRun) -> None:
        assert self._tracks.sample_rate is not None
        step = self._timeline.see_audio(run.pts_ns, run.end_ns(self._tracks.sample_rate))
        if step is not Step.FOLLOWS:
            if self._with_video:
                self._hold(run)
                return
            self._break(step.value, run.arrival_ns)
            self._open(run.pts_ns, run.arrival_ns, 0, video=False)
            self._timeline.see_audio(run.pts_ns, run.end_ns(self._tracks.sample_rate))
        self._emit_audio(self._joiner.add(run))

    def _hold(self, run: AudioRun) -> None:
        self._stats.audio_samples_dropped += self._early.add(run)

    def _emit_audio(self, runs: list[AudioRun]) -> None:
        rate = self._tracks.sample_rate
        assert rate is not None or not runs
        for run in runs:
            self._stats.audio_samples += len(run.samples)
            self._emit(AudioChunk(self._source_id, self._epoch, run.pts_ns, run.arrival_ns, rate or 0, run.samples))
