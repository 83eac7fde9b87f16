"""Somebody else's streaming network: a ready ONNX file whose description names its states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from engines.manifest import MANIFEST_FILE, Manifest, Mode
from engines.open import open_pack
from engines.parity import read_parity
from engines.types import Array
from export.adapters.common import ExportOptions, wrap
from export.adapters.describe import describe, read_stated
from export.build import ExportError
from export.model import export_model
from export.source import Note
from export.verify import verify_pack
from stream.inference import PackRunner
from stream.memory import SourceMemory
from tests.stream.filmed import film

SIDE, HOP = 16, 2
RANDOM = np.random.default_rng(11)
KERNEL = RANDOM.normal(0, 0.5, (4, 3, 2, 3, 3)).astype(np.float32)
MATRIX = RANDOM.normal(0, 1.0, (4, 3)).astype(np.float32)
TYPES = {"float": onnx.TensorProto.FLOAT, "int": onnx.TensorProto.INT32, "double": onnx.TensorProto.DOUBLE}
TYPES |= {"half": onnx.TensorProto.FLOAT16}


def stream_net(path: Path, changes: dict[str, tuple[str, list[Any]]] | None = None, *, batch: int | str = 1) -> Path:
    """As MoViNet-A0-stream is published: ``image`` [1, 3, 2, 16, 16], a buffer of one past frame for a convolution
    over time, a running average, and a count of frames in int32; all states go in and come out.
    """
    ports: dict[str, tuple[str, list[Any]]] = {
        "image": ("float", [batch, 3, HOP, SIDE, SIDE]),
        "Block0/buffer:0": ("float", [batch, 3, 1, SIDE, SIDE]),
        "Head/pool:0": ("float", [batch, 4]),
        "frame_count": ("int", [batch, 1]),
        "logits": ("float", [batch, 3]),
        "Block0/buffer_out:0": ("float", [batch, 3, 1, SIDE, SIDE]),
        "Head/pool_out:0": ("float", [batch, 4]),
        "frame_count_out": ("int", [batch, 1]),
    }
    ports |= changes or {}
    node = helper.make_node
    nodes = [
        node("Concat", ["Block0/buffer:0", "image"], ["padded"], axis=2),
        node("Conv", ["padded", "kernel"], ["maps"]),
        node("Relu", ["maps"], ["relu"]),
        node("ReduceMean", ["relu"], ["level"], axes=[2, 3, 4], keepdims=0),
        node("Slice", ["image", "last", "end", "time"], ["Block0/buffer_out:0"]),
        node("Add", ["frame_count", "hop"], ["frame_count_out"]),
        node("Cast", ["frame_count"], ["before"], to=onnx.TensorProto.FLOAT),
        node("Cast", ["frame_count_out"], ["after"], to=onnx.TensorProto.FLOAT),
        node("Mul", ["Head/pool:0", "before"], ["sum"]),
        node("Mul", ["level", "hop_float"], ["fresh"]),
        node("Add", ["sum", "fresh"], ["total"]),
        node("Div", ["total", "after"], ["Head/pool_out:0"]),
        node("MatMul", ["Head/pool_out:0", "matrix"], ["logits"]),
    ]
    constants = {
        "kernel": KERNEL,
        "matrix": MATRIX,
        "last": np.array([HOP - 1]),
        "end": np.array([HOP]),
        "time": np.array([2]),
        "hop": np.array([HOP], np.int32),
        "hop_float": np.array([HOP], np.float32),
    }
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    made = {name: helper.make_tensor_value_info(name, TYPES[kind], shape) for name, (kind, shape) in ports.items()}
    names = list(made)
    graph = helper.make_graph(nodes, "net", [made[n] for n in names[:4]], [made[n] for n in names[4:]], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


TEXT = """
video: {width: 16, height: 16, frames: 8, fps: 8, layout: BCTHW, mean: [0, 0, 0], std: [1, 1, 1]}
hop_s: 0.25
states:
  "Block0/buffer:0": "Block0/buffer_out:0"
  "Head/pool:0": "Head/pool_out:0"
  frame_count: frame_count_out
heads: {action: {kind: action, labels: [run, walk, sit], activation: softmax}}
"""


def described(tmp_path: Path, text: str = TEXT, **more: Any) -> ExportOptions:
    path = tmp_path / "net.yaml"
    path.write_text(text)
    return ExportOptions(describe=path, **more)


def streamed(path: Path, images: Array) -> Array:
    """The file run hop by hop by the library's reference implementation: logits after each hop."""
    reference = ReferenceEvaluator(str(path))
    states: dict[str, Array] = {
        "Block0/buffer:0": np.zeros((1, 3, 1, SIDE, SIDE), np.float32),
        "Head/pool:0": np.zeros((1, 4), np.float32),
        "frame_count": np.zeros((1, 1), np.int32),
    }
    found = []
    for first in range(0, len(images), HOP):
        pixels = (images[first : first + HOP] / 255).astype(np.float32).transpose(3, 0, 1, 2)[None]
        logits, *after = reference.run(None, {"image": pixels, **states})
        states = dict(zip(states, after, strict=True))
        found.append(logits[0])
    return np.stack(found)


