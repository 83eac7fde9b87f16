"""Engine threads: each owns a copy of the graphs and takes the next batch the moment it is free.

Which generation of a pack computes a batch is settled when the batch is taken, under the same lock: so a pack can be
replaced between two windows of every source, none lost and none computed twice for publication.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from engines.errors import EngineError
from stream.batching import Batch, Batcher
from stream.clock import Clock
from stream.event_format import PackInfo
from stream.packs import Generation
from stream.types import ClipWindow, Prediction

RESULTS_PER_THREAD = 2
"""Batches of each engine thread that may wait to be taken in."""


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What became of a batch."""

    batch: Batch
    """The windows."""
    pack: PackInfo
    """What computed it."""
    predictions: list[list[Prediction]] | None
    """Per window its predictions; ``None`` when the batch failed."""
    error: EngineError | None
    """Why it failed."""
    taken_ns: int
    """When the engine took it (monotonic)."""
    inferred_ns: int
    """When it was done (monotonic)."""


@dataclass(slots=True)
class PackLoad:
    """Work of one pack since the pool began."""

    offered: int = 0
    """Windows of live sources that were to be computed."""
    computed: int = 0
    """Windows computed."""
    busy_ns: int = 0
    """Time that engine threads spent on them."""

    def since(self, before: PackLoad) -> PackLoad:
        """What came after ``before``."""
        return PackLoad(self.offered - before.offered, self.computed - before.computed, self.busy_ns - before.busy_ns)


class Trial(Protocol):
    """A generation that is tried on the batches of the one that serves."""

    @property
    def generation(self) -> Generation:
        """What is tried."""
        ...

    def run(self, thread: int, result: BatchResult) -> None:
        """Compute a batch again, on the engine thread of that number; the result has been handed over already.

        The next windows of its sources wait for this, so that what it keeps of them stays in order. Never raises
        ``EngineError``.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Job:
    batch: Batch
    serving: Generation
    trial: Trial | None

    @property
    def generations(self) -> list[Generation]:
        return [self.serving] if self.trial is None else [self.serving, self.trial.generation]


class EnginePool:
    """Runs batches on threads and hands the results to the event loop, in order for each source."""

    def __init__(
        self,
        batcher: Batcher,
        serving: Iterable[Generation],
        threads: int,
        on_result: Callable[[BatchResult], None],
        clock: Clock,
    ) -> None:
        self._batcher = batcher
        self._serving = {generation.pack.name: generation for generation in serving}
        self._trials: dict[str, Trial] = {}
        self._in_use: Counter[Generation] = Counter()
        self._loads: dict[str, PackLoad] = {name: PackLoad() for name in self._serving}
        self._on_result = on_result
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        lock = threading.Lock()
        self._work = threading.Condition(lock)
        """There may be something to compute."""
        self._unused = threading.Condition(lock)
        """A generation may have fallen idle."""
        # Results that nobody has taken in yet are bounded: while events cannot be handed over, engines rest, and
        # windows of live sources are dropped where drops are counted.
        self._credits = threading.Semaphore(RESULTS_PER_THREAD * threads)
        self._closing = False
        self._abandoned = False
        self._died = False
        """An engine thread died of a bug: what it was in is never left."""
        self._threads = [
            threading.Thread(target=self._serve, args=(number,), name=f"engine-{number}", daemon=True)
            for number in range(threads)
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
            self._loads[window.key.pack].offered += live
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

    @property
    def threads(self) -> int:
        """Engine threads."""
        return len(self._threads)

    def loads(self) -> dict[str, PackLoad]:
        """Work so far, by pack."""
        with self._work:
            return {name: replace(load) for name, load in self._loads.items()}

    def withdraw(self, name: str) -> None:
        """A pack does not serve, before the threads have been started."""
        with self._work:
            self._serving.pop(name).close()

    def try_on(self, name: str, trial: Trial) -> None:
        """From the next batch on, compute those of a pack by ``trial`` too, after what serves."""
        with self._work:
            self._trials[name] = trial

    def end_trial(self, name: str) -> None:
        """From the next batch on, compute those of a pack once again."""
        with self._work:
            self._trials.pop(name, None)

    def cut_over(self, name: str, new: Generation) -> Generation:
        """From the next batch on, ``new`` serves; gives what served until now, for ``retire``."""
        with self._work:
            self._trials.pop(name, None)
            old, self._serving[name] = self._serving[name], new
        return old

    async def retire(self, generation: Generation) -> None:
        """Free a generation that neither serves nor is tried, once no thread is in it."""
        await asyncio.to_thread(self._close_unused, generation)

    def _close_unused(self, generation: Generation) -> None:
        with self._work:
            self._unused.wait_for(lambda: self._died or not self._in_use[generation])
            if self._in_use.pop(generation, 0):
                return
        generation.close()

    async def crashed(self) -> None:
        """Waits for ever, unless an engine thread dies of a bug: then raises what killed it."""
        await asyncio.shield(self._crash)

    async def aclose(self, *, finish: bool = True) -> None:
        """Let the threads finish what waits, then free the engines.

        Without ``finish`` what waits is left alone: when nobody takes results in, it would wait for ever. Idempotent.
        """
        with self._work:
            self._closing = True
            self._abandoned |= not finish
            self._work.notify_all()
        # Nobody may be left to take results in, so no thread waits for that any more.
        self._credits.release(len(self._threads))
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        for generation in (*self._serving.values(), *(trial.generation for trial in self._trials.values())):
            generation.close()
        self._crash.cancel()

    def _serve(self, number: int) -> None:
        try:
            while (job := self._next()) is not None:
                result = self._run(number, job)
                self._loop.call_soon_threadsafe(self._on_result, result)
                if job.trial is not None:
                    job.trial.run(number, result)
                # After the hand-over, so that the source's next result cannot overtake this one.
                self._done(job, result)
        except Exception as bug:  # noqa: BLE001 - handed to the event loop, which ends the service with it
            with self._work:
                self._died = True
                self._unused.notify_all()
            self._loop.call_soon_threadsafe(self._report, bug)

    def _report(self, bug: Exception) -> None:
        if not self._crash.done():
            self._crash.set_exception(bug)

    def _next(self) -> _Job | None:
        self._credits.acquire()
        with self._work:
            while self._abandoned or (batch := self._batcher.take()) is None:
                if self._closing:
                    self._credits.release()
                    return None
                self._work.wait()
            pack, _ = batch.lane
            job = _Job(batch, self._serving[pack], self._trials.get(pack))
            self._in_use.update(job.generations)
            return job

    def _run(self, number: int, job: _Job) -> BatchResult:
        batch, serving = job.batch, job.serving
        _, branch = batch.lane
        taken_ns = self._clock.monotonic_ns()
        predictions, error = None, None
        try:
            predictions = serving.run(number, branch, batch.windows)
        except EngineError as failure:
            error = failure
        return BatchResult(batch, serving.pack.info, predictions, error, taken_ns, self._clock.monotonic_ns())

    def _done(self, job: _Job, result: BatchResult) -> None:
        with self._work:
            self._batcher.done(job.batch)
            self._in_use.subtract(job.generations)
            load = self._loads[job.batch.lane[0]]
            load.computed += len(job.batch.windows)
            load.busy_ns += result.inferred_ns - result.taken_ns
            self._work.notify()
            self._unused.notify_all()
