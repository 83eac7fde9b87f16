"""One's own model, trained from a configuration: it learns, in every mode, and says what is wrong."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint import Checkpoints, load_model, read_tensors, save_tensors
from models.config import TrainConfig, read_config
from models.distill import save_scores
from models.errors import ConfigError, DataError, TrainingError, WeightsError
from models.train import train
from tests.models.training.conftest import SOUND, tiny, write_config


def _quiet(stage: str, done: int, total: int, loss: float | None) -> None:
    return


def _train(folder: Path, values: dict[str, Any], **options: Any) -> dict[str, float | None]:
    return train(write_config(folder / "config.yaml", values), report=_quiet, **options)


def _history(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def test_it_learns_what_it_sees_and_hears(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fast = {"optim__epochs": 16, "optim__learning_rate": 0.005, "optim__checkpoint_steps": 100}
    values = tiny(world, out, **fast)
    values["model"]["heads"].append(SOUND)
    numbers = _train(tmp_path, values)
    history = _history(out)
    assert history[-1]["train_loss"] < 0.7 * history[0]["train_loss"]
    # Validation clips have no captions, and chance is a half.
    best = max(history, key=lambda record: record["score"])
    assert best["action_accuracy"] >= 0.85 and best["class_accuracy"] >= 0.85
    assert numbers["score"] == best["score"] and numbers["epoch"] == best["epoch"]
    report = (out / "report.md").read_text()
    assert "Head `action`" in report and "Head `search`" in report and (out / "history.png").is_file()
    assert json.loads((out / "metrics.json").read_text())["action_accuracy"] == numbers["action_accuracy"]
    _, card, tokenizer = load_model(out)
    assert tokenizer is not None and card.training["mode"] == "supervised"
    assert set(card.calibration.heads) == {"action", "class"} and list((out / "logs").iterdir())


@pytest.fixture(scope="module")
def pretrained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a few steps without labels."""
    folder = tmp_path_factory.mktemp("pretrained")
    _train(folder, tiny(world, folder / "run", mode="self-supervised", optim__max_steps=4))
    return folder / "run"


def test_self_supervised_training_needs_no_labels(pretrained: Path) -> None:
    record = _history(pretrained)[-1]
    assert {"contrastive loss", "search loss", "agreement"} <= set(record)
    assert not any("action" in name for name in record)


def test_semi_supervised_training_learns_from_its_own_labels(world: Path, tmp_path: Path) -> None:
    changes = {"mode": "semi-supervised", "pseudo__threshold": 0.5, "optim__max_steps": 4}
    _train(tmp_path, tiny(world, tmp_path / "run", **changes))
    assert any(record.get("action pseudo loss", 0.0) > 0 for record in _history(tmp_path / "run"))


def test_a_teacher_is_followed(world: Path, tmp_path: Path) -> None:
    names = [f"train{n}.mp4" for n in range(24)] + [f"unlabelled{n}.mp4" for n in range(16)]
    # Sure of the opposite: only a student that listens to it learns that.
    wrong = torch.tensor([[0.99, 0.01] if n % 2 else [0.01, 0.99] for n in [*range(24), *range(16)]])
    scores = tmp_path / "scores.npz"
    save_scores(scores, names, [0.0] * len(names), {"action": wrong.numpy()})
    changes = {"mode": "distillation", "distill__scores": str(scores), "distill__weight": 10.0, "optim__epochs": 6}
    faster = {"optim__learning_rate": 0.01, "loss__contrastive": 0.0}
    _train(tmp_path, tiny(world, tmp_path / "run", **changes, **faster))
    history = _history(tmp_path / "run")
    assert history[-1]["action distilled loss"] < 0.7 * history[0]["action distilled loss"]
    assert history[-1]["action_accuracy"] < 0.5


