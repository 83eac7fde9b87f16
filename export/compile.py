"""Pack to engines: converts what is missing, compiles every graph, and measures parity where the engines run."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from engines import backends
from engines.auto import fastest
from engines.backends import EngineOptions
from engines.cache import ENGINES_FOLDER, user_cache
from engines.errors import (
    BackendUnavailable,
    ConversionError,
    EngineError,
    GraphLoadError,
    InferenceError,
    ParityFailed,
    ParityMissing,
)
from engines.manifest import PRECISIONS, Manifest, Precision, check_integrity, read_manifest, variant_for
from engines.measure import Reference
from engines.open import load_engines
from engines.parity import GraphParity, ParityReport, merged, read_parity, within_bounds, write_parity
from engines.torch_engine import TorchEngine
from engines.torch_engine import version as torch_version
from engines.types import Engine
from export.parity import Trial
from export.quantize import Progress, add_variants, fp32_references

_log = logging.getLogger(__name__)
COMPILE_BACKENDS = ("auto", *backends.BACKENDS, "torch")
_REFERENCE = "the pack's fp32 graphs on onnxruntime"


@dataclass(frozen=True, slots=True)
class CompileResult:
    """One graph on one backend."""

    graph: str
    """Name of the graph."""
    backend: str
    """Backend."""
    precision: str
    """Precision."""
    seconds: float
    """How long compiling took."""
    size: int
    """Bytes of the engine in the cache; 0 where the backend keeps none."""
    reused: bool
    """Whether the engine was in the cache."""
    parity: GraphParity | None
    """What it was measured to do; ``None`` where it cannot run on this machine."""
    not_run: str
    """Why it could not run; empty where it did."""
    chosen: bool = True
    """Whether it is what ``auto`` runs the graph on here."""


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    folder: Path
    manifest: Manifest
    trial: Trial
    options: EngineOptions
    reference: str | None
    """What the trial's reference is, where it is not that of the pack's report."""
    progress: Progress


def compile_pack(
    folder: Path,
    backend: str = "auto",
    precision: Precision = "fp32",
    progress: Progress = lambda line: None,
    *,
    clips: Sequence[Path] = (),
    references: Mapping[str, Reference] | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    device: str | None = None,
    threads: int = 1,
    engines: int = 1,
    cache: Path | None = None,
) -> list[CompileResult]:
    """Compile every graph of a pack, measure it on real clips, and write what was measured into ``parity.json``.

    Engines go to the cache (``cache``, by default the user's), where a service with the same machine, versions and
    batch sizes finds them. A graph that has no file for the precision is converted first. Engines are compared with
    ``references`` (PyTorch, by graph), by default with the pack's own fp32 graphs, whose parity with PyTorch is in the
    report. ``auto`` compiles for every backend that is installed, at this precision and the more exact ones that the
    pack has files for, and says by ``chosen`` which is fastest where ``engines`` of them run at once. ``torch`` needs
    ``modules``, by graph: a pack holds no PyTorch program, since torch stores programs with pickles in them, which are
    never loaded.

    Raises ``PackNotFound``, ``ManifestError``, ``PackIntegrityError``, ``ConversionError``, ``BackendUnavailable``
    when the backend is not there for compiling, ``GraphLoadError`` naming pack, graph and remedy, ``InferenceError``,
    ``ParityMissing`` without a report or usable clips, ``ParityFailed`` naming graph, output, error and bound.
    """
    _check(backend, precision)
    manifest = read_manifest(folder)
    check_integrity(folder, manifest)
    report = read_parity(folder)
    if report is None:
        raise ParityMissing(f"pack {manifest.name} was never compared with PyTorch; export the pack again")
    device = device or ("cuda" if backend == "tensorrt" else "cpu")
    wanted = _wanted(backend, precision, device)
    variants = dict.fromkeys(v for b, p in wanted if p == precision and (v := variant_for(b, p)) is not None)
    manifest = add_variants(folder, tuple(variants), clips, progress=progress)
    cache = cache or user_cache()
    compiled = None if cache is None else cache / ENGINES_FOLDER
    options = EngineOptions(precision, threads, device, compiled, engines)
    with ExitStack() as stack:
        given = references or stack.enter_context(fp32_references(folder, manifest))
        trial = Trial.on_clips(folder, manifest, given, clips, windows_per_clip=3, batch_sizes=(1, 4))
        task = _Task(folder, manifest, trial, options, None if references else _REFERENCE, progress)
        if backend == "torch":
            results = _torch(task, precision, modules)
        else:
            results = _every(task, wanted) if backend == "auto" else _compiled(task, *wanted[0])
    report = _kept(folder, report, results)
    if backend != "auto":
        _refuse_failures(manifest, results)
        return results
    choice = fastest(folder, manifest, report, options, cache=cache)
    return [replace(one, chosen=choice[one.graph] == (one.backend, one.precision)) for one in results]


def _check(backend: str, precision: str) -> None:
    if backend not in COMPILE_BACKENDS:
        raise BackendUnavailable(f"no backend {backend!r}; choose one of {', '.join(COMPILE_BACKENDS)}")
    if precision not in PRECISIONS:
        raise BackendUnavailable(f"no precision {precision!r}; choose one of {', '.join(PRECISIONS)}")


def _wanted(backend: str, precision: Precision, device: str) -> list[tuple[str, Precision]]:
    """Backends and precisions to compile for."""
    if backend != "auto":
        return [(backend, precision)]
    exact = PRECISIONS[: PRECISIONS.index(precision) + 1]
    return [(name, one) for name in backends.installed(device) for one in exact]


def _every(task: _Task, wanted: Sequence[tuple[str, Precision]]) -> list[CompileResult]:
    """Compile and try every graph on each backend, but for those that cannot. Raises what stopped the last of all."""
    results: list[CompileResult] = []
    fault: EngineError | None = None
    for backend, precision in wanted:
        try:
            results += _compiled(task, backend, precision)
        except BackendUnavailable as error:
            task.progress(f"left out: {error}")
            fault = fault or error
        except (GraphLoadError, InferenceError) as error:
            _log.warning("left out: %s", error)
            fault = error
    if not results and fault is not None:
        raise fault
    return results


def _compiled(task: _Task, backend: str, precision: Precision) -> list[CompileResult]:
    """Compile and try every graph on one backend."""
    manifest, options = task.manifest, replace(task.options, precision=precision)
    made: dict[str, tuple[backends.Compiled, float]] = {}
    for graph in manifest.graphs:
        task.progress(f"compiling {graph.name} for {backend} {precision}")
        begin = time.perf_counter()
        built = backends.compile_graph(task.folder / graph.file, manifest.name, graph, backend, options)
        made[graph.name] = (built, time.perf_counter() - begin)
    task.progress(f"comparing {backend} {precision} with its reference")
    entries, not_run = _tried(task, backend, options)
    return [
        CompileResult(name, backend, precision, seconds, built.size, built.reused, entries.get(name), not_run)
        for name, (built, seconds) in made.items()
    ]


def _tried(task: _Task, backend: str, options: EngineOptions) -> tuple[dict[str, GraphParity], str]:
    """What the engines were measured to do, by graph, or why they cannot run here."""
    try:
        engines = load_engines(task.folder, task.manifest, backend, options)
    except BackendUnavailable as error:
        return {}, str(error)
    try:
        return _measured(task, engines, backends.adapter(backend).version()), ""
    finally:
        for engine in engines.values():
            engine.close()


def _measured(task: _Task, engines: Mapping[str, Engine], version: str) -> dict[str, GraphParity]:
    entries = task.trial.measure_engines(engines, version, task.options.threads)
    return {entry.graph: entry.model_copy(update={"reference": task.reference}) for entry in entries}


def _torch(task: _Task, precision: Precision, modules: Mapping[str, nn.Module] | None) -> list[CompileResult]:
    """Nothing is compiled: the modules are tried as they are."""
    manifest = task.manifest
    if missing := {graph.name for graph in manifest.graphs} - (modules or {}).keys():
        raise BackendUnavailable(
            f"pack {manifest.name}: holds no PyTorch program of graphs {sorted(missing)}, since those are pickles; "
            "give the modules in code, or choose another backend"
        )
    engines = {
        graph.name: TorchEngine(
            (modules or {})[graph.name], manifest.name, graph, device=task.options.device, precision=precision
        )
        for graph in manifest.graphs
    }
    entries = _measured(task, engines, torch_version())
    return [CompileResult(name, "torch", precision, 0.0, 0, False, entry, "") for name, entry in entries.items()]


def _kept(folder: Path, report: ParityReport, results: Sequence[CompileResult]) -> ParityReport:
    """Write what was measured into the pack's report."""
    report = merged(report, [result.parity for result in results if result.parity is not None])
    try:
        write_parity(folder, report)
    except OSError as error:
        raise ConversionError(f"cannot write to {folder}: {error.strerror}; copy the pack") from error
    return report


def _refuse_failures(manifest: Manifest, results: Sequence[CompileResult]) -> None:
    for result in results:
        if result.parity is None:
            continue
        problem = within_bounds(manifest, result.precision, result.parity.outputs, result.parity.decisions)
        if problem is not None:
            raise ParityFailed(
                f"pack {manifest.name}: graph {result.graph} on {result.backend} {result.precision}: {problem}; "
                "choose a more exact precision or another backend, or widen the bound in the manifest"
            )
