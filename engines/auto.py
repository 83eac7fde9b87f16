"""Backend ``auto``: the fastest that passes parity, measured once per machine and remembered."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import subprocess
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from engines import backends
from engines.backends import EngineOptions, first_line
from engines.cache import write_atomically
from engines.errors import BackendUnavailable, EngineError, GraphLoadError, ParityFailed, ParityMissing
from engines.machine import machine_id
from engines.manifest import Manifest, Mode, read_manifest
from engines.measure import random_batch, time_batch
from engines.parity import ParityReport, check_parity
from engines.split import in_parts

_log = logging.getLogger(__name__)
_BATCHES = (1, 4)
_REPEATS = 7
_TIMEOUT_S = 120


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
    cache: Path | None,
) -> str:
    """Name of the installed backend that runs the pack fastest with these options on this machine.

    A single candidate is taken without measuring. Raises ``ParityMissing`` or ``ParityFailed`` when no
    installed backend passes, ``BackendUnavailable`` when none can load the pack. Without ``cache`` nothing
    is remembered.
    """
    versions = backends.installed(options.device)
    candidates = _passing(manifest, report, options.precision, versions) if require_parity else list(versions)
    if not candidates:
        raise BackendUnavailable("no backend is installed; pip install onnxruntime")
    if len(candidates) == 1:
        return candidates[0]
    path = None
    if cache is not None:
        path = cache / "auto" / f"{_key(manifest, options, {name: versions[name] for name in candidates})}.json"
        if (remembered := _recall(path)) in candidates:
            return remembered
    choice = _measure(folder, manifest, options, candidates)
    if path is not None:
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
            times[backend] = _measure_apart(folder, manifest, backend, options)
        except EngineError as error:
            failure = error
            _log.warning("%s", error)
    if not times:
        raise failure or BackendUnavailable(f"pack {manifest.name}: no backend could be measured")
    best = min(times, key=lambda name: times[name])
    _log.info("pack %s: backend %s is the fastest here (ms per second of media: %s)", manifest.name, best, times)
    return _Choice(backend=best, ms_per_second=times)


def _measure_apart(folder: Path, manifest: Manifest, backend: str, options: EngineOptions) -> float:
    """Measure in a process of its own: the library of a backend that is not chosen would stay in memory."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    request = [str(folder.resolve()), backend, options.precision, str(options.threads), options.device]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "engines.auto", *request],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=True,
        )
        return float(done.stdout)
    except subprocess.CalledProcessError as error:
        cause = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        cause = first_line(error)
    raise GraphLoadError(f"pack {manifest.name}: backend {backend} cannot be measured: {cause}; choose a backend")


def ms_per_second(folder: Path, manifest: Manifest, backend: str, options: EngineOptions) -> float:
    """Engine milliseconds that one second of one source costs, mean over batch sizes. Raises an ``EngineError``."""
    total = 0.0
    for name, rate in calls_per_second(manifest).items():
        graph = manifest.graph(name)
        loaded = backends.load(folder / graph.file, manifest.name, graph, backend, options)
        engine = in_parts(loaded, graph, options.device)
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


def main(folder: str, backend: str, precision: str, threads: str, device: str) -> None:
    """Print what ``ms_per_second`` finds; exit with the error's message where it fails."""
    options = EngineOptions(precision=precision, threads=int(threads), device=device)
    try:
        print(ms_per_second(Path(folder), read_manifest(Path(folder)), backend, options))
    except EngineError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
