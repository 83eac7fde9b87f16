"""TensorRT's Python module, whichever of its two forms is installed, and what it has to say.

``tensorrt`` and ``tensorrt_rtx`` (TensorRT for RTX) share one API. The packages of the latter that pip can always
install bring it as ``tensorrt_rtx_bindings``; ``tensorrt_rtx`` only hands that on.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from engines.errors import BackendUnavailable, EngineError, GraphLoadError

LIBRARIES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
_log = logging.getLogger(__name__)
_lock = threading.Lock()
_NO_DRIVER = ("driver version is insufficient", "no cuda-capable device", "cudaerror 35", "cudaerror 100")
_NO_MEMORY = ("out of memory", "outofmemory", "mem_alloc", "cudaerror 2:")


def _import() -> ModuleType:
    """The first form that is there. Raises ``ImportError``."""
    for name in LIBRARIES:
        if importlib.util.find_spec(name) is not None:
            try:
                return importlib.import_module(name)
            except OSError as error:  # A shared library that it needs is missing.
                raise ImportError(f"{name} cannot load its libraries ({error})") from error
    raise ImportError(f"none of {', '.join(LIBRARIES)} is installed")


trt = _import()
RTX = trt.__name__ != "tensorrt"
"""Whether it is TensorRT for RTX: builds without a GPU, engines for any RTX GPU, no timing cache."""


def version() -> str:
    """Form and version: an engine of one is none for the other."""
    return f"{'rtx-' if RTX else ''}{trt.__version__}"


class _Messages(trt.ILogger):  # type: ignore[misc, name-defined]
    """Keeps error lines: the API returns ``None`` or false, and says why only here."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: object, message: str) -> None:
        """Called by TensorRT, from any thread."""
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.errors.append(message)
        _log.debug("tensorrt: %s", message)


LOGGER = _Messages()
"""The one logger: TensorRT keeps the first that it is given."""


@contextmanager
def collected() -> Iterator[list[str]]:
    """The error lines of what is called inside; one thread at a time, so that none hears of another's."""
    with _lock:
        LOGGER.errors = []
        yield LOGGER.errors


def error_from(where: str, did: str, errors: list[str], remedy: str) -> EngineError:
    """What TensorRT's own lines mean: no driver, no memory, or a graph that it refuses."""
    text = " ".join(errors).lower()
    if any(sign in text for sign in _NO_DRIVER):
        return no_gpu(where, "no NVIDIA driver that is new enough")
    if any(sign in text for sign in _NO_MEMORY):
        return GraphLoadError(
            f"{where}: tensorrt ran out of memory when it {did}; make the graph's largest batch smaller"
        )
    return GraphLoadError(f"{where}: tensorrt {version()} failed when it {did}: {telling_line(errors)}; {remedy}")


def no_gpu(where: str, missing: str) -> BackendUnavailable:
    """What to say where nothing can run."""
    return BackendUnavailable(
        f"{where}: tensorrt needs an NVIDIA GPU and its driver to run an engine, and there is {missing}; "
        "choose device cpu with backend onnxruntime or openvino"
    )


def telling_line(errors: list[str]) -> str:
    """The first error as one line, without the place in TensorRT's source."""
    first = " ".join((errors or ["no reason given"])[0].split())
    return first.split(" (In ")[0].split(". In ")[0][:300].rstrip(".")
