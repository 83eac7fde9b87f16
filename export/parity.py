"""Measures every installed backend against PyTorch on real clips, and writes the pack's ``parity.json``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import numpy as np

from engines import backends
from engines.backends import EngineOptions
from engines.decisions import scored_heads
from engines.errors import BackendUnavailable, EngineError, GraphLoadError, InferenceError, ManifestError
from engines.machine import cpu_model
from engines.manifest import Branch, GraphSpec, Manifest, Mode, read_manifest
from engines.measure import Reference, compare_decisions, measure
from engines.parity import ClipUsed, DecisionParity, GraphParity, ParityReport, write_parity
from engines.types import Array, Engine, Tensors
from export.clips import RawWindow, Recording, default_clips, open_recording, windows_of
from export.steps import empty_past, hops_of, stretch_of

_log = logging.getLogger(__name__)


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
    with ``passed`` false, and the service will refuse it; so is one that a backend fails to build or run, with the
    reason.

    Raises ``ManifestError`` when a graph has no reference, ``ParityMissing`` when the clips cannot be used, and
    ``GraphLoadError`` or ``InferenceError`` for a graph that no backend can build or run: then nothing is written.
    """
    manifest = read_manifest(folder)
    trial = Trial.on_clips(folder, manifest, references, clips, windows_per_clip, batch_sizes)
    entries: list[GraphParity] = []
    failures: dict[str, EngineError] = {}
    for backend in backends.installed("cpu"):
        for precision in manifest.parity_bounds:
            options = EngineOptions(precision=precision, threads=threads)
            found, failed = trial.measure_backend(backend, options)
            entries += found
            failures = {**failed, **failures}
    run = {entry.graph for entry in entries if entry.problem is None}
    if unusable := [error for graph, error in failures.items() if graph not in run]:
        raise unusable[0]
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
    clip: str = ""
    """Hash of the recording that it was cut from."""

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
    references: Mapping[str, Reference]
    """By graph."""

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
            branch.name: [
                [replace(case, clip=clip.sha256) for case in _cases(manifest, branch, references, cut)]
                for clip, cut in zip(recordings, windows[branch.name], strict=True)
            ]
            for branch in manifest.branches
        }
        used = tuple(
            ClipUsed(name=clip.path.name, sha256=clip.sha256, windows=sum(len(found[n]) for found in by_clip.values()))
            for n, clip in enumerate(recordings)
        )
        cases = {branch: [case for clip in found for case in clip] for branch, found in by_clip.items()}
        return cls(folder, manifest, cases, used, batch_sizes, references)

    def measure_backend(self, backend: str, options: EngineOptions) -> tuple[list[GraphParity], dict[str, EngineError]]:
        """Every graph on one backend, none where it is not available at this precision, and what went wrong by graph.

        What cannot be built or run has an entry that says why. Raises an ``EngineError`` for what is wrong with the
        pack itself.
        """
        engines: dict[str, Engine] = {}
        failures: dict[str, EngineError] = {}
        try:
            for graph in self.manifest.graphs:
                try:
                    path = self.folder / graph.file
                    engines[graph.name] = backends.load(path, self.manifest.name, graph, backend, options)
                except GraphLoadError as error:
                    failures[graph.name] = error
            version = backends.adapter(backend).version()
            entries = self.measure_engines(engines, version, options.threads, failures)
        except BackendUnavailable as error:
            _log.info("not measured: %s", error)
            return [], {}
        finally:
            for engine in engines.values():
                engine.close()
        for name, failure in failures.items():
            entries.append(self.failed(name, backend, version, options, failure))
            _report(entries[-1])
        return entries, failures

    def measure_engines(
        self,
        engines: Mapping[str, Engine],
        version: str,
        threads: int = 1,
        failures: dict[str, EngineError] | None = None,
    ) -> list[GraphParity]:
        """Every graph on engines that are loaded.

        A graph that fails on a batch is put into ``failures``, where there is such a thing; without it raises
        ``InferenceError``. A window graph whose encoder failed gets the reference's features.
        """
        entries: dict[str, GraphParity] = {}
        for branch in self.manifest.branches:
            encoded: list[dict[str, Array]] | None = None
            for name in (branch.encoder, branch.graph):
                if name is None or name not in engines or name in (failures or ()):
                    continue
                try:
                    if name == branch.encoder:
                        encoded = self._encoded(branch, engines[name])
                    if name in entries:
                        continue
                    inputs, expected = self._given(branch, name, engines[name], encoded)
                    seen, features = self._seen(branch, engines[name]), encoded if name == branch.encoder else None
                    entries[name] = measure(
                        engines[name],
                        inputs,
                        expected,
                        manifest=self.manifest,
                        backend_version=version,
                        threads=threads,
                        batch_sizes=self.batch_sizes,
                        given=features,
                        decisions=self.decided_from(branch, features, seen) if features else (),
                        seen=seen,
                    )
                except InferenceError as error:
                    if failures is None:
                        raise
                    failures[name] = error
                    continue
                _report(entries[name])
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

    def decided_from(
        self, branch: Branch, encoded: Sequence[Mapping[str, Array]], seen: Sequence[bool] = ()
    ) -> tuple[DecisionParity, ...]:
        """What the reference's window graph decides from an encoder's features of each window."""
        if not scored_heads(self.manifest, branch.graph):
            return ()
        cases, graph = self.cases[branch.name], self.manifest.graph(branch.graph)
        judge = self.references[branch.graph]
        got = [judge(_only(case.with_features(one), graph)) for case, one in zip(cases, encoded, strict=True)]
        return compare_decisions(self.manifest, branch.graph, [case.outputs for case in cases], got, seen)

    def _seen(self, branch: Branch, engine: Engine) -> list[bool]:
        """Which windows are of recordings that any graph of a branch was calibrated on."""
        names = [name for name in (branch.encoder, branch.graph) if name is not None]
        files = [self.manifest.graph(name).artifact(engine.spec.backend, engine.spec.precision) for name in names]
        clips = {clip for file in files if file is not None for clip in file.calibrated_on}
        return [case.clip in clips for case in self.cases[branch.name]]

    def _encoded(self, branch: Branch, encoder: Engine) -> list[dict[str, Array]]:
        """Outputs of a branch's encoder over the frames of each window."""
        cases = self.cases[branch.name]
        # A window with frames missing shares its pictures with the whole one.
        distinct = {id(case.features): case.pictures for case in cases}
        found = {key: encoder.infer(pictures) for key, pictures in distinct.items()}
        return [found[id(case.features)] for case in cases]

    def _given(
        self, branch: Branch, name: str, engine: Engine, encoded: Sequence[Mapping[str, Array]] | None
    ) -> tuple[list[Tensors], list[Mapping[str, Array]]]:
        """Inputs and expected outputs of one graph of a branch, one batch for each window."""
        cases, graph = self.cases[branch.name], self.manifest.graph(name)
        if name == branch.encoder:
            return [case.pictures for case in cases], [case.features for case in cases]
        outputs = [case.outputs for case in cases]
        if branch.mode is Mode.STATEFUL:
            return _with_own_states(branch, cases, engine), outputs
        if branch.encoder is None:
            return [_only(case.inputs, graph) for case in cases], outputs
        features = encoded or [case.features for case in cases]
        return [_only(case.with_features(f), graph) for case, f in zip(cases, features, strict=True)], outputs

    def failed(self, graph: str, backend: str, version: str, options: EngineOptions, error: EngineError) -> GraphParity:
        """The entry of a graph that a backend cannot build or run."""
        file = self.manifest.graph(graph).artifact(backend, options.precision)
        return GraphParity(
            graph=graph,
            onnx_sha256=self.manifest.graph(graph).sha256 if file is None else file.sha256,
            backend=backend,
            backend_version=version,
            device=options.device,
            precision=options.precision,
            threads=options.threads,
            samples=0,
            passed=False,
            problem=str(error),
        )


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
    if entry.problem is not None:
        _log.warning("parity: %s on %s %s failed: %s", entry.graph, entry.backend, entry.precision, entry.problem)
        return
    level = logging.INFO if entry.passed else logging.WARNING
    verdict = "passed" if entry.passed else "over its bound"
    engine = f"{entry.graph} on {entry.backend} {entry.precision}"
    _log.log(level, "parity: %s %s, max error %.3g", engine, verdict, entry.max_abs_error)


def _only(inputs: Mapping[str, Array], graph: GraphSpec) -> Tensors:
    return {tensor.name: inputs[tensor.name] for tensor in graph.inputs}
