from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.manifest import VideoInput
from stream.clock import NS_PER_S
from stream.ingest.skipping import Skip, SkipRule
from stream.types import AudioChunk, Frame, Progress
from tests.stream.ingest.media import Clip, Run, check_grammar, make_clip, run_source

MS = 1_000_000


def sampled(fps: str, lookback_ns: int | None = None) -> VideoInput:
    return VideoInput(width=32, height=32, fps=Fraction(fps), lookback_ns=lookback_ns)


def decided(rule: SkipRule, key_pts_ms: list[int]) -> list[Skip]:
    """What the rule says after each key frame."""
    said = []
    for pts in key_pts_ms:
        rule.see_packet(pts * MS, key=True)
        said.append(rule.skip)
    return said


def test_key_frames_alone_once_they_have_come_often_enough() -> None:
    assert decided(SkipRule((sampled("1"),)), [0, 1000, 2000, 3000, 4000])[-2:] == [Skip.NONKEY] * 2
    assert decided(SkipRule((sampled("1"),)), [0, 1000, 2000])[-1] is Skip.NOTHING
    assert decided(SkipRule((sampled("2"),)), [0, 1000, 2000, 3000, 4000])[-1] is Skip.NOTHING
    assert decided(SkipRule((sampled("1"), sampled("2"))), [0, 1000, 2000, 3000, 4000])[-1] is Skip.NOTHING
    assert decided(SkipRule((sampled("1/100"),)), [0, 5000, 10000, 15000, 20000])[-1] is Skip.NOTHING
    assert decided(SkipRule((sampled("1", 60 * MS),)), [0, 500, 1000, 1500, 2000])[-1] is Skip.NOTHING
    assert decided(SkipRule(()), [0, 500, 1000, 1500, 2000])[-1] is Skip.NOTHING


def test_a_wider_gap_ends_it_at_the_next_key_frame() -> None:
    rule = SkipRule((sampled("1"),))
    decided(rule, [0, 1000, 2000, 3000])
    for pts in range(3040, 5000, 40):
        rule.see_packet(pts * MS, key=False)
    assert decided(rule, [5000, 6000, 7000]) == [Skip.NOTHING] * 3


def test_a_jump_back_ends_it() -> None:
    rule = SkipRule((sampled("1"),))
    assert decided(rule, [9000, 10000, 11000, 12000, 500])[-2:] == [Skip.NONKEY, Skip.NOTHING]


def test_frames_between_others_are_left_out_until_more_is_missing_than_they() -> None:
    rule = SkipRule((sampled("5"),))
    for number in range(200):
        if number % 100 == 0:
            rule.see_packet(number * 40 * MS, key=True)
        rule.see_frame(number * 40 * MS, between=number % 3 != 0)
    assert rule.skip is Skip.NONREF
    rule.see_frame(200 * 40 * MS, between=False)
    rule.see_frame(203 * 40 * MS, between=False)
    assert rule.skip is Skip.NONREF
    rule.see_frame(209 * 40 * MS, between=False)
    assert rule.skip is Skip.NOTHING
    rule.see_packet(300 * 40 * MS, key=True)
    assert rule.skip is Skip.NOTHING


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=30), st.sampled_from(["1/3", "1", "2", "8"]))
def test_what_is_left_out_never_leaves_a_sample_without_a_fresh_frame_by_what_was_learned(
    gaps_ms: list[int], fps: str
) -> None:
    rule, period_ns = SkipRule((sampled(fps),)), sampled(fps).sample_time_ns(1)
    pts, seen = 0, [0]
    rule.see_packet(0, key=True)
    for gap in gaps_ms:
        pts += gap
        rule.see_packet(pts * MS, key=True)
        seen.append(gap)
        if rule.skip is Skip.NONKEY:
            assert all(gap * MS <= period_ns for gap in seen[-3:])


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 s, a key frame each second, its pictures growing lighter."""
    return make_clip(tmp_path_factory.mktemp("skip") / "clip.mp4", Clip(seconds=8, gop=25, b_frames=2))


def pts(run: Run) -> list[int]:
    return [frame.pts_ns for frame in run.of(Frame)]


def test_a_sparse_pack_gets_the_key_frames_and_the_rest_is_not_decoded(clip: Path) -> None:
    whole = run_source(clip, (sampled("1"),), skip_frames=False)
    run = run_source(clip, (sampled("1"),))
    check_grammar(run.items)
    assert whole.source.stats.packets_skipped == 0 and whole.source.stats.frames_decoded == 200
    stats = run.source.stats
    assert stats.packets_skipped >= 4 * 24
    # Until it was known how often key frames come, some others were left out by the decoder.
    assert stats.frames_decoded < 80 and stats.frames_decoded + stats.packets_skipped <= 200
    assert stats.frames_decoded == stats.frames_sampled + stats.frames_skipped + stats.frames_late
    assert stats.frames_late == 0 and stats.corrupt_packets == 0
    # Each sample falls on a key frame here, so both ways see the same pictures.
    assert pts(run) == [second * NS_PER_S for second in range(8)] == pts(whole)[:8]
    for ours, theirs in zip(run.of(Frame), whole.of(Frame), strict=False):
        assert np.array_equal(ours.image, theirs.image)
    assert sum(len(chunk.samples) for chunk in run.of(AudioChunk)) == sum(
        len(chunk.samples) for chunk in whole.of(AudioChunk)
    )


def test_samples_between_key_frames_get_one_that_is_fresh_enough_and_do_not_wait_for_the_next(clip: Path) -> None:
    run = run_source(clip, (sampled("3/4"),))
    check_grammar(run.items)
    shown = pts(run)
    for n in range(6):
        at_ns = n * 4 * NS_PER_S // 3
        newest = max(pts for pts in shown if pts <= at_ns)
        assert at_ns - newest <= NS_PER_S
    gaps = np.diff([item.pts_ns for item in run.of(Progress)])
    assert gaps.max() <= 200 * MS, "windows would wait for the next key frame"


@pytest.mark.parametrize("video", [sampled("8"), sampled("1", 60 * MS)])
def test_a_pack_that_needs_more_gets_all(clip: Path, video: VideoInput) -> None:
    assert run_source(clip, (sampled("1"), video)).source.stats.packets_skipped == 0


def test_frames_that_others_do_not_refer_to_are_left_out(clip: Path) -> None:
    run = run_source(clip, (sampled("5"),))
    check_grammar(run.items)
    whole = run_source(clip, (sampled("5"),), skip_frames=False)
    assert 200 - run.source.stats.frames_decoded >= 40
    assert run.source.stats.frames_late == 0 and run.source.stats.corrupt_packets == 0
    for wanted, got in zip(pts(whole), pts(run), strict=True):
        assert 0 <= wanted - got <= 200 * MS


def test_scaling_by_area_is_smoother(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "c.mp4", Clip(seconds=1, size=(640, 480)))
    inputs = (VideoInput(width=640, height=480, fps=Fraction(200)), VideoInput(width=32, height=32, fps=Fraction(200)))

    def error(scaling: str) -> float:
        large, small = sorted((f.image for f in run_source(clip, inputs, scaling=scaling).of(Frame)[10:12]), key=len)[
            ::-1
        ]
        mean = large.reshape(32, 15, 32, 20, 3).mean(axis=(1, 3))
        return float(np.abs(mean - small).max())

    assert error("area") < 4
    assert error("fast") > 10
