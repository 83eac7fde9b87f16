"""The benchmark runs, on a tiny pack: every figure is there and makes sense, though none is worth quoting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import pipeline
from bench.common import Row, median_ratio
from bench.rig import Call, Recorder
from bench.throughput import whole_batches
from engines.tinypack import write_tiny_pack

KEYS = {
    "ingest_ratio",
    "service_ratio",
    "service_ratio_with_decode",
    "latency_p50_ms",
    "latency_p95_ms",
    "latency_p99_ms",
    "inference_batch_ms",
    "cpu_ratio_to_plain_loop",
    "rss_mb_1",
    "live_sources",
    "live_windows_dropped",
    "live_cpu_cores",
}
"""Those that others read out of the JSON; a full run has rss_mb_4 and rss_mb_16 as well."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs") / "tiny"
    write_tiny_pack(folder)
    return folder


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGHTWIRE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "bench-cache"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """As short as can be."""
    plan = pipeline.Plan(
        runs=1,
        clip_s=7,
        sources=2,
        interval_s=0.2,
        latency_s=1.5,
        latency_sources=1,
        memory_s=0.5,
        memory_counts=(1,),
        cpu_runs=1,
        cpu_s=1.0,
        live_sources=1,
        live_s=1.0,
    )
    monkeypatch.setattr(pipeline, "QUICK", plan)


@pytest.mark.usefixtures("quick")
def test_every_figure_is_measured_and_written(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "out" / "pipeline.json"
    assert pipeline.main(["--quick", "--pack", str(tiny), "--json", str(written)]) == 0, capsys.readouterr().err
    found = json.loads(written.read_text())
    assert set(found) >= KEYS
    assert all(isinstance(value, (int, float, str)) for value in found.values()), "the JSON must be flat"
    assert all(found[key] > 0 for key in KEYS - {"live_windows_dropped"})
    assert found["latency_p50_ms"] <= found["latency_p95_ms"] <= found["latency_p99_ms"]
    assert 20 < found["rss_mb_1"] < 1000
    # How far both sides are apart in so short a run is the machine's doing; pairs of runs even that out.
    assert "ingest_ratio" in found


def test_only_measures_what_was_asked_for(tiny: Path, tmp_path: Path, quick: None) -> None:
    written = tmp_path / "a.json"
    assert pipeline.main(["--quick", "--only", "a", "--pack", str(tiny), "--json", str(written)]) == 0
    found = json.loads(written.read_text())
    assert "ingest_ratio" in found
    assert "service_ratio" not in found


def test_unknown_pack_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pipeline.main(["--quick", "--only", "a", "--pack", str(tmp_path / "none")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: no pack")
    assert said.count("\n") == 1


@pytest.mark.parametrize("given", [["--only", "x"], ["--runs", "0"]])
def test_bad_arguments_are_refused(given: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        pipeline.arguments(given)
    assert ended.value.code == 2


def test_only_whole_batches_are_counted() -> None:
    recorder = Recorder()
    graphs = ["window", "encoder", "window", "encoder", "window", "encoder", "window", "encoder", "window", "encoder"]
    for number, graph in enumerate(graphs):
        recorder.calls.append(Call(graph, 3 if graph == "window" else 6, float(number), number + 1.0))
    stretch = whole_batches(recorder, frozenset({"window"}), 0.5, 100.0)
    assert stretch is not None
    # From the end of the first window graph (1 s) to the end of the last (9 s): four batches of three.
    assert (stretch.windows, stretch.seconds) == (12, 8.0)
    assert [call.graph for call in stretch.calls] == graphs[1:9]
    assert whole_batches(recorder, frozenset({"window"}), 0.5, 7.5) is None, "three batches are too few"


def test_targets() -> None:
    assert Row("ratio", 0.89, "", at_least=0.9).reached is False
    assert Row("ms", 60.0, "", at_most=60).reached is True
    assert Row("count", 1, "").reached is None


def test_ratio_is_taken_pair_by_pair() -> None:
    # A slow spell that meets both sides of a pair must not move the ratio.
    assert median_ratio([9.0, 0.9, 9.0], [10.0, 1.0, 10.0]) == pytest.approx(0.9)
