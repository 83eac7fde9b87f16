"""Whatever a publisher sends: packets in any order, times and reports that jump, the same twice, or nothing at all."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
from av.codec.context import CodecContext
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.accounting import CheckedHop
from stream.clock import NS_PER_MS, NS_PER_S, ManualClock
from stream.errors import SourceError
from stream.ingest.assemble import VIDEO_WAIT_NS, Assembler, Tracks
from stream.ingest.audio import AudioHold, AudioRun
from stream.ingest.capture import LiveCapture
from stream.ingest.decode import FrameRenderer
from stream.ingest.stats import DecodeStats
from stream.ingest.webrtc import Reception
from stream.ingest.webrtc_frames import JUMP, WAITING_LIMIT, MediaPacket
from stream.ingest.webrtc_inbox import AUDIO_LIMIT, TEXT_LIMIT, VIDEO_LIMIT, Announced, Inbox, TimedText
from stream.ingest.webrtc_intake import SILENT_NS, Intake
from stream.ingest.webrtc_timing import ASTRAY_NS, REPORTS_MOST, TrackClock
from stream.types import AudioChunk, EpochEnd, EpochStart, Frame, MediaItem, Progress
from tests.stream.ingest.media import EVERY_FRAME, check_grammar

MS = NS_PER_MS
VP8, PCMU = 96, 0
VIDEO_HZ, AUDIO_HZ = 90_000, 8_000
RATE = 16_000
REACH_NS = 2 * (1 << 31) * NS_PER_S // AUDIO_HZ
"""Within this of arrival lies every time that comes out, however far the timestamps move in all: what is still waited
for as a track begins anew may be half of a counter's range off, sound that goes by video the same again."""


@cache
def key_frame() -> bytes:
    encoder = CodecContext.create("libvpx", "w")
    assert isinstance(encoder, VideoCodecContext)
    encoder.width, encoder.height, encoder.pix_fmt = 16, 16, "yuv420p"
    encoder.time_base, encoder.framerate = Fraction(1, 25), Fraction(25)
    frame = VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), "rgb24").reformat(format="yuv420p")
    frame.pts = 0
    return bytes([*encoder.encode(frame), *encoder.encode(None)][0])


@dataclass(frozen=True)
class Sent:
    """One thing that a publisher sends, after a pause."""

    kind: str
    pause_ns: int
    number: int
    """Step of the sequence number."""
    ticks: int
    """Step of the RTP time."""
    marker: bool
    ssrc: int
    ntp: int
    """Step of the NTP time, in ns."""
    taken: bool
    """Whether the source takes what waits."""


steps = st.one_of(
    st.just(1),
    st.integers(-3, 3),
    st.sampled_from([-JUMP - 1, JUMP + 1, 1 << 15, WAITING_LIMIT]),
    st.integers(0, 65535),
)
ticks = st.one_of(
    st.sampled_from([0, 160, 3600, -3600, VIDEO_HZ * 20, -VIDEO_HZ * 20, 1 << 31, (1 << 31) - 1, -(1 << 31) + 1]),
    st.integers(0, (1 << 32) - 1),
)
pauses = st.sampled_from([0, MS, 20 * MS, 300 * MS, SILENT_NS + 1, 30 * NS_PER_S])
things = st.builds(
    Sent,
    st.sampled_from(["video", "video", "audio", "audio", "report", "text"]),
    pauses,
    steps,
    ticks,
    st.booleans(),
    st.sampled_from([7, 7, 7, 8]),
    st.sampled_from([0, 0, NS_PER_S, -NS_PER_S, 3600 * NS_PER_S, 1 << 62]),
    st.booleans(),
)


