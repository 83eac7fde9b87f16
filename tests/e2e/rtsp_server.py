"""Runs ``deploy/demo/rtsp_server.py``, a real RTSP server, as a process of its own."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy" / "demo" / "rtsp_server.py"
PYTHON = "/usr/bin/python3"
"""The system's: it has GStreamer's bindings."""
START_S = 120.0


class CannotServe(Exception):
    """The server cannot run on this machine; the message says what is missing."""


class RtspServer:
    """One running server; ``url`` is the address of its stream."""

    def __init__(self, file: Path, *options: str, path: str = "/cam") -> None:
        if not Path(PYTHON).exists():
            raise CannotServe(f"there is no {PYTHON}")
        command = [PYTHON, str(SCRIPT), "--serve", f"{path}={file}", *options]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.port = self._wait_until_ready()
        self.path = path

    def _wait_until_ready(self) -> int:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], START_S)
        line = self._process.stdout.readline() if ready else ""
        if line.startswith("READY "):
            return int(line.split()[1])
        self._process.kill()
        _, complaint = self._process.communicate()
        raise CannotServe(complaint.strip().splitlines()[-1] if complaint.strip() else "the RTSP server did not start")

    @property
    def url(self) -> str:
        """Address without credentials."""
        return self.url_for()

    def url_for(self, login: str = "") -> str:
        """Address with ``user:password``."""
        return f"rtsp://{login}{'@' if login else ''}127.0.0.1:{self.port}{self.path}"

    def freeze(self) -> None:
        """A camera that hangs: connections stay open, nothing is sent."""
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Go on after ``freeze``."""
        os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """A camera that loses power."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End the server, frozen or not."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
