"""A pack's report on a manifest: what the service would have said, measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from engines.errors import PackNotFound
from engines.manifest import Branch, Manifest, read_manifest, write_manifest
from engines.open import LoadedPack, open_pack
from export.evaluate import evaluate_pack
from export.rows import row_windows
from models.data.manifest import Row
from models.errors import DataError, ModelError
from models.metrics import auroc
from stream.accounting import Ledger
from stream.inference import PackRunner
from stream.memory import SourceMemory
from stream.samples import samples_of
from stream.types import ClipWindow
from stream.windows import Grace, SourceWindows, Watch
from tests.stream.ingest.media import Clip, make_clip, run_source

DATA = Path(__file__).parents[2].parent / "shared" / "data"
REAL = (
    "actions/gmdcsa24/Subject_2_Fall_12.mp4",
    "actions/fights/fi003.mp4",
    "actions/weizmann/daria_bend.mp4",
    "sounds/esc10/001_4-182395-A.flac",
)
"""Variable frame rate and sound; a short clip with sound; one without sound; sound alone."""


@pytest.fixture(scope="module")
def pack(tiny_pack: Path) -> Iterator[LoadedPack]:
    loaded = open_pack(tiny_pack, backend="onnxruntime")
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark and quiet, dark and loud, bright and quiet, a picture with its mask."""
    folder = tmp_path_factory.mktemp("clips")
    make_clip(folder / "dark.mp4", Clip(seconds=3))
    make_clip(folder / "beep.mp4", Clip(seconds=3, beep_s=0.5))
    write_bright(folder / "bright.mp4")
    write_tone(folder / "tone.flac")
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, 16:] = 255
    write_picture(folder / "half.png", half)
    truth = np.zeros((32, 32), np.uint8)
    truth[:, 8:] = 1
    truth[:16] = 9
    write_picture(folder / "half_mask.png", truth)
    return folder


def write_bright(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for n in range(75):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 240, np.uint8), "rgb24")
            frame.pts, frame.time_base = n, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_tone(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=16_000, layout="mono")
        wave = (12_000 * np.sin(2 * np.pi * 440 * np.arange(48_000) / 16_000)).astype(np.int16)
        for first in range(0, len(wave), 4096):
            frame = av.AudioFrame.from_ndarray(wave[None, first : first + 4096], "s16", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 16_000, first, Fraction(1, 16_000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_picture(path: Path, pixels: np.ndarray) -> None:
    form = "gray" if pixels.ndim == 2 else "rgb24"
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width = pixels.shape[:2]
        stream.pix_fmt = form
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, form)))
        container.mux(stream.encode(None))


