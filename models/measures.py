"""From a model's scores to the numbers reported: each with its interval and what an answer that does not look gets."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.metrics import (
    Floats,
    Indices,
    Interval,
    Reliability,
    accuracy,
    auroc,
    average_precision,
    bootstrap,
    bootstrap_each,
    class_scores,
    confusion_matrix,
    macro_f1,
    mean_iou,
    mean_recall,
    pixel_accuracy,
    recall_at,
    reliability,
    retrieval_ranks,
)
from models.scored import AnswerScores, LabelScores, MaskScores, RetrievalScores, Scored

DRAWS = 1000
"""Of the bootstrap."""
_WORK = 30_000_000
"""Scores that the intervals of a head's labels may sort in all, a few seconds: over it there are fewer draws …"""
_FEWEST_DRAWS = 200
"""… and under this many none, as with hundreds of classes."""
_QUERIES = 512
"""Compared with the gallery at once."""
RECALLS = (1, 5)
LABEL_MEASURES = ("precision", "recall", "f1", "ap", "auc")


@dataclass(frozen=True, slots=True)
class Measure:
    """One number of a report."""

    head: str
    """Of which head."""
    name: str
    """What: ``accuracy``, ``auc``, …"""
    label: str | None
    """Of which label; ``None`` for the head in all."""
    title: str
    """For people."""
    interval: Interval
    """The number, and its 95 % interval over groups."""
    baseline: float | None = None
    """What an answer that does not look would reach; ``None`` where that says nothing."""

    @property
    def key(self) -> str:
        """In ``metrics.json``."""
        parts = (self.head, self.name) if self.label is None else (self.head, self.label, self.name)
        return re.sub(r"[^A-Za-z0-9]+", "_", "_".join(parts))


def measure(scored: Scored, draws: int = DRAWS) -> tuple[Measure, ...]:
    """Everything that can be measured, head by head; empty when nothing is known of any row."""
    groups = [row.group for row in scored.rows]
    return tuple(found for head in scored.heads for found in measure_head(head, groups, draws))


def measure_head(
    head: LabelScores | MaskScores | RetrievalScores | AnswerScores, groups: Sequence[str], draws: int
) -> Iterator[Measure]:
    """One head's measures, the most telling first."""
    match head:
        case LabelScores():
            yield from _of_choice(head, groups, draws)
            yield from _of_labels(head, groups, draws)
        case MaskScores():
            yield from _of_masks(head, groups, draws)
        case RetrievalScores():
            yield from _of_retrieval(head, groups, draws)
        case AnswerScores():
            yield from _of_answers(head, groups, draws)


def flat(measures: Sequence[Measure]) -> dict[str, float | None]:
    """``metrics.json``: by key the value, ``_low``, ``_high`` and where there is one ``_baseline``; null for nan."""
    found: dict[str, float | None] = {}
    for one in measures:
        interval = one.interval
        for suffix, value in (("", interval.value), ("_low", interval.low), ("_high", interval.high)):
            found[one.key + suffix] = _rounded(value)
        if one.baseline is not None:
            found[one.key + "_baseline"] = _rounded(one.baseline)
    return found


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The label chosen for each row that has exactly one."""

    rows: Indices
    """int64 ``[n]``: which rows."""
    labels: tuple[str, ...]
    """Among which labels."""
    truth: Indices
    """int64 ``[n]``, index into ``labels``."""
    predicted: Indices
    """int64 ``[n]``, index into ``labels``."""
    confidence: Floats
    """float ``[n]``: score of the predicted label."""


def choose(head: LabelScores, *, among_present: bool) -> Choice:
    """The best scored label of each row with one label, among all labels or among those present in truth."""
    rows = np.flatnonzero((head.targets > 0.5).sum(axis=1) == 1)
    truth = np.nan_to_num(head.targets[rows]).argmax(axis=1)
    columns = np.unique(truth) if among_present else np.arange(len(head.labels))
    scores = head.scores[rows][:, columns]
    return Choice(
        rows=rows,
        labels=tuple(head.labels[column] for column in columns),
        truth=np.searchsorted(columns, truth),
        predicted=scores.argmax(axis=1) if len(columns) else np.zeros(0, np.int64),
        confidence=scores.max(axis=1) if len(columns) else np.zeros(0),
    )


def head_reliability(head: LabelScores, bins: int = 10) -> Reliability:
    """Of the chosen label's score; for a multi-label head of every score whose truth is known."""
    if head.multi_label:
        known = ~np.isnan(head.targets)
        return reliability(head.scores[known], head.targets[known] > 0.5, bins)
    choice = choose(head, among_present=False)
    return reliability(choice.confidence, choice.predicted == choice.truth, bins)


