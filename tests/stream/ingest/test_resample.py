from __future__ import annotations

import itertools
from fractions import Fraction

import av
import numpy as np
import pytest

from stream.ingest.resample import MonoResampler, Timed

NS_PER_S = 1_000_000_000


def frame(samples: np.ndarray, rate: int, pts: int | None, layout: str = "mono") -> av.AudioFrame:
    made = av.AudioFrame.from_ndarray(samples.astype(np.float32)[None, :], format="flt", layout=layout)
    made.sample_rate, made.pts, made.time_base = rate, pts, Fraction(1, rate)
    return made


def joined(runs: list[Timed]) -> np.ndarray:
    return np.concatenate([samples for _, samples in runs])


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
def test_a_click_stays_where_it_was(rate: int) -> None:
    signal = np.zeros(rate)
    width = max(1, rate // 4000)
    signal[rate // 2 : rate // 2 + width] = 1.0
    resampler = MonoResampler(16_000)
    runs = []
    for start in range(0, rate, 1024):
        runs += resampler.feed(frame(signal[start : start + 1024], rate, start + rate))
    runs += resampler.flush()
    assert runs[0][0] == NS_PER_S
    peak = int(np.argmax(np.abs(joined(runs))))
    centre_s = (rate // 2 + (width - 1) / 2) / rate
    assert abs(peak / 16_000 - centre_s) < 2.5e-4
    assert abs(len(joined(runs)) - 16_000) <= 16
    for (pts, samples), (after, _) in itertools.pairwise(runs):
        assert abs(pts + len(samples) * NS_PER_S // 16_000 - after) <= 1


def test_stereo_is_mixed_down() -> None:
    interleaved = np.stack([np.full(1024, 0.5), np.full(1024, -0.25)], axis=1).reshape(-1)
    resampler = MonoResampler(16_000)
    runs = resampler.feed(frame(interleaved, 16_000, 0, "stereo")) + resampler.flush()
    np.testing.assert_allclose(joined(runs), 0.125, atol=1e-3)


def test_samples_never_leave_the_range() -> None:
    square = np.sign(np.sin(np.arange(48_000) / 20))
    resampler = MonoResampler(16_000)
    out = joined(resampler.feed(frame(square, 48_000, 0)) + resampler.flush())
    assert np.abs(out).max() == 1.0


def test_a_gap_sets_the_clock_again_and_loses_nothing() -> None:
    resampler = MonoResampler(16_000)
    runs = resampler.feed(frame(np.ones(4800), 48_000, 0))
    runs += resampler.feed(frame(np.ones(4800), 48_000, 48_000))
    runs += resampler.flush()
    assert resampler.restarts == 1
    assert NS_PER_S in [pts for pts, _ in runs]
    assert len(joined(runs)) == pytest.approx(3200, abs=16)


def test_frames_without_a_time_follow_the_last() -> None:
    resampler = MonoResampler(16_000)
    runs = resampler.feed(frame(np.ones(1600), 16_000, 32_000))
    runs += resampler.feed(frame(np.ones(1600), 16_000, None))
    assert [pts for pts, _ in runs] == [2 * NS_PER_S, 2 * NS_PER_S + NS_PER_S // 10]


def test_another_format_starts_the_filter_anew() -> None:
    resampler = MonoResampler(16_000)
    runs = resampler.feed(frame(np.ones(4410), 44_100, 0))
    runs += resampler.feed(frame(np.ones(800), 8_000, 800))
    runs += resampler.flush()
    assert len(joined(runs)) == pytest.approx(3200, abs=16)
