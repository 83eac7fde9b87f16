"""Backends on a device: loaded, or why not; and compared with the CPU before anything of them is measured."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
from torch import nn

from bench.gpu_windows import Cameras
from bench.rig import RecordedEngine, Recorder
from engines import backends
from engines.backends import EngineOptions
from engines.cache import ENGINES_FOLDER, user_cache
from engines.errors import BackendUnavailable
from engines.manifest import Manifest
from engines.measure import measure
from engines.open import LoadedPack, load_engines
from engines.parity import within_bounds
from engines.split import in_parts
from engines.torch_engine import TorchEngine
from engines.torch_engine import version as torch_version
from engines.types import Array, Engine, Tensors
from export.build import ExportError, GraphToExport
from export.source import SourceNotAtHand, rebuild
from stream.inference import PackRunner
from stream.memory import SourceMemory
from stream.samples import HostPictures, Pictures

CHECKED_TURNS = 3
"""Turns of two sources whose inferences are compared."""


@dataclass(frozen=True, slots=True)
class Backend:
    """What to load."""

    name: str
    """As in the table and in keys: ``tensorrt_rtx``, ``onnxruntime``, ``torch``."""
    adapter: str
    """Of ``engines.backends``, or ``torch``."""
    device: str
    """``cuda`` or ``cpu``."""
    precision: str
    """Of the engines."""

    @property
    def key(self) -> str:
        """Begins the keys of its figures."""
        return f"{self.name}_{self.device}_{self.precision}"


def backends_for(device: str, precision: str) -> list[Backend]:
    """All that could run on a device, the fastest as a rule first."""
    if device == "cpu":
        return [Backend(name, name, device, precision) for name in ("onnxruntime", "torch")]
    return [
        Backend(_tensorrt_name(), "tensorrt", device, precision),
        Backend("onnxruntime", "onnxruntime", device, precision),
        Backend("torch", "torch", device, precision),
    ]


def _tensorrt_name() -> str:
    try:
        version = backends.adapter("tensorrt").version()
    except BackendUnavailable:
        return "tensorrt"
    return "tensorrt_rtx" if version.startswith("rtx-") else "tensorrt"


def load(folder: Path, manifest: Manifest, backend: Backend, threads: int = 1) -> LoadedPack:
    """A pack on a backend, owned by one thread. Raises ``EngineError`` where it cannot be had here."""
    cache = user_cache()
    options = EngineOptions(
        backend.precision, threads, backend.device, None if cache is None else cache / ENGINES_FOLDER
    )
    if backend.adapter == "torch":
        engines = _torch_engines(manifest, backend)
    else:
        engines = load_engines(folder, manifest, backend.adapter, options)
    split = {name: in_parts(engine, manifest.graph(name), backend.device) for name, engine in engines.items()}
    return LoadedPack(folder, manifest, manifest.sha256(), backend.name, backend.precision, MappingProxyType(split))


def _torch_engines(manifest: Manifest, backend: Backend) -> dict[str, Engine]:
    try:
        graphs = rebuild(manifest, None, user_cache()).graphs
    except (SourceNotAtHand, ExportError) as error:
        raise BackendUnavailable(
            f"pack {manifest.name} holds no PyTorch program, and {error}; export it on this machine"
        ) from error
    modules: dict[str, nn.Module] = {g.name: g.module for g in graphs if isinstance(g, GraphToExport)}
    if missing := {graph.name for graph in manifest.graphs} - modules.keys():
        raise BackendUnavailable(
            f"pack {manifest.name} was exported from ONNX: no PyTorch program of {sorted(missing)}"
        )
    return {
        graph.name: TorchEngine(
            modules[graph.name], manifest.name, graph, device=backend.device, precision=backend.precision
        )
        for graph in manifest.graphs
    }


def version_of(backend: Backend) -> str:
    """Version of its library."""
    return torch_version() if backend.adapter == "torch" else backends.adapter(backend.adapter).version()


@dataclass(frozen=True, slots=True)
class Reference:
    """What the pack's fp32 graphs answer on the CPU, and what they were asked."""

    manifest: Manifest
    """Of the pack."""
    asked: Mapping[str, Sequence[Tensors]]
    """Batches by graph."""
    answers: Mapping[str, Sequence[Mapping[str, Array]]]
    """Outputs for each."""

    @classmethod
    def on_cpu(cls, folder: Path, manifest: Manifest) -> Reference:
        """Run a few windows of two sources through ONNX Runtime. Raises ``EngineError``."""
        pack = load(folder, manifest, Backend("onnxruntime", "onnxruntime", "cpu", "fp32"))
        recorder, always = Recorder(), threading.Event()
        always.set()
        recorded = {name: RecordedEngine(engine, recorder, always) for name, engine in pack.engines.items()}
        runner = PackRunner(replace(pack, engines=MappingProxyType(recorded)), SourceMemory())
        cameras = Cameras(manifest, ("one", "two"))
        for turn in range(CHECKED_TURNS):
            for branch, windows in cameras.due(turn):
                runner.run(branch, tuple(windows))
        asked: dict[str, list[Tensors]] = {graph.name: [] for graph in manifest.graphs}
        for (graph, _), inputs in recorder.inputs.items():
            asked[graph].append(inputs)
        answers = {name: [pack.engines[name].infer(batch) for batch in batches] for name, batches in asked.items()}
        pack.close()
        return cls(manifest, asked, answers)

    def difference(self, pack: LoadedPack, backend: Backend) -> str | None:
        """What of a pack's answers is over the manifest's bounds; ``None`` where nothing is. Raises ``EngineError``."""
        for graph in self.manifest.graphs:
            entry = measure(
                pack.engines[graph.name],
                self.asked[graph.name],
                self.answers[graph.name],
                manifest=self.manifest,
                backend_version=version_of(backend),
            )
            problem = within_bounds(self.manifest, backend.precision, entry.outputs)
            if problem is not None:
                return f"graph {graph.name}: {problem}"
        return None


def chain_difference(pack: LoadedPack, pictures: Pictures) -> float:
    """Largest difference of any score between frames on the device and frames in host memory, on the same engines.

    Raises ``EngineError``.
    """
    cameras = Cameras(pack.manifest, ("one", "two", "three"))
    host, device = (PackRunner(pack, SourceMemory(pictures=given)) for given in (HostPictures(), pictures))
    worst = 0.0
    for turn in range(CHECKED_TURNS):
        for branch, windows in cameras.due(turn):
            for want, got in zip(host.run(branch, tuple(windows)), device.run(branch, tuple(windows)), strict=True):
                for expected, found in zip(want, got, strict=True):
                    if expected.scores is not None and found.scores is not None:
                        worst = max(worst, float(np.abs(expected.scores - found.scores).max()))
    return worst
