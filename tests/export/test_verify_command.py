"""`sightwire verify` and `sightwire compile` as they are run: exit codes, and one clear line for what is wrong."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

from engines.manifest import file_sha256, read_manifest, write_manifest
from engines.parity import read_parity
from stream.cli import main

Command = Callable[..., tuple[int, str]]

NETWORK = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.see = nn.Conv2d(3, 4, 5, stride=4)
        self.say = nn.Linear(4, 2)
    def forward(self, pixels):
        return self.say(self.see(pixels).relu().mean(dim=(2, 3)))
"""
DESCRIPTION = """
name: own
video: {width: 32, height: 32, frames: 1, fps: 1, layout: BCHW, mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}
heads:
  kind: {kind: class, labels: [a, b], activation: softmax}
"""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> Iterator[Command]:
    """Runs ``sightwire`` with a cache of its own; exit code and what it says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "400")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["sightwire", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return int(ended.value.code or 0), said

    yield run
    root.handlers[:] = handlers
    root.setLevel(level)


def fails(done: tuple[int, str], *expected: str) -> None:
    """Exit code 1, and one line of error that holds all of these."""
    code, said = done
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert (code, len(errors)) == (1, 1), said
    for text in expected:
        assert text in errors[0]


def changed(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(folder / "small.onnx")
    change(model)
    agreed(folder, model.SerializeToString())


def agreed(folder: Path, content: bytes) -> None:
    """Another graph, with which the manifest's hash agrees."""
    (folder / "small.onnx").write_bytes(content)
    manifest = read_manifest(folder)
    graph = manifest.graph("small").model_copy(update={"sha256": file_sha256(folder / "small.onnx")})
    write_manifest(folder, manifest.model_copy(update={"graphs": (graph,)}))


def last_bias(model: onnx.ModelProto, value: float) -> None:
    bias = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [3])
    bias.CopyFrom(numpy_helper.from_array(np.full(3, value, np.float32), bias.name))


def test_an_own_model_is_exported_and_verified_against_itself(
    command: Command, conv_master: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net_to_verify.py").write_text(NETWORK)
    (tmp_path / "net.yaml").write_text(DESCRIPTION)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sys.path.insert(0, str(tmp_path))
    try:
        from net_to_verify import Net  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(tmp_path))
    save_file(Net().state_dict(), tmp_path / "net.safetensors")
    what = ("net_to_verify:Net", "--weights", "net.safetensors", "--describe", "net.yaml")
    code, said = command("export", *what, "--to", "pack")
    assert code == 0, said
    assert str(tmp_path) not in (tmp_path / "pack" / "manifest.json").read_text()

    clips = ("--clips", conv_master.clip)
    code, said = command("verify", "./pack", *clips, "--html", "report.html")
    assert code == 0, said
    assert f"compared with torch {torch.__version__}" in said
    assert "network" in said and "passes" in said
    assert "<svg" in (tmp_path / "report.html").read_text()
    report = read_parity(tmp_path / "pack")
    assert report is not None
    assert {entry.reference for entry in report.entries} == {None}

    # On another machine nothing is known of the model, unless it is named.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    only = ("--backend", "onnxruntime", "--precision", "fp32")
    code, said = command("verify", "./pack", *clips, *only)
    assert code == 0, said
    assert "not PyTorch, since of pack own net_to_verify:Net was exported on another machine" in said
    code, said = command("verify", "./pack", *clips, *only, "--model", *what)
    assert code == 0, said
    assert "compared with torch" in said

    save_file({name: tensor + 1 for name, tensor in Net().state_dict().items()}, tmp_path / "net.safetensors")
    done = command("verify", "./pack", *clips, *only, "--model", *what)
    fails(done, "pack own was not exported from net_to_verify:Net: the sha256 of its weights begins with")


