"""Opening packs: every way a pack can be wrong ends in one line that names it and the remedy."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from engines import auto, backends
from engines.backends import EngineOptions
from engines.errors import (
    BackendUnavailable,
    EngineError,
    GraphLoadError,
    ManifestError,
    PackIntegrityError,
    PackNotFound,
)
from engines.manifest import GraphSpec, Manifest, TensorSpec, read_manifest, write_manifest
from engines.measure import random_batch
from engines.open import find_pack, open_pack
from engines.parity import merged, read_parity
from engines.tinypack import REFERENCES
from engines.types import Engine

Rehash = Callable[[str], Manifest]
ON_CPU = ("onnxruntime", "openvino")


def refused(error: type[EngineError], folder: Path, backend: str = "onnxruntime", **options: object) -> str:
    """The message with which a pack is refused; one line."""
    with pytest.raises(error) as caught:
        open_pack(folder, backend=backend, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_opened_pack_runs(tiny: Path) -> None:
    pack = open_pack(tiny, backend="onnxruntime")
    assert pack.backend == "onnxruntime"
    assert pack.sha256 == read_manifest(tiny).sha256()
    assert pack.engines.keys() == {"watch_encoder", "watch_window", "scene_window"}
    for graph in pack.manifest.graphs:
        pack.engines[graph.name].infer(random_batch(graph, 2))
    pack.close()
    pack.close()


def test_each_engine_thread_gets_its_own(tiny: Path) -> None:
    one, two = open_pack(tiny, backend="onnxruntime"), open_pack(tiny, backend="onnxruntime")
    one.close()
    graph = two.manifest.graph("watch_encoder")
    two.engines["watch_encoder"].infer(random_batch(graph, 1))


def test_find_by_name_and_by_path(tiny: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "packs").mkdir(parents=True)
    (home / "packs" / "mine").symlink_to(tiny)
    assert find_pack("mine", home) == home / "packs" / "mine"
    assert find_pack(str(tiny), home) == tiny
    assert find_pack(tiny, home) == tiny


def test_an_unknown_pack_names_those_there_are(tiny: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with pytest.raises(PackNotFound, match=r"no pack 'nope' .*there is none yet.*sightwire export"):
        find_pack("nope", home)
    (home / "packs").mkdir(parents=True)
    (home / "packs" / "mine").symlink_to(tiny)
    with pytest.raises(PackNotFound, match=r"there are: mine"):
        find_pack("nope", home)
    assert "no pack at" in refused(PackNotFound, tmp_path / "nowhere")


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_truncated_graph(tiny: Path, rehash: Rehash, backend: str) -> None:
    pytest.importorskip(backend)
    path = tiny / "watch_window.onnx"
    path.write_bytes(path.read_bytes()[:700])
    rehash("watch_window")
    message = refused(GraphLoadError, tiny, backend, require_parity=False)
    assert "pack tiny" in message
    assert "graph watch_window (watch_window.onnx)" in message
    assert "export the pack again" in message


def test_a_graph_with_another_hash(tiny: Path) -> None:
    with (tiny / "scene_window.onnx").open("ab") as file:
        file.write(b"\0")
    assert "pack tiny: scene_window.onnx is not the file" in refused(PackIntegrityError, tiny)


def test_a_graph_that_is_gone(tiny: Path) -> None:
    (tiny / "scene_window.onnx").unlink()
    assert "scene_window.onnx is missing; export the pack again" in refused(PackIntegrityError, tiny)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (TensorSpec(name="frames", dtype="float32", shape=("batch", 2, 32, 32, 3)), "input frames is uint8["),
        (TensorSpec(name="frames", dtype="uint8", shape=("batch", 2, 64, 32, 3)), ", 2, 32, 32, 3], the manifest says"),
        (TensorSpec(name="frames", dtype="uint8", shape=("batch", 2, "h", 32, 3)), "[batch, 2, h, 32, 3]; export"),
        (TensorSpec(name="frames", dtype="uint8", shape=("batch", 32, 32, 3)), "the manifest says uint8[batch, 32,"),
        (TensorSpec(name="pictures", dtype="uint8", shape=("batch", 2, 32, 32, 3)), "its inputs are ['frames']"),
    ],
)
def test_a_manifest_that_disagrees_with_the_graph(tiny: Path, backend: str, tensor: TensorSpec, says: str) -> None:
    pytest.importorskip(backend)
    manifest = read_manifest(tiny)
    encoder = manifest.graph("watch_encoder").model_copy(update={"inputs": (tensor,)})
    write_manifest(tiny, manifest.model_copy(update={"graphs": (encoder, *manifest.graphs[1:])}))
    message = refused(ManifestError, tiny, backend, require_parity=False)
    assert message.startswith("pack tiny: graph watch_encoder: ")
    assert says in message


@pytest.mark.parametrize(
    ("backend", "module", "remedy"),
    [
        ("onnxruntime", "engines.onnx_engine", "pip install onnxruntime"),
        ("openvino", "engines.openvino_engine", "pip install 'sightwire[openvino]'"),
    ],
)
def test_a_backend_that_is_not_installed(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, backend: str, module: str, remedy: str
) -> None:
    for imported in (module, "engines.openvino_axes", "engines.openvino_runtime"):
        monkeypatch.delitem(sys.modules, imported, raising=False)
    monkeypatch.setitem(sys.modules, backend, None)
    message = refused(BackendUnavailable, tiny, backend)
    assert message.startswith(f"backend {backend} is not usable")
    assert remedy in message
    assert backend not in backends.installed()


def test_no_backend_at_all(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in backends.BACKENDS:
        monkeypatch.setitem(sys.modules, backend, None)
    assert "no backend is installed" in refused(BackendUnavailable, tiny, "auto")


def test_an_unknown_backend_or_device_or_precision(tiny: Path) -> None:
    assert "choose auto or one of onnxruntime" in refused(BackendUnavailable, tiny, "tvm")
    assert "no usable device 'tpu'" in refused(BackendUnavailable, tiny, device="tpu")
    assert "onnxruntime runs fp32 or int8 on device cpu, not bf16" in refused(
        BackendUnavailable, tiny, precision="bf16", require_parity=False
    )


@pytest.mark.parametrize(
    ("device", "provider"), [("cuda", "CUDAExecutionProvider"), ("tensorrt", "TensorrtExecutionProvider")]
)
def test_a_gpu_is_never_replaced_by_the_cpu_in_silence(tiny: Path, device: str, provider: str) -> None:
    ort = pytest.importorskip("onnxruntime")
    if provider in ort.get_available_providers():
        pytest.skip(f"this ONNX Runtime has {provider}")
    assert f"no usable device '{device}'" in refused(BackendUnavailable, tiny, device=device, require_parity=False)


def test_a_provider_that_starts_as_another_is_an_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime lists a provider whose libraries are missing, then goes on with the CPU and says nothing."""
    ort = pytest.importorskip("onnxruntime")
    known = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    if known[0] in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    monkeypatch.setattr(ort, "get_available_providers", lambda: known)
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"):
        message = refused(BackendUnavailable, tiny, device="cuda", require_parity=False)
    assert "install onnxruntime-gpu and CUDA" in message


