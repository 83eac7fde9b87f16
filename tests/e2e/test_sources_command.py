"""`sightwire run --stay` and `sightwire sources`, as a person uses them."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.command import Running, free_port, sightwire

LIVE = "synthetic://scene?fps=25&width=64&height=36&brightness=0:0.8"
CANARY = "hunter2canary"


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    found = free_port()
    monkeypatch.setenv("SIGHTWIRE_SERVICE", f"http://127.0.0.1:{found}")
    return found


@pytest.fixture
def service(tmp_path: Path, tiny_pack: Path, port: int) -> Iterator[Running]:
    """Watches what ``config.yaml`` names."""
    config = tmp_path / "config.yaml"
    # Loopback is closed to sources of the API unless somebody opens it.
    opened = {"networks": ["127.0.0.0/8"]}
    config.write_text(json.dumps({"sources": [{"id": "a", "url": LIVE}], "api": opened}))
    options = ["--stay", "-q", "-c", str(config), "--pack", str(tiny_pack), "--http-port", str(port)]
    running = Running(tmp_path, "run", *options)
    yield running
    running.kill()


def test_sources_come_and_go_from_the_command_line(service: Running, tmp_path: Path) -> None:
    def until(text: str) -> None:
        service.wait_for(lambda said: text in said, timeout_s=60)

    until("source a: live")
    added = sightwire(tmp_path, "sources", "add", "b", f"rtsp://user:{CANARY}@127.0.0.1:9/x", "--set", "audio=false")
    assert added.code == 0 and added.out.startswith("source b: "), added.err
    until("connection refused")
    listed = sightwire(tmp_path, "sources", "list").out
    assert "live" in listed and "rtsp://127.0.0.1:9/x" in listed and "connection refused" in listed
    assert json.loads(sightwire(tmp_path, "sources", "show", "b").out)["settings"]["audio"] is False
    assert sightwire(tmp_path, "sources", "rm", "b").code == 0
    again = sightwire(tmp_path, "sources", "rm", "b")
    assert again.code == 1 and again.errors == ["error: no source 'b' (there are: a)"]

    (tmp_path / "config.yaml").write_text(json.dumps({"sources": [{"id": "c", "url": LIVE}]}))
    service.process.send_signal(signal.SIGHUP)
    until("SIGHUP: added c; removed a")
    (tmp_path / "config.yaml").write_text("sources: 3")
    service.process.send_signal(signal.SIGHUP)
    until("SIGHUP: the sources stay as they are: ")
    done = service.end()
    assert done.code == 0 and CANARY not in done.err + done.out + listed + added.out


def test_no_service_is_one_line(tmp_path: Path, port: int) -> None:
    done = sightwire(tmp_path, "sources", "list")
    assert done.code == 1 and len(done.errors) == 1
    assert done.err.startswith(f"error: no service at http://127.0.0.1:{port} ")