def _of_choice(head: LabelScores, groups: Sequence[str], draws: int) -> Iterator[Measure]:
    every, present = choose(head, among_present=False), choose(head, among_present=True)
    if not len(every.rows):
        return
    owners = [groups[row] for row in every.rows]
    counts = np.bincount(every.truth)
    majority, chance = float(counts.max() / counts.sum()), 1 / max(1, len(present.labels))
    if not head.multi_label:
        size = len(head.labels)
        yield _measure(head.head, "accuracy", "accuracy", owners, draws, _accuracy(every), majority)
        balanced = _of_matrix(every, size, mean_recall)
        yield _measure(head.head, "balanced_accuracy", "balanced accuracy", owners, draws, balanced, chance)
        yield _measure(head.head, "macro_f1", "macro F1", owners, draws, _of_matrix(every, size, macro_f1))

        def error(rows: Indices) -> float:
            return reliability(every.confidence[rows], every.predicted[rows] == every.truth[rows]).error

        yield _measure(head.head, "ece", "expected calibration error", owners, draws, error)
    if len(present.labels) > 1 and (head.multi_label or len(present.labels) < len(head.labels)):
        title = f"accuracy of the choice among the {len(present.labels)} labels in the manifest"
        yield _measure(head.head, "choice_accuracy", title, owners, draws, _accuracy(present), majority)


def _accuracy(choice: Choice) -> Callable[[Indices], float]:
    return lambda rows: accuracy(choice.predicted[rows], choice.truth[rows])


def _of_matrix(choice: Choice, size: int, measure: Callable[[Indices], float]) -> Callable[[Indices], float]:
    return lambda rows: measure(confusion_matrix(choice.predicted[rows], choice.truth[rows], size))


def said(head: LabelScores) -> NDArray[np.bool_]:
    """bool ``[N, labels]``: the best label, or for a multi-label head those at or over their thresholds."""
    if head.multi_label:
        limits = np.array([head.thresholds.get(label, 0.5) for label in head.labels])
        return np.asarray(head.scores >= limits, bool)
    best = head.scores.argmax(axis=1)
    return np.asarray(best[:, None] == np.arange(len(head.labels)), bool)


