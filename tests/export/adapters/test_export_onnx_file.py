"""A ready ONNX file, with preprocessing put before it and answers behind it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from engines.manifest import MANIFEST_FILE, HeadKind, file_sha256
from engines.parity import read_parity
from engines.types import Array, Tensors
from export.adapters.common import ExportOptions
from export.build import ExportError
from export.model import export_model

Run = Callable[[Path, Tensors], dict[str, Array]]
RANDOM = np.random.default_rng(3)
KERNEL = RANDOM.normal(0, 0.4, (4, 3, 3, 3, 3)).astype(np.float32)
MATRIX = RANDOM.normal(0, 0.3, (4, 3)).astype(np.float32)


def net(path: Path, *, last: str = "Softmax", batch: int | str = "n", opset: int = 13, flat: int | None = None) -> Path:
    """A small 3D network ``x`` [batch, 3, 4, 32, 32] to ``scores`` [batch, 3]; ``flat`` fixes its batch inside."""
    rows = -1 if flat is None else flat
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["maps"]),
        helper.make_node("Relu", ["maps"], ["relu"]),
        helper.make_node("GlobalAveragePool", ["relu"], ["pooled"]),
        helper.make_node("Reshape", ["pooled", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "matrix"], ["logits"]),
        helper.make_node(last, ["logits"], ["scores"]),
    ]
    constants = {"kernel": KERNEL, "matrix": MATRIX, "shape": np.array([rows, 4])}
    return store(path, nodes, [("x", [batch, 3, 4, 32, 32])], [("scores", [batch, 3])], constants, opset)


def store(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[tuple[str, list[int | str]]],
    outputs: list[tuple[str, list[int | str]]],
    constants: dict[str, Array],
    opset: int = 13,
) -> Path:
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    ports = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in side] for side in (inputs, outputs)]
    graph = helper.make_graph(nodes, "net", ports[0], ports[1], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(model, path)
    return path


VIDEO = """
video: {width: 40, height: 36, crop: [32, 32], frames: 4, fps: 8, layout: BCTHW, channels: bgr,
        mean: [0.4, 0.5, 0.6], std: [0.2, 0.3, 0.25]}
"""
ACTION = "heads: {action: {kind: action, labels: [run, walk, sit], activation: softmax, gives: probabilities}}\n"


def described(tmp_path: Path, text: str = VIDEO + ACTION) -> ExportOptions:
    path = tmp_path / "net.yaml"
    path.write_text(text)
    return ExportOptions(describe=path)


def by_hand(frames: Array) -> Array:
    """What the network's input should be."""
    seen = frames[:, :, 2:34, 4:36, ::-1].astype(np.float64) / 255
    return ((seen - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.25]).transpose(0, 4, 1, 2, 3).astype(np.float32)


def plainly(path: Path, pixels: Array) -> Array:
    """The file run as it is by the library's reference implementation, one row after the other."""
    reference = ReferenceEvaluator(str(path))
    return np.concatenate([reference.run(None, {"x": row[None]})[0] for row in pixels])


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_probabilities_come_out_as_they_are_in_the_file(
    tmp_path: Path, run: Run, pictures: Callable[..., Array], opset: int
) -> None:
    path = net(tmp_path / "net.onnx", opset=opset)
    manifest = export_model(str(path), tmp_path / "pack", options=described(tmp_path), clips=None)
    assert manifest.name == "net" and manifest.checkpoint_sha256 == file_sha256(path)
    frames = pictures(3, 4, 36, 40, 3)
    logits = run(tmp_path / "pack", {"frames": frames})["action"]
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    want = plainly(path, by_hand(frames))
    assert np.ptp(want, axis=0).max() > 1e-3
    assert np.abs(scores - want).max() < 1e-5


