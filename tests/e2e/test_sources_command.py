"""`sightwire run --stay` and `sightwire sources`, as a person uses them."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from stream.api import Api
from tests.e2e.command import Running, free_port, sightwire

LIVE = "synthetic://scene?fps=25&width=64&height=36&brightness=0:0.8"
CANARY = "hunter2canary"
PATIENCE_S = 120.0
"""For anything that has to happen; machines may be slow."""


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
    running = start(tmp_path, tiny_pack, port)
    yield running
    running.kill()


def start(home: Path, pack: Path, port: int) -> Running:
    options = ["--stay", "-q", "-c", str(home / "config.yaml"), "--pack", str(pack), "--http-port", str(port)]
    return Running(home, "run", *options)


def test_sources_come_and_go_from_the_command_line(service: Running, tmp_path: Path) -> None:
    def until(text: str) -> None:
        service.wait_for(lambda said: text in said, timeout_s=PATIENCE_S)

    until("source a: live")
    added = sightwire(tmp_path, "sources", "add", "b", f"rtsp://user:{CANARY}@127.0.0.1:9/x", "--set", "audio=false")
    assert added.code == 0 and added.out.startswith("source b: "), added.err
    until("connection refused")
    listed = sightwire(tmp_path, "sources", "list").out
    assert "live" in listed and "rtsp://127.0.0.1:9/x" in listed and "connection refused" in listed
    assert json.loads(sightwire(tmp_path, "sources", "show", "b", "--json").out)["settings"]["audio"] is False
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


def test_what_was_added_is_there_again_after_a_kill(
    service: Running, tmp_path: Path, tiny_pack: Path, port: int
) -> None:
    kept = tmp_path / "sources.json"
    service.wait_for(lambda said: "source a: live" in said, timeout_s=PATIENCE_S)
    away = f"rtsp://user:{CANARY}@127.0.0.1:9/x"
    api = Api(f"http://127.0.0.1:{port}")
    for source_id, url in {"b": LIVE, "c": LIVE, "d": LIVE, "e": away}.items():
        assert api.call("POST", "/v1/sources", {"id": source_id, "url": url})["kept"]
    api.call("PATCH", "/v1/sources/b", {"hop_s": 1})
    api.call("DELETE", "/v1/sources/c")
    service.process.kill()
    service.process.wait(30)
    assert kept.stat().st_mode & 0o777 == 0o600
    told = service.text()

    # Meanwhile the operator has named one of them himself.
    config = json.loads((tmp_path / "config.yaml").read_text())
    config["sources"].append({"id": "d", "url": LIVE, "audio": False})
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    again = start(tmp_path, tiny_pack, port)
    try:
        again.wait_for(lambda said: "source b: live" in said, timeout_s=PATIENCE_S)
        assert "source d: the configuration's is watched" in again.text()
        found = {one["id"]: one for one in api.call("GET", "/v1/sources")}
        assert set(found) == {"a", "b", "d", "e"}
        assert found["b"]["settings"]["hop_s"] == 1.0 and found["d"]["settings"]["audio"] is False
        assert again.end().code == 0
    finally:
        again.kill()
    assert [entry["id"] for entry in json.loads(kept.read_text())["sources"]] == ["b", "e"]

    kept.write_text(kept.read_text()[:-20])
    third = start(tmp_path, tiny_pack, port)
    try:
        third.wait_for(lambda said: "source a: live" in said, timeout_s=PATIENCE_S)
        assert "sources.json cannot be read (it is no JSON): kept as " in third.text()
        assert [one["id"] for one in api.call("GET", "/v1/sources")] == ["a", "d"]
        assert third.end().code == 0
    finally:
        third.kill()
    assert CANARY not in told + again.text() + third.text()


def test_a_file_that_is_being_written_swapped_or_gone(tmp_path: Path, tiny_pack: Path, port: int) -> None:
    """Mounted as Kubernetes does it: the file is a link into a folder that is a link, which is renamed over."""

    def publish(version: str, content: str) -> None:
        folder = tmp_path / version
        folder.mkdir()
        (folder / "config.yaml").write_text(content)
        (tmp_path / "..new").symlink_to(version)
        (tmp_path / "..new").rename(tmp_path / "..data")

    def sources(*ids: str) -> str:
        return json.dumps({"sources": [{"id": source_id, "url": LIVE} for source_id in ids]}, indent=1)

    def hang_up(said: str) -> None:
        before = running.text().count(said)
        running.process.send_signal(signal.SIGHUP)
        running.wait_for(lambda text: text.count(said) > before, timeout_s=PATIENCE_S)

    publish("v1", sources("a"))
    (tmp_path / "config.yaml").symlink_to("..data/config.yaml")
    running = start(tmp_path, tiny_pack, port)
    try:
        running.wait_for(lambda said: "source a: live" in said, timeout_s=PATIENCE_S)
        publish("v2", sources("a", "b"))
        hang_up("SIGHUP: added b\n")
        hang_up("SIGHUP: no source differs\n")
        unchanged = "SIGHUP: the sources stay as they are: "
        whole = sources("a", "b")
        for number, cut in enumerate((0, 1, len(whole) // 2, len(whole) - 2)):
            publish(f"half-{number}", whole[:cut])
            hang_up(unchanged)
        publish("other", "packs: [{name: tiny}]\n")
        hang_up(f"{unchanged}there is no word of sources")
        (tmp_path / "..data").unlink()
        hang_up(f"{unchanged}{tmp_path / 'config.yaml'}: cannot be read: No such file or directory")
        publish("v3", sources("b", "c"))
        hang_up("SIGHUP: added c; removed a\n")
        publish("v4", json.dumps({"sources": []}))
        hang_up("SIGHUP: removed b, c\n")
        assert running.end().code == 0
    finally:
        running.kill()


def test_no_service_is_one_line(tmp_path: Path, port: int) -> None:
    done = sightwire(tmp_path, "sources", "list")
    assert done.code == 1 and len(done.errors) == 1
    assert done.err.startswith(f"error: no service at http://127.0.0.1:{port} (connection refused); ")
