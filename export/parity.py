"""Measures every installed backend against PyTorch on real clips, and writes the pack's ``parity.json``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from engines import backends
from engines.backends import EngineOptions
from engines.errors import BackendUnavailable, ManifestError
from engines.machine import cpu_model
from engines.manifest import Branch, GraphSpec, Manifest, Mode, read_manifest
from engines.measure import Reference, measure
from engines.open import load_engines
from engines.parity import ClipUsed, GraphParity, ParityReport, write_parity
from engines.types import Array, Engine, Tensors
from export.clips import RawWindow, Recording, default_clips, open_recording, windows_of
from export.steps import empty_past, hops_of, stretch_of

_log = logging.getLogger(__name__)
GraphBatches = tuple[str, list[Tensors], list[Mapping[str, Array]], list[dict[str, Array]] | None]
"""A graph's name, what the engine is given, what the reference gave, and what the engine gave where it was run."""


def run_parity(
    folder: Path,
    references: Mapping[str, Reference],
    clips: Sequence[Path] = (),
    *,
    windows_per_clip: int = 3,
    batch_sizes: Sequence[int] = (1, 4),
    threads: int = 1,
    reference_name: str = "",
) -> ParityReport:
    """Compare every installed backend with ``references`` (by graph name) and write ``parity.json``.

    Each precision for which the manifest has a bound is measured where the backend offers it. The window
    graph of a staged branch is fed with the engine's own features, and a stateful one with its own states over
    stretches of several windows, so the error is that of the whole chain. A graph over its bound is reported
    with ``passed`` false, and the service will refuse it.

    Raises ``ManifestError`` when a graph has no reference, ``ParityMissing`` when the clips cannot be used.
    """
    manifest = read_manifest(folder)
    trial = Trial.on_clips(folder, manifest, references, clips, windows_per_clip, batch_sizes)
    entries = [
        entry
        for backend in backends.installed("cpu")
        for precision in manifest.parity_bounds
        for entry in trial.measure_backend(backend, EngineOptions(precision=precision, threads=threads))
    ]
    report = ParityReport(
        pack=manifest.name,
        reference=reference_name or f"torch {metadata.version('torch')}",
        machine=cpu_model(),
        clips=trial.clips,
        entries=tuple(entries),
    )
    write_parity(folder, report)
    return report


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One window, or one hop of a stateful branch, and what the reference makes of it."""

    inputs: dict[str, Array]
    """As a clip-mode graph takes them, or a stateful one with the reference's own states; batch 1."""
    features: Mapping[str, Array]
    """Outputs of the encoder over the window's frames; empty without one."""
    outputs: Mapping[str, Array]
    """Outputs of the window graph; of a stateful one without the states, which show in what comes of them."""
    begins: bool = True
    """Whether the past is empty; where it is not, the case goes on from the one before it."""

    @property
    def pictures(self) -> dict[str, Array]:
        """The encoder's input: the window's frames as a batch."""
        return {"frames": self.inputs["frames"][0]}

    def with_features(self, encoded: Mapping[str, Array]) -> dict[str, Array]:
        """The inputs with features in place of frames; zeros where the frame is missing, as in the service."""
        features = encoded["features"] * self.inputs["frame_mask"][0, :, None]
        return {**self.inputs, "features": features[None].astype(np.float32)}


def _windows_apart(
    manifest: Manifest, branch: Branch, references: Mapping[str, Reference], windows: Sequence[RawWindow]
) -> Iterator[Case]:
    judge, graph = references[branch.graph], manifest.graph(branch.graph)
    encoded: dict[int, Mapping[str, Array]] = {}
    for window in windows:
        case = Case(window.tensors(), {}, {})
        if branch.encoder is None:
            yield Case(case.inputs, {}, judge(_only(case.inputs, graph)))
            continue
        # A window with frames missing shares its pictures with the whole one.
        if id(window.frames) not in encoded:
            encoded[id(window.frames)] = references[branch.encoder](case.pictures)
        features = encoded[id(window.frames)]
        yield Case(case.inputs, features, judge(_only(case.with_features(features), graph)))


