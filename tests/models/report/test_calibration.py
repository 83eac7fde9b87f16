"""Temperatures and thresholds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from models.calibration import (
    DEFAULT_ON,
    HIGHEST_ON,
    LOWEST_ON,
    MIN_POSITIVES,
    MIN_PRECISION,
    MIN_TEMPERATURE,
    Calibration,
    best_temperature,
    best_threshold,
    calibrate,
    probabilities,
)
from models.config import HeadConfig
from models.metrics import reliability

SOUND = HeadConfig(name="sound", kind="class", labels=("dog", "cat", "none"), background=("none",))
ACTION = HeadConfig(name="action", kind="action", labels=("run", "wave"), multi_label=True)


def overconfident(seed: int, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are ``factor`` times too large, and labels drawn from the right probabilities."""
    random = np.random.default_rng(seed)
    right = random.normal(size=(4000, 3)) * 1.5
    labels = (right + random.gumbel(size=right.shape)).argmax(axis=1)
    return right * factor, np.eye(3)[labels]


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
def test_temperature_undoes_overconfidence(factor: float) -> None:
    logits, targets = overconfident(0, factor)
    assert best_temperature(logits, targets, multi_label=False) == pytest.approx(factor, rel=0.06)


def test_scaled_scores_are_right_as_often_as_they_say() -> None:
    logits, targets = overconfident(1, 4.0)
    found = calibrate({"sound": logits[:2000]}, {"sound": targets[:2000]}, [SOUND])
    held_out, truth = logits[2000:], targets[2000:].argmax(axis=1)
    errors = []
    for temperature in (1.0, found.temperature("sound")):
        scores = probabilities(held_out, temperature, multi_label=False)
        errors.append(reliability(scores.max(axis=1), scores.argmax(axis=1) == truth).error)
    assert errors[0] > 0.15
    assert errors[1] < 0.05


@given(st.integers(0, 1000), st.booleans())
@settings(max_examples=20)
def test_no_other_temperature_has_less_loss(seed: int, multi_label: bool) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(size=(60, 3)) * random.uniform(0.5, 5)
    truth = (logits + random.logistic(size=logits.shape) * 3 > 0).astype(np.float64)
    targets = truth if multi_label else np.eye(3)[(logits + random.gumbel(size=logits.shape) * 3).argmax(axis=1)]
    scores, wanted = torch.from_numpy(logits), torch.from_numpy(targets)

    def loss(temperature: float) -> float:
        if multi_label:
            return float(F.binary_cross_entropy_with_logits(scores / temperature, wanted))
        return float(F.cross_entropy(scores / temperature, wanted))

    best = loss(best_temperature(logits, targets, multi_label=multi_label))
    assert all(best <= loss(float(other)) + 1e-9 for other in np.geomspace(0.1, 20.0, 200))


def test_unknown_targets_have_no_say() -> None:
    logits, targets = overconfident(2, 3.0)
    half = targets.copy()
    half[::2] = np.nan
    without = best_temperature(logits[1::2], targets[1::2], multi_label=False)
    assert best_temperature(logits, half, multi_label=False) == without
    many = (targets > 0).astype(np.float64)
    many[::2, 0] = np.nan
    scores = logits.copy()
    scores[::2, 0] = 1e6
    assert best_temperature(scores, many, multi_label=True) == best_temperature(logits, many, multi_label=True)


def test_perfect_scores_keep_a_finite_temperature() -> None:
    targets = np.eye(3)[np.arange(30) % 3]
    assert best_temperature(targets * 10, targets, multi_label=False) == MIN_TEMPERATURE
    assert best_temperature(targets, np.full((30, 3), np.nan), multi_label=False) == 1.0


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=8, max_size=60))
def test_threshold_is_the_best_there_is(rows: list[tuple[int, bool]]) -> None:
    scores, positive = np.array([s / 20 for s, _ in rows]), np.array([p for _, p in rows])

    def measure(on: float) -> float:
        over = scores >= on
        hits = int((over & positive).sum())
        if hits == 0 or hits / int(over.sum()) < MIN_PRECISION:
            return -1.0
        precision, recall = hits / int(over.sum()), hits / int(positive.sum())
        return 1.25 * precision * recall / (0.25 * precision + recall)

    found = best_threshold(scores, positive)
    if positive.sum() < MIN_POSITIVES:
        assert found == DEFAULT_ON
        return
    best = max(measure(on) for on in np.linspace(LOWEST_ON, HIGHEST_ON, 171))
    if best < 0:
        assert found == HIGHEST_ON
    else:
        assert measure(found) == pytest.approx(best)


def test_heads_without_known_targets_are_left_out() -> None:
    logits = {"sound": np.zeros((5, 3)), "action": np.zeros((5, 2))}
    targets = {"sound": np.full((5, 3), np.nan), "action": np.array([[1.0, np.nan]] * 5)}
    found = calibrate(logits, targets, [SOUND, ACTION])
    assert set(found.heads) == {"action"}
    assert found.temperature("sound") == 1.0
    assert found.thresholds("sound") == {}


def test_background_has_no_threshold_and_it_survives_json() -> None:
    logits, targets = overconfident(3, 1.0)
    found = calibrate({"sound": logits}, {"sound": targets}, [SOUND])
    assert set(found.thresholds("sound")) == {"dog", "cat"}
    assert all(0 <= limit.off < limit.on <= 1 for limit in found.thresholds("sound").values())
    assert Calibration.model_validate_json(found.model_dump_json()) == found


def test_extreme_logits_stay_finite() -> None:
    wild = np.array([[1e4, -1e4], [-1e4, 1e4]])
    for multi_label in (True, False):
        assert np.isfinite(probabilities(wild, multi_label=multi_label)).all()
