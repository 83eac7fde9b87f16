"""Measures every installed backend against PyTorch on real clips, and writes the pack's ``parity.json``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from engines import backends
from engines.backends import EngineOptions
from engines.errors import BackendUnavailable, ManifestError
from engines.machine import cpu_model
from engines.manifest import Branch, Manifest, read_manifest
from engines.measure import Reference, measure
from engines.open import load_engines
from engines.parity import ClipUsed, GraphParity, ParityReport, write_parity
from engines.types import Array, Engine, Tensors
from export.clips import RawWindow, default_clips, open_recording, windows_of

__all__ = ["Reference", "measure", "run_parity"]
_log = logging.getLogger(__name__)


def run_parity(
    folder: Path,
    references: Mapping[str, Reference],
    clips: Sequence[Path] = (),
    *,
    windows_per_clip: int = 3,
    batch_sizes: Sequence[int] = (1, 2, 4, 8),
    threads: int = 1,
    reference_name: str = "",
) -> ParityReport:
    """Compare every installed backend with ``references`` (by graph name) and write ``parity.json``.

    Each precision for which the manifest has a bound is measured where the backend offers it. The window
    graph of a staged branch is fed with the engine's own features, so its error is that of the whole
    chain. A graph over its bound is reported with ``passed`` false, and the service will refuse it.

    Raises ``ManifestError`` when a graph has no reference, ``ParityMissing`` when the clips cannot be used.
    """
    manifest = read_manifest(folder)
    if missing := {graph.name for graph in manifest.graphs} - references.keys():
        raise ManifestError(f"pack {manifest.name}: no reference for graphs {sorted(missing)}; give one for each")
    recordings = [open_recording(path) for path in clips or default_clips()]
    windows = {branch.name: windows_of(recordings, branch, windows_per_clip) for branch in manifest.branches}
    flat = {name: [window for clip in cut for window in clip] for name, cut in windows.items()}
    task = _Task(folder, manifest, references, flat, batch_sizes)
    entries = [
        entry
        for backend in backends.installed()
        for precision in manifest.parity_bounds
        for entry in _measure_backend(task, backend, EngineOptions(precision=precision, threads=threads))
    ]
    report = ParityReport(
        pack=manifest.name,
        reference=reference_name or f"torch {metadata.version('torch')}",
        machine=cpu_model(),
        clips=tuple(
            ClipUsed(name=clip.path.name, sha256=clip.sha256, windows=sum(len(cut[n]) for cut in windows.values()))
            for n, clip in enumerate(recordings)
        ),
        entries=tuple(entries),
    )
    write_parity(folder, report)
    return report


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    folder: Path
    manifest: Manifest
    references: Mapping[str, Reference]
    windows: Mapping[str, Sequence[RawWindow]]
    batch_sizes: Sequence[int]


def _measure_backend(task: _Task, backend: str, options: EngineOptions) -> list[GraphParity]:
    try:
        engines = load_engines(task.folder, task.manifest, backend, options)
    except BackendUnavailable as error:
        _log.info("not measured: %s", error)
        return []
    version = backends.adapter(backend).version()
    entries: dict[str, GraphParity] = {}
    for branch in task.manifest.branches:
        for graph, wanted, own in _batches(branch, engines, task.references, task.windows[branch.name]):
            if graph not in entries:
                entries[graph] = measure(
                    task.references[graph],
                    engines[graph],
                    wanted,
                    manifest=task.manifest,
                    backend_version=version,
                    threads=options.threads,
                    batch_sizes=task.batch_sizes,
                    engine_batches=own,
                )
                _report(entries[graph])
    for engine in engines.values():
        engine.close()
    return list(entries.values())


def _report(entry: GraphParity) -> None:
    level = logging.INFO if entry.passed else logging.WARNING
    verdict = "passed" if entry.passed else "over its bound"
    engine = f"{entry.graph} on {entry.backend} {entry.precision}"
    _log.log(level, "parity: %s %s, max error %.3g", engine, verdict, entry.max_abs_error)


GraphBatches = tuple[str, list[Tensors], list[Tensors]]
"""A graph's name, what its reference is given, and what the engine is given."""


def _batches(
    branch: Branch, engines: Mapping[str, Engine], references: Mapping[str, Reference], windows: Sequence[RawWindow]
) -> list[GraphBatches]:
    """Inputs of each graph of a branch, one batch for each window."""
    raw = [window.tensors() for window in windows]
    names = [tensor.name for tensor in engines[branch.graph].spec.inputs]
    if branch.encoder is None:
        own = [_only(inputs, names) for inputs in raw]
        return [(branch.graph, list(own), list(own))]
    pictures: list[Tensors] = [{"frames": inputs["frames"][0]} for inputs in raw]
    wanted = [_staged(inputs, references[branch.encoder](batch)) for inputs, batch in zip(raw, pictures, strict=True)]
    got = [_staged(inputs, engines[branch.encoder].infer(batch)) for inputs, batch in zip(raw, pictures, strict=True)]
    return [
        (branch.encoder, pictures, pictures),
        (branch.graph, [_only(inputs, names) for inputs in wanted], [_only(inputs, names) for inputs in got]),
    ]


def _staged(inputs: Mapping[str, Array], encoded: Mapping[str, Array]) -> dict[str, Array]:
    """A window's inputs with features in place of frames; zeros where the frame is missing, as in the service."""
    features = encoded["features"] * inputs["frame_mask"][0, :, None]
    return {**inputs, "features": features[None].astype(np.float32)}


def _only(inputs: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
    return {name: inputs[name] for name in names}
