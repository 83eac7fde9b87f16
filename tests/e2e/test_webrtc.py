"""A real browser publishes to the real command."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.browser import find_browser, publishing
from tests.e2e.command import Running, free_port
from tests.e2e.conftest import missing

TOKEN = "for-this-test-only"


def config(folder: Path, pack: Path, port: int) -> Path:
    path = folder / "config.yaml"
    source = {"id": "phone", "url": "webrtc://", "publish_token": TOKEN}
    packs = [{"name": str(pack), "backend": "onnxruntime"}]
    path.write_text(yaml.safe_dump({"sources": [source], "packs": packs, "http": {"port": port}}))
    return path


def shown(port: int) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/sources/phone", timeout=10) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def answers(port: int) -> bool:
    try:
        return bool(shown(port))
    except OSError:
        return False


def metrics(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def until(condition: Callable[[], bool], timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.1)


@pytest.mark.parametrize(("codec", "leaves"), [("VP8", True), ("H264", False)])
def test_chromium_publishes_its_camera(codec: str, leaves: bool, tiny_pack: Path, tmp_path: Path) -> None:
    browser = find_browser()
    if browser is None:
        missing("there is no Chromium")
    port = free_port()
    running = Running(tmp_path / "home", "run", "--config", str(config(tmp_path, tiny_pack, port)))
    try:
        until(lambda: answers(port))
        whip = f"http://127.0.0.1:{port}/whip/phone"
        with publishing(browser, tmp_path, whip, token=TOKEN, codec=codec) as publisher:
            publisher.wait_for("state connected")
            publisher.wait_for("patch 204")
            until(lambda: shown(port)["state"] == "live")
            windows = 'sightwire_windows_total{pack="tiny",result="ok"}'
            until(lambda: metrics(port).get(windows, 0) >= 6)
            until(lambda: shown(port)["frames"]["decoded"] > 25)
            found = shown(port)
            assert found["av_skew_s"] is not None and abs(found["av_skew_s"]) < 1
            assert TOKEN not in json.dumps(found)
            if leaves:
                publisher.end.set()
                publisher.wait_for("delete 200")
                until(lambda: shown(port)["state"] == "connecting")
            else:
                # The service ends first, in the middle of it.
                assert running.end().code == 0
        done = running.end()
    finally:
        running.kill()
    assert done.code == 0 and TOKEN not in done.err + done.out
