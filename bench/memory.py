"""(d) Peak memory of `sightwire run` with live sources, each time in a fresh process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.clip import FPS, Clip
from bench.common import BenchError, Measured, Row

LIMIT_MB = {1: 350.0}
"""Targets by number of sources."""
PATIENCE_S = 90.0
"""For the start of a service."""


def peak_memory(clip: Clip, pack_folder: Path, counts: tuple[int, ...], seconds: float) -> Measured:
    """Peak resident memory for each number of sources. Raises ``BenchError`` where there is no /proc."""
    if not Path("/proc/self/status").is_file():
        raise BenchError("peak memory is read from /proc, which is not here; leave it out with --only a,b,c,e,f")
    rows, valkey_mb = [], 0.0
    for count in counts:
        service_mb, server_mb = _one(clip, pack_folder, count, seconds)
        valkey_mb = max(valkey_mb, server_mb)
        text = f"peak RSS of sightwire run, {count} live source{'s' if count > 1 else ''}"
        rows.append(Row(f"rss_mb_{count}", service_mb, text, "MB", at_most=LIMIT_MB.get(count)))
    rows.append(Row("rss_mb_valkey", valkey_mb, "embedded Valkey beside it, at most", "MB"))
    note = (
        f"`sightwire run` with HTTP and embedded Valkey, sources of 640x360 at {FPS} fps in real time, {seconds:g} s "
        "after its start; VmHWM of the service process alone (1 MB = 10^6 bytes)."
    )
    return Measured(tuple(rows), (note,))


def _one(clip: Clip, pack_folder: Path, count: int, seconds: float) -> tuple[float, float]:
    """Peak MB of the service and of its Valkey server."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-c", "from stream.cli import main; main()", "run", "--quiet", "--loop"]
        command += ["--http-port", "0", "--pack", str(pack_folder)]
        for number in range(count):
            command += ["--source", f"cam-{number}={clip.path}"]
        log = Path(folder) / "log"
        with log.open("wb") as said:
            environment = {**os.environ, "SIGHTWIRE_HOME": folder}
            child = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        try:
            _wait_until_up(child, log)
            return _peak_over(child, log, seconds)
        finally:
            _end(child)


def _wait_until_up(child: subprocess.Popen[bytes], log: Path) -> None:
    """Until the service has told its addresses."""
    deadline_s = time.monotonic() + PATIENCE_S
    while "Ctrl-C ends it" not in log.read_text(errors="replace"):
        if child.poll() is not None or time.monotonic() > deadline_s:
            raise BenchError(f"sightwire run did not come up: {_last_line(log)}")
        time.sleep(0.1)


def _peak_over(child: subprocess.Popen[bytes], log: Path, seconds: float) -> tuple[float, float]:
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        if child.poll() is not None:
            raise BenchError(f"sightwire run ended early: {_last_line(log)}")
        time.sleep(0.25)
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text(encoding="ascii").split()
    return _high_water_mb(child.pid), sum(_high_water_mb(int(pid)) for pid in children)


def _high_water_mb(pid: int) -> float:
    """Most memory that a process ever had resident."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise BenchError(f"process {pid} tells no peak memory")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _end(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGINT)
    try:
        child.wait(20)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
