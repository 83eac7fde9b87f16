"""Backend ``auto``: for each graph the fastest that passes parity, measured once per machine and remembered."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from engines import backends
from engines.backends import EngineOptions, first_line
from engines.cache import write_atomically
from engines.errors import BackendUnavailable, EngineError, GraphLoadError, ParityFailed, ParityMissing
from engines.machine import machine_id
from engines.manifest import GraphSpec, Manifest, Mode, read_manifest
from engines.measure import random_batch, time_batch
from engines.parity import ParityReport, check_graph_parity
from engines.split import best_part, in_parts

_log = logging.getLogger(__name__)
_BATCHES = (1, 4)
_REPEATS = 9
_BUDGET_S = 1.0
_TIMEOUT_S = 120
_EXACTNESS = ("fp32", "fp16", "bf16", "int8")
"""Precisions, the most exact first."""
_CLOSE = 1.3
"""What takes at most so many times the time of the fastest is measured once more."""
_MIXED_GAIN = 0.9
"""Two libraries in one process cost memory: graphs run on different ones only where that saves a tenth of the time."""

Candidate = tuple[str, str]
"""Backend and precision."""
Times = Mapping[str, Mapping[int, float]]
"""Median milliseconds of a call, by graph and batch size."""
_TIMES = TypeAdapter(dict[str, dict[int, float]])


class Choice(BaseModel):
    """What runs each graph, and the measurements that say so."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    graphs: dict[str, Candidate]
    """Backend and precision by graph."""
    ms: dict[str, dict[str, dict[int, float]]]
    """Median milliseconds of a call by candidate, graph and batch size."""


def fastest(
    folder: Path,
    manifest: Manifest,
    report: ParityReport | None,
    options: EngineOptions,
    *,
    require_parity: bool = True,
    cache: Path | None,
) -> dict[str, Candidate]:
    """For each graph the installed backend, and the precision, that run it fastest on this machine.

    ``options.precision`` is the least exact that may be taken: a more exact one that is as fast is taken instead. A
    single candidate is taken without measuring. Raises ``ParityMissing`` or ``ParityFailed`` when a graph passes on
    no installed backend, ``BackendUnavailable`` when none can load it. Without ``cache`` nothing is remembered.
    """
    versions = backends.installed(options.device)
    if not versions:
        raise BackendUnavailable("no backend is installed; pip install onnxruntime")
    allowed = {
        graph.name: _passing(manifest, graph, report, options.precision, tuple(versions))
        if require_parity
        else [(backend, options.precision) for backend in versions]
        for graph in manifest.graphs
    }
    candidates = list(dict.fromkeys(candidate for found in allowed.values() for candidate in found))
    if len(candidates) == 1:
        return {graph.name: candidates[0] for graph in manifest.graphs}
    path = None
    if cache is not None:
        path = cache / "auto" / f"{_key(manifest, options, versions, candidates)}.json"
        if (remembered := _recall(path, allowed)) is not None:
            return remembered
    choice = _measure(folder, manifest, options, allowed, candidates)
    if path is not None:
        _remember(path, choice)
    return choice.graphs


def _passing(
    manifest: Manifest, graph: GraphSpec, report: ParityReport | None, precision: str, installed: Sequence[str]
) -> list[Candidate]:
    """What may run a graph; the asked precision first. Raises ``ParityMissing`` or ``ParityFailed`` if nothing may."""
    exact = _EXACTNESS[: _EXACTNESS.index(precision) + 1] if precision in _EXACTNESS else (precision,)
    passing, refusal = [], None
    for candidate in ((backend, one) for one in reversed(exact) for backend in installed):
        try:
            check_graph_parity(report, manifest, graph, *candidate)
            passing.append(candidate)
        except (ParityMissing, ParityFailed) as error:
            refusal = refusal or error
    if not passing and refusal is not None:
        raise refusal
    return passing


def _measure(
    folder: Path,
    manifest: Manifest,
    options: EngineOptions,
    allowed: Mapping[str, Sequence[Candidate]],
    candidates: Sequence[Candidate],
) -> Choice:
    times: dict[Candidate, Times] = {}
    failure: EngineError | None = None

    def measure(candidate: Candidate) -> None:
        nonlocal failure
        graphs = [graph for graph, found in allowed.items() if candidate in found]
        try:
            found = _measure_apart(folder, manifest, candidate, graphs, options)
        except EngineError as error:
            failure = error
            _log.warning("%s", error)
            return
        times[candidate] = _least(found, times.get(candidate, found))

    for candidate in candidates:
        measure(candidate)
    for candidate in _contenders(times, allowed):
        measure(candidate)
    graphs_left = [graph for graph, found in allowed.items() if not times.keys() & set(found)]
    if graphs_left:
        raise failure or BackendUnavailable(f"pack {manifest.name}: no backend could be measured")
    chosen = choose(times, calls_per_second(manifest), allowed)
    _log.info("pack %s: fastest here: %s", manifest.name, ", ".join(f"{g} {b} {p}" for g, (b, p) in chosen.items()))
    return Choice(graphs=chosen, ms={" ".join(c): {g: dict(t) for g, t in found.items()} for c, found in times.items()})


def _least(first: Times, second: Times) -> Times:
    return {graph: {n: min(ms, second[graph][n]) for n, ms in found.items()} for graph, found in first.items()}


def _contenders(times: Mapping[Candidate, Times], allowed: Mapping[str, Sequence[Candidate]]) -> tuple[Candidate, ...]:
    """What is close to the fastest on some graph: another process may just have slowed one of them."""
    close: dict[Candidate, None] = {}
    for graph, found in allowed.items():
        cost = {candidate: _per_item(times[candidate][graph]) for candidate in found if candidate in times}
        near = [candidate for candidate, ms in cost.items() if ms <= _CLOSE * min(cost.values())]
        close.update(dict.fromkeys(near if len(near) > 1 else ()))
    return tuple(close)