class Publisher:
    """Sends into an intake what it is told to, and lets a reception take it."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.frames, self.texts, self.items = CheckedHop(name="frames"), CheckedHop(name="texts"), list[MediaItem]()
        self.inbox = Inbox(Announced(True, True), self.frames, self.texts, lambda: None)
        self.intake = Intake(self.clock, self.inbox, self.frames, self.texts)
        self.intake.expect_video({VP8: "vp8"}, VIDEO_HZ)
        self.intake.expect_audio({PCMU: "pcmu"}, AUDIO_HZ)
        tracks, stats, render = Tracks(video=True, sample_rate=RATE), DecodeStats(), FrameRenderer().render
        assembler: Assembler[VideoFrame] = Assembler(
            "cam", EVERY_FRAME, tracks, LiveCapture(self.clock), render, self.items.append, stats
        )
        self.reception = Reception("cam", self.inbox, tracks, assembler, stats)
        self._at = {"number": 0, "ticks": 0, "ntp": 0}

    def send(self, sent: Sent) -> None:
        self.clock.advance(sent.pause_ns)
        for name, step in (("number", sent.number), ("ticks", sent.ticks), ("ntp", sent.ntp)):
            self._at[name] += step
        number, timestamp = self._at["number"] % (1 << 16), self._at["ticks"] % (1 << 32)
        if sent.kind == "report":
            self.intake.report(sent.ssrc, ((self._at["ntp"] << 32) // NS_PER_S) % (1 << 64), timestamp)
        elif sent.kind == "text":
            self.intake.text("the door opens")
        elif sent.kind == "video":
            self.intake.video(MediaPacket(number, timestamp, sent.marker, VP8, sent.ssrc, key_frame()))
        else:
            self.intake.audio(MediaPacket(number, timestamp, False, PCMU, sent.ssrc, b"\xff" * 160))
        if sent.taken:
            self.take()

    def take(self) -> list[Any]:
        taken = self.inbox.take(0)
        for item in taken:
            if isinstance(item, TimedText):
                self.reception.text(item)
            else:
                self.reception.frame(item)
        return taken

    def check_bounds(self) -> None:
        for track in (self.intake._video, self.intake._audio):
            assert track is not None and len(track.frames.order._waiting) <= WAITING_LIMIT
        for clock in (self.intake._media.video, self.intake._media.audio):
            assert clock is None or len(clock._reported) <= REPORTS_MOST
        assert self.frames.held <= VIDEO_LIMIT + AUDIO_LIMIT and self.texts.held <= TEXT_LIMIT + 16


@settings(max_examples=150)
@given(st.lists(things, max_size=60))
def test_whatever_is_sent_the_order_the_books_and_the_bounds_hold(sent: list[Sent]) -> None:
    publisher = Publisher()
    try:
        for one in sent:
            publisher.send(one)
            publisher.check_bounds()
        publisher.take()
        publisher.reception.finish("lost", publisher.clock.now_ns)
    except SourceError:
        publisher.reception.finish("lost", publisher.clock.now_ns)
    check_grammar(publisher.items)
    check_times(publisher.items)
    publisher.intake.close()
    publisher.inbox.release()
    assert publisher.frames.held == publisher.texts.held == 0


def check_times(items: list[MediaItem]) -> None:
    """Within an epoch nothing goes back, and no time is far from arrival."""
    frame_ns = audio_ns = -1 << 62
    for item in items:
        if isinstance(item, EpochStart):
            frame_ns = audio_ns = -1 << 62
        elif isinstance(item, Frame | Progress):
            assert item.pts_ns >= frame_ns
            frame_ns = item.pts_ns
        elif isinstance(item, AudioChunk):
            # Two tracks meet anew when a report comes: then sound may be moved a little.
            assert item.pts_ns >= audio_ns - NS_PER_S // 2
            audio_ns = item.pts_ns + len(item.samples) * NS_PER_S // RATE
        if isinstance(item, EpochStart | Frame | AudioChunk) and not isinstance(item, EpochEnd):
            pts_ns = item.origin_ns if isinstance(item, EpochStart) else item.pts_ns
            assert abs(pts_ns - item.arrival_ns) <= ASTRAY_NS + REACH_NS


def test_times_that_run_away_do_not_run_out_of_numbers() -> None:
    """Half of the counter's range at each packet would leave 64 bits after some thousand of them."""
    publisher = Publisher()
    for number in range(400):
        publisher.send(Sent("audio", 20 * MS, 1, (1 << 31) - 1, False, 7, 0, taken=number % 50 == 49))
        publisher.send(Sent("video", 0, 0, 0, True, 7, 0, taken=False))
    publisher.reception.finish("lost", publisher.clock.now_ns)
    check_times(publisher.items)
    last = [item.pts_ns for item in publisher.items if isinstance(item, Frame | AudioChunk)]
    assert last and max(map(abs, last)) < REACH_NS + ASTRAY_NS


def test_reports_of_a_clock_that_stands_still_are_not_kept() -> None:
    track = TrackClock(VIDEO_HZ)
    track.packet(0, 0)
    for _ in range(10_000):
        track.report(1 << 63, 0)
    assert len(track._reported) == REPORTS_MOST


def test_pictures_leave_in_the_order_of_decoding_whatever_their_times() -> None:
    """A sender that sets its clock back, or that has pictures between others."""
    publisher = Publisher()
    at = [0, 3600 * 3, 3600, 3600 * 2, -3600 * 50, -3600 * 49]
    for before, now in zip([0, *at], at, strict=False):
        publisher.send(Sent("audio", 0, 0, 0, True, 7, 0, taken=False))
        publisher.send(Sent("video", 40 * MS, 1, now - before, True, 7, 0, taken=False))
    taken = [item for item in publisher.inbox.take(0) if not isinstance(item, TimedText) and item.video]
    assert [item.frame.timestamp for item in taken] == [ticks % (1 << 32) for ticks in at]


def test_sound_that_jumps_back_while_it_waits_for_video_waits_no_longer_than_other_sound() -> None:
    hold = AudioHold(RATE)
    silence = np.zeros(RATE // 50, np.float32)
    for pts_ns in (3600 * NS_PER_S, 0, VIDEO_WAIT_NS):
        hold.add(AudioRun(pts_ns, 0, silence))
    assert hold.since_ns == 0


@given(st.lists(st.tuples(st.integers(-(10**12), 10**12), st.integers(1, 4000)), max_size=40))
def test_what_is_held_is_bounded_and_counted(runs: list[tuple[int, int]]) -> None:
    hold, put, dropped = AudioHold(2000), 0, 0
    for pts_ns, count in runs:
        put += count
        dropped += hold.add(AudioRun(pts_ns, 0, np.zeros(count, np.float32)))
        held = [len(run.samples) for run in hold.runs]
        assert sum(held) == put - dropped and (sum(held) <= 2000 or len(held) == 1)
        assert hold.since_ns is not None and hold.since_ns <= pts_ns
