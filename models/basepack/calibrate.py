"""Temperatures and thresholds from scores of recordings that the scoring weights were not trained on.

Temperature: Guo et al., ICML 2017 (arXiv:1706.04599). Thresholds favour precision: an alarm that is wrong
costs the user's trust in all the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from models.basepack.labels import ACTIONS, SOUNDS
from models.basepack.network import Calibration
from models.basepack.predict import ActionScores, SoundScores
from models.basepack.tables import ORDINARY
from models.losses import known_cross_entropy

MAX_FALSE_RATE = 0.01
"""Share of the windows without an action that may lie over its threshold, in all and in each kind of ordinary video."""
MIN_PRECISION = 0.6
"""A label that cannot be this right stays at ``HIGHEST_ON``."""
BETA = 0.5
"""Precision counts for more than recall in the F-measure."""
PRIOR = 0.1
"""Share of windows with a label that its scores are made for."""
SLOPE_PENALTY = 1e-3
"""Keeps a slope finite when a label's scores are told apart without error."""
LOWEST_ON, HIGHEST_ON = 0.5, 0.95
GAP = 0.2
"""An event ends when the score falls this far under its threshold."""
_TEMPERATURES = np.geomspace(0.4, 16.0, 60)


@dataclass(frozen=True, slots=True, eq=False)
class LabelScaling:
    """Per label a slope and an offset of the logits (Platt, Advances in Large Margin Classifiers, 1999)."""

    slope: Tensor
    """float32 ``[L]``, positive."""
    offset: Tensor
    """float32 ``[L]``."""

    def __call__(self, actions: ActionScores) -> ActionScores:
        """The same windows with scaled logits."""
        logits = torch.from_numpy(actions.logits) * self.slope + self.offset
        return ActionScores(actions.windows, logits.numpy(), actions.targets)


def label_scaling(actions: ActionScores) -> LabelScaling:
    """From out-of-fold scores: makes a score the chance of a label if it held in ``PRIOR`` of the windows.

    One temperature cannot do that: rare labels would hardly ever come near a half.
    """
    logits, targets = torch.from_numpy(actions.logits), torch.from_numpy(actions.targets)
    positive, negative = (targets == 1).float(), (targets == 0).float()
    weights = PRIOR * positive / positive.sum(0).clamp(min=1) + (1 - PRIOR) * negative / negative.sum(0).clamp(min=1)
    steepness, offset = torch.zeros(logits.shape[1]), torch.zeros(logits.shape[1])
    optimizer = torch.optim.LBFGS([steepness, offset], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        scaled = logits * steepness.exp() + offset
        losses = F.binary_cross_entropy_with_logits(scaled, positive, weights, reduction="none").sum(0)
        value = (losses + SLOPE_PENALTY * steepness.square()).sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    steepness.requires_grad_()
    offset.requires_grad_()
    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return LabelScaling(steepness.detach().exp(), offset.detach())


def calibrate(actions: ActionScores, sounds: SoundScores) -> Calibration:
    """From out-of-fold scores; those of the actions have been through ``label_scaling``."""
    sound_t = _best_temperature(sounds.logits, sounds.targets, _plain_cross_entropy)
    sound_p = softmax(sounds.logits / sound_t)
    kinds = np.array([window.encoded.recording.dataset for window in actions.windows])
    ordinary = [kinds == kind for kind in ORDINARY]
    one_hot = (sounds.targets[:, None] == np.arange(len(SOUNDS))).astype(np.int8)
    return Calibration(
        action_temperature=1.0,
        class_temperature=round(sound_t, 4),
        thresholds={
            "action": _thresholds(sigmoid(actions.logits), actions.targets, ACTIONS, "other", ordinary),
            "class": _thresholds(sound_p, one_hot, SOUNDS, "none"),
        },
    )


def at_thresholds(actions: ActionScores, calibration: Calibration) -> dict[str, dict[str, float | None]]:
    """Precision, recall and false alarms of each label where its events start, camera as it was, out of fold.

    The thresholds were chosen on the same scores, so this is how they were meant, not what is to be expected.
    """
    still = np.array([not w.encoded.tracks[w.track].moving for w in actions.windows])
    scores, targets = sigmoid(actions.logits[still]), actions.targets[still]
    table: dict[str, dict[str, float | None]] = {}
    for label, (on, _) in calibration.thresholds["action"].items():
        column = ACTIONS.index(label)
        known = targets[:, column] >= 0
        positive, over = targets[known, column] == 1, scores[known, column] >= on
        hits = int((positive & over).sum())
        table[label] = {
            "on": on,
            "precision": round(hits / int(over.sum()), 4) if over.any() else None,
            "recall": round(hits / int(positive.sum()), 4) if positive.any() else None,
            "false_alarm_rate": round(int((over & ~positive).sum()) / max(1, int((~positive).sum())), 4),
        }
    return table


def threshold(
    scores: NDArray[np.float32], positive: NDArray[np.bool_], parts: Sequence[NDArray[np.bool_]] = ()
) -> float:
    """The score with the best F-measure among those that few enough negatives exceed, in all and in each part."""
    negatives = [~positive, *(~positive & part for part in parts)]
    best, best_measure = HIGHEST_ON, 0.0
    for candidate in np.arange(LOWEST_ON, HIGHEST_ON + 1e-9, 0.01):
        over = scores >= candidate
        if any(int((over & group).sum()) > MAX_FALSE_RATE * max(1, int(group.sum())) for group in negatives):
            continue
        hits, false = int((over & positive).sum()), int((over & ~positive).sum())
        if hits < MIN_PRECISION * (hits + false):
            continue
        missed = int(positive.sum()) - hits
        measure = (1 + BETA**2) * hits / max(1e-9, (1 + BETA**2) * hits + BETA**2 * missed + false)
        if measure > best_measure:
            best, best_measure = float(candidate), measure
    return round(best, 2)


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logistic function."""
    return torch.sigmoid(torch.from_numpy(np.asarray(logits, np.float32))).numpy()


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Over the last axis."""
    return torch.softmax(torch.from_numpy(np.asarray(logits, np.float32)), dim=-1).numpy()


def _thresholds(
    scores: NDArray[np.float32],
    targets: NDArray[np.int8],
    labels: tuple[str, ...],
    background: str,
    parts: Sequence[NDArray[np.bool_]] = (),
) -> dict[str, tuple[float, float]]:
    found = {}
    for column, label in enumerate(labels):
        known = targets[:, column] >= 0
        if label != background:
            on = threshold(scores[known, column], targets[known, column] == 1, [part[known] for part in parts])
            found[label] = (on, round(on - GAP, 2))
    return found


def _best_temperature(logits: NDArray[np.float32], targets: NDArray[np.generic], loss: object) -> float:
    assert callable(loss)
    scores, truth = torch.from_numpy(logits), torch.from_numpy(targets)
    losses = [float(loss(scores / float(t), truth)) for t in _TEMPERATURES]
    return float(_TEMPERATURES[int(np.argmin(losses))])


def _plain_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return known_cross_entropy(logits, targets, smoothing=0.0)
