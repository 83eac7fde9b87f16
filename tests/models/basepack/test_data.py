"""Tables, labels, splits, and what is said when they are wrong."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from models.basepack import tables
from models.basepack.config import read_config
from models.basepack.folds import FIGHT_FOLDS, folds_of, in_second_place
from models.basepack.labels import ACTIONS
from models.basepack.tables import Recording, Span, timed_spans
from models.basepack.targets import Targets, window_targets
from models.basepack.train import train
from models.errors import ConfigError, DataError

CONFIG = Path(__file__).parents[3] / "models" / "configs" / "base.yaml"


def says(targets: Targets, label: str) -> int:
    return int(targets[ACTIONS.index(label)])


def recording(dataset: str, *spans: Span) -> Recording:
    return Recording(Path("clip.mp4"), dataset, "1", spans)


def whole(label: str) -> Span:
    return Span(label, 0.0, float("inf"))


def test_rows_of_gmdcsa() -> None:
    row = "12.mp4,12,Night,Full Shirt & Jeans,Drinking, Falling (BW)[6.9 to 12]; Standing[0 to 0.5; 3 to 6.9]"
    assert list(timed_spans(row, "t:1")) == [Span("fall", 6.9, 12.0), Span("stand", 0.0, 0.5), Span("stand", 3.0, 6.9)]
    assert list(timed_spans("15.mp4,06,,, Falling (SW) [1.8 to 6] ; Sitting [0 to 2]", "t:2")) == [
        Span("fall", 1.8, 6.0),
        Span("sit", 0.0, 2.0),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("01.mp4,6,Day,x,y, Juggling[0 to 3]", "unknown label 'Juggling'"),
        ("01.mp4,6,Day,x,y,", "no timed class"),
        ("01.mp4,6,Day,x,y, Sitting[9.7 to 3]", "before it begins"),
    ],
)
def test_bad_rows_name_file_and_line(row: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        list(timed_spans(row, "Subject_1_ADL.csv:7"))
    assert str(caught.value).startswith("Subject_1_ADL.csv:7: ")


def test_spans_become_targets() -> None:
    clip = recording("gmdcsa24", Span("walk", 0.0, 3.0), Span("fall", 3.0, 9.0))
    early, late, lying = (window_targets(clip, start, start + 2) for start in (0.0, 2.5, 6.5))
    assert (says(early, "walk"), says(early, "fall"), says(early, "fight")) == (1, 0, 0)
    assert (says(late, "walk"), says(late, "fall")) == (-1, 1)
    assert (says(lying, "walk"), says(lying, "fall")) == (0, -1)


def test_what_is_not_annotated_is_unknown() -> None:
    fight = window_targets(recording("fights", whole("fight")), 0, 2)
    normal = window_targets(recording("fights", whole("normal")), 0, 2)
    punch = window_targets(recording("ut-interaction", whole("punch")), 0, 2)
    assert (says(fight, "fight"), says(fight, "punch"), says(fight, "handshake")) == (1, -1, 0)
    assert (says(normal, "fight"), says(normal, "walk"), says(normal, "other")) == (0, -1, 1)
    assert (says(punch, "punch"), says(punch, "kick"), says(punch, "fight")) == (1, 0, -1)


@pytest.mark.parametrize("dataset", ["street", "people", "gestures", "stills"])
def test_nobody_fights_in_ordinary_video(dataset: str) -> None:
    targets = window_targets(recording(dataset, whole("nothing")), 0, 2)
    assert all(says(targets, label) == 0 for label in ("fight", "fall", "kick", "punch", "push", "hug", "run"))
    assert says(targets, "walk") == (-1 if dataset != "gestures" else 0)


def test_the_check_for_false_alarms_was_not_trained_on(data: Path) -> None:
    trained = {clip.path.name for clip in tables.recordings(data)}
    checked = {clip.path.name for clip in tables.everyday(data)}
    assert {"bikes.mp4", "bigbuckbunny.mp4"} <= checked
    assert not trained & checked


def test_every_recording_has_targets_and_a_fold_and_no_group_has_two(data: Path) -> None:
    everything = tables.recordings(data)
    for clip in everything:
        assert set(window_targets(clip, 0, 2).tolist()) <= {-1, 0, 1}
    folds: dict[tuple[str, str], set[int]] = {}
    for clip, fold in zip(everything, folds_of(everything), strict=True):
        folds.setdefault((clip.dataset, clip.group), set()).add(fold)
    assert all(len(found) == 1 for found in folds.values())
    for dataset in ("gmdcsa24", "ut-interaction", "weizmann"):
        own = [next(iter(found)) for (name, _), found in folds.items() if name == dataset]
        assert len(own) == len(set(own)), "one subject, one sequence is left out at a time"
    fights = [fold for clip, fold in zip(everything, folds_of(everything), strict=True) if clip.dataset == "fights"]
    sizes = [fights.count(fold) for fold in set(fights)]
    assert len(sizes) == FIGHT_FOLDS
    # One source alone has 35 clips; the others are dealt evenly.
    assert max(sizes) <= 40


def test_the_second_place_is_that_of_the_table(data: Path) -> None:
    with (data / "actions" / "ut-interaction" / "clips.csv").open() as file:
        told = {row["clip"]: row["set"] == "2" for row in csv.DictReader(file)}
    clips = [clip for clip in tables.recordings(data) if clip.dataset == "ut-interaction"]
    assert {clip.path.name: in_second_place(clip) for clip in clips} == told


def test_absent_data_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no folder .*actions; set `data`"):
        train(CONFIG, data_dir=tmp_path / "nowhere", cache_dir=tmp_path, out_dir=tmp_path, report=lambda *_: None)


def test_unknown_label_names_the_line(tmp_path: Path) -> None:
    folder = tmp_path / "actions" / "fights"
    folder.mkdir(parents=True)
    (folder / "clips.csv").write_text("clip,label,source_id\na.mp4,brawl,1\n")
    with pytest.raises(DataError, match=r"clips\.csv:2: unknown label 'brawl'"):
        tables.recordings(tmp_path)
    (folder / "clips.csv").write_text("clip,label,source_id\na.mp4,fight,1\n")
    with pytest.raises(DataError, match=r"clips\.csv:2: a\.mp4 is not in the folder"):
        tables.recordings(tmp_path)
    (folder / "clips.csv").write_text("clip,label\na.mp4,fight\n")
    with pytest.raises(DataError, match=r"clips\.csv:1: no column source_id"):
        tables.recordings(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seed: 0", "sead: 0"), "sead"),
        (("steps: 1500", "steps: -3"), r"decoder\.steps"),
        (("seed: 0", "seed: [0"), "is not YAML"),
    ],
)
def test_bad_configuration_names_the_key(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "c.yaml"
    text = CONFIG.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
