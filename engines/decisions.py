"""What heads decide, and how often two engines decide the same: which labels are over their thresholds, which is best.

An error that is small beside the output can still move a score across its threshold, and then an event is there or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.manifest import Head, HeadKind, Manifest, Threshold
from engines.types import Array

DEFAULT_THRESHOLD = Threshold(on=0.6, off=0.4)
"""Of labels that the manifest has none for; the service's own (``stream.events``)."""
TIE = 1e-3
"""A reference's score this close to a threshold, or to its best one, is a tie, which nothing is held to: rounding in
fp32 may move scores by as much."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How often two engines decide the same on a head; shares are over the windows compared."""

    windows: float
    """Share of windows in which every reported label is on the same side of its ``on`` threshold; where one label
    excludes the others (softmax), the best label must be the same too."""
    both_sides: float
    """The same, where each must be on the same side of its ``off`` threshold too."""
    labels: float
    """Share of the sides of ``on`` and of ``off`` thresholds that are the same, over windows and reported labels."""


def scored_heads(manifest: Manifest, graph: str) -> list[Head]:
    """The heads with labels to decide on that are read from a graph."""
    branches = [branch for branch in manifest.branches if branch.graph == graph]
    return [head for one in branches for head in one.heads if head.kind in (HeadKind.ACTION, HeadKind.CLASS)]


def scores_of(head: Head, logits: Array) -> NDArray[np.float64]:
    """Probabilities ``[B, labels]`` of logits ``[B, labels]``, at the head's temperature."""
    scaled = logits.astype(np.float64) / head.temperature
    if head.activation == "sigmoid":
        return np.asarray(0.5 * (1 + np.tanh(scaled / 2)), np.float64)
    exp = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return np.asarray(exp / exp.sum(axis=-1, keepdims=True), np.float64)


def agreement(head: Head, want: Array, got: Array) -> Agreement:
    """Compare the logits ``[B, labels]`` of a reference and of an engine. What is no number agrees with nothing."""
    limits = [head.thresholds.get(label, DEFAULT_THRESHOLD) for label in head.labels]
    reported = np.array([label not in head.background for label in head.labels])
    sure, said = scores_of(head, want), scores_of(head, got)
    on = _same_side(sure, said, np.array([limit.on for limit in limits]))
    off = _same_side(sure, said, np.array([limit.off for limit in limits]))
    same = on[:, reported].all(axis=1)
    if head.activation == "softmax":
        same &= _same_best(sure, said)
    sides = np.concatenate([on[:, reported], off[:, reported]])
    strict = same & off[:, reported].all(axis=1)
    return Agreement(float(same.mean()), float(strict.mean()), float(sides.mean()) if sides.size else 1.0)


def _same_side(want: Array, got: Array, limit: Array) -> NDArray[np.bool_]:
    same = ((want >= limit) == (got >= limit)) | (np.abs(want - limit) <= TIE)
    return np.asarray(same & np.isfinite(got), np.bool_)


def _same_best(want: Array, got: Array) -> NDArray[np.bool_]:
    theirs = np.take_along_axis(want, got.argmax(axis=-1)[:, None], axis=-1)[:, 0]
    return np.asarray((want.max(axis=-1) - theirs <= TIE) & np.isfinite(got).all(axis=-1), np.bool_)


def agreements(
    heads: Sequence[Head], want: Sequence[Mapping[str, Array]], got: Sequence[Mapping[str, Array]]
) -> dict[str, Agreement]:
    """By head, over all batches of outputs."""
    found = {}
    for head in heads:
        both = (np.concatenate([batch[head.output] for batch in outputs]) for outputs in (want, got))
        found[head.name] = agreement(head, *both)
    return found
