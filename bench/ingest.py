"""How far sources can be trusted: ``python -m bench.ingest [--only recovery,skew,churn,webrtc] [--json PATH]``.

Against real servers on this machine: how sources come back after faults and what the others notice, sound beside
picture, what is left of sources that came and went, and what WebRTC costs. The figures stand in docs/sources.md.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from bench.common import BenchError, Measured, machine, other_load, show, write_json
from bench.recovery import recovery, skew_rtsp
from bench.soak import churned
from engines.errors import EngineError
from stream.errors import SightwireError

CHURN_S = 90.0
"""How long sources come and go, of either kind."""
WEBRTC_S = 60.0
"""Length of each run over WebRTC."""


def _webrtc(_: Path) -> Measured:
    # Needs the extra webrtc, the other parts do not.
    from bench.webrtc import measure

    return asyncio.run(measure(WEBRTC_S, "H264"))


PARTS: dict[str, tuple[str, Callable[[Path], Measured]]] = {
    "recovery": ("sources that come back", recovery),
    "skew": ("sound beside picture", skew_rtsp),
    "churn": ("sources that come and go", lambda folder: churned(folder, CHURN_S)),
    "webrtc": ("WebRTC", _webrtc),
}


def main(given: list[str] | None = None) -> int:
    """Exit code 0 when everything was measured, whether targets were reached or not; 1 with one line otherwise."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    parser = argparse.ArgumentParser(prog="python -m bench.ingest", description="How far sources can be trusted.")
    parser.add_argument("--only", default=",".join(PARTS), metavar="a,b,…", help=f"of {', '.join(PARTS)} [all]")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures here, under flat keys")
    options = parser.parse_args(sys.argv[1:] if given is None else given)
    wanted = options.only.split(",")
    if unknown := sorted(set(wanted) - set(PARTS)):
        parser.error(f"--only knows {', '.join(PARTS)}, not {', '.join(unknown)}")
    console, facts, found = Console(width=None if sys.stdout.isatty() else 130), machine(), []
    console.print(" · ".join(f"{key} {value}" for key, value in facts.items()), style="dim")
    if (load := other_load()) is not None and load > 0.2:
        console.print(f"warning: other processes use {load:.1f} cores now; the figures will suffer", style="yellow")
    begin_s = time.monotonic()
    try:
        for name in wanted:
            title, measure = PARTS[name]
            with TemporaryDirectory() as folder, console.status(f"measuring {title}"):
                found.append(measure(Path(folder)))
            show(console, title, found[-1])
        if options.json is not None:
            write_json(options.json, found, facts)
    except (BenchError, SightwireError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.print(f"{time.monotonic() - begin_s:.0f} s in all", style="dim")
    return 0


if __name__ == "__main__":
    sys.exit(main())
