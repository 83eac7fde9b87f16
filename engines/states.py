"""Where stateful graphs' states lie between two hops: for each stream the arrays that its last hop gave, not copied.

Beyond a number of streams the one that was not heard of for longest loses its states, and must begin anew. Nothing
counts hops or frames: a store works for as long as its process.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from math import prod
from typing import Generic, TypeVar

import numpy as np

from engines.manifest import Branch, Manifest, TensorSpec
from engines.types import NUMPY_DTYPES, Array, Tensors

Mark = TypeVar("Mark")


class StateStore(Generic[Mark]):
    """States by stream, each with a mark that says how far the stream has come.

    May be used by several threads at once; a stream by one of them at a time. ``states`` are the tensors as the graph
    takes them, the batch first; ``limit`` is the most streams. Arrays are handed in and out as they are, and nobody may
    write to one.
    """

    def __init__(self, states: Sequence[TensorSpec], limit: int) -> None:
        if limit < 1:
            raise ValueError(f"a store for {limit} streams holds no state")
        self._limit = limit
        self._row_bytes = row_bytes(states)
        self._sizes = {state.name: tuple(int(size) for size in state.shape[1:]) for state in states}
        self._dtypes = {state.name: NUMPY_DTYPES[state.dtype] for state in states}
        self._kept: OrderedDict[str, tuple[Mark, dict[str, Array]]] = OrderedDict()
        """Mark and states ``[1, ...]`` by stream, the one used longest ago first."""
        self._lock = threading.Lock()
        self.evicted = 0
        """Times that a stream lost its states to another, or found no room."""

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Memory of all states that are kept."""
        return len(self._kept) * self._row_bytes

    def gather(
        self, streams: Sequence[str], into: Mapping[str, Array] | None = None
    ) -> tuple[list[Mark | None], dict[str, Array]]:
        """Marks of the streams, and their states by input name, ``[streams, ...]``.

        A stream without states has no mark and zeros, which are the empty past. One stream's states are given as they
        are kept; those of several are copies, in the first rows of ``into`` (see ``buffers``) where it is given.
        """
        with self._lock:
            found = [self._kept.get(stream) for stream in streams]
            for stream, kept in zip(streams, found, strict=True):
                if kept is not None:
                    self._kept.move_to_end(stream)
        marks = [None if kept is None else kept[0] for kept in found]
        if len(found) == 1 and found[0] is not None:
            return marks, dict(found[0][1])
        states = {name: array[: len(streams)] for name, array in (into or self.buffers(len(streams))).items()}
        for place, kept in enumerate(found):
            for name, array in states.items():
                array[place] = 0 if kept is None else kept[1][name][0]
        return marks, states

    def buffers(self, streams: int) -> dict[str, Array]:
        """Room for the states of so many streams: large arrays are better used again than made anew."""
        return {name: np.zeros((streams, *size), self._dtypes[name]) for name, size in self._sizes.items()}

    def put(self, streams: Sequence[str], marks: Sequence[Mark], states: Tensors) -> None:
        """Keep states (by input name, ``[streams, ...]``) and marks; each stream is named once.

        One stream's arrays are kept themselves: to copy megabytes at each hop costs. Rows of larger arrays are copied,
        or a stream that stays away would keep those of others. Where there is no room for all, those named first are
        not kept.
        """
        own = [{name: _row(states[name], place) for name in self._sizes} for place in range(len(streams))]
        with self._lock:
            for stream in streams:
                if stream in self._kept:
                    self._kept.move_to_end(stream)
            for place in reversed(range(len(streams))):
                if self._has_room(streams[place:]):
                    self._kept[streams[place]] = (marks[place], own[place])
                    self._kept.move_to_end(streams[place])

    def forget(self, stream: str) -> None:
        """Drop a stream's states; nothing happens where there are none."""
        with self._lock:
            self._kept.pop(stream, None)

    def _has_room(self, streams: Sequence[str]) -> bool:
        """Make room for the first of some streams that are put together; false where the others take all there is."""
        if streams[0] in self._kept or len(self._kept) < self._limit:
            return True
        self.evicted += 1
        leaves = next((other for other in self._kept if other not in streams), None)
        if leaves is not None:
            del self._kept[leaves]
        return leaves is not None


def _row(array: Array, place: int) -> Array:
    """One row ``[1, ...]`` of an array; it keeps no more memory than its own."""
    part = isinstance(array.base, np.ndarray) or len(array) > 1
    return array[place : place + 1].copy() if part else array


def state_tensors(branch: Branch, inputs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The states of a stateful branch, among the inputs of its graph."""
    known = {tensor.name: tensor for tensor in inputs}
    return [known[state.input] for state in branch.states]


def state_outputs(manifest: Manifest, graph: str) -> frozenset[str]:
    """Outputs of a graph that hold the next states."""
    return frozenset(state.output for branch in manifest.branches if branch.graph == graph for state in branch.states)


def row_bytes(states: Sequence[TensorSpec]) -> int:
    """Memory of one stream."""
    return sum(
        prod(int(size) for size in state.shape[1:]) * np.dtype(NUMPY_DTYPES[state.dtype]).itemsize for state in states
    )


def handed_on(branch: Branch, outputs: Mapping[str, Array]) -> dict[str, Array]:
    """The inputs of the next hop among a graph's outputs."""
    return {state.input: outputs[state.output] for state in branch.states}
