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
from engines.manifest import GraphSpec
from engines.types import Engine


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How to run a graph."""

    precision: str = "fp32"
    """``fp32``, ``bf16``, ``fp16`` or ``int8``; what a backend offers depends on it and on the device."""
    threads: int = 1
    """Threads of one inference on a CPU. One engine per core beats threads on small graphs."""
    device: str = "cpu"
    """``cpu`` or ``cuda``."""
    cache_dir: Path | None = None
    """Where compiled engines may be kept; ``None`` compiles every time, which pays up to about a second."""


class Adapter(Protocol):
    """What a backend module offers."""

    def version(self) -> str:
        """Version of the backend's library."""
        ...

    def load(self, path: Path, pack: str, graph: GraphSpec, options: EngineOptions) -> Engine:
        """Load a graph. Raises ``BackendUnavailable``, ``GraphLoadError`` or ``ManifestError``."""
        ...


@dataclass(frozen=True, slots=True)
class _Backend:
    module: str
    """Adapter."""
    library: str
    """What the adapter imports."""
    distributions: tuple[str, ...]
    """Packages that bring it."""
    remedy: str


_BACKENDS = {
    "onnxruntime": _Backend(
        "engines.onnx_engine", "onnxruntime", ("onnxruntime", "onnxruntime-gpu"), "pip install onnxruntime"
    ),
    "openvino": _Backend("engines.openvino_engine", "openvino", ("openvino",), "pip install 'sightwire[openvino]'"),
}
BACKENDS = tuple(_BACKENDS)
"""Backends that load a pack's ONNX files."""


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


def installed() -> dict[str, str]:
    """Version of each backend whose library is there. Imports none of them: each costs memory and time."""
    return {name: found for name, backend in _BACKENDS.items() if (found := _version(backend)) is not None}


def _version(backend: _Backend) -> str | None:
    if importlib.util.find_spec(backend.library) is None:
        return None
    for name in backend.distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "unknown"


def load(path: Path, pack: str, graph: GraphSpec, backend: str, options: EngineOptions) -> Engine:
    """Load one graph on a backend. Raises an ``EngineError``."""
    return adapter(backend).load(path, pack, graph, options)


def first_line(error: BaseException) -> str:
    """The first line of a foreign library's message: the rest is often a C++ stack."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
