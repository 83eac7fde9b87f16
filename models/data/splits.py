"""Splits that keep what belongs together on one side: by group, with labels spread as evenly as groups allow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models.data.manifest import Row
from models.errors import DataError

Counts = NDArray[np.float64]
_TRIES = 32


def split_by_group(rows: Sequence[Row], val_share: float, seed: int, *, independent: bool = False) -> tuple[Row, ...]:
    """The rows with about ``val_share`` of those in ``train`` moved to ``val``, whole groups at a time.

    Groups are drawn so that each label keeps its share on both sides, and none loses its last training group.
    A group that has rows in another split stays where it is.
    ``independent`` says that files without a group have nothing in common; otherwise a split without groups is
    refused, since two cuts of one recording on both sides would make a score of what was learned by heart.
    Raises ``DataError``.
    """
    if not 0 < val_share < 1:
        raise DataError(f"a share of {val_share:g} for validation is not between 0 and 1; give one such as 0.2")
    fixed = {row.source for row in rows if row.split != "train"}
    names, counts = _groups([row for row in rows if row.split == "train"], independent)
    free = np.array([name not in fixed for name in names], np.bool_)
    chosen = {names[n] for n in _choose(counts, free, val_share, np.random.default_rng(seed))}
    if not chosen:
        raise DataError(
            f"no group of {len(names)} can be spared for validation: each is the last with some label; add groups, "
            "or give the split in the manifest"
        )
    return tuple(
        row.model_copy(update={"split": "val"}) if row.split == "train" and row.source in chosen else row
        for row in rows
    )


def folds_by_group(rows: Sequence[Row], k: int, seed: int, *, independent: bool = False) -> tuple[int, ...]:
    """The fold, 0 to ``k - 1``, of each row: whole groups, folds of like size and like labels.

    With as many folds as groups each fold is one group ("leave one out"). Raises ``DataError``.
    """
    names, counts = _groups(rows, independent)
    if not 2 <= k <= len(names):
        raise DataError(f"{len(names)} groups do not make {k} folds; choose from 2 to {len(names)}")
    random = np.random.default_rng(seed)
    order = random.permutation(len(names))
    order = order[np.argsort(-counts[order, -1], kind="stable")]
    weight = 1.0 / np.maximum(counts.sum(axis=0), 1.0)
    filled = np.zeros((k, counts.shape[1]))
    fold = np.zeros(len(names), np.int64)
    for number, group in enumerate(order):
        empty = np.flatnonzero(filled[:, -1] == 0)
        # The groups that are left must suffice for the folds that are still empty.
        among = empty if len(order) - number <= len(empty) else np.arange(k)
        cost = ((filled[among] + counts[group]) ** 2 - filled[among] ** 2) @ weight
        fold[group] = among[int(np.argmin(cost))]
        filled[fold[group]] += counts[group]
    by_name = dict(zip(names, fold.tolist(), strict=True))
    return tuple(by_name[row.source] for row in rows)


def _groups(rows: Sequence[Row], independent: bool) -> tuple[list[str], Counts]:
    """Names of the groups, and for each how many rows it has of each label and, last, in all."""
    grouped = [bool(row.group) for row in rows]
    if not all(grouped) and (any(grouped) or not independent):
        row = rows[grouped.index(False)]
        raise DataError(
            f"{row.path} (line {row.line}) has no group, so a split may leak; fill the column group, "
            "or state that the files are independent"
        )
    files: dict[str, str] = {}
    for row in rows:
        if files.setdefault(str(row.path), row.source) != row.source:
            raise DataError(f"{row.path} (line {row.line}) is in two groups; a file belongs to one")
    labels = sorted({(head, label) for row in rows for head, names in row.labels.items() for label in names})
    column = {label: n for n, label in enumerate(labels)}
    names = sorted({row.source for row in rows})
    number = {name: n for n, name in enumerate(names)}
    counts = np.zeros((len(names), len(labels) + 1))
    for row in rows:
        counts[number[row.source], -1] += 1
        for head, given in row.labels.items():
            for label in given:
                counts[number[row.source], column[head, label]] += 1
    return names, counts


def _choose(counts: Counts, free: NDArray[np.bool_], share: float, random: np.random.Generator) -> list[int]:
    """Groups for validation: of several random orders the one that brings every label nearest to its share.

    Taking the best group at each step would take the largest: few groups, and intervals as wide as they are few.
    """
    wanted = share * counts.sum(axis=0)
    weight = 1.0 / np.maximum(counts.sum(axis=0), 1.0)
    tries = [_greedy(counts, free, wanted, weight, random.permutation(len(counts))) for _ in range(_TRIES)]
    return min(tries, key=lambda chosen: float((wanted - counts[chosen].sum(axis=0)) ** 2 @ weight))


def _greedy(
    counts: Counts, free: NDArray[np.bool_], wanted: Counts, weight: Counts, order: NDArray[np.int64]
) -> list[int]:
    """Groups in that order as long as they bring labels nearer to their share; at least one, where one is free."""
    left, gap = counts.sum(axis=0), wanted.copy()
    chosen: list[int] = []
    for group in order.tolist():
        spared = free[group] and bool(((left - counts[group] > 0) | (counts[group] == 0)).all())
        gain = (gap**2 - (gap - counts[group]) ** 2) @ weight
        if spared and (gain > 0 or not chosen):
            chosen.append(group)
            left, gap = left - counts[group], gap - counts[group]
    return chosen
