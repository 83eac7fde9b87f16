"""(b) Windows per second through the whole service at saturation, against the bare engine on the same batches."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.clip import Clip
from bench.common import BenchError, Measured, Row, median_ratio
from bench.ready import ready_opener
from bench.rig import (
    EVERY_WINDOW,
    Call,
    Opener,
    RecordedPack,
    Recorder,
    Running,
    busy_share,
    every_window_an_event,
    load_recorded,
    running,
    source_entries,
)
from engines.types import Engine
from stream.ingest.open import open_source
from stream.settings import Settings, load_settings

SETTLE_S = 1.5
"""Until the first windows of every source have closed and the queues are full."""

LEAST_BATCHES = 4
"""Fewer say little."""
MOST_INTERVALS = 8
"""So many intervals are waited for them."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Whole batches that one engine thread ran without a pause."""

    calls: tuple[Call, ...]
    """Inferences, in order."""
    windows: int
    """Windows predicted by them."""
    seconds: float
    """From the end of the batch before them to the end of the last."""


@dataclass(slots=True)
class Pairs:
    """Interleaved runs of both sides."""

    service: list[float] = field(default_factory=list)
    """Windows per second through the service."""
    bare: list[float] = field(default_factory=list)
    """Windows per second of the bare engines, on the same calls."""
    batches: defaultdict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    """Batch sizes by graph."""
    busy: list[float] = field(default_factory=list)
    """Share of the service's engine time that was spent in inference."""
    events_per_s: float = 0.0
    """Events acknowledged."""


def whole_batches(recorder: Recorder, ends: frozenset[str], begin_s: float, end_s: float) -> Stretch | None:
    """The whole batches in an interval; ``None`` where there are fewer than ``LEAST_BATCHES``."""
    calls = recorder.between(begin_s, end_s)
    bounds = [number for number, call in enumerate(calls) if call.graph in ends]
    if len(bounds) <= LEAST_BATCHES:
        return None
    first, last = bounds[0], bounds[-1]
    counted = tuple(calls[first + 1 : last + 1])
    windows = sum(call.batch for call in counted if call.graph in ends)
    return Stretch(counted, windows, calls[last].end_s - calls[first].end_s)


def replay(engines: dict[str, Engine], recorder: Recorder, stretch: Stretch) -> float:
    """Run the same inferences on ready inputs, one after the other; returns the seconds they took."""
    begin_s = time.perf_counter()
    for call in stretch.calls:
        engines[call.graph].infer(recorder.inputs[call.graph, call.batch])
    return time.perf_counter() - begin_s


def _bare_rate(pack: RecordedPack, stretches: Sequence[Stretch]) -> float:
    """Windows per second of the bare engines, each on a thread of its own."""
    with ThreadPoolExecutor(len(stretches)) as pool:
        took = pool.map(replay, map(dict, pack.bare), pack.recorders, stretches)
        return sum(stretch.windows / seconds for stretch, seconds in zip(stretches, took, strict=True))


async def _measure(run: Running, pack: RecordedPack, runs: int, interval_s: float) -> Pairs:
    """Let the service run, hold its engines, run them bare; again and again."""
    pairs = Pairs()
    await _until_saturated(run, pack)
    begin_s, published = time.perf_counter(), run.publisher.published.total()
    for _ in range(runs):
        whole, from_s, to_s = await _serve_for(pack, interval_s)
        pack.gate.clear()
        await asyncio.sleep(0.3)  # an inference that runs is let end, and the queues fill
        pairs.busy.append(busy_share(pack, from_s, to_s))
        pairs.service.append(sum(stretch.windows / stretch.seconds for stretch in whole))
        pairs.bare.append(await asyncio.to_thread(_bare_rate, pack, whole))
        for stretch in whole:
            for call in stretch.calls:
                pairs.batches[call.graph][call.batch] += 1
        pack.gate.set()
    serving_s = (time.perf_counter() - begin_s) / 2
    pairs.events_per_s = (run.publisher.published.total() - published) / serving_s
    return pairs


