"""What is installed here, what works, and why the rest does not."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from engines import backends
from engines.backends import EngineOptions
from engines.errors import EngineError
from engines.manifest import MANIFEST_FILE, Manifest, check_integrity, read_manifest
from engines.open import load_engines
from engines.parity import read_parity
from stream.errors import SinkError
from stream.settings import Settings, home
from stream.sinks.embedded import EmbeddedServer, running_url
from stream.sinks.redis import RedisSink
from stream.source_settings import redacted_url

SYSTEM_PYTHON = "/usr/bin/python3"
"""The interpreter that Debian's GStreamer bindings belong to."""


LEAST_FREE = 256 << 20
"""Bytes in the home folder; with less the embedded server and the spool soon cannot write."""


@dataclass(frozen=True, slots=True)
class Check:
    """One finding."""

    name: str
    """What was looked at."""
    ok: bool | None
    """``None`` for something optional that is not there."""
    finding: str
    """What was found, or why not and the remedy."""


async def examine(settings: Settings) -> list[Check]:
    """All findings, in the order of the pipeline."""
    return [
        _python(),
        _home(),
        _ffmpeg(),
        *await asyncio.to_thread(_backends),
        *_packs(),
        await _redis(settings),
        await asyncio.to_thread(_rtsp_server),
    ]


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _python() -> Check:
    cores = os.cpu_count() or 1
    return Check("Python", True, f"{platform.python_version()} on {platform.machine()}, {cores} cores")


def _home() -> Check:
    folder = home()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return Check("home", False, f"{folder}: {error.strerror}; set SIGHTWIRE_HOME to a folder you can write")
    if not os.access(folder, os.W_OK):
        return Check("home", False, f"{folder} cannot be written; set SIGHTWIRE_HOME to a folder you can write")
    free = shutil.disk_usage(folder).free
    held = ", ".join(f"{name} {_size(size)}" for name, size in _held(folder) if size)
    told = f"{folder}, {_size(free)} free" + (f"; holds {held}" if held else "")
    if free < LEAST_FREE:
        return Check("home", False, f"{told}; free some space, or set SIGHTWIRE_HOME to a folder with more")
    return Check("home", True, told)


def _held(folder: Path) -> list[tuple[str, int]]:
    """What the home folder holds, in bytes."""
    spool = sum(_bytes(path) for path in folder.glob("spool.db*"))
    return [("packs", _bytes(folder / "packs")), ("events in Valkey", _bytes(folder / "valkey")), ("spool", spool)]


def _bytes(path: Path) -> int:
    total = 0
    for found in [path, *path.rglob("*")]:
        # Files come and go while a service runs.
        with contextlib.suppress(OSError):
            total += found.stat().st_size if found.is_file() else 0
    return total


def _size(size: int) -> str:
    return f"{size / 2**30:.0f} GiB" if size >= 10 * 2**30 else f"{size / 2**20:.1f} MiB"


def _ffmpeg() -> Check:
    from stream.ingest.versions import ffmpeg_version

    return Check("ingest", True, ffmpeg_version())


def _backends() -> list[Check]:
    return [
        _probe("onnxruntime", "pip install onnxruntime", _onnxruntime, needed=True),
        _probe("openvino", "pip install 'sightwire[openvino]'", _openvino),
        _probe("tensorrt_rtx", "needs an NVIDIA GPU: pip install 'sightwire[gpu]'", _module_version("tensorrt_rtx")),
        _probe("torch", "only to train and export: pip install 'sightwire[train]'", lambda: _installed("torch") or "?"),
    ]


def _probe(module: str, remedy: str, look: Callable[[], str], *, needed: bool = False) -> Check:
    name = f"backend {module}"
    if importlib.util.find_spec(module) is None:
        return Check(name, False if needed else None, f"not installed; {remedy}")
    try:
        return Check(name, True, look())
    except (ImportError, OSError, RuntimeError) as error:
        return Check(name, False, f"installed but does not load: {str(error).splitlines()[0]}")


