"""What every backend looks like to the runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engines.manifest import TensorSpec

Array = NDArray[Any]
Tensors = Mapping[str, Array]
"""Tensors by name. On ``onnxruntime``, ``tensorrt`` and ``torch`` an input may also be a tensor of torch on the
engine's device: it is taken from there, without a way through host memory."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Identity and interface of a loaded engine."""

    pack: str
    graph: str
    backend: str
    """``onnxruntime``, ``openvino``, ``tensorrt`` or ``torch``."""
    device: str
    """What the backend really runs on, as it reports it (``cpu``, ``cuda:0``)."""
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: frozenset[str] = frozenset()
    """Outputs that are only handed on to the next hop."""


class Engine(Protocol):
    """A loaded graph. Synchronous; one thread at a time owns it. The batch is the first axis of every tensor."""

    @property
    def spec(self) -> EngineSpec:
        """Identity and interface."""
        ...

    def warmup(self, batch_sizes: Sequence[int]) -> None:
        """Run zeros of each batch size, so that the first real batch meets no lazy set-up."""
        ...

    def infer(self, inputs: Tensors) -> dict[str, Array]:
        """Run one batch. Raises ``InferenceError``."""
        ...

    def close(self) -> None:
        """Free the engine; idempotent."""
        ...


NUMPY_DTYPES: dict[str, type[np.generic]] = {
    "uint8": np.uint8,
    "int64": np.int64,
    "float32": np.float32,
    "float16": np.float16,
}
"""numpy types of the dtype names of ``TensorSpec``."""
