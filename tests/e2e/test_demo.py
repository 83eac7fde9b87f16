"""The demo as a newcomer meets it: the trained base pack, exported here, on two live sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.command import PATIENCE_S, Running, sightwire


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with the base pack in it."""
    folder = tmp_path_factory.mktemp("home")
    done = sightwire(folder, "export", "base", timeout_s=500)
    assert done.code == 0, done.err
    return folder


def test_the_export_carries_parity_on_real_clips(home: Path) -> None:
    report = json.loads((home / "packs/base/parity.json").read_text())
    assert {clip["name"] for clip in report["clips"]} == {"bikes.mp4", "bigbuckbunny.mp4"}
    assert {entry["graph"] for entry in report["entries"]} == {"encoder", "window", "segmentation"}
    assert all(entry["passed"] for entry in report["entries"])
    again = sightwire(home, "export", "base")
    assert again.code == 0 and "up to date" in again.err


def test_the_second_start_exports_nothing_and_the_end_is_clean(home: Path) -> None:
    exported = {path.name: path.stat().st_mtime_ns for path in (home / "packs/base").iterdir()}
    running = Running(home, "demo", "--seconds", "8", "--http-port", "0")
    try:
        running.wait_for(lambda err: "Ctrl-C ends it" in err)
        assert {path.name: path.stat().st_mtime_ns for path in (home / "packs/base").iterdir()} == exported
        running.wait_for(lambda out: "street" in out and "cartoon" in out, "out")
        code = running.process.wait(PATIENCE_S)
    finally:
        running.kill()
    err, out = running.text(), running.text("out")
    assert code == 0, err
    assert "start   scene" in out, "segmentation events from the street"
    for row in ("frames decoded", "windows", "events", "drops", "latency, capture to acknowledged"):
        assert row in err


def test_ctrl_c_ends_it_cleanly(home: Path) -> None:
    running = Running(home, "demo", "--http-port", "0")
    try:
        running.wait_for(lambda out: "start   scene" in out, "out")
        done = running.end()
    finally:
        running.kill()
    assert done.code == 0 and "summary" in done.err
    assert "ended (lost)" not in done.out, "the camera goes after the service, not before"
