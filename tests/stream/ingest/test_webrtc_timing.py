"""Two tracks that count from anywhere come out on one timeline: by sender reports, before those by arrival."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from stream.clock import NS_PER_MS, NS_PER_S
from stream.ingest.webrtc_timing import NTP_TO_UNIX_S, MediaClock, TrackClock, Unwrapped, ntp_to_unix_ns

MS = NS_PER_MS
UTC_S = 1_790_000_000


def ntp(unix_ns: int) -> int:
    return ((unix_ns // NS_PER_S + NTP_TO_UNIX_S) << 32) + ((unix_ns % NS_PER_S) << 32) // NS_PER_S


class Sender:
    """One track: captured at exact times, stamped from an offset of its own, delivered late."""

    def __init__(self, rate: int, first: int, delay_ms: int, ppm: float = 0) -> None:
        self.rate, self.first, self.delay_ns, self.ppm = rate, first, delay_ms * MS, ppm

    def stamp(self, captured_ns: int) -> int:
        return (self.first + round(captured_ns * (1 + self.ppm * 1e-6) * self.rate / NS_PER_S)) % (1 << 32)


def play(video: Sender, audio: Sender, *, seconds: int, report_at_s: int | None, jitter_ms: int = 0) -> MediaClock:
    """Both tracks for a while; packets and reports in the order in which they arrive."""
    clock, rng = MediaClock(), random.Random(1)
    clock.restart_video(video.rate)
    clock.restart_audio(audio.rate)
    assert clock.video is not None and clock.audio is not None
    for step in range(seconds * 50):
        at_ns = step * 20 * MS
        late_ns = rng.randrange(jitter_ms + 1) * MS
        if step % 2 == 0:
            clock.video.packet(video.stamp(at_ns), at_ns + video.delay_ns + late_ns)
            clock.video_pts_ns(video.stamp(at_ns))
        clock.audio.packet(audio.stamp(at_ns), at_ns + audio.delay_ns + late_ns)
        clock.audio_pts_ns(audio.stamp(at_ns))
        if report_at_s is not None and at_ns >= report_at_s * NS_PER_S and step % 50 == 0:
            for track, sender in ((clock.video, video), (clock.audio, audio)):
                track.report(ntp(UTC_S * NS_PER_S + at_ns), sender.stamp(at_ns))
    return clock


stamps = st.integers(0, (1 << 32) - 1)


@given(stamps, stamps, st.integers(0, 400), st.integers(0, 400))
def test_with_reports_the_tracks_meet_wherever_they_start_and_however_late_one_is(
    first: int, second: int, one_ms: int, other_ms: int
) -> None:
    video, audio = Sender(90_000, first, one_ms), Sender(48_000, second, other_ms)
    clock = play(video, audio, seconds=4, report_at_s=1, jitter_ms=30)
    at_ns = 3_500 * MS
    apart_ns = clock.audio_pts_ns(audio.stamp(at_ns)) - clock.video_pts_ns(video.stamp(at_ns))
    assert abs(apart_ns) < MS // 10
    offset_ns = clock.wall_offset_ns()
    assert offset_ns is not None
    assert abs(clock.video_pts_ns(video.stamp(at_ns)) + offset_ns - UTC_S * NS_PER_S - at_ns) < MS // 10


@given(stamps, stamps, st.integers(0, 80))
def test_without_reports_they_are_apart_by_no_more_than_their_delays(first: int, second: int, later_ms: int) -> None:
    video, audio = Sender(90_000, first, 50), Sender(48_000, second, 50 + later_ms)
    clock = play(video, audio, seconds=4, report_at_s=None, jitter_ms=40)
    apart_ns = clock.audio_pts_ns(audio.stamp(3 * NS_PER_S)) - clock.video_pts_ns(video.stamp(3 * NS_PER_S))
    assert abs(apart_ns - later_ms * MS) < 10 * MS
    assert clock.wall_offset_ns() is None


def test_drift_between_the_tracks_is_followed() -> None:
    for reported in (True, False):
        video, audio = Sender(90_000, 7, 30), Sender(48_000, 9, 30, ppm=200)
        clock = play(video, audio, seconds=900, report_at_s=0 if reported else None)
        at_ns = 899 * NS_PER_S
        apart_ns = clock.audio_pts_ns(audio.stamp(at_ns)) - clock.video_pts_ns(video.stamp(at_ns))
        assert abs(apart_ns) < 5 * MS


def test_the_picture_is_not_moved_by_reports_and_a_single_odd_report_moves_nothing() -> None:
    video, audio = Sender(90_000, 0, 20), Sender(48_000, 0, 20)
    clock = play(video, audio, seconds=10, report_at_s=1)
    assert clock.video is not None
    at_ns = 9 * NS_PER_S
    before = clock.video_pts_ns(video.stamp(at_ns)), clock.audio_pts_ns(audio.stamp(at_ns))
    clock.video.report(ntp(UTC_S * NS_PER_S + at_ns + 700 * MS), video.stamp(at_ns))
    assert (clock.video_pts_ns(video.stamp(at_ns)), clock.audio_pts_ns(audio.stamp(at_ns))) == before


@given(st.lists(st.integers(0, 300), min_size=30, max_size=30))
def test_reports_stamped_late_are_outvoted_by_those_in_time(late_ms: list[int]) -> None:
    video, audio = Sender(90_000, 0, 20), Sender(48_000, 0, 20)
    clock = play(video, audio, seconds=2, report_at_s=None)
    assert clock.video is not None and clock.audio is not None
    for n, late in enumerate([0, 0, *late_ms]):
        at_ns = 2 * NS_PER_S + n * 500 * MS
        track, sender = (clock.video, video) if n % 2 else (clock.audio, audio)
        track.report(ntp(UTC_S * NS_PER_S + at_ns + late * MS), sender.stamp(at_ns))
    apart_ns = clock.audio_pts_ns(audio.stamp(at_ns)) - clock.video_pts_ns(video.stamp(at_ns))
    assert abs(apart_ns) < MS // 10


def test_a_clock_that_is_set_is_followed() -> None:
    video, audio = Sender(90_000, 0, 20), Sender(48_000, 0, 20)
    clock = play(video, audio, seconds=5, report_at_s=1)
    assert clock.video is not None and clock.audio is not None
    for track, sender in ((clock.video, video), (clock.audio, audio)):
        track.report(ntp((UTC_S + 60) * NS_PER_S), sender.stamp(5 * NS_PER_S))
    assert abs((clock.wall_offset_ns() or 0) - (UTC_S + 55) * NS_PER_S) < MS


def test_a_sender_without_a_clock_is_timed_by_arrival() -> None:
    video, audio = Sender(90_000, 0, 20), Sender(48_000, 0, 20)
    clock = play(video, audio, seconds=4, report_at_s=None)
    assert clock.video is not None and clock.audio is not None
    clock.video.report(0, video.stamp(NS_PER_S))
    clock.audio.report(0, audio.stamp(3 * NS_PER_S))
    apart_ns = clock.audio_pts_ns(audio.stamp(3 * NS_PER_S)) - clock.video_pts_ns(video.stamp(3 * NS_PER_S))
    assert abs(apart_ns) < MS and clock.wall_offset_ns() is None


def test_what_is_said_now_belongs_to_what_is_captured_now() -> None:
    clock = MediaClock()
    assert clock.now_ns(5) is None
    clock.restart_audio(48_000)
    assert clock.audio is not None
    clock.audio.report(ntp(UTC_S * NS_PER_S), 0)
    assert clock.audio.wall_offset_ns is None, "a report without media says nothing"
    clock.audio.packet(480_000, 100 * MS)
    assert clock.audio_pts_ns(480_000) == 0
    assert clock.now_ns(350 * MS) == 250 * MS


@given(st.lists(st.integers(-3000, 3000), max_size=50), st.integers(0, (1 << 16) - 1))
def test_a_counter_goes_on_where_it_wraps(steps: list[int], first: int) -> None:
    counter, at = Unwrapped(16), first
    assert counter.see(first) == first
    for step in steps:
        at += step
        assert counter.see(at % (1 << 16)) == at
        at = counter.newest or at


def test_ntp() -> None:
    assert ntp_to_unix_ns(ntp(UTC_S * NS_PER_S + 250 * MS)) == UTC_S * NS_PER_S + 250 * MS
    assert TrackClock(90_000).newest_ns == 0
