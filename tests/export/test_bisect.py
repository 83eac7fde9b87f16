"""The node that is named is the one that was broken, in a graph as exported and in what it was converted to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from engines import backends
from engines.backends import EngineOptions
from engines.errors import GraphLoadError
from engines.manifest import GraphFile, file_sha256, read_manifest, write_manifest
from export.bisect import Departure, Suspect, comparable, first_departure, relative_error
from export.quantize import add_variants

INT8 = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def lively_master(conv_master: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small network with weights that matter: untrained ones are lost beside its biases."""
    folder = Path(shutil.copytree(conv_master.folder, tmp_path_factory.mktemp("lively") / "conv"))
    random = np.random.default_rng(2)
    model = onnx.load(folder / "small.onnx")
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".weight"):
            fan_in = int(np.prod(tensor.dims[1:]))
            values = random.normal(0, np.sqrt(2 / fan_in), tensor.dims).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    (folder / "small.onnx").write_bytes(model.SerializeToString())
    manifest = read_manifest(folder)
    graph = manifest.graph("small").model_copy(update={"sha256": file_sha256(folder / "small.onnx")})
    write_manifest(folder, manifest.model_copy(update={"graphs": (graph,)}))
    add_variants(folder, ("int8",), [conv_master.clip])
    return folder


@pytest.fixture
def pack(lively_master: Path, tmp_path: Path) -> Path:
    """A pack in fp32 and int8 that a test may change."""
    return Path(shutil.copytree(lively_master, tmp_path / "conv"))


@pytest.fixture
def frames() -> dict[str, Any]:
    """Blocks of colour: of finer noise a network that averages sees next to nothing."""
    coarse = np.random.default_rng(3).integers(0, 256, (4, 1, 4, 4, 3))
    return {"frames": coarse.repeat(8, axis=2).repeat(8, axis=3).astype(np.uint8)}


def layers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]


