"""What must be said of a model, and how it is asked for."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from engines.manifest import Mode
from export.adapters.describe import Description, describe, pack_name, read_stated, timing, unique_labels
from export.build import ExportError

VIDEO: dict[str, Any] = {
    "width": 64,
    "height": 48,
    "frames": 16,
    "fps": 15,
    "layout": "BCTHW",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.2, 0.2, 0.2),
}
HEAD: dict[str, Any] = {"kind": "action", "labels": ["run", "walk"], "activation": "softmax"}
WHOLE: dict[str, Any] = {"name": "net", "video": VIDEO, "heads": {"action": HEAD}}


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def said(known: dict[str, Any], stated: dict[str, Any] | None = None) -> Description:
    return describe("net.onnx", known, stated or {}, None)


def test_a_window_that_is_no_whole_number_of_ns_keeps_its_samples() -> None:
    branch = said(WHOLE).branch()
    assert branch.mode is Mode.CLIP and branch.video is not None
    assert branch.video.samples_in(branch.window_ns) == 16
    assert branch.window_ns == pytest.approx(16e9 / 15, abs=20)
    assert [branch.video.sample_time_ns(n) for n in (0, 1, 15)] == [0, 66_666_667, 15 * 66_666_667]
    assert 2 * branch.hop_ns == branch.window_ns


def test_timing_is_exact_where_it_can_be() -> None:
    assert timing(Fraction(8), 16, 0.5) == (Fraction(8), 2_000_000_000, 500_000_000)
    assert timing(Fraction(8), 16, 0.3) == (Fraction(8), 2_000_000_000, 250_000_000)
    assert timing(Fraction(5, 2), 1, None) == (Fraction(5, 2), 400_000_000, 400_000_000)
    assert timing(Fraction(8), 16, 0.001)[2] == 125_000_000


def test_all_that_is_missing_is_asked_for_at_once() -> None:
    known = {
        "name": "net",
        "video": without(VIDEO, "fps", "mean"),
        "heads": {"action": without(HEAD, "labels")},
    }
    with pytest.raises(ExportError) as caught:
        said(known)
    assert str(caught.value) == (
        "net.onnx: its files do not say heads.action.labels, video.fps, video.mean; "
        "state them in a YAML file (--describe FILE)"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": {}}, "heads: "),
        ({"heads": {"action": without(HEAD, "activation")}}, r"heads.action.activation \(softmax: one label holds"),
        ({"video": VIDEO | {"layout": "BTHW"}}, "video.layout: layout 'BTHW' is not B and then T, H, W and C"),
        ({"video": VIDEO | {"layout": "BCHW"}}, "video: layout BCHW has no T, but there are 16 frames"),
        ({"video": VIDEO | {"crop": (64, 64)}}, r"video: crop \[64, 64\] is larger than the frame, 48 x 64"),
        ({"video": VIDEO | {"std": (0.2, 0.0, 0.2)}}, "video.std.1: Input should be greater than 0"),
        ({"vidoe": VIDEO}, "vidoe: Extra inputs are not permitted"),
        ({"heads": {"mask": {"kind": "segmentation", "labels": [str(n) for n in range(257)]}}}, "at most 256 classes"),
        ({"heads": {"action": HEAD | {"gives": "classes"}}}, "gives: classes is for segmentation"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        said(WHOLE | change)


def test_neither_video_nor_audio_and_audio_without_a_length() -> None:
    with pytest.raises(ExportError, match="do not say video or audio; state it"):
        said(without(WHOLE, "video"))
    with pytest.raises(ExportError, match=r"do not say audio\.window_s"):
        said(without(WHOLE, "video") | {"audio": {"sample_rate": 16000}})


def test_errors_that_only_the_manifest_sees_are_one_line() -> None:
    with pytest.raises(ExportError, match="a label is listed twice"):
        said(WHOLE | {"heads": {"action": HEAD | {"labels": ["run", "run"]}}}).branch()


def test_a_file_states_over_what_is_known_and_labels_may_have_their_own(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("sit\nstand\n\n")
    path = tmp_path / "net.yaml"
    path.write_text("video: {fps: 7.5}\nheads: {pose: {labels: names.txt, thresholds: {sit: {on: 0.7, off: 0.4}}}}\n")
    description = describe("net", WHOLE, read_stated(path), path)
    assert description.video is not None and description.video.fps == Fraction(15, 2)
    assert description.video.width == 64
    # A single head may be given another name.
    (head,) = description.branch().heads
    assert (head.name, head.labels, head.activation) == ("pose", ("sit", "stand"), "softmax")
    assert head.thresholds["sit"].on == 0.7


def test_words_of_truth_are_labels(tmp_path: Path) -> None:
    path = tmp_path / "net.yaml"
    path.write_text("labels: [yes, no, on, off, true]\n")
    assert read_stated(path) == {"labels": ["yes", "no", "on", "off", True]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "net.yaml is no mapping; give a YAML file with the keys of a description"),
        ("a: [\n", "net.yaml is not YAML"),
        ("heads: {action: {labels: gone.txt}}\n", r"net.yaml: heads.action.labels: gone.txt cannot be read"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "net.yaml"
    path.write_text(text)
    with pytest.raises(ExportError, match=message) as caught:
        read_stated(path)
    assert "\n" not in str(caught.value)


def test_an_absent_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no description at .*gone.yaml"):
        read_stated(tmp_path / "gone.yaml")


def test_names_and_labels() -> None:
    assert pack_name("VideoMAE base/Finetuned!") == "videomae-base-finetuned"
    assert pack_name("3d") == "model-3d"
    assert unique_labels(["crane", " crane ", "x" * 70, "x" * 71]) == ["crane", "crane 2", "x" * 64, "x" * 60 + " 2"]
