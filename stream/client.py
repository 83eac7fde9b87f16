"""Reading events from Redis: ``subscribe`` for consumers that must miss none, ``follow`` for looking on.

::

    async with subscribe("redis://localhost", group="alarms", consumer="alarms-1", kinds=["action"]) as events:
        async for event in events:
            print(event.source_id, event.subject, event.data["score"])
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from types import TracebackType
from typing import Any, Self, cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from stream.clock import NS_PER_S, Clock, SystemClock
from stream.following import entry_time, follow, stream_keys
from stream.received import KINDS, ReceivedEvent, parse_entry
from stream.reconnect import GroupLost, PatientConnection

__all__ = ["KINDS", "ReceivedEvent", "Subscription", "follow", "subscribe"]

log = logging.getLogger(__name__)

_Entry = tuple[str, str, dict[str, str], int]
"""Stream, entry id, fields, deliveries."""
_Held = tuple[str, str, dict[str, str] | None, int]
"""The same; without fields when it was delivered before: they are fetched when it is handed out."""
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
        self._streams = stream_keys(prefix, kinds)
        self._dead_stream = f"{prefix}:events:dead"
        self._sources = None if sources is None else frozenset(sources)
        self._auto_ack = auto_ack
        self._max_deliveries = max_deliveries
        self._claim_ms = max(1, int(claim_idle_s * 1000))
        self._block_ms = max(1, int(block_s * 1000))
        self._batch = batch
        self._clock = clock or SystemClock()
        self._from: dict[str, str] = dict.fromkeys(self._streams, start)
        self._buffer: deque[_Held] = deque()
        self._buffered_ns = 0
        self._claim_ns = 0
        self._joined = False
        self._own_pending: dict[str, str] = {}
        """Streams whose entries, given to this consumer and not acknowledged, are still to be read; and how far."""
        self._open: set[tuple[str, str]] = set()
        """Handed out and not acknowledged yet."""
        self._current: ReceivedEvent | None = None
        self._behind = set(self._streams)
        """Streams that may hold more than was read last."""
        self._gaps: dict[str, tuple[str, int]] = {}
        """Per stream how many were last found missing, and after which entry."""
        self.missed = 0
        """Events found to be gone from Redis before this group was given them."""

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
            event = await self._accept(await self._fetched(self._buffer.popleft()))
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
            except asyncio.CancelledError:
                self._read_pending_again()  # the server may have done it all the same
                raise
            if self._connection.losses > losses:
                self._read_pending_again()
            return result

    def _read_pending_again(self) -> None:
        self._buffer.clear()
        self._own_pending = dict.fromkeys(self._streams, "-")

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
        if self._joined:
            newest = (await self._redis.xinfo_stream(stream))["last-generated-id"]
            if entry_time(newest) < entry_time(self._from[stream]):
                # Another stream than the one read so far, by a clock that is behind: all of it is new.
                await self._redis.xgroup_setid(stream, self._group, "0")
        if (group := await self._group_info(stream)) is not None:
            self._from[stream] = str(group["last-delivered-id"])

    async def _group_info(self, stream: str) -> dict[str, Any] | None:
        groups = await self._redis.xinfo_groups(stream)
        return next((group for group in groups if group["name"] == self._group), None)

    async def _look_for_gap(self, stream: str) -> None:
        """Tell of events that were trimmed from a stream before the group was given them."""
        try:
            whole, group = await self._redis.xinfo_stream(stream), await self._group_info(stream)
        except ResponseError:  # gone; the next read says so
            return
        if group is None or group.get("entries-read") is None or "entries-added" not in whole:
            return
        delivered, first = str(group["last-delivered-id"]), whole["first-entry"]
        if first and entry_time(first[0]) <= entry_time(delivered):
            return
        missed = int(whole["entries-added"]) - int(group["entries-read"]) - int(whole["length"])
        before = self._gaps.get(stream)
        known = before[1] if before is not None and before[0] == delivered else 0
        if missed > known:
            self._gaps[stream] = (delivered, missed)
            self.missed += missed - known
            text = "group %s missed %d events of %s, trimmed before it read them; read faster, or raise redis.maxlen"
            log.error(text, self._group, missed - known, stream)

    async def _fill(self) -> None:
        """Read until there is something: first what this consumer was given before, then what idle peers hold, then
        new events."""
        await self._join()
        if self._own_pending:
            await self._read_own_pending()
        elif self._clock.monotonic_ns() >= self._claim_ns:
            await self._claim()
            if not self._buffer:
                # Every third of the idle time, so that an entry waits at most four thirds of it.
                self._claim_ns = self._clock.monotonic_ns() + self._claim_ms * NS_PER_S // 3000
        else:
            await self._read_new()
        self._buffered_ns = self._clock.monotonic_ns()

    async def _read_own_pending(self) -> None:
        stream, after = next(iter(self._own_pending.items()))
        pending = self._redis.xpending_range
        told = await self._call(pending, stream, self._group, after, "+", self._batch, self._consumer)
        if self._own_pending[stream] != after:  # a lost connection: from the beginning again
            return
        if not told:
            del self._own_pending[stream]
            return
        self._own_pending[stream] = f"({told[-1]['message_id']}"
        await self._hold(stream, [one for one in told if (stream, one["message_id"]) not in self._open], 0)

    async def _claim(self) -> None:
        for stream in self._streams:
            pending = self._redis.xpending_range
            told = await self._call(pending, stream, self._group, "-", "+", self._batch, idle=self._claim_ms)
            await self._hold(stream, told, self._claim_ms)

    async def _hold(self, stream: str, told: list[dict[str, Any]], idle_ms: int) -> None:
        """Make delivered entries this consumer's, and buffer them; that they are delivered again counts later."""
        times = {one["message_id"]: int(one["times_delivered"]) for one in told}
        if times:
            claim = self._redis.xclaim
            held = await self._call(claim, stream, self._group, self._consumer, idle_ms, list(times), justid=True)
            self._buffer.extend((stream, entry_id, None, times[entry_id]) for entry_id in held)

    async def _fetched(self, entry: _Held) -> _Entry:
        """An entry with its fields, empty when it was trimmed.

        One that was delivered before is only now delivered again: were all counted that are read together, those
        behind one that crashes its consumers would be given up with it.
        """
        stream, entry_id, fields, deliveries = entry
        if fields is not None:
            return stream, entry_id, fields, deliveries
        found = await self._call(self._redis.xclaim, stream, self._group, self._consumer, 0, [entry_id])
        return stream, entry_id, (found[0][1] if found else None) or {}, deliveries + 1

    async def _read_new(self) -> None:
        for stream in list(self._behind):
            await self._call(self._look_for_gap, stream)
        self._behind.clear()
        wanted = dict.fromkeys(self._streams, ">")
        read = self._redis.xreadgroup
        reply = await self._call(read, self._group, self._consumer, wanted, count=self._batch, block=self._block_ms)
        if self._own_pending:  # set by a lost connection: there may be older ones, and these are among them
            return
        for stream, entries in reply:
            self._buffer.extend((stream, entry_id, fields, 1) for entry_id, fields in entries)
            self._from[stream] = entries[-1][0]
            if len(entries) >= self._batch:
                self._behind.add(stream)

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
    ``max_deliveries`` in vain it goes to ``{prefix}:events:dead``. Events that were trimmed from Redis before they were
    read are counted in ``missed`` and logged. A server that restarts, and a group that got lost
    with its data, are waited for and made again. An event may come twice (same ``id``).

    Options, with their defaults: ``kinds`` (all), ``sources`` (ids; all), ``prefix`` ("sightwire"), ``start`` for a new
    group ("$": from now on; "0": all that the stream holds), ``auto_ack`` (True), ``max_deliveries`` (5),
    ``claim_idle_s`` (60; must exceed the time that a loop body takes), ``block_s`` (1), ``batch`` (32).

    Iterating raises ``ClientError`` when the server cannot be reached at first, or refuses for good.
    """
    return Subscription(url, group=group, consumer=consumer, **options)
