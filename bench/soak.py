"""A long run, and what grows in it: ``python -m bench.soak --minutes N --sources M --churn --json PATH``.

Sources are added and removed for the first part of the time (with ``--churn``), live sources run at 100 % and at
200 % of what the engines can do for the rest. What each figure means stands in docs/replay.md.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from bench.churn import Churned, cameras, churn, synthetic
from bench.common import BenchError, Measured, Row, machine, other_load, show, write_json
from bench.drift import Drift, drift
from engines.errors import EngineError
from engines.tinypack import write_tiny_pack
from stream.errors import SightwireError

LIMIT_MB = 1.0
"""Growth for each 100 cycles that passes for none."""
TITLE = "soak"


def churn_rows(churned: Churned, prefix: str = "") -> list[Row]:
    """Figures of sources that came and went."""
    slope, deltas = churned.rss_mb_per_100, churned.deltas
    cycles = churned.samples[-1].cycles
    rows = [
        Row(f"{prefix}rss_mb_per_100_cycles", slope.value, "growth of RSS in 100 cycles", "MB", at_most=LIMIT_MB),
        Row(f"{prefix}rss_mb_per_100_cycles_low", slope.low, "its 95 % interval, from", "MB"),
        Row(f"{prefix}rss_mb_per_100_cycles_high", slope.high, "to", "MB"),
        Row(f"{prefix}churn_cycles", cycles, "sources added and removed"),
    ]
    names = ("threads", "fds", "tasks")
    said = ("threads", "file descriptors", "asyncio tasks")
    for name, text, delta in zip(names, said, deltas, strict=True):
        rows.append(Row(f"{prefix}{name}_delta", delta, f"{text} after {cycles} cycles, less before", at_most=0))
    return rows


def drift_rows(found: Drift, percent: int) -> list[Row]:
    """Figures of a load."""
    slope = found.slope
    # Zero within noise: the interval reaches down to it.
    return [
        Row(f"latency_slope_ms_per_min_{percent}", slope.value, f"drift of latency at {percent} % load", "ms/min"),
        Row(f"latency_slope_ms_per_min_{percent}_low", slope.low, "its 95 % interval, from", "ms/min", at_most=0.0),
        Row(f"latency_slope_ms_per_min_{percent}_high", slope.high, "to", "ms/min"),
        Row(f"latency_ms_{percent}", found.median_ms, f"median latency, window's end to event, at {percent} %", "ms"),
        Row(f"dropped_share_{percent}", found.dropped_share, f"windows that became stale at {percent} %"),
    ]


def soak(minutes: float, sources: int, *, with_churn: bool, rtsp: bool) -> Measured:
    """Run it. Raises ``BenchError``."""
    parts = 3 if with_churn else 2
    part_s = minutes * 60 / parts
    rows: list[Row] = []
    with TemporaryDirectory() as folder:
        pack = Path(folder) / "tiny"
        write_tiny_pack(pack)
        if with_churn:
            share_s = part_s / 2 if rtsp else part_s
            until_s = time.monotonic() + share_s
            rows += churn_rows(asyncio.run(churn(pack, synthetic(sources), 30, until_s=until_s)))
            if rtsp:
                rows += churn_rows(_rtsp(pack, Path(folder), sources, share_s), "rtsp_")
        for percent in (100, 200):
            rows += drift_rows(drift(pack, sources, percent / 100, part_s), percent)
    notes = (
        f"{minutes:g} minutes, {sources} sources at a time; tiny pack, one engine thread",
        "memory: after gc and malloc_trim, least squares over the last 70 % of the samples",
        "load: engines that take a set time for each window; slope over medians of 40 stretches",
    )
    return Measured(tuple(rows), notes)


def churned(folder: Path, seconds: float, sources: int = 4) -> Measured:
    """Sources that come and go: generated ones for half of the time, then those of a real RTSP server.

    Raises ``BenchError``.
    """
    pack = folder / "tiny"
    write_tiny_pack(pack)
    until_s = time.monotonic() + seconds / 2
    rows = churn_rows(asyncio.run(churn(pack, synthetic(sources), 100, until_s=until_s)))
    rows += churn_rows(_rtsp(pack, folder, sources, seconds / 2), "rtsp_")
    return Measured(tuple(rows), ("after gc and malloc_trim, least squares over the last 70 % of the samples",))


def _rtsp(pack: Path, folder: Path, sources: int, seconds: float) -> Churned:
    from tests.e2e.rtsp_server import CannotServe, RtspServer
    from tests.stream.ingest.media import Clip, make_clip

    clip = make_clip(folder / "clip.mp4", Clip(seconds=5, size=(320, 180)))
    try:
        server = RtspServer(clip, "--loop")
    except CannotServe as error:
        raise BenchError(f"no RTSP server can be run here: {error}; leave out --rtsp") from None
    try:
        until_s = time.monotonic() + seconds
        return asyncio.run(churn(pack, cameras(server.url, min(sources, 4)), 10, until_s=until_s))
    finally:
        server.close()


def arguments(given: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description="What grows in a long run.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--sources", type=int, default=4, help="at a time")
    parser.add_argument("--churn", action="store_true", help="add and remove sources")
    parser.add_argument("--rtsp", action="store_true", help="of a real RTSP server as well, for half of that time")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parsed = parser.parse_args(given)
    if not 0 < parsed.minutes <= 10_000 or not 1 <= parsed.sources <= 256:
        parser.error("--minutes takes a number over 0, --sources 1 to 256")
    return parsed


def main(given: list[str] | None = None) -> int:
    """Exit code 0 when everything was measured, whether targets were reached or not; 1 with one line otherwise."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    options = arguments(sys.argv[1:] if given is None else given)
    console = Console(width=None if sys.stdout.isatty() else 130)
    facts = machine()
    if (load := other_load()) is not None and load > 0.2:
        console.print(f"warning: other processes use {load:.1f} cores now; the figures will suffer", style="yellow")
    try:
        measured = soak(options.minutes, options.sources, with_churn=options.churn, rtsp=options.rtsp)
        show(console, TITLE, measured)
        if options.json is not None:
            write_json(options.json, [measured], facts)
    except (BenchError, SightwireError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
