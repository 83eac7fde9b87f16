"""`verify` and `evaluate` on packs that remember: hop by hop, against PyTorch, and as the service runs them."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from rich.console import Console

from engines.fake import FakeEngine
from engines.manifest import Branch, Manifest, file_sha256, read_manifest, write_manifest
from engines.open import LoadedPack, open_pack
from engines.parity import read_parity
from engines.tinystateful import step
from export.build import PackToWrite, write_pack
from export.evaluate import evaluate_pack
from export.rows import row_windows
from export.source import Note, remember, source_of
from export.streamed import streamed
from export.verify import FALLBACK, Verification, verify_pack
from export.verify_report import html_report, terminal_tables
from models.data.manifest import Row
from models.metrics import auroc
from stream.accounting import Ledger
from stream.inference import PackRunner
from stream.memory import SourceMemory
from stream.types import ClipWindow
from stream.windows import Grace, SourceWindows, Watch
from tests.export.stateful import clip_file, small_pack
from tests.stream.ingest.media import Clip, make_clip, run_source


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PackToWrite]:
    """A folder with a stateful pack and a clip, not to be changed, and what the pack was written from."""
    folder = tmp_path_factory.mktemp("exported")
    pack, _ = small_pack()
    write_pack(pack, folder / "pack", clips=None)
    clip_file(folder)
    return folder, pack


@pytest.fixture
def small(exported: tuple[Path, PackToWrite], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, and a cache that knows of the pack as one that was exported here."""
    master, pack = exported
    folder = Path(shutil.copytree(master, tmp_path / "own"))
    note = Note(model="runs/own")
    manifest = read_manifest(folder / "pack").model_copy(update={"source": source_of(note)})
    write_manifest(folder / "pack", manifest)
    remember(note, manifest, folder / "cache")
    monkeypatch.setattr("export.model.read_model", lambda what, options: pack)
    return folder


def verified(folder: Path, **more: object) -> Verification:
    options: dict[str, object] = {"clips": [folder / "scenes.mkv"], "cache": folder / "cache", "batch_sizes": (1,)}
    return verify_pack(folder / "pack", **(options | more))  # type: ignore[arg-type]


def text_of(found: Verification) -> str:
    console = Console(width=300, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in terminal_tables(found):
        console.print(part)
    return console.export_text()


def test_every_backend_streams_the_same_frames_as_pytorch(small: Path) -> None:
    found = verified(small)
    assert found.no_torch == "" and found.problems == []
    engines = {(one.backend, one.precision): one.parity for one in found.results}
    assert {("onnxruntime", "fp32"), ("torch", "fp32")} <= engines.keys()
    for (backend, _), parity in engines.items():
        # Three windows of four hops, once as they are and once with half the frames missing; PyTorch is only timed.
        assert parity is not None and parity.passed and parity.samples == (1 if backend == "torch" else 2 * 3 * 4)
        assert [out.tensor for out in parity.outputs] == ["act", "place"]
    assert [clip.windows for clip in found.clips] == [24]
    report = read_parity(small / "pack")
    assert report is not None and {entry.reference for entry in report.entries} == {None}
    open_pack(small / "pack", backend="onnxruntime").close()


def test_table_and_page_of_a_pack_whose_states_are_pictures(tiny_stateful_pack: Path, small: Path) -> None:
    """A state of bytes is no mask: nothing is said of pixels."""
    for path in tiny_stateful_pack.iterdir():
        (small / "pack" / path.name).write_bytes(path.read_bytes())
    found = verified(small, only_backends=["onnxruntime"])
    assert found.reference.startswith(FALLBACK)
    assert "px" not in text_of(found).replace("equal px", "")
    page = html_report(found, datetime.now(UTC))
    assert "largest absolute difference" in page and "share of the pixels" not in page
    assert page.count("<svg") == 3


def test_states_that_die_out_are_over_the_bound(small: Path) -> None:
    """The answer to the first hop is right; only what comes of the states is not."""
    path = small / "pack" / "window.onnx"
    model = onnx.load(path)
    nodes = model.graph.node
    maker = next(node for node in nodes if "next_past_1" in node.output)
    maker.output[list(maker.output).index("next_past_1")] = "alive"
    for node in nodes:
        for n, name in enumerate(node.input):
            if name == "next_past_1":
                node.input[n] = "alive"
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "half"))
    nodes.append(onnx.helper.make_node("Mul", ["alive", "half"], ["next_past_1"], name="forgets"))
    path.write_bytes(model.SerializeToString())
    manifest = read_manifest(small / "pack")
    graph = manifest.graphs[0].model_copy(update={"sha256": file_sha256(path)})
    write_manifest(small / "pack", manifest := manifest.model_copy(update={"graphs": (graph,)}))
    remember(Note(model="runs/own"), manifest, small / "cache")
    found = verified(small, only_backends=["onnxruntime"], precisions=["fp32"])
    (line,) = found.problems
    assert line.startswith("pack own: graph window on onnxruntime fp32: output act is off by")
    (one,) = found.results
    assert one.parity is not None and one.window not in (None, 0)
    assert one.parity.outputs[0].window_errors[0] < 1e-4 < max(one.parity.outputs[0].window_errors)


