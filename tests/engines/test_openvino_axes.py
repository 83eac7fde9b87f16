"""Exchanged axes change nothing but the time that a network takes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openvino")

from engines.openvino_axes import put_height_first
from engines.openvino_runtime import ops, ov
from engines.types import Array

Triple = tuple[int, int, int]


def conv(x: Any, outputs: int, kernel: Triple, stride: Triple = (1, 1, 1), *, begin: Triple = (0, 0, 0)) -> Any:
    """A convolution with a bias; at the ends of the axes it is padded by half its kernel."""
    random = np.random.default_rng(outputs + sum(kernel))
    inputs = x.output(0).get_partial_shape()[1].get_length()
    weights = random.standard_normal((outputs, inputs, *kernel)).astype(np.float32)
    bias = ops.constant(random.standard_normal((1, outputs, 1, 1, 1)).astype(np.float32))
    out = ops.convolution(x, ops.constant(weights), stride, begin, [side // 2 for side in kernel], [1, 1, 1])
    return ops.add(out, bias)


def model(end: Any, x: Any) -> Any:
    return ov.Model([ops.result(end)], [x], "m")


def run(network: Any, frames: Array) -> Array:
    core = ov.Core()
    compiled = core.compile_model(network, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled.create_infer_request().infer([frames])[0])


def factored(batch: int) -> Any:
    """A residual block over time and space, strided in both, that ends in means over the picture."""
    x = ops.parameter([batch, 3, 6, 8, 10], np.float32)
    scaled = ops.multiply(x, ops.constant(np.float32(0.5)))
    stem = ops.relu(conv(scaled, 4, (1, 3, 5), (1, 2, 1), begin=(0, 1, 2)))
    block = ops.relu(conv(stem, 6, (1, 3, 3), begin=(0, 1, 0)))
    block = conv(block, 5, (3, 1, 1), (2, 1, 1), begin=(1, 0, 0))
    beside = conv(stem, 5, (1, 1, 1), (2, 1, 1))
    joined = ops.relu(ops.add(block, ops.slice(beside, [0], [9], [1], [4])))
    return model(ops.reduce_mean(joined, ops.constant(np.array([3, 4]))), x)


def test_a_factored_network_gives_the_same() -> None:
    frames = np.random.default_rng(0).standard_normal((2, 3, 6, 8, 10)).astype(np.float32)
    plain, exchanged = factored(2), factored(2)
    assert put_height_first(exchanged)
    kernels = [list(n.input_value(1).get_shape())[2:] for n in exchanged.get_ordered_ops() if _conv(n)]
    assert sorted(kernels) == sorted([[3, 1, 5], [3, 1, 3], [1, 3, 1], [1, 1, 1]])
    want = run(plain, frames)
    assert want.std() > 0.1
    np.testing.assert_allclose(run(exchanged, frames), want, rtol=1e-5, atol=1e-5)


def test_axes_are_exchanged_at_the_borders_only() -> None:
    x = ops.parameter([-1, 3, 6, 8, 8], np.float32)
    stem = ops.relu(conv(x, 4, (1, 3, 3), begin=(0, 1, 1)))
    block = ops.relu(conv(stem, 4, (3, 1, 1), begin=(1, 0, 0)))
    network = model(ops.add(block, stem), x)
    assert put_height_first(network)
    assert Counter(node.get_type_name() for node in network.get_ordered_ops())["Transpose"] == 2


def test_outputs_keep_their_names() -> None:
    x = ops.parameter([1, 3, 6, 8, 8], np.float32)
    block = ops.relu(conv(x, 4, (3, 1, 1), begin=(1, 0, 0)))
    block.output(0).get_tensor().set_names({"map"})
    network = model(block, x)
    assert put_height_first(network)
    assert network.output("map").get_names() == {"map"}


def _pooled(x: Any) -> Any:
    pool = ops.max_pool(conv(x, 4, (3, 1, 1)), [1, 2, 2], [1, 1, 1], [0, 0, 0], [0, 0, 0], [1, 2, 2])
    return pool.output(0)


def _quantised(x: Any) -> Any:
    weights = ops.convert(ops.constant(np.ones((4, 3, 3, 1, 1), np.int8)), np.float32)
    return ops.convolution(x, weights, [1, 1, 1], [0, 0, 0], [0, 0, 0], [1, 1, 1])


@pytest.mark.parametrize(
    "network", [lambda x: conv(x, 4, (3, 3, 3)), _pooled, _quantised], ids=["full", "pool", "int8"]
)
def test_what_would_not_gain_stays(network: Any) -> None:
    x = ops.parameter([1, 3, 6, 8, 8], np.float32)
    made = model(network(x), x)
    before = [node.get_type_name() for node in made.get_ordered_ops()]
    assert not put_height_first(made)
    assert [node.get_type_name() for node in made.get_ordered_ops()] == before


def _conv(node: Any) -> bool:
    return bool(node.get_type_name() == "Convolution")
