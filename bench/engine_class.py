"""What our engine classes cost: their throughput against the same backend, called directly with the same options."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from bench.common import Measured, Row
from engines import backends, onnx_engine
from engines.backends import EngineOptions
from engines.manifest import GraphSpec, Manifest, read_manifest
from engines.measure import random_batch
from engines.split import best_part, in_parts
from engines.types import Array, Engine, EngineSpec, Tensors

TARGET = 0.97
Call = Callable[[Tensors], object]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One graph on one backend."""

    graph: str
    backend: str
    ratios: tuple[float, ...]
    """Our throughput over the direct one, by run."""
    direct_ms: float
    """Median of a direct call."""

    @property
    def value(self) -> float:
        """Median ratio."""
        return statistics.median(self.ratios)


def class_ratios(pack: Path, runs: int, run_s: float) -> Measured:
    """The graphs of a pack that take the least and the most time of a call, on every CPU backend that is installed."""
    manifest = read_manifest(pack)
    found: list[Comparison] = []
    for backend in _BACKENDS:
        if backend not in backends.installed("cpu"):
            continue
        took = {graph.name: _call_s(pack, manifest, graph, backend) for graph in manifest.graphs}
        for name in dict.fromkeys((min(took, key=took.__getitem__), max(took, key=took.__getitem__))):
            found.append(
                _compare(pack, manifest, manifest.graph(name), backend, runs, max(1, round(run_s / took[name])))
            )
    rows = [
        Row(f"engine_class_ratio_{one.backend}_{one.graph}", one.value, f"{one.graph} on {one.backend}: ours / direct")
        for one in found
    ]
    least = min(one.value for one in found)
    rows.append(Row("engine_class_ratio", least, "least of them", at_least=TARGET))
    notes = [
        f"Pack {manifest.name}, fp32, one thread, the batch that is run at once; {runs} runs of about {run_s:g} s a "
        "side, the sides alternating call by call on one session. Directly: the backend's own call, inputs ready, "
        "outputs left where they are."
    ]
    for one in found:
        spread = f"{min(one.ratios):.3f} to {max(one.ratios):.3f}"
        notes.append(f"{one.graph} on {one.backend}: {one.direct_ms:.3f} ms a call, by run {spread}")
    return Measured(tuple(rows), tuple(notes))


def _call_s(pack: Path, manifest: Manifest, graph: GraphSpec, backend: str) -> float:
    engine, _ = _both(pack, manifest, graph, backend)
    batch = _batch(graph)
    engine.infer(batch)
    return _seconds(engine.infer, batch, 3)


def _compare(pack: Path, manifest: Manifest, graph: GraphSpec, backend: str, runs: int, calls: int) -> Comparison:
    engine, direct = _both(pack, manifest, graph, backend)
    batch = _batch(graph)
    found = [_medians(engine.infer, direct, batch, calls) for _ in range(runs)]
    ratios = tuple(theirs / mine for mine, theirs in found)
    return Comparison(graph.name, backend, ratios, 1e3 * statistics.median(theirs for _, theirs in found))


def _medians(ours: Call, direct: Call, batch: Tensors, calls: int) -> tuple[float, float]:
    """Seconds of a call, ours and the direct one; the two alternate, so that what else runs meets both alike."""
    mine, theirs = [], []
    for _ in range(max(3, calls)):
        mine.append(_seconds(ours, batch, 1))
        theirs.append(_seconds(direct, batch, 1))
    return statistics.median(mine), statistics.median(theirs)


def _seconds(call: Call, batch: Tensors, calls: int) -> float:
    """Of one call, mean over several."""
    begin = time.perf_counter()
    for _ in range(calls):
        call(batch)
    return (time.perf_counter() - begin) / calls


def _batch(graph: GraphSpec) -> dict[str, Array]:
    """As many items as are run at once, of at most four."""
    return random_batch(graph, min(4, best_part(graph)))


def _both(pack: Path, manifest: Manifest, graph: GraphSpec, backend: str) -> tuple[Engine, Call]:
    """An engine as packs are opened with, and the direct call of the session that it runs.

    One session serves both: two differ in speed by what memory they happened to get.
    """
    options = EngineOptions()
    spec = EngineSpec(manifest.name, graph.name, backend, "cpu", options.precision, graph.inputs, graph.outputs)
    engine, direct = _BACKENDS[backend](pack / graph.file, graph, spec, options)
    return in_parts(engine, graph, options.device), direct


def _onnxruntime(path: Path, graph: GraphSpec, spec: EngineSpec, options: EngineOptions) -> tuple[Engine, Call]:
    own = onnx_engine.options_for(options.threads)
    session = ort.InferenceSession(str(path), own, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in graph.outputs]
    return onnx_engine.OnnxEngine(session, spec), lambda batch: session.run(names, batch)


def _openvino(path: Path, graph: GraphSpec, spec: EngineSpec, options: EngineOptions) -> tuple[Engine, Call]:
    from engines import openvino_engine

    request = openvino_engine.compile_model(path, spec.pack, graph, options).create_infer_request()
    engine = openvino_engine.OpenVinoEngine(request, spec)
    return engine, lambda batch: request.infer(batch, share_inputs=True, share_outputs=True)


_BACKENDS = {"onnxruntime": _onnxruntime, "openvino": _openvino}
