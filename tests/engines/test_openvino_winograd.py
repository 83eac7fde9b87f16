"""Fewer multiplications give the same numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openvino")

from engines import openvino_winograd
from engines.backends import EngineOptions
from engines.manifest import GraphSpec, TensorSpec
from engines.openvino_engine import compile_model
from engines.openvino_runtime import ops, ov
from engines.openvino_winograd import save_multiplications
from engines.types import Array

Triple = tuple[int, int, int]
ONES = (1, 1, 1)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers too small to be worth it are rewritten too."""
    monkeypatch.setattr(openvino_winograd, "_WORTH", 0)


def weights(outputs: int, inputs: int, kernel: Triple = (3, 3, 3)) -> Any:
    random = np.random.default_rng(outputs)
    return ops.constant(random.standard_normal((outputs, inputs, *kernel)).astype(np.float32) / inputs)


def conv(x: Any, outputs: int = 4, **changes: Any) -> Any:
    inputs = x.output(0).get_partial_shape()[1].get_length()
    given = {"strides": ONES, "pads_begin": ONES, "pads_end": ONES, "dilations": ONES} | changes
    return ops.convolution(x, given.pop("kernel", weights(outputs, inputs)), **given)


def bias(outputs: int) -> Any:
    values = np.random.default_rng(outputs).standard_normal((1, outputs, 1, 1, 1))
    return ops.constant(values.astype(np.float32))


def frames(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def run(network: Any, x: Array) -> list[Array]:
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(network, "CPU", settings)
    return [np.array(value) for value in compiled.create_infer_request().infer([x]).values()]


def kinds(network: Any) -> Counter[str]:
    return Counter(node.get_type_name() for node in network.get_ordered_ops())


def same(build: Callable[[Any], list[Any]], shape: list[int], *, batch: int = 1) -> Any:
    """Build a network twice, rewrite one and compare; the rewritten one."""

    def network() -> Any:
        x = ops.parameter(shape, np.float32)
        return ov.Model([ops.result(end) for end in build(x)], [x], "m")

    plain, rewritten = network(), network()
    assert save_multiplications(rewritten) > 0
    x = frames(batch, *shape[1:])
    for want, got in zip(run(plain, x), run(rewritten, x), strict=True):
        assert want.std() > 0.1
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(want.std()))
    return rewritten


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("size", range(3, 18))
def test_any_number_of_slices(size: int) -> None:
    network = same(lambda x: [conv(x)], [1, 3, size, 6, 5])
    assert kinds(network)["Convolution"] == 6 * (size // 4) + 5 * (size % 4 > 0)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("batch", [1, 2])
def test_a_free_batch_and_strides_over_the_picture(batch: int) -> None:
    def build(x: Any) -> list[Any]:
        kernel = weights(5, 3, (3, 1, 5))
        return [
            conv(x, kernel=kernel, strides=(1, 2, 1), pads_begin=(1, 0, 4), pads_end=(1, 0, 3), dilations=(1, 1, 2))
        ]

    same(build, [-1, 3, 8, 6, 7], batch=batch)


@pytest.mark.usefixtures("always")
def test_bias_and_activation_are_taken_along() -> None:
    def build(x: Any) -> list[Any]:
        first = ops.relu(ops.add(conv(x, 6), bias(6)))
        return [ops.add(ops.add(bias(5), conv(first, 5)), ops.constant(np.float32(2)))]

    network = same(build, [1, 4, 8, 5, 6])
    shapes = [list(node.get_output_shape(0)) for node in network.get_ordered_ops() if node.get_type_name() == "Relu"]
    assert shapes == [[1, 6, 1, 5, 6]] * 8
    # What is added as a bare number is not known to fit a slice, and stays behind the whole.
    whole = [node for node in network.get_ordered_ops() if list(node.get_output_shape(0)) == [1, 5, 8, 5, 6]]
    assert [node.get_type_name() for node in whole] == ["Concat", "Add", "Result"]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("shape", [(1, 1, 8, 1, 1), (8, 1, 1)])
def test_what_differs_from_slice_to_slice_stays_behind(shape: tuple[int, ...]) -> None:
    def build(x: Any) -> list[Any]:
        by_slice = ops.constant(np.arange(8, dtype=np.float32).reshape(shape))
        return [ops.add(ops.add(conv(x), by_slice), x)]

    same(build, [1, 4, 8, 5, 6])


@pytest.mark.usefixtures("always")
def test_an_output_used_twice() -> None:
    def build(x: Any) -> list[Any]:
        once = conv(x)
        return [ops.relu(once), ops.add(once, ops.relu(once))]

    same(build, [1, 4, 8, 5, 6])


@pytest.mark.usefixtures("always")
def test_a_bias_of_the_layers_own_shape() -> None:
    def build(x: Any) -> list[Any]:
        once = conv(x, 4)
        channels = ops.slice(ops.shape_of(once), [1], [2], [1])
        shape = ops.concat([ops.constant([1]), channels, ops.constant([1, 1, 1])], 0)
        return [ops.relu(ops.add(once, ops.reshape(ops.constant(frames(4)), shape, False)))]

    for batch in (1, -1):
        network = same(build, [batch, 3, 8, 5, 6])
        lengths = [node.get_output_partial_shape(0)[2] for node in network.get_ordered_ops() if _is_conv(node)]
        assert lengths == [1] * 12


@pytest.mark.usefixtures("always")
def test_outputs_keep_their_names() -> None:
    x = ops.parameter([1, 3, 8, 5, 6], np.float32)
    end = ops.relu(conv(x))
    end.output(0).get_tensor().set_names({"map"})
    network = ov.Model([ops.result(end)], [x], "m")
    assert save_multiplications(network) == 1
    assert network.output("map").get_names() == {"map"}


def test_only_what_gains_is_rewritten() -> None:
    x = ops.parameter([1, 3, 8, 12, 12], np.float32)
    thin = ops.relu(conv(x, 64))
    wide = ops.relu(conv(thin, 64))
    short = ops.slice(wide, [0], [2], [1], [2])
    network = ov.Model([ops.result(conv(short, 64))], [x], "m")
    assert save_multiplications(network) == 1
    sizes = [tuple(node.get_output_shape(0)[1:3]) for node in network.get_ordered_ops() if _is_conv(node)]
    assert Counter(sizes) == {(64, 8): 1, (64, 1): 12, (64, 2): 1}


def _quantised() -> Any:
    return ops.convert(ops.constant(np.ones((4, 3, 3, 3, 3), np.int8)), np.float32)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    "change",
    [
        {"strides": (2, 1, 1)},
        {"dilations": (2, 1, 1), "pads_begin": (2, 1, 1), "pads_end": (2, 1, 1)},
        {"pads_begin": (2, 1, 1), "pads_end": (0, 1, 1)},
        {"kernel": weights(4, 3, (1, 3, 3)), "pads_begin": (0, 1, 1), "pads_end": (0, 1, 1)},
        {"kernel": weights(4, 3, (5, 3, 3)), "pads_begin": (2, 1, 1), "pads_end": (2, 1, 1)},
        {"auto_pad": "same_upper"},
    ],
    ids=["stride", "dilation", "causal", "one tap", "five taps", "automatic"],
)
def test_other_convolutions_stay(change: dict[str, Any]) -> None:
    _assert_stays(ops.parameter([1, 3, 8, 5, 6], np.float32), change)


