"""What evaluation of a checkpoint and of a pack share: rows, targets, and the gathering of windows into rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.config import HeadConfig
from models.data.manifest import CLASSIFYING, Manifest, Row, Split
from models.errors import DataError
from models.metrics import Floats, Indices, confusion_matrix
from models.progress import Report, console_progress
from models.scored import MaskExample, MaskScores, ScoredRow

EXAMPLES = 12
"""Pictures kept to choose examples from."""


@contextmanager
def shown(report: Report | None) -> Iterator[Report]:
    """The report given, or a progress bar on the console."""
    if report is not None:
        yield report
    else:
        with console_progress() as console:
            yield console


def chosen_rows(manifest: Manifest, split: Split | None) -> tuple[Split, tuple[Row, ...]]:
    """Name and rows of a split. Without one: the rows of ``test``, else of ``val``, else all that are labelled.

    Raises ``DataError`` when the split has no rows.
    """
    splits = [row.split for row in manifest.rows]
    if split is None:
        split = "test" if "test" in splits else "val" if "val" in splits else "train"
    rows = tuple(row for row in manifest.rows if row.split == split)
    if not rows:
        there = ", ".join(sorted(set(splits)))
        raise DataError(f"{manifest.path} has no rows of split {split} (there are: {there}); name one of these")
    return split, rows


def scored_rows(manifest: Manifest, rows: Sequence[Row]) -> tuple[ScoredRow, ...]:
    """Rows as reports name them; those without a group are of their file's."""
    folder = manifest.path.parent
    return tuple(ScoredRow(_name(row, folder), row.group or str(row.path)) for row in rows)


def _name(row: Row, folder: Path) -> str:
    path, base = Path(os.path.normpath(row.path)), Path(os.path.normpath(folder))
    shown = path.relative_to(base) if path.is_relative_to(base) else Path(*path.parts[-3:])
    if row.start is None and row.end is None:
        return shown.as_posix()
    end = "end" if row.end is None else f"{row.end:g} s"
    return f"{shown.as_posix()} [{row.start or 0:g} to {end}]"


def known_of(row: Row, head: HeadConfig) -> bool:
    """Whether a row says something about a head."""
    if head.kind in CLASSIFYING:
        return head.name in row.labels
    known = {"segmentation": row.mask is not None, "dialogue": bool(row.answer), "embedding": bool(row.caption)}
    return known[head.kind]


def label_targets(rows: Sequence[Row], head: HeadConfig) -> NDArray[np.float32]:
    """float32 ``[N, labels]``: 1 for the row's labels, 0 for the others, NaN for rows that say nothing of the head."""
    targets = np.full((len(rows), len(head.labels)), np.nan, np.float32)
    for n, row in enumerate(rows):
        if head.name in row.labels:
            targets[n] = [label in row.labels[head.name] for label in head.labels]
    return targets


def row_means(values: Floats, owners: Indices, count: int) -> NDArray[np.float64]:
    """Mean float64 ``[count, K]`` of the windows' values ``[W, K]`` for each row; NaN for a row without windows.

    ``owners`` int64 ``[W]`` says which row each window is of.
    """
    sums = np.zeros((count, values.shape[1]))
    np.add.at(sums, owners, values)
    windows = np.bincount(owners, minlength=count).astype(np.float64)[:, None]
    means = np.full_like(sums, np.nan)
    np.divide(sums, windows, out=means, where=windows > 0)
    return means


class MaskTally:
    """Gathers a segmentation head's masks, row by row."""

    def __init__(self, head: HeadConfig, rows: int, masked: int) -> None:
        """``rows`` in all, of which ``masked`` will be added."""
        self._head = head
        self._confusions = np.zeros((rows, len(head.labels), len(head.labels)), np.int64)
        self._every = max(1, -(-masked // EXAMPLES))
        self._seen = 0
        self._examples: list[MaskExample] = []

    def wants_picture(self) -> bool:
        """Whether the next one is kept as an example."""
        return self._seen % self._every == 0

    def add(
        self,
        row: int,
        truth: NDArray[np.integer[Any]],
        predicted: NDArray[np.integer[Any]],
        picture: NDArray[np.uint8] | None,
    ) -> None:
        """Masks ``[h, w]``, in the truth ``VOID`` where unknown; the picture uint8 ``[h, w, 3]`` for an example."""
        self._confusions[row] += confusion_matrix(predicted, truth, len(self._head.labels))
        if picture is not None:
            small = truth.astype(np.int16), predicted.astype(np.int16)
            self._examples.append(MaskExample(row, picture, *small))
        self._seen += 1

    def scores(self) -> MaskScores:
        """All that was gathered."""
        return MaskScores(self._head.name, self._head.labels, self._confusions, tuple(self._examples))
