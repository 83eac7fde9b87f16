"""Real Valkey servers and events for the tests of everything that talks to Redis."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from redis.asyncio import Redis

from stream.clock import ManualClock
from stream.sinks.embedded import EmbeddedServer
from stream.sinks.redis_errors import open_client
from stream.types import Event

MakeEvent = Callable[..., Event]


@pytest.fixture
def make_event() -> MakeEvent:
    """A factory: ``make_event(7, source="gate", kind="class")``."""

    def make(number: int, *, source: str = "gate", kind: str = "action", **data: object) -> Event:
        return Event(
            id=f"{source}-{kind}-{number}",
            type=f"io.sightwire.{kind}.start.v1",
            source=f"/sources/{source}",
            time="2026-03-01T12:00:00.000000Z",
            subject="fall",
            kind=kind,
            data={"seq": number, **data},
            capture_wall_ns=number,
            made_ns=number,
        )

    return make


@pytest.fixture
def clock() -> ManualClock:
    """A clock that moves only when told to."""
    return ManualClock()


class Server:
    """A Valkey server of a test's own, to be frozen, killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.embedded = EmbeddedServer(folder)

    @property
    def url(self) -> str:
        return self.embedded.url

    @property
    def pid(self) -> int:
        assert self.embedded.pid is not None
        return self.embedded.pid

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    async def kill(self) -> None:
        process = self.embedded._process
        assert process is not None
        process.kill()
        await process.wait()

    async def restart(self) -> None:
        await self.embedded.start()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    """A running server with an empty data folder."""
    made = Server(tmp_path / "valkey")
    await made.embedded.start()
    try:
        yield made
    finally:
        await made.embedded.stop()


@pytest.fixture
async def redis(server: Server) -> AsyncIterator[Redis]:
    """A plain client of ``server``."""
    client = open_client(server.url, timeout_s=60.0, connect_timeout_s=60.0, name="test")
    try:
        yield client
    finally:
        await client.aclose()


@pytest.fixture
def eventually() -> Callable[[Callable[[], object]], object]:
    """``await eventually(condition)``: wait until it is true; the test's timeout bounds it."""

    async def wait(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 - what is waited for happens in another process
                await asyncio.sleep(0.005)

    return wait
