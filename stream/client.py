"""Reading events from Redis: ``subscribe`` for consumers that must miss none, ``follow`` for looking on.

::

    async with subscribe("redis://localhost", group="alarms", consumer="alarms-1", kinds=["action"]) as events:
        async for event in events:
            print(event.source_id, event.subject, event.data["score"])
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from types import TracebackType
from typing import Any, Self, cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from stream.clock import NS_PER_S, Clock, SystemClock
from stream.errors import ClientError
from stream.received import KINDS, ReceivedEvent, parse_entry
from stream.reconnect import GroupLost, PatientConnection
from stream.sinks.redis import stream_key

__all__ = ["KINDS", "ReceivedEvent", "Subscription", "follow", "subscribe"]

log = logging.getLogger(__name__)

_LOOK_BACK = 2000
"""Entries of a stream that are looked through for the newest of some sources."""

_Entry = tuple[str, str, dict[str, str], int]
"""Stream, entry id, fields, deliveries."""
_DEAD_MAXLEN = 100_000


class Subscription:
    """Events of one consumer of a group; made by ``subscribe``. Iterate it in one task only."""

    def __init__(
        self,
        url: str,
        *,
        group: str,
        consumer: str,
        kinds: Sequence[str] = KINDS,
        sources: Collection[str] | None = None,
        prefix: str = "sightwire",
        start: str = "$",
        auto_ack: bool = True,
        max_deliveries: int = 5,
        claim_idle_s: float = 60.0,
        block_s: float = 1.0,
        batch: int = 32,
        clock: Clock | None = None,
    ) -> None:
        """See ``subscribe``."""
        self._connection = PatientConnection(url, block_s=block_s, name="sightwire-subscribe")
        self._group, self._consumer = group, consumer
        self._streams = _streams(prefix, kinds)
        self._dead_stream = f"{prefix}:events:dead"
        self._sources = None if sources is None else frozenset(sources)
        self._auto_ack = auto_ack
        self._max_deliveries = max_deliveries
        self._claim_ms = max(1, int(claim_idle_s * 1000))
        self._block_ms = max(1, int(block_s * 1000))
        self._batch = batch
        self._clock = clock or SystemClock()
        self._from: dict[str, str] = dict.fromkeys(self._streams, start)
        self._buffer: deque[_Entry] = deque()
        self._buffered_ns = 0
        self._claim_ns = 0
        self._joined = False
        self._own_pending: dict[str, str] = {}
        """Streams whose entries, given to this consumer and not acknowledged, are still to be read; and how far."""
        self._open: set[tuple[str, str]] = set()
        """Handed out and not acknowledged yet."""
        self._current: ReceivedEvent | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ReceivedEvent:
        """The next event. With ``auto_ack`` this also acknowledges the one before: its loop body is done."""
        await self._ack_current()
        while True:
            if not self._buffer:
                await self._fill()
                continue
            await self._keep_hold()
            if not self._buffer:
                continue
            event = await self._accept(self._buffer.popleft())
            if event is not None:
                self._open.add((event.stream, event.entry_id))
                self._current = event if self._auto_ack else None
                return event

    async def ack(self, event: ReceivedEvent) -> None:
        """Mark an event as done, so that it is never delivered to this group again. Idempotent."""
        await self._ack(event.stream, event.entry_id)

    async def aclose(self) -> None:
        """Disconnect. What was not acknowledged is delivered again, to this consumer or after a while to another."""
        await self._connection.aclose()

    async def __aenter__(self) -> Self:
        await self._join()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Acknowledge the last event, unless its loop body raised, and disconnect."""
        try:
            if error is None:
                await self._ack_current()
        finally:
            await self.aclose()

    async def _ack_current(self) -> None:
        if self._current is not None:
            await self.ack(self._current)
            self._current = None

    async def _ack(self, stream: str, entry_id: str) -> None:
        await self._call(self._redis.xack, stream, self._group, entry_id)
        self._open.discard((stream, entry_id))

    @property
    def _redis(self) -> Redis:
        return self._connection.redis

    async def _call(self, command: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
        """A command's result. After a lost connection what was read is read again: a reply may have got lost."""
        while True:
            losses = self._connection.losses
            try:
                result = await self._connection.call(command, *args, **kwargs)
            except GroupLost:
                log.warning("group %s is gone from Redis; making it again", self._group)
                await self._make_groups()
                continue
            if self._connection.losses > losses:
                self._read_pending_again()
            return result

    def _read_pending_again(self) -> None:
        self._buffer.clear()
        self._own_pending = dict.fromkeys(self._streams, "0")

    async def _join(self) -> None:
        if not self._joined:
            await self._make_groups()
            self._read_pending_again()
            self._joined = True

    async def _make_groups(self) -> None:
        """Make the groups that are missing, each at the place where this subscription is in its stream."""
        for stream in self._streams:
            await self._connection.call(self._make_group, stream)

    async def _make_group(self, stream: str) -> None:
        try:
            await self._redis.xgroup_create(stream, self._group, self._from[stream], mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise
        groups = await self._redis.xinfo_groups(stream)
        self._from[stream] = next(
            (str(group["last-delivered-id"]) for group in groups if group["name"] == self._group), self._from[stream]
        )

    async def _fill(self) -> None:
        """Read until there is something: first what this consumer was given before, then what idle peers hold, then
        new events."""
        await self._join()
        if self._own_pending:
            await self._read_own_pending()
        elif self._clock.monotonic_ns() >= self._claim_ns:
            # Every third of the idle time, so that an entry waits at most four thirds of it.
            self._claim_ns = self._clock.monotonic_ns() + self._claim_ms * NS_PER_S // 3000
            await self._claim()
        else:
            await self._read_new()
        self._buffered_ns = self._clock.monotonic_ns()

    async def _read_own_pending(self) -> None:
        wanted = dict(self._own_pending)
        reply = await self._call(self._redis.xreadgroup, self._group, self._consumer, wanted, count=self._batch)
        for stream, entries in reply:
            if not entries:
                self._own_pending.pop(stream, None)
                continue
            self._own_pending[stream] = entries[-1][0]
            fresh = [entry for entry in entries if (stream, entry[0]) not in self._open]
            await self._take_delivered(stream, fresh)

    async def _claim(self) -> None:
        for stream in self._streams:
            claim = self._redis.xautoclaim
            reply = await self._call(claim, stream, self._group, self._consumer, self._claim_ms, count=self._batch)
            await self._take_delivered(stream, reply[1])

    async def _take_delivered(self, stream: str, entries: list[tuple[str, dict[str, str]]]) -> None:
        """Buffer entries that were delivered before, with how often."""
        for entry_id, fields in entries:
            told = await self._call(self._redis.xpending_range, stream, self._group, entry_id, entry_id, 1)
            if told:
                self._buffer.append((stream, entry_id, fields, int(told[0]["times_delivered"])))

    async def _read_new(self) -> None:
        wanted = dict.fromkeys(self._streams, ">")
        read = self._redis.xreadgroup
        reply = await self._call(read, self._group, self._consumer, wanted, count=self._batch, block=self._block_ms)
        if self._own_pending:  # set by a lost connection: there may be older ones, and these are among them
            return
        for stream, entries in reply:
            self._buffer.extend((stream, entry_id, fields, 1) for entry_id, fields in entries)
            self._from[stream] = entries[-1][0]

    async def _keep_hold(self) -> None:
        """Tell the server that the buffered entries are in work, before peers may claim them."""
        age_ms = (self._clock.monotonic_ns() - self._buffered_ns) // 1_000_000
        if age_ms < self._claim_ms // 3:
            return
        if age_ms >= self._claim_ms:  # too late: others may have them
            self._read_pending_again()
            return
        for stream in {entry[0] for entry in self._buffer}:
            ids = [entry[1] for entry in self._buffer if entry[0] == stream]
            await self._call(self._redis.xclaim, stream, self._group, self._consumer, 0, ids, justid=True)
        self._buffered_ns = self._clock.monotonic_ns()

    async def _accept(self, entry: _Entry) -> ReceivedEvent | None:
        """The event of an entry, or ``None`` for one that is done with: trimmed, filtered out or dead."""
        stream, entry_id, fields, deliveries = entry
        if not fields:  # trimmed from the stream while it was pending
            await self._ack(stream, entry_id)
            return None
        if deliveries > self._max_deliveries:
            await self._bury(entry, f"delivered {deliveries - 1} times and never acknowledged")
            return None
        try:
            event = parse_entry(stream, entry_id, fields, deliveries)
        except ValueError as error:
            await self._bury(entry, str(error))
            return None
        if self._sources is not None and event.source_id not in self._sources:
            await self._ack(stream, entry_id)
            return None
        return event

    async def _bury(self, entry: _Entry, reason: str) -> None:
        """Move an entry to the dead letters, in one transaction."""
        stream, entry_id, fields, deliveries = entry
        log.error("entry %s of %s goes to %s: %s", entry_id, stream, self._dead_stream, reason)
        notes = {
            "dead_stream": stream,
            "dead_entry": entry_id,
            "dead_group": self._group,
            "dead_reason": reason,
            "dead_deliveries": str(deliveries - 1),
        }

        async def move() -> None:
            async with self._redis.pipeline(transaction=True) as both:
                both.xadd(self._dead_stream, cast(dict[Any, Any], fields | notes), maxlen=_DEAD_MAXLEN)
                both.xack(stream, self._group, entry_id)
                await both.execute()

        await self._call(move)


def subscribe(url: str, *, group: str, consumer: str, **options: Any) -> Subscription:
    """Events for one consumer of a group, at least once each, for ``async for``.

    Consumers of one group share the events; a group gets every event since ``start``. With ``auto_ack`` an event is
    acknowledged when the next one is asked for, that is when its loop body has ended without an exception; with
    ``async with``, leaving the block without one acknowledges the last. Else call ``ack(event)``. What is not
    acknowledged comes again: at once when a consumer of the same name starts, after ``claim_idle_s`` to a peer; after
    ``max_deliveries`` in vain it goes to ``{prefix}:events:dead``. A server that restarts, and a group that got lost
    with its data, are waited for and made again. An event may come twice (same ``id``).

    Options, with their defaults: ``kinds`` (all), ``sources`` (ids; all), ``prefix`` ("sightwire"), ``start`` for a new
    group ("$": from now on; "0": all that the stream holds), ``auto_ack`` (True), ``max_deliveries`` (5),
    ``claim_idle_s`` (60; must exceed the time that a loop body takes), ``block_s`` (1), ``batch`` (32).

    Iterating raises ``ClientError`` when the server cannot be reached at first, or refuses for good.
    """
    return Subscription(url, group=group, consumer=consumer, **options)


async def follow(
    url: str,
    *,
    kinds: Sequence[str] = KINDS,
    sources: Collection[str] | None = None,
    prefix: str = "sightwire",
    backlog: int = 0,
    block_s: float = 1.0,
) -> AsyncIterator[ReceivedEvent]:
    """Events as they come, after the newest ``backlog`` ones; for looking on, without a group.

    Rides out restarts of the server. Raises ``ClientError`` as ``subscribe`` does.
    """
    connection = PatientConnection(url, block_s=block_s, name="sightwire-follow")
    wanted = None if sources is None else frozenset(sources)
    try:
        old, after = await _newest(connection, _streams(prefix, kinds), wanted, backlog)
        for event in old:
            yield event
        block_ms = max(1, int(block_s * 1000))
        while True:
            reply = await connection.call(connection.redis.xread, dict(after), count=256, block=block_ms)
            for stream, entries in reply:
                after[stream] = entries[-1][0]
                for event in _events(stream, entries, wanted):
                    yield event
    finally:
        await connection.aclose()


async def newest(
    url: str,
    *,
    kinds: Sequence[str] = KINDS,
    sources: Collection[str] | None = None,
    prefix: str = "sightwire",
    count: int = 20,
) -> list[ReceivedEvent]:
    """The newest ``count`` events, oldest first, without waiting for more.

    Raises ``ClientError`` as ``subscribe`` does.
    """
    connection = PatientConnection(url, block_s=1.0, name="sightwire-newest")
    wanted = None if sources is None else frozenset(sources)
    try:
        return (await _newest(connection, _streams(prefix, kinds), wanted, count))[0]
    finally:
        await connection.aclose()


async def _newest(
    connection: PatientConnection, streams: Sequence[str], wanted: frozenset[str] | None, count: int
) -> tuple[list[ReceivedEvent], dict[str, str]]:
    """The newest ``count`` events over all streams, oldest first, and each stream's last entry id."""
    after: dict[str, str] = {}
    old: list[ReceivedEvent] = []
    # Only some of the entries may be of a wanted source, so more are looked at than are asked for.
    looked_at = max(count, 1) if wanted is None else _LOOK_BACK
    for stream in streams:
        entries = await connection.call(connection.redis.xrevrange, stream, count=looked_at)
        after[stream] = entries[0][0] if entries else "0-0"
        old.extend(_events(stream, entries, wanted))
    return sorted(old, key=_age)[len(old) - min(count, len(old)) :], after


def _events(stream: str, entries: Any, wanted: frozenset[str] | None) -> list[ReceivedEvent]:
    """The events among entries; others are logged and passed over."""
    events = []
    for entry_id, fields in entries:
        try:
            event = parse_entry(stream, entry_id, fields)
        except ValueError as error:
            log.warning("%s", error)
            continue
        if wanted is None or event.source_id in wanted:
            events.append(event)
    return events


def _age(event: ReceivedEvent) -> tuple[int, int]:
    first, _, second = event.entry_id.partition("-")
    return int(first), int(second)


def _streams(prefix: str, kinds: Sequence[str]) -> list[str]:
    if unknown := set(kinds) - set(KINDS):
        raise ClientError(f"no such kind of event: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    return [stream_key(prefix, kind) for kind in kinds]