async def _serve_for(pack: RecordedPack, interval_s: float) -> tuple[list[Stretch], float, float]:
    """What each engine thread ran in an interval, and the interval; it is drawn out on a slow machine."""
    from_s = time.perf_counter()
    for _ in range(MOST_INTERVALS):
        await asyncio.sleep(interval_s)
        to_s = time.perf_counter()
        stretches = [whole_batches(recorder, pack.window_graphs, from_s, to_s) for recorder in pack.recorders]
        whole = [stretch for stretch in stretches if stretch is not None]
        if len(whole) == len(stretches):
            return whole, from_s, to_s
    raise BenchError(f"an engine thread ran no two batches in {MOST_INTERVALS * interval_s:g} s: too slow to measure")


async def _until_saturated(run: Running, pack: RecordedPack, patience_s: float = 60) -> None:
    deadline_s = time.perf_counter() + patience_s
    while run.windows("ok") < 4 * run.service.settings.engine.max_batch:
        if time.perf_counter() > deadline_s:
            raise BenchError(f"the service predicted no windows in {patience_s:g} s; see the log above")
        await asyncio.sleep(0.05)
    await asyncio.sleep(SETTLE_S)
    pack.clear()


async def _row(
    settings: Settings, pack: RecordedPack, opener: Opener, runs: int, interval_s: float, folder: Path
) -> Pairs:
    async with running(settings, pack.served, folder, opener) as run:
        try:
            return await _measure(run, pack, runs, interval_s)
        finally:
            pack.gate.set()


def saturation(clip: Clip, pack_name: str, sources: int, runs: int, interval_s: float) -> Measured:
    """Both rows: fed with ready frames, and with real decoding."""
    entries = source_entries(sources, clip.path, "fast")
    settings = load_settings(None, {"sources": entries, "packs": [{"name": pack_name}], "events": EVERY_WINDOW})
    pack = load_recorded(settings)
    pack = replace(pack, served=every_window_an_event(pack.served))
    found = []
    try:
        for opener in (ready_opener(clip.path, clip.seconds), open_source):
            with TemporaryDirectory() as folder:
                found.append(asyncio.run(_row(settings, pack, opener, runs, interval_s, Path(folder))))
    finally:
        pack.close()
    ready, decoding = found
    info = pack.served.info
    return Measured(
        (
            Row("service_windows_per_s", statistics.median(ready.service), "whole service, ready frames", "windows/s"),
            Row("bare_windows_per_s", statistics.median(ready.bare), "bare engine, the same batches", "windows/s"),
            Row("service_ratio", median_ratio(ready.service, ready.bare), "service / bare", at_least=0.90),
            Row(
                "service_windows_per_s_with_decode",
                statistics.median(decoding.service),
                "whole service, real decoding on the same cores",
                "windows/s",
            ),
            Row("service_ratio_with_decode", median_ratio(decoding.service, decoding.bare), "service / bare"),
        ),
        (
            f"{sources} sources, {settings.engine.threads} engine thread(s), pack {info.name} on {info.backend} "
            f"{info.precision}; median of {runs} interleaved pairs of {interval_s:g} s.",
            "Thresholds and event settings are such that every window makes an event, far more than in real use.",
            f"Ready frames: {_conditions(ready)}.",
            f"Decoding: {_conditions(decoding)}.",
            "The bare engine replays exactly the inferences (graph and batch size) that the service ran in the "
            "interval before, on kept inputs, while the service is held.",
        ),
    )


def _conditions(pairs: Pairs) -> str:
    """Mean batch size by graph, how busy the engines were, and events per second."""
    means = {graph: sum(n * k for n, k in sizes.items()) / sizes.total() for graph, sizes in pairs.batches.items()}
    batches = ", ".join(f"{graph} {mean:.1f}" for graph, mean in sorted(means.items()))
    busy = statistics.median(pairs.busy)
    return f"mean batch {batches}; engines in inference {busy:.0%}; {pairs.events_per_s:.0f} events/s into Valkey"