def manifest(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def evaluate(tiny_pack: Path, table: Path, **options: object) -> dict[str, float | None]:
    settings: dict[str, object] = {"backend": "onnxruntime", "report": lambda *told: None, "draws": 20} | options
    return evaluate_pack(tiny_pack, table, **settings)  # type: ignore[arg-type]


def service_windows(path: Path, branch: Branch) -> list[ClipWindow]:
    """What the service cuts from a file."""
    inputs = () if branch.video is None else (branch.video,)
    run = run_source(path, inputs, None if branch.audio is None else branch.audio.sample_rate)
    assert run.error is None
    cutter = SourceWindows([Watch("tiny", branch)], Grace(0, None), Ledger())
    return [window for item in run.items for window in cutter.push(item, 0)]


@pytest.mark.parametrize("name", REAL)
def test_windows_are_those_of_the_service(pack: LoadedPack, name: str) -> None:
    path = DATA / name
    if not path.is_file():
        pytest.skip("the training data is not here (../shared/data)")
    branch = pack.manifest.branches[0]
    theirs = service_windows(path, branch)
    assert theirs
    ours = [(part, n) for part in row_windows("here", Row(path=path), branch) for n in range(len(part.samples))]
    assert len(ours) == len(theirs)
    for (part, n), window in zip(ours, theirs, strict=True):
        wanted = samples_of(window)
        present = part.present[part.samples[n]]
        assert present.tolist() == [sample is not None for sample in wanted]
        for t in np.flatnonzero(present):
            pair = np.stack([frame.image for frame in wanted[t] or ()])
            assert np.array_equal(part.frames[part.samples[n, t]], pair)
        assert window.audio is not None
        np.testing.assert_allclose(part.audio[n], window.audio, atol=1e-5)
        assert part.coverage[n] == pytest.approx(window.audio_coverage, abs=1e-3)


def test_scores_are_those_of_the_service(pack: LoadedPack, tiny_pack: Path, clips: Path) -> None:
    branch = pack.manifest.branches[0]
    names, loud = ("dark.mp4", "beep.mp4", "bright.mp4"), []
    for name in names:
        windows = service_windows(clips / name, branch)
        answers = PackRunner(pack, SourceMemory()).run(branch.name, tuple(windows))
        loud.append(np.mean([action.scores[2] for action, _ in answers if action.scores is not None]))
    table = manifest(clips, "loud.csv", "path,label:action\ndark.mp4,bright\nbeep.mp4,loud\nbright.mp4,bright\n")
    found = evaluate(tiny_pack, table)
    assert found["action_loud_auc"] == auroc(np.array(loud), np.array([False, True, False]))
    assert found["action_loud_recall"] == float(loud[1] >= 0.7)


def test_recordings_sounds_and_pictures_in_one_manifest(tiny_pack: Path, clips: Path, tmp_path: Path) -> None:
    table = manifest(
        clips,
        "all.csv",
        "path,start,end,mask,void,group,label:action,label:class\n"
        "bright.mp4,,,,,a,bright,none\n"
        "dark.mp4,,,,,b,-,none\n"
        "beep.mp4,0.5,1.0,,,c,loud,\n"
        "tone.flac,,,,,d,loud,sound\n"
        "half.png,,,half_mask.png,9,e,,\n",
    )
    found = evaluate(tiny_pack, table, out=tmp_path / "report")
    assert found["action_choice_accuracy"] == 1.0
    assert found["action_bright_auc"] == 1.0
    assert found["class_accuracy"] == 1.0
    # Of the lower half a quarter is dark in truth, half in the answer; the upper half is void.
    assert found["scene_pixel_accuracy"] == 0.75
    assert found["scene_dark_iou"] == 0.5
    assert found["scene_light_iou"] == pytest.approx(2 / 3, abs=1e-4)
    assert json.loads((tmp_path / "report" / "metrics.json").read_text()) == found
    text = (tmp_path / "report" / "report.md").read_text()
    assert "# Report: pack tiny" in text
    assert (tmp_path / "report" / "scene_examples.png").is_file()


def test_long_rows_are_read_in_pieces(pack: LoadedPack, tmp_path: Path) -> None:
    path = make_clip(tmp_path / "long.mkv", Clip(seconds=23, size=(64, 48), audio=None))
    branch = pack.manifest.branches[0]
    parts = list(row_windows("here", Row(path=path), branch))
    assert len(parts) > 1
    theirs = service_windows(path, branch)
    assert sum(len(part.samples) for part in parts) == len(theirs)
    frames = np.concatenate([part.frames[part.samples] for part in parts])
    wanted = np.stack(
        [np.stack([np.stack([f.image for f in sample or ()]) for sample in samples_of(w)]) for w in theirs]
    )
    assert np.array_equal(frames, wanted)


def test_missing_samples_repeat_the_nearest_in_clip_mode(pack: LoadedPack, clips: Path) -> None:
    scene = pack.manifest.branches[1]
    wide = scene.model_copy(update={"window_ns": 6_000_000_000})
    (windows,) = row_windows("here", Row(path=clips / "bright.mp4"), wide)
    assert windows.present[windows.samples].tolist() == [[True, True, True, True, False, False]]
    assert windows.clips().shape == (1, 6, 32, 32, 3)
    assert windows.clips()[0, 5].min() > 200


def test_group_and_split_choose_rows(tiny_pack: Path, clips: Path) -> None:
    table = manifest(
        clips, "split.csv", "path,split,label:action\nbright.mp4,test,bright\nbeep.mp4,test,loud\ndark.mp4,val,loud\n"
    )
    assert evaluate(tiny_pack, table)["action_choice_accuracy"] == 1.0
    assert evaluate(tiny_pack, table, split="val")["action_loud_recall"] == 0.0
    with pytest.raises(DataError, match=r"has no rows of split train \(there are: test, val\)"):
        evaluate(tiny_pack, table, split="train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bright.mp4,,,,,shiny", r"bad\.csv:2: unknown label 'shiny' of head action; known are bright, moving, loud"),
        ("none.mp4,,,,,loud", r"bad\.csv:2: no file .*none\.mp4"),
        ("broken.mp4,,,,,loud", r"bad\.csv:2: .*broken\.mp4 cannot be read"),
        ("bright.mp4,9,,,,loud", r"bad\.csv:2: the row starts at 9 s, bright\.mp4 ends at 3\.00 s"),
        ("tone.flac,,,half_mask.png,,", r"bad\.csv:2: tone\.flac holds no pictures, which branch scene takes"),
        ("half.png,,,half_mask.png,,", r"bad\.csv:2: .*half_mask\.png has index 9, the head has 2 labels"),
        ("bright.mp4,,,,,", r"bad\.csv: no row says anything about a head of pack tiny"),
    ],
)
def test_bad_rows_are_one_line_with_file_and_line(tiny_pack: Path, clips: Path, line: str, message: str) -> None:
    (clips / "broken.mp4").write_bytes(b"\0" * 500)
    table = manifest(clips, "bad.csv", f"path,start,end,mask,void,label:action\n{line}\n")
    with pytest.raises(DataError, match=message) as caught:
        evaluate(tiny_pack, table)
    assert "\n" not in str(caught.value)


def test_columns_of_no_head_are_named(tiny_pack: Path, clips: Path) -> None:
    table = manifest(clips, "other.csv", "path,label:gesture\nbright.mp4,wave\n")
    with pytest.raises(DataError, match=r"its columns are gesture; fill a column label:action, label:class or mask"):
        evaluate(tiny_pack, table)


def test_what_cannot_be_evaluated_is_said(tiny_pack: Path, clips: Path, tmp_path: Path) -> None:
    with pytest.raises(PackNotFound):
        evaluate(tmp_path / "none", manifest(clips, "one.csv", "path,label:action\nbright.mp4,bright\n"))
    strange = tmp_path / "strange"
    strange.mkdir()
    for path in tiny_pack.iterdir():
        (strange / path.name).write_bytes(path.read_bytes())
    text = read_manifest(strange).model_dump()
    text["branches"][0]["audio"]["sample_rate"] = 8000
    write_manifest(strange, Manifest.model_validate(text))
    with pytest.raises(ModelError, match="branch watch takes sound at 8000 Hz"):
        evaluate(strange, clips / "one.csv")
