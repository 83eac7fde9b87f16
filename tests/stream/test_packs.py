"""A pack that cannot be run is told of in one line, and the others run nevertheless."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from engines import tinypack
from engines.errors import InferenceError
from engines.manifest import file_sha256
from engines.tinypack import write_tiny_pack
from stream.clock import SystemClock
from stream.errors import SettingsError
from stream.http.app import create_app
from stream.http.packs import packs_router
from stream.packs import FailedPack, load_packs
from stream.service import Service
from stream.settings import PackSettings, Settings, load_settings
from tests.stream.test_service import SCENE, Collector

GRAPH = "watch_window.onnx"


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def replace_graph(folder: Path, content: bytes) -> None:
    """Put something else in the place of a graph, with its hash, so that only loading can find it out."""
    (folder / GRAPH).write_bytes(content)

    def change(manifest: dict[str, Any]) -> None:
        for graph in manifest["graphs"]:
            if graph["file"] == GRAPH:
                graph["sha256"] = file_sha256(folder / GRAPH)

    edit(folder, change)


def truncated(folder: Path) -> None:
    replace_graph(folder, (folder / GRAPH).read_bytes()[:900])


def pickled(folder: Path) -> None:
    replace_graph(folder, pickle.dumps({"weights": [1.0, 2.0]}))


def foreign_engine(folder: Path) -> None:
    """A compiled TensorRT engine begins like this."""
    replace_graph(folder, b"ftrt" + bytes(range(256)) * 8)


def unknown_operator(folder: Path) -> None:
    import onnx

    model = onnx.load(folder / GRAPH)
    model.opset_import.append(onnx.helper.make_opsetid("nowhere", 1))
    sound = next(node for node in model.graph.node if node.op_type == "Sqrt")
    sound.op_type, sound.domain = "Fancy", "nowhere"
    replace_graph(folder, model.SerializeToString())


def other_graph(folder: Path) -> None:
    (folder / GRAPH).write_bytes((folder / "scene_window.onnx").read_bytes())


def lost_graph(folder: Path) -> None:
    (folder / GRAPH).unlink()


def other_shape(folder: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        graph = next(graph for graph in manifest["graphs"] if graph["name"] == "watch_window")
        audio = next(tensor for tensor in graph["inputs"] if tensor["name"] == "audio")
        audio["shape"] = ["batch", 999]

    edit(folder, change)


def other_labels(folder: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["branches"][0]["heads"][0]["labels"].append("more")

    edit(folder, change)


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


BROKEN = [
    (truncated, ("pack bad: onnxruntime", "cannot load graph watch_window", "export the pack again")),
    (pickled, ("pack bad: onnxruntime", "cannot load graph watch_window", "export the pack again")),
    (foreign_engine, ("pack bad: onnxruntime", "cannot load graph watch_window", "export the pack again")),
    (unknown_operator, ("pack bad: onnxruntime", "cannot load graph watch_window", "nowhere:Fancy")),
    (other_graph, ("pack bad: watch_window.onnx is not the file", "export the pack again")),
    (lost_graph, ("pack bad: watch_window.onnx is missing", "export the pack again")),
    (other_shape, ("pack bad: graph watch_window: input audio", "export the pack again")),
    (other_labels, ("pack bad: graph watch_window: output action_logits has 3 scores", "export the pack again")),
    (no_manifest, ("manifest.json", "export the pack again")),
]


def settings_with(*packs: Path, **more: Any) -> Settings:
    given = [{"name": str(pack), "backend": "onnxruntime", "require_parity": False} for pack in packs]
    return load_settings(None, {"packs": given, **more})


@pytest.mark.parametrize(("spoil", "said"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_pack_is_one_line_and_the_others_are_loaded(
    tiny_pack: Path, tmp_path: Path, spoil: Callable[[Path], None], said: tuple[str, ...]
) -> None:
    bad = tmp_path / "bad"
    write_tiny_pack(bad, name="bad", parity=False)
    spoil(bad)
    failed: list[FailedPack] = []
    packs = load_packs(settings_with(bad, tiny_pack), tmp_path, failed.append)
    assert [pack.name for pack in packs] == ["tiny"]
    (failure,) = failed
    assert failure.name == "bad" and "\n" not in failure.cause
    for text in said:
        assert text in failure.cause
    for pack in packs:
        for copy in pack.copies:
            copy.close()
    # Where nothing is left, the cause is the error, and nothing is told beside it.
    with pytest.raises(SettingsError, match="bad"):
        load_packs(settings_with(bad), tmp_path, failed.append)
    assert len(failed) == 1


def test_an_absent_pack_does_not_stop_the_others(tiny_pack: Path, tmp_path: Path) -> None:
    failed: list[FailedPack] = []
    settings = load_settings(None, {"packs": [{"name": "nope"}, {"name": str(tiny_pack), "backend": "onnxruntime"}]})
    (pack,) = load_packs(settings, tmp_path, failed.append)
    assert failed[0].name == "nope" and failed[0].cause.startswith("no pack 'nope'")
    assert pack.wanted == PackSettings(name=str(tiny_pack), backend="onnxruntime")


@pytest.fixture
def greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs written now have a graph that asks for 16 TB at its first batch."""
    sane = tinypack._GRAPHS["watch_window"]
    greedy = sane.replace(
        "video_off = Sub (video, video_centre)",
        "many = Constant <value = int64[1] {4000000000000}> ()\n  batches = Shape <start = 0, end = 1> (audio_mask)\n"
        "  much = Mul (many, batches)\n  zeros = ConstantOfShape (much)\n  most = ReduceMax <keepdims = 0> (zeros)\n"
        "  moved = Sub (video, video_centre)\n  video_off = Add (moved, most)",
    )
    assert greedy != sane
    monkeypatch.setitem(tinypack._GRAPHS, "watch_window", greedy)