def _of_labels(head: LabelScores, groups: Sequence[str], draws: int) -> Iterator[Measure]:
    known, positive = ~np.isnan(head.targets), np.nan_to_num(head.targets) > 0.5
    columns = np.flatnonzero(positive.any(axis=0))
    if not len(columns):
        return
    size, prevalence = len(columns), _prevalence(positive, known)[columns]
    counted = _count_measures(said(head)[:, columns], positive[:, columns], known[:, columns])
    intervals = list(bootstrap_each(counted, groups, draws=draws))
    affordable = min(draws, _WORK // head.scores[:, columns].size)
    for name, title, score in _RANKED:
        ranked = _rank_measure(head.scores[:, columns], positive[:, columns], known[:, columns], score)
        *each, mean = bootstrap_each(ranked, groups, draws=affordable if affordable >= _FEWEST_DRAWS else 0)
        intervals += each
        yield Measure(head.head, f"mean_{name}", None, title, mean, 0.5 if name == "auc" else float(prevalence.mean()))
    for place, column in enumerate(columns):
        baselines = {"auc": 0.5, "ap": float(prevalence[place])}
        for n, name in enumerate(LABEL_MEASURES):
            label, interval = head.labels[column], intervals[n * size + place]
            yield Measure(head.head, name, label, f"{label}: {name}", interval, baselines.get(name))


_RANKED = (("ap", "mean average precision", average_precision), ("auc", "mean area under the ROC curve", auroc))


def _prevalence(positive: NDArray[np.bool_], known: NDArray[np.bool_]) -> Floats:
    return np.asarray((positive & known).sum(axis=0) / np.maximum(known.sum(axis=0), 1), np.float64)


def _count_measures(
    answered: NDArray[np.bool_], positive: NDArray[np.bool_], known: NDArray[np.bool_]
) -> Callable[[Indices], Floats]:
    """Precision, recall and F1 of every label, one after the other, of the rows drawn."""
    tables = [part.astype(np.float64) for part in (answered & positive & known, answered & known, positive & known)]

    def scores(rows: Indices) -> Floats:
        weights = np.bincount(rows, minlength=len(known)).astype(np.float64)
        hit, claimed, there = (weights @ table for table in tables)
        with np.errstate(invalid="ignore"):
            return np.concatenate([hit / claimed, hit / there, 2 * hit / (claimed + there)])

    return scores


def _rank_measure(
    scores: Floats, positive: NDArray[np.bool_], known: NDArray[np.bool_], score: Callable[..., float]
) -> Callable[[Indices], Floats]:
    """A measure of ranking of every label, of the rows drawn, and at the end the mean of those that are defined."""

    def values(rows: Indices) -> Floats:
        found = []
        for column in range(scores.shape[1]):
            chosen = rows[known[rows, column]]
            found.append(score(scores[chosen, column], positive[chosen, column]))
        defined = [value for value in found if not math.isnan(value)]
        return np.array([*found, sum(defined) / len(defined) if defined else math.nan], np.float64)

    return values


def _of_masks(head: MaskScores, groups: Sequence[str], draws: int) -> Iterator[Measure]:
    rows = np.flatnonzero(head.confusions.sum(axis=(1, 2)) > 0).tolist()
    if not rows:
        return
    owners, counts = [groups[row] for row in rows], head.confusions[rows]

    def summed(measure: Callable[[Indices], float]) -> Callable[[Indices], float]:
        return lambda drawn: measure(counts[drawn].sum(axis=0))

    truth = counts.sum(axis=(0, 2))
    share = float(truth.max() / truth.sum())
    blind = share / int((truth > 0).sum())
    yield _measure(head.head, "miou", "mean intersection over union", owners, draws, summed(mean_iou), blind)
    yield _measure(head.head, "pixel_accuracy", "pixel accuracy", owners, draws, summed(pixel_accuracy), share)
    found = bootstrap_each(lambda drawn: class_scores(counts[drawn].sum(axis=0)).iou, owners, draws=draws)
    for column in np.flatnonzero(truth):
        label = head.labels[column]
        yield Measure(head.head, "iou", label, f"{label}: intersection over union", found[column])


def _of_retrieval(head: RetrievalScores, groups: Sequence[str], draws: int) -> Iterator[Measure]:
    asked = [row for row, caption in enumerate(head.captions) if caption.strip()]
    if not asked:
        return
    ranks, relevant = caption_ranks(head, np.array(asked, np.int64))
    owners, size = [groups[row] for row in asked], len(head.captions)
    for k in RECALLS:
        chance = float(np.mean([_chance(size, int(count), k) for count in relevant]))
        title = f"text to clip, among the first {k} of {size}"
        yield _measure(head.head, f"r{k}", title, owners, draws, _recall(ranks, k), chance)


def _recall(ranks: Indices, k: int) -> Callable[[Indices], float]:
    return lambda rows: recall_at(ranks[rows], k)


def caption_ranks(head: RetrievalScores, asked: Indices) -> tuple[Indices, Indices]:
    """Rank of the first right clip for each caption asked, and how many clips are right for it.

    Clips whose captions agree but for case, spaces and punctuation are right for each other's.
    """
    plain = [_plain(caption) for caption in head.captions]
    numbers = np.unique(plain, return_inverse=True)[1]
    ranks, counts = [], []
    for first in range(0, len(asked), _QUERIES):
        part = asked[first : first + _QUERIES]
        right = numbers[part][:, None] == numbers[None, :]
        similarity = np.asarray(head.texts[part], np.float64) @ np.asarray(head.clips, np.float64).T
        ranks.append(retrieval_ranks(similarity, right))
        counts.append(right.sum(axis=1))
    return np.concatenate(ranks), np.concatenate(counts).astype(np.int64)


def _chance(size: int, right: int, k: int) -> float:
    """That one of ``right`` among ``size`` in random order is among the first ``k``."""
    return 1 - math.comb(size - right, min(k, size)) / math.comb(size, min(k, size))


def _of_answers(head: AnswerScores, groups: Sequence[str], draws: int) -> Iterator[Measure]:
    asked = [row for row, answer in enumerate(head.answers) if answer.strip()]
    if not asked:
        return
    owners, wanted = [groups[row] for row in asked], [_plain(head.answers[row]) for row in asked]
    given = [_plain(head.given[row]) for row in asked]
    exact = np.array([one == other for one, other in zip(given, wanted, strict=True)], np.float64)
    words = np.array([word_f1(one, other) for one, other in zip(given, wanted, strict=True)])
    commonest = Counter(wanted).most_common(1)[0][1] / len(wanted)
    title = "answers that are right to the word"
    yield _measure(head.head, "exact", title, owners, draws, lambda rows: float(exact[rows].mean()), commonest)
    yield _measure(head.head, "word_f1", "F1 of the words", owners, draws, lambda rows: float(words[rows].mean()))


def word_f1(given: str, wanted: str) -> float:
    """Harmonic mean of the shares of words that two texts have in common (Rajpurkar et al., EMNLP 2016)."""
    one, other = Counter(given.split()), Counter(wanted.split())
    both = sum((one & other).values())
    total = sum(one.values()) + sum(other.values())
    return 2 * both / total if total else 1.0


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def _measure(
    head: str,
    name: str,
    title: str,
    groups: Sequence[str],
    draws: int,
    metric: Callable[[Indices], float],
    baseline: float | None = None,
) -> Measure:
    return Measure(head, name, None, title, bootstrap(metric, groups, draws=draws), baseline)
