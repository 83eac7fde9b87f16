"""What the base pack costs and weighs: `python -m bench.models --json PATH`.

How well it does is measured by `sightwire evaluate base`, which writes the same figures into its `metrics.json`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from bench.common import BenchError, Measured, Row, machine, show, write_json
from engines.backends import installed
from engines.errors import EngineError
from engines.open import find_pack
from export.cost import pack_cost
from stream.settings import home

WEIGHTS = Path(__file__).resolve().parents[1] / "models" / "weights" / "base"


def rows(pack: Path) -> list[Row]:
    """The figures of every installed backend."""
    found: list[Row] = []
    for backend in sorted({"onnxruntime", "openvino"} & set(installed())):
        cost = pack_cost(pack, backend=backend)
        figures = cost.flat()
        found.append(
            Row(
                f"core_ms_per_video_second_{backend}",
                figures["core_ms_per_video_second"],
                f"whole pack, one core, {backend} {cost.precision}, segmentation at 2 fps",
                "ms",
                at_most=120,
            )
        )
        found.append(
            Row(
                f"segmentation_fps_core_{backend}",
                figures["segmentation_fps_core"],
                f"frames a second segmented by one core, encoder counted in, {backend}",
                "fps",
                at_least=60,
            )
        )
        found += [
            Row(f"{name}_ms_{backend}", ms, f"graph {name}, one item", "ms") for name, ms in cost.graph_ms.items()
        ]
    size = sum(path.stat().st_size for path in WEIGHTS.glob("*.safetensors")) / 1e6
    found.append(Row("weights_mb", round(size, 2), "all safetensors of the base pack", "MB", at_most=25))
    return found


def main(given: list[str] | None = None) -> int:
    """Measure and print; 1 with one line when it cannot be measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pack", default="base", help="the base pack, by name or folder [base]")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures here, under flat keys")
    options = parser.parse_args(given)
    try:
        measured = Measured(tuple(rows(find_pack(options.pack, home()))), ("Processor time of one thread, batch one.",))
        show(Console(width=None if sys.stdout.isatty() else 120), "the base pack", measured)
        if options.json is not None:
            write_json(options.json, [measured], machine())
    except (BenchError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
