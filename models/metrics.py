"""Measures of scores against targets of which some are unknown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Indices = NDArray[np.int64]


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


def accuracy(predicted: Indices, truth: Indices) -> float:
    """Share of rows recognised; nan without rows."""
    return float((predicted == truth).mean()) if len(truth) else float("nan")


def confusion_matrix(predicted: NDArray[np.integer], truth: NDArray[np.integer], classes: int) -> Indices:
    """int64 ``[classes, classes]``: rows truth, columns prediction. Truth outside ``0..classes-1`` is left out."""
    known = (truth >= 0) & (truth < classes)
    cells = truth[known].astype(np.int64) * classes + predicted[known].astype(np.int64)
    return np.bincount(cells.reshape(-1), minlength=classes**2).reshape(classes, classes)


@dataclass(frozen=True, slots=True, eq=False)
class ClassScores:
    """Measures of each class, from a confusion matrix; nan where undefined."""

    precision: Floats
    """float64 ``[C]``: right among those predicted so; nan for a class never predicted."""
    recall: Floats
    """float64 ``[C]``: found among those that are so; nan for a class that is absent."""
    f1: Floats
    """float64 ``[C]``: harmonic mean of both; nan for a class neither there nor predicted."""
    iou: Floats
    """float64 ``[C]``: intersection over union; nan for a class neither there nor predicted."""
    support: Indices
    """int64 ``[C]``: how many there are."""


def class_scores(matrix: Indices) -> ClassScores:
    """Precision, recall, F1 and intersection over union of each class of a confusion matrix ``[C, C]``."""
    hit = np.diag(matrix).astype(np.float64)
    there, said = matrix.sum(axis=1), matrix.sum(axis=0)
    return ClassScores(
        precision=_ratio(hit, said),
        recall=_ratio(hit, there),
        f1=_ratio(2 * hit, there + said),
        iou=_ratio(hit, there + said - hit),
        support=there.astype(np.int64),
    )


def mean_iou(matrix: Indices) -> float:
    """Mean intersection over union of the classes that are there in truth; nan when there is none."""
    return _mean(class_scores(matrix).iou[matrix.sum(axis=1) > 0])


def mean_recall(matrix: Indices) -> float:
    """Balanced accuracy: mean recall of the classes that are there in truth; nan when there is none."""
    return _mean(class_scores(matrix).recall[matrix.sum(axis=1) > 0])


def macro_f1(matrix: Indices) -> float:
    """Mean F1 of the classes that are there in truth; nan when there is none."""
    return _mean(class_scores(matrix).f1[matrix.sum(axis=1) > 0])


def pixel_accuracy(matrix: Indices) -> float:
    """Share of everything counted that lies on the diagonal; nan of an empty matrix."""
    return float(np.trace(matrix) / matrix.sum()) if matrix.sum() else float("nan")


@dataclass(frozen=True, slots=True, eq=False)
class Reliability:
    """How often an answer given with a certain confidence is right."""

    edges: Floats
    """float64 ``[bins + 1]``: borders of confidence; a bin holds its upper border."""
    confidence: Floats
    """float64 ``[bins]``: mean confidence of the bin; nan where it is empty."""
    correct: Floats
    """float64 ``[bins]``: share that is right; nan where it is empty."""
    count: Indices
    """int64 ``[bins]``."""

    @property
    def error(self) -> float:
        """Expected calibration error: mean distance of the two, weighted by ``count``; nan without answers."""
        full = self.count > 0
        distance = np.abs(self.confidence[full] - self.correct[full])
        return float((distance * self.count[full]).sum() / self.count.sum()) if full.any() else float("nan")


def reliability(confidence: Floats, correct: NDArray[np.bool_], bins: int = 10) -> Reliability:
    """Bins of equal width (Guo et al., ICML 2017). ``confidence`` ``[N]`` in 0..1, ``correct`` ``[N]``."""
    edges = np.linspace(0.0, 1.0, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    return Reliability(
        edges,
        _ratio(np.bincount(place, confidence, bins), count),
        _ratio(np.bincount(place, correct, bins), count),
        count,
    )


def retrieval_ranks(similarity: Floats, relevant: NDArray[np.bool_]) -> Indices:
    """int64 ``[Q]``: rank (from 1) of the best relevant item for each query; 0 for a query that has none.

    ``similarity`` and ``relevant`` ``[Q, N]``. Several items may be relevant (clips with the same caption): any of
    them counts. An item as similar as the best relevant one ranks before it, so a constant answer gains nothing.
    """
    best = np.where(relevant, similarity, -np.inf).max(axis=1, keepdims=True)
    ahead = ((similarity >= best) & ~relevant).sum(axis=1)
    return np.where(relevant.any(axis=1), ahead + 1, 0).astype(np.int64)


def recall_at(ranks: Indices, k: int) -> float:
    """Share of the queries that have a relevant item for which one is among the first ``k``; nan without such."""
    asked = ranks[ranks > 0]
    return float((asked <= k).mean()) if len(asked) else float("nan")


@dataclass(frozen=True, slots=True)
class Interval:
    """A measure with what it might have been on other groups of the same kind."""

    value: float
    """On all rows."""
    low: float
    """Lower end of the interval; nan where it cannot be said."""
    high: float
    """Upper end."""


def bootstrap(
    metric: Callable[[Indices], float],
    groups: Sequence[object],
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a metric over groups drawn with replacement (Efron, Annals of Statistics, 1979).

    ``metric`` maps row indices int64 ``[n]``, of which some repeat, to a number; ``groups`` gives each row's group.
    Whole groups are drawn, because rows of one group are no independent evidence. A draw on which the metric is nan
    (say it holds no positive) is left out; where more than half of the draws are, or there is one group only, the
    ends are nan. The same seed gives the same interval. Raises ``ValueError`` without rows.
    """
    return bootstrap_each(lambda rows: np.array([metric(rows)]), groups, draws=draws, level=level, seed=seed)[0]


def bootstrap_each(
    metric: Callable[[Indices], Floats],
    groups: Sequence[object],
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[Interval, ...]:
    """As ``bootstrap``, of several measures at once: ``metric`` gives float ``[K]``. No draws: values alone."""
    if not len(groups):
        raise ValueError("a metric of no rows has no interval")
    numbers = np.unique(np.array([str(group) for group in groups]), return_inverse=True)[1]
    order = np.argsort(numbers, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)
    values = metric(np.arange(len(numbers)))
    if len(members) < 2:
        draws = 0
    picks = np.random.default_rng(seed).integers(0, len(members), (draws, len(members)))
    found = np.empty((draws, len(values)))
    for draw, pick in enumerate(picks):
        found[draw] = metric(np.concatenate([members[n] for n in pick]))
    return tuple(_interval(float(value), found[:, n], level) for n, value in enumerate(values))


def _interval(value: float, found: Floats, level: float) -> Interval:
    defined = found[~np.isnan(found)]
    if not len(defined) or 2 * len(defined) < len(found):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def _ratio(part: NDArray[np.generic], whole: NDArray[np.generic]) -> NDArray[np.float64]:
    parts, wholes = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    result = np.full(len(wholes), np.nan)
    np.divide(parts, wholes, out=result, where=wholes > 0)
    return result


def _mean(values: Floats) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
