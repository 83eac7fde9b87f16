"""An hour of sound whose clock is not that of the picture."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from av.audio.frame import AudioFrame
from numpy.typing import NDArray

from engines.manifest import AudioInput, Branch, Head, HeadKind, Mode, VideoInput
from stream.accounting import Ledger
from stream.ingest.resample import MonoResampler
from stream.types import AudioChunk, CaptureClock, ClipWindow, ClockOrigin, EpochStart, Progress
from stream.windows import Grace, SourceWindows, Watch

NS_PER_S = 1_000_000_000
RATE = 8000
FRAME = 1024
REPORT_S = 5.0
"""How often a sender says what its media clock and the wall clock were at one moment."""
CLICKS_S = [10.0 + 597.3 * n for n in range(7)]
"""True times at which there is a sound, one of which is near the end."""
BRANCH = Branch(
    name="listen",
    mode=Mode.CLIP,
    window_ns=2 * NS_PER_S,
    hop_ns=2 * NS_PER_S,
    video=VideoInput(width=8, height=8, fps=Fraction(1)),
    audio=AudioInput(sample_rate=RATE),
    graph="g",
    heads=(Head(name="h", kind=HeadKind.EMBEDDING, output="e"),),
)


def sound(rate_error: float, seconds: float) -> Iterator[AudioFrame]:
    """Frames whose samples are ``rate_error`` faster than they say, timed anew at each report, as RTP is."""
    true_rate = RATE * (1 + rate_error)
    reported_at, counted = 0, 0
    for first in range(0, int(seconds * true_rate) - FRAME, FRAME):
        true_s = first / true_rate
        if int(true_s / REPORT_S) > reported_at:
            reported_at, counted = int(true_s / REPORT_S), first
        samples = np.zeros(FRAME, np.float32)
        for click in CLICKS_S:
            at = round(click * true_rate) - first
            if -80 < at < FRAME:
                samples[max(0, at) : max(0, at + 80)] = 0.8
        frame = AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
        frame.sample_rate, frame.time_base = RATE, Fraction(1, 90_000)
        frame.pts = round((counted / true_rate + (first - counted) / RATE) * 90_000)
        yield frame


def windows(rate_error: float, seconds: float) -> Iterator[ClipWindow]:
    clock = CaptureClock(ClockOrigin.RTCP_SR, 1.0, 0)
    start = EpochStart("cam", 0, "e", 0, True, True, NS_PER_S // 25, clock, True, 0)
    cutter = SourceWindows([Watch("p", BRANCH)], Grace(NS_PER_S // 2, None), Ledger(checked=True))
    yield from cutter.push(start, 0)
    resampler = MonoResampler(RATE)
    for frame in sound(rate_error, seconds):
        for pts_ns, samples in resampler.feed(frame):
            yield from cutter.push(AudioChunk("cam", 0, pts_ns, pts_ns, RATE, samples), pts_ns)
            yield from cutter.push(Progress("cam", 0, pts_ns, pts_ns), pts_ns)


def click_at(audio: NDArray[np.float32]) -> int | None:
    loud = np.flatnonzero(audio > 0.4)
    return int(loud[0]) if len(loud) else None


@pytest.mark.parametrize("rate_error", [200e-6, -200e-6])
def test_sound_is_where_it_belongs_after_an_hour_of_drift(rate_error: float) -> None:
    """Without correction it would be 720 ms off."""
    skews_ms, coverages = [], []
    for window in windows(rate_error, 3605):
        assert window.audio is not None
        coverages.append(window.audio_coverage)
        for click in CLICKS_S:
            if window.start_ns <= click * NS_PER_S < window.end_ns - NS_PER_S // 10:
                found = click_at(window.audio)
                assert found is not None
                skews_ms.append(abs(window.start_ns / 1e6 + 1000 * found / RATE - 1000 * click))
    assert len(skews_ms) == len(CLICKS_S) and max(skews_ms) <= 20
    assert min(coverages) > 0.98
