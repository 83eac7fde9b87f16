"""Training learns, goes on where it was stopped, and measures what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.basepack import baselines
from models.basepack.batches import (
    MEL_FRAMES,
    LabelledMel,
    Mixer,
    cut_mel,
    service_windows,
    training_windows,
    window_features,
)
from models.basepack.cache import Encoded
from models.basepack.calibrate import HIGHEST_ON, threshold
from models.basepack.config import Schedule, TrainConfig, read_config
from models.basepack.everyday import events_started
from models.basepack.labels import ACTIONS, SCENE, SOUNDS, VOID
from models.basepack.predict import score_actions, score_sounds
from models.basepack.scenes import class_weights, confusion, prior_masks, scene_metrics
from models.basepack.train import fit_window
from models.errors import WeightsError
from models.losses import IGNORE, known_bce, known_cross_entropy
from models.metrics import auroc, average_precision, balanced_accuracy

CONFIG = Path(__file__).parents[3] / "models" / "configs" / "base.yaml"


@pytest.fixture
def tiny() -> TrainConfig:
    """A configuration of a few small steps."""
    schedule = Schedule(steps=30, batch=12, learning_rate=2e-3, weight_decay=0.01)
    return read_config(CONFIG).model_copy(update={"sound": schedule, "threads": 1})


class Losses:
    """Remembers what is reported."""

    def __init__(self) -> None:
        self.of: dict[int, float | None] = {}

    def __call__(self, stage: str, done: int, total: int, loss: float | None) -> None:
        self.of[done] = loss


def test_loss_falls_and_the_heads_learn(
    tiny: TrainConfig, encoded: list[Encoded], sounds: list[LabelledMel], tmp_path: Path
) -> None:
    losses = Losses()
    head = fit_window(tiny, encoded, sounds, tmp_path / "window", losses)
    first, last = losses.of[1], losses.of[30]
    assert first is not None
    assert last is not None
    assert last < 0.7 * first
    fight = score_actions(head, encoded).logits[:, ACTIONS.index("fight")]
    truth = np.array([w.encoded.recording.spans[0].label == "fight" for item in encoded for w in service_windows(item)])
    assert fight[truth].min() > fight[~truth].max()
    assert score_sounds(head, sounds, encoded).logits.shape[1] == len(SOUNDS)


def test_an_interrupted_run_ends_the_same(
    tiny: TrainConfig, encoded: list[Encoded], sounds: list[LabelledMel], tmp_path: Path
) -> None:
    straight, stopped = Losses(), Losses()
    whole = fit_window(tiny, encoded, sounds, tmp_path / "whole", straight)
    fit_window(tiny, encoded, sounds, tmp_path / "parts", stopped, stop_at=11)
    assert max(stopped.of) == 11
    resumed = Losses()
    parts = fit_window(tiny, encoded, sounds, tmp_path / "parts", resumed)
    assert min(resumed.of) == 12
    assert resumed.of[30] == straight.of[30]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name


def test_damaged_state_is_one_line(
    tiny: TrainConfig, encoded: list[Encoded], sounds: list[LabelledMel], tmp_path: Path
) -> None:
    (tmp_path / "window.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(WeightsError, match="cannot be continued") as caught:
        fit_window(tiny, encoded, sounds, tmp_path / "window", Losses())
    assert "\n" not in str(caught.value)


def test_batches_are_drawn_from_the_seed_alone(encoded: list[Encoded], sounds: list[LabelledMel]) -> None:
    windows = [window for item in encoded for window in training_windows(item)]
    mixer = Mixer(windows, sounds, video_dropout=0.2, audio_dropout=0.3)
    one, two = (mixer.draw(np.random.default_rng(5), 64) for _ in range(2))
    assert torch.equal(one.features, two.features)
    assert torch.equal(one.power, two.power)
    blind = one.frame_mask.sum(dim=1) == 0
    assert blind.any()
    assert not (one.actions[blind] == 1)[:, :-1].any(), "nothing may be learned to be seen where nothing is"
    assert (one.sounds[one.audio_mask == 0] == IGNORE).all()
    assert (one.sounds >= 0).any()


def test_having_a_track_says_nothing_about_the_action(encoded: list[Encoded], sounds: list[LabelledMel]) -> None:
    """Only one of the two recordings has sound; training must not show which."""
    windows = [window for item in encoded for window in training_windows(item)]
    batch = Mixer(windows, sounds, video_dropout=0.0, audio_dropout=0.3).draw(np.random.default_rng(0), 2000)
    fight = batch.actions[:, 0] == 1
    shares = [float((batch.audio_mask[chosen] > 0).float().mean()) for chosen in (fight, ~fight)]
    assert shares == pytest.approx([0.7, 0.7], abs=0.05)


def test_windows_at_the_edges_are_masked(encoded: list[Encoded]) -> None:
    starts = {window.first for window in training_windows(encoded[0])}
    assert min(starts) == -2
    assert max(starts) == 6
    first = next(window for window in training_windows(encoded[0]) if window.first == -2)
    features, mask = window_features(first)
    assert mask.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert not features[:2].any()
    cut, share = cut_mel(np.ones((64, 30), np.float32), -10)
    assert (cut.shape, share, float(cut.sum())) == ((64, MEL_FRAMES), 0.3, 64 * 30.0)


def test_losses_leave_out_what_is_unknown() -> None:
    logits = torch.tensor([[2.0, -5.0]], requires_grad=True)
    loss = known_bce(logits, torch.tensor([[1, -1]], dtype=torch.int8))
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[0, 1] == 0
    assert float(loss.detach()) == pytest.approx(np.log1p(np.exp(-2.0)))
    logits = logits.detach()
    assert float(known_bce(logits, torch.full((1, 2), -1, dtype=torch.int8))) == 0
    assert float(known_cross_entropy(logits, torch.tensor([IGNORE]))) == 0


def test_metrics_on_examples_worked_by_hand() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6], np.float32)
    positive = np.array([True, False, True, False])
    assert average_precision(scores, positive) == pytest.approx((1 + 2 / 3) / 2)
    assert auroc(scores, positive) == pytest.approx(0.75)
    assert auroc(np.zeros(4, np.float32), positive) == pytest.approx(0.5)
    assert np.isnan(auroc(scores, np.zeros(4, bool)))
    assert balanced_accuracy(np.array([0, 0, 1, 0]), np.array([0, 0, 0, 1])) == pytest.approx(1 / 3, abs=1e-4)


def test_thresholds_favour_precision() -> None:
    scores = np.concatenate([np.linspace(0.6, 0.99, 40), np.linspace(0.0, 0.7, 200)]).astype(np.float32)
    positive = np.arange(240) < 40
    on = threshold(scores, positive)
    assert (scores[~positive] >= on).mean() <= 0.01
    assert threshold(scores, np.zeros(240, bool)) == HIGHEST_ON


def test_thresholds_hold_in_every_part() -> None:
    """A part with few windows must not drown in the many of another."""
    scores = np.concatenate([np.linspace(0.5, 0.9, 40), np.zeros(5000), np.full(5, 0.705)]).astype(np.float32)
    positive, traffic = np.arange(5045) < 40, np.arange(5045) >= 5040
    assert threshold(scores, positive) < 0.7
    assert threshold(scores, positive, [traffic]) > 0.7


def test_events_follow_the_services_rules() -> None:
    assert events_started(np.array([0.9, 0.0, 0.9, 0.0], np.float32), 0.8, 0.6) == 0
    assert events_started(np.array([0.0, 0.9, 0.9, 0.9, 0.9], np.float32), 0.8, 0.6) == 1
    twice = np.array([0.9, 0.9, 0.9, 0.0, 0.0, 0.0, 0.0, 0.9, 0.9, 0.9, 0.9], np.float32)
    assert events_started(twice, 0.8, 0.6) == 2


def test_standardisation_goes_into_the_weights(
    tiny: TrainConfig, encoded: list[Encoded], sounds: list[LabelledMel], tmp_path: Path
) -> None:
    """Moving every feature changes the weights and not the scores."""
    moved = [
        Encoded(e.recording, tuple(replace(t, features=t.features + 1) for t in e.tracks), e.mel, e.duration_s)
        for e in encoded
    ]
    want = score_actions(fit_window(tiny, encoded, sounds, tmp_path / "a", Losses()), encoded).logits
    got = score_actions(fit_window(tiny, moved, sounds, tmp_path / "b", Losses()), moved).logits
    # Labels without an example have no finite optimum to agree on.
    fight = ACTIONS.index("fight")
    assert got[:, fight] == pytest.approx(want[:, fight], abs=0.5)


def test_logistic_regression_separates_what_is_separable() -> None:
    random = np.random.default_rng(0)
    inputs = random.standard_normal((200, 5)).astype(np.float32)
    targets = (inputs[:, :1] > 0).astype(np.int8)
    model = baselines.fit_logistic(inputs, targets, 1, known_bce)
    assert ((model.scores(inputs) > 0) == targets).mean() > 0.97


def test_scene_measures() -> None:
    truth = np.array([[[0, 0, 1, VOID]]], np.uint8)
    guess = np.array([[[0, 1, 1, 5]]], np.uint8)
    measured = scene_metrics(confusion(truth, guess))
    assert measured["pixel_accuracy"] == pytest.approx(2 / 3, abs=1e-4)
    assert measured["mean_iou"] == pytest.approx(0.5)
    assert prior_masks(np.array([[[3]], [[3]], [[VOID]]], np.uint8), 2).tolist() == [[[3]], [[3]]]
    weights = class_weights(np.array([[[0] * 90 + [1] * 10]], np.uint8))
    assert weights.shape == (len(SCENE),)
    assert weights[1] > weights[0]
