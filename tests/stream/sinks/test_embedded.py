"""The embedded server: real processes started, killed, shared and stopped."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from stream.errors import SinkError
from stream.sinks.embedded import EmbeddedServer, running_url
from stream.sinks.redis import RedisSink


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text() if Path("/proc").is_dir() else ""
    return " Z " not in state


async def test_what_was_acknowledged_survives_a_kill(server: Any, make_event: Any) -> None:
    sink = RedisSink(server.url, timeout_s=60.0)
    batch = [make_event(number) for number in range(100)]
    await sink.publish(batch)
    url = server.url
    await server.kill()
    await server.restart()
    assert server.url == url, "the address stays"
    with pytest.raises(SinkError):  # the old connection is noticed to be gone
        await sink.publish(batch)
    assert await sink.publish(batch) == [False] * 100
    await sink.aclose()


async def test_it_listens_on_loopback_only(server: Any, redis: Any) -> None:
    found = await redis.config_get("*")
    assert found["bind"] == "127.0.0.1"
    assert found["protected-mode"] == "yes"
    assert found["appendonly"] == "yes"


async def test_start_and_stop_can_be_repeated_and_keep_the_data(tmp_path: Path, make_event: Any) -> None:
    server = EmbeddedServer(tmp_path / "valkey")
    with pytest.raises(SinkError, match="not started"):
        _ = server.url
    await server.start()
    pid = server.pid
    assert await server.start() == server.url
    assert server.pid == pid is not None
    sink = RedisSink(server.url, timeout_s=60.0)
    assert await sink.publish([make_event(1)]) == [True]
    await sink.aclose()
    await server.stop()
    await server.stop()
    assert not _alive(pid)
    assert await running_url(tmp_path / "valkey") is None
    sink = RedisSink(await server.start(), timeout_s=60.0)
    assert await sink.publish([make_event(1)]) == [False]
    await sink.aclose()
    await server.stop()


async def test_a_second_service_shares_the_server_and_takes_over(tmp_path: Path) -> None:
    first, second = EmbeddedServer(tmp_path), EmbeddedServer(tmp_path)
    url = await first.start()
    assert await second.start() == url
    assert await running_url(tmp_path) == url
    assert second.pid is None
    await second.stop()
    assert await running_url(tmp_path) == url, "who does not own it does not stop it"
    await second.start()
    await first.stop()
    assert await second.start() == url
    assert second.pid is not None
    await second.stop()


async def test_two_services_starting_at_once_share_one_server(tmp_path: Path) -> None:
    servers = [EmbeddedServer(tmp_path) for _ in range(4)]
    urls = await asyncio.gather(*(server.start() for server in servers))
    assert len(set(urls)) == 1
    assert sum(server.pid is not None for server in servers) == 1
    for server in servers:
        await server.stop()


async def test_a_port_taken_meanwhile_is_replaced(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path)
    await server.start()
    port = int(server.url.rpartition(":")[2])
    await server.stop()
    with socket.create_server(("127.0.0.1", port)):
        assert await server.start() != f"redis://127.0.0.1:{port}"
        await server.stop()


async def test_watch_restarts_a_killed_server(server: Any, eventually: Any) -> None:
    watching = asyncio.create_task(server.embedded.watch(period_s=0.02))
    await asyncio.sleep(0)
    first = server.pid
    os.kill(first, signal.SIGKILL)
    await eventually(lambda: server.embedded.pid not in (first, None))
    watching.cancel()
    assert await running_url(server.embedded._folder) == server.url


async def test_a_hanging_server_is_not_doubled(server: Any) -> None:
    pid, folder = server.pid, server.embedded._folder
    server.freeze()
    try:
        with pytest.raises(SinkError, match="does not answer") as caught:
            await server.restart()
        assert caught.value.retryable
        assert await running_url(folder) == server.url
    finally:
        server.thaw()
    await server.restart()
    assert server.pid == pid


async def test_a_damaged_data_file_is_told(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path)
    await server.start()
    await server.stop()
    manifest = next((tmp_path / "appendonlydir").glob("*.manifest"))
    manifest.write_text("nonsense\n")
    with pytest.raises(SinkError, match="does not start") as caught:
        await server.start()
    assert "\n" not in str(caught.value)
    assert not caught.value.retryable
    await server.stop()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}'])
async def test_a_damaged_state_file_does_no_harm(tmp_path: Path, text: str) -> None:
    (tmp_path / "server.json").write_text(text)
    server = EmbeddedServer(tmp_path)
    await server.start()
    assert json.loads((tmp_path / "server.json").read_text())["pid"] == server.pid
    await server.stop()


async def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SinkError, match="SIGHTWIRE_HOME"):
        await EmbeddedServer(tmp_path / "file" / "valkey").start()


_SERVICE = """
import asyncio, sys
from pathlib import Path
from stream.sinks.embedded import EmbeddedServer

async def main():
    server = EmbeddedServer(Path(sys.argv[1]))
    await server.start()
    print(server.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
async def test_a_killed_service_leaves_no_orphan(tmp_path: Path, eventually: Any) -> None:
    service = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _SERVICE, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert service.stdout is not None
    pid = int(await service.stdout.readline())
    assert _alive(pid)
    service.kill()
    await service.wait()
    await eventually(lambda: not _alive(pid))
    again = EmbeddedServer(tmp_path)
    await again.start()
    await again.stop()


async def test_an_orphan_is_adopted(tmp_path: Path) -> None:
    first = EmbeddedServer(tmp_path)
    url = await first.start()
    assert first._lock is not None
    first._lock.close()  # as the kernel does for a killed service; without PR_SET_PDEATHSIG its server lives on
    second = EmbeddedServer(tmp_path)
    assert await second.start() == url
    assert first.pid is not None
    await second.stop()
    assert first._process is not None
    await asyncio.wait_for(first._process.wait(), 60)
    first._lock = None
    await first.stop()
