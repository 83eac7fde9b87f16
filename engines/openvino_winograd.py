"""Winograd's minimal filtering along one axis of 3D convolutions: half the multiplications, the same result but for
rounding.

Four neighbouring outputs of a kernel of three take twelve products if each is computed for itself. As polynomials they
are known from their values at six points, so six products do (Winograd 1980; Lavin and Gray 2016, "Fast Algorithms for
Convolutional Neural Networks", F(4, 3)). The outermost axis is taken: there a slice of the map is a block of memory,
and a product is an ordinary convolution over the other two axes. Slices are made, multiplied and summed up four at a
time, so what lies in between stays in the caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from engines.openvino_runtime import ops, passes
from engines.types import Array

_OUT, _TAPS = 4, 3
_AXIS = 2
"""The outermost of the three axes of a map, after batch and channel."""
# Evaluated at 0, 1, -1, 2, -2 and infinity: rows of inputs, of the kernel, and of outputs.
_INPUTS = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_KERNEL = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
_OUTPUTS = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])
_POINTS = len(_INPUTS)
_WORTH = 35
"""Multiplications that must be saved for each number that is moved, as measured (docs/engines.md)."""
_MOST_SLICES = 128
"""Each costs about 7 ms to compile and 0.35 MB."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """A convolution that can be rewritten."""

    node: Any
    """In the model."""
    kernel: Array
    """``[O, I, 3, h, w]``."""
    size: int
    """Slices of its input and of its output."""

    @property
    def products(self) -> int:
        """Slices that are multiplied; the point at infinity serves only the last output of four."""
        whole, rest = divmod(self.size, _OUT)
        return _POINTS * whole + (_POINTS - 1) * (rest > 0)

    def gains(self) -> bool:
        """Whether the multiplications saved outweigh the numbers moved, in few enough parts."""
        if self.size > _MOST_SLICES:
            return False
        outputs, inputs, _, *window = self.kernel.shape
        area = prod(_lengths(self.node.output(0))[_AXIS + 1 :])
        weights = outputs * inputs * prod(window)
        # Slices beyond the ends are skipped by an ordinary convolution too.
        saved = _TAPS * self.size - 2 - self.products
        moved = 5 * self.size * area * (inputs + outputs) + self.products * weights
        return bool(saved * area * weights > _WORTH * moved)


def save_multiplications(model: Any) -> int:
    """Rewrite in place the convolutions that gain by it; how many they were.

    Convolutions of constant fp32 kernels with three taps along the outermost axis, which step by one there and keep
    its size; bias and ReLU that follow are taken along. For fp32 arithmetic only: at lower precisions the sums lose
    too much.
    """
    _fold_shapes(model)
    layers = [layer for layer in map(_layer, model.get_ordered_ops()) if layer is not None and layer.gains()]
    for layer in layers:
        _rewrite(layer)
    if layers:
        model.validate_nodes_and_infer_types()
    return len(layers)


def _fold_shapes(model: Any) -> None:
    """Compute what follows from shapes alone; as nodes, such as the form of a bias, it would depend on the layer."""
    manager = passes.Manager()
    manager.register_pass(passes.ConstantFolding())
    manager.run_passes(model)


def _layer(node: Any) -> _Layer | None:
    if node.get_type_name() != "Convolution" or node.get_output_partial_shape(0).rank != 5:
        return None
    given = node.get_attributes()
    if not _constant(node.input_value(1)) or given["auto_pad"] not in ("explicit", "notset"):
        return None
    along = [given[name][0] for name in ("strides", "dilations", "pads_begin", "pads_end")]
    sizes = _lengths(node.input_value(0)), _lengths(node.output(0))
    if along != [1, 1, 1, 1] or None in sizes[0] or None in sizes[1]:
        return None
    kernel = node.input_value(1).get_node().get_data()
    if kernel.dtype != np.float32 or kernel.shape[_AXIS] != _TAPS:
        return None
    return _Layer(node, kernel, sizes[1][_AXIS])


def _constant(value: Any) -> bool:
    return bool(value.get_node().get_type_name() == "Constant")


def _lengths(value: Any) -> list[Any]:
    """Lengths of a tensor's axes, None where free; the batch, which may be free, counts as one."""
    return [1, *(size.get_length() if size.is_static else None for size in list(value.get_partial_shape())[1:])]


