"""The demo as a newcomer meets it: the trained base pack, exported here, on two live sources."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.e2e.command import PATIENCE_S, ROOT, Running, environment, sightwire


def outside(*extras: str) -> list[str]:
    """Modules that are installed here and would not be with these extras alone."""
    wanted: dict[str, set[str]] = defaultdict(set)
    to_do = [("sightwire", frozenset(extras))]
    while to_do:
        name, asked = to_do.pop()
        if name in wanted and asked <= wanted[name]:
            continue
        wanted[name] |= asked
        try:
            needs = [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:
            continue
        for need in needs:
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in (*asked, "")):
                to_do.append((canonicalize_name(need.name), frozenset(need.extras)))
    return [
        module
        for module, owners in packages_distributions().items()
        if not any(canonicalize_name(owner) in wanted for owner in owners)
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with the base pack in it, exported with no more than `make demo` installs (and OpenVINO)."""
    folder = tmp_path_factory.mktemp("home")
    absent = outside("demo", "openvino")
    assert {"accelerate", "tokenizers", "pytest"} <= set(absent) and not {"torch", "rich", "onnx"} & set(absent)
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); from stream.cli import main; main()"
    command = [sys.executable, "-c", code, "export", "base"]
    done = subprocess.run(command, cwd=ROOT, env=environment(folder), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_export_carries_parity_on_real_clips(home: Path) -> None:
    report = json.loads((home / "packs/base/parity.json").read_text())
    assert {clip["name"] for clip in report["clips"]} == {"bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4"}
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
