"""Training learns, goes on where it was stopped, and measures what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.audio import EMBEDDING
from models.backbones.frame import EfficientNetLite0
from models.basepack import baselines
from models.basepack.action import Pooled, fit_action, pooled, rescale, score
from models.basepack.batches import MEL_FRAMES, Window, cut_mel, training_windows, window_features
from models.basepack.cache import Encoded
from models.basepack.calibrate import HIGHEST_ON, threshold
from models.basepack.config import ActionFit, Schedule
from models.basepack.everyday import events_started
from models.basepack.fit import Stage, fit
from models.basepack.folds import load_heads, save_heads
from models.basepack.labels import ACTIONS, SCENE, VOID
from models.basepack.network import BaseModel
from models.basepack.scenes import class_weights, confusion, prior_masks, scene_metrics
from models.basepack.window import WindowHead
from models.errors import WeightsError
from models.losses import IGNORE, known_bce, known_cross_entropy
from models.metrics import auroc, average_precision, balanced_accuracy

CONFIG = Path(__file__).parents[3] / "models" / "configs" / "base.yaml"


ACTION = ActionFit(penalty=1e-2, frame_weight=0.3, band_weight=0.5, joint_weight=2.0, audio_weight=0.1, iterations=20)


class Silent:
    """Hears nothing."""

    def embeddings(self, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
        """As ``Hearing``."""
        return torch.zeros(len(windows), EMBEDDING), torch.zeros(len(windows))


def windows_of(encoded: list[Encoded]) -> Pooled:
    return pooled([w for item in encoded for w in training_windows(item)], Silent())


@pytest.fixture(scope="module")
def trunk() -> EfficientNetLite0:
    return EfficientNetLite0()


def fitted(data: Pooled, trunk: EfficientNetLite0) -> WindowHead:
    head = WindowHead(trunk)
    fit_action(head, data, ACTION)
    return head


def test_the_action_head_learns(encoded: list[Encoded], trunk: EfficientNetLite0) -> None:
    seen, unseen = windows_of(encoded[:2]), windows_of(encoded[2:])
    fight = score(fitted(seen, trunk), unseen)[:, ACTIONS.index("fight")]
    truth = np.array([w.encoded.recording.spans[0].label == "fight" for w in unseen.windows])
    assert fight[truth].min() > fight[~truth].max()


def test_what_is_not_seen_leaves_the_base_rate(encoded: list[Encoded], trunk: EfficientNetLite0) -> None:
    data = windows_of(encoded)
    head = fitted(data, trunk)
    blind = replace(data, seen=torch.zeros_like(data.seen))
    assert np.allclose(score(head, blind), head.prior.numpy())


def test_heads_of_folds_survive_storage(encoded: list[Encoded], tmp_path: Path) -> None:
    model = BaseModel()
    data = windows_of(encoded)
    head = fitted(data, model.trunk)
    save_heads({"0": head}, tmp_path)
    again = load_heads(tmp_path, model.window)["0"]
    assert np.allclose(score(again, data), score(head, data), atol=0.05)
    with pytest.raises(WeightsError, match="cannot be read") as caught:
        load_heads(tmp_path / "nowhere", model.window)
    assert "\n" not in str(caught.value)


def test_a_slope_and_an_offset_go_into_the_weights(encoded: list[Encoded], trunk: EfficientNetLite0) -> None:
    data = windows_of(encoded)
    head = fitted(data, trunk)
    want = score(head, data) * 2.0 - 1.0
    rescale(head, torch.full((len(ACTIONS),), 2.0), torch.full((len(ACTIONS),), -1.0))
    assert np.allclose(score(head, data), want, atol=1e-4)


class Losses:
    """Remembers what is reported."""

    def __init__(self) -> None:
        self.of: dict[int, float | None] = {}

    def __call__(self, stage: str, done: int, total: int, loss: float | None) -> None:
        self.of[done] = loss


def small_fit(folder: Path, report: Losses, stop_at: int | None = None) -> nn.Linear:
    """A few steps of the optimisation that trains the segmentation decoder."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 1)
    schedule = Schedule(steps=30, batch=12, learning_rate=2e-2, weight_decay=0.01)

    def loss_of(random: np.random.Generator) -> Tensor:
        inputs = torch.from_numpy(random.standard_normal((12, 4)).astype(np.float32))
        value: Tensor = (layer(inputs)[:, 0] - inputs.sum(dim=1)).square().mean()
        return value

    fit(layer, loss_of, Stage("small", schedule, 0, folder / "small.safetensors"), report, stop_at=stop_at)
    return layer


def test_an_interrupted_run_ends_the_same(tmp_path: Path) -> None:
    straight, stopped, resumed = Losses(), Losses(), Losses()
    whole = small_fit(tmp_path / "whole", straight)
    small_fit(tmp_path / "parts", stopped, stop_at=11)
    assert max(stopped.of) == 11
    parts = small_fit(tmp_path / "parts", resumed)
    assert min(resumed.of) == 12
    assert resumed.of[30] == straight.of[30]
    assert torch.equal(whole.weight, parts.weight)
    first, last = straight.of[1], straight.of[30]
    assert first is not None
    assert last is not None
    assert last < 0.7 * first


def test_damaged_state_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "small.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(WeightsError, match="cannot be continued") as caught:
        small_fit(tmp_path, Losses())
    assert "\n" not in str(caught.value)


def test_windows_at_the_edges_are_masked(encoded: list[Encoded]) -> None:
    windows = training_windows(encoded[0])
    assert [window.first for window in windows] == [0, 4, 8, 12]
    features, mask = window_features(windows[-1])
    assert mask.tolist() == [1] * 12 + [0] * 4
    assert not features[12:].any()
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
