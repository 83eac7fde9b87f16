"""Where stateful graphs' states lie between two hops: one row for each stream, in arrays that are filled again and
again.

The arrays double as streams come, up to a limit; beyond it the stream that was not heard of for longest loses its
row, and must begin anew. Nothing counts hops or frames: a store works for as long as its process.
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

FIRST_ROWS = 4
"""Rows at first."""

Mark = TypeVar("Mark")


class StateStore(Generic[Mark]):
    """Rows of states by stream, each with a mark that says how far the stream has come.

    May be used by several threads at once; a stream by one of them at a time. ``states`` are the tensors as the graph
    takes them, the batch first; ``limit`` is the most rows.
    """

    def __init__(self, states: Sequence[TensorSpec], limit: int) -> None:
        if limit < 1:
            raise ValueError(f"a store of {limit} rows holds no state")
        self._limit = limit
        self._sizes = {state.name: tuple(int(size) for size in state.shape[1:]) for state in states}
        self._dtypes = {state.name: NUMPY_DTYPES[state.dtype] for state in states}
        self._arrays = {name: self._empty(name, 0) for name in self._sizes}
        self._capacity = 0
        self._free: list[int] = []
        self._rows: OrderedDict[str, tuple[int, Mark]] = OrderedDict()
        """Row and mark by stream, the one used longest ago first."""
        self._held: set[str] = set()
        """Streams whose rows are being read."""
        self._lock = threading.Lock()
        self.evicted = 0
        """Times that a stream lost its row to another, or found none."""

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Memory of all rows, used or not."""
        return sum(array.nbytes for array in self._arrays.values())

    def gather(
        self, streams: Sequence[str], into: Mapping[str, Array] | None = None
    ) -> tuple[list[Mark | None], dict[str, Array]]:
        """Marks of the streams, and their states by input name, ``[streams, ...]``, which are not to be changed.

        A stream without a row has no mark and zeros, which are the empty past. Of one stream alone the states are its
        row, which it keeps until ``release``; of several they are copies, in the first rows of ``into`` (see
        ``buffers``) where it is given.
        """
        with self._lock:
            found = [self._rows.get(stream) for stream in streams]
            for stream, row in zip(streams, found, strict=True):
                if row is not None:
                    self._rows.move_to_end(stream)
            marks = [None if row is None else row[1] for row in found]
            if len(found) == 1 and found[0] is not None:
                self._held.update(streams)
                at = found[0][0]
                return marks, {name: array[at : at + 1] for name, array in self._arrays.items()}
            states = {name: array[: len(streams)] for name, array in (into or self.buffers(len(streams))).items()}
            for name, array in self._arrays.items():
                for place, row in enumerate(found):
                    states[name][place] = 0 if row is None else array[row[0]]
        return marks, states

    def release(self, streams: Sequence[str]) -> None:
        """What ``gather`` gave is used no more; nothing happens where it gave copies."""
        with self._lock:
            self._held.difference_update(streams)

    def buffers(self, streams: int) -> dict[str, Array]:
        """Room for the states of so many streams: large arrays are better used again than made anew."""
        return {name: self._empty(name, streams) for name in self._sizes}

    def put(self, streams: Sequence[str], marks: Sequence[Mark], states: Tensors) -> None:
        """Keep states (by input name, ``[streams, ...]``) and marks; each stream is named once.

        Where there is no room for all of them, those named first are not kept.
        """
        with self._lock:
            for stream in streams:
                if stream in self._rows:
                    self._rows.move_to_end(stream)
            for place in reversed(range(len(streams))):
                row = self._row_for(streams[place], marks[place], streams[place:])
                if row is None:
                    self.evicted += 1
                    continue
                for name, array in self._arrays.items():
                    array[row] = states[name][place]

    def forget(self, stream: str) -> None:
        """Give a stream's row back; nothing happens where there is none."""
        with self._lock:
            self._drop(stream)

    def _drop(self, stream: str) -> None:
        if (found := self._rows.pop(stream, None)) is not None:
            self._free.append(found[0])

    def _row_for(self, stream: str, mark: Mark, stay: Sequence[str]) -> int | None:
        """Give a stream a row; ``None`` where all belong to streams that ``stay`` or whose rows are being read."""
        found = self._rows.pop(stream, None)
        if found is None and not self._free and self._capacity < self._limit:
            self._grow()
        if found is not None:
            row = found[0]
        elif self._free:
            row = self._free.pop()
        else:
            leaves = next((other for other in self._rows if other not in stay and other not in self._held), None)
            if leaves is None:
                return None
            row, _ = self._rows.pop(leaves)
            self.evicted += 1
        self._rows[stream] = (row, mark)
        return row

    def _grow(self) -> None:
        capacity = min(self._limit, max(FIRST_ROWS, 2 * self._capacity))
        for name, array in self._arrays.items():
            self._arrays[name] = self._empty(name, capacity)
            self._arrays[name][: self._capacity] = array
        self._free += range(capacity - 1, self._capacity - 1, -1)
        self._capacity = capacity

    def _empty(self, name: str, rows: int) -> Array:
        return np.zeros((rows, *self._sizes[name]), self._dtypes[name])


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
