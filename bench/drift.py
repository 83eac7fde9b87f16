"""Latency over time, at a load that is known: engines that take a set time for each window."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType

from bench.common import BenchError
from bench.rig import EVERY_WINDOW, every_window_an_event, staggered
from bench.slope import Slope, block_medians, fit
from engines.open import LoadedPack
from engines.types import Array, Engine, EngineSpec, Tensors
from stream.clock import NS_PER_S, SystemClock
from stream.packs import ServedPack, load_packs
from stream.service import Service
from stream.settings import load_settings
from stream.types import Event

BLOCKS = 40
"""Stretches whose median latencies are fitted."""
WARM_S = 3.0
"""Until queues are as full as they get, at least; a fifth of the run if that is longer."""


class SlowedEngine:
    """An engine that takes a set time for each item of a batch, most of it asleep, as if a GPU worked."""

    def __init__(self, engine: Engine, item_s: float) -> None:
        self._engine = engine
        self._item_s = item_s

    @property
    def spec(self) -> EngineSpec:
        """See ``Engine``."""
        return self._engine.spec

    def warmup(self, batch_sizes: Sequence[int]) -> None:
        """See ``Engine``."""
        self._engine.warmup(batch_sizes)

    def infer(self, inputs: Tensors) -> dict[str, Array]:
        """See ``Engine``."""
        due_s = time.monotonic() + self._item_s * len(next(iter(inputs.values())))
        outputs = self._engine.infer(inputs)
        time.sleep(max(0.0, due_s - time.monotonic()))
        return outputs

    def close(self) -> None:
        """See ``Engine``."""
        self._engine.close()


@dataclass(frozen=True, slots=True)
class Drift:
    """What a run showed."""

    slope: Slope
    """ms of latency for each minute."""
    median_ms: float
    """Latency, capture to event."""
    dropped_share: float
    """Windows that were stale before an engine was free."""


class _Latencies:
    """When each event came, and how late."""

    def __init__(self) -> None:
        self.at_s: list[float] = []
        self.ms: list[float] = []

    async def put(self, events: Sequence[Event]) -> None:
        """See ``EventPort``."""
        now_s, wall_ns = time.monotonic(), time.time_ns()
        for event in events:
            if event.kind != "source" and event.data["phase"] != "end":
                self.at_s.append(now_s)
                self.ms.append((wall_ns - event.capture_wall_ns) / (NS_PER_S / 1000))


def drift(pack: Path, sources: int, load: float, seconds: float) -> Drift:
    """Live generated sources that ask ``load`` times of what one engine thread can do. Raises ``BenchError``."""
    url = "synthetic://cam?fps=10&width=64&height=36&audio=1"
    wanted = {
        "sources": [{"id": f"cam-{n}", "url": url} for n in range(sources)],
        "packs": [{"name": str(pack), "backend": "onnxruntime"}],
        "engine": {"threads": 1},
        "events": EVERY_WINDOW,
    }
    settings = load_settings(None, wanted)
    (served,) = load_packs(settings, Path())
    a_second = sum(Fraction(NS_PER_S, branch.hop_ns) for branch in served.manifest.branches)
    slowed = _slowed(every_window_an_event(served), load / float(sources * a_second))
    latencies = _Latencies()

    async def run() -> Service:
        opener = staggered(1.0, sources)
        service = Service(settings, [slowed], latencies, SystemClock(), opener)
        running = asyncio.create_task(service.run())
        await service.ready.wait()
        await asyncio.sleep(warm_s + seconds)
        service.stop()
        await running
        return service

    warm_s = max(WARM_S, seconds / 5)
    begin_s = time.monotonic()
    service = asyncio.run(run())
    found = [(at, ms) for at, ms in zip(latencies.at_s, latencies.ms, strict=True) if at - begin_s > warm_s]
    if len(found) < 10:
        raise BenchError("hardly an event came; give more --minutes")
    xs, ys = block_medians([at / 60 for at, _ in found], [ms for _, ms in found], BLOCKS)
    offered = sum(hop.entered for (_, stage), hop in service.ledger.hops.items() if stage == "batch_slot")
    stale = service.ledger.dropped()["batch_slot", "stale"]
    return Drift(fit(xs, ys), sorted(ms for _, ms in found)[len(found) // 2], stale / max(1, offered))


def _slowed(served: ServedPack, window_s: float) -> ServedPack:
    """The pack with engines whose window graphs take so long for each window."""
    window_graphs = {branch.graph for branch in served.manifest.branches}

    def slow(copy: LoadedPack) -> LoadedPack:
        engines = {
            name: SlowedEngine(engine, window_s) if name in window_graphs else engine
            for name, engine in copy.engines.items()
        }
        return replace(copy, engines=MappingProxyType(engines))

    return replace(served, copies=tuple(slow(copy) for copy in served.copies))
