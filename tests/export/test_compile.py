"""compile_pack: engines in the cache, what they were measured to do in the pack, and clear refusals."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from engines import backends
from engines.cache import ENGINES_FOLDER, list_cache
from engines.errors import (
    BackendUnavailable,
    EngineError,
    GraphLoadError,
    InferenceError,
    ManifestError,
    PackIntegrityError,
    ParityFailed,
    ParityMissing,
)
from engines.manifest import PARITY_FILE, file_sha256, read_manifest, write_manifest
from engines.measure import Reference
from engines.open import open_pack
from engines.parity import read_parity
from engines.types import Array, Tensors
from export.compile import compile_pack

needs_openvino = pytest.mark.skipif("openvino" not in backends.installed(), reason="no openvino")
needs_tensorrt = pytest.mark.skipif("tensorrt" not in backends.installed(), reason="no form of tensorrt")


def refused(error: type[EngineError], pack: Any, backend: str, precision: str = "fp32", **more: Any) -> str:
    """The message with which compiling is refused; one line."""
    with pytest.raises(error) as caught:
        compile_pack(pack.folder, backend, precision, clips=[pack.clip], **more)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert "conv" in message
    return message


def by_torch(pack: Any) -> dict[str, Reference]:
    """PyTorch's answers as the reference, so that only the backend in question reads the file."""

    def run(inputs: Tensors) -> dict[str, Array]:
        with torch.inference_mode():
            logits, mask = pack.module(torch.from_numpy(np.array(inputs["frames"])))
        return {"logits": logits.numpy(), "mask": mask.numpy()}

    return {"small": run}


def changed_graph(folder: Path, content: bytes) -> None:
    """Put another file in the graph's place, and make the manifest agree with it."""
    manifest = read_manifest(folder)
    (folder / "small.onnx").write_bytes(content)
    graph = manifest.graph("small").model_copy(update={"sha256": file_sha256(folder / "small.onnx")})
    write_manifest(folder, manifest.model_copy(update={"graphs": (graph,)}))


def test_onnxruntime_int8_is_converted_measured_and_then_opens(conv_pack: Any, tmp_path: Path) -> None:
    told: list[str] = []
    (result,) = compile_pack(
        conv_pack.folder, "onnxruntime", "int8", told.append, clips=[conv_pack.clip], cache=tmp_path / "cache"
    )
    assert (result.graph, result.backend, result.precision, result.not_run) == ("small", "onnxruntime", "int8", "")
    assert result.parity is not None
    assert result.parity.passed
    assert result.parity.reference == "the pack's fp32 graphs on onnxruntime"
    assert [latency.batch for latency in result.parity.latency] == [1, 4]
    assert told[0] == "converting small to int8"
    report = read_parity(conv_pack.folder)
    assert report is not None
    assert report.reference.startswith("torch ")
    assert report.entry(read_manifest(conv_pack.folder).graph("small"), "onnxruntime", "int8") == result.parity
    pack = open_pack(conv_pack.folder, backend="onnxruntime", precision="int8")
    assert pack.engines["small"].spec.precision == "int8"


@needs_openvino
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_openvino_engines_are_kept(conv_pack: Any, tmp_path: Path, precision: Any) -> None:
    for reused in (False, True):
        (result,) = compile_pack(conv_pack.folder, "openvino", precision, clips=[conv_pack.clip], cache=tmp_path)
        assert (result.reused, result.size > 1000) == (reused, True)
    (entry,) = list_cache(tmp_path / ENGINES_FOLDER)
    file = read_manifest(conv_pack.folder).graph("small").artifact("openvino", precision)
    assert entry.key is not None and file is not None
    assert entry.key.onnx_sha256 == file.sha256


@needs_tensorrt
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_tensorrt_engines_are_built_and_say_why_they_did_not_run(
    conv_pack: Any, tmp_path: Path, precision: Any
) -> None:
    for reused in (False, True):
        (result,) = compile_pack(conv_pack.folder, "tensorrt", precision, clips=[conv_pack.clip], cache=tmp_path)
        assert (result.reused, result.size > 1000) == (reused, True)
        assert (result.parity is None) == ("needs an NVIDIA GPU and its driver" in result.not_run)
    if result.parity is None:
        with pytest.raises(ParityMissing, match=f"graph small on tensorrt {precision} has no parity report"):
            open_pack(conv_pack.folder, backend="tensorrt", precision=precision, device="cuda")


def test_torch_runs_the_modules_that_it_is_given(conv_pack: Any) -> None:
    assert "give the modules in code" in refused(BackendUnavailable, conv_pack, "torch")
    modules = {"small": conv_pack.module}
    (result,) = compile_pack(conv_pack.folder, "torch", "bf16", clips=[conv_pack.clip], modules=modules)
    assert result.parity is not None
    assert result.parity.passed
    assert result.parity.max_abs_error > 0
    assert "torch runs fp32, bf16, fp16, not int8" in refused(
        BackendUnavailable, conv_pack, "torch", "int8", modules=modules
    )


