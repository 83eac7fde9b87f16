"""Measures of scores against targets of which some are unknown."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def average_precision(scores: Floats, positive: NDArray[np.bool_]) -> float:
    """Area under precision over recall, as a sum over the positives (no interpolation); nan without positives."""
    if not positive.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    hits = positive[order]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(precision[hits].mean())


def auroc(scores: Floats, positive: NDArray[np.bool_]) -> float:
    """Chance that a positive scores above a negative, ties halved; nan when either is missing."""
    high, low = scores[positive], np.sort(scores[~positive])
    if not len(high) or not len(low):
        return float("nan")
    below = np.searchsorted(low, high, side="left") + np.searchsorted(low, high, side="right")
    return float(below.mean() / (2 * len(low)))


def label_metrics(
    scores: NDArray[np.float32], targets: NDArray[np.int8], labels: tuple[str, ...]
) -> dict[str, dict[str, float | int]]:
    """Per label over the windows where it is known: numbers, average precision, area under the ROC curve."""
    table: dict[str, dict[str, float | int]] = {}
    for column, label in enumerate(labels):
        known = targets[:, column] >= 0
        positive = targets[known, column] == 1
        if positive.any() and not positive.all():
            table[label] = {
                "positive": int(positive.sum()),
                "negative": int((~positive).sum()),
                "chance": round(float(positive.mean()), 4),
                "average_precision": round(average_precision(scores[known, column], positive), 4),
                "auroc": round(auroc(scores[known, column], positive), 4),
            }
    return table


def mean_of(table: dict[str, dict[str, float | int]], key: str) -> float:
    """Mean of one column over the labels."""
    return round(float(np.mean([row[key] for row in table.values()])), 4) if table else float("nan")


def balanced_accuracy(predicted: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    """Mean over the classes present of the share recognised."""
    return round(float(np.mean([(predicted[truth == c] == c).mean() for c in np.unique(truth)])), 4)


def clip_means(scores: NDArray[np.float32], clips: NDArray[np.int64]) -> NDArray[np.float32]:
    """Mean of the windows' scores for each clip number, in ascending order of the numbers."""
    return np.stack([scores[clips == clip].mean(axis=0) for clip in np.unique(clips)])