def test_logits_and_several_labels(tmp_path: Path, run: Run, pictures: Callable[..., Array]) -> None:
    path = net(tmp_path / "net.onnx", last="Sigmoid")
    text = VIDEO + ACTION.replace("softmax", "sigmoid")
    export_model(str(path), tmp_path / "pack", options=described(tmp_path, text), clips=None)
    frames = pictures(2, 4, 36, 40, 3)
    logits = run(tmp_path / "pack", {"frames": frames})["action"]
    assert np.abs(1 / (1 + np.exp(-logits)) - plainly(path, by_hand(frames))).max() < 1e-5
    text = VIDEO + ACTION.replace("gives: probabilities", "gives: logits")
    net(tmp_path / "net.onnx", last="Identity")
    export_model(str(path), tmp_path / "pack", options=described(tmp_path, text), clips=None)
    logits = run(tmp_path / "pack", {"frames": frames})["action"]
    assert np.abs(logits - plainly(path, by_hand(frames))).max() < 1e-4


def test_parity_is_with_the_file_itself(tmp_path: Path, clip: Path) -> None:
    path = net(tmp_path / "net.onnx")
    export_model(str(path), tmp_path / "pack", options=described(tmp_path), clips=[clip])
    report = read_parity(tmp_path / "pack")
    assert report is not None and report.reference.endswith("on net.onnx itself")
    exact = [entry for entry in report.entries if entry.precision == "fp32"]
    assert exact and all(entry.passed for entry in exact)


def test_masks_and_sound_by_the_names_of_tensors(tmp_path: Path, run: Run, pictures: Callable[..., Array]) -> None:
    """Two inputs and three outputs, of which two are taken."""
    nodes = [
        helper.make_node("Conv", ["picture", "kernel"], ["maps"], pads=[1, 1, 1, 1]),
        helper.make_node("ReduceMean", ["sound"], ["level"], axes=[2]),
        helper.make_node("Identity", ["picture"], ["unused"]),
    ]
    inputs: list[tuple[str, list[int | str]]] = [("picture", ["n", 3, 16, 24]), ("sound", ["n", 1, 500])]
    outputs: list[tuple[str, list[int | str]]] = [
        ("unused", ["n", 3, 16, 24]),
        ("maps", ["n", 4, 16, 24]),
        ("level", ["n", 1]),
    ]
    nodes[1].attribute.append(helper.make_attribute("keepdims", 0))
    path = store(tmp_path / "both.onnx", nodes, inputs, outputs, {"kernel": KERNEL[:, :, 1]})
    text = """
video: {width: 24, height: 16, frames: 1, fps: 2, layout: BCHW, mean: [0, 0, 0], std: [1, 1, 1], input: picture}
audio: {sample_rate: 1000, layout: BCN, input: sound}
heads:
  scene: {kind: segmentation, labels: [a, b, c, d], output: maps}
  loudness: {kind: embedding, output: level}
"""
    manifest = export_model(str(path), tmp_path / "pack", options=described(tmp_path, text), clips=None)
    assert [head.kind for head in manifest.branches[0].heads] == [HeadKind.SEGMENTATION, HeadKind.EMBEDDING]
    frames, audio = pictures(3, 1, 16, 24, 3), RANDOM.uniform(-1, 1, (3, 500)).astype(np.float32)
    got = run(tmp_path / "pack", {"frames": frames, "audio": audio})
    fed = {"picture": (frames[:, 0] / 255).transpose(0, 3, 1, 2).astype(np.float32), "sound": audio[:, None]}
    maps, level = ReferenceEvaluator(str(path)).run(["maps", "level"], fed)
    assert got["scene"].dtype == np.uint8 and (got["scene"] == maps.argmax(axis=1)).mean() > 0.999
    assert np.abs(got["loudness"] - level).max() < 1e-6


def test_a_fixed_batch_is_freed_where_it_can_be(tmp_path: Path, run: Run, pictures: Callable[..., Array]) -> None:
    path = net(tmp_path / "net.onnx", batch=1)
    export_model(str(path), tmp_path / "pack", options=described(tmp_path), clips=None)
    assert run(tmp_path / "pack", {"frames": pictures(5, 4, 36, 40, 3)})["action"].shape == (5, 3)


