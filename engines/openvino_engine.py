"""OpenVINO on the CPU. The only file that catches its exceptions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from engines.backends import Compiled, EngineOptions
from engines.cache import ArtifactCache, CacheKey
from engines.checks import InputCheck, PortShape, check_interface, check_outputs, failed, zeros
from engines.errors import BackendUnavailable, GraphLoadError, InferenceError
from engines.machine import machine_id
from engines.manifest import GraphSpec, TensorSpec
from engines.openvino_axes import put_height_first
from engines.openvino_runtime import ov
from engines.openvino_winograd import save_multiplications
from engines.split import SplitEngine, best_part
from engines.types import Array, EngineSpec, Tensors

_log = logging.getLogger(__name__)
_DTYPES = {"u8": "uint8", "i64": "int64", "f32": "float32", "f16": "float16"}
# A quantised graph says itself what is int8; the rest of it is fp32.
_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}
_CHANGES = "height first, winograd"
"""What is done to a model before it is compiled; engines compiled otherwise are not taken from the cache."""
_CAPABILITIES = {"bf16": "BF16", "fp16": "FP16"}


def version() -> str:
    """Version of OpenVINO."""
    return str(ov.__version__).split("-")[0]


@cache
def _core() -> Any:
    """The plugin registry; compiling on it is thread-safe."""
    return ov.Core()


def load(path: Path, pack: str, graph: GraphSpec, options: EngineOptions) -> OpenVinoEngine | SplitEngine:
    """Compile a graph of a pack; one that is best run item by item is compiled for batches of one.

    Raises ``BackendUnavailable`` when device or precision are not there, ``GraphLoadError`` when the file is
    refused, ``ManifestError`` when the graph is not what the manifest says.
    """
    _check_options(pack, graph.name, options)
    try:
        compiled = _compiled(path, pack, graph, options)
        request = compiled.create_infer_request()
    except RuntimeError as error:
        raise GraphLoadError(
            f"pack {pack}: openvino {version()} cannot load graph {graph.name} ({path.name}): {_cause(error)}; "
            "export the pack again, or choose backend onnxruntime"
        ) from error
    spec = EngineSpec(
        pack, graph.name, "openvino", "cpu", options.precision, graph.inputs, graph.outputs, options.states
    )
    engine = OpenVinoEngine(request, spec)
    return SplitEngine(engine, 1) if _one_by_one(graph) else engine


def _check_options(pack: str, graph: str, options: EngineOptions) -> None:
    where = f"pack {pack}: graph {graph}"
    if options.device != "cpu":
        raise BackendUnavailable(f"{where}: openvino runs on device cpu here, not {options.device}; choose device cpu")
    if options.precision not in _HINTS:
        raise BackendUnavailable(f"{where}: openvino runs {', '.join(_HINTS)}, not {options.precision}; choose one")
    needed = _CAPABILITIES.get(options.precision)
    if needed is not None and needed not in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise BackendUnavailable(
            f"{where}: this processor has no {options.precision} arithmetic for openvino; choose precision fp32"
        )


def compile_graph(path: Path, pack: str, graph: GraphSpec, options: EngineOptions) -> Compiled:
    """Compile a graph into the cache. Raises what ``load`` raises."""
    cached = None if options.cache_dir is None else ArtifactCache(options.cache_dir).get(_key(graph, options))
    load(path, pack, graph, options).close()
    if options.cache_dir is None:
        return Compiled(size=0, reused=False)
    kept = ArtifactCache(options.cache_dir).get(_key(graph, options)) or b""
    return Compiled(size=len(kept), reused=cached is not None)


def _key(graph: GraphSpec, options: EngineOptions) -> CacheKey:
    file = graph.artifact("openvino", options.precision)
    return CacheKey(
        onnx_sha256=file.sha256 if file is not None else "",
        backend="openvino",
        version=f"{ov.__version__} {_CHANGES}",
        device=machine_id(),
        precision=f"{options.precision}x{options.threads}",
        shapes="batch 1" if _one_by_one(graph) else "dynamic",
    )


def _one_by_one(graph: GraphSpec) -> bool:
    """Whether a fixed batch of one serves: nothing larger would be run at once, and fixed shapes are faster."""
    return best_part(graph) == 1


def compile_model(path: Path, pack: str, graph: GraphSpec, options: EngineOptions) -> Any:
    """A graph compiled as every engine runs it. Raises ``ManifestError``, and ``RuntimeError`` from OpenVINO."""
    model = _core().read_model(str(path))
    _check_ports(pack, graph, model, fixed=False)
    put_height_first(model)
    if _one_by_one(graph):
        # Other free sizes, where there are any, stay free.
        model.reshape({port: [1, *list(port.partial_shape)[1:]] for port in model.inputs})
        if options.precision == "fp32":
            save_multiplications(model)
    return _core().compile_model(model, "CPU", _properties(options))


def _compiled(path: Path, pack: str, graph: GraphSpec, options: EngineOptions) -> Any:
    """A compiled model, from the cache where there is one."""
    if options.cache_dir is None:
        return compile_model(path, pack, graph, options)
    cached, key = ArtifactCache(options.cache_dir), _key(graph, options)
    if (blob := cached.get(key)) is not None:
        try:
            compiled = _core().import_model(blob, "CPU", _properties(options))
            _check_ports(pack, graph, compiled, fixed=_one_by_one(graph))
            return compiled
        except RuntimeError as error:
            _log.warning("cached engine of graph %s is refused (%s); compiling it again", graph.name, _cause(error))
    compiled = compile_model(path, pack, graph, options)
    try:
        cached.put(key, compiled.export_model().getvalue())
    except OSError as error:
        _log.warning("cannot keep the compiled engine of graph %s: %s", graph.name, error)
    return compiled


def _properties(options: EngineOptions) -> dict[str, object]:
    return {
        "INFERENCE_NUM_THREADS": options.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": _HINTS[options.precision],
        # Pinning would put the engines of several threads onto the same core, and beside the decoders.
        "ENABLE_CPU_PINNING": False,
    }


def _check_ports(pack: str, graph: GraphSpec, model: Any, *, fixed: bool) -> None:
    """Raise ``ManifestError`` unless a model has the tensors of the manifest, but for a batch that was ``fixed``."""
    for kind, wanted, ports in (("input", graph.inputs, model.inputs), ("output", graph.outputs, model.outputs)):
        real = _ports(ports, wanted)
        if fixed:
            real = {name: (dtype, (None, *shape[1:])) for name, (dtype, shape) in real.items()}
        check_interface(pack, graph.name, wanted, real, kind)


def _ports(ports: Sequence[Any], wanted: Sequence[TensorSpec]) -> dict[str, PortShape]:
    """Ports by name. One can have several names, where OpenVINO found two tensors to be the same."""
    known = {tensor.name for tensor in wanted}
    found: dict[str, PortShape] = {}
    for port in ports:
        dtype = port.element_type.to_string()
        shape = tuple(dim.get_length() if dim.is_static else None for dim in port.partial_shape)
        for name in port.get_names() & known or {port.get_any_name()}:
            found[name] = (_DTYPES.get(dtype, dtype), shape)
    return found


def _cause(error: RuntimeError) -> str:
    """The telling line: OpenVINO puts source positions before, advice and blank lines after it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check '", "To facilitate"))]
    unknown = [line.lstrip("- ") for line in lines if "No conversion rule" in line]
    return (unknown or telling or lines or [type(error).__name__])[-1].rstrip(".")


