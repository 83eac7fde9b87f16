"""A service that hangs while it ends does not stay."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

HANGS = """
import asyncio
from stream import runner

runner.HUNG_S = 0.1

async def main():
    with runner.Ending(0.1).on_signals():
        print("ready", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def test_what_hangs_after_the_grace_ends_and_shows_where() -> None:
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", HANGS], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Timeout" in said and "run_forever" in said