@needs_openvino
def test_auto_measures_all_and_marks_what_it_takes(conv_pack: Any, tmp_path: Path) -> None:
    results = compile_pack(conv_pack.folder, "auto", "int8", clips=[conv_pack.clip], cache=tmp_path)
    tried = {(result.backend, result.precision) for result in results}
    assert {("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("openvino", "fp32"), ("openvino", "int8")} <= tried
    (taken,) = [result for result in results if result.chosen]
    pack = open_pack(conv_pack.folder, precision="int8", cache=tmp_path)
    assert (pack.backend, pack.precision) == (taken.backend, taken.precision)
    assert open_pack(conv_pack.folder, cache=tmp_path).precision == "fp32"


def test_over_the_bound_names_graph_output_error_and_bound(conv_pack: Any, tmp_path: Path) -> None:
    def shifted(inputs: Tensors) -> dict[str, Array]:
        logits = np.linspace(-1, 1, 3 * len(inputs["frames"]), dtype=np.float32).reshape(-1, 3)
        return {"logits": logits, "mask": np.zeros((len(logits), 16, 16), np.uint8)}

    message = refused(ParityFailed, conv_pack, "onnxruntime", references={"small": shifted}, cache=tmp_path)
    assert "pack conv: graph small on onnxruntime fp32: output logits is off by" in message
    assert "the bound is 0.001" in message
    with pytest.raises(ParityFailed):
        open_pack(conv_pack.folder, backend="onnxruntime")


def test_a_pack_that_was_never_compared_with_pytorch(conv_pack: Any) -> None:
    (conv_pack.folder / PARITY_FILE).unlink()
    assert "was never compared with PyTorch; export the pack again" in refused(ParityMissing, conv_pack, "onnxruntime")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "tensorrt"])
def test_files_that_are_no_graph(conv_pack: Any, tmp_path: Path, backend: str) -> None:
    if backend not in backends.installed():
        pytest.skip(f"no {backend}")
    whole = (conv_pack.folder / "small.onnx").read_bytes()
    for content in (whole[: len(whole) // 2], pickle.dumps({"state": [1.0]})):
        changed_graph(conv_pack.folder, content)
        message = refused(GraphLoadError, conv_pack, backend, cache=tmp_path, references=by_torch(conv_pack))
        assert "graph small" in message
        assert "small.onnx" in message
        assert "export the pack again" in message


def test_a_file_with_another_hash(conv_pack: Any) -> None:
    with (conv_pack.folder / "small.onnx").open("ab") as file:
        file.write(b"\0")
    assert "pack conv: small.onnx is not the file" in refused(PackIntegrityError, conv_pack, "onnxruntime")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "tensorrt"])
def test_an_operator_that_no_backend_knows(conv_pack: Any, tmp_path: Path, backend: str) -> None:
    if backend not in backends.installed():
        pytest.skip(f"no {backend}")
    model = onnx.load(conv_pack.folder / "small.onnx")
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    relu.op_type, relu.domain = "Frobnicate", "odd"
    model.opset_import.append(onnx.helper.make_opsetid("odd", 1))
    changed_graph(conv_pack.folder, model.SerializeToString())
    message = refused(GraphLoadError, conv_pack, backend, cache=tmp_path, references=by_torch(conv_pack))
    assert f"{backend} " in message
    assert "graph small" in message
    assert "Frobnicate" in message


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "tensorrt"])
def test_a_manifest_that_disagrees_with_the_graph(conv_pack: Any, tmp_path: Path, backend: str) -> None:
    if backend not in backends.installed():
        pytest.skip(f"no {backend}")
    manifest = read_manifest(conv_pack.folder)
    graph = manifest.graph("small")
    logits = graph.outputs[0].model_copy(update={"shape": ("batch", 4)})
    wrong = graph.model_copy(update={"outputs": (logits, *graph.outputs[1:])})
    write_manifest(conv_pack.folder, manifest.model_copy(update={"graphs": (wrong,)}))
    assert "the manifest says float32[batch, 4]; export" in refused(
        ManifestError, conv_pack, backend, cache=tmp_path, references=by_torch(conv_pack)
    )


def test_a_network_whose_answers_are_no_numbers(conv_pack: Any) -> None:
    model = onnx.load(conv_pack.folder / "small.onnx")
    bias = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [3])
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(3, np.nan, np.float32), bias.name))
    changed_graph(conv_pack.folder, model.SerializeToString())
    message = refused(InferenceError, conv_pack, "onnxruntime")
    assert "pack conv: graph small: output logits holds NaN or infinity on onnxruntime fp32" in message


def test_what_is_no_backend_or_precision(conv_pack: Any) -> None:
    for backend, precision, says in (("tvm", "fp32", "no backend 'tvm'"), ("torch", "fp8", "no precision 'fp8'")):
        with pytest.raises(BackendUnavailable, match=says):
            compile_pack(conv_pack.folder, backend, precision)  # type: ignore[arg-type]


def test_a_pack_that_cannot_be_written_to(conv_pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(EngineError, match=r"pack conv: graph small: cannot write .*No space left"):
            compile_pack(conv_pack.folder, "onnxruntime", "int8", clips=[conv_pack.clip])
    assert read_manifest(conv_pack.folder).graph("small").variants == {}