class OpenVinoEngine:
    """A graph compiled by OpenVINO, with one inference request."""

    def __init__(self, request: Any, spec: EngineSpec) -> None:
        self._request = request
        self._spec = spec
        self._check = InputCheck(spec)
        ports = [port.get_names() for port in request.model_outputs]
        # Looking outputs up by name takes OpenVINO longer than a small graph allows.
        self._outputs = [
            (one.name, next(n for n, names in enumerate(ports) if one.name in names)) for one in spec.outputs
        ]

    @property
    def spec(self) -> EngineSpec:
        """See ``Engine``."""
        return self._spec

    def warmup(self, batch_sizes: Sequence[int]) -> None:
        """See ``Engine``."""
        for batch in batch_sizes:
            self.infer(zeros(self._spec, batch))

    def infer(self, inputs: Tensors) -> dict[str, Array]:
        """See ``Engine``."""
        if self._request is None:
            raise InferenceError(f"pack {self._spec.pack}: graph {self._spec.graph} is closed")
        self._check(inputs)
        try:
            # Inputs are read in place; outputs are copied out, since the request's own memory is used again.
            values = list(self._request.infer(dict(inputs), share_inputs=True, share_outputs=False).values())
            outputs: dict[str, Array] = {name: values[place] for name, place in self._outputs}
        except RuntimeError as error:
            raise failed(self._spec, _cause(error)) from error
        except MemoryError as error:
            raise failed(self._spec, "out of memory") from error
        check_outputs(self._spec, outputs)
        return outputs

    def close(self) -> None:
        """See ``Engine``."""
        self._request = None
