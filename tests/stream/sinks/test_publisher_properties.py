"""Whatever fails, and whenever: every event ends up in Redis exactly once, in order per source."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stream.clock import ManualClock
from stream.errors import SinkError, SpoolError
from stream.publisher import Publisher
from stream.sinks.redis import RedisSink, seen_key, stream_key
from stream.sinks.spool import Spool
from stream.types import Event

_numbers = itertools.count()


class Troubled:
    """A real sink with a bad line to it: calls fail before or after they took effect, or the server forgets."""

    def __init__(self, sink: RedisSink, redis: Any, prefix: str) -> None:
        self.sink, self.redis, self.prefix = sink, redis, prefix
        self.faults: list[tuple[str, int]] = []
        self.calls = 0
        self.safe: dict[str, int] = {}

    async def publish(self, events: Sequence[Event]) -> list[bool]:
        self.calls += 1
        fault, size = self.faults.pop(0) if self.faults else ("", 0)
        if fault == "before":
            raise SinkError("lost before", reason="connection")
        if fault == "refused":
            raise SinkError("refused", retryable=False, reason="auth")
        if fault == "partly":
            await self.sink.publish(events[:size])
            raise SinkError("lost in the middle", reason="connection")
        flags = await self.sink.publish(events)
        if fault == "forgets":
            await self._forget_tail(events[0].kind, size)
        if fault in ("after", "forgets"):
            raise SinkError("lost after", reason="connection")
        return flags

    async def flush(self) -> None:
        """The server's file is flushed: what it has now it does not forget."""
        for kind in ("action", "class"):
            self.safe[kind] = await self.redis.xlen(stream_key(self.prefix, kind))

    async def _forget_tail(self, kind: str, count: int) -> None:
        stream = stream_key(self.prefix, kind)
        count = min(count, await self.redis.xlen(stream) - self.safe.get(kind, 0))
        for entry_id, fields in await self.redis.xrevrange(stream, count=count) if count else ():
            await self.redis.xdel(stream, entry_id)
            await self.redis.delete(seen_key(self.prefix, kind, fields["id"]))

    async def aclose(self) -> None:
        await self.sink.aclose()


class TroubledSpool(Spool):
    """A real spool on a disk that may be full."""

    full = False

    async def append(self, events: Sequence[Event]) -> None:
        if self.full:
            raise SpoolError("the disk is full")
        await super().append(events)


kinds = st.sampled_from(["action", "action", "class"])
puts = st.tuples(st.just("put"), st.sampled_from("aaab"), kinds, st.integers(1, 5))
faults = st.tuples(
    st.just("fault"),
    st.sampled_from(["before", "after", "partly", "forgets", "forgets", "refused"]),
    st.integers(1, 12),
    st.integers(1, 2),
)
turns = st.tuples(st.just("turn"), st.none(), st.none(), st.integers(1, 6))
others = st.tuples(st.sampled_from(["restart", "fill", "clear"]), st.none(), st.none(), st.just(0))
steps = st.lists(st.one_of(puts, puts, puts, faults, faults, turns, turns, others), min_size=10, max_size=40)


class World:
    """One example: a prefix of its own on the server, a spool of its own."""

    def __init__(self, url: str, redis: Any, folder: Path) -> None:
        self.prefix = f"p{next(_numbers)}"
        self.redis = redis
        self.clock = ManualClock()
        self.sink = Troubled(RedisSink(url, prefix=self.prefix, timeout_s=60.0), redis, self.prefix)
        self.spool = TroubledSpool(folder / f"{self.prefix}.db", clock=self.clock)
        self.sent: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.numbers = itertools.count()
        self.accounts: list[Publisher] = []
        self.start()

    def start(self) -> None:
        self.publisher = Publisher(
            self.sink, self.spool, clock=self.clock, wait=self.wait, jitter=lambda: 0.5, max_batch=4, resend_s=1e6
        )
        self.accounts.append(self.publisher)
        self.running = asyncio.create_task(self.publisher.run())

    async def wait(self, event: asyncio.Event, timeout_s: float | None) -> None:
        """Time passes only here, and at once."""
        if timeout_s is None:
            await event.wait()
            return
        await asyncio.sleep(0)
        if not event.is_set():
            self.clock.advance(int(timeout_s * 1e9) + 1)

    async def step(self, what: str, first: Any, second: Any, count: int) -> None:
        if what == "put":
            numbers = [next(self.numbers) for _ in range(count)]
            self.sent[first, second] += numbers
            await self.publisher.put([_event(number, first, second) for number in numbers])
        elif what == "fault":
            self.sink.faults += [(first, second)] * count
        elif what == "turn":
            await self.turn(self.sink.calls + count)
        elif what == "restart":
            await self.restart()
        else:
            self.spool.full = what == "fill"

    async def turn(self, calls: int) -> None:
        """Let the publisher work until it has called the sink so often, or has nothing left to do."""
        async with asyncio.timeout(120):
            while self.sink.calls < calls and (self.busy() or not self.publisher._running):  # noqa: ASYNC110
                await asyncio.sleep(0.0002)  # the server and the spool's thread answer in their own time

    def busy(self) -> bool:
        return bool(self.publisher.pending or self.spool.count)

    async def restart(self) -> None:
        self.spool.full = False
        await self.publisher.aclose(1.0)
        await self.running
        await self.sink.flush()  # a publisher can't know what a server acknowledged to the one before it
        self.start()

    async def drain(self) -> None:
        self.spool.full = False
        await self.turn(10**9)
        await self.publisher.aclose(1.0)
        await self.running
        await self.sink.aclose()

    async def received(self) -> dict[tuple[str, str], list[int]]:
        found: dict[tuple[str, str], list[int]] = defaultdict(list)
        for kind in ("action", "class"):
            for _, fields in await self.redis.xrange(stream_key(self.prefix, kind)):
                found[fields["source"].removeprefix("/sources/"), kind].append(json.loads(fields["data"])["seq"])
        return found


def _event(number: int, source: str, kind: str) -> Event:
    return Event(
        id=str(number),
        type=f"io.sightwire.{kind}.update.v1",
        source=f"/sources/{source}",
        time="",
        subject="",
        kind=kind,
        data={"seq": number},
        capture_wall_ns=0,
        made_ns=0,
    )


@given(steps=steps)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_every_event_arrives_once_and_in_order(server: Any, redis: Any, tmp_path: Path, steps: Any) -> None:
    world = World(server.url, redis, tmp_path)
    for step in steps:
        await world.step(*step)
    await world.drain()
    assert await world.received() == world.sent
    for publisher in world.accounts:
        assert publisher.quarantined == 0
    accepted = sum(publisher.accepted for publisher in world.accounts)
    assert accepted == sum(len(numbers) for numbers in world.sent.values())
    settled = sum(publisher.published.total() + publisher.duplicates for publisher in world.accounts)
    assert settled == accepted + sum(publisher.resent for publisher in world.accounts)
