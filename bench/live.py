"""Live sources: (c) event latency at half load, (f) sources watched without a dropped window."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bench.clip import FPS, Clip
from bench.common import BenchError, Measured, Row, thread_cpu_s
from bench.rig import (
    EVERY_WINDOW,
    RecordedPack,
    Running,
    busy_share,
    every_window_an_event,
    load_recorded,
    running,
    source_entries,
    staggered,
)
from engines.auto import calls_per_second
from engines.measure import random_batch, time_batch
from stream.packs import ServedPack
from stream.settings import Settings, load_settings

SPREAD_S = 1.0
"""Sources start spread over this long: cameras are out of step."""
TRIAL_S = 5.0
"""Length of the trial that finds how many sources are half load."""
WARM_S = 3.0
"""Until every source has closed its first window."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What a stretch of live running showed."""

    seconds: float
    """Its length."""
    busy: float
    """Share of the engine threads' time in inference."""
    cores: Mapping[str, float]
    """Cores kept busy, by kind of thread, and in total."""
    windows: int
    """Windows predicted, from the start on."""
    dropped: Counter[tuple[str, str]]
    """Everything dropped from the start on, by stage and reason, but for frames that nobody samples."""
    latencies_ms: list[float]
    """Capture to acknowledged XADD."""


async def _observe(
    settings: Settings, recorded: RecordedPack, served: ServedPack, seconds: float, folder: Path
) -> Observed:
    opener = staggered(SPREAD_S, len(settings.sources))
    async with running(settings, served, folder, opener) as run:
        await asyncio.sleep(SPREAD_S + WARM_S)
        recorded.clear()
        run.latencies.ms.clear()
        begin_s, before = time.perf_counter(), thread_cpu_s()
        await asyncio.sleep(seconds)
        end_s, after = time.perf_counter(), thread_cpu_s()
        took_s = end_s - begin_s
        return Observed(
            took_s,
            busy_share(recorded, begin_s, end_s),
            {kind: (after[kind] - before.get(kind, 0)) / took_s for kind in after},
            run.windows("ok"),
            _dropped(run),
            list(run.latencies.ms),
        )


def _dropped(run: Running) -> Counter[tuple[str, str]]:
    return Counter({key: count for key, count in run.service.ledger.dropped().items() if key[1] != "unsampled"})


def engine_s_per_source(pack: RecordedPack) -> float:
    """Engine seconds that one second of one source costs, one window at a time."""
    manifest, engines = pack.served.manifest, pack.bare[0]
    return sum(
        rate * time_batch(engines[graph], random_batch(manifest.graph(graph), 1)).p50_ms / 1000
        for graph, rate in calls_per_second(manifest).items()
    )


def batch_ms(pack: RecordedPack) -> float:
    """Bare time of one batch, mean over the batches that the service ran: the same graphs and sizes, one by one."""
    total_ms, batches = 0.0, 0
    for engines, recorder in zip(pack.bare, pack.recorders, strict=True):
        for (graph, size), count in Counter((call.graph, call.batch) for call in recorder.calls).items():
            total_ms += count * time_batch(engines[graph], recorder.inputs[graph, size], budget_s=0.5).p50_ms
            batches += count if graph in pack.window_graphs else 0
    return total_ms / max(1, batches)


def _run(settings: Settings, recorded: RecordedPack, served: ServedPack, seconds: float) -> Observed:
    with TemporaryDirectory() as folder:
        return asyncio.run(_observe(settings, recorded, served, seconds, Path(folder)))


def _settings(clip: Clip, pack: str, sources: int, **more: Any) -> Settings:
    entries = source_entries(sources, clip.path, "realtime")
    return load_settings(None, {"sources": entries, "packs": [{"name": pack}], **more})