def _onnxruntime() -> str:
    import onnxruntime

    providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    return f"{onnxruntime.__version__}, providers {', '.join(providers)}"


def _openvino() -> str:
    from engines import backends

    # The adapter keeps the library from calling home.
    backends.adapter("openvino")
    import openvino

    return f"{openvino.__version__.split('-')[0]}, devices {', '.join(openvino.Core().available_devices)}"


def _module_version(module: str) -> Callable[[], str]:
    def look() -> str:
        return str(importlib.import_module(module).__version__)

    return look


def _packs() -> list[Check]:
    folders = sorted(path.parent for path in (home() / "packs").glob(f"*/{MANIFEST_FILE}"))
    if not folders:
        return [Check("packs", None, f"none in {home() / 'packs'}; run `sightwire export base`")]
    return [_pack(folder) for folder in folders]


def _pack(folder: Path) -> Check:
    name = f"pack {folder.name}"
    try:
        manifest = read_manifest(folder)
        check_integrity(folder, manifest)
        report = read_parity(folder)
    except EngineError as error:
        return Check(name, False, str(error))
    passed = sorted({(entry.backend, entry.precision) for entry in report.entries if entry.passed}) if report else []
    if not passed:
        return Check(name, False, f"{manifest.name} {manifest.version}, no parity report; export it again")
    try:
        _open_once(folder, manifest, passed)
    except EngineError as error:
        return Check(name, False, str(error))
    parity = f"parity with PyTorch on {', '.join(' '.join(pair) for pair in passed)}"
    return Check(name, True, f"{manifest.name} {manifest.version}, {parity}")


def _open_once(folder: Path, manifest: Manifest, passed: Sequence[tuple[str, str]]) -> None:
    """A graph may be damaged and its hash agree: it is seen when it is loaded. Raises an ``EngineError``."""
    here = backends.installed("cpu")
    usable = [(backend, precision) for backend, precision in passed if backend in here]
    if not usable:
        return
    # ONNX Runtime loads in a moment; OpenVINO compiles.
    backend, precision = min(usable, key=lambda pair: (pair[0] != "onnxruntime", pair[1] != "fp32"))
    for engine in load_engines(folder, manifest, backend, EngineOptions(precision)).values():
        engine.close()


async def _redis(settings: Settings) -> Check:
    given = settings.redis.url
    if given is None:
        running = await running_url(home() / "valkey")
        if running is not None:
            return Check("Redis", True, f"embedded Valkey runs at {running}")
        server = EmbeddedServer(home() / "valkey")
        try:
            url = await server.start()
            return Check("Redis", True, f"none configured; the embedded {await _server_version(url)} starts here")
        except SinkError as error:
            return Check("Redis", False, str(error))
        finally:
            await server.stop()
    shown = redacted_url(given.get_secret_value())
    try:
        return Check("Redis", True, f"{shown}: {await _server_version(given.get_secret_value())}")
    except SinkError as error:
        return Check("Redis", False, f"{error}")


async def _server_version(url: str) -> str:
    sink = RedisSink(url)
    try:
        return await sink.check()
    finally:
        await sink.aclose()


def rtsp_server_problem() -> str | None:
    """Why the demo's RTSP server cannot run here; ``None`` when it can."""
    if not Path(SYSTEM_PYTHON).exists():
        return f"no {SYSTEM_PYTHON}"
    probe = "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import GstRtspServer"
    try:
        done = subprocess.run([SYSTEM_PYTHON, "-c", probe], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    return "apt-get install gir1.2-gst-rtsp-server-1.0 gstreamer1.0-rtsp python3-gi gstreamer1.0-plugins-bad"


def _rtsp_server() -> Check:
    problem = rtsp_server_problem()
    if problem is None:
        return Check("demo RTSP server", True, f"GStreamer under {SYSTEM_PYTHON}")
    return Check("demo RTSP server", None, f"only the demo needs it: {problem}")
