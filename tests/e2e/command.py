"""Runs the real ``sightwire`` command in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "stream.cli"]
PATIENCE_S = 180.0
"""For anything that has to happen; machines may be slow, and only a test that fails waits so long."""


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines that tell of an error."""
        return [line for line in self.err.splitlines() if line.startswith("error:")]


def free_port() -> int:
    """One that nobody listens on, here and now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "SIGHTWIRE_HOME": str(home), "COLUMNS": "300", "PYTHONUNBUFFERED": "1"}


def sightwire(home: Path, *arguments: str, timeout_s: float = PATIENCE_S) -> Done:
    """Run to the end."""
    done = subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, env=environment(home), capture_output=True, text=True, timeout=timeout_s
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


class Running:
    """A command that runs until it is told to end."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=ROOT,
            env=environment(home),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: dict[str, list[str]] = {"out": [], "err": []}
        self._told = threading.Condition()
        pipes = (("out", self.process.stdout), ("err", self.process.stderr))
        self._readers = [threading.Thread(target=self._read, args=pipe, daemon=True) for pipe in pipes]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str, pipe: object) -> None:
        for line in pipe:  # type: ignore[attr-defined]
            with self._told:
                self._lines[name].append(line)
                self._told.notify_all()

    def text(self, name: str = "err") -> str:
        """What it has printed so far."""
        with self._told:
            return "".join(self._lines[name])

    def wait_for(self, ready: Callable[[str], bool], name: str = "err", timeout_s: float = PATIENCE_S) -> str:
        """Until ``ready`` is true of what it has printed."""
        deadline = time.monotonic() + timeout_s
        with self._told:
            while not ready("".join(self._lines[name])):
                left = deadline - time.monotonic()
                assert left > 0 and (self.process.poll() is None or any(r.is_alive() for r in self._readers)), (
                    f"exit {self.process.poll()}\n{self._lines}"
                )
                self._told.wait(min(left, 0.2))
            return "".join(self._lines[name])

    def end(self, timeout_s: float = PATIENCE_S) -> Done:
        """Ctrl-C (SIGINT), then what it left behind."""
        if self.process.poll() is None:
            self.process.send_signal(2)
        code = self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join(PATIENCE_S)
        err = self.text("err")
        assert "Traceback" not in err, err
        return Done(code, self.text("out"), err)

    def kill(self) -> None:
        """Whatever happened, it is gone afterwards."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
