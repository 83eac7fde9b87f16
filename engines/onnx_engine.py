"""ONNX Runtime: the backend that is always there. The only file that catches its exceptions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from engines.backends import Compiled, EngineOptions, first_line
from engines.checks import InputCheck, PortShape, check_interface, check_outputs, failed, zeros
from engines.errors import BackendUnavailable, GraphLoadError, InferenceError
from engines.manifest import GraphSpec
from engines.onnx_binding import all_on_host, run_bound
from engines.split import SplitEngine, best_part
from engines.types import Array, EngineSpec, Tensors

_PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider",),
    # What TensorRT does not take of a graph, CUDA does.
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider"),
}
# TF32 would make fp32 less than it says.
_PROVIDER_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}
_PRECISIONS = {"cpu": ("fp32", "int8"), "cuda": ("fp32", "fp16", "int8"), "tensorrt": ("fp32", "fp16", "int8")}
_DTYPES = {"tensor(uint8)": "uint8", "tensor(int64)": "int64", "tensor(float)": "float32", "tensor(float16)": "float16"}
# Each status code is a class of its own, with no common base below Exception.
_ORT_ERRORS = (
    ort_errors.EPFail,
    ort_errors.EngineError,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoModel,
    ort_errors.NoSuchFile,
    ort_errors.NotFound,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    RuntimeError,
    ValueError,
)

_sessions: WeakValueDictionary[tuple[object, ...], Any] = WeakValueDictionary()
"""Sessions in use, by what they were made from; one is freed with its last engine."""


def version() -> str:
    """Version of ONNX Runtime."""
    return str(ort.__version__)


def load(path: Path, pack: str, graph: GraphSpec, options: EngineOptions) -> OnnxEngine | SplitEngine:
    """Load a graph of a pack; one that is best run item by item on a CPU is prepared for batches of one.

    Raises ``BackendUnavailable`` when the device is not there, ``GraphLoadError`` when the file is
    refused, ``ManifestError`` when the graph is not what the manifest says.
    """
    _check_precision(pack, graph.name, options)
    engine = _engine(_shared_session(path, pack, graph, options), pack, graph, options)
    return SplitEngine(engine, 1) if _one_by_one(graph, options) else engine


def _one_by_one(graph: GraphSpec, options: EngineOptions) -> bool:
    """Whether a fixed batch of one serves: shapes are then computed once, when the graph is loaded."""
    return options.device == "cpu" and best_part(graph) == 1


def _engine(session: Any, pack: str, graph: GraphSpec, options: EngineOptions) -> OnnxEngine:
    fixed = _one_by_one(graph, options)
    check_interface(pack, graph.name, graph.inputs, _ports(session.get_inputs(), fixed=fixed), "input")
    check_interface(pack, graph.name, graph.outputs, _ports(session.get_outputs(), fixed=fixed), "output")
    device = "cpu" if options.device == "cpu" else "cuda:0"
    spec = EngineSpec(
        pack, graph.name, "onnxruntime", device, options.precision, graph.inputs, graph.outputs, options.states
    )
    return OnnxEngine(session, spec)


def load_plain(path: Path, pack: str, graph: GraphSpec) -> OnnxEngine:
    """The graph as it is written, in fp32 on the CPU without any optimisation: what others are compared with.

    Raises ``GraphLoadError``, ``ManifestError``.
    """
    session_options = options_for(1)
    session_options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = _open_session(path, pack, graph, EngineOptions(), session_options)
    return _engine(session, pack, graph, EngineOptions())


def compile_graph(path: Path, pack: str, graph: GraphSpec, options: EngineOptions) -> Compiled:
    """ONNX Runtime prepares a graph as it loads it and keeps nothing: this finds out whether it does.

    Raises what ``load`` raises.
    """
    load(path, pack, graph, options).close()
    return Compiled(size=0, reused=False)


def _check_precision(pack: str, graph: str, options: EngineOptions) -> None:
    offered = _PRECISIONS.get(options.device)
    if offered is not None and options.precision not in offered:
        raise BackendUnavailable(
            f"pack {pack}: graph {graph}: onnxruntime runs {' or '.join(offered)} on device {options.device}, "
            f"not {options.precision}; choose one of them, or another backend"
        )


def _shared_session(path: Path, pack: str, graph: GraphSpec, options: EngineOptions) -> Any:
    """A session that is open already, or a new one.

    ``run`` may be called from several threads at once, so the engines of all threads share weights and memory pool.
    """
    file = graph.artifact("onnxruntime", options.precision)
    key = (str(path.resolve()), file and file.sha256, options.threads, options.device)
    session = _sessions.get(key)
    if session is None:
        session_options = options_for(options.threads)
        if _one_by_one(graph, options):
            for axis in {tensor.shape[0] for tensor in graph.inputs if tensor.shape}:
                session_options.add_free_dimension_override_by_name(str(axis), 1)
        session = _open_session(path, pack, graph, options, session_options)
        _sessions[key] = session
    return session


def _open_session(path: Path, pack: str, graph: GraphSpec, options: EngineOptions, session_options: Any) -> Any:
    providers = _providers(options.device)
    try:
        session = ort.InferenceSession(
            str(path), session_options, providers=[(name, _PROVIDER_OPTIONS.get(name, {})) for name in providers]
        )
    except _ORT_ERRORS as error:
        raise GraphLoadError(
            f"pack {pack}: onnxruntime {version()} cannot load graph {graph.name} ({path.name}): "
            f"{first_line(error)}; export the pack again"
        ) from error
    # Where a provider cannot start, ONNX Runtime goes on with the CPU and says nothing.
    if tuple(session.get_providers()[: len(providers)]) != providers:
        raise BackendUnavailable(_no_device(options.device))
    return session


def _providers(device: str) -> tuple[str, ...]:
    providers = _PROVIDERS.get(device, ())
    if not providers or not set(providers) <= set(ort.get_available_providers()):
        raise BackendUnavailable(_no_device(device))
    return providers


def _no_device(device: str) -> str:
    return (
        f"onnxruntime {version()} has no usable device {device!r} here; choose device cpu, or install "
        f"onnxruntime-gpu and {'TensorRT' if device == 'tensorrt' else 'CUDA'}"
    )


def options_for(threads: int) -> Any:
    """Options of every session."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4
    # Idle threads must sleep: the decoders want the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _ports(args: Sequence[Any], *, fixed: bool) -> dict[str, PortShape]:
    """Ports by name; of one whose batch was ``fixed``, it counts as free."""
    shapes = {arg.name: (None, *arg.shape[1:]) if fixed and arg.shape else tuple(arg.shape) for arg in args}
    return {arg.name: (_DTYPES.get(arg.type, arg.type), shapes[arg.name]) for arg in args}


class OnnxEngine:
    """A graph in an ONNX Runtime session."""

    def __init__(self, session: Any, spec: EngineSpec) -> None:
        self._session = session
        self._outputs = [tensor.name for tensor in spec.outputs]
        self._spec = spec
        self._check = InputCheck(spec)

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
        if self._session is None:
            raise InferenceError(f"pack {self._spec.pack}: graph {self._spec.graph} is closed")
        usual = self._check(inputs)
        try:
            if usual or all_on_host(inputs):
                values = self._session.run(self._outputs, dict(inputs))
            else:
                values = run_bound(self._session, self._outputs, inputs)
        except (*_ORT_ERRORS, MemoryError) as error:
            raise failed(self._spec, first_line(error)) from error
        outputs: dict[str, Array] = dict(zip(self._outputs, values, strict=True))
        check_outputs(self._spec, outputs)
        return outputs

    def close(self) -> None:
        """See ``Engine``."""
        self._session = None
