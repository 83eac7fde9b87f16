"""Networks of factored convolutions, with their picture's height before time: the same result, sooner.

A convolution over time alone meets each pixel of a frame again in the next one. With time outermost, as such networks
are written, a whole frame of feature maps lies between the two, more than a core's cache holds, so every map is fetched
from memory once for each frame of the kernel. With height outermost, the rows of all frames lie side by side.
Nothing is computed differently: axes of activations and kernels are exchanged, once at each border of such a part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from engines.openvino_runtime import ops

_EXCHANGED = (0, 1, 3, 2, 4)
"""Batch, channel, time, height, width, with time and height exchanged; also undoes itself."""
_FOREIGN = ("GroupConvolution", "ConvolutionBackpropData", "MaxPool", "AvgPool", "Concat", "Pad")
_POINTWISE = ("Relu", "Clamp", "Sigmoid", "HSwish", "Add", "Multiply", "Subtract")


def put_height_first(model: Any) -> bool:
    """Exchange the axes in place, if there is a convolution over time alone to gain by it; whether it was done.

    A model is left as it is where kernels are no plain constants, as in quantised graphs, and where operations that
    are not known here stand between the convolutions: there would be many borders.
    """
    nodes = model.get_ordered_ops()
    convolutions = [node for node in nodes if _is(node, "Convolution")]
    if any(_is(node, kind) for node in nodes for kind in _FOREIGN):
        return False
    if not all(_constant(node.input_value(1)) for node in convolutions):
        return False
    if not any(_over_time_alone(node) for node in convolutions):
        return False
    part: dict[str, Any] = {}
    for node in nodes:
        if _is(node, "Convolution") or _goes_along(node, part):
            part[node.get_name()] = node
    for node in part.values():
        _enter(node, part)
    for node in part.values():
        _leave(node, part)
    for node in convolutions:
        _replace(node)
    model.validate_nodes_and_infer_types()
    return True


def _is(node: Any, kind: str) -> bool:
    return bool(node.get_type_name() == kind and node.get_output_partial_shape(0).rank == 5)


def _constant(value: Any) -> bool:
    return bool(value.get_node().get_type_name() == "Constant")


def _over_time_alone(node: Any) -> bool:
    time, height, width = list(node.input_value(1).get_shape())[2:]
    return bool(time > 1 and height == width == 1)


def _goes_along(node: Any, part: dict[str, Any]) -> bool:
    """Whether a node treats every number of a part's output alike."""
    if not any(_is(node, kind) for kind in _POINTWISE) or not all(map(_same_anywhere, node.input_values())):
        return False
    return any(value.get_node().get_name() in part for value in node.input_values())


def _same_anywhere(value: Any) -> bool:
    """Whether an input has all five axes, or is a constant without extent in time, height and width."""
    if not _constant(value):
        return bool(value.get_partial_shape().rank == 5)
    return all(size == 1 for size in list(value.get_shape())[-3:])


def _data_inputs(node: Any) -> Iterator[Any]:
    inputs = node.inputs()[:1] if node.get_type_name() == "Convolution" else node.inputs()
    return (port for port in inputs if not _constant(port.get_source_output()))


def _enter(node: Any, part: dict[str, Any]) -> None:
    for port in _data_inputs(node):
        source = port.get_source_output()
        if source.get_node().get_name() not in part:
            port.replace_source_output(_exchange(source))


def _leave(node: Any, part: dict[str, Any]) -> None:
    outside = [port for port in node.output(0).get_target_inputs() if port.get_node().get_name() not in part]
    if outside:
        back = _exchange(node.output(0))
        names = node.output(0).get_names()
        node.output(0).get_tensor().set_names(set())
        back.get_tensor().set_names(names)
        for port in outside:
            port.replace_source_output(back)


def _exchange(value: Any) -> Any:
    return ops.transpose(value, ops.constant(np.array(_EXCHANGED, np.int64))).output(0)


def _replace(node: Any) -> None:
    """The convolution with its kernel's axes exchanged."""
    kernel = node.input_value(1).get_node().get_data()
    given = node.get_attributes()
    exchanged = {name: _swapped(given[name]) for name in ("strides", "pads_begin", "pads_end", "dilations")}
    new = ops.convolution(
        node.input_value(0),
        ops.constant(np.ascontiguousarray(kernel.transpose(_EXCHANGED))),
        auto_pad=given["auto_pad"],
        **exchanged,
    )
    new.set_friendly_name(node.get_friendly_name())
    for port in node.output(0).get_target_inputs():
        port.replace_source_output(new.output(0))


def _swapped(sizes: Any) -> list[int]:
    time, height, width = sizes
    return [height, time, width]
