"""From scores to reported numbers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from models.measures import choose, flat, head_reliability, measure, said, word_f1
from models.scored import AnswerScores, LabelScores, MaskScores, RetrievalScores, Scored, ScoredRow

LABELS = ("run", "walk", "wave")


def rows(count: int, groups: int = 0) -> tuple[ScoredRow, ...]:
    return tuple(ScoredRow(f"clip{n}.mp4", f"g{n % (groups or count)}") for n in range(count))


def labelled(scores: list[list[float]], targets: list[list[float]], *, multi_label: bool = False) -> LabelScores:
    return LabelScores("action", LABELS, multi_label, np.array(scores), np.array(targets, np.float64), {"run": 0.3})


def numbers(head: LabelScores | MaskScores | RetrievalScores | AnswerScores, count: int) -> dict[str, float | None]:
    return flat(measure(Scored(rows(count), (head,)), draws=50))


def test_single_label_numbers() -> None:
    scores = [[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.9, 0.1, 0.0]]
    targets = [[1, 0, 0], [0, 1, 0], [0, 1, 0], [1, 0, 0], [math.nan] * 3]
    found = numbers(labelled(scores, targets), 5)
    assert found["action_accuracy"] == 0.5
    assert found["action_accuracy_baseline"] == 0.5
    assert found["action_balanced_accuracy"] == 0.5
    # Among `run` and `walk`, which are all there is, the fourth row ties and the first label wins.
    assert found["action_choice_accuracy"] == 0.75
    assert found["action_walk_precision"] == 1.0
    assert found["action_walk_recall"] == 0.5
    assert found["action_run_auc"] == 0.75
    assert found["action_walk_ap_baseline"] == 0.5
    assert found["action_walk_auc"] == 1.0
    assert found["action_mean_auc"] == 0.875
    assert not any("wave" in key for key in found)
    low, high = found["action_accuracy_low"], found["action_accuracy_high"]
    assert low is not None
    assert high is not None
    assert low <= 0.5 <= high


def test_several_labels_with_unknown_ones() -> None:
    scores = [[0.4, 0.9, 0.1], [0.2, 0.6, 0.7], [0.35, 0.1, 0.9], [0.9, 0.2, 0.3]]
    targets = [[1, 1, 0], [0, 0, 1], [0, math.nan, 1], [1, math.nan, math.nan]]
    head = labelled(scores, targets, multi_label=True)
    found = numbers(head, 4)
    assert said(head)[:, 0].tolist() == [True, False, True, True]
    assert found["action_run_precision"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["action_run_recall"] == 1.0
    assert found["action_wave_auc"] == 1.0
    # Rows with exactly one label: all but the first.
    assert choose(head, among_present=True).rows.tolist() == [1, 2, 3]
    assert found["action_choice_accuracy"] == 1.0
    assert "action_accuracy" not in found
    assert head_reliability(head).count.sum() == 9


def test_a_head_that_nothing_is_known_of_has_no_numbers() -> None:
    assert numbers(labelled([[0.5, 0.3, 0.2]] * 3, [[math.nan] * 3] * 3), 3) == {}


def test_masks_sum_pixels_before_dividing() -> None:
    confusions = np.array([[[8, 0], [0, 0]], [[0, 2], [2, 4]], [[0, 0], [0, 0]]], np.int64)
    found = numbers(MaskScores("scene", ("sky", "a road"), confusions, ()), 3)
    assert found["scene_pixel_accuracy"] == 0.75
    assert found["scene_sky_iou"] == pytest.approx(8 / 12, abs=1e-4)
    assert found["scene_a_road_iou"] == 0.5
    assert found["scene_miou"] == pytest.approx((8 / 12 + 0.5) / 2, abs=1e-4)
    assert found["scene_pixel_accuracy_baseline"] == pytest.approx(10 / 16)


def test_any_clip_with_the_caption_is_right() -> None:
    clips = np.eye(4)
    texts = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], np.float64)
    head = RetrievalScores("clip", ("A dog.", "a dog", "rain", ""), clips, texts)
    found = numbers(head, 4)
    # `rain` finds the clip that has no caption first: two of three.
    assert found["clip_r1"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["clip_r1_baseline"] == pytest.approx((0.5 + 0.5 + 0.25) / 3, abs=1e-4)


def test_answers_but_for_case_and_punctuation() -> None:
    head = AnswerScores("talk", ("who?", "what?", ""), ("Two people.", "a red car", ""), ("two people", "a car", "x"))
    found = numbers(head, 3)
    assert found["talk_exact"] == 0.5
    assert found["talk_word_f1"] == pytest.approx((1 + 0.8) / 2)
    assert word_f1("", "yes") == 0.0


def test_numbers_are_plain_json() -> None:
    found = flat(measure(Scored(rows(2, groups=1), (labelled([[1, 0, 0]] * 2, [[1, 0, 0], [0, 1, 0]]),)), draws=10))
    assert found["action_accuracy_low"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_hundreds_of_classes_do_not_take_minutes() -> None:
    random = np.random.default_rng(0)
    truth = random.integers(0, 400, 3000)
    scores = random.random((3000, 400))
    head = LabelScores("action", tuple(f"c{n}" for n in range(400)), False, scores, np.eye(400)[truth], {})
    found = numbers(head, 3000)
    assert found["action_mean_auc_low"] is None
    assert found["action_accuracy_low"] is not None
