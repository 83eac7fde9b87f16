from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engines.manifest import VideoInput
from stream.clock import ManualClock
from stream.ingest.assemble import VIDEO_WAIT_NS, Assembler, Tracks
from stream.ingest.capture import Capture, LiveCapture, RecordingCapture
from stream.ingest.stats import DecodeStats
from stream.sampling import FrameSelector
from stream.types import AudioChunk, ClockOrigin, ClockUpdate, EpochEnd, EpochStart, Frame, MediaItem, Progress
from tests.stream.ingest.media import check_grammar

MS = 1_000_000
NS_PER_S = 1_000_000_000
RATE = 16_000
SHAPE = (64, 48, "yuv420p")
SLOW = (VideoInput(width=16, height=8, fps=Fraction(4), lookback_ns=60 * MS), VideoInput(width=8, height=8, fps=1))


@dataclass
class Bench:
    """An assembler whose pictures are their own pts."""

    inputs: tuple[VideoInput, ...] = SLOW
    tracks: Tracks = field(default_factory=lambda: Tracks(True, RATE, 40 * MS))
    live: bool = False
    items: list[MediaItem] = field(default_factory=list)
    stats: DecodeStats = field(default_factory=DecodeStats)

    def __post_init__(self) -> None:
        clock = ManualClock()
        capture: Capture = LiveCapture(clock) if self.live else RecordingCapture(clock, "f")
        self.assembler = Assembler(
            "cam", self.inputs, self.tracks, capture, self._render, self.items.append, self.stats
        )

    @staticmethod
    def _render(picture: int, width: int, height: int) -> NDArray[np.uint8]:
        return np.full((height, width, 3), picture // (40 * MS) % 256, np.uint8)

    def video(self, *pts_ns: int) -> None:
        for pts in pts_ns:
            self.assembler.video(pts, pts, SHAPE, pts)

    def audio(self, pts_ns: int, samples: int = 1600) -> None:
        self.assembler.audio(pts_ns, pts_ns, np.zeros(samples, np.float32))

    def end(self) -> list[MediaItem]:
        self.assembler.end("end_of_stream", 0)
        check_grammar(self.items)
        return self.items

    def of(self, kind: type) -> list:
        return [item for item in self.items if isinstance(item, kind)]

    @property
    def starts(self) -> list[EpochStart]:
        return self.of(EpochStart)


@settings(max_examples=60)
@given(
    st.lists(st.integers(1 * MS, 400 * MS), min_size=1, max_size=60),
    st.integers(0, 10**12),
)
def test_exactly_the_sampled_frames_are_rendered(gaps: list[int], first: int) -> None:
    pts = [first]
    for gap in gaps:
        pts.append(pts[-1] + gap)
    bench = Bench()
    bench.video(*pts)
    bench.end()
    selector = FrameSelector(SLOW, first, 40 * MS)
    nexts: list[int | None] = [*pts[1:], None]
    wanted = [(at, size) for at, after in zip(pts, nexts, strict=True) for size in selector.sizes(at, after)]
    got = [(frame.pts_ns, (frame.image.shape[1], frame.image.shape[0])) for frame in bench.of(Frame)]
    assert sorted(got) == sorted(wanted)
    stats = bench.stats
    assert stats.frames_decoded == len(pts) == stats.frames_sampled + stats.frames_skipped + stats.frames_late
    assert stats.frames_emitted == len(got)
    assert bench.of(Progress)[-1].pts_ns == pts[-1]


@settings(max_examples=60)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("video"), st.integers(-20 * NS_PER_S, 20 * NS_PER_S)),
            st.tuples(st.just("audio"), st.integers(-20 * NS_PER_S, 20 * NS_PER_S)),
            st.tuples(st.just("shape"), st.just(0)),
        ),
        max_size=40,
    ),
    st.booleans(),
    st.booleans(),
)
def test_whatever_comes_the_order_and_the_books_hold(
    events: list[tuple[str, int]], live: bool, known_rate: bool
) -> None:
    bench = Bench(tracks=Tracks(True, RATE, 40 * MS if known_rate else 0), live=live)
    fed = samples = 0
    shape = SHAPE
    for kind, pts in events:
        if kind == "audio":
            bench.audio(pts)
            samples += 1600
        elif kind == "shape":
            shape = (shape[0] + 2, shape[1], shape[2])
        else:
            bench.assembler.video(pts, 0, shape, 0)
            fed += 1
    bench.end()
    stats = bench.stats
    assert stats.frames_decoded == fed == stats.frames_sampled + stats.frames_skipped + stats.frames_late
    assert samples == stats.audio_samples + stats.audio_samples_dropped
    assert stats.audio_samples == sum(len(chunk.samples) for chunk in bench.of(AudioChunk))
    for start in bench.starts:
        frames = [frame for frame in bench.of(Frame) if frame.epoch == start.epoch]
        assert all(frame.pts_ns >= start.origin_ns for frame in frames)


@given(st.integers(1, 4))
def test_progress_reaches_each_sample_time_with_the_first_frame_at_or_after_it(fps: int) -> None:
    # A window ends on a sample time; it must not wait for a frame beyond the one that passes its end.
    inputs = (VideoInput(width=8, height=8, fps=Fraction(fps)),)
    bench = Bench(inputs=inputs)
    pts = [n * 40 * MS for n in range(100)]
    bench.video(*pts)
    told = {item.pts_ns for item in bench.of(Progress)}
    for sample in range(1, 3 * fps):
        time = inputs[0].sample_time_ns(sample)
        assert next(at for at in pts if at >= time) in told
    assert len(told) <= len(pts) // 2


