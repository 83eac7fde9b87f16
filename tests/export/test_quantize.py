"""Conversions: other files beside the graph, close to it, smaller, and refused where they would be wrong."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from engines import backends
from engines.backends import EngineOptions
from engines.errors import BackendUnavailable, ConversionError, PackIntegrityError, ParityMissing
from engines.manifest import Variant, check_integrity, file_sha256, read_manifest, write_manifest
from engines.measure import random_batch
from engines.types import Array
from export.clips import default_clips
from export.quantize import _after_layers, _before, _on_float_inputs, add_variants


def run(folder: Path, precision: str) -> dict[str, Array]:
    graph = read_manifest(folder).graph("small")
    engine = backends.load(folder / graph.file, "conv", graph, "onnxruntime", EngineOptions(precision=precision))
    return engine.infer(random_batch(graph, 8))


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("variant", ["int8", "int8_symmetric"])
def test_int8_is_quantised_and_close(conv_pack: Any, variant: Variant) -> None:
    folder = conv_pack.folder
    manifest = add_variants(folder, [variant], [conv_pack.clip])
    assert read_manifest(folder) == manifest
    check_integrity(folder, manifest)
    file = manifest.graph("small").variants[variant]
    assert file.file == f"small.{variant}.onnx"
    found = operators(folder / file.file)
    assert found["Conv"] == 3
    assert found["DequantizeLinear"] >= 6
    if variant == "int8":
        want, got = run(folder, "fp32")["logits"], run(folder, "int8")["logits"]
        error = np.sqrt(np.mean((want - got) ** 2)) / want.std()
        assert 0 < error < 0.2


def test_what_tensorrt_takes_has_no_zero_points_and_float_biases(conv_pack: Any) -> None:
    add_variants(conv_pack.folder, ["int8_symmetric"], [conv_pack.clip])
    model = onnx.load(conv_pack.folder / "small.int8_symmetric.onnx")
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    zeros = [values[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert zeros
    assert all(not zero.any() and zero.dtype == np.int8 for zero in zeros)
    assert not any(value.dtype == np.int32 for value in values.values())


def test_fp16_keeps_the_types_of_inputs_and_outputs(conv_pack: Any) -> None:
    add_variants(conv_pack.folder, ["fp16"], [conv_pack.clip])
    model = onnx.load(conv_pack.folder / "small.fp16.onnx")
    kinds = {port.name: port.type.tensor_type.elem_type for port in (*model.graph.input, *model.graph.output)}
    assert kinds == {"frames": 2, "logits": 1, "mask": 2}
    weights = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 4]
    assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.FLOAT16}


def test_a_conversion_that_is_there_is_not_made_again(conv_pack: Any) -> None:
    told: list[str] = []
    add_variants(conv_pack.folder, ["int8"], [conv_pack.clip], progress=told.append)
    assert told == ["converting small to int8"]
    add_variants(conv_pack.folder, ["int8"], [conv_pack.clip], progress=told.append)
    assert len(told) == 1


def test_a_bound_that_cannot_be_kept_is_an_error_and_leaves_no_file(conv_pack: Any) -> None:
    folder = conv_pack.folder
    write_manifest(folder, read_manifest(folder).model_copy(update={"parity_bounds": {"fp32": 1e-3, "fp16": 1e-9}}))
    with pytest.raises(
        ConversionError, match=r"pack conv: graph small in fp16: output logits is off by .*the bound is"
    ):
        add_variants(folder, ["fp16"], [conv_pack.clip])
    assert not (folder / "small.fp16.onnx").exists()
    assert read_manifest(folder).graph("small").variants == {}


def test_a_layer_is_not_on_a_float_input_that_is_only_compared() -> None:
    """A mask says which frames count; how large its numbers are is no matter."""
    nodes = [
        onnx.helper.make_node("Greater", ["mask", "zero"], ["there"], "compare"),
        onnx.helper.make_node("Where", ["there", "pixels", "zero"], ["seen"], "choose"),
        onnx.helper.make_node("MatMul", ["seen", "weight"], ["a"], "after_choice"),
        onnx.helper.make_node("Mul", ["mask", "pixels"], ["weighed"], "weigh"),
        onnx.helper.make_node("MatMul", ["weighed", "weight"], ["b"], "after_product"),
    ]
    mask = onnx.helper.make_tensor_value_info("mask", onnx.TensorProto.FLOAT, ["batch", 4])
    pixels = onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, ["batch", 4])
    graph = onnx.helper.make_graph(nodes, "g", [mask, pixels], [])
    assert _on_float_inputs(onnx.helper.make_model(graph)) == {"after_product"}


def test_what_no_layer_follows_is_left_alone() -> None:
    """The sum of two logits: its range is that of a few clips, and what is lost of it is lost of a decision."""
    nodes = [
        onnx.helper.make_node("MatMul", ["pixels", "weight"], ["a"], "first"),
        onnx.helper.make_node("Add", ["a", "pixels"], ["b"], "residual"),
        onnx.helper.make_node("MatMul", ["b", "weight"], ["c"], "last"),
        onnx.helper.make_node("Add", ["c", "b"], ["logits"], "sum"),
    ]
    pixels = onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, ["batch", 4])
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", 4])
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [pixels], [logits]))
    assert _after_layers(model) == {"sum"}
    assert _before(model, ["first", "last"]) == set()
    assert _before(model, ["last"]) == {"first", "residual"}
    assert _before(model, []) == {"first", "residual", "last", "sum"}


def test_a_clip_is_held_out_of_three(conv_pack: Any, film: Path) -> None:
    """The manifest says which were calibrated on."""
    street = next(path for path in default_clips() if path.name == "bikes.mp4")
    clips = [conv_pack.clip, film, street]
    file = add_variants(conv_pack.folder, ["int8"], clips).graph("small").variants["int8"]
    assert file.calibrated_on == tuple(file_sha256(path) for path in clips[:2])


def test_layers_stay_in_float_until_the_bound_is_kept(conv_pack: Any) -> None:
    """No layer may be quantised under this bound, and then none is."""
    folder = conv_pack.folder
    write_manifest(folder, read_manifest(folder).model_copy(update={"parity_bounds": {"fp32": 1e-3, "int8": 1e-4}}))
    add_variants(folder, ["int8"], [conv_pack.clip])
    assert operators(folder / "small.int8.onnx")["QuantizeLinear"] == 0


def test_a_changed_or_absent_conversion_is_refused(conv_pack: Any) -> None:
    folder = conv_pack.folder
    with pytest.raises(
        BackendUnavailable, match="graph small has no int8 file for onnxruntime; run `sightwire compile`"
    ):
        run(folder, "int8")
    add_variants(folder, ["int8"], [conv_pack.clip])
    (folder / "small.int8.onnx").write_bytes(b"something else")
    with pytest.raises(PackIntegrityError, match=r"pack conv: small.int8.onnx is not the file"):
        check_integrity(folder, read_manifest(folder))


def test_clips_that_are_too_short(conv_pack: Any, tmp_path: Path) -> None:
    with pytest.raises(ParityMissing, match=r"gone.mkv cannot be read"):
        add_variants(conv_pack.folder, ["int8"], [tmp_path / "gone.mkv"])