def _cases(
    manifest: Manifest, branch: Branch, references: Mapping[str, Reference], windows: Sequence[RawWindow]
) -> Iterator[Case]:
    if branch.mode is not Mode.STATEFUL:
        yield from _windows_apart(manifest, branch, references, windows)
        return
    judge, graph = references[branch.graph], manifest.graph(branch.graph)
    for window in windows:
        states = empty_past(branch, graph.inputs)
        for number, hop in enumerate(hops_of(window, branch)):
            inputs = dict(_only({**hop, **states}, graph))
            outputs = dict(judge(inputs))
            states = {state.input: outputs.pop(state.output) for state in branch.states}
            yield Case(inputs, {}, outputs, begins=number == 0)


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """Windows of real clips, and what the reference makes of them: what engines are tried on."""

    folder: Path
    """Of the pack."""
    manifest: Manifest
    """Of the pack."""
    cases: Mapping[str, Sequence[Case]]
    """By branch."""
    clips: tuple[ClipUsed, ...]
    """Where the windows come from."""
    batch_sizes: Sequence[int]
    """What engines are timed at."""

    @classmethod
    def on_clips(
        cls,
        folder: Path,
        manifest: Manifest,
        references: Mapping[str, Reference],
        clips: Sequence[Path],
        windows_per_clip: int,
        batch_sizes: Sequence[int] = (),
    ) -> Trial:
        """Cut windows from the clips (none given: those that every user can get) and run the reference on them.

        Raises ``ManifestError`` when a graph has no reference, ``ParityMissing`` when the clips cannot be used.
        """
        if missing := {graph.name for graph in manifest.graphs} - references.keys():
            raise ManifestError(f"pack {manifest.name}: no reference for graphs {sorted(missing)}; give one for each")
        recordings = [open_recording(path) for path in clips or default_clips()]
        windows = {branch.name: _cut(recordings, branch, windows_per_clip) for branch in manifest.branches}
        by_clip = {
            branch.name: [list(_cases(manifest, branch, references, clip)) for clip in windows[branch.name]]
            for branch in manifest.branches
        }
        used = tuple(
            ClipUsed(name=clip.path.name, sha256=clip.sha256, windows=sum(len(found[n]) for found in by_clip.values()))
            for n, clip in enumerate(recordings)
        )
        cases = {branch: [case for clip in found for case in clip] for branch, found in by_clip.items()}
        return cls(folder, manifest, cases, used, batch_sizes)

    def measure_backend(self, backend: str, options: EngineOptions) -> list[GraphParity]:
        """Every graph on one backend; none where it is not available at this precision.

        Raises what ``engines.open.load_engines`` raises besides, and ``InferenceError``.
        """
        try:
            engines = load_engines(self.folder, self.manifest, backend, options)
        except BackendUnavailable as error:
            _log.info("not measured: %s", error)
            return []
        try:
            return self.measure_engines(engines, backends.adapter(backend).version(), options.threads)
        finally:
            for engine in engines.values():
                engine.close()

    def measure_engines(self, engines: Mapping[str, Engine], version: str, threads: int = 1) -> list[GraphParity]:
        """Every graph on engines that are loaded. Raises ``InferenceError``."""
        entries: dict[str, GraphParity] = {}
        for branch in self.manifest.branches:
            for graph, inputs, expected, given in self._batches(branch, engines):
                if graph not in entries:
                    entries[graph] = measure(
                        engines[graph],
                        inputs,
                        expected,
                        manifest=self.manifest,
                        backend_version=version,
                        threads=threads,
                        batch_sizes=self.batch_sizes,
                        given=given,
                    )
                    _report(entries[graph])
        return list(entries.values())

    def inputs(self) -> dict[str, list[Tensors]]:
        """What the reference was given, by graph: one batch for each window."""
        found: dict[str, list[Tensors]] = {}
        for branch in self.manifest.branches:
            graph, cases = self.manifest.graph(branch.graph), self.cases[branch.name]
            if branch.encoder is None:
                found.setdefault(branch.graph, [_only(case.inputs, graph) for case in cases])
            else:
                found.setdefault(branch.encoder, [case.pictures for case in cases])
                found.setdefault(branch.graph, [_only(case.with_features(case.features), graph) for case in cases])
        return found

    def _batches(self, branch: Branch, engines: Mapping[str, Engine]) -> Iterator[GraphBatches]:
        """Inputs and expected outputs of each graph of a branch, one batch for each window."""
        cases, graph = self.cases[branch.name], self.manifest.graph(branch.graph)
        outputs = [case.outputs for case in cases]
        if branch.mode is Mode.STATEFUL:
            yield branch.graph, _with_own_states(branch, cases, engines[branch.graph]), outputs, None
            return
        if branch.encoder is None:
            yield branch.graph, [_only(case.inputs, graph) for case in cases], outputs, None
            return
        encoder = engines[branch.encoder]
        # A window with frames missing shares its pictures with the whole one.
        distinct = {id(case.features): case.pictures for case in cases}
        encoded = {key: encoder.infer(pictures) for key, pictures in distinct.items()}
        given = [encoded[id(case.features)] for case in cases]
        yield branch.encoder, [case.pictures for case in cases], [case.features for case in cases], given
        own = [_only(case.with_features(features), graph) for case, features in zip(cases, given, strict=True)]
        yield branch.graph, own, outputs, None


def _cut(recordings: Sequence[Recording], branch: Branch, per_clip: int) -> list[list[RawWindow]]:
    """Windows of each recording, or one stretch of several."""
    stateful = branch.mode is Mode.STATEFUL
    return windows_of(recordings, stretch_of(branch), 1) if stateful else windows_of(recordings, branch, per_clip)


def _with_own_states(branch: Branch, cases: Sequence[Case], engine: Engine) -> list[Tensors]:
    """The cases' inputs with the states that the engine itself comes to, so that its error is that of the whole."""
    inputs: list[Tensors] = []
    states: dict[str, Array] = {}
    for case in cases:
        inputs.append(case.inputs if case.begins else {**case.inputs, **states})
        outputs = engine.infer(inputs[-1])
        states = {state.input: outputs[state.output] for state in branch.states}
    return inputs


def _report(entry: GraphParity) -> None:
    level = logging.INFO if entry.passed else logging.WARNING
    verdict = "passed" if entry.passed else "over its bound"
    engine = f"{entry.graph} on {entry.backend} {entry.precision}"
    _log.log(level, "parity: %s %s, max error %.3g", engine, verdict, entry.max_abs_error)


def _only(inputs: Mapping[str, Array], graph: GraphSpec) -> Tensors:
    return {tensor.name: inputs[tensor.name] for tensor in graph.inputs}