@pytest.mark.usefixtures("always")
def test_layers_of_very_many_slices_stay() -> None:
    _assert_stays(ops.parameter([1, 3, 129, 5, 6], np.float32), {})


@pytest.mark.usefixtures("always")
def test_kernels_and_sizes_that_are_not_known_stay() -> None:
    _assert_stays(ops.parameter([1, 3, 8, 5, 6], np.float32), {"kernel": ops.parameter([4, 3, 3, 3, 3], np.float32)})
    for free in (2, 3, 4):
        shape = [-1 if axis == free else size for axis, size in enumerate([1, 3, 8, 5, 6])]
        _assert_stays(ops.parameter(shape, np.float32), {})


def _assert_stays(x: Any, change: dict[str, Any]) -> None:
    end = conv(x, **change)
    inputs = [x] + [kernel for kernel in change.values() if getattr(kernel, "get_type_name", str)() == "Parameter"]
    network = ov.Model([ops.result(end)], inputs, "m")
    assert save_multiplications(network) == 0
    assert kinds(network)["Convolution"] == 1


def test_engines_use_it_in_fp32_alone(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    text = """<ir_version: 8, opset_import: ["" : 18]>
    g (float[batch, 64, 8, 12, 12] x, float[64, 64, 3, 3, 3] w) => (float[batch, 64, 8, 12, 12] y) {
      y = Conv <pads = [1, 1, 1, 1, 1, 1]> (x, w)
    }"""
    network = onnx.parser.parse_model(text)
    kernel = onnx.numpy_helper.from_array(frames(64, 64, 3, 3, 3) / 64, "w")
    network.graph.input.pop()
    network.graph.initializer.append(kernel)
    onnx.save(network, tmp_path / "g.onnx")
    maps = TensorSpec(name="x", dtype="float32", shape=("batch", 64, 8, 12, 12))
    made = maps.model_copy(update={"name": "y"})
    graph = GraphSpec(name="g", file="g.onnx", sha256="0" * 64, inputs=(maps,), outputs=(made,))
    x = frames(1, 64, 8, 12, 12)
    results = []
    for precision, convolutions in (("fp32", 12), ("int8", 1)):
        compiled = compile_model(tmp_path / "g.onnx", "p", graph, EngineOptions(precision))
        layers = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]
        assert layers.count("Convolution") == convolutions
        results.append(compiled.create_infer_request().infer([x])[0])
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-4)


def _is_conv(node: Any) -> bool:
    return bool(node.get_type_name() == "Convolution")