def test_it_goes_on_from_another_run(
    world: Path, pretrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = tiny(world, tmp_path / "run", init=str(pretrained), optim__max_steps=1)
    values["model"]["heads"][0]["labels"] = ["right", "left"]
    with caplog.at_level(logging.INFO, logger="models.train"):
        _train(tmp_path, values)
    said = [record.message for record in caplog.records if "starts anew" in record.message]
    assert len(said) == 1 and "heads.to_action" in said[0]
    before, now = read_tensors(pretrained / "model.safetensors"), read_tensors(tmp_path / "run" / "model.safetensors")
    name = "branches.audio.encoder.stem.0.weight"
    assert (before[name] - now[name]).abs().max() < 0.01, "one step away"
    with pytest.raises(WeightsError, match=r"branches\.audio\.\S+ is \[.*make model the same there"):
        _train(tmp_path, tiny(world, tmp_path / "other", init=str(pretrained), model__audio={"widths": [8, 16]}))


def test_it_stops_when_it_gets_no_better(world: Path, tmp_path: Path) -> None:
    changes = {"optim__epochs": 9, "optim__patience": 1, "optim__learning_rate": 1e-12, "optim__ema": 0.0}
    numbers = _train(tmp_path, tiny(world, tmp_path / "run", **changes))
    assert numbers["epoch"] == 1 and len(_history(tmp_path / "run")) == 2
    assert _train(tmp_path, tiny(world, tmp_path / "run", **changes)) == numbers, "it has stopped for good"


def test_no_number_ends_it_with_rows_and_remedy(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    _train(tmp_path, tiny(world, out, optim__max_steps=2))
    newest = Checkpoints(out / "checkpoints").newest()
    assert newest is not None
    tensors = read_tensors(newest / "state.safetensors")
    tensors["objective.model.fusion.gate.weight"][0, 0] = float("nan")
    save_tensors(newest / "state.safetensors", tensors)
    with pytest.raises(TrainingError, match=r"step 3: \w+ is no number .*lines \d+, .*lower optim\.learning_rate"):
        _train(tmp_path, tiny(world, out, optim__max_steps=4))
    assert Checkpoints(out / "checkpoints").newest() == newest


def test_a_checkpoint_that_does_not_fit_is_refused(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    _train(tmp_path, tiny(world, out, optim__max_steps=2))
    with pytest.raises(WeightsError, match=r"step-000000002 is of another architecture: model\.adapt\.\S+ is"):
        _train(tmp_path, tiny(world, out, model__fusion__width=32))
    shorter = world.with_name("shorter.csv")
    shorter.write_text("\n".join(line for line in world.read_text().splitlines() if "train23" not in line))
    with pytest.raises(WeightsError, match=r"written for \[24\] windows, the manifest now gives \[23\]"):
        _train(tmp_path, tiny(shorter, out))
    numbers = _train(tmp_path, tiny(shorter, out, optim__max_steps=1), resume=False)
    assert numbers["steps"] == 1


def test_what_cannot_be_trained_is_said_first(world: Path, tmp_path: Path) -> None:
    lines = world.read_text().splitlines()

    def without(name: str, kept: list[str]) -> dict[str, Any]:
        manifest = world.with_name(f"{name}.csv")
        manifest.write_text("\n".join(kept) + "\n")
        return tiny(manifest, tmp_path / name)

    with pytest.raises(DataError, match="no row has split val"):
        _train(tmp_path, without("no-val", [line for line in lines if ",val," not in line]))
    blind = [line.replace(",left,", ",,").replace(",right,", ",,") if ",val," in line else line for line in lines]
    with pytest.raises(DataError, match="no row of split val says anything"):
        _train(tmp_path, without("no-labels", blind))
    captioned = [line + "something" if ",val," in line else line for line in lines]
    alone = {**without("captioned", captioned)}
    del alone["model"]["video"], alone["model"]["audio"]
    with pytest.raises(ConfigError, match="search: an embedding head learns"):
        _train(tmp_path, alone)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"optim\.precision: fp16 cannot be had here"):
            _train(tmp_path, tiny(world, tmp_path / "half", optim__precision="fp16"))


def test_examples_are_valid() -> None:
    folder = Path(__file__).parents[3] / "models" / "configs"
    found = [path for path in sorted(folder.glob("*.yaml")) if path.name != "base.yaml"]
    assert found
    for path in found:
        read_config(path, TrainConfig)