def export(tmp_path: Path, path: Path, **more: Any) -> Manifest:
    return export_model(str(path), tmp_path / "pack", options=described(tmp_path, **more), clips=None)


@pytest.mark.parametrize("batch", [1, "n"])
def test_it_runs_in_the_service_as_the_file_does_by_itself(tmp_path: Path, batch: int | str) -> None:
    path = stream_net(tmp_path / "net.onnx", batch=batch)
    manifest = export(tmp_path, path)
    (branch,) = manifest.branches
    assert (branch.mode, branch.window_ns, branch.hop_ns) == (Mode.STATEFUL, 10**9, 250_000_000)
    assert [(s.input, s.output) for s in branch.states] == [(f"state_{n}", f"next_state_{n}") for n in range(3)]
    ports = {tensor.name: (tensor.dtype, tensor.shape) for tensor in manifest.graphs[0].inputs}
    assert ports["frames"] == ("uint8", ("batch", HOP, SIDE, SIDE, 3))
    assert ports["state_0"] == ("float32", ("batch", 3, 1, SIDE, SIDE))
    # The runtime has no int32: a count is kept as int64 and handed on exactly.
    assert ports["state_2"] == ("int64", ("batch", 1))

    films = [RANDOM.integers(0, 256, (24, SIDE, SIDE, 3)).astype(np.uint8) for _ in range(2)]
    windows = [film(branch, images, source=f"cam{n}") for n, images in enumerate(films)]
    pack = open_pack(tmp_path / "pack", backend="onnxruntime", require_parity=False)
    runner = PackRunner(pack, SourceMemory())
    wanted = [streamed(path, images)[3:] for images in films]
    for number, batch_of in enumerate(zip(*windows, strict=True)):
        for n, (answer,) in enumerate(runner.run(branch.name, batch_of)):
            scores = np.exp(wanted[n][number]) / np.exp(wanted[n][number]).sum()
            assert answer.scores is not None
            np.testing.assert_allclose(answer.scores, scores, atol=1e-5)
    assert len(windows[0]) == len(wanted[0]) == 9
    assert np.ptp(np.stack(wanted), axis=(0, 1)).min() > 1e-3
    pack.close()


def test_parity_and_verification_stream_it(tmp_path: Path, clip: Path) -> None:
    path = stream_net(tmp_path / "net.onnx")
    options = described(tmp_path)
    export_model(str(path), tmp_path / "pack", options=options, clips=[clip])
    report = read_parity(tmp_path / "pack")
    assert report is not None and report.reference.endswith("on net.onnx itself")
    exact = [entry for entry in report.entries if entry.precision == "fp32"]
    assert exact and all(entry.passed and entry.samples > 8 for entry in exact)
    assert {out.tensor for entry in exact for out in entry.outputs} == {"action"}
    # The pack is stateful, and what is stated is in no mode of its own.
    found = verify_pack(
        tmp_path / "pack", clips=[clip], source=Note(model=str(path), options=options), cache=tmp_path, batch_sizes=(1,)
    )
    assert found.problems == [] and found.reference.endswith("on net.onnx itself")


