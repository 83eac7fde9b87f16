from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.ingest.timeline import BACKSTEP_NS, JUMP_NS, WRAPS_NS, SampleCounter, Step, Timeline, to_ns

NS_PER_S = 1_000_000_000
MS = 1_000_000


@given(st.integers(-(2**40), 2**40), st.integers(1, 10**6), st.integers(1, 10**6))
def test_ticks_become_ns_exactly(ticks: int, numerator: int, denominator: int) -> None:
    base = Fraction(numerator, denominator)
    exact = ticks * base * NS_PER_S
    assert 0 <= exact - to_ns(ticks, base) < 1


def test_ntsc_pts_do_not_drift() -> None:
    assert to_ns(30_000 * 3600 * 24, Fraction(1, 30_000)) == 3600 * 24 * NS_PER_S


@given(st.lists(st.integers(1, JUMP_NS), min_size=1, max_size=50))
def test_video_that_moves_on_stays_in_its_epoch(steps: list[int]) -> None:
    timeline = Timeline()
    pts = 0
    for step in steps:
        assert timeline.see_video(pts) is Step.FOLLOWS
        pts += step


@given(st.integers(0, BACKSTEP_NS))
def test_a_small_step_back_is_late_not_a_jump(back: int) -> None:
    timeline = Timeline()
    timeline.see_video(NS_PER_S)
    assert timeline.see_video(NS_PER_S - back) is Step.LATE
    assert timeline.video_ns == NS_PER_S


@given(st.one_of(st.integers(BACKSTEP_NS + 1, 1000 * NS_PER_S), st.integers(-1000 * NS_PER_S, -JUMP_NS - 1)))
def test_a_large_step_is_a_jump(back: int) -> None:
    timeline = Timeline()
    timeline.see_video(0)
    assert timeline.see_video(-back) is Step.JUMP
    assert timeline.video_ns == 0, "a frame that does not follow must not move the epoch"


@pytest.mark.parametrize("period_ns", WRAPS_NS)
def test_a_counter_that_runs_over_is_told_apart(period_ns: int) -> None:
    timeline = Timeline()
    timeline.see_video(period_ns - 20 * MS)
    assert timeline.see_video(20 * MS) is Step.WRAP


def test_a_pause_of_video_beside_audio_is_no_jump() -> None:
    timeline = Timeline()
    timeline.see_video(0)
    for second in range(30):
        assert timeline.see_audio(second * NS_PER_S, (second + 1) * NS_PER_S) is Step.FOLLOWS
    assert timeline.see_video(30 * NS_PER_S) is Step.FOLLOWS


def test_a_pause_of_audio_beside_video_is_no_jump() -> None:
    timeline = Timeline()
    timeline.see_audio(0, NS_PER_S)
    for second in range(30):
        assert timeline.see_video(second * NS_PER_S) is Step.FOLLOWS
    assert timeline.see_audio(29 * NS_PER_S, 30 * NS_PER_S) is Step.FOLLOWS


def test_audio_that_jumped_ahead_of_video_does_not_follow() -> None:
    timeline = Timeline()
    timeline.see_video(0)
    assert timeline.see_audio(100 * NS_PER_S, 101 * NS_PER_S) is Step.JUMP
    assert timeline.audio_ns is None


def test_audio_left_over_from_before_a_jump_does_not_follow() -> None:
    # A clip of three seconds began anew: both places are within the reach of a pause.
    timeline = Timeline(left_ns=3 * NS_PER_S)
    timeline.see_video(0)
    assert timeline.see_audio(2900 * MS, 3000 * MS) is Step.JUMP
    assert timeline.see_audio(0, 100 * MS) is Step.FOLLOWS


@given(st.sampled_from([8_000, 11_025, 16_000, 44_100, 48_000]), st.lists(st.integers(1, 5000), min_size=1))
def test_samples_are_counted_without_drift(rate: int, counts: list[int]) -> None:
    counter = SampleCounter(rate)
    counter.anchor(7)
    total = 0
    for count in counts:
        assert counter.take(count) == 7 + total * NS_PER_S // rate
        total += count


@given(st.integers(-10 * MS, 10 * MS))
def test_rounded_pts_do_not_set_the_count_again(error_ns: int) -> None:
    counter = SampleCounter(48_000)
    counter.anchor(0)
    counter.take(48_000)
    assert not counter.breaks(NS_PER_S + error_ns)
    assert counter.breaks(NS_PER_S + 11 * MS)
    assert not counter.breaks(None)


def test_counting_needs_an_anchor() -> None:
    counter = SampleCounter(48_000)
    assert counter.breaks(0)
    with pytest.raises(ValueError, match="anchor"):
        counter.take(1)
