"""The objective, and what the learning modes add to a batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models import losses
from models.config import (
    AudioConfig,
    DataConfig,
    DistillConfig,
    FusionConfig,
    HeadConfig,
    LossConfig,
    ModelConfig,
    PseudoConfig,
    TextConfig,
    TrainConfig,
)
from models.distill import TeacherScores, save_scores
from models.ema import averaged
from models.errors import DataError
from models.loading import _Pass
from models.modes import join, pseudo_labels, with_pseudo_labels, without_labels
from models.network import build_model
from models.objective import Batch, Objective
from models.state import differences, pace, seed_step
from models.types import VOID, Inputs, Targets

NAN = float("nan")
CLASS = HeadConfig(name="class", kind="class", labels=("a", "b", "c"))
ACTION = HeadConfig(name="action", kind="action", labels=("x", "y"), multi_label=True)
SEARCH = HeadConfig(name="search", kind="embedding")
MODEL = ModelConfig(
    audio=AudioConfig(widths=(4, 8), dropout=0.0),
    text=TextConfig(width=8, layers=1, heads=2, dropout=0.0, vocabulary=64),
    fusion=FusionConfig(width=8, dropout=0.0, modality_dropout=0.0),
    embedding=8,
    heads=(CLASS, ACTION),
)


def _config(**changes: object) -> TrainConfig:
    values = {"name": "x", "out": Path("x"), "model": MODEL, "data": DataConfig(manifest=Path("m.csv"))}
    return TrainConfig.model_validate({**values, **changes})


def _batch(rows: int = 4) -> tuple[Inputs, Targets]:
    torch.manual_seed(0)
    inputs = Inputs(audio=torch.randn(rows, 8_000) * 0.1, tokens=torch.randint(4, 60, (rows, 5)))
    classes = torch.eye(3)[torch.arange(rows) % 3]
    classes[1] = NAN
    actions = (torch.arange(rows * 2).reshape(rows, 2) % 3 == 0).float()
    return inputs, Targets({"class": classes, "action": actions}, torch.ones(rows), torch.arange(rows))


def _objective(config: TrainConfig, counts: dict[str, torch.Tensor] | None = None) -> Objective:
    torch.manual_seed(0)
    return Objective(build_model(config.model, 64), config, counts or {}).eval()


def test_the_total_is_the_weighted_sum_of_its_terms() -> None:
    config = _config(loss=LossConfig(contrastive=0.3, focal_gamma=2.0, class_balance=0.9))
    counts = {"class": torch.tensor([8, 2, 1]), "action": torch.tensor([[9, 5], [2, 6]])}
    objective, (inputs, targets) = _objective(config, counts), _batch()
    terms = objective(Batch(inputs, targets))
    assert terms["loss"].item() == pytest.approx(
        (terms["class"] + terms["action"] + 0.3 * terms["contrastive"]).item(), rel=1e-5
    )
    outputs = objective.model(inputs)
    weights = losses.class_balanced_weights(counts["class"], 0.9)
    by_hand = losses.single_label_loss(
        outputs.logits["class"], targets.heads["class"], class_weights=weights, focal_gamma=2.0
    )
    assert torch.allclose(terms["class"], by_hand)
    rare = losses.class_balanced_weights(torch.tensor([9, 2]), 0.9)
    assert torch.allclose(objective.get_buffer("balance_action")[:, 0], rare)


def test_self_supervision_looks_at_no_label() -> None:
    objective, (inputs, targets) = _objective(_config(mode="self-supervised")), _batch()
    terms = objective(Batch(inputs, targets))
    assert set(terms) == {"loss", "contrastive"} and torch.allclose(terms["loss"], terms["contrastive"])


def test_search_is_learned_from_what_is_not_text() -> None:
    config = _config(model=MODEL.model_copy(update={"heads": (SEARCH,)}), loss=LossConfig(contrastive=0.0))
    objective, (inputs, targets) = _objective(config), _batch()
    terms = objective(Batch(inputs, targets))
    clips = objective.model.without(inputs, "text").logits["search"]
    texts = objective.model(inputs).embeddings["text"]
    assert torch.allclose(terms["search"], losses.info_nce(clips, texts, 1 / 0.07), atol=1e-4)


def test_a_batch_of_which_nothing_is_known_changes_nothing() -> None:
    objective, (inputs, targets) = _objective(_config(loss=LossConfig(contrastive=0.0))), _batch()
    loss = objective(Batch(inputs, without_labels(targets)))["loss"]
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in objective.parameters())


def test_pseudo_labels_are_those_over_the_threshold() -> None:
    logits = {"class": torch.tensor([[5.0, 0.0, 0.0], [0.5, 0.0, 0.0]]), "action": torch.tensor([[4.0, 0.0], [-4, 4]])}
    found = pseudo_labels(logits, (CLASS, ACTION), 0.9)
    assert found["class"][0].tolist() == [1.0, 0.0, 0.0] and found["class"][1].isnan().all()
    assert found["action"].nan_to_num(-1).tolist() == [[1.0, -1.0], [0.0, 1.0]]


def test_pseudo_labels_count_as_a_share_of_the_rows_without() -> None:
    objective = _objective(
        _config(mode="semi-supervised", pseudo=PseudoConfig(weight=2.0), loss=LossConfig(contrastive=0.0))
    )
    labelled, unlabelled = _batch(4), _batch(2)
    sure = torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    batch = with_pseudo_labels(labelled, unlabelled, {"class": sure}, MODEL.heads, 0.9)
    terms = objective(batch)
    logits = objective.model(batch.inputs).logits["class"]
    one = losses.single_label_loss(logits[4:5], torch.tensor([[1.0, 0.0, 0.0]]))
    assert torch.allclose(terms["class pseudo"], one / 2)
    total = terms["class"] + terms["action"] + 2.0 * terms["class pseudo"]
    assert torch.allclose(terms["loss"], total)


def test_a_teacher_adds_its_divergence() -> None:
    config = _config(
        mode="distillation", distill=DistillConfig(scores=Path("s.npz"), weight=0.5), loss=LossConfig(contrastive=0.0)
    )
    objective, (inputs, targets) = _objective(config), _batch()
    scores = torch.full((4, 3), 1 / 3)
    terms = objective(Batch(inputs, targets, teacher={"class": scores}))
    by_hand = losses.distillation_loss(objective.model(inputs).logits["class"], scores, 2.0)
    assert torch.allclose(terms["class distilled"], by_hand)
    assert torch.allclose(terms["loss"], terms["class"] + terms["action"] + 0.5 * by_hand)


def test_batches_of_unlike_contents_are_joined() -> None:
    one = (
        Inputs(audio=torch.ones(2, 3), tokens=torch.ones(2, 2, dtype=torch.int64)),
        Targets({"class": torch.ones(2, 3), "talk": torch.ones(2, 2, dtype=torch.int64)}, None, torch.tensor([5, 6])),
    )
    other = (
        Inputs(audio=torch.zeros(1, 3), audio_mask=torch.ones(1), tokens=torch.full((1, 4), 7)),
        Targets({}, torch.tensor([0.5]), torch.tensor([9])),
    )
    inputs, targets = join(one, other)
    assert inputs.audio is not None and inputs.audio.shape == (3, 3)
    assert inputs.audio_mask is not None and inputs.audio_mask.tolist() == [0.0, 0.0, 1.0]
    assert inputs.tokens is not None and inputs.tokens.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [7, 7, 7, 7]]
    assert inputs.video is None and targets.heads["class"][2].isnan().all()
    assert targets.heads["talk"][2].tolist() == [VOID, VOID]
    assert targets.weight is not None and targets.weight.tolist() == [1.0, 1.0, 0.5]
    assert targets.index is not None and targets.index.tolist() == [5, 6, 9]


def test_scores_are_found_by_file_and_time(tmp_path: Path) -> None:
    path = tmp_path / "scores.npz"
    scores = np.array([[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.0, 0.0, 1.0]], np.float32)
    save_scores(path, ["a.mp4", "a.mp4", str(tmp_path / "b.mp4")], [1.0, 0.0, 0.0], {"class": scores})
    teacher = TeacherScores(path, (CLASS, ACTION), tmp_path, reach_s=0.25)
    windows = [(tmp_path / "a.mp4", 1_100_000_000), (tmp_path / "a.mp4", 0), (tmp_path / "b.mp4", 0)]
    assert torch.equal(teacher.of(windows)["class"], torch.from_numpy(scores[[0, 1, 2]]))
    assert teacher.find(tmp_path / "a.mp4", 500_000_000) is None and teacher.find(tmp_path / "c.mp4", 0) is None
    assert teacher.of([(tmp_path / "c.mp4", 0)])["class"].isnan().all()


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.ones((2, 2), np.float32), r"are \[2, 2\], not \[2, 3\]"),
        (np.full((2, 3), 0.5, np.float32), r"row 0 of head class is no distribution \(1\.5 in all\)"),
        (np.full((2, 3), np.nan, np.float32), "row 0 of head class is no distribution"),
    ],
)
def test_scores_that_cannot_be_right_are_refused(tmp_path: Path, scores: np.ndarray, message: str) -> None:
    path = tmp_path / "scores.npz"
    save_scores(path, ["a", "b"], [0.0, 1.0], {"class": scores})
    with pytest.raises(DataError, match=message):
        TeacherScores(path, (CLASS,), tmp_path, 1.0)


def test_a_file_that_holds_no_scores_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.npz"
    with pytest.raises(DataError, match="no teacher's scores at"):
        TeacherScores(path, (CLASS,), tmp_path, 1.0)
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(DataError, match="of plain arrays"):
        TeacherScores(path, (CLASS,), tmp_path, 1.0)
    np.savez(path, paths=np.array(["a", None], object), starts=np.zeros(2), **{"class": np.ones((2, 3))})
    with pytest.raises(DataError, match="of plain arrays"):
        TeacherScores(path, (CLASS,), tmp_path, 1.0)
    save_scores(path, ["a"], [0.0], {"other": np.ones((1, 3), np.float32)})
    with pytest.raises(DataError, match="scores of none of the heads class"):
        TeacherScores(path, (CLASS,), tmp_path, 1.0)


def test_the_average_follows_and_copies_whole_numbers() -> None:
    model = nn.BatchNorm1d(2)
    average = averaged(model, 0.9)
    average.update_parameters(model)
    with torch.no_grad():
        model.weight.fill_(3.0)
        assert model.num_batches_tracked is not None
        model.num_batches_tracked.fill_(7)
    for _ in range(60):
        average.update_parameters(model)
    assert average.module.weight.detach().numpy() == pytest.approx([3.0, 3.0], abs=0.02)
    assert int(average.module.num_batches_tracked) == 7  # type: ignore[arg-type]
    assert not average.module.weight.requires_grad and not average.module.training


def test_each_process_draws_its_own_rows_of_one_batch() -> None:
    whole, first, second = _Pass(4, 0, 1), _Pass(4, 0, 2), _Pass(4, 1, 2)
    for part in (whole, first, second):
        part.order, part.range = np.arange(10)[::-1].copy(), range(1, 2)
    assert next(iter(whole)) == next(iter(first)) + next(iter(second)) == [5, 4, 3, 2]
    whole.order, whole.range = np.arange(3), range(1)
    assert next(iter(whole)) == [0, 1, 2, 0]


def test_pace_rises_and_falls() -> None:
    rates = [pace(step, 100, 10) for step in range(100)]
    assert rates[10] == max(rates) == 1.0 and rates[0] < 0.1 and rates[-1] < 0.001
    assert np.all(np.diff(rates[:11]) > 0) and np.all(np.diff(rates[10:]) < 0)
    assert pace(3, 10, 50) > 0.9, "a short run does not spend itself on rising"


def test_a_step_is_seeded_by_its_number() -> None:
    def draw(seed: int, step: int, process: int) -> tuple[float, float]:
        seed_step(seed, step, process)
        return float(torch.rand(())), float(np.random.rand())

    assert draw(0, 1, 0) == draw(0, 1, 0)
    assert len({draw(0, 1, 0), draw(1, 0, 0), draw(0, 0, 1), draw(0, 2, 0)}) == 4


def test_differences_are_named_by_key() -> None:
    assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "e": 4}) == ["a.c", "d", "e"]
