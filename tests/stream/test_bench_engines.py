"""The benchmark of engines runs, on a tiny network: every figure is there, though none is worth quoting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import engine_packs, engines
from bench.common import BenchError
from bench.engine_build import build_time
from bench.engine_packs import VideoNetwork
from engines.tinypack import write_tiny_pack
from models.backbones.c3d import C3D

pytest.importorskip("openvino")
SMALL = VideoNetwork("small", lambda: C3D(32, 32, multiplier=0.05, classes=5), 5, 32)


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGHTWIRE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(engine_packs, "DATA", tmp_path / "absent")


def test_engine_classes_and_auto_are_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_pack(tmp_path / "tiny")
    written = tmp_path / "engines.json"
    plan = engines.Plan(runs=2, class_s=0.01, auto_calls=1, networks=(SMALL,), precisions=("fp32",))
    given = ["--only", "class,auto", "--pack", str(tmp_path / "tiny"), "--json", str(written)]
    assert engines.main(given, plan) == 0, capsys.readouterr().err
    found = json.loads(written.read_text())
    keys = {"engine_class_ratio", "auto_gain_fp32", "auto_gain_fp32_small", "auto_gain_fp32_mean"}
    assert found.keys() >= keys
    assert all(isinstance(value, (int, float, str)) for value in found.values()), "the JSON must be flat"
    # Both sides run the same graph, so neither can be many times the other.
    assert all(0.01 < found[key] < 100 for key in keys)
    ratios = [value for key, value in found.items() if key.startswith("engine_class_ratio_")]
    assert found["engine_class_ratio"] == min(ratios)
    assert {key.split("_")[3] for key in found if key.startswith("engine_class_ratio_")} == {"onnxruntime", "openvino"}
    said = capsys.readouterr().out
    assert "small fp32: " in said
    assert "off PyTorch by" in said


def test_commands_are_timed_in_a_home_of_their_own(tmp_path: Path) -> None:
    measured = build_time(tmp_path, [["cache", "list"]])
    found = {row.key: row.value for row in measured.rows}
    assert found["export_compile_verify_cpu_s"] > 0
    assert found["export_compile_verify_s"] > 0
    assert "cache" in measured.notes[0]


def test_a_command_that_fails_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"`sightwire compile nothing` failed: .*no pack"):
        build_time(tmp_path, [["compile", "nothing"]])


def test_an_unknown_pack_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert engines.main(["--only", "class", "--pack", str(tmp_path / "none")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: no pack")
    assert said.count("\n") == 1


@pytest.mark.parametrize("given", [["--only", "x"], ["--runs", "0"]])
def test_bad_arguments_are_refused(given: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        engines.arguments(given)
    assert ended.value.code == 2