def test_a_single_sample_at_a_time(tmp_path: Path) -> None:
    """Layouts without time, as of recurrent networks; with look-at-all windows of many samples."""
    node = helper.make_node
    nodes = [
        node("ReduceMean", ["x"], ["level"], axes=[2, 3], keepdims=0),
        node("Add", ["level", "h"], ["sum"]),
        node("Tanh", ["sum"], ["h_out"]),
    ]
    ports = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", [1, 3, SIDE, SIDE]), ("h", [1, 3]), ("h_out", [1, 3]))
    ]
    graph = helper.make_graph(nodes, "net", ports[:2], ports[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, tmp_path / "rnn.onnx")
    text = TEXT.replace("BCTHW", "BCHW").replace("0.25", "0.125")
    head, tail = text.index("states:"), text.index("heads:")
    text = text[:head] + "states: {h: h_out}\n" + text[tail:].replace("kind: action,", "kind: action, output: h_out,")
    options = described(tmp_path, text)
    manifest = export_model(str(tmp_path / "rnn.onnx"), tmp_path / "pack", options=options, clips=None)
    assert manifest.graphs[0].inputs[0].shape == ("batch", 1, SIDE, SIDE, 3)
    # An answer may be a state as well.
    assert {tensor.name for tensor in manifest.graphs[0].outputs} == {"action", "next_state_0"}


def refused(tmp_path: Path, path: Path, message: str, text: str = TEXT, **more: Any) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        export_model(str(path), tmp_path / "pack", options=described(tmp_path, text, **more), clips=None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pack" / MANIFEST_FILE).exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("frame_count: frame", "count: frame", "states names count, which is no input; the file has image, Block0"),
        (": frame_count_out", ": frame_count", "states names frame_count, which is no output; the file has logits"),
        (": frame_count_out", ': "Head/pool_out:0"', "output Head/pool_out:0 is named for two states"),
        (
            ': "Head/pool_out:0"',
            ": logits",
            r"state Head/pool:0 is \[3, 4\], its output logits comes out as \[3, 3\]; correct states",
        ),
        (": frame_count_out", ": logits", "state frame_count is int32, its output logits is float"),
        (
            "  frame_count: frame_count_out\n",
            "",
            "video.input is not stated; the file has image, frame_count",
        ),
        ("hop_s: 0.25\n", "", "do not say hop_s .with states: what the network takes at once"),
        ("hop_s: 0.25", "hop_s: 0.5", r"does not take image \[1, 3, 4, 16, 16\].*correct layout, frames or size"),
        ("hop_s: 0.25", "hop_s: 0.375", "a window of whole hops; correct its description"),
        ("BCTHW", "BCHW", "layout BCHW has no T, but there are 2 frames"),
        ("frames: 8", "frames: 8, input: frame_count", "video.input names frame_count; the file has image"),
        ("labels:", "output: frame_count_out, labels:", "head action gives 1 scores for 3 labels"),
        ("action: {", "state_0: {", "heads: state_0 is the name of a tensor of the pack"),
        ("action: {", "frames: {", "heads: frames is the name of a tensor of the pack"),
        (
            "  frame_count: frame_count_out\n",
            "  frame_count: [a, b]\n",
            "states.frame_count: Input should be a valid string",
        ),
    ],
)
def test_what_is_declared_must_be_so(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TEXT
    refused(tmp_path, stream_net(tmp_path / "net.onnx"), message, TEXT.replace(old, new, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"Head/pool:0": ("half", [1, 4])},
            "state Head/pool:0 is float16, its output Head/pool_out:0 is float;|valid ONNX",
        ),
        (
            {"Head/pool:0": ("double", [1, 4]), "Head/pool_out:0": ("double", [1, 4])},
            "state Head/pool:0 is double; export it with one of float, float16, uint8, int64, int32, bool",
        ),
        ({"Head/pool:0": ("float", [2, 1, 4])}, r"state Head/pool:0 is \[2, 1, 4\]; its first axis must be the batch"),
        ({"Head/pool:0": ("float", [1, "width"])}, r"state Head/pool:0 is \[1, width\]; all its axes but the batch"),
        ({"Head/pool:0": ("float", [])}, r"state Head/pool:0 is \[\]; its first axis must be the batch"),
    ],
)
def test_states_that_no_pack_can_hold(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    refused(tmp_path, stream_net(tmp_path / "net.onnx", changes), message)


def test_a_state_that_is_forgotten(tmp_path: Path) -> None:
    text = TEXT.replace("  frame_count: frame_count_out\n", "").replace("frames: 8", "frames: 8, input: image")
    path = stream_net(tmp_path / "net.onnx")
    refused(tmp_path, path, "nothing is said of its input frame_count; .* .under states if it is one", text)


def test_modes_that_do_not_go_with_it(tmp_path: Path) -> None:
    path = stream_net(tmp_path / "net.onnx")
    refused(tmp_path, path, "it has states, mode clip takes none; take states out", mode=Mode.CLIP)
    refused(tmp_path, path, "mode staged takes none", mode=Mode.STAGED)
    assert export(tmp_path, path, mode=Mode.STATEFUL).branches[0].mode is Mode.STATEFUL
    text = "\n".join(line for line in TEXT.splitlines() if not line.startswith(("states", "  ")))
    (tmp_path / "pack" / MANIFEST_FILE).unlink()
    refused(tmp_path, path, "mode stateful needs an ONNX file with states in its description", text, mode=Mode.STATEFUL)


def test_states_of_other_kinds_of_models(tmp_path: Path) -> None:
    """PyTorch modules keep theirs inside, where nobody can reset them."""
    path = tmp_path / "net.yaml"
    path.write_text(TEXT)
    with pytest.raises(ExportError, match="own: states can be described of ONNX files only; export the model as one"):
        wrap(nn.Identity(), describe("own", {"name": "own"}, read_stated(path), path))
