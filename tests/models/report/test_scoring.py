"""From a manifest's rows and windows to what reports are about."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from models.config import HeadConfig
from models.data.manifest import Manifest, Row
from models.errors import DataError
from models.scoring import MaskTally, chosen_rows, label_targets, row_means, scored_rows

ACTION = HeadConfig(name="action", kind="action", labels=("run", "wave"), multi_label=True)
SCENE = HeadConfig(name="scene", kind="segmentation", labels=("sky", "road"))


def table(*rows: Row) -> Manifest:
    return Manifest(Path("/data/tables/rows.csv"), rows)


def test_without_a_split_the_one_kept_for_testing_is_taken() -> None:
    train, val, test = (Row(path=Path(f"/{name}.mp4"), split=name) for name in ("train", "val", "test"))  # type: ignore[arg-type]
    assert chosen_rows(table(train, val, test), None) == ("test", (test,))
    assert chosen_rows(table(train, val), None) == ("val", (val,))
    assert chosen_rows(table(train), None) == ("train", (train,))
    assert chosen_rows(table(train, val), "train") == ("train", (train,))
    with pytest.raises(DataError, match=r"rows\.csv has no rows of split test \(there are: train, val\)"):
        chosen_rows(table(train, val), "test")


def test_names_are_short_and_say_the_stretch() -> None:
    rows = (
        Row(path=Path("/data/tables/clips/a.mp4"), group="anna"),
        Row(path=Path("/data/tables/../sounds/esc/b.flac"), start=1.5, end=3),
        Row(path=Path("/data/tables/c.mp4"), start=2),
    )
    named = scored_rows(table(*rows), rows)
    assert [row.name for row in named] == ["clips/a.mp4", "sounds/esc/b.flac [1.5 to 3 s]", "c.mp4 [2 to end]"]
    assert [row.group for row in named] == ["anna", str(rows[1].path), str(rows[2].path)]


def test_targets_are_unknown_where_nothing_is_said() -> None:
    rows = [
        Row(path=Path("/a"), labels={"action": ("wave",)}),
        Row(path=Path("/b"), labels={"action": ()}),
        Row(path=Path("/c"), labels={"other": ("run",)}),
    ]
    targets = label_targets(rows, ACTION)
    assert targets[:2].tolist() == [[0, 1], [0, 0]]
    assert np.isnan(targets[2]).all()


def test_windows_are_averaged_by_row() -> None:
    values = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    means = row_means(values, np.array([2, 0, 2]), 3)
    assert means[0].tolist() == [0.0, 1.0]
    assert means[2].tolist() == [0.75, 0.25]
    assert all(math.isnan(value) for value in means[1])


def test_masks_are_counted_and_some_kept() -> None:
    tally = MaskTally(SCENE, 40, 30)
    kept = 0
    for row in range(30):
        picture = np.zeros((2, 2, 3), np.uint8) if tally.wants_picture() else None
        kept += picture is not None
        tally.add(row, np.array([[0, 1], [1, -1]]), np.array([[0, 1], [0, 0]]), picture)
    found = tally.scores()
    assert found.confusions[:30].tolist() == [[[1, 0], [1, 1]]] * 30
    assert found.confusions[30:].sum() == 0
    assert len(found.examples) == kept
    assert 8 <= kept <= 12
