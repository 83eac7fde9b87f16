"""A failover behind one address: the old primary lives on as a replica, and keeps its connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from stream.client import subscribe
from stream.errors import SinkError
from stream.sinks.embedded import EmbeddedServer
from stream.sinks.redis import RedisSink


class Address:
    """A port that leads to one server and, for new connections, later to another."""

    def __init__(self, port: int) -> None:
        self.leads_to = port
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self.leads_to)
        await asyncio.gather(_pump(reader, there_writer), _pump(there_reader, writer))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()


@pytest.fixture
async def other(tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    """The primary to be."""
    made = EmbeddedServer(tmp_path / "other")
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def address(server: Any) -> AsyncIterator[Address]:
    made = Address(_port(server.url))
    listener = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.port = listener.sockets[0].getsockname()[1]
    yield made
    listener.close()


def _port(url: str) -> int:
    return int(url.rpartition(":")[2])


async def test_events_follow_a_failover(server: Any, redis: Any, other: Any, address: Address, make_event: Any) -> None:
    sink = RedisSink(f"redis://127.0.0.1:{address.port}", timeout_s=60.0, connect_timeout_s=60.0)
    assert await sink.publish([make_event(1)]) == [True]
    address.leads_to = _port(other.url)
    await redis.execute_command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(SinkError) as caught:
        await sink.publish([make_event(2)])
    assert (caught.value.retryable, caught.value.reason) == (True, "readonly")
    assert await sink.publish([make_event(2)]) == [True], "the next attempt is made where the address leads now"
    await sink.aclose()


async def test_consumers_follow_a_failover(
    server: Any, redis: Any, other: Any, address: Address, make_event: Any
) -> None:
    old, new = RedisSink(server.url, timeout_s=60.0), RedisSink(other.url, timeout_s=60.0)
    await old.publish([make_event(1)])
    url = f"redis://127.0.0.1:{address.port}"
    async with subscribe(url, group="g", consumer="one", start="0", block_s=0.05) as events, asyncio.timeout(60):
        assert (await anext(events)).data["seq"] == 1
        address.leads_to = _port(other.url)
        await redis.execute_command("REPLICAOF", "127.0.0.1", "1")
        await new.publish([make_event(2)])
        assert (await anext(events)).data["seq"] == 2
    await old.aclose()
    await new.aclose()
