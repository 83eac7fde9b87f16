"""TensorRT: engines are built for real, without a GPU; what runs them is said to be missing where it is."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines import backends
from engines.backends import EngineOptions
from engines.cache import ArtifactCache, list_cache
from engines.errors import BackendUnavailable, EngineError, GraphLoadError, InferenceError, ManifestError
from engines.fake import FakeEngine
from engines.manifest import BatchProfile, GraphSpec, Manifest, TensorSpec, read_manifest
from engines.measure import random_batch
from engines.open import open_pack
from engines.split import SplitEngine, in_parts
from engines.tinypack import REFERENCES

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")
if "tensorrt" not in backends.installed():
    pytest.skip("no form of TensorRT is installed", allow_module_level=True)

from engines import tensorrt_engine  # noqa: E402
from engines.tensorrt_library import RTX, error_from  # noqa: E402
from tests.gpu import HAS_GPU, needs_gpu  # noqa: E402

if not RTX and not HAS_GPU:
    pytest.skip("tensorrt itself builds on a GPU only", allow_module_level=True)

CUDA = EngineOptions(device="cuda")
HEADER = '<ir_version: 8, opset_import: ["" : 18]>'


def options(cache: Path, precision: str = "fp32") -> EngineOptions:
    return EngineOptions(precision=precision, device="cuda", cache_dir=cache)


def write_graph(folder: Path, text: str, inputs: TensorSpec, outputs: TensorSpec) -> GraphSpec:
    """An ONNX graph of one input and one output."""
    onnx.save(onnx.parser.parse_model(f"{HEADER} {text}"), folder / "g.onnx")
    return GraphSpec(name="g", file="g.onnx", sha256="0" * 64, inputs=(inputs,), outputs=(outputs,))


def refused(error: type[EngineError], path: Path, graph: GraphSpec, cache: Path | None = None) -> str:
    """The message with which a graph is refused; one line that names pack and graph."""
    with pytest.raises(error) as caught:
        backends.compile_graph(path, "tiny", graph, "tensorrt", EngineOptions(device="cuda", cache_dir=cache))
    message = str(caught.value)
    assert message.startswith(f"pack tiny: graph {graph.name}")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["watch_encoder", "watch_window", "scene_window"])
def test_engines_are_built_once(tiny_master: Path, tmp_path: Path, name: str) -> None:
    graph = read_manifest(tiny_master).graph(name)
    made = backends.compile_graph(tiny_master / graph.file, "tiny", graph, "tensorrt", options(tmp_path))
    assert made.size > 1000
    assert not made.reused
    assert backends.compile_graph(tiny_master / graph.file, "tiny", graph, "tensorrt", options(tmp_path)).reused
    (entry,) = list_cache(tmp_path)
    assert entry.key is not None
    assert (entry.key.onnx_sha256, entry.key.backend, entry.key.shapes) == (graph.sha256, "tensorrt", "1-8-64")


def test_engines_made_for_anything_else_are_built_again(
    tiny_master: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = read_manifest(tiny_master).graph("watch_encoder")

    def reused(graph: GraphSpec) -> bool:
        return backends.compile_graph(tiny_master / graph.file, "tiny", graph, "tensorrt", options(tmp_path)).reused

    assert not reused(graph)
    assert reused(graph)
    assert not reused(graph.model_copy(update={"batch": BatchProfile(usual=2, largest=4)}))
    assert not reused(graph.model_copy(update={"sha256": "1" * 64}))
    for elsewhere in ("version", "_device"):
        with monkeypatch.context() as patch:
            patch.setattr(tensorrt_engine, elsewhere, lambda: "another")
            assert not reused(graph)
    assert reused(graph)


def test_a_damaged_engine_is_built_again(tiny_master: Path, tmp_path: Path) -> None:
    graph = read_manifest(tiny_master).graph("watch_encoder")
    path = tiny_master / graph.file
    backends.compile_graph(path, "tiny", graph, "tensorrt", options(tmp_path))
    (entry,) = list_cache(tmp_path)
    entry.path.write_bytes(entry.path.read_bytes()[:-100])
    assert not backends.compile_graph(path, "tiny", graph, "tensorrt", options(tmp_path)).reused
    assert ArtifactCache(tmp_path).get(entry.key) is not None


def test_a_truncated_file_and_a_pickle(tiny: Path) -> None:
    graph = read_manifest(tiny).graph("watch_window")
    path = tiny / graph.file
    path.write_bytes(path.read_bytes()[:700])
    assert "watch_window.onnx" in (message := refused(GraphLoadError, path, graph))
    assert "export the pack again" in message
    path.write_bytes(pickle.dumps({"weights": [1.0]}))
    assert "export the pack again" in refused(GraphLoadError, path, graph)


FLOATS = TensorSpec(name="x", dtype="float32", shape=("batch", 4))


def test_an_operator_that_it_does_not_know_is_named(tmp_path: Path) -> None:
    header = HEADER.replace("18]", '18, "odd" : 1]')
    text = f"{header} g (float[batch, 4] x) => (float[batch, 4] y) {{ y = odd.Frobnicate (x) }}"
    onnx.save(onnx.parser.parse_model(text), tmp_path / "g.onnx")
    graph = GraphSpec(
        name="g", file="g.onnx", sha256="0" * 64, inputs=(FLOATS,), outputs=(FLOATS.model_copy(update={"name": "y"}),)
    )
    message = refused(GraphLoadError, tmp_path / "g.onnx", graph)
    assert "cannot run operator Frobnicate" in message
    assert "choose backend onnxruntime" in message


def test_a_manifest_that_disagrees_with_the_graph(tiny: Path) -> None:
    graph = read_manifest(tiny).graph("watch_encoder")
    wrong = TensorSpec(name="frames", dtype="uint8", shape=("batch", 2, 64, 32, 3))
    assert "the manifest says uint8[batch, 2, 64, 32, 3]" in refused(
        ManifestError, tiny / graph.file, graph.model_copy(update={"inputs": (wrong,)})
    )


def test_a_second_free_size_is_refused(tmp_path: Path) -> None:
    free = TensorSpec(name="x", dtype="float32", shape=("batch", "length"))
    graph = write_graph(
        tmp_path,
        "g (float[batch, length] x) => (float[batch, length] y) { y = Neg (x) }",
        free,
        free.model_copy(update={"name": "y"}),
    )
    assert "input x has a free size besides its batch" in refused(GraphLoadError, tmp_path / "g.onnx", graph)


def test_pictures_that_are_moved_about_before_they_are_cast(tmp_path: Path) -> None:
    """TensorRT itself refuses this: it casts uint8, and does nothing else with it."""
    body = """{
      first = Constant <value = int64 {0}> ()
      picture = Gather <axis = 1> (x, first)
      planes = Transpose <perm = [0, 3, 1, 2]> (picture)
      y = Cast <to = 1> (planes)
    }"""
    graph = write_graph(
        tmp_path,
        f"g (uint8[batch, 1, 8, 6, 3] x) => (float[batch, 3, 8, 6] y) {body}",
        TensorSpec(name="x", dtype="uint8", shape=("batch", 1, 8, 6, 3)),
        TensorSpec(name="y", dtype="float32", shape=("batch", 3, 8, 6)),
    )
    assert backends.compile_graph(tmp_path / "g.onnx", "tiny", graph, "tensorrt", CUDA).size > 1000


def test_precisions_that_it_does_not_offer(tiny: Path) -> None:
    graph = read_manifest(tiny).graph("watch_encoder")
    for precision, says in (
        ("bf16", "tensorrt runs fp32, fp16, int8, not bf16"),
        ("int8", "has no int8_symmetric file"),
    ):
        with pytest.raises(BackendUnavailable, match=says):
            backends.compile_graph(
                tiny / graph.file, "tiny", graph, "tensorrt", EngineOptions(precision=precision, device="cuda")
            )


@pytest.mark.parametrize("batch", [0, 65])
def test_a_batch_outside_the_profile(batch: int) -> None:
    with pytest.raises(InferenceError, match=rf"pack p: graph g: a batch of {batch} is outside 1\.\.64.*compile again"):
        tensorrt_engine.check_batch("pack p: graph g", BatchProfile(), batch)
    tensorrt_engine.check_batch("pack p: graph g", BatchProfile(), 64)


def test_batches_are_filled_up_to_few_sizes() -> None:
    profile = BatchProfile(smallest=2, usual=8, largest=40)
    sizes = [tensorrt_engine.run_size(profile, batch) for batch in range(2, 41)]
    assert sorted(set(sizes)) == [2, 3, 4, 6, 8, 12, 16, 24, 32, 40]
    for batch, size in zip(range(2, 41), sizes, strict=True):
        assert batch <= size <= batch * 3 / 2
    assert tensorrt_engine.run_size(profile, 1) == 2
    assert {tensorrt_engine.run_size(BatchProfile(), batch) for batch in range(1, 65)} >= {1, 64}


def test_batches_larger_than_the_profile_are_split(tiny: Path) -> None:
    graph = read_manifest(tiny).graph("watch_encoder").model_copy(update={"batch": BatchProfile(usual=2, largest=3)})
    fake = FakeEngine("tiny", graph, REFERENCES[graph.name])
    assert in_parts(fake, graph, "cuda") is fake
    fake._spec = replace(fake.spec, backend="tensorrt")
    engine = in_parts(fake, graph, "cuda")
    assert isinstance(engine, SplitEngine)
    inputs = random_batch(graph, 7)
    want = REFERENCES[graph.name](inputs)["features"]
    np.testing.assert_allclose(engine.infer(inputs)["features"], want, atol=1e-5)
    assert fake.batches == 3


@pytest.mark.parametrize(
    ("lines", "error", "says"),
    [
        (["Cuda Runtime (cudaError 35: CUDA driver version is insufficient)"], BackendUnavailable, "NVIDIA driver"),
        (
            ["Error Code 2: OutOfMemory (Requested size was 1)"],
            GraphLoadError,
            "ran out of memory.*largest batch smaller",
        ),
        (["Serialization assertion header.magicTag failed"], GraphLoadError, "magicTag failed; compile it again"),
        ([], GraphLoadError, "no reason given; compile it again"),
    ],
)
def test_what_tensorrt_says_becomes_one_line(lines: list[str], error: type[EngineError], says: str) -> None:
    found = error_from("pack p: graph g", "loaded its engine", lines, "compile it again")
    assert type(found) is error
    with pytest.raises(error, match=f"pack p: graph g.*{says}"):
        raise found


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_missing(tiny: Path) -> None:
    graph = read_manifest(tiny).graph("watch_encoder")
    with pytest.raises(BackendUnavailable, match=r"graph watch_encoder: tensorrt needs an NVIDIA GPU and its driver"):
        backends.load(tiny / graph.file, "tiny", graph, "tensorrt", CUDA)
    with pytest.raises(BackendUnavailable, match=r"tensorrt runs on device cuda, not cpu; choose device cuda"):
        open_pack(tiny, backend="tensorrt", require_parity=False)


@needs_gpu
@pytest.mark.parametrize("batch", [1, 3, 5, 16])
def test_it_follows_the_rule_on_a_gpu(tiny: Path, tmp_path: Path, batch: int) -> None:
    manifest: Manifest = read_manifest(tiny)
    for graph in manifest.graphs:
        engine = backends.load(tiny / graph.file, "tiny", graph, "tensorrt", options(tmp_path))
        assert isinstance(engine, tensorrt_engine.TensorRtEngine)
        inputs = random_batch(graph, batch, seed=batch)
        want = REFERENCES[graph.name](inputs)
        for _ in range(2):
            got = engine.infer(inputs)
        tensors = {name: torch.from_numpy(array).cuda() for name, array in inputs.items()}
        first = next(iter(inputs))
        on_device = engine.infer_on_device(tensors)
        from_device = engine.infer(tensors)
        mixed = engine.infer({**inputs, first: tensors[first]})
        for name in want:
            for found in (got[name], on_device[name].cpu().numpy(), from_device[name], mixed[name]):
                np.testing.assert_allclose(found, want[name], atol=1e-3)
        engine.close()
