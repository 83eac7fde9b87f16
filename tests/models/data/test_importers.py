"""Manifests made from folders: those of the training data, and the usual layouts written here."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from models.basepack.captions import clean_title
from models.data.importers import KINDS, ImportOptions, found_labels, import_folder
from models.data.manifest import Manifest, read_manifest
from models.errors import DataError

OURS = {
    "fights": ("actions/fights", 239, 2),
    "gmdcsa24": ("actions/gmdcsa24", 59, 5),
    "ut-interaction": ("actions/ut-interaction", 96, 6),
    "weizmann": ("actions/weizmann", 65, 9),
    "esc10": ("sounds/esc10", 320, 10),
    "camvid": ("segmentation/camvid", 468, 0),
}


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return folder


def splits(manifest: Manifest) -> dict[str, str]:
    return {row.path.name: row.split for row in manifest.rows}


@pytest.mark.parametrize("kind", sorted(OURS))
def test_our_folders(data: Path, tmp_path: Path, kind: str) -> None:
    place, rows, labels = OURS[kind]
    out = tmp_path / f"{kind}.csv"
    written = import_folder(kind, data / place, out)
    read = read_manifest(out)
    assert len(read.rows) == len(written.rows) == rows
    for a, b in zip(read.rows, written.rows, strict=True):
        assert (a.line, a.labels, a.caption, a.split, a.group) == (b.line, b.labels, b.caption, b.split, b.group)
    assert sum(map(len, found_labels(read).values())) == labels
    groups = {split: {row.group for row in read.rows if row.split == split} for split in ("train", "val")}
    assert groups["train"] and groups["val"] and not groups["train"] & groups["val"]
    assert all(row.group for row in read.rows)


def test_gmdcsa_spans_and_sentences(data: Path, tmp_path: Path) -> None:
    rows = import_folder("gmdcsa24", data / "actions" / "gmdcsa24", tmp_path / "m.csv").rows
    clip = [row for row in rows if row.path.name == "Subject_2_Fall_13.mp4"]
    whole, parts = clip[0], clip[1:]
    assert whole.caption and not whole.labels and whole.start is None
    assert all(row.labels["action"] and not row.caption for row in parts)
    assert any("fall" in row.labels["action"] for row in parts)
    assert all(a.end <= b.start for a, b in pairwise(parts))  # type: ignore[operator]
    assert all("[" not in row.caption and not row.caption.endswith(",") for row in rows)
    assert any(len(row.labels.get("action", ())) == 2 for row in rows), "two classes at once"


def test_esc10_titles(data: Path, tmp_path: Path) -> None:
    manifest = import_folder("esc10", data / "sounds" / "esc10", tmp_path / "m.csv")
    assert {row.path.name[4] for row in manifest.rows if row.split == "val"} == {"4"}
    assert sum(bool(row.caption) for row in manifest.rows) > 250
    silent = import_folder("esc10", data / "sounds" / "esc10", tmp_path / "n.csv", ImportOptions(captions="none"))
    assert not any(row.caption for row in silent.rows)
    assert clean_title("20081231.fire.02.wav") == "fire"
    assert clean_title("Fire Crackling 01.mp3") == "fire crackling"
    assert clean_title("001.wav") == ""


def test_captions_from_labels_only_if_asked(data: Path, tmp_path: Path) -> None:
    folder = data / "actions" / "weizmann"
    assert not any(row.caption for row in import_folder("weizmann", folder, tmp_path / "a.csv").rows)
    asked = import_folder("weizmann", folder, tmp_path / "b.jsonl", ImportOptions(captions="label"))
    assert "This is wave one hand." in {row.caption for row in asked.rows}


def test_folder_per_class(tmp_path: Path) -> None:
    names = [f"{label}/{source}_{n}.mp4" for label in ("run", "walk") for source in "abcdefgh" for n in range(3)]
    folder = touch(tmp_path / "set", *names, "run/notes.txt")
    with pytest.raises(DataError, match="has no group, so a split may leak"):
        import_folder("classes", folder, tmp_path / "m.csv")
    assert not (tmp_path / "m.csv").exists()
    manifest = import_folder("classes", folder, tmp_path / "m.csv", ImportOptions(group=r"(\w)_\d", val_share=0.25))
    assert Counter(row.split for row in manifest.rows) == {"train": 36, "val": 12}
    assert found_labels(manifest) == {"class": ("run", "walk")}
    free = import_folder("classes", folder, tmp_path / "m.csv", ImportOptions(independent=True))
    assert {row.split for row in free.rows} == {"train", "val"}
    # By the file's name alone, as the documentation has it, or by a folder's.
    by_name = import_folder("classes", folder, tmp_path / "m.csv", ImportOptions(group=r"^(\w)_", val_share=0.25))
    assert Counter(row.split for row in by_name.rows) == {"train": 36, "val": 12}
    by_path = import_folder("classes", folder, tmp_path / "m.csv", ImportOptions(group=r"^\w+/(\w)", val_share=0.25))
    assert {row.group for row in by_path.rows} == set("abcdefgh")
    for pattern, expected in ((r"camera(\d)", "finds no source"), ("(", "not a pattern")):
        with pytest.raises(DataError, match=expected):
            import_folder("classes", folder, tmp_path / "m.csv", ImportOptions(group=pattern))


def test_folder_per_class_with_splits(tmp_path: Path) -> None:
    folder = touch(tmp_path / "set", "train/run/a.mp4", "train/walk/b.mp4", "validation/run/c.mp4", "test/walk/d.mp4")
    manifest = import_folder("classes", folder, tmp_path / "m.csv")
    assert splits(manifest) == {"a.mp4": "train", "b.mp4": "train", "c.mp4": "val", "d.mp4": "test"}


def test_kinetics(tmp_path: Path) -> None:
    folder = touch(tmp_path / "k", "val/riding/abc_000010_000020.mp4", "whole.mp4", "t1.mp4")
    table = folder / "kinetics.csv"
    table.write_text(
        "label,youtube_id,time_start,time_end,split\n"
        "riding a bike,abc,10,20,validate\n"
        "surfing,gone,0,10,train\n"
        "surfing,whole,5,15,train\n"
        ",t1,0,10,test\n"
    )
    manifest = import_folder("kinetics", folder, tmp_path / "m.csv")
    cut, whole, test = manifest.rows
    assert (cut.split, cut.start, cut.labels, cut.group) == ("val", None, {"action": ("riding a bike",)}, "abc")
    assert (whole.split, whole.start, whole.end) == ("train", 5.0, 15.0)
    assert (test.split, test.labels) == ("test", {})
    table.write_text("label,youtube_id,time_start,time_end,split\nsurfing,whole,soon,15,train\n")
    with pytest.raises(DataError, match=r"kinetics\.csv:2: 'soon' is not a number"):
        import_folder("kinetics", folder, tmp_path / "m.csv")
    table.write_text("label,youtube_id,time_start,time_end,split\nsurfing,whole,1,15,trian\n")
    with pytest.raises(DataError, match=r"kinetics\.csv:2: unknown split 'trian'"):
        import_folder("kinetics", folder, tmp_path / "m.csv")


def test_esc50(tmp_path: Path) -> None:
    folder = touch(tmp_path / "esc", "audio/1-100-A-0.wav", "audio/1-100-B-0.wav", "audio/5-200-A-1.wav")
    (folder / "meta").mkdir()
    table = folder / "meta" / "esc50.csv"
    head = "filename,fold,target,category,esc10,src_file,take\n"
    table.write_text(
        head + "1-100-A-0.wav,1,0,dog,True,100,A\n1-100-B-0.wav,1,0,dog,True,100,B\n5-200-A-1.wav,5,1,rain,True,200,A\n"
    )
    rows = import_folder("esc50", folder, tmp_path / "m.csv").rows
    assert [(row.split, row.group, row.labels["class"][0]) for row in rows] == [
        ("train", "100", "dog"),
        ("train", "100", "dog"),
        ("val", "200", "rain"),
    ]
    table.write_text(head + "9-9-A-0.wav,1,0,dog,True,9,A\n")
    with pytest.raises(DataError, match=r"esc50\.csv:2: 9-9-A-0\.wav is not below"):
        import_folder("esc50", folder, tmp_path / "m.csv")


@pytest.mark.parametrize(
    "names",
    [
        ("train/images/a.jpg", "train/masks/a.png", "val/images/b.jpg", "val/masks/b.png"),
        ("train/images/a.jpg", "train/labels/a.png", "val/images/b.jpg", "val/labels/b.png"),
        ("train/a.png", "trainannot/a.png", "val/b.png", "valannot/b.png"),
        (
            "leftImg8bit/train/bonn/a_leftImg8bit.png",
            "gtFine/train/bonn/a_gtFine_labelTrainIds.png",
            "leftImg8bit/val/ulm/b_leftImg8bit.png",
            "gtFine/val/ulm/b_gtFine_labelTrainIds.png",
        ),
    ],
)
def test_masks_in_parallel_folders(tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = touch(tmp_path / "set", *names)
    rows = import_folder("masks", folder, tmp_path / "m.csv", ImportOptions(void=11)).rows
    assert [(row.path, row.mask, row.split) for row in rows] == [
        (folder / names[0], folder / names[1], "train"),
        (folder / names[2], folder / names[3], "val"),
    ]
    (folder / names[1]).unlink()
    with pytest.raises(DataError, match="has no mask"):
        import_folder("masks", folder, tmp_path / "m.csv")


def test_pictures_without_splits(tmp_path: Path) -> None:
    names = [f"{part}/{drive}_{n}.png" for drive in "abcd" for n in range(5) for part in ("images", "masks")]
    folder = touch(tmp_path / "set", *names)
    with pytest.raises(DataError, match="may leak"):
        import_folder("masks", folder, tmp_path / "m.csv")
    rows = import_folder("masks", folder, tmp_path / "m.csv", ImportOptions(group="^([a-d])_", val_share=0.3)).rows
    assert Counter(row.split for row in rows) == {"train": 15, "val": 5}


def test_camvid_voids(data: Path, tmp_path: Path) -> None:
    rows = import_folder("camvid", data / "segmentation" / "camvid", tmp_path / "m.csv").rows
    assert {row.void for row in rows} == {11}
    assert Counter(row.split for row in rows) == {"train": 367, "val": 101}
    assert np.all([row.mask is not None for row in rows])


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_another_layout_is_one_line(tmp_path: Path, kind: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        import_folder(kind, tmp_path / "empty", tmp_path / "m.csv")
    assert "\n" not in str(caught.value) and "empty" in str(caught.value)
    assert not (tmp_path / "m.csv").exists()


def test_bad_requests(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown kind 'imagenet' of data set; known are fights"):
        import_folder("imagenet", tmp_path, tmp_path / "m.csv")
    with pytest.raises(DataError, match=r"a manifest is \.csv or \.jsonl"):
        import_folder("fights", tmp_path, tmp_path / "m.txt")
    with pytest.raises(DataError, match="no folder"):
        import_folder("fights", tmp_path / "nowhere", tmp_path / "m.csv")
