"""Consumers on real servers: groups, crashes, poison, lost data, restarts."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from stream.client import follow, subscribe
from stream.clock import NS_PER_S, ManualClock
from stream.errors import ClientError
from stream.received import ReceivedEvent, parse_entry
from stream.sinks.redis import RedisSink

ACTIONS = "sightwire:events:action"


@pytest.fixture
async def sink(server: Any) -> Any:
    made = RedisSink(server.url, timeout_s=60.0)
    yield made
    await made.aclose()


async def _take(events: Any, count: int) -> list[int]:
    """Sequence numbers of the next ``count`` events; each but the last is acknowledged by asking for the next."""
    found: list[int] = []
    async with asyncio.timeout(60):
        async for event in events:
            found.append(event.data["seq"])
            if len(found) == count:
                break
    return found


def _group(server: Any, consumer: str = "one", **options: Any) -> Any:
    return subscribe(server.url, group="g", consumer=consumer, **{"start": "0", "block_s": 0.05, **options})


async def test_a_group_gets_every_event_once(server: Any, sink: Any, redis: Any, make_event: Any) -> None:
    await sink.publish([make_event(n) for n in range(100)])
    async with _group(server) as events:
        assert await _take(events, 100) == list(range(100))
    assert (await redis.xpending(ACTIONS, "g"))["pending"] == 0
    async with _group(server) as events:
        await sink.publish([make_event(100)])
        assert await _take(events, 1) == [100]


async def test_an_event_arrives_as_it_was_published(server: Any, sink: Any, make_event: Any) -> None:
    await sink.publish([make_event(7, kind="class", text="é")])
    async with _group(server) as events:
        event = await anext(events)
    assert (event.kind, event.phase, event.source_id, event.subject) == ("class", "start", "gate", "fall")
    assert event.data == {"seq": 7, "text": "é"}
    assert (event.stream, event.deliveries) == ("sightwire:events:class", 1)
    assert event.appended_ms > 1_600_000_000_000
    assert event.mask() is None


async def test_a_new_group_starts_from_now_on_by_default(server: Any, sink: Any, make_event: Any) -> None:
    await sink.publish([make_event(1)])
    async with _group(server, start="$") as events:
        await sink.publish([make_event(2)])
        assert await _take(events, 1) == [2]


async def test_kinds_and_sources_are_chosen(server: Any, sink: Any, redis: Any, make_event: Any) -> None:
    await sink.publish([make_event(1, source="yard"), make_event(2, kind="class"), make_event(3)])
    async with _group(server, kinds=["action"], sources=["gate"]) as events:
        assert await _take(events, 1) == [3]
    assert (await redis.xpending(ACTIONS, "g"))["pending"] == 0, "what is filtered out is done with"


async def test_consumers_of_a_group_share_the_events(server: Any, sink: Any, make_event: Any) -> None:
    await sink.publish([make_event(n) for n in range(40)])
    async with _group(server, batch=10) as one, _group(server, "two", batch=10) as two:
        first = await _take(one, 10)
        second = await _take(two, 10)
        rest = await _take(one, 20)
    assert sorted(first + second + rest) == list(range(40))


async def test_what_a_loop_body_failed_on_comes_again(server: Any, sink: Any, make_event: Any) -> None:
    await sink.publish([make_event(n) for n in range(3)])
    with pytest.raises(RuntimeError, match="body"):
        async with _group(server) as events:
            async for event in events:
                if event.data["seq"] == 1:
                    raise RuntimeError("body")
    async with _group(server) as events:
        event = await anext(events)
        assert (event.data["seq"], event.deliveries) == (1, 2)
        assert await _take(events, 1) == [2]


async def test_explicit_acknowledgement(server: Any, sink: Any, redis: Any, make_event: Any) -> None:
    await sink.publish([make_event(n) for n in range(3)])
    async with _group(server, auto_ack=False) as events:
        got = [await anext(events) for _ in range(3)]
        await events.ack(got[1])
    assert (await redis.xpending(ACTIONS, "g"))["pending"] == 2
    async with _group(server) as events:
        assert await _take(events, 2) == [0, 2]


async def _age(redis: Any, consumer: str, seconds: int) -> None:
    """What a consumer holds, as if it had held it for so long."""
    held = [one["message_id"] for one in await redis.xpending_range(ACTIONS, "g", "-", "+", 100, consumer)]
    await redis.xclaim(ACTIONS, "g", consumer, 0, held, idle=seconds * 1000, justid=True)


async def test_a_peer_takes_over_from_a_crashed_consumer(server: Any, sink: Any, redis: Any, make_event: Any) -> None:
    await sink.publish([make_event(n) for n in range(5)])
    crashed = _group(server, "one")
    assert await _take(crashed, 2) == [0, 1]
    await crashed.aclose()
    await _age(redis, "one", 1000)
    async with _group(server, "two", claim_idle_s=999) as events:
        found = [await asyncio.wait_for(anext(events), 60) for _ in range(4)]
    assert [event.data["seq"] for event in found] == [1, 2, 3, 4], "0 was acknowledged, the others were not"
    assert {event.deliveries for event in found} == {2}


async def test_a_poison_event_becomes_a_dead_letter(server: Any, sink: Any, redis: Any, make_event: Any) -> None:
    await sink.publish([make_event(0), make_event(1)])
    for attempt in range(1, 6):
        with pytest.raises(RuntimeError):
            async with _group(server, batch=1) as events:
                event = await anext(events)
                assert (event.data["seq"], event.deliveries) == (0, attempt)
                raise RuntimeError("crash")
    async with _group(server, batch=1) as events:
        assert await _take(events, 1) == [1]
    ((_, dead),) = await redis.xrange("sightwire:events:dead")
    assert json.loads(dead["data"]) == {"seq": 0}
    assert (dead["dead_stream"], dead["dead_group"], dead["dead_deliveries"]) == (ACTIONS, "g", "5")
    assert (await redis.xpending(ACTIONS, "g"))["pending"] == 0


async def test_a_foreign_entry_becomes_a_dead_letter_at_once(
    server: Any, sink: Any, redis: Any, make_event: Any
) -> None:
    await redis.xadd(ACTIONS, {"hello": b"\xff\xfe"})
    await redis.xadd(ACTIONS, {"id": "x", "type": "t", "source": "s", "time": "", "subject": "", "data": "{"})
    await sink.publish([make_event(1)])
    async with _group(server) as events:
        assert await _take(events, 1) == [1]
    reasons = [fields["dead_reason"] for _, fields in await redis.xrange("sightwire:events:dead")]
    assert "no field 'data'" in reasons[0]
    assert "not JSON" in reasons[1]


async def test_entries_trimmed_while_pending_are_passed_over(
    server: Any, sink: Any, redis: Any, make_event: Any
) -> None:
    await sink.publish([make_event(n) for n in range(3)])
    first = _group(server)
    assert await _take(first, 1) == [0]
    await first.aclose()
    await redis.xtrim(ACTIONS, maxlen=1, approximate=False)
    async with _group(server) as events:
        assert await _take(events, 1) == [2]
    assert (await redis.xpending(ACTIONS, "g"))["pending"] == 0


@pytest.mark.parametrize("loss", ["flushall", "destroy"])
async def test_a_lost_group_is_made_again_where_it_was(
    server: Any, sink: Any, redis: Any, make_event: Any, loss: str
) -> None:
    await sink.publish([make_event(n) for n in range(3)])
    async with _group(server) as events:
        assert await _take(events, 3) == [0, 1, 2]
        if loss == "flushall":
            await redis.flushall()
        else:
            await redis.xgroup_destroy(ACTIONS, "g")
        await sink.publish([make_event(3), make_event(4)])
        assert await _take(events, 2) == [3, 4], "nothing is missed and nothing comes twice"


async def test_a_group_lost_while_waiting_is_made_again(server: Any, sink: Any, redis: Any, make_event: Any) -> None:
    async with _group(server, block_s=5.0) as events:
        waiting = asyncio.create_task(_take(events, 1))
        async with asyncio.timeout(60):
            while (await redis.info("clients"))["blocked_clients"] == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        await redis.flushall()
        await sink.publish([make_event(1)])
        assert await waiting == [1]


async def test_a_restart_of_the_server_is_ridden_out(server: Any, make_event: Any) -> None:
    numbers: list[int] = []

    async def consume() -> None:
        async with _group(server, "two") as events:
            async for event in events:
                numbers.append(event.data["seq"])
                if event.data["seq"] == 19:
                    return

    sink = RedisSink(server.url, timeout_s=60.0)
    await sink.publish([make_event(n) for n in range(10)])
    consuming = asyncio.create_task(consume())
    async with asyncio.timeout(60):
        while len(numbers) < 10:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    await server.kill()
    await asyncio.sleep(0.1)
    await server.restart()
    await sink.aclose()
    sink = RedisSink(server.url, timeout_s=60.0)
    await sink.publish([make_event(n) for n in range(20)])
    await asyncio.wait_for(consuming, 60)
    assert sorted(set(numbers)) == list(range(20))
    assert len(numbers) <= 21, "only what was in hand when the connection broke may come twice"
    await sink.aclose()


async def test_a_slow_consumer_keeps_what_it_holds(server: Any, sink: Any, redis: Any, make_event: Any) -> None:
    await sink.publish([make_event(n) for n in range(4)])
    clock = ManualClock()
    async with _group(server, claim_idle_s=600, clock=clock) as slow:
        found = [(await anext(slow)).data["seq"]]
        while len(found) < 4:  # each takes half of the idle time
            clock.advance(300 * NS_PER_S)
            await _age(redis, "one", 300)
            found.append((await anext(slow)).data["seq"])
            held = await redis.xpending_range(ACTIONS, "g", "-", "+", 100, "one")
            assert len(held) == 5 - len(found) and all(one["time_since_delivered"] < 300_000 for one in held)
        assert found == [0, 1, 2, 3]


async def test_what_cannot_work_is_told_at_once(server: Any, redis: Any) -> None:
    with pytest.raises(ClientError, match="not a Redis address"):
        subscribe("localhost", group="g", consumer="c")
    with pytest.raises(ClientError, match="no such kind of event: dance"):
        subscribe(server.url, group="g", consumer="c", kinds=["dance"])
    with pytest.raises(ClientError, match="cannot be reached"):
        await anext(subscribe("redis://127.0.0.1:1", group="g", consumer="c"))
    await redis.config_set("requirepass", "right")
    with pytest.raises(ClientError, match="password") as caught:
        await anext(subscribe(server.url.replace("//", "//:hunter2@"), group="g", consumer="c"))
    assert "hunter2" not in str(caught.value)


async def test_follow_shows_the_backlog_and_then_what_comes(server: Any, sink: Any, make_event: Any) -> None:
    for number in range(6):
        await sink.publish([make_event(number, kind="class" if number % 2 else "action")])
        await asyncio.sleep(0.002)  # between streams, order is that of the server's milliseconds
    events = follow(server.url, backlog=3, block_s=0.05)
    assert await _take(events, 3) == [3, 4, 5]
    await sink.publish([make_event(6, kind="source"), make_event(7)])
    assert sorted(await _take(events, 2)) == [6, 7]
    await events.aclose()


async def test_follow_filters(server: Any, sink: Any, redis: Any, make_event: Any) -> None:
    events = follow(server.url, kinds=["action"], sources=["gate"], backlog=10, block_s=0.05)
    await redis.xadd(ACTIONS, {"not": "ours"})
    await sink.publish([make_event(1, source="yard"), make_event(2, kind="class"), make_event(3)])
    assert await _take(events, 1) == [3]
    await events.aclose()


async def test_follow_rides_out_a_restart(server: Any, make_event: Any) -> None:
    sink = RedisSink(server.url, timeout_s=60.0)
    await sink.publish([make_event(1)])
    events = follow(server.url, backlog=1, block_s=0.05)
    assert await _take(events, 1) == [1]
    await server.kill()
    following = asyncio.create_task(_take(events, 1))
    await asyncio.sleep(0.1)
    await server.restart()
    await sink.aclose()
    sink = RedisSink(server.url, timeout_s=60.0)
    await sink.publish([make_event(2)])
    assert await following == [2]
    await sink.aclose()
    await events.aclose()


def _fields(**changes: str) -> dict[str, str]:
    return {
        "id": "1",
        "type": "io.sightwire.segmentation.update.v1",
        "source": "/sources/gate",
        "time": "",
        "subject": "scene",
        "data": "{}",
        **changes,
    }


def test_a_mask_of_another_encoding_is_refused() -> None:
    data = {"mask": {"encoding": "png", "size": [1, 1], "data": ""}}
    event = parse_entry("s", "1-0", _fields(data=json.dumps(data)))
    with pytest.raises(ValueError, match="update sightwire"):
        event.mask()


@pytest.mark.parametrize("fields", [_fields(data="[]"), _fields(type="x"), _fields(data="{"), {}])
def test_what_is_no_event_is_a_value_error(fields: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="1-0"):
        parse_entry("s", "1-0", fields)


def test_received_events_are_frozen() -> None:
    event = parse_entry("s", "1-0", _fields())
    assert isinstance(event, ReceivedEvent)
    with pytest.raises(AttributeError):
        event.id = "2"  # type: ignore[misc]
