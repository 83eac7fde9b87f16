"""Sources that come and go: what a service has left of them afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.common import BenchError
from bench.slope import Slope, fit
from stream.clock import SystemClock
from stream.packs import load_packs
from stream.service import Service
from stream.settings import Settings, load_settings
from stream.source_settings import SourceSettings
from stream.types import Event

PATIENCE_S = 30.0
"""How long a source may take to be looked at, and the process to settle."""
WARM = 0.3
"""Share of the samples in which caches, pools and arenas still fill."""


class Nobody:
    """Takes events."""

    async def put(self, events: Sequence[Event]) -> None:
        """See ``EventPort``."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What the process holds."""

    cycles: int
    """Sources added and removed so far."""
    rss_mb: float
    """Resident memory, after freed memory was given back (1 MB = 10^6 bytes)."""
    threads: int
    fds: int
    tasks: int
    """asyncio tasks."""

    @property
    def counts(self) -> tuple[int, int, int]:
        """What must come back to where it was."""
        return self.threads, self.fds, self.tasks


@dataclass(frozen=True, slots=True)
class Churned:
    """What the samples say."""

    samples: tuple[Sample, ...]
    """The first before any cycle."""

    @property
    def rss_mb_per_100(self) -> Slope:
        """Growth of resident memory for each 100 cycles, once warm."""
        warm = self.samples[int(len(self.samples) * WARM) :]
        return fit([sample.cycles for sample in warm], [sample.rss_mb for sample in warm]).times(100)

    @property
    def deltas(self) -> tuple[int, int, int]:
        """Threads, file descriptors and tasks at the end (median of three samples) less those at the start."""
        ends = zip(*(sample.counts for sample in self.samples[-3:]), strict=True)
        now = [round(statistics.median(end)) for end in ends]
        return tuple(after - before for after, before in zip(now, self.samples[0].counts, strict=True))  # type: ignore[return-value]


def give_back_memory() -> None:
    """Collect garbage, and have the allocator return what is free, so that what remains is held by somebody."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def sample(cycles: int) -> Sample:
    """Look at this process."""
    give_back_memory()
    process = psutil.Process()
    with process.oneshot():
        rss, threads, fds = process.memory_info().rss, process.num_threads(), process.num_fds()
    return Sample(cycles, rss / 1e6, threads, fds, len(asyncio.all_tasks()))


async def settled(cycles: int, start: Sample | None) -> Sample:
    """A sample, taken when counts are back at the start's, or ``PATIENCE_S`` later whatever they are."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        now = sample(cycles)
        if start is None or time.monotonic() > deadline_s:
            return now
        if all(here <= there for here, there in zip(now.counts, start.counts, strict=True)):
            return now
        await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def standing_service(settings: Settings) -> AsyncIterator[Service]:
    """A service that stays without sources."""
    service = Service(settings, load_packs(settings, Path()), Nobody(), SystemClock())
    running = asyncio.create_task(service.run())
    try:
        waiting = asyncio.create_task(service.ready.wait())
        await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        yield service
    finally:
        service.stop()
        await running


async def fill_pool() -> None:
    """Start every thread that asyncio's executor will ever have, or their number would depend on chance."""
    workers = min(32, (os.cpu_count() or 1) + 4)
    await asyncio.gather(*(asyncio.to_thread(time.sleep, 0.05) for _ in range(workers)))


async def come_and_go(service: Service, wave: Sequence[SourceSettings]) -> None:
    """Add some sources, see that each was looked at, remove them. Raises ``BenchError``."""
    for settings in wave:
        service.sources.add(settings)
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not all(_seen(service, settings) for settings in wave):  # noqa: ASYNC110 - counts tell nobody
                await asyncio.sleep(0.005)
    except TimeoutError:
        causes = [source.supervisor.status.cause for source in service.sources.values()]
        raise BenchError(f"a source was not looked at in {PATIENCE_S:g} s: {' '.join(filter(None, causes))}") from None
    await asyncio.gather(*(service.sources.remove(settings.id) for settings in wave))


def _seen(service: Service, settings: SourceSettings) -> bool:
    """An engine answered on a recording; of a live source, whose windows take their time, frames came."""
    if not settings.live:
        return service.ledger.hop(settings.id, "inference").left > 0
    return service.sources[settings.id].supervisor.frames()["sampled"] > 0


async def churn(
    pack: Path,
    wave: Callable[[int], Sequence[SourceSettings]],
    cycles: int,
    *,
    at_most: int | None = None,
    limit_mb: float = 1.0,
    until_s: float | None = None,
) -> Churned:
    """At least ``cycles`` sources added and removed, wave by wave, and so long that memory can be judged.

    ``wave(n)`` gives the sources of wave ``n``. It goes on, up to ``at_most`` cycles, while the interval of the
    slope of memory holds ``limit_mb`` for 100 cycles; and until ``until_s`` (monotonic) is past.
    """
    wanted = {"packs": [{"name": str(pack), "backend": "onnxruntime"}], "stay": True, "engine": {"threads": 1}}
    async with standing_service(load_settings(None, wanted)) as service:
        await fill_pool()
        # The first wave meets every import and pool; it counts for nothing.
        await come_and_go(service, wave(0))
        start = await settled(0, None)
        samples, done, number = [start], 0, 1
        while done < cycles or _goes_on(samples, at_most, limit_mb, until_s):
            sources = wave(number)
            await come_and_go(service, sources)
            done, number = done + len(sources), number + 1
            samples.append(await settled(done, start))
    return Churned(tuple(samples))


def _goes_on(samples: list[Sample], at_most: int | None, limit_mb: float, until_s: float | None) -> bool:
    if until_s is not None and time.monotonic() < until_s:
        return True
    if at_most is None or samples[-1].cycles >= at_most:
        return False
    slope = Churned(tuple(samples)).rss_mb_per_100
    return slope.low < limit_mb < slope.high


def synthetic(count: int) -> Callable[[int], Sequence[SourceSettings]]:
    """Waves of generated sources: those of even waves are read fast until windows were answered, the others live."""

    def wave(number: int) -> list[SourceSettings]:
        pace = "fast" if number % 2 == 0 else "realtime"
        url = "synthetic://scene?fps=10&width=64&height=36&seconds=4&audio=1&brightness=0:0.2,2:1"
        return [
            SourceSettings.model_validate({"id": f"cam-{number}-{n}", "url": url, "pace": pace}) for n in range(count)
        ]

    return wave


def cameras(url: str, count: int) -> Callable[[int], Sequence[SourceSettings]]:
    """Waves of connections to one real camera."""

    def wave(number: int) -> list[SourceSettings]:
        return [SourceSettings.model_validate({"id": f"rtsp-{number}-{n}", "url": url}) for n in range(count)]

    return wave
