"""Keeps a source running: the only place that retries."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from stream.accounting import BooksError
from stream.channel import Channel
from stream.clock import NS_PER_S, Clock
from stream.errors import SourceError
from stream.ingest.open import CountingSource
from stream.settings import RetrySettings
from stream.types import EpochEnd, EpochStart, MediaItem, Stopped

log = logging.getLogger(__name__)

STOP_S = 6.0
"""How long a source that was told to stop is waited for: its longest uninterruptible step, and a little."""
REFUSED_S = 30.0
"""Wait before a camera that was live is tried again after a failure that somebody may have to mend: accounts are locked
after a few wrong passwords."""
SCHEDULE_S = 1.0
"""How often a schedule is looked at."""
FARTHEST_NS = 1 << 62
"""Media time that a source may start at, 146 years: twice as much no longer fits 64 bits."""
STABLE_S = 10.0
"""A source that stayed live this long begins its back-off anew."""


class SourceState(StrEnum):
    """Where a source is in its life."""

    CONNECTING = "connecting"
    LIVE = "live"
    STALLED = "stalled"
    """Live, but nothing has come for a while."""
    BACKING_OFF = "backing_off"
    PAUSED = "paused"
    """Its schedule says that nobody watches it now."""
    ENDED = "ended"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class SourceStatus:
    """What is known of a source right now."""

    state: SourceState = SourceState.CONNECTING
    since_ns: int = 0
    """When it got into this state (monotonic)."""
    cause: str = ""
    """One line on the last failure."""
    attempts: int = 0
    """Connection attempts since it was last live."""
    reconnects: dict[str, int] = field(default_factory=dict)
    """Times it was live and got lost, by reason."""
    failed_attempts: dict[str, int] = field(default_factory=dict)
    """Attempts that did not get as far as media, by reason."""
    error: SourceError | None = None
    """Why it failed for good."""
    retry_ns: int | None = None
    """When it will be tried again (monotonic), while it backs off."""


def backoff_s(retry: RetrySettings, failures: int, jitter: float) -> float:
    """Wait before the next attempt: doubles with each failure, up to a limit; ``jitter`` 0..1 takes off up to half."""
    full = min(retry.max_s, retry.first_s * 2.0 ** min(failures - 1, 30))
    return full * (1 - jitter / 2)


class Supervisor:
    """Runs one source in its own thread, again and again, until it ends, fails for good, or is stopped.

    ``open_source(first_epoch)`` makes a fresh source whose first epoch has that number.
    ``on_change(source_id, status, previous)`` is told of each change of state. ``scheduled`` says whether the source
    is watched now (``None``: always); while it is not, there is no connection. One that is ``persistent`` and was
    live once is tried again whatever is wrong.
    """

    def __init__(
        self,
        source_id: str,
        open_source: Callable[[int], CountingSource],
        channel: Channel[MediaItem],
        retry: RetrySettings,
        clock: Clock,
        on_change: Callable[[str, SourceStatus, SourceState], None],
        rng: random.Random | None = None,
        scheduled: Callable[[], bool] | None = None,
        persistent: bool = False,
    ) -> None:
        self.source_id = source_id
        self.status = SourceStatus(since_ns=clock.monotonic_ns())
        self._source: CountingSource | None = None
        self._past: Counter[str] = Counter()
        self._open_source = open_source
        self._channel = channel
        self._retry = retry
        self._clock = clock
        self._on_change = on_change
        self._rng = rng or random.Random()
        self._scheduled = scheduled
        self._persistent = persistent
        self._stop = threading.Event()
        self._end_attempt = threading.Event()
        self._stopping = asyncio.Event()
        self._next_epoch = 0
        self._open_epoch: int | None = None
        self._loop = asyncio.get_running_loop()

    def stop(self) -> None:
        """End the source; ``run`` returns soon after."""
        self._stop.set()
        self._end_attempt.set()
        self._stopping.set()
        self._channel.stop()

    def frames(self) -> dict[str, int]:
        """Frames by stage, over all connections so far."""
        return self._totals(_FRAME_STAGES)

    def audio_samples(self) -> dict[str, int]:
        """Audio samples emitted and dropped at ingest, over all connections so far."""
        return self._totals(_AUDIO_RESULTS)

    def packets(self) -> dict[str, int]:
        """Packets by what became of them, and times the timeline broke, over all connections so far."""
        return self._totals(_PACKET_RESULTS)

    def _totals(self, names: tuple[str, ...]) -> dict[str, int]:
        current = _counts(self._source)
        return {name: self._past[name] + current[name] for name in names}

    async def run(self) -> None:
        """Returns when the source has ended, failed or been stopped; the channel is closed then."""
        failures = 0
        try:
            while not self._stop.is_set():
                if not self._on():
                    await self._pause()
                    failures = 0
                    continue
                self._set(SourceState.CONNECTING)
                self.status.attempts += 1
                error = await self._attempt()
                # Its end was asked for even if the schedule is on again: clocks are set, and ending takes a while.
                if not self._stop.is_set() and (self._end_attempt.is_set() or not self._on()):
                    continue
                if error is None or self._stop.is_set():
                    break
                if self._was_stable():
                    failures = 0
                failures += 1
                was_live = self.status.state is SourceState.LIVE
                counts = self.status.reconnects if was_live else self.status.failed_attempts
                counts[error.reason] = counts.get(error.reason, 0) + 1
                if self._hopeless(error):
                    self.status.error = error
                    self._set(SourceState.FAILED, str(error))
                    return
                wait_s = backoff_s(self._retry, failures, self._rng.random()) if error.retryable else REFUSED_S
                self.status.retry_ns = self._clock.monotonic_ns() + int(wait_s * NS_PER_S)
                self._set(SourceState.BACKING_OFF, str(error))
                await self._sleep(wait_s)
            self._set(SourceState.ENDED)
        finally:
            self._channel.close()

    def _hopeless(self, error: SourceError) -> bool:
        """Whether trying again cannot help, or nobody wants it. A camera that was live once can be live again."""
        if self._next_epoch == 0:
            return self._retry.give_up or not error.retryable
        return not error.retryable and not self._persistent

    def _on(self) -> bool:
        return self._scheduled is None or self._scheduled()

    async def _pause(self) -> None:
        self._set(SourceState.PAUSED)
        while not self._on() and not self._stop.is_set():
            await self._sleep(SCHEDULE_S)

    def _was_stable(self) -> bool:
        lived_ns = self._clock.monotonic_ns() - self.status.since_ns
        return self.status.state is SourceState.LIVE and lived_ns >= STABLE_S * NS_PER_S

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return

    async def _attempt(self) -> SourceError | None:
        """One run of the source on a thread of its own; the error that ended it."""
        ended: asyncio.Future[SourceError | None] = self._loop.create_future()
        self._past.update(_counts(self._source))
        self._source = None
        self._end_attempt = threading.Event()
        if self._stop.is_set():
            self._end_attempt.set()
        try:
            self._source = source = self._open_source(self._next_epoch)
            thread = threading.Thread(
                target=self._run_source,
                args=(source, self._end_attempt, ended),
                name=f"source-{self.source_id}",
                daemon=True,
            )
            thread.start()
        except SourceError as refused:
            return refused
        except Exception as unforeseen:
            log.exception("source %s cannot be made", self.source_id)
            return self._internal(unforeseen)
        try:
            error = await self._until_ended(ended)
        except asyncio.CancelledError:
            self.stop()
            raise
        finally:
            await asyncio.to_thread(thread.join, STOP_S)
        paused = self._end_attempt.is_set() and not self._stop.is_set()
        reason = "removed" if self._stop.is_set() else "paused" if paused else "lost" if error else "end_of_stream"
        self._end_open_epoch(reason)
        return error

    async def _until_ended(self, ended: asyncio.Future[SourceError | None]) -> SourceError | None:
        """Waits for the source, but once told to stop not for ever: resolving a name cannot be interrupted."""
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            either: set[asyncio.Future[Any]] = {ended, stopping}
            look_s = None if self._scheduled is None else SCHEDULE_S
            while not (await asyncio.wait(either, timeout=look_s, return_when=asyncio.FIRST_COMPLETED))[0]:
                if not self._on():
                    self._end_attempt.set()
                    break
            if not ended.done():
                await asyncio.wait({ended}, timeout=STOP_S)
        finally:
            stopping.cancel()
        if not ended.done():
            log.warning("source %s does not end; it is left behind", self.source_id)
            return None
        return ended.result()

    def _run_source(
        self, source: CountingSource, stop: threading.Event, ended: asyncio.Future[SourceError | None]
    ) -> None:
        outcome: SourceError | None = None
        bug: BooksError | None = None
        try:
            source.run(self._emit, stop)
        except Stopped:
            pass
        except SourceError as lost:
            outcome = lost
        except BooksError as wrong:
            bug = wrong
        except Exception as unforeseen:
            log.exception("source %s ended by an error of this program", self.source_id)
            outcome = self._internal(unforeseen)
        # Of a source that was left behind the loop may be gone.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(_settle, ended, outcome, bug)

    def _internal(self, unforeseen: Exception) -> SourceError:
        """Whatever it is, the other sources must not end with it."""
        cause = f"ended by an error of this program ({type(unforeseen).__name__}); please report what the log says"
        return SourceError(self.source_id, "internal", cause, retryable=False)

    def _emit(self, item: MediaItem) -> None:
        """Called on the source's thread."""
        if isinstance(item, EpochStart) and abs(item.origin_ns) > FARTHEST_NS:
            # No window could be cut there, and the other sources must not end with it.
            cause = f"its timestamps start at {item.origin_ns // NS_PER_S} s, which is beyond reason"
            raise SourceError(self.source_id, "timestamps", cause, retryable=self._persistent)
        self._channel.put(item)
        # Only now: what a channel that was stopped did not take has not begun, or still has to be ended.
        if isinstance(item, EpochStart):
            self._open_epoch = item.epoch
            self._next_epoch = item.epoch + 1
            self._loop.call_soon_threadsafe(self._set, SourceState.LIVE)
        elif isinstance(item, EpochEnd):
            self._open_epoch = None

    def _end_open_epoch(self, reason: str) -> None:
        """A source that broke off could not say so itself."""
        if self._open_epoch is not None:
            self._channel.put_now(EpochEnd(self.source_id, self._open_epoch, reason, self._clock.monotonic_ns()))
            self._open_epoch = None

    def _set(self, state: SourceState, cause: str | None = None) -> None:
        status = self.status
        previous = status.state
        if cause is not None:
            status.cause = cause
        if state is SourceState.LIVE:
            status.attempts = 0
        if state is previous and state is not SourceState.CONNECTING:
            return
        status.state = state
        if state is not SourceState.BACKING_OFF:
            status.retry_ns = None
        status.since_ns = self._clock.monotonic_ns()
        self._on_change(self.source_id, status, previous)


_FRAME_STAGES = ("decoded", "sampled", "handed_on", "skipped", "late", "corrupt_packets")
_AUDIO_RESULTS = ("emitted", "dropped")
_PACKET_RESULTS = ("read", "left_undecoded", "resyncs")


def _counts(source: CountingSource | None) -> Counter[str]:
    if source is None:
        return Counter()
    stats = source.stats
    return Counter(
        decoded=stats.frames_decoded,
        sampled=stats.frames_sampled,
        handed_on=stats.frames_emitted,
        skipped=stats.frames_skipped,
        late=stats.frames_late,
        corrupt_packets=stats.corrupt_packets,
        emitted=stats.audio_samples,
        dropped=stats.audio_samples_dropped,
        read=stats.packets,
        left_undecoded=stats.packets_skipped,
        resyncs=stats.resyncs,
    )


def _settle(ended: asyncio.Future[SourceError | None], outcome: SourceError | None, bug: BooksError | None) -> None:
    if ended.done():
        return
    if bug is not None:
        ended.set_exception(bug)
    else:
        ended.set_result(outcome)
