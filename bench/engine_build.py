"""How long the way from trained weights to verified engines takes, in a fresh home, by the commands that users give."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.common import BenchError, Measured, Row
from export.build import Progress

TARGET_S = 120
CORES = 2
"""That the target is stated for."""
COMMANDS = (("export", "base"), ("compile", "base"), ("verify", "base"))
PATIENCE_S = 1200


@dataclass(frozen=True, slots=True)
class Took:
    """One command."""

    command: str
    wall_s: float
    cpu_s: float


def build_time(
    folder: Path, commands: Sequence[Sequence[str]] = COMMANDS, progress: Progress = lambda _: None
) -> Measured:
    """Export, compile and verify the base pack, with home and cache under ``folder``. Raises ``BenchError``."""
    took = []
    for command in commands:
        progress(f"sightwire {' '.join(command)}")
        took.append(_timed(folder, command))
    wall_s, cpu_s = sum(one.wall_s for one in took), sum(one.cpu_s for one in took)
    parts = ", ".join(f"{one.command} {one.wall_s:.0f} s ({one.cpu_s:.0f} s of processors)" for one in took)
    cores = min(CORES, os.cpu_count() or CORES)
    return Measured(
        (
            Row("export_compile_verify_s", wall_s, "export, compile and verify base", "s", at_most=TARGET_S),
            Row("export_compile_verify_cpu_s", cpu_s, "processor time of it", "s"),
        ),
        (f"In a fresh home and cache, on {cores} core(s), with start-up of each command: {parts}.",),
    )


def _timed(folder: Path, command: Sequence[str]) -> Took:
    env = {**os.environ, "SIGHTWIRE_HOME": str(folder / "home"), "XDG_CACHE_HOME": str(folder / "cache")}
    before, begin = _children_s(), time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "stream.cli", *command],
            cwd=Path(__file__).resolve().parents[1],
            env=env,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            preexec_fn=_few_cores,
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"`sightwire {' '.join(command)}` took over {PATIENCE_S} s; see what else runs") from None
    if done.returncode:
        cause = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise BenchError(f"`sightwire {' '.join(command)}` failed: {cause}")
    return Took(command[0], time.perf_counter() - begin, _children_s() - before)


def _few_cores() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