def latency(clip: Clip, pack_name: str, seconds: float, sources: int | None = None) -> Measured:
    """(c) Capture to acknowledged XADD, with as many live sources as keep the engines half busy.

    Raises ``BenchError`` when no event comes.
    """
    # The last window of a round is closed by the end of the file, before its time: no round may end meanwhile.
    seconds = min(seconds, clip.seconds - SPREAD_S - WARM_S - 0.5)
    recorded = load_recorded(_settings(clip, pack_name, 1))
    try:
        threads = len(recorded.recorders)
        served = every_window_an_event(recorded.served)

        def watch(count: int, seconds: float) -> Observed:
            return _run(_settings(clip, pack_name, count, events=EVERY_WINDOW), recorded, served, seconds)

        count = sources or min(64, max(1, round(0.5 * threads / engine_s_per_source(recorded))))
        if sources is None:
            # Beside the decoders an inference takes longer than alone, so a trial corrects the number.
            count = max(1, round(count * min(1.0, 0.5 / max(0.01, watch(count, TRIAL_S).busy))))
        seen = watch(count, seconds)
        one_batch_ms = batch_ms(recorded)
    finally:
        recorded.close()
    if not seen.latencies_ms:
        raise BenchError(f"no event came within {seen.seconds:.0f} s; see the log above")
    p50, p95, p99 = np.percentile(seen.latencies_ms, (50, 95, 99)).tolist()
    limit = 2 * one_batch_ms + 60
    return Measured(
        (
            Row("latency_sources", count, "live sources"),
            Row("latency_engine_busy", seen.busy, "share of engine time in inference"),
            Row("inference_batch_ms", one_batch_ms, "bare inference of one batch, as used here", "ms"),
            Row("latency_p50_ms", p50, "capture to acknowledged XADD, median", "ms"),
            Row("latency_p95_ms", p95, "95th percentile (target 2 x batch + 60)", "ms", at_most=round(limit, 1)),
            Row("latency_p99_ms", p99, "99th percentile", "ms"),
            Row("latency_events", len(seen.latencies_ms), "events measured"),
        ),
        (
            f"{count} sources of 640x360 at {FPS} fps in real time, started out of step, for {seconds:g} s; "
            f"{len(recorded.recorders)} engine thread(s); pack copy whose every window makes an event.",
            "A file read in real time arrives when its timestamps say; the camera's and the network's own delay are "
            "not in it. Up to one frame interval (40 ms) passes before the frame that closes a window is there.",
        ),
    )


def without_drops(clip: Clip, pack_name: str, sources: int, seconds: float) -> Measured:
    """(f) So many live sources, the windows dropped, and what limits their number."""
    settings = _settings(clip, pack_name, sources)
    recorded = load_recorded(settings)
    try:
        seen = _run(settings, recorded, recorded.served, seconds)
    finally:
        recorded.close()
    stale = sum(count for (stage, _), count in seen.dropped.items() if stage in ("batch_slot", "inference"))
    drops = ", ".join(f"{stage}/{reason} {count}" for (stage, reason), count in sorted(seen.dropped.items()))
    hops = ", ".join(f"{branch.name} {branch.hop_ns / 1e9:g} s" for branch in recorded.served.manifest.branches)
    return Measured(
        (
            Row("live_sources", sources, "live 360p25 sources", at_least=8 if sources >= 8 else None),
            Row("live_windows", seen.windows, "windows predicted"),
            Row("live_windows_dropped", stale, "windows dropped", at_most=0),
            Row("live_cpu_cores", seen.cores["total"], "CPU of the service", "cores"),
            Row("live_engine_busy", seen.busy, "share of engine time in inference"),
        ),
        (
            f"Hops: {hops}; {settings.engine.threads} engine thread(s); {seen.seconds:.0f} s after a warm-up. "
            f"All drops: {drops or 'none'}.",
            _limit(seen),
        ),
    )


def _limit(seen: Observed) -> str:
    """What limits the number of sources, in plain words."""
    kinds = {"engine": "inference", "source": "decoding", "loop": "the event loop", "other": "other threads"}
    spent = ", ".join(f"{name} {seen.cores[kind]:.2f}" for kind, name in kinds.items() if kind in seen.cores)
    first = "inference" if seen.busy >= seen.cores.get("loop", 0) else "the event loop"
    share = max(seen.busy, seen.cores.get("loop", 0))
    return f"Cores: {spent}. What fills up first is {first}: {share:.0%} of its threads."
