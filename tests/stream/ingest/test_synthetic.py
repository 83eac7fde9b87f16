from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from stream.clock import ManualClock
from stream.errors import SourceError
from stream.ingest.synthetic import Scene, parse_scene
from stream.types import AudioChunk, EpochEnd, EpochStart, Frame
from tests.stream.ingest.media import (
    NS_PER_S,
    ManualStop,
    brightness_onset_ns,
    check_grammar,
    loudness_onset_ns,
    run_source,
)

MS = 1_000_000


def test_flash_and_beep_are_where_the_address_says() -> None:
    run = run_source("synthetic://a?seconds=3&flash=1.2&beep=1.2&brightness=0:0.1")
    check_grammar(run.items)
    assert brightness_onset_ns(run.of(Frame), 200) == 1200 * MS
    assert abs(loudness_onset_ns(run.of(AudioChunk)) - 1200 * MS) < 1 * MS
    assert len(run.of(Frame)) == 75
    assert run.source.stats.audio_samples == 3 * 16_000


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 48_000])
@pytest.mark.parametrize("fps", ["25", "30000/1001", "7"])
def test_sound_has_no_seams(rate: int, fps: str) -> None:
    chunks = run_source(f"synthetic://a?seconds=2&fps={fps}", audio_rate=rate).of(AudioChunk)
    assert sum(len(chunk.samples) for chunk in chunks) == 2 * rate
    joined = np.concatenate([chunk.samples for chunk in chunks])
    assert np.abs(np.diff(joined)).max() < 0.02


def test_brightness_follows_its_schedule() -> None:
    frames = run_source("synthetic://a?seconds=3&brightness=0:0.1,1:0.9,2:0.1").of(Frame)
    means = [float(np.mean([frame.image.mean() for frame in frames[at : at + 25]])) for at in (0, 25, 50)]
    assert means[1] > means[0] + 20
    assert means[0] == pytest.approx(means[2], abs=15)


def test_the_picture_moves() -> None:
    frames = run_source("synthetic://a?seconds=1").of(Frame)
    assert all((one.image != other.image).any() for one, other in zip(frames[::5], frames[5::5], strict=False))


def test_either_stream_may_be_left_out() -> None:
    silent = run_source("synthetic://a?seconds=1&audio=0")
    blind = run_source("synthetic://a?seconds=1&video=0")
    assert (silent.of(EpochStart)[0].has_audio, blind.of(EpochStart)[0].has_video) == (False, False)
    assert not silent.of(AudioChunk)
    assert not blind.of(Frame)
    assert blind.of(AudioChunk)


def test_real_time_and_loops() -> None:
    clock = ManualClock()
    stop = ManualStop(clock, stop_at_ns=5 * NS_PER_S)
    run = run_source("synthetic://a?seconds=2", clock=clock, stop=stop, pace="realtime", loop=True)
    check_grammar(run.items)
    assert [start.reason for start in run.of(EpochStart)] == ["start", "loop", "loop"]
    assert run.of(EpochEnd)[-1].reason == "removed"
    assert sum(stop.waited_s) == pytest.approx(5.0, abs=0.05)
    assert run.of(EpochStart)[0].live


def test_a_fast_run_is_the_same_at_each_replay() -> None:
    first, second = (run_source("synthetic://a?seconds=1", clock=ManualClock(now_ns=at)) for at in (0, 77))
    assert first.of(EpochStart)[0].identity == second.of(EpochStart)[0].identity
    assert not first.of(EpochStart)[0].live


def test_the_address_in_full() -> None:
    scene = parse_scene(
        "a", "synthetic://a?fps=12.5&width=320&height=240&seconds=1.5&audio=0&flash=1,2&brightness=1:0.3"
    )
    assert scene == Scene(
        fps=Fraction(25, 2),
        width=320,
        height=240,
        seconds=Fraction(3, 2),
        audio=False,
        flash_ns=(NS_PER_S, 2 * NS_PER_S),
        brightness=((NS_PER_S, 0.3),),
    )
    assert parse_scene("a", "synthetic://a") == Scene()


@pytest.mark.parametrize(
    "query",
    [
        "fps=0", "fps=x", "fps=1/0", "fps=1000", "width=0", "height=1e3", "seconds=-1", "audio=yes", "flash=", "beep=a",
        "brightness=1", "brightness=0:2", "colour=red", "fps=25&fps=30", "fps", "&&", "flash=-1",
    ],
)  # fmt: skip
def test_what_does_not_parse_is_refused_in_one_line(query: str) -> None:
    with pytest.raises(SourceError) as caught:
        parse_scene("a", f"synthetic://a?{query}")
    assert caught.value.reason == "bad_url"
    assert not caught.value.retryable
    assert "\n" not in str(caught.value)