@pytest.fixture(scope="module")
def tiny(tiny_stateful_pack: Path) -> LoadedPack:
    return open_pack(tiny_stateful_pack, backend="onnxruntime")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark and quiet; a beep; a flash; pictures that stop for a while; sound alone."""
    folder = tmp_path_factory.mktemp("clips")
    make_clip(folder / "dark.mp4", Clip(seconds=4))
    make_clip(folder / "beep.mp4", Clip(seconds=3, beep_s=1.5))
    make_clip(folder / "flash.mp4", Clip(seconds=4, flash_s=2.2))
    make_clip(folder / "sound.mkv", Clip(seconds=3, video=None, beep_s=0.5))
    gap(folder / "gap.mkv")
    return folder


def gap(path: Path) -> None:
    """Ten grey levels a second, without the frames from 2.05 s to 4.05 s."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("ffv1", rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv444p"
        for n in range(60):
            if 20 < n <= 40:
                continue
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 4 * n, np.uint8), format="rgb24")
            frame.pts, frame.time_base = n, Fraction(1, 10)
            out.mux(video.encode(frame))
        out.mux(video.encode())


def service_windows(path: Path, branch: Branch) -> list[ClipWindow]:
    """What the service cuts from a file."""
    inputs = () if branch.video is None else (branch.video,)
    run = run_source(path, inputs, None if branch.audio is None else branch.audio.sample_rate)
    assert run.error is None
    cutter = SourceWindows([Watch("tiny", branch)], Grace(0, None), Ledger())
    return [window for item in run.items for window in cutter.push(item, 0)]


@pytest.mark.parametrize("name", ["dark.mp4", "beep.mp4", "flash.mp4", "gap.mkv"])
def test_answers_are_those_of_the_service(tiny: LoadedPack, clips: Path, name: str) -> None:
    (branch,) = tiny.manifest.branches
    windows = service_windows(clips / name, branch)
    assert len(windows) > 2
    runner = PackRunner(tiny, SourceMemory())
    # One window after the other, as a live source has them.
    wanted = [runner.run(branch.name, (window,))[0][0].scores for window in windows]
    cut = row_windows("here", Row(path=clips / name), branch)
    logits = np.concatenate([found["action"] for found in streamed(tiny.engines[branch.graph], branch, cut)])
    assert len(logits) == len(wanted)
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), np.stack([s for s in wanted if s is not None]), atol=1e-3)
    assert np.ptp(logits, axis=0).max() > 0.01


def test_each_row_begins_with_an_empty_past(tiny_stateful_pack: Path, clips: Path) -> None:
    """A bright picture before would show in the average; order and company of rows make no difference."""
    lines = ["dark.mp4,bright", "beep.mp4,loud", "flash.mp4,moving", "gap.mkv,bright"]
    found = []
    for order in (lines, lines[::-1]):
        table = clips / "rows.csv"
        table.write_text("\n".join(["path,label:action", *order]) + "\n")
        found.append(
            evaluate_pack(tiny_stateful_pack, table, backend="onnxruntime", report=lambda *told: None, draws=20)
        )
    exact = {name for name in found[0] if not name.endswith(("_low", "_high"))}
    assert {name: found[0][name] for name in exact} == {name: found[1][name] for name in exact}
    assert found[0]["action_loud_auc"] == auroc(np.array([0, 1, 0, 0]), np.array([False, True, False, False]))


class Counted(FakeEngine):
    """The tiny graph in numpy, with a note of every call."""

    def __init__(self, manifest: Manifest) -> None:
        self.calls: list[dict[str, np.ndarray]] = []

        def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            self.calls.append(dict(inputs))
            return step(inputs)

        super().__init__("tiny-stateful", manifest.graphs[0], run)  # type: ignore[arg-type]


def test_a_window_is_seen_once(tiny: LoadedPack, clips: Path) -> None:
    """Four hops of the first window, one of each later one; the empty past is zeros."""
    (branch,) = tiny.manifest.branches
    engine = Counted(tiny.manifest)
    parts = list(streamed(engine, branch, row_windows("here", Row(path=clips / "dark.mp4"), branch)))
    assert len(parts) == 5 and len(engine.calls) == 4 + 4
    past = [call["average"].any() for call in engine.calls]
    assert past == [False] + [True] * 7


def test_without_pictures_nothing_is_remembered(tiny: LoadedPack, clips: Path) -> None:
    (branch,) = tiny.manifest.branches
    engine = Counted(tiny.manifest)
    parts = list(streamed(engine, branch, row_windows("here", Row(path=clips / "sound.mkv"), branch)))
    assert len(parts) == len(engine.calls) == 3
    for call in engine.calls:
        assert not call["average"].any() and not call["frame_mask"].any() and not call["frames"].any()
    assert np.ptp([part["action"][0, 2] for part in parts]) > 0.1
