"""Every backend and precision of a pack against PyTorch on real clips: errors, agreement, latency, throughput."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import onnx
import torch
from torch import nn

from engines import backends
from engines.backends import EngineOptions
from engines.cache import ENGINES_FOLDER, user_cache
from engines.errors import BackendUnavailable, ConversionError, EngineError, ManifestError
from engines.machine import cpu_model
from engines.manifest import PRECISIONS, GraphSpec, Manifest, Precision, check_integrity, read_manifest
from engines.measure import Reference
from engines.parity import ClipUsed, GraphParity, ParityReport, merged, read_parity, within_bounds, write_parity
from engines.torch_engine import TorchEngine
from engines.torch_engine import version as torch_version
from engines.types import Engine
from export.bisect import Departure, Suspect, first_departure, same_tensors, unoptimised
from export.build import GraphToExport, PackToWrite, Progress, ReadyGraph, reference, to_onnx
from export.parity import Trial
from export.source import Note, SourceNotAtHand, rebuild

VERIFY_BACKENDS = (*backends.BACKENDS, "torch")
BATCH_SIZES = (1, 4, 8)
WINDOWS_PER_CLIP = 3
FALLBACK = "the pack's own fp32 graphs on onnxruntime, not optimised"


@dataclass(frozen=True, slots=True, eq=False)
class Verified:
    """One graph on one backend at one precision."""

    graph: str
    """Name of the graph."""
    backend: str
    """Backend."""
    precision: str
    """Precision."""
    parity: GraphParity | None
    """What was measured; ``None`` where it failed before that."""
    problem: str | None
    """What is over the manifest's bounds, or how it failed; ``None`` where nothing is wrong."""
    window: int | None = None
    """Which window it is worst on, from 0; ``None`` where it did not come to that."""
    found: str = ""
    """What was found when a departing node was looked for; empty where none was."""
    departure: Departure | None = None
    """That node."""
    failed: GraphParity | None = None
    """What goes into ``parity.json`` where it could not be built or run."""


@dataclass(frozen=True, slots=True, eq=False)
class Verification:
    """What came out for a pack."""

    manifest: Manifest
    """Of the pack."""
    reference: str
    """What engines were compared with."""
    no_torch: str
    """Why that is not the model itself; empty where it is."""
    machine: str
    """Processor."""
    versions: Mapping[str, str]
    """Of the backends that ran."""
    clips: tuple[ClipUsed, ...]
    """What inputs were cut from."""
    results: tuple[Verified, ...]
    """Every graph on every backend and precision that was run."""
    not_run: tuple[str, ...]
    """Why the others were not."""

    @property
    def problems(self) -> list[str]:
        """One line for each graph that fails, naming pack, graph, backend, precision, output, error and bound."""
        return [_line(self.manifest.name, one) for one in self.results if one.problem is not None]


