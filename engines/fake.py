"""An engine without a network, for tests: its outputs follow from the inputs by a rule you can state.

It checks inputs and outputs like a real one, and can be slow or fail when told to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from engines.checks import check_inputs, check_outputs, zeros
from engines.errors import InferenceError
from engines.manifest import GraphSpec, Manifest
from engines.open import LoadedPack
from engines.types import NUMPY_DTYPES, Array, EngineSpec, Tensors

Rule = Callable[[Tensors], Mapping[str, Array]]
"""Inputs to outputs, the batch first in each."""


def mean_rule(graph: GraphSpec) -> Rule:
    """Every element of an item's float outputs is the mean of that item's inputs (uint8 counts as 0..1);
    integer outputs are 1 where that mean is over a half, else 0."""

    def rule(inputs: Tensors) -> dict[str, Array]:
        level = np.mean([_item_means(array) for array in inputs.values()], axis=0)
        return {tensor.name: _filled(tensor.shape, tensor.dtype, level) for tensor in graph.outputs}

    return rule


def _item_means(array: Array) -> Array:
    scale = 255 if array.dtype == np.uint8 else 1
    means: Array = array.reshape(len(array), -1).mean(axis=1, dtype=np.float64) / scale
    return means


def _filled(shape: tuple[int | str, ...], dtype: str, level: Array) -> Array:
    values = level > 0.5 if dtype in ("uint8", "int64") else level
    rest = [size if isinstance(size, int) else 1 for size in shape[1:]]
    out: Array = np.broadcast_to(values.reshape(-1, *[1] * len(rest)), (len(level), *rest)).astype(NUMPY_DTYPES[dtype])
    return out


class FakeEngine:
    """An ``Engine`` that applies a rule."""

    def __init__(
        self,
        pack: str,
        graph: GraphSpec,
        rule: Rule | None = None,
        *,
        latency_s: float = 0.0,
        sleep: Callable[[float], None] | None = None,
        fail_on: Collection[int] = (),
    ) -> None:
        """``latency_s`` is handed to ``sleep`` at each batch; batches numbered in ``fail_on`` (from 0, warm-up
        not counted) raise ``InferenceError``."""
        self._spec = EngineSpec(pack, graph.name, "fake", "cpu", "fp32", graph.inputs, graph.outputs)
        self._rule = rule or mean_rule(graph)
        self._latency_s = latency_s
        self._sleep = sleep
        self._fail_on = frozenset(fail_on)
        self._closed = False
        self.batches = 0
        """Batches inferred or failed so far."""

    @property
    def spec(self) -> EngineSpec:
        """See ``Engine``."""
        return self._spec

    def warmup(self, batch_sizes: Sequence[int]) -> None:
        """See ``Engine``."""
        for batch in batch_sizes:
            self._rule(zeros(self._spec, batch))

    def infer(self, inputs: Tensors) -> dict[str, Array]:
        """See ``Engine``."""
        where = f"pack {self._spec.pack}: graph {self._spec.graph}"
        if self._closed:
            raise InferenceError(f"{where} is closed")
        check_inputs(self._spec, inputs)
        number = self.batches
        self.batches += 1
        if self._sleep is not None:
            self._sleep(self._latency_s)
        if number in self._fail_on:
            raise InferenceError(f"{where} failed on batch {number}, as it was told to")
        outputs = dict(self._rule(inputs))
        check_outputs(self._spec, outputs)
        return outputs

    def close(self) -> None:
        """See ``Engine``."""
        self._closed = True


def fake_pack(
    manifest: Manifest,
    rules: Mapping[str, Rule] = MappingProxyType({}),
    *,
    latency_s: float = 0.0,
    sleep: Callable[[float], None] | None = None,
    fail_on: Mapping[str, Collection[int]] = MappingProxyType({}),
) -> LoadedPack:
    """A loaded pack of fake engines for any manifest.

    ``rules`` by graph name (``engines.tinypack.REFERENCES`` fits the tiny pack), else ``mean_rule``;
    ``fail_on`` gives batch numbers by graph name.
    """
    engines = {
        graph.name: FakeEngine(
            manifest.name,
            graph,
            rules.get(graph.name),
            latency_s=latency_s,
            sleep=sleep,
            fail_on=fail_on.get(graph.name, ()),
        )
        for graph in manifest.graphs
    }
    return LoadedPack(Path(), manifest, manifest.sha256(), "fake", "fp32", MappingProxyType(engines))
