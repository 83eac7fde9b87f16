"""Runs large batches in small parts, where that is faster.

On a CPU the activations of a convolutional network leave the caches as the batch grows: two frames at a time
take less time per frame, and less memory, than sixteen (docs/decisions/0002-cpu-backends.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from engines.checks import check_inputs
from engines.manifest import GraphSpec
from engines.types import NUMPY_DTYPES, Array, Engine, EngineSpec, Tensors

PART_BYTES = 384 * 1024
"""Input bytes that one part may hold: two pairs of 160x160 frames, one 320x240 frame."""


MOST_WARM = 16
"""Largest part whose every size is run at warm-up."""


def best_part(graph: GraphSpec) -> int:
    """Batch items of a graph that are best run at once on a CPU; at least 1."""
    item = sum(
        prod(size for size in tensor.shape[1:] if isinstance(size, int)) * np.dtype(NUMPY_DTYPES[tensor.dtype]).itemsize
        for tensor in graph.inputs
    )
    return max(1, PART_BYTES // max(1, item))


def in_parts(engine: Engine, graph: GraphSpec, device: str) -> Engine:
    """The engine, splitting batches where that is faster (on a CPU) or needed (where an engine has a largest batch)."""
    if isinstance(engine, SplitEngine):
        return engine
    if device == "cpu":
        return SplitEngine(engine, best_part(graph))
    return SplitEngine(engine, graph.batch.largest) if engine.spec.backend == "tensorrt" else engine


class SplitEngine:
    """An engine that hands on at most ``part`` batch items at once."""

    def __init__(self, engine: Engine, part: int) -> None:
        self._engine = engine
        self._part = part

    @property
    def spec(self) -> EngineSpec:
        """See ``Engine``."""
        return self._engine.spec

    @property
    def part(self) -> int:
        """Most batch items that are run at once."""
        return self._part

    def warmup(self, batch_sizes: Sequence[int]) -> None:
        """See ``Engine``; where parts are few, every size that one can have is run, so no later batch meets a new
        one."""
        if self._part <= MOST_WARM:
            self._engine.warmup(range(1, min(self._part, max(batch_sizes, default=0)) + 1))
        else:
            self._engine.warmup(sorted({min(size, self._part) for size in batch_sizes}))

    def infer(self, inputs: Tensors) -> dict[str, Array]:
        """See ``Engine``."""
        first = next(iter(inputs.values()), None)
        if first is None or first.ndim == 0 or first.shape[0] <= self._part:
            return self._engine.infer(inputs)
        # Before anything is cut: parts could hide that two tensors differ in their batch.
        check_inputs(self.spec, inputs)
        parts = [
            self._engine.infer({name: array[start : start + self._part] for name, array in inputs.items()})
            for start in range(0, first.shape[0], self._part)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def close(self) -> None:
        """See ``Engine``."""
        self._engine.close()
