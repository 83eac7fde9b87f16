"""Which backends there are, and how each is loaded.

An adapter module imports its library at the top and offers ``version()`` and ``load()``; it is
imported here, on demand, so that none of the libraries is needed until it is asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Protocol, cast

from engines.errors import BackendUnavailable
from engines.manifest import GraphSpec, variant_for
from engines.types import Engine


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to run a graph."""

    precision: str = "fp32"
    """``fp32``, ``bf16``, ``fp16`` or ``int8``; what a backend offers depends on it and on the device."""
    threads: int = 1
    """Threads of one inference on a CPU. One engine per core beats threads on small graphs."""
    device: str = "cpu"
    """``cpu`` or ``cuda``; for onnxruntime also ``tensorrt``, its own way to TensorRT."""
    cache_dir: Path | None = None
    """Where compiled engines may be kept; ``None`` compiles every time, which pays up to a few seconds."""
    engines: int = 1
    """Engines that run at once, each on a thread of its own: they share caches and memory, so ``auto`` measures one
    beside the others."""
    states: frozenset[str] = frozenset()
    """See ``EngineSpec``."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """What compiling a graph came to."""

    size: int
    """Bytes of the compiled engine; 0 for a backend that keeps none."""
    reused: bool
    """Whether it was in the cache."""


class Adapter(Protocol):
    """What a backend module offers."""

    def version(self) -> str:
        """Version of the backend's library."""
        ...

    def load(self, path: Path, pack: str, graph: GraphSpec, options: EngineOptions) -> Engine:
        """Load a graph. Raises ``BackendUnavailable``, ``GraphLoadError`` or ``ManifestError``."""
        ...

    def compile_graph(self, path: Path, pack: str, graph: GraphSpec, options: EngineOptions) -> Compiled:
        """Compile a graph into ``options.cache_dir``, without running it. Raises what ``load`` raises."""
        ...


@dataclass(frozen=True, slots=True)
class _Backend:
    module: str
    """Adapter."""
    libraries: tuple[str, ...]
    """What the adapter imports: the first that is there."""
    distributions: tuple[str, ...]
    """Packages that bring it."""
    remedy: str
    devices: tuple[str, ...]
    """Where it can run."""


_BACKENDS = {
    "onnxruntime": _Backend(
        "engines.onnx_engine",
        ("onnxruntime",),
        ("onnxruntime", "onnxruntime-gpu"),
        "pip install onnxruntime",
        ("cpu", "cuda", "tensorrt"),
    ),
    "openvino": _Backend(
        "engines.openvino_engine", ("openvino",), ("openvino",), "pip install 'sightwire[openvino]'", ("cpu",)
    ),
    "tensorrt": _Backend(
        "engines.tensorrt_engine",
        ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"),
        ("tensorrt", "tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings"),
        "pip install 'sightwire[gpu]'",
        ("cuda",),
    ),
}
BACKENDS = tuple(_BACKENDS)
"""Backends that run packs."""


def adapter(backend: str) -> Adapter:
    """The backend's module, imported. Raises ``BackendUnavailable``."""
    known = _BACKENDS.get(backend)
    if known is None:
        raise BackendUnavailable(f"no backend {backend!r}; choose auto or one of {', '.join(BACKENDS)}")
    try:
        return cast(Adapter, importlib.import_module(known.module))
    except ImportError as error:
        raise BackendUnavailable(
            f"backend {backend} is not usable: {first_line(error)}; {known.remedy}, or choose another backend"
        ) from error


def installed(device: str | None = None) -> dict[str, str]:
    """Version of each backend whose library is there, and that can run on ``device``.

    Imports none of them: each costs memory and time.
    """
    wanted = {name: backend for name, backend in _BACKENDS.items() if device is None or device in backend.devices}
    return {name: found for name, backend in wanted.items() if (found := _version(backend)) is not None}


def _version(backend: _Backend) -> str | None:
    if all(importlib.util.find_spec(library) is None for library in backend.libraries):
        return None
    for name in backend.distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "unknown"


def load(path: Path, pack: str, graph: GraphSpec, backend: str, options: EngineOptions) -> Engine:
    """Load one graph on a backend.

    ``path`` is that of the graph's own file; where the backend runs another variant at this precision, that is
    taken from beside it. Raises an ``EngineError``.
    """
    loader = adapter(backend)
    return loader.load(_artifact(path, pack, graph, backend, options.precision), pack, graph, options)


def compile_graph(path: Path, pack: str, graph: GraphSpec, backend: str, options: EngineOptions) -> Compiled:
    """Compile one graph into the cache; ``path`` as for ``load``. Raises an ``EngineError``."""
    compiler = adapter(backend)
    return compiler.compile_graph(_artifact(path, pack, graph, backend, options.precision), pack, graph, options)


def _artifact(path: Path, pack: str, graph: GraphSpec, backend: str, precision: str) -> Path:
    file = graph.artifact(backend, precision)
    if file is None:
        raise BackendUnavailable(
            f"pack {pack}: graph {graph.name} has no {variant_for(backend, precision)} file for {backend}; "
            f"run `sightwire compile` with precision {precision} first"
        )
    return path.with_name(file.file)


def first_line(error: BaseException) -> str:
    """The first line of a foreign library's message: the rest is often a C++ stack."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