def turned(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    """Change the sign of a layer's weights, quantised or not."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    name = node.input[1]
    while name not in weights:
        name = makers[name].input[0]
    values = numpy_helper.to_array(weights[name])
    weights[name].CopyFrom(numpy_helper.from_array(-values, name))


def changed(folder: Path, precision: str, change: Callable[[onnx.ModelProto], None]) -> onnx.ModelProto:
    """Change a file of the pack, let the manifest agree with it, and give the fp32 graph as it was."""
    manifest = read_manifest(folder)
    graph = manifest.graph("small")
    written = onnx.load(folder / graph.file)
    path = folder / (graph.file if precision == "fp32" else graph.variants["int8"].file)
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    sha256 = file_sha256(path)
    if precision == "fp32":
        graph = graph.model_copy(update={"sha256": sha256})
    else:
        variants = {**graph.variants, "int8": GraphFile(file=path.name, sha256=sha256)}
        graph = graph.model_copy(update={"variants": variants})
    write_manifest(folder, manifest.model_copy(update={"graphs": (graph,)}))
    return written


def searched(folder: Path, written: onnx.ModelProto, inputs: Any, backend: str, precision: str) -> Departure | None:
    manifest = read_manifest(folder)
    suspect = Suspect(manifest, manifest.graph("small"), folder, backend, EngineOptions(precision))
    return first_departure(suspect, written, inputs)


@pytest.mark.parametrize("backend", INT8)
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_broken_weight_of_a_quantised_graph(pack: Path, frames: Any, backend: str, place: int) -> None:
    if backend not in backends.installed():
        pytest.skip(f"no {backend}")
    broken: list[str] = []

    def change(model: onnx.ModelProto) -> None:
        node = layers(model)[place]
        broken.append(node.name)
        turned(model, node)

    written = changed(pack, "int8", change)
    found = searched(pack, written, frames, backend, "int8")
    assert found is not None
    assert found.node == broken[0]
    assert found.error > 0.2 > found.before


@pytest.mark.parametrize("place", [0, 2, 3])
def test_a_broken_weight_of_the_exported_graph(pack: Path, frames: Any, place: int) -> None:
    written = changed(pack, "fp32", lambda model: turned(model, layers(model)[place]))
    found = searched(pack, written, frames, "onnxruntime", "fp32")
    assert found is not None
    assert found.node == layers(written)[place].name
    assert found.before < 1e-4
    assert found.node in str(found)


def test_a_changed_attribute(pack: Path, frames: Any) -> None:
    def change(model: onnx.ModelProto) -> None:
        (pads,) = [one for one in layers(model)[2].attribute if one.name == "pads"]
        pads.ints[:] = [2, 2, 0, 0]

    written = changed(pack, "fp32", change)
    found = searched(pack, written, frames, "onnxruntime", "fp32")
    assert found is not None
    assert (found.node, found.op_type) == (layers(written)[2].name, "Conv")


def test_a_scale_that_is_wrong_names_what_quantises(pack: Path, frames: Any) -> None:
    broken: list[str] = []

    def change(model: onnx.ModelProto) -> None:
        weights = {tensor.name: tensor for tensor in model.graph.initializer}
        first = layers(model)[0].input[0]
        (node,) = [node for node in model.graph.node if first in node.output]
        assert node.op_type == "DequantizeLinear"
        wrong = numpy_helper.from_array(3 * numpy_helper.to_array(weights[node.input[1]]), "wrong_scale")
        model.graph.initializer.append(wrong)
        node.input[1] = "wrong_scale"
        broken.append(node.name)

    written = changed(pack, "int8", change)
    found = searched(pack, written, frames, "onnxruntime", "int8")
    assert found is not None
    assert found.node == broken[0]
    assert found.before < 0.01


def test_numbers_that_are_none(pack: Path, frames: Any) -> None:
    def change(model: onnx.ModelProto) -> None:
        name = layers(model)[2].input[2]
        (bias,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
        bias.CopyFrom(numpy_helper.from_array(np.full(16, np.nan, np.float32), name))

    written = changed(pack, "fp32", change)
    found = searched(pack, written, frames, "onnxruntime", "fp32")
    assert found is not None
    assert (found.node, found.error) == (layers(written)[2].name, float("inf"))


@pytest.mark.parametrize(("backend", "precision"), [("onnxruntime", "fp32"), *((name, "int8") for name in INT8)])
def test_in_a_sound_pack_nothing_departs(pack: Path, frames: Any, backend: str, precision: str) -> None:
    if backend not in backends.installed():
        pytest.skip(f"no {backend}")
    written = onnx.load(pack / "small.onnx")
    assert searched(pack, written, frames, backend, precision) is None


def test_a_graph_that_the_backend_refuses(pack: Path, frames: Any) -> None:
    def change(model: onnx.ModelProto) -> None:
        node = layers(model)[2]
        node.op_type, node.domain = "Frobnicate", "odd"
        model.opset_import.append(onnx.helper.make_opsetid("odd", 1))

    written = changed(pack, "fp32", change)
    with pytest.raises(GraphLoadError, match=r"pack conv: onnxruntime .* cannot load graph small"):
        searched(pack, written, frames, "onnxruntime", "fp32")


def test_where_rounding_itself_is_too_much_the_first_to_round_is_named(pack: Path, frames: Any) -> None:
    manifest = read_manifest(pack)
    write_manifest(pack, manifest.model_copy(update={"parity_bounds": {"int8": 1e-4}}))
    found = searched(pack, onnx.load(pack / "small.onnx"), frames, "onnxruntime", "int8")
    assert found is not None
    assert (found.op_type, found.sudden) == ("DequantizeLinear", True)
    assert found.before < 1e-4


def test_an_error_that_grows_bit_by_bit_is_told_as_that() -> None:
    gradual = Departure("a", "Conv", "b", 0.3, 0.2, sudden=False)
    assert str(gradual).startswith("the error grows from node to node and is too large at a (Conv)")


def test_shapes_and_weights_are_not_compared(pack: Path) -> None:
    model = onnx.load(pack / "small.onnx")
    pairs = comparable(model, model)
    assert {name for node in layers(model) for name in node.output} <= pairs.keys()
    assert pairs.keys().isdisjoint(tensor.name for tensor in model.graph.initializer)
    assert all(name == other for name, other in pairs.items())


def test_errors_are_in_units_of_the_reference() -> None:
    want = np.array([-1.0, 1.0], np.float32)
    assert relative_error(want, want + np.float32(0.5), want) == pytest.approx(0.5)
    assert relative_error(want, np.array([1e30, 1.0], np.float32), want) == float("inf")
    assert relative_error(want, want[:1], want) == float("inf")
    level = np.full(2, 4.0, np.float32)
    assert relative_error(level, level + 2, level) == pytest.approx(0.5)