def test_over_the_bound(command: Command, conv_pack: Any) -> None:
    manifest = read_manifest(conv_pack.folder)
    write_manifest(conv_pack.folder, manifest.model_copy(update={"parity_bounds": {"fp32": 1e-12}}))
    code, said = command("verify", conv_pack.folder, "--clips", conv_pack.clip, "--bisect")
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert code == 1
    for backend, line in zip(("onnxruntime", "openvino"), errors, strict=False):
        assert f"pack conv: graph small on {backend} fp32: output logits is off by" in line
        assert "the bound is 1e-12; " in line


@pytest.mark.parametrize("verb", ["verify", "compile"])
class TestBadInput:
    """What is wrong with a pack is told by both commands, whatever they were to do."""

    def run(self, command: Command, verb: str, pack: Any, *more: str) -> tuple[int, str]:
        if verb == "verify":
            return command("verify", pack.folder, "--clips", pack.clip, "--backend", "onnxruntime", *more)
        return command("compile", pack.folder, "--backend", "onnxruntime", *more)

    def test_no_pack(self, command: Command, verb: str, tmp_path: Path) -> None:
        fails(command(verb, tmp_path / "nothing"), "no pack", "nothing")

    def test_a_truncated_graph(self, command: Command, verb: str, conv_pack: Any) -> None:
        agreed(conv_pack.folder, (conv_pack.folder / "small.onnx").read_bytes()[:-500])
        done = self.run(command, verb, conv_pack)
        fails(done, "pack conv", "graph small", "small.onnx", "export the pack again")

    def test_another_hash(self, command: Command, verb: str, conv_pack: Any) -> None:
        with (conv_pack.folder / "small.onnx").open("ab") as file:
            file.write(b"\0")
        fails(self.run(command, verb, conv_pack), "pack conv: small.onnx is not the file", "export the pack again")

    def test_an_operator_that_no_backend_knows(self, command: Command, verb: str, conv_pack: Any) -> None:
        def change(model: onnx.ModelProto) -> None:
            relu = next(node for node in model.graph.node if node.op_type == "Relu")
            relu.op_type, relu.domain = "Frobnicate", "odd"
            model.opset_import.append(onnx.helper.make_opsetid("odd", 1))

        changed(conv_pack.folder, change)
        fails(self.run(command, verb, conv_pack), "pack conv", "graph small", "Frobnicate", "export the pack again")

    def test_a_manifest_that_disagrees(self, command: Command, verb: str, conv_pack: Any) -> None:
        manifest = read_manifest(conv_pack.folder)
        graph = manifest.graph("small")
        logits = graph.outputs[0].model_copy(update={"shape": ("batch", 4)})
        wrong = graph.model_copy(update={"outputs": (logits, *graph.outputs[1:])})
        write_manifest(conv_pack.folder, manifest.model_copy(update={"graphs": (wrong,)}))
        done = self.run(command, verb, conv_pack)
        fails(done, "pack conv: graph small: output logits is float32[batch, 3]", "export the pack again")

    def test_answers_that_are_no_numbers(self, command: Command, verb: str, conv_pack: Any) -> None:
        changed(conv_pack.folder, lambda model: last_bias(model, float("nan")))
        done = self.run(command, verb, conv_pack)
        fails(done, "pack conv: graph small: output logits holds NaN or infinity", "check the input")

    def test_a_broken_report(self, command: Command, verb: str, conv_pack: Any) -> None:
        (conv_pack.folder / "parity.json").write_text("{")
        fails(self.run(command, verb, conv_pack), "parity.json", "export the pack again")


def test_options_that_do_not_go_together(command: Command, conv_pack: Any, tmp_path: Path) -> None:
    fails(command("verify", conv_pack.folder, "--weights", "x"), "--weights and --describe go with --model")
    fails(command("verify", conv_pack.folder, "--clips", tmp_path / "none.mp4"), "clip none.mp4 cannot be read")
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    where = tmp_path / "absent" / "report.html"
    done = command("verify", conv_pack.folder, "--clips", conv_pack.clip, "--backend", "onnxruntime", "--html", where)
    fails(done, "cannot write", "report.html", "No such file", "choose another path")
