"""The Redis sink against real servers."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from stream.errors import EventRejected, SinkError
from stream.sinks.embedded import EmbeddedServer
from stream.sinks.redis import RedisSink, seen_key, stream_key
from stream.sinks.redis_errors import open_client

ACTIONS = "sightwire:events:action"
PATIENCE_S = 30.0
"""For a server that does answer; machines may be slow."""


@pytest.fixture
async def sink(server: Any) -> Any:
    made = RedisSink(server.url, timeout_s=PATIENCE_S, connect_timeout_s=PATIENCE_S)
    yield made
    await made.aclose()


async def test_an_entry_holds_cloudevents_attributes_and_json(sink: Any, redis: Any, make_event: Any) -> None:
    assert await sink.publish([make_event(1, text="é")]) == [True]
    ((_, fields),) = await redis.xrange(ACTIONS)
    assert json.loads(fields.pop("data")) == {"seq": 1, "text": "é"}
    assert fields == {
        "specversion": "1.0",
        "id": "gate-action-1",
        "source": "/sources/gate",
        "type": "io.sightwire.action.start.v1",
        "time": "2026-03-01T12:00:00.000000Z",
        "subject": "fall",
        "datacontenttype": "application/json",
        "dataschema": "urn:sightwire:event:v1",
    }


async def test_a_batch_says_which_were_new_and_keeps_their_order(sink: Any, redis: Any, make_event: Any) -> None:
    await sink.publish([make_event(2)])
    batch = [make_event(1), make_event(2), make_event(1, kind="class"), make_event(3), make_event(3)]
    assert await sink.publish(batch) == [True, False, True, True, False]
    assert [json.loads(fields["data"])["seq"] for _, fields in await redis.xrange(ACTIONS)] == [2, 1, 3]
    assert await redis.xlen("sightwire:events:class") == 1
    assert await sink.publish([]) == []


async def test_ids_are_remembered_for_as_long_as_asked(server: Any, redis: Any, make_event: Any) -> None:
    sink = RedisSink(server.url, timeout_s=PATIENCE_S, dedupe_s=7700)
    await sink.publish([make_event(1)])
    assert 7000 < await redis.ttl(seen_key("sightwire", "action", "gate-action-1")) <= 7700
    await sink.aclose()


async def test_streams_are_trimmed(server: Any, redis: Any, make_event: Any) -> None:
    sink = RedisSink(server.url, timeout_s=PATIENCE_S, maxlen=100)
    await sink.publish([make_event(number) for number in range(1000)])
    assert 100 <= await redis.xlen(ACTIONS) <= 200  # trimmed by whole nodes of 100 entries
    await sink.aclose()


async def test_a_script_forgotten_by_the_server_is_sent_again(sink: Any, redis: Any, make_event: Any) -> None:
    await sink.publish([make_event(1)])
    await redis.script_flush()
    assert await sink.publish([make_event(1), make_event(2)]) == [False, True]


async def test_a_retry_after_an_unknown_outcome_adds_nothing(server: Any, redis: Any, make_event: Any) -> None:
    """The server executes the append, and the connection dies before its answer arrives."""
    upstream = int(server.url.rpartition(":")[2])
    swallowed = asyncio.Event()

    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", upstream)

        async def there() -> None:
            while data := await reader.read(65536):
                up_writer.write(data)

        there_task = asyncio.create_task(there())
        while data := await up_reader.read(65536):
            if not swallowed.is_set() and b"\r\n:1\r\n" in b"\r\n" + data:  # the script's answer: [1]
                swallowed.set()
                break
            writer.write(data)
        writer.close()
        up_writer.close()
        await there_task

    async with await asyncio.start_server(cut, "127.0.0.1", 0) as relay:
        port = relay.sockets[0].getsockname()[1]
        sink = RedisSink(f"redis://127.0.0.1:{port}", timeout_s=PATIENCE_S)
        with pytest.raises(SinkError) as caught:
            await sink.publish([make_event(1)])
        assert caught.value.retryable
        assert swallowed.is_set()
        assert await redis.xlen(ACTIONS) == 1
        assert await sink.publish([make_event(1), make_event(2)]) == [False, True]
        assert await redis.xlen(ACTIONS) == 2
        await sink.aclose()


async def test_a_frozen_server_is_a_timeout_to_retry(server: Any, sink: Any, redis: Any, make_event: Any) -> None:
    hasty = RedisSink(server.url, timeout_s=0.2, connect_timeout_s=PATIENCE_S)
    await sink.publish([make_event(1)])
    server.freeze()
    try:
        with pytest.raises(SinkError, match="did not answer in time") as caught:
            await hasty.publish([make_event(2)])
    finally:
        server.thaw()
    assert (caught.value.retryable, caught.value.reason) == (True, "timeout")
    await sink.publish([make_event(2), make_event(3)])
    assert await redis.xlen(ACTIONS) == 3
    await hasty.aclose()


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("127.0.0.1:{free}", r"cannot be reached \(connection refused\); check the address"),
        ("nobody.invalid:{free}", r"cannot be reached \(no such host\); check the address"),
        ("127.0.0.1:{used}/99", "has no database of that number; correct"),
    ],
)
async def test_what_is_wrong_with_an_address_is_said_with_the_remedy(server: Any, place: str, expected: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    url = "redis://" + place.format(free=free, used=server.url.rpartition(":")[2])
    sink = RedisSink(url, timeout_s=PATIENCE_S, connect_timeout_s=PATIENCE_S)
    with pytest.raises(SinkError, match=expected) as caught:
        await sink.check()
    assert "Errno" not in str(caught.value) and "Error 1" not in str(caught.value)
    await sink.aclose()


async def test_a_dead_server_is_a_lost_connection_to_retry(server: Any, sink: Any, make_event: Any) -> None:
    await sink.publish([make_event(1)])
    await server.kill()
    for _ in range(2):
        with pytest.raises(SinkError, match="cannot be reached") as caught:
            await sink.publish([make_event(2)])
        assert (caught.value.retryable, caught.value.reason) == (True, "connection")
    await server.restart()
    assert await sink.publish([make_event(1), make_event(2)]) == [False, True]


@pytest.mark.parametrize("where", ["redis://:hunter2@", "redis://svc:hunter2@"])
async def test_a_wrong_password_is_not_retried_and_not_shown(
    server: Any, redis: Any, make_event: Any, where: str
) -> None:
    await redis.config_set("requirepass", "right")
    sink = RedisSink(server.url.replace("redis://", where))
    with pytest.raises(SinkError, match="user name or password") as caught:
        await sink.publish([make_event(1)])
    assert (caught.value.retryable, caught.value.reason) == (False, "auth")
    assert "hunter2" not in str(caught.value)
    assert not isinstance(caught.value, EventRejected)
    await sink.aclose()


async def test_a_missing_password_is_not_retried(server: Any, redis: Any, make_event: Any) -> None:
    await redis.config_set("requirepass", "right")
    sink = RedisSink(server.url)
    with pytest.raises(SinkError, match="password") as caught:
        await sink.check()
    assert not caught.value.retryable
    await sink.aclose()


async def test_a_key_of_another_type_rejects_the_event(sink: Any, redis: Any, make_event: Any) -> None:
    await redis.set(ACTIONS, "not a stream")
    with pytest.raises(EventRejected, match="not a stream"):
        await sink.publish([make_event(1)])
    await redis.delete(ACTIONS)
    assert await sink.publish([make_event(1)]) == [True], "a refused append must not be remembered as done"


async def test_an_event_that_is_not_json_is_rejected(sink: Any, make_event: Any) -> None:
    for value in (float("nan"), object(), b"bytes"):
        with pytest.raises(EventRejected, match="not JSON"):
            await sink.publish([make_event(1, value=value)])


async def test_a_server_out_of_memory_is_retried(sink: Any, redis: Any, make_event: Any) -> None:
    await redis.config_set("maxmemory", "1")
    with pytest.raises(SinkError, match="out of memory") as caught:
        await sink.publish([make_event(1)])
    assert (caught.value.retryable, caught.value.reason) == (True, "oom")
    await redis.config_set("maxmemory", "0")
    assert await sink.publish([make_event(1)]) == [True]


async def test_a_replica_is_retried(sink: Any, redis: Any, make_event: Any) -> None:
    await redis.execute_command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(SinkError, match="primary") as caught:
        await sink.publish([make_event(1)])
    assert (caught.value.retryable, caught.value.reason) == (True, "readonly")
    with pytest.raises(SinkError, match=r"read-only replica; give the address of the primary$"):
        await sink.check()


async def test_a_user_without_the_right_is_told(server: Any, redis: Any, make_event: Any) -> None:
    await redis.execute_command("ACL", "SETUSER", "svc", "on", ">pw", "~*", "+@all", "-eval", "-evalsha")
    sink = RedisSink(server.url.replace("redis://", "redis://svc:pw@"))
    with pytest.raises(SinkError, match="it needs") as caught:
        await sink.publish([make_event(1)])
    assert (caught.value.retryable, caught.value.reason) == (False, "permission")
    with pytest.raises(SinkError, match="it needs"):
        await sink.check()
    # What the message asks for is enough.
    needed = re.findall(r"\+[a-z|]+", str(caught.value).partition("(")[0])
    await redis.execute_command("ACL", "SETUSER", "svc", "reset", "on", ">pw", "~sightwire:*", *needed)
    assert "valkey" in await sink.check()
    assert await sink.publish([make_event(1)]) == [True]
    await sink.aclose()


async def test_something_that_is_not_redis_is_an_error(make_event: Any) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as web:
        sink = RedisSink(f"redis://127.0.0.1:{web.sockets[0].getsockname()[1]}", timeout_s=PATIENCE_S)
        with pytest.raises(SinkError, match=r"Redis at redis://127\.0\.0\.1"):
            await sink.check()
        await sink.aclose()


@pytest.mark.parametrize("url", ["localhost:6379", "http://localhost", "redis://localhost:port"])
def test_a_bad_address_is_refused_at_once(url: str) -> None:
    with pytest.raises(SinkError, match="not a Redis address") as caught:
        RedisSink(url)
    assert not caught.value.retryable


async def test_both_keys_of_an_append_share_a_cluster_slot(tmp_path: Path, make_event: Any) -> None:
    """A server in cluster mode checks the slots of every script call."""
    with socket.create_server(("127.0.0.1", 0)) as probe:  # the default, 10000 above, may be beyond 65535
        bus_port = str(probe.getsockname()[1])
    server = EmbeddedServer(tmp_path / "cluster", options={"cluster-enabled": "yes", "cluster-port": bus_port})
    url = await server.start()
    client = open_client(url, timeout_s=PATIENCE_S, connect_timeout_s=PATIENCE_S, name="test")
    sink = RedisSink(url, timeout_s=PATIENCE_S)
    try:
        with pytest.raises(SinkError, match="cluster") as caught:
            await sink.publish([make_event(1)])
        assert caught.value.retryable
        await client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        async with asyncio.timeout(PATIENCE_S):
            while (await client.execute_command("CLUSTER", "INFO")).find("cluster_state:ok") < 0:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        batch = [make_event(1), make_event(2), make_event(1, kind="class")]
        assert await sink.publish(batch) == [True, True, True]
        slots = {
            await client.execute_command("CLUSTER", "KEYSLOT", key)
            for key in (stream_key("sightwire", "class"), seen_key("sightwire", "class", "gate-class-1"))
        }
        assert len(slots) == 1
    finally:
        await sink.aclose()
        await client.aclose()
        await server.stop()