def _per_item(ms: Mapping[int, float]) -> float:
    """Milliseconds of a batch item, mean over the batch sizes."""
    return statistics.mean(time / batch for batch, time in ms.items())


def choose(
    times: Mapping[Candidate, Times], rates: Mapping[str, float], allowed: Mapping[str, Sequence[Candidate]]
) -> dict[str, Candidate]:
    """The fastest candidate for each graph; one backend for all of them unless several save a tenth of the time.

    ``rates`` says how often each graph runs. A tie goes to the more exact precision.
    """

    def cost(graph: str, candidate: Candidate) -> float:
        return rates.get(graph, 1.0) * _per_item(times[candidate][graph])

    def best(graph: str, backend: str | None = None) -> Candidate | None:
        usable = [c for c in allowed[graph] if c in times and graph in times[c] and backend in (None, c[0])]
        return min(usable, key=lambda c: (cost(graph, c), _EXACTNESS.index(c[1])), default=None)

    def of(backend: str | None) -> dict[str, Candidate]:
        found = {graph: best(graph, backend) for graph in allowed}
        return {graph: candidate for graph, candidate in found.items() if candidate is not None}

    def total(picks: Mapping[str, Candidate]) -> float:
        return sum(cost(graph, candidate) for graph, candidate in picks.items())

    mixed = of(None)
    whole = [picks for backend in dict.fromkeys(b for b, _ in times) if len(picks := of(backend)) == len(allowed)]
    single = min(whole, key=total, default=None)
    return mixed if single is None or total(mixed) < _MIXED_GAIN * total(single) else single


def _measure_apart(
    folder: Path, manifest: Manifest, candidate: Candidate, graphs: Sequence[str], options: EngineOptions
) -> Times:
    """Measure in a process of its own: the library of a backend that is not chosen would stay in memory."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    backend, precision = candidate
    compiled = "" if options.cache_dir is None else str(options.cache_dir)
    numbers = [str(options.threads), str(options.engines)]
    request = [str(folder.resolve()), backend, precision, *numbers, options.device, compiled, *graphs]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "engines.auto", *request],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=True,
        )
        return _TIMES.validate_json(done.stdout)
    except subprocess.CalledProcessError as error:
        cause = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        cause = first_line(error)
    raise GraphLoadError(
        f"pack {manifest.name}: backend {backend} cannot be measured in {precision}: {cause}; choose a backend"
    )


def measure_graphs(
    folder: Path, manifest: Manifest, backend: str, graphs: Sequence[str], options: EngineOptions
) -> dict[str, dict[int, float]]:
    """Median milliseconds of a call, by graph and batch size, of one engine beside the others that are to run at once.

    Raises an ``EngineError``.
    """
    times: dict[str, dict[int, float]] = {}
    for name in graphs:
        graph = manifest.graph(name)
        with ExitStack() as stack:
            engines = []
            for _ in range(options.engines):
                loaded = backends.load(folder / graph.file, manifest.name, graph, backend, options)
                stack.callback(loaded.close)
                engines.append(in_parts(loaded, graph, options.device))
            first, *others = engines
            times[name] = {
                n: time_batch(first, random_batch(graph, n), _REPEATS, _BUDGET_S, beside=others).p50_ms
                for n in _batches(graph, options.device)
            }
    return times


def _batches(graph: GraphSpec, device: str) -> list[int]:
    """Batch sizes to measure: none larger than what is run at once."""
    largest = best_part(graph) if device == "cpu" else max(_BATCHES)
    return sorted({min(size, largest) for size in _BATCHES})


def calls_per_second(manifest: Manifest) -> dict[str, float]:
    """How often each graph runs for one source, per second of media."""
    rates: dict[str, float] = {}
    for branch in manifest.branches:
        rates[branch.graph] = rates.get(branch.graph, 0.0) + 1e9 / branch.hop_ns
        if branch.mode is Mode.STAGED and branch.encoder is not None and branch.video is not None:
            rates[branch.encoder] = rates.get(branch.encoder, 0.0) + float(branch.video.fps)
    return rates


def _key(
    manifest: Manifest, options: EngineOptions, versions: Mapping[str, str], candidates: Sequence[Candidate]
) -> str:
    parts = [
        manifest.sha256(),
        machine_id(),
        versions,
        candidates,
        options.precision,
        options.threads,
        options.engines,
        options.device,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _recall(path: Path, allowed: Mapping[str, Sequence[Candidate]]) -> dict[str, Candidate] | None:
    """A choice made before, if everything in it may still be taken."""
    try:
        graphs = Choice.model_validate_json(path.read_bytes()).graphs
    except (OSError, ValidationError):
        return None
    fits = graphs.keys() == allowed.keys() and all(choice in allowed[graph] for graph, choice in graphs.items())
    return graphs if fits else None


def _remember(path: Path, choice: Choice) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, choice.model_dump_json(indent=2).encode())
    except OSError as error:
        _log.warning("cannot remember the choice of backend in %s (%s); it is measured again next time", path, error)


def main(
    folder: str, backend: str, precision: str, threads: str, engines: str, device: str, compiled: str, *graphs: str
) -> None:
    """Print what ``measure_graphs`` finds; exit with the error's message where it fails."""
    options = EngineOptions(precision, int(threads), device, Path(compiled) if compiled else None, int(engines))
    try:
        print(json.dumps(measure_graphs(Path(folder), read_manifest(Path(folder)), backend, graphs, options)))
    except EngineError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
