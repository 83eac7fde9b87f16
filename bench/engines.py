"""Engines: what our classes cost, what ``auto`` gains, what the modes save: ``python -m bench.engines [--json PATH]``.

What each figure means stands in docs/engines.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from bench import modes
from bench.common import BenchError, Measured, machine, other_load, show, write_json
from bench.engine_auto import gains
from bench.engine_build import build_time
from bench.engine_class import class_ratios
from bench.engine_packs import NETWORKS, VideoNetwork
from engines.errors import EngineError
from engines.manifest import Precision
from engines.open import find_pack
from export.build import ExportError, Progress
from stream.settings import home

TITLES = {
    "class": "our engine classes against the backends called directly",
    "auto": "auto against ONNX Runtime's defaults",
    "modes": "cost of a hop by mode",
    "build": "export, compile, verify",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    runs: int = 9
    """Interleaved runs."""
    class_s: float = 0.4
    """Length of a run of the engine classes."""
    auto_calls: int = 2
    """Clips of a run, for each caller."""
    networks: Sequence[VideoNetwork] = NETWORKS
    """Of which ``auto`` is measured."""
    precisions: Sequence[Precision] = ("fp32", "int8")
    """At which it is, the least exact last."""
    modes: modes.Plan = field(default_factory=modes.Plan)
    """Of the modes."""


def parts(plan: Plan, pack: str, folder: Path, progress: Progress) -> dict[str, Callable[[], Measured]]:
    """What can be measured, by name."""
    return {
        "class": lambda: class_ratios(find_pack(pack, home()), plan.runs, plan.class_s),
        "auto": lambda: gains(folder, plan.runs, plan.auto_calls, plan.networks, plan.precisions, progress),
        "modes": lambda: modes.as_rows(modes.measure_modes(plan.modes, progress=progress), plan.modes.ratios),
        "build": lambda: build_time(folder / "fresh", progress=progress),
    }


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.engines", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures here, under flat keys")
    parser.add_argument("--pack", default="base", help="pack whose graphs the classes are measured on [base]")
    parser.add_argument("--only", default=",".join(TITLES), metavar="NAME,…", help="what to measure [%(default)s]")
    parser.add_argument("--runs", type=int, metavar="N", help=f"interleaved runs [{Plan().runs}]")
    parsed = parser.parse_args(given)
    parsed.only = parsed.only.split(",")
    if unknown := sorted(set(parsed.only) - set(TITLES)):
        parser.error(f"--only knows {', '.join(TITLES)}, not {', '.join(unknown)}")
    if parsed.runs is not None and not 1 <= parsed.runs <= 100:
        parser.error("--runs takes 1 to 100")
    return parsed


def run(console: Console, options: argparse.Namespace, plan: Plan) -> None:
    """Measure and print. Raises ``BenchError``, ``ExportError`` or ``EngineError``."""
    facts = machine()
    console.print(" · ".join(f"{key} {value}" for key, value in facts.items()), style="dim")
    if (load := other_load()) is not None and load > 0.2:
        console.print(f"warning: other processes use {load:.1f} cores now; the figures will suffer", style="yellow")
    found, begin_s = [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sightwire-bench-") as folder:
        for name in options.only:
            with console.status(TITLES[name]) as status:
                todo = parts(plan, options.pack, Path(folder), status.update)
                measured = todo[name]()
            show(console, TITLES[name], measured)
            found.append(measured)
    console.print(f"{time.monotonic() - begin_s:.0f} s in all", style="dim")
    if options.json is not None:
        write_json(options.json, found, facts)


def main(given: Sequence[str] | None = None, plan: Plan | None = None) -> int:
    """Exit code 0 when everything was measured, whether targets were reached or not; 1 with one line otherwise."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    options = arguments(sys.argv[1:] if given is None else given)
    plan = plan or (Plan() if options.runs is None else Plan(runs=options.runs))
    try:
        run(Console(width=None if sys.stdout.isatty() else 120), options, plan)
    except (BenchError, ExportError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
