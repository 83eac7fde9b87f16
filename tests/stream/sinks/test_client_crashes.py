"""What crashes, cancellations and slow consumers do to the events behind them, on real servers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from stream.client import subscribe
from stream.sinks.redis import RedisSink

ACTIONS = "sightwire:events:action"


@pytest.fixture
async def sink(server: Any) -> Any:
    made = RedisSink(server.url, timeout_s=60.0)
    yield made
    await made.aclose()


def _group(server: Any, consumer: str = "one", **options: Any) -> Any:
    return subscribe(server.url, group="g", consumer=consumer, **{"start": "0", "block_s": 0.05, **options})


async def _rest(events: Any, count: int) -> list[int]:
    """Sequence numbers of the next ``count`` events, all acknowledged but the last."""
    async with asyncio.timeout(60):
        return [(await anext(events)).data["seq"] for _ in range(count)]


async def _dead(redis: Any) -> list[int]:
    return [json.loads(fields["data"])["seq"] for _, fields in await redis.xrange("sightwire:events:dead")]


async def test_only_the_poison_is_buried_however_many_wait_behind_it(
    server: Any, sink: Any, redis: Any, make_event: Any
) -> None:
    await sink.publish([make_event(n) for n in range(10)])
    for attempt in range(1, 6):
        with pytest.raises(RuntimeError):
            async with _group(server) as events:
                event = await asyncio.wait_for(anext(events), 60)
                assert (event.data["seq"], event.deliveries) == (0, attempt)
                raise RuntimeError("crash")
    async with _group(server) as events:
        assert await _rest(events, 9) == list(range(1, 10)), "they were read with the poison, but never handed out"
    assert await _dead(redis) == [0]
    assert (await redis.xpending(ACTIONS, "g"))["pending"] == 0


async def test_peers_that_die_of_a_poison_do_not_take_the_others_along(
    server: Any, sink: Any, redis: Any, make_event: Any
) -> None:
    await sink.publish([make_event(n) for n in range(6)])
    for attempt in range(5):  # each its own consumer, as pods are
        dying = _group(server, f"pod-{attempt}", claim_idle_s=0.001)
        assert await _rest(dying, 1) == [0]
        await dying.aclose()
        await asyncio.sleep(0.002)  # longer than the idle time: by the server's clock, so it may only be longer
    async with _group(server, "last", claim_idle_s=0.001) as events:
        assert sorted(await _rest(events, 5)) == [1, 2, 3, 4, 5]
    assert await _dead(redis) == [0]


async def test_a_call_that_is_given_up_leaves_nothing_lying(
    server: Any, sink: Any, redis: Any, make_event: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``wait_for(anext(events), ...)``: the server has handed events over, and nobody waits for its answer any more."""
    await sink.publish([make_event(n) for n in range(3)])
    async with _group(server) as events:
        read, answered = events._redis.xreadgroup, asyncio.Event()

        async def slow(*args: Any, **kwargs: Any) -> Any:
            reply = await read(*args, **kwargs)
            if reply:
                answered.set()
                await asyncio.Event().wait()
            return reply

        monkeypatch.setattr(events._redis, "xreadgroup", slow)
        waiting = asyncio.create_task(anext(events))
        await asyncio.wait_for(answered.wait(), 60)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        monkeypatch.setattr(events._redis, "xreadgroup", read)
        # Long before anybody may claim them from this consumer.
        assert await _rest(events, 3) == [0, 1, 2]


async def test_idle_entries_behind_many_busy_ones_are_found(
    server: Any, sink: Any, redis: Any, make_event: Any
) -> None:
    await sink.publish([make_event(n) for n in range(60)])
    busy = _group(server, "busy", auto_ack=False, batch=58)
    await _rest(busy, 58)
    crashed = _group(server, "crashed", batch=2)
    await _rest(crashed, 1)
    await crashed.aclose()
    held = [one["message_id"] for one in await redis.xpending_range(ACTIONS, "g", "-", "+", 9, "crashed")]
    await redis.xclaim(ACTIONS, "g", "crashed", 0, held, idle=1_000_000, justid=True)
    # XAUTOCLAIM would look at ten entries for each that it may take: of these there are 58 in front.
    async with _group(server, "last", claim_idle_s=999, batch=1) as events:
        assert await _rest(events, 2) == [58, 59]
    await busy.aclose()


async def test_what_was_trimmed_before_it_was_read_is_told(
    server: Any, sink: Any, redis: Any, make_event: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await sink.publish([make_event(n) for n in range(10)])
    async with _group(server) as events:
        assert await _rest(events, 10) == list(range(10))
        assert events.missed == 0
    await sink.publish([make_event(n) for n in range(10, 30)])
    await redis.xtrim(ACTIONS, maxlen=5, approximate=False)
    async with _group(server, batch=2) as events:
        assert await _rest(events, 2) == [25, 26]
        assert events.missed == 15
        # Nothing new gets lost; what was told of is not told again.
        assert await _rest(events, 3) == [27, 28, 29]
        await sink.publish([make_event(30)])
        await redis.xtrim(ACTIONS, maxlen=1, approximate=False)
        assert await _rest(events, 1) == [30]
        assert events.missed == 15
    assert caplog.text.count("missed 15 events of sightwire:events:action") == 1


async def test_a_stream_that_began_anew_by_an_earlier_clock_is_read(server: Any, redis: Any, make_event: Any) -> None:
    fields = {"id": "x", "type": "io.sightwire.action.start.v1", "source": "/sources/gate", "time": "", "subject": "s"}
    await redis.xadd(ACTIONS, {**fields, "data": '{"seq": 1}'}, id="4000000000000-0")
    async with _group(server) as events:
        assert await _rest(events, 1) == [1]
        await redis.flushall()
        await redis.xadd(ACTIONS, {**fields, "data": '{"seq": 2}'}, id="3000000000000-0")
        assert await _rest(events, 1) == [2]
