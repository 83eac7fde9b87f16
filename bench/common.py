"""What every benchmark shares: measured rows, machine description, medians, CPU time, the table and the JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engines.machine import cpu_model


class BenchError(Exception):
    """A benchmark cannot run here; the message is one line with cause and remedy."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measured figure."""

    key: str
    """Flat key in the JSON."""
    value: float
    """The figure."""
    meaning: str
    """What it is, for the table."""
    unit: str = ""
    """Unit, empty for a ratio or a count."""
    at_least: float | None = None
    """Target that the figure must reach."""
    at_most: float | None = None
    """Target that the figure must not pass."""

    @property
    def target(self) -> str:
        """The target as text; empty where there is none."""
        if self.at_least is not None:
            return f"≥ {self.at_least:g}"
        return f"≤ {self.at_most:g}" if self.at_most is not None else ""

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; ``None`` where there is none."""
        if self.at_least is not None:
            return self.value >= self.at_least
        return self.value <= self.at_most if self.at_most is not None else None


@dataclass(frozen=True, slots=True)
class Measured:
    """What one benchmark found."""

    rows: tuple[Row, ...]
    """Figures."""
    notes: tuple[str, ...] = ()
    """Conditions that the figures were taken under, one sentence each."""


def machine() -> dict[str, str | int]:
    """What the figures were taken on, as flat keys."""
    return {
        "machine_cpu": cpu_model(),
        "machine_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        "machine_os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "sightwire": metadata.version("sightwire"),
        "pyav": metadata.version("av"),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def other_load(seconds: float = 1.0) -> float | None:
    """Cores that other processes keep busy right now, or ``None`` where there is no /proc/stat."""
    first, mine = _busy_s(), time.process_time()
    if first is None:
        return None
    time.sleep(seconds)
    last = _busy_s()
    return None if last is None else max(0.0, (last - first - (time.process_time() - mine)) / seconds)


def _busy_s() -> float | None:
    """CPU seconds spent since boot, over all cores, by everything but idling."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
    except OSError:
        return None
    ticks = [int(field) for field in fields[:8]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def interleaved(runs: int, *sides: Callable[[], float]) -> list[list[float]]:
    """Run the sides in turn (A B A B …), so that whatever else the machine does meets them alike.

    Returns per side its results, in order of the runs.
    """
    results: list[list[float]] = [[] for _ in sides]
    for _ in range(runs):
        for side, found in zip(sides, results, strict=True):
            found.append(side())
    return results


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over the pairs of runs of ``above / below``."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def thread_cpu_s() -> dict[str, float]:
    """CPU seconds of this process by kind of thread: ``engine``, ``source``, ``loop`` (the main one), ``other``."""
    spent: defaultdict[str, float] = defaultdict(float)
    for thread in threading.enumerate():
        if thread.ident is None:
            continue
        kind = "loop" if thread is threading.main_thread() else thread.name.partition("-")[0]
        try:
            seconds = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        except OSError:  # it ended between the two lines
            continue
        spent[kind if kind in ("engine", "source", "loop") else "other"] += seconds
    spent["total"] = time.process_time()
    return dict(spent)


def show(console: Console, title: str, measured: Measured) -> None:
    """Print one benchmark's figures and conditions."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("what", ratio=1)
    for column in ("key", "value", "target"):
        table.add_column(column, no_wrap=True, justify="left" if column == "key" else "right")
    for row in measured.rows:
        colour = {True: "green", False: "red", None: ""}[row.reached]
        value = f"{row.value:.4g} {row.unit}".strip()
        table.add_row(escape(row.meaning), row.key, f"[{colour}]{value}[/]" if colour else value, row.target)
    console.print(table)
    for note in measured.notes:
        console.print(f"  {escape(note)}", style="dim")
    console.print()


def write_json(path: Path, measured: Iterable[Measured], facts: dict[str, str | int]) -> None:
    """Write every figure under its flat key, with the machine's description. Raises ``BenchError``."""
    flat: dict[str, str | int | float] = dict(facts)
    for part in measured:
        flat.update({row.key: round(row.value, 5) for row in part.rows})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(flat, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror}; give another --json") from error