@pytest.mark.usefixtures("greedy")
async def test_a_service_runs_what_can_be_run_and_shows_the_rest(
    tiny_pack: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = tmp_path / "bad"
    write_tiny_pack(bad, name="bad", parity=False)
    sources = [
        {"id": "both", "url": SCENE, "pace": "fast"},
        {"id": "only", "url": SCENE, "pace": "fast", "packs": ["bad"]},
    ]
    settings = settings_with(bad, tiny_pack, sources=sources)
    collector = Collector()
    # It loads: only its first batch can tell.
    service = Service(settings, load_packs(settings, tmp_path), collector, SystemClock())
    router = packs_router(lambda: service.packs, lambda: list(service.failed_packs.values()), service.swaps)
    app = create_app(settings.http, service.metrics.registry, service.ready.is_set, [router])
    async with asyncio.timeout(180):
        assert await service.run() == []
    assert service.metrics.views.windows == {("tiny", "ok"): 21 + 12}
    assert len(collector.facts("both")) > 5 and collector.facts("only") == []
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert told[0].startswith("pack bad does not run, the others go on without it: pack bad: graph watch_window")
    assert "out of memory" in told[0]
    assert told[1] == "source only: none of its packs runs, nothing looks at it"
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        reports = {one["name"]: one for one in (await client.get("/v1/packs")).json()}
        assert (reports["bad"]["state"], reports["bad"]["pack"]) == ("failed", None)
        assert "out of memory" in reports["bad"]["cause"]
        assert reports["tiny"]["state"] == "serving"
        metrics = (await client.get("/metrics")).text
        assert 'sightwire_pack_up{pack="bad"} 0.0' in metrics and 'sightwire_pack_up{pack="tiny"} 1.0' in metrics


@pytest.mark.usefixtures("greedy")
async def test_a_service_with_nothing_left_ends_with_the_error(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    write_tiny_pack(bad, name="bad", parity=False)
    settings = settings_with(bad, sources=[{"id": "a", "url": SCENE, "pace": "fast"}])
    service = Service(settings, load_packs(settings, tmp_path), Collector(), SystemClock())
    with pytest.raises(InferenceError, match="pack bad: graph watch_window: onnxruntime is out of memory"):
        await service.run()
