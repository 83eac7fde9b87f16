"""The benchmark of WebRTC runs and measures what it says, in small."""

from __future__ import annotations

from bench.webrtc import measure_core, p95


async def test_reception_is_measured() -> None:
    core, rate = await measure_core(2, "VP8")
    assert 0 < core < 2 and 2 < rate < 60


def test_the_percentile_is_of_distances() -> None:
    assert p95([-10.0] * 99 + [0.0]) == 10.0
