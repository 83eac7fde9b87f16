"""Sources that come and go leave nothing behind (a short form of ``python -m bench.soak``)."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from bench import soak
from bench.churn import Churned, cameras, churn, synthetic
from bench.slope import block_medians, fit, t_quantile
from tests.e2e.conftest import StartRtspServer
from tests.stream.ingest.media import Clip, make_clip


def judge(churned: Churned, cycles: int) -> None:
    assert churned.samples[-1].cycles >= cycles
    assert max(churned.deltas) <= 0, f"threads, descriptors, tasks: {churned.samples[0]} to {churned.samples[-1]}"


async def test_generated_sources_come_and_go(tiny_pack: Path) -> None:
    # More cycles where the machine's noise leaves it open whether memory grows.
    churned = await churn(tiny_pack, synthetic(4), 100, at_most=300)
    judge(churned, 100)
    # The estimate alone would be a matter of the machine's noise: its 95 % interval must lie above the limit to fail.
    assert churned.rss_mb_per_100.low < 1.0, churned.samples


async def test_real_cameras_come_and_go(rtsp_server: StartRtspServer, tiny_pack: Path, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", Clip(seconds=4))
    churned = await churn(tiny_pack, cameras(rtsp_server(clip, "--loop").url, 2), 10)
    judge(churned, 10)


def test_a_soak_tells_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under overload, what does not fit is dropped where it waits: no queue grows."""
    path = tmp_path / "soak.json"
    assert soak.main(["--minutes", "0.2", "--sources", "2", "--churn", "--json", str(path)]) == 0
    told = json.loads(path.read_text())
    wanted = {"rss_mb_per_100_cycles", "threads_delta", "fds_delta", "tasks_delta"}
    wanted |= {f"latency_slope_ms_per_min_{percent}" for percent in (100, 200)}
    assert wanted <= told.keys()
    assert told["dropped_share_100"] < told["dropped_share_200"] and told["dropped_share_200"] > 0.2
    # Two windows of each source and branch may wait and one is computed: some seconds of an engine's work.
    assert told["latency_ms_200"] < 60_000
    assert "rss_mb_per_100_cycles" in capsys.readouterr().out


def test_a_growing_quantity_is_found_and_noise_is_not() -> None:
    rng = random.Random(1)
    xs = list(range(60))
    growing = fit(xs, [100 + 0.03 * x + rng.gauss(0, 0.2) for x in xs])
    assert growing.low < 0.03 < growing.high and growing.low > 0
    steady = [fit(xs, [rng.gauss(0, 1) for _ in xs]) for _ in range(200)]
    assert 0.9 <= sum(slope.low < 0 < slope.high for slope in steady) / 200 <= 0.99
    with pytest.raises(ValueError, match="three points"):
        fit([1, 1, 1], [1, 2, 3])


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.706), (2, 4.303), (5, 2.571), (10, 2.228), (100, 1.984)])
def test_quantiles_of_students_distribution(freedom: int, expected: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(expected, rel=0.005)


def test_blocks_cover_everything() -> None:
    xs, ys = block_medians(list(range(10)), [float(x) for x in range(10)], 3)
    assert len(xs) == 3 and xs == ys
    assert block_medians([1.0, 2.0], [3.0, 4.0], 5) == ([1.0, 2.0], [3.0, 4.0])