def _line(pack: str, one: Verified) -> str:
    found = f"; {one.found}" if one.found else ""
    if one.parity is None:
        return f"{one.problem}{found}"
    return (
        f"pack {pack}: graph {one.graph} on {one.backend} {one.precision}: {one.problem}{found}; "
        "choose a more exact precision or another backend, or export the pack again"
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    folder: Path
    manifest: Manifest
    trial: Trial
    options: EngineOptions
    fallback: bool
    progress: Progress


@dataclass(frozen=True, slots=True, eq=False)
class _Known:
    """What engines are compared with, and where it comes from."""

    references: Mapping[str, Reference]
    name: str
    no_torch: str
    source: PackToWrite | None

    @property
    def missing(self) -> str:
        """Why there is no module of a graph."""
        return self.no_torch or f"it is compared with {self.name}"

    def modules(self) -> dict[str, nn.Module]:
        graphs = () if self.source is None else self.source.graphs
        return {graph.name: graph.module for graph in graphs if isinstance(graph, GraphToExport)}


def verify_pack(
    folder: Path,
    *,
    only_backends: Sequence[str] = (),
    precisions: Sequence[Precision] = (),
    clips: Sequence[Path] = (),
    source: Note | None = None,
    device: str | None = None,
    threads: int = 1,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    bisect: bool = False,
    cache: Path | None = None,
    progress: Progress = lambda line: None,
) -> Verification:
    """Compare a pack's engines with the PyTorch model that it was exported from, and update its ``parity.json``.

    Every backend that is installed is tried at every precision that the manifest has a bound for, PyTorch itself for
    its times; ``only_backends`` and ``precisions`` choose among them, and must then be able to run. Inputs are windows
    of ``clips``, by default those that every user can get. The model is built again from ``source``, or from what is
    known of it here (see ``export.source``); where it is not at hand the pack's fp32 graphs are the reference, run by
    ONNX Runtime without any optimisation, and the result says so. ``bisect`` looks in each graph that is over its bound
    for the first node whose output departs. Engines come from and go to the cache, by default the user's.

    Nothing is raised for what is over a bound: see ``Verification.problems``. Raises ``PackNotFound``,
    ``ManifestError``, ``PackIntegrityError``, ``BackendUnavailable`` for a backend or precision that was asked for and
    cannot run, ``ParityMissing`` without usable clips, ``ConversionError`` when the pack cannot be written to,
    ``export.build.ExportError`` when ``source`` is not what the pack was exported from.
    """
    _check(only_backends, precisions)
    manifest = read_manifest(folder)
    check_integrity(folder, manifest)
    kept = read_parity(folder)
    cache = cache or user_cache()
    progress("reading the model that the pack was exported from")
    known = _known(folder, manifest, source, cache)
    progress("running the reference on clips")
    trial = Trial.on_clips(folder, manifest, known.references, clips, WINDOWS_PER_CLIP, batch_sizes)
    options = EngineOptions(threads=threads, device="cpu", cache_dir=None if cache is None else cache / ENGINES_FOLDER)
    task = _Task(folder, manifest, trial, options, bool(known.no_torch), progress)
    results: list[Verified] = []
    not_run: list[str] = []
    for backend, precision in _wanted(manifest, only_backends, precisions):
        try:
            chosen = replace(options, precision=precision, device=_device(backend, device))
            results += _tried(task, known, backend, chosen)
        except BackendUnavailable as error:
            not_run.append(str(error))
            if only_backends and precisions:
                raise
    if not results:
        raise BackendUnavailable(not_run[0] if not_run else f"pack {manifest.name}: no backend is installed")
    if bisect:
        results = [_bisected(task, known, one, device) for one in results]
    measured = [one.parity or one.failed for one in results]
    _keep(task, known, kept, [entry for entry in measured if entry is not None])
    versions = {one.backend: one.parity.backend_version for one in results if one.parity is not None}
    return Verification(
        manifest, known.name, known.no_torch, cpu_model(), versions, trial.clips, tuple(results), _told(not_run)
    )


def _check(chosen: Sequence[str], precisions: Sequence[str]) -> None:
    for what, given, there in (("backend", chosen, VERIFY_BACKENDS), ("precision", precisions, PRECISIONS)):
        if unknown := [name for name in given if name not in there]:
            raise BackendUnavailable(f"no {what} {unknown[0]!r}; choose among {', '.join(there)}")


def _known(folder: Path, manifest: Manifest, source: Note | None, cache: Path | None) -> _Known:
    """The PyTorch model, or else the pack's own graphs as they are written."""
    try:
        pack = rebuild(manifest, source, cache)
    except SourceNotAtHand as error:
        graphs = {graph.name: unoptimised(folder / graph.file, manifest.name, graph) for graph in manifest.graphs}
        return _Known(graphs, f"{FALLBACK} (onnxruntime {metadata.version('onnxruntime')})", str(error), None)
    name = pack.reference_name or f"torch {torch_version()}"
    return _Known({graph.name: reference(graph) for graph in pack.graphs}, name, "", pack)


def _wanted(
    manifest: Manifest, chosen: Sequence[str], precisions: Sequence[Precision]
) -> Iterator[tuple[str, Precision]]:
    """Backends and precisions to try. PyTorch is the reference: unless asked otherwise it is only timed, in fp32."""
    for backend in chosen or VERIFY_BACKENDS:
        for precision in precisions or PRECISIONS:
            if precision in manifest.parity_bounds and (backend != "torch" or precisions or precision == "fp32"):
                yield backend, precision


def _device(backend: str, device: str | None) -> str:
    return device or ("cuda" if backend == "tensorrt" else "cpu")


def _tried(task: _Task, known: _Known, backend: str, options: EngineOptions) -> list[Verified]:
    """Every graph on one backend at one precision. Raises ``BackendUnavailable``."""
    precision = options.precision
    task.progress(f"comparing {backend} {precision}")
    engines: dict[str, Engine] = {}
    failures: dict[str, EngineError] = {}
    try:
        for graph in task.manifest.graphs:
            try:
                engines[graph.name] = _load(task, known, graph, backend, options)
            except BackendUnavailable:
                raise
            except EngineError as error:
                failures[graph.name] = error
        version = torch_version() if backend == "torch" else backends.adapter(backend).version()
        trial = _trial(task, backend, precision)
        with _torch_threads(options.threads):
            try:
                entries = trial.measure_engines(engines, version, options.threads, failures)
            except ManifestError as error:
                return [Verified(_last(engines), backend, precision, None, str(error))]
        windows = {name: _first_failing(task, engines[name]) for name in failures if name in engines}
    finally:
        for engine in engines.values():
            engine.close()
    found = {entry.graph: _judged(task, entry) for entry in entries}
    for name, failure in failures.items():
        kept = trial.failed(name, backend, version, options, failure)
        found[name] = Verified(name, backend, precision, None, str(failure), window=windows.get(name), failed=kept)
    return [found[graph.name] for graph in task.manifest.graphs if graph.name in found]


def _last(engines: Mapping[str, Engine]) -> str:
    return list(engines)[-1]


def _trial(task: _Task, backend: str, precision: str) -> Trial:
    """All windows; of PyTorch in fp32, which is the reference and would be compared with itself, one of each branch."""
    if backend != "torch" or precision != "fp32":
        return task.trial
    return replace(task.trial, cases={branch: cases[:1] for branch, cases in task.trial.cases.items()})


def _judged(task: _Task, entry: GraphParity) -> Verified:
    if task.fallback:
        entry = entry.model_copy(update={"reference": FALLBACK})
    problem = within_bounds(task.manifest, entry.precision, entry.outputs, entry.decisions)
    return Verified(entry.graph, entry.backend, entry.precision, entry, problem, _worst_window(entry))


def _load(task: _Task, known: _Known, graph: GraphSpec, backend: str, options: EngineOptions) -> Engine:
    name = task.manifest.name
    if backend != "torch":
        return backends.load(task.folder / graph.file, name, graph, backend, options)
    module = known.modules().get(graph.name)
    if module is None:
        raise BackendUnavailable(f"pack {name}: torch has no module of graph {graph.name}: {known.missing}")
    return TorchEngine(module, name, graph, device=options.device, precision=options.precision)


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """PyTorch takes every core by default, which would not be the same measurement."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _first_failing(task: _Task, engine: Engine) -> int | None:
    """On which window a graph fails, given the reference's own inputs; ``None`` where it fails on none of these."""
    for n, batch in enumerate(task.trial.inputs()[engine.spec.graph]):
        try:
            engine.infer(batch)
        except EngineError:
            return n
    return None


def _bisected(task: _Task, known: _Known, one: Verified, device: str | None) -> Verified:
    """With the first node that departs, where a graph is over its bound and runs from an ONNX file."""
    if one.problem is None or one.window is None or one.backend == "torch":
        return one
    task.progress(f"looking for what departs in {one.graph} on {one.backend} {one.precision}")
    graph = task.manifest.graph(one.graph)
    options = replace(task.options, precision=one.precision, device=_device(one.backend, device))
    suspect = Suspect(task.manifest, graph, task.folder, one.backend, options)
    try:
        departure = first_departure(suspect, _written(task, known, graph), task.trial.inputs()[one.graph][one.window])
    except EngineError as error:
        return replace(one, found=f"no node can be named: {error}")
    nothing = "given the reference's own inputs no node departs: the error comes in with the inputs"
    return replace(one, found=nothing if departure is None else str(departure), departure=departure)


def _worst_window(entry: GraphParity) -> int:
    """Where the largest error was; the first, where there are no errors to tell by."""
    errors = [out.window_errors for out in entry.outputs if out.window_errors]
    worst = max(errors, key=max, default=(0.0,))
    return worst.index(max(worst))


def _written(task: _Task, known: _Known, graph: GraphSpec) -> onnx.ModelProto:
    """The graph as it should be: exported from the model again, where it is at hand and gives the same nodes."""
    ours: onnx.ModelProto = onnx.load(task.folder / graph.file)
    for source in () if known.source is None else known.source.graphs:
        if source.name == graph.name:
            again = source.proto if isinstance(source, ReadyGraph) else to_onnx(source)
            return again if same_tensors(ours, again) else ours
    return ours


def _keep(task: _Task, known: _Known, kept: ParityReport | None, entries: Sequence[GraphParity]) -> None:
    """Write what was measured into the pack's report. Raises ``ConversionError``."""
    if kept is None:
        kept = ParityReport(
            pack=task.manifest.name, reference=known.name, machine=cpu_model(), clips=task.trial.clips, entries=()
        )
    new = [entry for entry in entries if not (task.fallback and entry.passed and _better(task.manifest, kept, entry))]
    report = merged(kept, new)
    if not task.fallback and all(entry in new for entry in report.entries):
        update = {"reference": known.name, "machine": cpu_model(), "clips": task.trial.clips}
        report = report.model_copy(update=update)
    try:
        write_parity(task.folder, report)
    except OSError as error:
        raise ConversionError(f"cannot write to {task.folder}: {error.strerror}; copy the pack") from error


def _better(manifest: Manifest, kept: ParityReport, entry: GraphParity) -> bool:
    """Whether the report has a comparison of the same file with the model itself, which says more."""
    there = kept.entry(manifest.graph(entry.graph), entry.backend, entry.precision)
    return there is not None and there.reference is None


def _told(reasons: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(reasons))