def refused(path: Path, message: str, options: ExportOptions) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        export_model(str(path), path.parent / "pack", options=options, clips=None)
    assert "\n" not in str(caught.value)
    assert not (path.parent / "pack" / MANIFEST_FILE).exists()


def test_a_batch_fixed_inside_is_refused(tmp_path: Path) -> None:
    path = net(tmp_path / "net.onnx", batch=1, flat=1)
    refused(path, "net.onnx does not take x .*export it with a free batch", described(tmp_path))


def test_rows_that_see_each_other_are_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["each"], axes=[2, 3, 4], keepdims=0),
        helper.make_node("ReduceMean", ["each"], ["all"], axes=[0], keepdims=1),
        helper.make_node("Add", ["each", "all"], ["scores"]),
    ]
    path = store(tmp_path / "net.onnx", nodes, [("x", ["n", 3, 4, 32, 32])], [("scores", ["n", 3])], {})
    text = VIDEO + ACTION.replace(", gives: probabilities", "")
    refused(path, "rows of a batch change each other's action", described(tmp_path, text))


def test_files_that_are_not_whole(tmp_path: Path) -> None:
    path = net(tmp_path / "net.onnx")
    path.write_bytes(path.read_bytes()[:700])
    refused(path, "net.onnx is not a whole, valid ONNX file", described(tmp_path))
    path.write_text("hello")
    refused(path, "net.onnx is not a whole, valid ONNX file", described(tmp_path))
    refused(tmp_path / "gone.onnx", "no ONNX file at .*gone.onnx", described(tmp_path))


@pytest.mark.parametrize("name", ["net.onnx", "net.pt", "net.pth"])
def test_a_pickle_is_refused_by_its_bytes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps({"weights": 1}))
    refused(tmp_path / name, f"{name} is a pickle, which can run any code; save", described(tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[run, walk, sit]", "[run, walk]", "head action gives 3 scores for 2 labels; correct its labels"),
        ("labels:", "output: logit, labels:", "heads.action.output names logit; the file has scores"),
        ("frames: 4", "frames: 4, input: y", "video.input names y; the file has x"),
        ("frames: 4", "frames: 5", r"does not take x \[1, 3, 5, 32, 32\]"),
        ("layout: BCTHW, ", "", "do not say video.layout"),
        ("kind: action", "kind: segmentation", r"head action comes out as \[3\], not a mask"),
        ("video:", "audio: {sample_rate: 1000, window_s: 1}\nvidoe:", "vidoe: Extra inputs are not permitted"),
    ],
)
def test_what_is_described_must_be_so(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = VIDEO + ACTION
    assert old in text
    refused(net(tmp_path / "net.onnx"), message, described(tmp_path, text.replace(old, new, 1)))


def test_an_input_that_nobody_feeds(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["x"], ["scores"]), helper.make_node("Identity", ["state"], ["next"])]
    ports: list[tuple[str, list[int | str]]] = [("x", ["n", 3, 4, 32, 32]), ("state", ["n", 3])]
    path = store(tmp_path / "net.onnx", nodes, ports, [("scores", ["n", 3]), ("next", ["n", 3])], {})
    text = (VIDEO + ACTION).replace("frames: 4", "frames: 4, input: x").replace("labels:", "output: next, labels:")
    refused(path, "nothing is said of its input state", described(tmp_path, text))


def test_an_operator_that_nobody_knows(tmp_path: Path) -> None:
    nodes = [helper.make_node("Mystery", ["x"], ["scores"], domain="own")]
    path = store(tmp_path / "net.onnx", nodes, [("x", ["n", 3, 4, 32, 32])], [("scores", ["n", 3])], {})
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("own", 1))
    onnx.save(model, path)
    refused(path, "net.onnx cannot be loaded .*Mystery.*export it for ONNX Runtime", described(tmp_path))
