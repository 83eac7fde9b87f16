"""Measures against plain references."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from models import metrics

CLASSES = 4


@st.composite
def answers(draw: st.DrawFn) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Predicted and true classes of a few rows."""
    rows = draw(st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1)), min_size=1, max_size=40))
    predicted, truth = zip(*rows, strict=True)
    return np.array(predicted, np.int64), np.array(truth, np.int64)


@st.composite
def scored(draw: st.DrawFn) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Scores with ties, and which are positive."""
    rows = draw(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=2, max_size=40))
    scores, positive = zip(*rows, strict=True)
    return np.array(scores, np.float64) / 8, np.array(positive, bool)


@given(answers())
def test_confusion_matrix_counts_pairs(rows: tuple[NDArray[np.int64], NDArray[np.int64]]) -> None:
    predicted, truth = rows
    matrix = metrics.confusion_matrix(predicted, truth, CLASSES)
    pairs = list(zip(truth.tolist(), predicted.tolist(), strict=True))
    assert matrix.tolist() == [[pairs.count((t, p)) for p in range(CLASSES)] for t in range(CLASSES)]
    right = sum(t == p for t, p in pairs) / len(pairs)
    assert math.isclose(metrics.accuracy(predicted, truth), right)
    assert math.isclose(metrics.pixel_accuracy(matrix), right)


@given(answers())
def test_class_scores_agree_with_sets(rows: tuple[NDArray[np.int64], NDArray[np.int64]]) -> None:
    predicted, truth = rows
    scores = metrics.class_scores(metrics.confusion_matrix(predicted, truth, CLASSES))
    for c in range(CLASSES):
        said, there = set(np.flatnonzero(predicted == c)), set(np.flatnonzero(truth == c))
        both = len(said & there)
        assert _same(scores.precision[c], both / len(said) if said else math.nan)
        assert _same(scores.recall[c], both / len(there) if there else math.nan)
        assert _same(scores.f1[c], 2 * both / (len(said) + len(there)) if said or there else math.nan)
        assert _same(scores.iou[c], both / len(said | there) if said | there else math.nan)
        assert scores.support[c] == len(there)


@given(answers())
def test_means_are_over_the_classes_that_are_there(rows: tuple[NDArray[np.int64], NDArray[np.int64]]) -> None:
    predicted, truth = rows
    matrix = metrics.confusion_matrix(predicted, truth, CLASSES)
    recalls, f1s, ious = [], [], []
    for c in np.unique(truth):
        both, said, there = ((predicted == c) & (truth == c)).sum(), (predicted == c).sum(), (truth == c).sum()
        recalls.append(both / there)
        f1s.append(2 * both / (said + there))
        ious.append(both / (said + there - both))
    assert math.isclose(metrics.mean_recall(matrix), float(np.mean(recalls)), abs_tol=1e-12)
    assert math.isclose(metrics.macro_f1(matrix), float(np.mean(f1s)), abs_tol=1e-12)
    assert math.isclose(metrics.mean_iou(matrix), float(np.mean(ious)), abs_tol=1e-12)


def test_unknown_truth_is_left_out() -> None:
    truth = np.array([[0, 1, -1], [255, 1, 0]])
    matrix = metrics.confusion_matrix(np.zeros((2, 3), np.int64), truth, 2)
    assert matrix.tolist() == [[2, 0], [2, 0]]


def test_nothing_has_no_measure() -> None:
    empty = np.zeros((CLASSES, CLASSES), np.int64)
    nothing = np.zeros(0, np.int64)
    values = (metrics.mean_iou(empty), metrics.mean_recall(empty), metrics.macro_f1(empty))
    assert np.isnan([*values, metrics.pixel_accuracy(empty), metrics.accuracy(nothing, nothing)]).all()
    assert math.isnan(metrics.recall_at(np.zeros(3, np.int64), 1))
    assert math.isnan(metrics.reliability(np.zeros(0), np.zeros(0, bool)).error)


@given(scored())
def test_auroc_counts_pairs(rows: tuple[NDArray[np.float64], NDArray[np.bool_]]) -> None:
    scores, positive = rows
    pairs = [(high > low) + (high == low) / 2 for high in scores[positive] for low in scores[~positive]]
    expected = sum(pairs) / len(pairs) if pairs else math.nan
    assert _same(metrics.auroc(scores, positive), expected)


@given(scored())
def test_average_precision_without_ties(rows: tuple[NDArray[np.float64], NDArray[np.bool_]]) -> None:
    scores, positive = rows
    distinct = scores + np.arange(len(scores)) * 1e-6
    ranked = sorted(zip(-distinct, positive, strict=True))
    places = [place for place, (_, hit) in enumerate(ranked, start=1) if hit]
    precisions = [n / place for n, place in enumerate(places, start=1)]
    expected = sum(precisions) / len(precisions) if precisions else math.nan
    assert _same(metrics.average_precision(distinct, positive), expected)


@given(scored())
def test_reliability_bins(rows: tuple[NDArray[np.float64], NDArray[np.bool_]]) -> None:
    confidence, correct = rows
    found = metrics.reliability(confidence, correct, bins=5)
    error = 0.0
    for n in range(5):
        inside = [
            k for k, value in enumerate(confidence) if n / 5 < value <= (n + 1) / 5 + 1e-12 or (n == 0 and value == 0)
        ]
        assert found.count[n] == len(inside)
        if inside:
            assert _same(found.confidence[n], float(np.mean(confidence[inside])))
            assert _same(found.correct[n], float(np.mean(correct[inside])))
            error += len(inside) / len(confidence) * abs(np.mean(confidence[inside]) - np.mean(correct[inside]))
    assert math.isclose(found.error, error, abs_tol=1e-12)


def test_certain_and_right_is_calibrated_certain_and_wrong_is_not() -> None:
    assert metrics.reliability(np.ones(8), np.ones(8, bool)).error == 0.0
    assert metrics.reliability(np.ones(8), np.zeros(8, bool)).error == 1.0


@given(st.integers(0, 10_000))
def test_ranks_agree_with_sorting(seed: int) -> None:
    random = np.random.default_rng(seed)
    similarity = random.integers(0, 5, (6, 7)).astype(np.float64)
    relevant = random.random((6, 7)) < 0.3
    for query, rank in enumerate(metrics.retrieval_ranks(similarity, relevant)):
        # Relevant items last among equals: the worst order that the scores allow.
        order = sorted(range(7), key=lambda n: (-similarity[query, n], relevant[query, n]))
        places = [place for place, n in enumerate(order, start=1) if relevant[query, n]]
        assert rank == (places[0] if places else 0)


def test_recall_counts_any_of_the_clips_with_the_caption() -> None:
    similarity = np.array([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5], [0.0, 0.0, 0.0]])
    relevant = np.array([[True, True, False], [False, True, False], [False, False, False]])
    ranks = metrics.retrieval_ranks(similarity, relevant)
    assert ranks.tolist() == [1, 3, 0]
    assert metrics.recall_at(ranks, 1) == 0.5
    assert metrics.recall_at(ranks, 3) == 1.0


def test_bootstrap_agrees_with_drawing_groups_by_hand() -> None:
    values, groups = np.array([1.0, 2.0, 10.0, 4.0, 0.0]), ["b", "a", "b", "c", "a"]

    def mean(rows: NDArray[np.int64]) -> float:
        return float(values[rows].mean())

    found = metrics.bootstrap(mean, groups, draws=500, seed=3)
    members = [[1, 4], [0, 2], [3]]
    picks = np.random.default_rng(3).integers(0, 3, (500, 3))
    by_hand = [np.mean([values[row] for n in pick for row in members[n]]) for pick in picks]
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(by_hand, [0.025, 0.975])))


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        values = np.repeat(random.normal(size=40), 3)
        found = metrics.bootstrap(lambda rows, values=values: values[rows].mean(), np.repeat(np.arange(40), 3).tolist(),
                                  draws=200, seed=trial)  # fmt: skip
        covered += found.low <= 0.0 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_rows_of_one_group_are_no_independent_evidence() -> None:
    values = np.repeat([0.0, 1.0, 0.0, 1.0], 25)
    alone = metrics.bootstrap(lambda rows: values[rows].mean(), list(range(100)))
    grouped = metrics.bootstrap(lambda rows: values[rows].mean(), np.repeat(np.arange(4), 25).tolist())
    assert grouped.high - grouped.low > 3 * (alone.high - alone.low)


def test_draws_without_a_measure_are_left_out() -> None:
    positive = np.array([True, False, False, False, False, False])
    scores = np.array([0.9, 0.1, 0.2, 0.95, 0.3, 0.4])
    found = metrics.bootstrap(lambda rows: metrics.auroc(scores[rows], positive[rows]), list("abcdef"))
    assert found.value == pytest.approx(0.8)
    assert 0.0 <= found.low <= 0.8 <= found.high <= 1.0


def test_no_interval_where_there_can_be_none() -> None:
    one = metrics.bootstrap(lambda rows: 1.0, ["a", "a"])
    assert one.value == 1.0
    assert math.isnan(one.low)
    never = metrics.bootstrap(lambda rows: math.nan if len(set(rows.tolist())) < 4 else 0.5, list("abcd"))
    assert never.value == 0.5
    assert math.isnan(never.high)
    with pytest.raises(ValueError, match="no rows"):
        metrics.bootstrap(lambda rows: 0.0, [])


def _same(found: float, expected: float) -> bool:
    return (math.isnan(found) and math.isnan(expected)) or math.isclose(found, expected, abs_tol=1e-12)