def _rewrite(layer: _Layer) -> None:
    end, following = _following(layer.node)
    slices = ops.split(layer.node.input_value(0), ops.constant(np.int64(_AXIS)), layer.size).outputs()
    kernels = [ops.constant(kernel) for kernel in _transformed(layer.kernel)]
    results = []
    for begin in range(-1, layer.size - 1, _OUT):
        tile = [slices[n] if 0 <= n < layer.size else None for n in range(begin, begin + _POINTS)]
        products = [
            _convolution(layer.node, _sum(row, tile), kernel) for row, kernel in zip(_INPUTS, kernels, strict=True)
        ]
        for row in _OUTPUTS[: layer.size - begin - 1]:
            results.append(_after(_sum(row, products), layer.node, following))
    whole = ops.concat(results, _AXIS)
    whole.set_friendly_name(end.get_friendly_name())
    whole.output(0).get_tensor().set_names(end.output(0).get_names())
    for node in (layer.node, *following):
        # Those within ask for the shape, which is the same everywhere here.
        for port in node.output(0).get_target_inputs():
            if node is end or port.get_node().get_type_name() == "ShapeOf":
                port.replace_source_output(whole.output(0))


def _following(node: Any) -> tuple[Any, list[Any]]:
    """What comes after a convolution and treats every slice alike, in order; and the last of it."""
    following: list[Any] = []
    while True:
        users = [port.get_node() for port in node.output(0).get_target_inputs()]
        users = [user for user in users if user.get_type_name() != "ShapeOf"]
        if len(users) != 1 or not _alike(users[0], node):
            return node, following
        node = users[0]
        following.append(node)


def _alike(user: Any, node: Any) -> bool:
    if user.get_type_name() == "Relu":
        return True
    if user.get_type_name() != "Add" or user.get_output_partial_shape(0) != node.get_output_partial_shape(0):
        return False
    others = _others(user, node)
    if len(others) != 1 or not _constant(others[0]):
        return False
    shape = list(others[0].get_shape())
    return len(shape) == 5 and shape[_AXIS] == 1


def _others(user: Any, node: Any) -> list[Any]:
    return [value for value in user.input_values() if value.get_node().get_name() != node.get_name()]


def _after(value: Any, node: Any, following: Sequence[Any]) -> Any:
    """A slice of the convolution's output, taken through what follows it."""
    for user in following:
        value = ops.relu(value) if user.get_type_name() == "Relu" else ops.add(value, *_others(user, node))
        node = user
    return value


def _convolution(node: Any, value: Any, kernel: Any) -> Any:
    given = node.get_attributes()
    begin, end = ([0, *given[name][1:]] for name in ("pads_begin", "pads_end"))
    return ops.convolution(value, kernel, given["strides"], begin, end, given["dilations"])


def _sum(weights: Array, values: Sequence[Any]) -> Any:
    """The sum of weighted tensors; those that are None are zeros."""
    total = None
    for weight, value in zip(weights, values, strict=True):
        if weight == 0 or value is None:
            continue
        part = value if weight == 1 else ops.multiply(value, ops.constant(np.float32(weight)))
        total = part if total is None else ops.add(total, part)
    return total


def _transformed(kernel: Array) -> Iterator[Array]:
    """A kernel of one slice, ``[O, I, 1, h, w]``, for each point."""
    for row in _KERNEL:
        yield np.einsum("t,oithw->oihw", row, kernel.astype(np.float64)).astype(np.float32)[:, :, None]
