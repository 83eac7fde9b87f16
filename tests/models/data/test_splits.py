"""Splits keep groups whole and labels on both sides."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.data.manifest import Manifest, Row, check_splits
from models.data.splits import folds_by_group, split_by_group
from models.errors import DataError

Labelled = list[tuple[str, str]]
ROWS = st.lists(
    st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(["run", "walk", "sit"])), min_size=2, max_size=40
)


def rows_of(pairs: Labelled) -> list[Row]:
    return [
        Row(path=Path(f"{n}.mp4"), line=n + 2, labels={"action": (label,)}, group=group)
        for n, (group, label) in enumerate(pairs)
    ]


@settings(max_examples=60, deadline=None)
@given(ROWS, st.floats(0.05, 0.6), st.integers(0, 9))
def test_a_split_never_leaks_and_keeps_every_label(pairs: Labelled, share: float, seed: int) -> None:
    rows = rows_of(pairs)
    try:
        split = split_by_group(rows, share, seed)
    except DataError:
        # Refused only where each group is the last with some label.
        for group in {row.group for row in rows}:
            outside = {row.labels["action"] for row in rows if row.group != group}
            assert {row.labels["action"] for row in rows} - outside
        return
    check_splits(Manifest(Path("m.csv"), split))
    assert [row.path for row in split] == [row.path for row in rows]
    assert {row.split for row in split} == {"train", "val"}
    assert {row.labels["action"] for row in rows} == {row.labels["action"] for row in split if row.split == "train"}
    assert split == split_by_group(rows, share, seed)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(2, 8), st.integers(0, 9))
def test_folds_keep_groups_whole(pairs: Labelled, k: int, seed: int) -> None:
    rows = rows_of(pairs)
    groups = {row.group for row in rows}
    if k > len(groups):
        with pytest.raises(DataError, match=f"do not make {k} folds"):
            folds_by_group(rows, k, seed)
        return
    folds = folds_by_group(rows, k, seed)
    assert set(folds) == set(range(k)), "a fold without rows tests nothing"
    assert len({(row.group, fold) for row, fold in zip(rows, folds, strict=True)}) == len(groups)
    if k == len(groups):
        assert len({fold for row, fold in zip(rows, folds, strict=True)}) == len(groups)


def test_labels_keep_their_share() -> None:
    rows = rows_of([(f"g{n}", ("run", "walk", "sit")[n % 3]) for n in range(60)])
    split = split_by_group(rows, 0.2, 0)
    assert Counter(row.labels["action"][0] for row in split if row.split == "val") == {"run": 4, "walk": 4, "sit": 4}
    folds = folds_by_group(rows, 5, 0)
    counts = Counter((fold, row.labels["action"][0]) for row, fold in zip(rows, folds, strict=True))
    assert set(counts.values()) == {4}
    assert split_by_group(rows, 0.2, 1) != split


def test_a_split_that_may_leak_is_refused() -> None:
    rows = [row.model_copy(update={"group": ""}) for row in rows_of([("", "run"), ("", "run"), ("", "run")])]
    for refused in (lambda: split_by_group(rows, 0.3, 0), lambda: folds_by_group(rows, 2, 0)):
        with pytest.raises(DataError, match=r"0\.mp4 \(line 2\) has no group, so a split may leak"):
            refused()
    assert {row.split for row in split_by_group(rows, 0.3, 0, independent=True)} == {"train", "val"}
    mixed = [rows[0], rows[1].model_copy(update={"group": "g"})]
    with pytest.raises(DataError, match="has no group"):
        split_by_group(mixed, 0.3, 0, independent=True)
    twice = rows_of([("g", "run"), ("h", "run")])
    twice[1] = twice[1].model_copy(update={"path": twice[0].path})
    with pytest.raises(DataError, match="is in two groups"):
        split_by_group(twice, 0.3, 0)


def test_pieces_of_one_file_stay_together() -> None:
    rows = [Row(path=Path(f"{n // 4}.mp4"), start=n % 4, line=n + 2) for n in range(24)]
    split = split_by_group(rows, 0.3, 0, independent=True)
    check_splits(Manifest(Path("m.csv"), split))


def test_groups_of_other_splits_stay() -> None:
    rows = rows_of([("a", "run"), ("b", "run"), ("c", "run"), ("a", "run")])
    rows[3] = rows[3].model_copy(update={"split": "unlabelled"})
    for seed in range(8):
        split = split_by_group(rows, 0.4, seed)
        assert (split[0].split, split[3].split) == ("train", "unlabelled")


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_shares(share: float) -> None:
    with pytest.raises(DataError, match="is not between 0 and 1"):
        split_by_group(rows_of([("a", "run"), ("b", "run")]), share, 0)
