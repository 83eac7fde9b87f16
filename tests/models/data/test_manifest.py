"""What a manifest may say, and what is said when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.config import HeadConfig
from models.data.manifest import Manifest, Row, read_manifest, write_manifest
from models.errors import DataError

ACTION = HeadConfig(name="action", kind="action", labels=("run", "walk"), multi_label=True)
CLASS = HeadConfig(name="class", kind="class", labels=("quiet", "loud"), background=("quiet",))
PICTURE = HeadConfig(name="street", kind="segmentation", labels=("road", "sky"))
DIALOGUE = HeadConfig(name="talk", kind="dialogue")
HEADS = (ACTION, CLASS)


@pytest.fixture(autouse=True)
def _files(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4", "c.mp4", "m.png"):
        (tmp_path / name).write_bytes(b"x")


def read(
    tmp_path: Path, text: str | bytes, name: str = "m.csv", heads: tuple[HeadConfig, ...] | None = HEADS
) -> Manifest:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_manifest(path, heads)


GOOD = (
    "path,start,end,label:action,class,caption,split,group\n"
    'a.mp4,0.5,2,run|walk,loud,"One, then\nanother",train,g1\n'
    "b.mp4,,,-,-,,train,g2\n"
    "\n"
    "c.mp4,,,,-,,val,g3\n"
)


def test_a_table_is_read(tmp_path: Path) -> None:
    first, second, third = read(tmp_path, GOOD).rows
    assert (first.path, first.start, first.end, first.line) == (tmp_path / "a.mp4", 0.5, 2.0, 2)
    assert first.labels == {"action": ("run", "walk"), "class": ("loud",)}
    assert first.caption == "One, then\nanother"
    assert (second.labels, second.start, second.line) == ({"action": (), "class": ("quiet",)}, None, 4)
    assert (third.labels, third.split, third.line) == ({"class": ("quiet",)}, "val", 6), "none means background"


def test_both_formats_hold_the_same(tmp_path: Path) -> None:
    manifest = read(tmp_path, GOOD)
    (tmp_path / "other").mkdir()
    for name in ("again.csv", "again.jsonl", "other/again.jsonl"):
        path = tmp_path / name
        write_manifest(path, manifest.rows)
        again = read_manifest(path, HEADS)
        for row, copy in zip(manifest.rows, again.rows, strict=True):
            assert copy.path.samefile(row.path)
            assert copy.model_dump(exclude={"line", "path"}) == row.model_dump(exclude={"line", "path"})
    assert not list(tmp_path.glob("*.part"))


def test_json_lines(tmp_path: Path) -> None:
    text = (
        '{"path": "a.mp4", "labels": {"action": "run", "class": null}}\n\n'
        '{"path": "b.mp4", "labels": {"action": ["walk"], "class": ["loud"]}, "mask": null, "start": 1}\n'
        '{"path": "c.mp4", "labels": {"class": []}}\n'
    )
    rows = read(tmp_path, text, "m.jsonl").rows
    assert rows[0].labels == {"action": ("run",)}
    assert (rows[1].start, rows[1].line, rows[2].labels["class"]) == (1.0, 3, ("quiet",))


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a.mp4,run\n", 1, "no column path"),
        ("", 1, "no column path"),
        ("path,path\na.mp4,b.mp4\n", 1, "column path is there twice"),
        ("path,action\na.mp4,run\nb.mp4,fly\n", 3, "unknown label 'fly' of head action; known are run, walk"),
        ("path,class\na.mp4,loud|quiet\n", 2, "takes one label, not 2"),
        ("path,split\na.mp4,trian\n", 2, "split: Input should be 'train', 'val', 'test' or 'unlabelled'"),
        ("path,start,end\na.mp4,5,4\n", 2, "the end at 4 s is not after the start at 5 s"),
        ("path,end\na.mp4,0\n", 2, "the end at 0 s is not after"),
        ("path,start\na.mp4,-1\n", 2, "start: Input should be greater than or equal to 0"),
        ("path,start\na.mp4,nan\n", 2, "start: Input should be a finite number"),
        ("path,start\na.mp4,soon\n", 2, "start: Input should be a valid number"),
        ("path\nlost.mp4\n", 2, "no file .*lost.mp4"),
        ("path,mask\na.mp4,lost.png\n", 2, "no mask .*lost.png"),
        ("path,void\na.mp4,300\n", 2, "void: Input should be less than or equal to 255"),
        ("path,answer\na.mp4,Yes.\n", 2, "an answer without a question"),
        ("path,caption\na.mp4,one, two\n", 2, "3 cells where the header has 2"),
        ('path,caption\na.mp4,"one\n', 2, "not CSV"),
        (b"path,caption\na.mp4,fine\nb.mp4,caf\xe9\n", 3, "not UTF-8"),
    ],
)
def test_bad_tables_name_the_line(tmp_path: Path, text: str | bytes, line: int, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, text)
    assert f"m.csv:{line}: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('{"path": "a.mp4"}\n{"path": }\n', 2, "not JSON"),
        ('["a.mp4"]\n', 1, 'no "path"'),
        ('{"path": "a.mp4", "colour": 3}\n', 1, "colour: Extra inputs"),
        ('{"path": "a.mp4", "labels": ["run"]}\n', 1, "labels: Input should be a valid dictionary"),
        ('{"path": "a.mp4", "labels": {"action": ["run", "fly"]}}\n', 1, "unknown label 'fly'"),
    ],
)
def test_bad_json_lines_name_the_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, text, "m.jsonl")
    assert f"m.jsonl:{line}: " in str(caught.value)


def test_a_leaking_split_is_refused(tmp_path: Path) -> None:
    leak = "path,split,group\na.mp4,train,g\nb.mp4,val,h\nc.mp4,test,g\n"
    with pytest.raises(DataError, match=r"m\.csv:4: group g lies in test, but in train on line 2"):
        read(tmp_path, leak, heads=None)
    same_file = "path,start,end,split,group\na.mp4,0,1,train,g\na.mp4,1,2,val,h\n"
    with pytest.raises(DataError, match=r"m\.csv:3: file .*a\.mp4 lies in val, but in train on line 2"):
        read(tmp_path, same_file, heads=None)
    without_groups = "path,start,end,split\na.mp4,0,1,unlabelled\na.mp4,1,2,test\n"
    with pytest.raises(DataError, match="lies in test, but in unlabelled"):
        read(tmp_path, without_groups, heads=None)
    fine = "path,split,group\na.mp4,train,g\nb.mp4,unlabelled,g\nc.mp4,val,\n"
    assert len(read(tmp_path, fine, heads=None).rows) == 3


def test_an_empty_class_is_refused_in_training_only(tmp_path: Path) -> None:
    text = "path,action,split\na.mp4,run,train\nb.mp4,walk,val\n"
    with pytest.raises(DataError, match="no training row has label 'walk' of head action"):
        read(tmp_path, text, heads=(ACTION,))
    assert read_manifest(tmp_path / "m.csv", (ACTION,), every_class=False).rows
    assert read(tmp_path, "path,action,split\na.mp4,run,test\n", heads=(ACTION,)).rows
    with pytest.raises(DataError, match="no training row has a mask for head street"):
        read(tmp_path, "path\na.mp4\n", heads=(PICTURE,))
    with pytest.raises(DataError, match="no training row has an answer for head talk"):
        read(tmp_path, "path,question\na.mp4,What?\n", heads=(DIALOGUE,))


def test_none_needs_a_background_label(tmp_path: Path) -> None:
    plain = HeadConfig(name="class", kind="class", labels=("quiet", "loud"))
    with pytest.raises(DataError, match="no one background label"):
        read(tmp_path, "path,class\na.mp4,-\n", heads=(plain,))


def test_labels_are_free_without_heads(tmp_path: Path) -> None:
    assert read(tmp_path, "path,mood\na.mp4,glad\n", heads=None).rows[0].labels == {"mood": ("glad",)}


def test_absent_and_empty_manifests(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest at .*nowhere\.csv"):
        read_manifest(tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match="has no rows"):
        read(tmp_path, "path\n")


def test_root_and_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    path = tmp_path / "tables" / "m.csv"
    path.write_bytes(b"\xef\xbb\xbfpath\r\na.mp4\r\n")
    assert read_manifest(path, root=tmp_path).rows[0].path == tmp_path / "a.mp4"


def test_labels_that_no_table_can_hold(tmp_path: Path) -> None:
    row = Row(path=tmp_path / "a.mp4", labels={"class": ("a|b",)})
    with pytest.raises(DataError, match=r"'a\|b' cannot stand in a CSV"):
        write_manifest(tmp_path / "out.csv", [row])
    assert not (tmp_path / "out.csv").exists()
    write_manifest(tmp_path / "out.jsonl", [row])
    assert read_manifest(tmp_path / "out.jsonl").rows[0].labels == row.labels
