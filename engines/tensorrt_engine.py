"""TensorRT and TensorRT for RTX: engines on an NVIDIA GPU, with torch for memory and streams.

``tensorrt_build`` compiles; here engines are kept, loaded and run.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engines.backends import Compiled, EngineOptions, first_line
from engines.cache import ArtifactCache, CacheKey
from engines.checks import check_inputs, check_outputs, failed, zeros
from engines.errors import BackendUnavailable, InferenceError
from engines.manifest import BatchProfile, GraphSpec
from engines.tensorrt_build import build
from engines.tensorrt_library import LOGGER, RTX, collected, error_from, no_gpu, telling_line, trt, version
from engines.types import Array, EngineSpec, Tensors

__all__ = ["TensorRtEngine", "compile_graph", "load", "version"]

_log = logging.getLogger(__name__)
_PRECISIONS = ("fp32", "fp16", "int8")
_SIZES = 16
"""Batch sizes kept ready, each with its own context, buffers and CUDA graph."""
_capturing = threading.Lock()
_TORCH = {"uint8": torch.uint8, "int64": torch.int64, "float32": torch.float32, "float16": torch.float16}


def compile_graph(path: Path, pack: str, graph: GraphSpec, options: EngineOptions) -> Compiled:
    """Compile a graph into the cache, where no engine of it lies there. Raises what ``load`` raises, but needs no GPU
    with TensorRT for RTX."""
    blob, reused = _engine_blob(path, pack, graph, options)
    return Compiled(size=len(blob), reused=reused)


def load(path: Path, pack: str, graph: GraphSpec, options: EngineOptions) -> TensorRtEngine:
    """Load a graph of a pack, from the cache or compiled.

    Raises ``BackendUnavailable`` without a GPU, ``GraphLoadError`` when the graph is refused or does not fit into
    the GPU's memory, ``ManifestError`` when it is not what the manifest says.
    """
    where = _where(pack, graph)
    if options.device != "cuda":
        raise BackendUnavailable(f"{where}: tensorrt runs on device cuda, not {options.device}; choose device cuda")
    if not torch.cuda.is_available():
        raise no_gpu(where, f"none that torch {torch.__version__} sees")
    blob, reused = _engine_blob(path, pack, graph, options)
    with collected() as errors:
        runtime = trt.Runtime(LOGGER)
        engine = runtime.deserialize_cuda_engine(blob)
        refused = None if engine is not None else error_from(where, "loaded its engine", errors, "compile it again")
    if refused is not None:
        if not reused:
            raise refused
        _log.warning("cached engine is refused (%s); compiling it again", refused)
        _cache(options).path(_key(graph, options)).unlink(missing_ok=True)
        return load(path, pack, graph, options)
    spec = EngineSpec(
        pack, graph.name, "tensorrt", "cuda:0", options.precision, graph.inputs, graph.outputs, options.states
    )
    try:
        return TensorRtEngine(engine, spec, graph.batch)
    except RuntimeError as error:
        raise error_from(where, "made room to run", [first_line(error)], "free memory of the GPU") from error


def _where(pack: str, graph: GraphSpec) -> str:
    return f"pack {pack}: graph {graph.name}"


def _cache(options: EngineOptions) -> ArtifactCache:
    if options.cache_dir is None:
        raise ValueError("no cache folder")
    return ArtifactCache(options.cache_dir)


def _engine_blob(path: Path, pack: str, graph: GraphSpec, options: EngineOptions) -> tuple[bytes, bool]:
    """The serialised engine, and whether it was in the cache."""
    where = _where(pack, graph)
    if options.precision not in _PRECISIONS:
        raise BackendUnavailable(
            f"{where}: tensorrt runs {', '.join(_PRECISIONS)}, not {options.precision}; choose one"
        )
    if options.cache_dir is None:
        return build(path, where, graph, pack), False
    key, cache = _key(graph, options), _cache(options)
    if (blob := cache.get(key)) is not None:
        return blob, True
    timings = options.cache_dir / f"tensorrt-{version()}-{key.device}.timings"
    blob = build(path, where, graph, pack, timings)
    try:
        cache.put(key, blob)
    except OSError as error:
        _log.warning("cannot keep the compiled engine of graph %s: %s", graph.name, error)
    return blob, False


def _key(graph: GraphSpec, options: EngineOptions) -> CacheKey:
    file = graph.artifact("tensorrt", options.precision)
    return CacheKey(
        onnx_sha256=file.sha256 if file is not None else "",
        backend="tensorrt",
        version=version(),
        device=_device(),
        precision=options.precision,
        shapes=str(graph.batch),
    )


def _device() -> str:
    """What an engine is bound to: one model of GPU; with TensorRT for RTX none, since it finishes at load."""
    if RTX or not torch.cuda.is_available():
        return "any-rtx"
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}-{'_'.join(torch.cuda.get_device_name().split())}"


class TensorRtEngine:
    """An engine with a stream to compute on and one for copies between host and device, in order by events; for each
    batch size that it meets, a context, fixed buffers and a CUDA graph. All contexts compute in the same memory: they
    run one after the other."""

    def __init__(self, engine: Any, spec: EngineSpec, batch: BatchProfile) -> None:
        self._engine = engine
        self._spec = spec
        self._batch = batch
        self._compute = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._copies = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._scratch = torch.empty(max(1, engine.device_memory_size_v2), dtype=torch.uint8, device="cuda")
        self._sizes: OrderedDict[int, _Size] = OrderedDict()

    @property
    def spec(self) -> EngineSpec:
        """See ``Engine``."""
        return self._spec

    def warmup(self, batch_sizes: Sequence[int]) -> None:
        """See ``Engine``; with every size that runs in place of a smaller one."""
        for size in sorted({run_size(self._batch, batch) for batch in range(1, max(batch_sizes, default=0) + 1)}):
            self.infer(zeros(self._spec, size))

    def infer(self, inputs: Tensors) -> dict[str, Array]:
        """See ``Engine``: arrays go up to the GPU from page-locked memory, tensors there are taken from where they lie
        (after what the caller has queued on its stream); the answers come back into page-locked memory."""
        check_inputs(self._spec, inputs)
        batch = len(next(iter(inputs.values())))
        size = self._size(batch)
        try:
            self._feed(size, inputs, batch)
            size.run(self._compute)
            self._copies.wait_stream(self._compute)
            with torch.cuda.stream(self._copies):
                for name, tensor in size.outputs.items():
                    size.pinned[name][:batch].copy_(tensor[:batch], non_blocking=True)
            self._copies.synchronize()
        except RuntimeError as error:  # torch's OutOfMemoryError is one too.
            raise failed(self._spec, first_line(error)) from error
        outputs: dict[str, Array] = {name: np.array(size.pinned[name][:batch].numpy()) for name in size.outputs}
        check_outputs(self._spec, outputs)
        return outputs

    def infer_on_device(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        """Run a batch as ``infer`` does, with the answers on the GPU.

        The caller's stream waits for them, the processor does not. Raises ``InferenceError``.
        """
        check_inputs(self._spec, inputs)
        batch = len(next(iter(inputs.values())))
        size = self._size(batch)
        caller = torch.cuda.current_stream()
        try:
            # The page-locked buffers may still be read for the batch before.
            self._copies.synchronize()
            self._feed(size, inputs, batch)
            size.run(self._compute)
            with torch.cuda.stream(self._compute):
                outputs = {name: tensor[:batch].clone() for name, tensor in size.outputs.items()}
        except RuntimeError as error:
            raise failed(self._spec, first_line(error)) from error
        caller.wait_stream(self._compute)
        for tensor in outputs.values():
            tensor.record_stream(caller)
        return outputs

    def _feed(self, size: _Size, inputs: Tensors, batch: int) -> None:
        """Queue the inputs to the first rows of their buffers, before what is computed next; the other rows hold what
        they held. Raises ``RuntimeError``."""
        on_device: dict[str, Any] = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        # The buffers may still be read for the batch before.
        self._copies.wait_stream(self._compute)
        with torch.cuda.stream(self._copies):
            for name in inputs.keys() - on_device.keys():
                size.pinned[name].numpy()[:batch] = inputs[name]
                size.inputs[name][:batch].copy_(size.pinned[name][:batch], non_blocking=True)
        self._compute.wait_stream(self._copies)
        if on_device:
            self._compute.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._compute):
            for name, tensor in on_device.items():
                size.inputs[name][:batch].copy_(tensor, non_blocking=True)
                if tensor.is_cuda:
                    tensor.record_stream(self._compute)

    def close(self) -> None:
        """See ``Engine``."""
        if self._engine is not None:
            self._compute.synchronize()
            self._copies.synchronize()
        self._sizes.clear()
        self._engine = None

    def _size(self, batch: int) -> _Size:
        """What runs a batch of this size, made at its first batch; of many those last used are kept."""
        where = f"pack {self._spec.pack}: graph {self._spec.graph}"
        if self._engine is None:
            raise InferenceError(f"{where} is closed")
        check_batch(where, self._batch, batch)
        size = run_size(self._batch, batch)
        if size not in self._sizes:
            try:
                self._sizes[size] = _Size(self._engine, self._spec, size, self._compute, self._scratch)
            except RuntimeError as error:
                raise failed(self._spec, first_line(error)) from error
            if len(self._sizes) > _SIZES:
                self._compute.synchronize()
                self._sizes.popitem(last=False)
        self._sizes.move_to_end(size)
        return self._sizes[size]


def check_batch(where: str, profile: BatchProfile, batch: int) -> None:
    """Raise ``InferenceError`` unless an engine compiled for ``profile`` takes this batch size."""
    if not profile.smallest <= batch <= profile.largest:
        raise InferenceError(
            f"{where}: a batch of {batch} is outside {profile.smallest}..{profile.largest}, which its engine is "
            "compiled for; send smaller batches, or change the graph's batch sizes in the manifest and compile again"
        )


def run_size(profile: BatchProfile, batch: int) -> int:
    """The size that a batch is filled up to: a power of two, or one and a half times one, within the profile.

    Batches of a live service come in all sizes, and each new one would cost a context and a capture; filled up, at
    most a third of what is computed is for nothing.
    """
    power = 1 << max(0, batch - 1).bit_length()
    size = power * 3 // 4 if power >= 4 and batch <= power * 3 // 4 else power
    return min(max(size, profile.smallest), profile.largest)


class _Size:
    """One batch size: fixed buffers on both sides, and the launch of the engine as a CUDA graph."""

    def __init__(
        self, engine: Any, spec: EngineSpec, batch: int, stream: torch.cuda.Stream, scratch: torch.Tensor
    ) -> None:
        """Raises ``RuntimeError``."""
        self._context = _context(engine)
        self._context.set_device_memory(scratch.data_ptr(), scratch.numel())
        self._scratch = scratch
        self.inputs = {t.name: _on_gpu((batch, *t.shape[1:]), t.dtype) for t in spec.inputs}
        for name, tensor in self.inputs.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                raise RuntimeError(f"input {name} cannot be {list(tensor.shape)}")
        self.outputs = {t.name: _on_gpu(self._context.get_tensor_shape(t.name), t.dtype) for t in spec.outputs}
        both = {**self.inputs, **self.outputs}
        self.pinned = {name: torch.zeros(t.shape, dtype=t.dtype, pin_memory=True) for name, t in both.items()}
        # The buffers were made on the caller's stream, and are filled on others.
        torch.cuda.current_stream().synchronize()
        for name, tensor in both.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        self._graph = self._captured(stream)

    def run(self, stream: torch.cuda.Stream) -> None:
        """Queue the engine on its stream. Raises ``RuntimeError``."""
        if self._graph is None:
            self._queue(stream)
            return
        with torch.cuda.stream(stream):
            self._graph.replay()

    def _queue(self, stream: torch.cuda.Stream) -> None:
        with collected() as errors:
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise RuntimeError(telling_line(errors))

    def _captured(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph | None:
        """The launch as a CUDA graph; ``None`` where the engine does things that cannot be captured."""
        # A context sets itself up in its first run, which must not be captured.
        self._queue(stream)
        stream.synchronize()
        if RTX and not self._context.is_stream_capturable(stream.cuda_stream):
            return None
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile: what they do is not part of this graph. Two captures at once would each
        # wait for the whole device.
        with _capturing, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self._queue(stream)
        return graph


def _on_gpu(shape: Sequence[Any], dtype: str) -> torch.Tensor:
    # Zeros, since rows that no batch has filled yet are computed with too.
    return torch.zeros([int(size) for size in shape], dtype=_TORCH[dtype], device="cuda")


def _context(engine: Any) -> Any:
    """A context that brings no memory of its own: by default each would set aside what the largest batch needs."""
    managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    with collected() as errors:
        if RTX:
            config = engine.create_runtime_config()
            # Kernels for the shape are ready at the first run: those for any shape would be captured instead.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.set_execution_context_allocation_strategy(managed)
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context(managed)
        if context is None:
            raise RuntimeError(telling_line(errors))
    return context
