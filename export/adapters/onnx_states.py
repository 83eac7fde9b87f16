"""States of a ready ONNX file: what its description says of them, checked against the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from engines.types import Array
from export.adapters.describe import Description
from export.build import ExportError

_TAKEN: dict[int, int] = {
    TensorProto.FLOAT: TensorProto.FLOAT,
    TensorProto.FLOAT16: TensorProto.FLOAT16,
    TensorProto.UINT8: TensorProto.UINT8,
    TensorProto.INT64: TensorProto.INT64,
    TensorProto.INT32: TensorProto.INT64,
    TensorProto.BOOL: TensorProto.UINT8,
}
"""What a pack keeps a state as, by what the file has; the two are cast to each other."""


@dataclass(frozen=True, slots=True)
class FileState:
    """A tensor that the file takes and gives, and its names in the pack."""

    input: str
    """In the file."""
    output: str
    """In the file."""
    taken: str
    """In the pack."""
    given: str
    """In the pack."""
    element: int
    """Of the file's tensors."""
    shape: tuple[int, ...]
    """Without the batch."""

    @property
    def kept(self) -> int:
        """The pack's element type."""
        return _TAKEN[self.element]

    def zeros(self, batch: int) -> Array:
        """The empty past, as the pack has it."""
        return np.zeros((batch, *self.shape), helper.tensor_dtype_to_np_dtype(self.kept))

    def fed(self, value: Array) -> Array:
        """The pack's tensor as the file takes it."""
        return value.astype(helper.tensor_dtype_to_np_dtype(self.element))

    def read(self, value: Array) -> Array:
        """The file's tensor as the pack keeps it."""
        return value.astype(helper.tensor_dtype_to_np_dtype(self.kept))


def file_states(path: Path, model: onnx.ModelProto, description: Description) -> tuple[FileState, ...]:
    """The states that a description names, in its order; ``model`` with the batch as it is in the file.

    Raises ``ExportError`` when the file has no such tensors, or they cannot be one state.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = {port.name: port for port in model.graph.input if port.name not in weights}
    outputs = {port.name: port for port in model.graph.output}
    if twice := [name for name, times in Counter(description.states.values()).items() if times > 1]:
        raise ExportError(f"{path}: output {twice[0]} is named for two states; give each state an output of its own")
    found = []
    for pair, names in zip(description.states.items(), description.states_in_pack, strict=True):
        for name, kind, there in ((pair[0], "input", inputs), (pair[1], "output", outputs)):
            if name not in there:
                raise ExportError(f"{path}: states names {name}, which is no {kind}; the file has {', '.join(there)}")
        element, shape = _checked(f"{path}: state {pair[0]}", inputs[pair[0]], outputs[pair[1]])
        found.append(FileState(*pair, names.input, names.output, element, shape))
    return tuple(found)


def _checked(where: str, taken: onnx.ValueInfoProto, given: onnx.ValueInfoProto) -> tuple[int, tuple[int, ...]]:
    """Element type and shape without the batch of a state."""
    tensor, back = taken.type.tensor_type, given.type.tensor_type
    if tensor.elem_type != back.elem_type:
        raise ExportError(
            f"{where} is {_type(tensor.elem_type)}, its output {given.name} is {_type(back.elem_type)}; "
            "correct states, or export it with one type"
        )
    if tensor.elem_type not in _TAKEN:
        there = ", ".join(_type(element) for element in _TAKEN)
        raise ExportError(f"{where} is {_type(tensor.elem_type)}; export it with one of {there}")
    if not tensor.HasField("shape"):
        raise ExportError(f"{where} has no shape in the file; export it with fixed sizes")
    first, *rest = [dim.dim_value or dim.dim_param or "?" for dim in tensor.shape.dim] or [0]
    shown = f"[{', '.join(map(str, (first, *rest)))}]" if tensor.shape.dim else "[]"
    if isinstance(first, int) and first != 1:
        raise ExportError(f"{where} is {shown}; its first axis must be the batch: export it so, free or 1")
    sizes = tuple(size for size in rest if isinstance(size, int))
    if len(sizes) != len(rest):
        raise ExportError(f"{where} is {shown}; all its axes but the batch must be of fixed size: export it so")
    return tensor.elem_type, sizes


def _type(element: int) -> str:
    return str(TensorProto.DataType.Name(element)).lower()


def check_given(where: str, states: tuple[FileState, ...], outputs: Mapping[str, Array], batch: int) -> None:
    """Raise ``ExportError`` unless each state came out of the file as large as it went in."""
    for state in states:
        have = outputs[state.given].shape
        if have != (batch, *state.shape):
            raise ExportError(
                f"{where}: state {state.input} is {[batch, *state.shape]}, its output {state.output} comes out as "
                f"{list(have)}; correct states"
            )
