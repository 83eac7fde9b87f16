"""From an ONNX graph to a serialised TensorRT engine. With TensorRT for RTX this needs no GPU."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engines.cache import write_atomically
from engines.checks import PortShape, check_interface
from engines.errors import BackendUnavailable, EngineError, GraphLoadError
from engines.manifest import BatchProfile, GraphSpec
from engines.tensorrt_library import LOGGER, RTX, collected, error_from, no_gpu, telling_line, trt, version

_log = logging.getLogger(__name__)
# Operators that only move elements about: what comes in goes out.
_MOVES = frozenset(
    [
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    ]
)
# Operators that take any type and hand the elements to none that minds.
_ANY_TYPE = frozenset(["Cast", "Shape", "Size"])
_FLOAT, _UINT8 = 1, 2  # Of ONNX's TensorProto.DataType.


def build(path: Path, where: str, graph: GraphSpec, pack: str, timing_cache: Path | None = None) -> bytes:
    """Build the engine of an ONNX file for the batch sizes of ``graph.batch``.

    The network is strongly typed: every tensor keeps the type that the file gives it, so precision is a matter of
    the file. TF32 is off, since it would make fp32 less than it says. ``timing_cache`` keeps what was measured
    of kernels; TensorRT for RTX measures none.

    Raises ``BackendUnavailable`` without what building needs, ``GraphLoadError`` when the graph is refused,
    ``ManifestError`` when it is not what the manifest says.
    """
    content = readable(path, where)
    with collected() as errors:
        builder = _builder(where, errors)
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(flags)
        parser = trt.OnnxParser(network, LOGGER)
        if not parser.parse(content):
            raise _refusal(parser, where, path, errors)
        check_interface(pack, graph.name, graph.inputs, dict(_ports(network, "input")), "input")
        check_interface(pack, graph.name, graph.outputs, dict(_ports(network, "output")), "output")
        config = _config(builder, network, where, graph.batch)
        with _timed(config, timing_cache):
            engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise error_from(where, f"compiled {path.name}", errors, "choose backend onnxruntime, or change the model")
        return bytes(engine)


def _builder(where: str, errors: list[str]) -> Any:
    try:
        return trt.Builder(LOGGER)
    except (TypeError, RuntimeError) as error:  # pybind11's word for a null pointer.
        if errors and not isinstance(reason := error_from(where, "started", errors, "check CUDA"), GraphLoadError):
            raise reason from error
        raise no_gpu(where, "none that this tensorrt can build for") from error


def _refusal(parser: Any, where: str, path: Path, errors: list[str]) -> EngineError:
    """Names the node that TensorRT's parser stopped at."""
    if parser.num_errors == 0:
        return error_from(where, f"read {path.name}", errors, "export the pack again")
    error = parser.get_error(0)
    # A file that cannot be read at all has no node.
    if not error.node_operator():
        cause, remedy = telling_line([error.desc()]), "export the pack again"
        return GraphLoadError(f"{where}: tensorrt {version()} cannot read {path.name}: {cause}; {remedy}")
    return GraphLoadError(
        f"{where}: tensorrt {version()} cannot run operator {error.node_operator()} (node {error.node_name()} of "
        f"{path.name}): {telling_line([error.desc()])}; choose backend onnxruntime, or change the model"
    )


def _ports(network: Any, kind: str) -> Iterator[tuple[str, PortShape]]:
    count, get = (
        (network.num_inputs, network.get_input) if kind == "input" else (network.num_outputs, network.get_output)
    )
    for n in range(count):
        tensor = get(n)
        yield tensor.name, (dtype_name(tensor.dtype), tuple(None if size < 0 else size for size in tensor.shape))


def dtype_name(dtype: Any) -> str:
    """numpy's name of a TensorRT type."""
    names = {trt.DataType.FLOAT: "float32", trt.DataType.HALF: "float16", trt.DataType.BF16: "bfloat16"}
    return names.get(dtype, str(dtype).removeprefix("DataType.").lower())


def _config(builder: Any, network: Any, where: str, batch: BatchProfile) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if RTX:
        # Without this a graph cannot be captured as a CUDA graph.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    profile = builder.create_optimization_profile()
    for n in range(network.num_inputs):
        tensor = network.get_input(n)
        shape = tuple(tensor.shape)
        if any(size < 0 for size in shape[1:]):
            raise GraphLoadError(
                f"{where}: input {tensor.name} has a free size besides its batch, which tensorrt is not compiled for "
                "here; export it with fixed sizes"
            )
        profile.set_shape(tensor.name, *((size, *shape[1:]) for size in (batch.smallest, batch.usual, batch.largest)))
    if config.add_optimization_profile(profile) < 0:
        raise GraphLoadError(f"{where}: tensorrt refuses the batch sizes {batch}; change them in the manifest")
    return config


@contextlib.contextmanager
def _timed(config: Any, path: Path | None) -> Iterator[None]:
    """Builds inside use what was measured of kernels before, and keep what they measure."""
    if RTX or path is None:
        yield
        return
    try:
        known = path.read_bytes()
    except OSError:
        known = b""
    config.set_timing_cache(config.create_timing_cache(known), False)
    yield
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, bytes(config.get_timing_cache().serialize()))
    except OSError as error:
        _log.warning("cannot keep TensorRT's timings in %s: %s", path, error)


def readable(path: Path, where: str) -> bytes:
    """The file's content, with uint8 inputs cast to float before they are moved about: TensorRT takes a uint8 input
    for a cast, and for nothing else.

    Raises ``BackendUnavailable`` without the ``onnx`` package, ``GraphLoadError`` for a file that is no ONNX.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise BackendUnavailable(f"{where}: compiling for tensorrt needs onnx; pip install onnx") from error
    try:
        model = onnx.load(path)
    except (DecodeError, OSError, ValueError) as error:
        raise GraphLoadError(
            f"{where}: {path.name} is no whole ONNX file ({telling_line([str(error)])}); export the pack again"
        ) from error
    for port in model.graph.input:
        if port.type.tensor_type.elem_type == _UINT8 and (moved := _moved(model.graph.node, port.name)):
            _cast_first(model.graph, port.name, moved)
    content: bytes = model.SerializeToString()
    return content


def _moved(nodes: Sequence[Any], name: str) -> set[str] | None:
    """Tensors that hold the elements of an input moved about, where casts are all that computes with them."""
    moved = {name}
    for node in nodes:  # In topological order, as ONNX demands.
        if moved.isdisjoint(node.input) or node.op_type in _ANY_TYPE:
            continue
        if node.op_type not in _MOVES or not moved.issuperset(
            node.input if node.op_type == "Concat" else node.input[:1]
        ):
            return None
        moved.update(node.output)
    return moved if len(moved) > 1 else None


def _cast_first(graph: Any, name: str, moved: set[str]) -> None:
    import onnx

    cast = f"{name}_as_float"
    for node in graph.node:
        node.input[:] = [cast if given == name else given for given in node.input]
    graph.node.insert(0, onnx.helper.make_node("Cast", [name], [cast], name=f"cast_{name}", to=_FLOAT))
    # What the file says of the tensors between is true no longer.
    kept = [value for value in graph.value_info if value.name not in moved]
    del graph.value_info[:]
    graph.value_info.extend(kept)