def test_auto_measures_once_and_remembers(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    times = {"onnxruntime": 2.0, "openvino": 1.0}
    measured: list[str] = []

    def measure(
        folder: Path, manifest: Manifest, candidate: auto.Candidate, graphs: list[str], options: backends.EngineOptions
    ) -> auto.Times:
        measured.append(candidate[0])
        return {graph: {1: times[candidate[0]], 4: times[candidate[0]]} for graph in graphs}

    monkeypatch.setattr(auto, "_measure_apart", measure)
    assert open_pack(tiny, cache=tmp_path).backend == "openvino"
    assert measured == ["onnxruntime", "openvino"]
    times["openvino"] = 3.0
    assert open_pack(tiny, cache=tmp_path).backend == "openvino"
    assert len(measured) == 2
    assert open_pack(tiny, cache=tmp_path, threads=2).backend == "onnxruntime"
    assert open_pack(tiny, cache=tmp_path, engines=2).backend == "onnxruntime"
    assert len(measured) == 6
    for remembered in (tmp_path / "auto").iterdir():
        remembered.write_text("{")
    assert open_pack(tiny, cache=tmp_path).backend == "onnxruntime"


def test_auto_measures_close_candidates_twice(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    times = {"onnxruntime": [1.2, 0.9], "openvino": [1.0, 1.1]}

    def measure(
        folder: Path, manifest: Manifest, candidate: auto.Candidate, graphs: list[str], options: backends.EngineOptions
    ) -> auto.Times:
        ms = times[candidate[0]].pop(0)
        return {graph: {1: ms} for graph in graphs}

    monkeypatch.setattr(auto, "_measure_apart", measure)
    # In the first round something else slowed the faster one.
    assert open_pack(tiny, cache=tmp_path).backend == "onnxruntime"
    assert times == {"onnxruntime": [], "openvino": []}


def test_auto_times_no_batch_that_is_not_run_at_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = read_manifest(tiny).graph("watch_encoder")
    assert auto._batches(graph, "cpu") == [1, 4]
    monkeypatch.setattr("engines.split.PART_BYTES", 1)
    assert auto._batches(graph, "cpu") == [1]
    assert auto._batches(graph, "cuda") == [1, 4]


def test_auto_takes_what_can_be_measured(tiny: Path, tmp_path: Path) -> None:
    """The real measurement, in processes of their own."""
    manifest = read_manifest(tiny)
    names = ["watch_encoder", "scene_window"]
    found = auto._measure_apart(tiny, manifest, ("onnxruntime", "fp32"), names, backends.EngineOptions())
    assert list(found) == names
    assert all(0 < ms < 1000 for times in found.values() for ms in times.values())
    beside = auto._measure_apart(tiny, manifest, ("onnxruntime", "fp32"), names, backends.EngineOptions(engines=2))
    assert list(beside) == names
    with pytest.raises(GraphLoadError, match="backend tvm cannot be measured in fp32: no backend 'tvm'"):
        auto._measure_apart(tiny, manifest, ("tvm", "fp32"), names, backends.EngineOptions())


FAST, EXACT, OTHER = ("openvino", "bf16"), ("openvino", "fp32"), ("onnxruntime", "fp32")


def chosen(times: dict[auto.Candidate, dict[str, float]], **allowed: list[auto.Candidate]) -> dict[str, auto.Candidate]:
    """What is chosen for graphs ``a`` (run four times as often) and ``b``, by milliseconds at batch 1."""
    graphs = {"a": allowed.get("a", list(times)), "b": allowed.get("b", list(times))}
    by_batch = {candidate: {graph: {1: ms} for graph, ms in found.items()} for candidate, found in times.items()}
    return auto.choose(by_batch, {"a": 4.0, "b": 1.0}, graphs)


def test_auto_takes_a_lower_precision_only_where_it_is_faster() -> None:
    assert chosen({FAST: {"a": 1, "b": 5}, EXACT: {"a": 2, "b": 5}}) == {"a": FAST, "b": EXACT}
    assert chosen({FAST: {"a": 3, "b": 5}, EXACT: {"a": 2, "b": 4}}) == {"a": EXACT, "b": EXACT}


def test_auto_mixes_backends_only_where_it_pays() -> None:
    assert chosen({EXACT: {"a": 1, "b": 1}, OTHER: {"a": 3, "b": 0.9}}) == {"a": EXACT, "b": EXACT}
    assert chosen({EXACT: {"a": 1, "b": 4}, OTHER: {"a": 3, "b": 1}}) == {"a": EXACT, "b": OTHER}


def test_auto_takes_nothing_that_a_graph_may_not_run_on() -> None:
    assert chosen({EXACT: {"a": 1, "b": 1}, OTHER: {"a": 9, "b": 9}}, b=[OTHER]) == {"a": EXACT, "b": OTHER}


def test_auto_considers_no_precision_below_the_one_asked_for(tiny: Path) -> None:
    manifest, report = read_manifest(tiny), read_parity(tiny)
    assert report is not None
    bf16 = [entry.model_copy(update={"backend": "openvino", "precision": "bf16"}) for entry in report.entries[:3]]
    manifest = manifest.model_copy(update={"parity_bounds": {"fp32": 1e-3, "bf16": 0.1}})
    report, graph = merged(report, bf16), manifest.graph("watch_encoder")
    installed = ["onnxruntime", "openvino"]
    fp32 = [("onnxruntime", "fp32"), ("openvino", "fp32")]
    assert set(auto._passing(manifest, graph, report, "fp32", installed)) >= {("onnxruntime", "fp32")}
    assert FAST not in auto._passing(manifest, graph, report, "fp32", installed)
    assert auto._passing(manifest, graph, report, "bf16", installed)[0] == FAST
    assert set(auto._passing(manifest, graph, report, "bf16", installed)) <= {FAST, *fp32}


def test_calls_per_second_follow_hops_and_sampling(tiny: Path) -> None:
    rates = auto.calls_per_second(read_manifest(tiny))
    assert rates == {"watch_encoder": 4.0, "watch_window": 2.0, "scene_window": 1.0}


def test_onnxruntime_sessions_are_shared_and_freed(tiny: Path) -> None:
    from engines import onnx_engine

    def opened() -> int:
        # Engines that other tests left behind may be let go at any moment: they are not counted.
        return len(set(onnx_engine._sessions) - before)

    gc.collect()
    before = set(onnx_engine._sessions)
    one, two = open_pack(tiny, backend="onnxruntime"), open_pack(tiny, backend="onnxruntime")
    assert opened() == 3
    one.close()
    assert opened() == 3
    two.close()
    assert opened() == 0


@pytest.mark.parametrize("backend", ON_CPU)
def test_engines_of_two_threads_do_not_disturb_each_other(tiny: Path, backend: str) -> None:
    pytest.importorskip(backend)
    graph = read_manifest(tiny).graph("watch_window")
    inputs = [random_batch(graph, 5, seed=seed) for seed in range(2)]
    want = [REFERENCES[graph.name](batch)["action_logits"] for batch in inputs]

    def run(n: int) -> bool:
        engine = open_pack(tiny, backend=backend).engines[graph.name]
        return all(np.allclose(engine.infer(inputs[n])["action_logits"], want[n], atol=1e-3) for _ in range(50))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [True, True]


def test_a_cache_that_cannot_be_written_only_costs_time(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(
        auto, "_measure_apart", lambda folder, manifest, candidate, graphs, options: {g: {1: 1.0} for g in graphs}
    )
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert open_pack(tiny, cache=blocked).backend == "onnxruntime"
    assert "it is measured again next time" in caplog.text


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"\x80\x04}."], ids=repr)
def test_a_manifest_that_is_no_manifest_is_one_line(tiny: Path, content: bytes) -> None:
    """Text of another encoding and a pickle too."""
    (tiny / "manifest.json").write_bytes(content)
    with pytest.raises(ManifestError, match=r"manifest.json: .*; export the pack again$") as caught:
        open_pack(tiny)
    assert "\n" not in str(caught.value)


def test_engines_are_closed_where_a_later_graph_fails(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack is opened whole or not at all; an interrupt counts as a failure too."""
    load, closed = backends.load, list[str]()

    def loaded(path: Path, pack: str, graph: GraphSpec, backend: str, options: EngineOptions) -> Engine:
        if graph.name == "watch_window":
            raise KeyboardInterrupt
        engine = load(path, pack, graph, backend, options)
        monkeypatch.setattr(engine, "close", lambda: closed.append(graph.name))
        return engine

    monkeypatch.setattr(backends, "load", loaded)
    with pytest.raises(KeyboardInterrupt):
        open_pack(tiny, backend="onnxruntime")
    assert closed == ["watch_encoder"]
