"""Backend ``auto``: the fastest that passes parity, measured once per machine and remembered."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import statistics
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from engines import backends
from engines.backends import EngineOptions
from engines.errors import BackendUnavailable, EngineError, ParityFailed, ParityMissing
from engines.manifest import Manifest, Mode
from engines.measure import random_batch, time_batch
from engines.parity import ParityReport, check_parity

_log = logging.getLogger(__name__)
_BATCHES = (1, 4)
_REPEATS = 7


class _Choice(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: str
    ms_per_second: dict[str, float]
    """Engine time per second of one source's media, by backend: what the choice was made by."""


def fastest_backend(
    folder: Path,
    manifest: Manifest,
    report: ParityReport | None,
    options: EngineOptions,
    *,
    require_parity: bool = True,
    cache: Path | None = None,
) -> str:
    """Name of the installed backend that runs the pack fastest with these options on this machine.

    A single candidate is taken without measuring. Raises ``ParityMissing`` or ``ParityFailed`` when no
    installed backend passes, ``BackendUnavailable`` when none can load the pack.
    """
    versions = backends.installed()
    candidates = _passing(manifest, report, options.precision, versions) if require_parity else list(versions)
    if not candidates:
        raise BackendUnavailable("no backend is installed; pip install onnxruntime")
    if len(candidates) == 1:
        return candidates[0]
    key = _key(manifest, options, {name: versions[name] for name in candidates})
    path = (cache or user_cache()) / "auto" / f"{key}.json"
    if (remembered := _recall(path)) in candidates:
        return remembered
    choice = _measure(folder, manifest, options, candidates)
    _remember(path, choice)
    return choice.backend


def _passing(manifest: Manifest, report: ParityReport | None, precision: str, versions: dict[str, str]) -> list[str]:
    passing, refusal = [], None
    for backend in versions:
        try:
            check_parity(report, manifest, backend, precision)
            passing.append(backend)
        except (ParityMissing, ParityFailed) as error:
            refusal = refusal or error
    if not passing and refusal is not None:
        raise refusal
    return passing


def _measure(folder: Path, manifest: Manifest, options: EngineOptions, candidates: list[str]) -> _Choice:
    times: dict[str, float] = {}
    failure: EngineError | None = None
    for backend in candidates:
        try:
            times[backend] = _ms_per_second(folder, manifest, backend, options)
        except EngineError as error:
            failure = error
    if not times:
        raise failure or BackendUnavailable(f"pack {manifest.name}: no backend could be measured")
    best = min(times, key=lambda name: times[name])
    _log.info("pack %s: backend %s is the fastest here (ms per second of media: %s)", manifest.name, best, times)
    return _Choice(backend=best, ms_per_second=times)


def _ms_per_second(folder: Path, manifest: Manifest, backend: str, options: EngineOptions) -> float:
    """Engine milliseconds that one second of one source costs, mean over the batch sizes."""
    total = 0.0
    for name, rate in calls_per_second(manifest).items():
        graph = manifest.graph(name)
        engine = backends.load(folder / graph.file, manifest.name, graph, backend, options)
        try:
            per_item = [time_batch(engine, random_batch(graph, n), _REPEATS).p50_ms / n for n in _BATCHES]
        finally:
            engine.close()
        total += rate * statistics.mean(per_item)
    return round(total, 3)


def calls_per_second(manifest: Manifest) -> dict[str, float]:
    """How often each graph runs for one source, per second of media."""
    rates: dict[str, float] = {}
    for branch in manifest.branches:
        rates[branch.graph] = rates.get(branch.graph, 0.0) + 1e9 / branch.hop_ns
        if branch.mode is Mode.STAGED and branch.encoder is not None and branch.video is not None:
            rates[branch.encoder] = rates.get(branch.encoder, 0.0) + float(branch.video.fps)
    return rates


def _key(manifest: Manifest, options: EngineOptions, versions: dict[str, str]) -> str:
    parts = [manifest.sha256(), machine_id(), versions, options.precision, options.threads, options.device]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _recall(path: Path) -> str | None:
    try:
        return _Choice.model_validate_json(path.read_bytes()).backend
    except (OSError, ValidationError):
        return None


def _remember(path: Path, choice: _Choice) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, choice.model_dump_json(indent=2).encode())
    except OSError as error:
        _log.warning("cannot remember the choice of backend in %s (%s); it is measured again next time", path, error)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees all of it or the one before. Raises ``OSError``."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def user_cache() -> Path:
    """``$XDG_CACHE_HOME/sightwire``, by default under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sightwire"


def cpu_model() -> str:
    """Name of the processor."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def machine_id() -> str:
    """Tells apart processors on which a choice may differ: model, instruction sets and number of cores."""
    parts = (platform.machine(), cpu_model(), _cpuinfo().get("flags", ""), str(os.cpu_count()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _cpuinfo() -> dict[str, str]:
    """Fields of the first processor; empty where there is no /proc."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
