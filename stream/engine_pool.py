"""Engine threads: each owns a copy of the graphs and takes the next batch the moment it is free."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from engines.errors import EngineError
from stream.batching import Batch, Batcher
from stream.clock import Clock
from stream.inference import PackRunner
from stream.types import ClipWindow, Prediction

RESULTS_PER_THREAD = 2
"""Batches of each engine thread that may wait to be taken in."""

Runners = Mapping[str, PackRunner]
"""One engine thread's packs by name."""


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What became of a batch."""

    batch: Batch
    """The windows."""
    predictions: list[list[Prediction]] | None
    """Per window its predictions; ``None`` when the batch failed."""
    error: EngineError | None
    """Why it failed."""
    taken_ns: int
    """When the engine took it (monotonic)."""
    inferred_ns: int
    """When it was done (monotonic)."""


class EnginePool:
    """Runs batches on threads and hands the results to the event loop, in order for each source."""

    def __init__(
        self,
        batcher: Batcher,
        runners: list[Runners],
        on_result: Callable[[BatchResult], None],
        clock: Clock,
    ) -> None:
        self._batcher = batcher
        self._runners = runners
        self._on_result = on_result
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._work = threading.Condition()
        # Results that nobody has taken in yet are bounded: while events cannot be handed over, engines rest, and
        # windows of live sources are dropped where drops are counted.
        self._credits = threading.Semaphore(RESULTS_PER_THREAD * len(runners))
        self._closing = False
        self._threads = [
            threading.Thread(target=self._serve, args=(runner,), name=f"engine-{number}", daemon=True)
            for number, runner in enumerate(runners)
        ]
        self._crash: asyncio.Future[None] = self._loop.create_future()

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def offer(self, window: ClipWindow, deadline_ns: int, *, live: bool) -> list[ClipWindow]:
        """Queue a window; returns those that had to make way for it."""
        with self._work:
            dropped = self._batcher.offer(window, deadline_ns, live=live)
            self._work.notify()
        return dropped

    def forget(self, source_id: str) -> None:
        """A source is gone."""
        with self._work:
            self._batcher.forget(source_id)

    def taken_in(self) -> None:
        """A result has been dealt with."""
        self._credits.release()

    @property
    def waiting(self) -> int:
        """Windows that wait for an engine."""
        with self._work:
            return len(self._batcher)

    async def crashed(self) -> None:
        """Waits for ever, unless an engine thread dies of a bug: then raises what killed it."""
        await asyncio.shield(self._crash)

    async def aclose(self) -> None:
        """Let the threads finish what waits, then free the engines."""
        with self._work:
            self._closing = True
            self._work.notify_all()
        # Nobody may be left to take results in, so no thread waits for that any more.
        self._credits.release(len(self._threads))
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        for runners in self._runners:
            for runner in runners.values():
                runner.close()
        self._crash.cancel()

    def _serve(self, runners: Runners) -> None:
        try:
            while (batch := self._next()) is not None:
                result = self._run(runners, batch)
                self._loop.call_soon_threadsafe(self._on_result, result)
                # After the hand-over, so that the source's next result cannot overtake this one.
                with self._work:
                    self._batcher.done(batch)
                    self._work.notify()
        except Exception as bug:  # noqa: BLE001 - handed to the event loop, which ends the service with it
            self._loop.call_soon_threadsafe(self._report, bug)

    def _report(self, bug: Exception) -> None:
        if not self._crash.done():
            self._crash.set_exception(bug)

    def _next(self) -> Batch | None:
        self._credits.acquire()
        with self._work:
            while (batch := self._batcher.take()) is None:
                if self._closing:
                    self._credits.release()
                    return None
                self._work.wait()
            return batch

    def _run(self, runners: Runners, batch: Batch) -> BatchResult:
        pack, branch = batch.lane
        taken_ns = self._clock.monotonic_ns()
        predictions, error = None, None
        try:
            predictions = runners[pack].run(branch, batch.windows)
        except EngineError as failure:
            error = failure
        return BatchResult(batch, predictions, error, taken_ns, self._clock.monotonic_ns())
