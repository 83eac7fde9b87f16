"""Reports: what is written, and that pictures show what they should."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models import plots
from models.errors import ModelError
from models.metrics import Interval, reliability
from models.report import read_history, write_report
from models.scored import (
    AnswerScores,
    HeadScores,
    LabelScores,
    MaskExample,
    MaskScores,
    RetrievalScores,
    Scored,
    ScoredRow,
)

ROWS = tuple(ScoredRow(f"clips/a|b{n}.mp4", f"person{n % 4}") for n in range(12))


def sounds(labels: tuple[str, ...] = ("dog", "cat", "rain"), *, multi_label: bool = False) -> LabelScores:
    random = np.random.default_rng(len(labels))
    targets = np.eye(len(labels))[np.arange(len(ROWS)) % len(labels)]
    scores = random.dirichlet(np.ones(len(labels)), len(ROWS)) * 0.5 + targets * 0.3
    return LabelScores("sound", labels, multi_label, scores, targets, {})


def scene() -> MaskScores:
    truth = np.zeros((24, 32), np.int64)
    truth[:, 16:] = 1
    truth[0] = 255
    predicted = np.zeros_like(truth)
    predicted[:, 20:] = 1
    picture = np.full((24, 32, 3), 90, np.uint8)
    confusions = np.zeros((len(ROWS), 2, 2), np.int64)
    confusions[3] = [[368, 0], [92, 276]]
    return MaskScores("scene", ("sky", "road"), confusions, (MaskExample(3, picture, truth, predicted),))


def heads() -> tuple[HeadScores, ...]:
    texts = tuple(f"caption {n // 2}" for n in range(len(ROWS)))
    answers = ("yes",) * 12
    return (
        sounds(),
        scene(),
        RetrievalScores("clip", texts, np.eye(12), np.roll(np.eye(12), 5, axis=1)),
        AnswerScores("talk", ("is it?",) * 12, answers, ("yes", "no") * 6),
    )


def test_report_has_a_section_and_pictures_for_each_head(tmp_path: Path) -> None:
    history = [{"epoch": n, "loss": 1 / n, "val_sound_accuracy": 1 - 1 / n, "seconds": 9.0} for n in (1, 2, 3)]
    numbers = write_report(
        tmp_path, Scored(ROWS, heads()), title="Report", about={"split": "val"}, history=history, draws=20
    )
    text = (tmp_path / "report.md").read_text()
    for head in ("sound", "scene", "clip", "talk"):
        assert f"## Head `{head}`" in text
    assert json.loads((tmp_path / "metrics.json").read_text()) == numbers
    shown = [line.partition("](")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert sorted(shown) == sorted(path.name for path in tmp_path.glob("*.png"))
    assert {"history.png", "sound_confusion.png", "sound_reliability.png", "scene_examples.png"} <= set(shown)
    for name in shown:
        assert np.ptp(np.asarray(Image.open(tmp_path / name).convert("L"))) > 100, f"{name} is blank"


def test_tables_are_even_and_file_names_cannot_break_them(tmp_path: Path) -> None:
    write_report(tmp_path, Scored(ROWS, heads()), title="Report", draws=20)
    lines = (tmp_path / "report.md").read_text().splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert any("a\\|b" in line for line in tables)
    for above, below in itertools.pairwise(lines):
        if above.startswith("|") and below.startswith("|"):
            assert len(above) == len(below)
            assert above.replace("\\|", "").count("|") == below.replace("\\|", "").count("|")


def test_worst_mistake_comes_first(tmp_path: Path) -> None:
    head = sounds()
    scores, targets = np.full((12, 3), 0.1), head.targets
    scores[np.arange(12), targets.argmax(axis=1)] = 0.5
    scores[7], scores[2] = [0.97, 0.02, 0.01], [0.6, 0.3, 0.1]
    write_report(tmp_path, Scored(ROWS, (LabelScores("sound", head.labels, False, scores, targets, {}),)), title="R",
                 draws=20)  # fmt: skip
    text = (tmp_path / "report.md").read_text()
    assert "Worst mistakes (2 of 2; 12 rows)" in text
    assert text.index("b7.mp4") < text.index("b2.mp4")
    assert "0.97" in text


def test_nothing_known_is_said(tmp_path: Path) -> None:
    unknown = LabelScores("sound", ("a", "b"), False, np.full((12, 2), 0.5), np.full((12, 2), math.nan), {})
    assert write_report(tmp_path, Scored(ROWS, (unknown,)), title="R") == {}
    assert "nothing was measured" in (tmp_path / "report.md").read_text()
    assert not list(tmp_path.glob("*.png"))


def test_one_group_has_no_intervals_and_says_so(tmp_path: Path) -> None:
    rows = tuple(ScoredRow(row.name, "") for row in ROWS)
    assert write_report(tmp_path, Scored(rows, (sounds(),)), title="R")["sound_accuracy_low"] is None
    assert "`group` column" in (tmp_path / "report.md").read_text()


def test_history_passes_over_a_line_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    assert read_history(path) == []
    path.write_text('{"epoch": 1, "loss": 2.0}\n{"epoch": 2, "lo')
    assert read_history(path) == [{"epoch": 1, "loss": 2.0}]
    assert not plots.plot_history(tmp_path / "history.png", [{"epoch": 1, "learning_rate": 0.1}])


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"cannot be written to .*choose another folder") as caught:
        write_report(tmp_path / "file" / "report", Scored(ROWS, (sounds(),)), title="R", draws=20)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [2, 45])
def test_pictures_of_few_and_many_classes_have_bounded_size(tmp_path: Path, count: int) -> None:
    labels = [f"a rather long name of class {n}" for n in range(count)]
    plots.plot_confusion(tmp_path / "confusion.png", np.eye(count, dtype=np.int64) * 5, labels, unit="rows")
    found = [Interval(0.5 + n / 2 / count, 0.4, 1.0) for n in range(count)]
    plots.plot_intervals(tmp_path / "intervals.png", labels, found, what="AUC")
    for name in ("confusion.png", "intervals.png"):
        width, height = Image.open(tmp_path / name).size
        assert 300 < width < 1600
        assert 200 < height < 2000


def test_colours_of_classes_differ() -> None:
    for count in (2, 11, 21, 60):
        colours = plots.class_colours(count)
        assert colours.shape == (count, 3)
        assert len(np.unique(colours.round(3), axis=0)) == count


def test_reliability_of_nothing_does_not_crash(tmp_path: Path) -> None:
    empty = reliability(np.zeros(0), np.zeros(0, bool))
    assert plots.plot_reliability(tmp_path / "empty.png", empty, what="score")