def test_early_audio_waits_for_the_origin() -> None:
    bench = Bench()
    bench.audio(-50 * MS)
    bench.audio(50 * MS)
    assert not bench.items
    bench.video(0, 40 * MS)
    bench.end()
    assert isinstance(bench.items[0], EpochStart)
    assert bench.starts[0].origin_ns == 0
    assert sum(len(chunk.samples) for chunk in bench.of(AudioChunk)) == 3200


def test_audio_waits_no_longer_than_about_a_second() -> None:
    bench = Bench()
    for n in range(50):
        bench.audio(n * 100 * MS)
    bench.video(4960 * MS, 5000 * MS)
    bench.end()
    assert bench.of(AudioChunk)[0].pts_ns >= 3900 * MS
    assert bench.stats.audio_samples == RATE
    assert bench.stats.audio_samples_dropped == 40 * 1600


def test_audio_goes_ahead_when_announced_video_does_not_come() -> None:
    bench = Bench()
    for n in range(VIDEO_WAIT_NS // (100 * MS) + 1):
        bench.audio(n * 100 * MS)
    assert [start.has_video for start in bench.starts] == [False]
    bench.video(10_200 * MS, 10_240 * MS)
    bench.end()
    assert [(start.has_video, start.reason) for start in bench.starts] == [(False, "start"), (True, "codec")]


def test_a_short_recording_with_sound_only_is_delivered() -> None:
    bench = Bench()
    bench.audio(0)
    bench.end()
    assert not bench.starts[0].has_video
    assert bench.stats.audio_samples == 1600


def test_the_frame_interval_is_taken_from_the_first_two_frames_when_not_announced() -> None:
    bench = Bench(tracks=Tracks(True, None, 0))
    bench.video(0, 500 * MS, 1000 * MS)
    bench.end()
    assert bench.starts[0].frame_interval_ns == 500 * MS
    assert bench.starts[0].origin_ns == 0


def test_a_single_frame_is_a_recording() -> None:
    bench = Bench(tracks=Tracks(True, None, 0))
    bench.video(80 * MS)
    bench.end()
    assert [frame.pts_ns for frame in bench.of(Frame)] == [80 * MS, 80 * MS]


@pytest.mark.parametrize(
    ("pts", "reason"), [(-10 * NS_PER_S, "pts_jump"), (60 * NS_PER_S, "pts_jump"), (-(2**32) * 100_000 // 9, "wrap")]
)
def test_a_jump_ends_the_epoch_and_begins_another(pts: int, reason: str) -> None:
    bench = Bench()
    bench.video(0, 40 * MS, pts, pts + 40 * MS)
    bench.end()
    assert [(start.epoch, start.origin_ns, start.reason) for start in bench.starts] == [
        (0, 0, "start"),
        (1, pts, reason),
    ]
    assert [end.reason for end in bench.of(EpochEnd)] == [reason, "end_of_stream"]
    assert bench.starts[0].identity != bench.starts[1].identity
    assert bench.stats.resyncs == 1


def test_audio_that_jumps_first_is_kept_for_the_new_epoch() -> None:
    bench = Bench()
    bench.video(0, 40 * MS)
    bench.audio(0)
    bench.audio(100 * NS_PER_S)
    bench.video(80 * MS)
    bench.video(100 * NS_PER_S, 100 * NS_PER_S + 40 * MS)
    bench.audio(100 * MS)
    bench.end()
    placed = [(chunk.epoch, chunk.pts_ns) for chunk in bench.of(AudioChunk)]
    assert placed == [(0, 0), (1, 100 * NS_PER_S)]
    assert bench.stats.audio_samples_dropped == 1600, "what was left of the old timeline"


def test_another_resolution_begins_an_epoch() -> None:
    bench = Bench()
    bench.video(0, 40 * MS)
    bench.assembler.video(80 * MS, 0, (32, 24, "yuv420p"), 0)
    bench.assembler.video(120 * MS, 0, (32, 24, "yuvj420p"), 0)
    bench.end()
    assert [start.reason for start in bench.starts] == ["start", "resolution", "codec"]


def test_sound_alone_jumps_too() -> None:
    bench = Bench(inputs=(), tracks=Tracks(False, RATE))
    bench.audio(0)
    bench.audio(100 * MS)
    bench.audio(60 * NS_PER_S)
    bench.end()
    assert [(start.origin_ns, start.has_video) for start in bench.starts] == [(0, False), (60 * NS_PER_S, False)]


def test_runs_of_sound_are_joined_until_somebody_asks_for_them() -> None:
    for asks, runs in ((True, 10), (False, 2)):
        bench = Bench(inputs=(), tracks=Tracks(False, RATE), live=True)
        for n in range(10):
            bench.audio(n * 20 * MS, 320)
            if asks:
                bench.assembler.hand_over_audio()
        bench.end()
        assert len(bench.of(AudioChunk)) == runs


def test_a_sender_report_is_told_once_until_it_moves() -> None:
    bench = Bench(live=True)
    bench.video(0, 40 * MS)
    base = 1_700_000_000 * NS_PER_S
    for offset in (base, base, base + 1 * MS, base + 90 * MS, base, base + 20 * MS, base + 20 * MS):
        bench.assembler.sender_report(offset)
    bench.end()
    updates = [update.clock for update in bench.of(ClockUpdate)]
    assert [(clock.origin, clock.offset_ns - base) for clock in updates] == [
        (ClockOrigin.RTCP_SR, 0),
        (ClockOrigin.RTCP_SR, 20 * MS),
    ]


def test_a_sender_whose_clock_was_never_set_is_not_believed() -> None:
    bench = Bench(live=True)
    bench.video(0, 40 * MS)
    for _ in range(3):
        bench.assembler.sender_report(0)
    bench.end()
    assert not bench.of(ClockUpdate)
    assert bench.starts[0].clock.origin is ClockOrigin.ARRIVAL
