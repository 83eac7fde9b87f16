"""Hands events to a sink: in order, each one, whatever happens to the sink.

While the sink works, events go to it as they come, as many at once as are waiting. When it fails, they go to the
spool on disk, and so does every later one, so that order holds; the sink is probed with jittered exponential backoff
and the spool is drained in order once it is back. An event leaves memory only when the sink or the spool has it.

A server may have acknowledged events that it then forgot: a crash within the second that its append-only file lags
behind. So after every failure the events acknowledged in the last seconds go back to the head of the queue; the
sink recognises those it still has by their ids.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from stream.backoff import Backoff, Wait, wait_for_event
from stream.clock import NS_PER_S, Clock
from stream.errors import EventRejected, SinkError, SpoolError
from stream.sinks.base import Sink
from stream.sinks.spool import Spool
from stream.types import Event

log = logging.getLogger(__name__)


class PublishObserver(Protocol):
    """Told of every event that the sink has acknowledged."""

    def on_published(
        self, event: Event, acknowledged_monotonic_ns: int, acknowledged_wall_ns: int, *, new: bool, spooled: bool
    ) -> None:
        """``new`` is false where the sink had the id already; ``spooled`` says that it waited on disk, perhaps
        since an earlier run, so that ``made_ns`` may be of another monotonic clock."""
        ...


@dataclass(frozen=True, slots=True)
class _Entry:
    event: Event
    seq: int | None
    """Place in the spool; ``None`` for one in memory,"""
    queue: deque[Event] | None
    """at the head of this."""


class Publisher:
    """Owns the way from ``put`` to the sink. ``run`` does the work; ``aclose`` ends it without losing an event.

    The counters are plain attributes, to be read at any time. After a drain
    ``accepted + recovered + resent == published (all kinds) + duplicates + quarantined + spool.count``.
    """

    def __init__(
        self,
        sink: Sink,
        spool: Spool,
        *,
        clock: Clock,
        observer: PublishObserver | None = None,
        backoff: Backoff | None = None,
        jitter: Callable[[], float] = random.random,
        wait: Wait = wait_for_event,
        max_batch: int = 256,
        capacity: int = 4096,
        resend_s: float = 3.0,
    ) -> None:
        """``capacity`` bounds the events in memory, ``resend_s`` is how far back acknowledged ones are sent again."""
        self._sink = sink
        self._spool = spool
        self._clock = clock
        self._observer = observer
        self._backoff = backoff or Backoff()
        self._jitter = jitter
        self._wait = wait
        self._max_batch = max_batch
        self._capacity = capacity
        self._resend_ns = int(resend_s * NS_PER_S)
        self._pending: deque[Event] = deque()
        self._again: deque[Event] = deque()
        """Acknowledged, perhaps forgotten; older than all in the spool, which is older than all pending."""
        self._recent: deque[tuple[int, Event]] = deque(maxlen=capacity)
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._finished = asyncio.Event()
        self._in_flight: asyncio.Future[list[bool]] | None = None
        self._holds_spool = asyncio.Lock()
        self._running = False
        self._closing = False
        self._abandoned = False
        self._failures_in_row = 0
        self._probe_ns = 0
        self._spool_told = False
        self.accepted = 0
        """Events taken by ``put``."""
        self.recovered = 0
        """Events that an earlier run left in the spool."""
        self.published: Counter[str] = Counter()
        """New events acknowledged by the sink, by kind."""
        self.duplicates = 0
        """Events that the sink had already."""
        self.resent = 0
        """Events sent once more after a failure, although acknowledged: the sink may have lost them."""
        self.spooled = 0
        """Events that went by way of the disk."""
        self.quarantined = 0
        """Events that the sink will never take."""
        self.failures: Counter[str] = Counter()
        """Failed attempts, by reason (``SinkError.reason``)."""
        self.last_error: SinkError | None = None
        """Why the sink is away; ``None`` while it works."""

    @property
    def spool(self) -> Spool:
        """For its count and oldest age."""
        return self._spool

    @property
    def pending(self) -> int:
        """Events in memory."""
        return len(self._again) + len(self._pending)

    async def put(self, events: Sequence[Event]) -> None:
        """Take events over, in order. Waits while memory is full, which it gets only when the spool fails too.

        After ``aclose`` they go straight to the spool; raises ``SpoolError`` where that can't take them.
        """
        while len(self._pending) >= self._capacity and not (self._abandoned or self._finished.is_set()):
            self._room.clear()
            await self._room.wait()
        self.accepted += len(events)
        self._pending.extend(events)
        self._wake.set()
        if self._finished.is_set():
            await self._stow_alone()

    async def run(self) -> None:
        """Publish until ``aclose``; when cancelled, what is in memory goes to the spool first.

        Raises ``SpoolError`` when the spool cannot be opened, or at the end when it cannot take what is left.
        """
        self._running = True
        async with self._holds_spool:
            try:
                await self._spool.open()
                self.recovered = self._spool.count
                await self._work_to_the_end()
            except asyncio.CancelledError:
                await self._spool.open()  # where opening it was cut short
                await self._stow_the_last()
                raise
            finally:
                await self._spool.aclose()
                self._finished.set()
                self._room.set()

    async def _work_to_the_end(self) -> None:
        worker = asyncio.create_task(self._work(), name="publisher")
        try:
            await asyncio.shield(worker)
        except asyncio.CancelledError:
            self.abandon()
            await worker
            raise
        finally:
            await self._stow_the_last()

    async def aclose(self, grace_s: float = 5.0) -> None:
        """Publish what can be published within the grace period, leave the rest to the spool, end ``run``.

        The sink stays open: it belongs to the caller. Idempotent.
        """
        self._closing = True
        self._wake.set()
        await asyncio.sleep(0)  # a task made for run just before may still have to start
        if not self._running:
            await self._stow_alone()
            return
        await self._wait(self._finished, grace_s)
        self.abandon()
        await self._finished.wait()

    def abandon(self) -> None:
        """Wait for the sink no longer, nor for room: what is in memory goes to the spool, and ``run`` ends.

        Only waiting is cut: a cancelled write to the spool may or may not happen. Idempotent.
        """
        self._closing = self._abandoned = True
        self._wake.set()
        self._room.set()
        if self._in_flight is not None:
            self._in_flight.cancel()

    async def _work(self) -> None:
        while True:
            await self._wait_for_work()
            if self._closing and (self._sink_is_away() or not (self.pending or self._spool.count)):
                return
            if self._spool.count or self._sink_is_away():
                await self._stow_or_tell()
            if not self._sink_is_away() or self._now() >= self._probe_ns:
                await self._attempt()

    async def _wait_for_work(self) -> None:
        """Return when there is something to do: new events, a probe that is due, or the end."""
        waiting = bool(self.pending or self._spool.count)
        if self._closing or (waiting and not self._sink_is_away()):
            await asyncio.sleep(0)
            return
        self._wake.clear()
        delay_s = max(0.0, (self._probe_ns - self._now()) / NS_PER_S) if waiting else None
        await self._wait(self._wake, delay_s)

    async def _attempt(self) -> None:
        """Send one batch; on failure, put everything on disk and set the time of the next probe."""
        try:
            batch = await self._next_batch()
            await self._deliver(batch)
        except SpoolError as error:
            self._failed(error)
        except SinkError as error:
            self._failed(error)
            await self._stow_or_tell()
        else:
            if self._sink_is_away():
                log.info("events flow again; %d wait in the spool", self._spool.count)
                self._failures_in_row, self.last_error = 0, None

    async def _next_batch(self) -> list[_Entry]:
        size = self._batch_size()
        if self._spool.count and not self._again:
            return [_Entry(entry.event, entry.seq, None) for entry in await self._spool.peek(size)]
        queue = self._again or self._pending
        return [_Entry(event, None, queue) for event in islice(queue, size)]

    def _batch_size(self) -> int:
        """Smaller after each failure, lest a slow line never get a batch through before the timeout."""
        return max(1, self._max_batch >> min(self._failures_in_row, 16))

    async def _deliver(self, batch: list[_Entry]) -> None:
        """Send a batch and take it off its queue. A rejected event is found by halving, so the rest get through."""
        if not batch:
            return
        try:
            flags = await self._publish([entry.event for entry in batch])
        except EventRejected as error:
            if len(batch) == 1:
                await self._reject(batch[0], error)
                return
            half = len(batch) // 2
            await self._deliver(batch[:half])
            await self._deliver(batch[half:])
            return
        await self._settle(batch, flags)

    async def _publish(self, events: list[Event]) -> list[bool]:
        """The sink's answer; a ``SinkError`` as well when there is no more time to wait for it."""
        if not self._abandoned:
            self._in_flight = asyncio.ensure_future(self._sink.publish(events))
            try:
                return await self._in_flight
            except asyncio.CancelledError:
                if not self._abandoned:
                    raise
            finally:
                self._in_flight = None
        raise SinkError("the sink did not take all events before the end", reason="closing")

    async def _settle(self, batch: list[_Entry], flags: list[bool]) -> None:
        last = batch[-1]
        now, wall = self._now(), self._clock.wall_ns()
        if last.seq is not None:
            await self._spool.remove(last.seq)
        self._forget(last.queue, len(batch))
        for entry, new in zip(batch, flags, strict=True):
            self._recent.append((now, entry.event))
            if new:
                self.published[entry.event.kind] += 1
            else:
                self.duplicates += 1
            if self._observer is not None:
                self._observer.on_published(entry.event, now, wall, new=new, spooled=entry.seq is not None)
        while self._recent and self._recent[0][0] < now - self._resend_ns:
            self._recent.popleft()

    async def _reject(self, entry: _Entry, error: EventRejected) -> None:
        log.error("event %s of %s is put aside: %s", entry.event.id, entry.event.source, error)
        await self._spool.quarantine(entry.event, str(error), entry.seq)
        self._forget(entry.queue, 1)
        self.quarantined += 1
        self.failures[error.reason] += 1

    def _failed(self, error: SinkError) -> None:
        self.failures[error.reason] += 1
        self._failures_in_row += 1
        self.resent += len(self._recent)
        self._again.extendleft(event for _, event in reversed(self._recent))
        self._recent.clear()
        delay_s = self._backoff.delay_s(self._failures_in_row, self._jitter())
        if not error.retryable:
            delay_s = self._backoff.longest_s
        self._probe_ns = self._now() + int(delay_s * NS_PER_S)
        if self.last_error is None or self.last_error.reason != error.reason:
            log.error("%s; events wait in %s", error, self._spool.path)
        self.last_error = error

    async def _stow_or_tell(self) -> None:
        """``_stow``; when the disk fails as well, events stay in memory and ``put`` waits."""
        try:
            await self._stow()
        except SpoolError as error:
            self.failures[error.reason] += 1
            if not self._spool_told:
                log.error("%s; %d events are held in memory", error, self.pending)
            self._spool_told = True
        else:
            self._spool_told = False

    async def _stow(self) -> None:
        """Move everything in memory to the spool, to where it belongs. Raises ``SpoolError``."""
        if self._again:
            count = len(self._again)
            await self._spool.prepend(list(self._again))
            self._forget(self._again, count)
        events = list(self._pending)
        if not events:
            return
        try:
            await self._spool.append(events)
        except EventRejected:
            await self._stow_one_by_one(events)
            return
        self.spooled += len(events)
        self._forget(self._pending, len(events))

    async def _stow_the_last(self) -> None:
        try:
            await self._stow()
        except SpoolError as error:
            raise SpoolError(f"{error}; {self.pending} events are lost") from None

    async def _stow_alone(self) -> None:
        """``_stow`` while ``run`` does not hold the spool open."""
        async with self._holds_spool:
            if self.pending:
                await self._spool.open()
                try:
                    await self._stow()
                finally:
                    await self._spool.aclose()

    async def _stow_one_by_one(self, events: list[Event]) -> None:
        for event in events:
            try:
                await self._spool.append([event])
            except EventRejected as error:
                await self._reject(_Entry(event, None, self._pending), error)
            else:
                self.spooled += 1
                self._forget(self._pending, 1)

    def _forget(self, queue: deque[Event] | None, count: int) -> None:
        """Take events that are safe elsewhere out of memory."""
        if queue is None:
            return
        for _ in range(count):
            queue.popleft()
        if len(self._pending) < self._capacity:
            self._room.set()

    def _sink_is_away(self) -> bool:
        return self._failures_in_row > 0

    def _now(self) -> int:
        return self._clock.monotonic_ns()
