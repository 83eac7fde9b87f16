"""The service's own costs, on one clip, in one run: ``python -m bench.pipeline [--quick] [--json PATH]``.

What each figure means stands in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from bench import decoding, live, memory, throughput
from bench.clip import bench_clip
from bench.common import BenchError, Measured, machine, other_load, show, write_json
from engines.errors import EngineError
from engines.manifest import MANIFEST_FILE, read_manifest
from engines.open import find_pack
from stream.errors import SightwireError
from stream.settings import home


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    runs: int = 5
    """Interleaved pairs of runs."""
    clip_s: int = 30
    """Length of the clip."""
    sources: int = 8
    """Sources at saturation; as many as a batch holds."""
    interval_s: float = 3.0
    """Length of one run at saturation."""
    latency_s: float = 25.0
    """Length of the latency run."""
    latency_sources: int | None = None
    """Live sources in it; ``None``: as many as keep the engines half busy."""
    memory_s: float = 8.0
    """How long each service runs whose memory is measured."""
    memory_counts: tuple[int, ...] = (1, 4, 16)
    """Numbers of sources in them."""
    cpu_runs: int = 3
    """Runs of the CPU comparison."""
    cpu_s: float = 10.0
    """Length of each."""
    live_sources: int = 8
    """Live sources without drops."""
    live_s: float = 30.0
    """How long they run."""


QUICK = Plan(
    runs=2,
    clip_s=8,
    sources=4,
    interval_s=0.4,
    latency_s=2.0,
    latency_sources=2,
    memory_s=1.0,
    memory_counts=(1,),
    cpu_runs=1,
    cpu_s=1.5,
    live_sources=2,
    live_s=2.0,
)
"""Enough to see that everything works; the figures mean little."""

TITLES = {
    "a": "(a) decoding: ours against bare PyAV",
    "b": "(b) saturation: whole service against bare engine",
    "c": "(c) event latency at half load",
    "d": "(d) memory",
    "e": "(e) CPU of one live source",
    "f": "(f) live sources without a dropped window",
}


def benchmarks(plan: Plan, pack: Path) -> dict[str, Callable[[], Measured]]:
    """What can be measured, by its letter."""
    clip, name = bench_clip(plan.clip_s), str(pack)
    manifest = read_manifest(pack)
    return {
        "a": lambda: decoding.throughput(clip, manifest, plan.runs),
        "b": lambda: throughput.saturation(clip, name, plan.sources, plan.runs, plan.interval_s),
        "c": lambda: live.latency(clip, name, plan.latency_s, plan.latency_sources),
        "d": lambda: memory.peak_memory(clip, pack, plan.memory_counts, plan.memory_s),
        "e": lambda: decoding.live_cpu(clip, pack / MANIFEST_FILE, plan.cpu_runs, plan.cpu_s),
        "f": lambda: live.without_drops(clip, name, plan.live_sources, plan.live_s),
    }


def arguments(given: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.pipeline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures here, under flat keys")
    parser.add_argument("--pack", default="base", help="pack to measure with, by name or folder [base]")
    parser.add_argument("--only", default="".join(TITLES), metavar="a,b,…", help="letters of what to measure [all]")
    parser.add_argument("--runs", type=int, metavar="N", help="interleaved pairs of runs [5; with --quick 2]")
    parser.add_argument("--quick", action="store_true", help="a short run that only shows that everything works")
    parsed = parser.parse_args(given)
    parsed.only = [letter for letter in parsed.only if letter not in ", "]
    if unknown := sorted(set(parsed.only) - set(TITLES)):
        parser.error(f"--only knows {', '.join(TITLES)}, not {', '.join(unknown)}")
    if parsed.runs is not None and not 1 <= parsed.runs <= 50:
        parser.error("--runs takes 1 to 50")
    return parsed


def run(console: Console, options: argparse.Namespace) -> list[Measured]:
    """Measure and print. Raises ``BenchError``, ``SightwireError`` or ``EngineError``, alone or in a group."""
    plan = QUICK if options.quick else Plan()
    if options.runs is not None:
        plan = replace(plan, runs=options.runs, cpu_runs=options.runs)
    pack = find_pack(options.pack, home()).resolve()
    facts = machine()
    console.print(" · ".join(f"{key} {value}" for key, value in facts.items()), style="dim")
    if (load := other_load()) is not None and load > 0.2:
        console.print(f"warning: other processes use {load:.1f} cores now; the figures will suffer", style="yellow")
    found = []
    begin_s = time.monotonic()
    todo = benchmarks(plan, pack)
    for letter in options.only:
        with console.status(f"measuring {TITLES[letter]}"):
            measured = todo[letter]()
        show(console, TITLES[letter], measured)
        found.append(measured)
    console.print(f"{time.monotonic() - begin_s:.0f} s in all", style="dim")
    if options.json is not None:
        write_json(options.json, found, facts)
    return found


def main(given: list[str] | None = None) -> int:
    """Exit code 0 when everything was measured, whether targets were reached or not; 1 with one line otherwise."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    options = arguments(sys.argv[1:] if given is None else given)
    try:
        run(_console(), options)
    except* (BenchError, SightwireError, EngineError) as group:
        for error in _leaves(group):
            print(f"error: {error}", file=sys.stderr)
        return_code = 1
    else:
        return_code = 0
    return return_code


def _console() -> Console:
    """The terminal; a file or a pipe gets lines wide enough for the table."""
    return Console(width=None if sys.stdout.isatty() else 120)


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


if __name__ == "__main__":
    sys.exit(main())
