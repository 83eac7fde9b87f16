"""Temperatures and thresholds chosen on validation data, for any model's heads.

Temperature scaling: Guo et al., ICML 2017 (arXiv:1706.04599). Thresholds are where a label's event starts and
ends; they favour precision, since an alarm that is wrong costs the user's trust in all the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from models.config import Fraction01, HeadConfig, Strict

Floats = NDArray[np.floating[Any]]

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.1, 20.0
"""Bounds: scores that are told apart without error would drive the temperature to zero."""
BETA = 0.5
"""Precision counts for more than recall in the F-measure."""
MIN_PRECISION = 0.6
"""A label that cannot be this right at any threshold gets ``HIGHEST_ON``."""
MIN_POSITIVES = 3
"""A label with fewer in the validation data gets ``DEFAULT_ON``: a threshold fitted to them would mean nothing."""
LOWEST_ON, DEFAULT_ON, HIGHEST_ON = 0.1, 0.5, 0.95
GAP = 0.2
"""An event ends when the score falls this far under its threshold, or to half of it where that is more."""


class LabelThreshold(Strict):
    """Hysteresis on a label's score."""

    on: Fraction01
    """An event starts over this."""
    off: Fraction01
    """It ends under this."""


class HeadCalibration(Strict):
    """One head's."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Logits are divided by this before the activation."""
    thresholds: dict[str, LabelThreshold] = Field(default_factory=dict)
    """By label; labels of the background have none."""


class Calibration(Strict):
    """All heads', as ``model.json`` keeps it."""

    heads: dict[str, HeadCalibration] = Field(default_factory=dict)
    """By name; a head that no validation row had a label for is not in it."""

    def temperature(self, head: str) -> float:
        """Temperature of a head; 1 where it was not calibrated."""
        return self.heads[head].temperature if head in self.heads else 1.0

    def thresholds(self, head: str) -> dict[str, LabelThreshold]:
        """Thresholds of a head by label; empty where it was not calibrated."""
        return self.heads[head].thresholds if head in self.heads else {}


def calibrate(logits: Mapping[str, Floats], targets: Mapping[str, Floats], heads: Sequence[HeadConfig]) -> Calibration:
    """Choose temperatures and thresholds of the ``class`` and ``action`` heads on validation data.

    By head name ``logits`` float ``[N, labels]`` and ``targets`` float ``[N, labels]``: a distribution over labels
    for a single-label head, 0..1 each for a multi-label one, NaN where unknown. Heads without either, or without
    a known target, are left out.
    """
    found = {}
    for head in heads:
        if head.kind in ("class", "action") and head.name in logits and head.name in targets:
            one = calibrate_head(logits[head.name], targets[head.name], head)
            if one is not None:
                found[head.name] = one
    return Calibration(heads=found)


def calibrate_head(logits: Floats, targets: Floats, head: HeadConfig) -> HeadCalibration | None:
    """One head's temperature and thresholds; ``None`` when no target is known. Shapes as ``calibrate``."""
    known = ~np.isnan(targets) if head.multi_label else np.repeat(_known_rows(targets)[:, None], targets.shape[1], 1)
    if not known.any():
        return None
    temperature = round(best_temperature(logits, targets, multi_label=head.multi_label), 4)
    scores = probabilities(logits, temperature, multi_label=head.multi_label)
    thresholds = {}
    for column, label in enumerate(head.labels):
        if label not in head.background:
            rows = known[:, column]
            on = best_threshold(scores[rows, column], targets[rows, column] > 0.5)
            thresholds[label] = LabelThreshold(on=on, off=round(max(on - GAP, on / 2), 3))
    return HeadCalibration(temperature=temperature, thresholds=thresholds)


def probabilities(logits: Floats, temperature: float = 1.0, *, multi_label: bool) -> NDArray[np.float64]:
    """float64 ``[N, labels]``: sigmoid of each logit, or softmax over the last axis, at a temperature."""
    scaled = np.asarray(logits, np.float64) / temperature
    if multi_label:
        # tanh cannot overflow.
        return np.asarray(0.5 + 0.5 * np.tanh(scaled / 2), np.float64)
    exp = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return np.asarray(exp / exp.sum(axis=-1, keepdims=True), np.float64)


def best_temperature(logits: Floats, targets: Floats, *, multi_label: bool) -> float:
    """The temperature with the least negative log-likelihood, within its bounds; 1 when no target is known.

    The loss is convex in the inverse temperature, so its slope, which is the mean of logit times (probability -
    target), has one zero, found by bisection. Shapes as ``calibrate``.
    """
    rows = slice(None) if multi_label else _known_rows(targets)
    scores, truth = np.asarray(logits, np.float64)[rows], np.asarray(targets, np.float64)[rows]
    if np.isnan(truth).all():
        return 1.0

    def slope(inverse: float) -> float:
        distance = probabilities(scores, 1 / inverse, multi_label=multi_label) - truth
        return float(np.nansum(scores * distance))

    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    if slope(low) >= 0:
        return MAX_TEMPERATURE
    if slope(high) <= 0:
        return MIN_TEMPERATURE
    while high / low > 1 + 1e-6:
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return 1 / high


def best_threshold(
    scores: Floats, positive: NDArray[np.bool_], *, beta: float = BETA, min_precision: float = MIN_PRECISION
) -> float:
    """The threshold with the best F-measure among those precise enough, within ``LOWEST_ON..HIGHEST_ON``.

    ``scores`` float ``[N]`` in 0..1, ``positive`` bool ``[N]``. It lies halfway between two scores, so that neither
    depends on rounding. ``DEFAULT_ON`` with fewer than ``MIN_POSITIVES``; ``HIGHEST_ON`` when none is precise enough.
    """
    if positive.sum() < MIN_POSITIVES:
        return DEFAULT_ON
    levels = np.unique(np.asarray(scores, np.float64))
    between = np.unique(np.clip((levels[1:] + levels[:-1]) / 2, LOWEST_ON, HIGHEST_ON).round(3))
    candidates = np.union1d(between, [LOWEST_ON, HIGHEST_ON])
    over = scores[None, :] >= candidates[:, None]
    hits, said = (over & positive).sum(axis=1), over.sum(axis=1)
    measure = (1 + beta**2) * hits / (beta**2 * positive.sum() + said)
    measure[(hits == 0) | (hits < min_precision * said)] = -1.0
    return float(candidates[measure.argmax()]) if measure.max() > 0 else HIGHEST_ON


def _known_rows(targets: Floats) -> NDArray[np.bool_]:
    return np.asarray(~np.isnan(targets).any(axis=1), bool)
