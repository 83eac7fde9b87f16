"""What is kept on disk: whole or not at all, and refused where it does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from models.checkpoint import (
    CARD_FILE,
    WEIGHTS_FILE,
    Checkpoints,
    ModelCard,
    load_model,
    load_optimizer,
    load_weights,
    optimizer_tensors,
    read_card,
    read_tensors,
    save_model,
    save_tensors,
)
from models.config import AudioConfig, FusionConfig, HeadConfig, ModelConfig, TextConfig
from models.errors import TrainingError, WeightsError
from models.network import build_model
from models.text import TextTokenizer
from models.types import Inputs

REPOSITORY = Path(__file__).parents[3]
CONFIG = ModelConfig(
    audio=AudioConfig(widths=(4, 8)),
    text=TextConfig(width=8, layers=1, heads=2, max_tokens=8, vocabulary=64),
    fusion=FusionConfig(width=8),
    embedding=8,
    heads=(HeadConfig(name="class", kind="class", labels=("a", "b")),),
)


def _saved(folder: Path) -> Inputs:
    """A model in ``folder``, and something to ask it."""
    tokenizer = TextTokenizer.train(["a dog barks", "rain falls"], 64)
    model = build_model(CONFIG, tokenizer.vocabulary)
    card = ModelCard(
        name="tiny", model=CONFIG, window_s=1.0, hop_s=0.5, vocabulary=tokenizer.vocabulary, tokenizer="tokenizer.json"
    )
    save_model(folder, model, card, tokenizer)
    return Inputs(audio=torch.randn(2, 16_000), tokens=tokenizer.encode(["dog", "rain"], 8))


def test_a_model_comes_back_as_it_was(tmp_path: Path) -> None:
    inputs = _saved(tmp_path)
    first, card, tokenizer = load_model(tmp_path)
    again, _, _ = load_model(tmp_path)
    assert card.name == "tiny" and card.model == CONFIG
    assert tokenizer is not None and tokenizer.vocabulary == card.vocabulary
    assert not first.training
    assert torch.equal(first(inputs).logits["class"], again(inputs).logits["class"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [CARD_FILE, WEIGHTS_FILE, "tokenizer.json"]


def test_weights_that_the_card_was_not_written_for_are_refused(tmp_path: Path) -> None:
    _saved(tmp_path)
    tensors = read_tensors(tmp_path / WEIGHTS_FILE)
    save_tensors(tmp_path / WEIGHTS_FILE, {name: tensor + 1 for name, tensor in tensors.items()})
    with pytest.raises(WeightsError, match=r"model\.safetensors is not the file"):
        load_model(tmp_path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no trained model in .*model\.json is absent"):
        load_model(tmp_path)
    _saved(tmp_path)
    card = tmp_path / CARD_FILE
    values = json.loads(card.read_text())
    card.write_text(json.dumps({**values, "window_s": "long"}))
    with pytest.raises(WeightsError, match=r"model\.json: window_s"):
        read_card(tmp_path)
    card.write_text(json.dumps(values))
    weights = tmp_path / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        load_model(tmp_path)


def test_another_architecture_is_named_by_parameter() -> None:
    module, path = nn.Linear(3, 2), Path("there.safetensors")
    good = module.state_dict()
    with pytest.raises(WeightsError, match=r"there\.safetensors .* weight is \[2, 4\], not \[2, 3\]"):
        load_weights(module, {**good, "weight": torch.zeros(2, 4)}, path)
    with pytest.raises(WeightsError, match="no parameter bias"):
        load_weights(module, {"weight": torch.zeros(2, 3)}, path)
    with pytest.raises(WeightsError, match="a parameter extra too many"):
        load_weights(module, {**good, "extra": torch.zeros(1)}, path)


def test_the_newest_whole_checkpoint_counts(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.newest() is None
    for step in (2, 10):
        checkpoints.write(step, {"x": torch.tensor([step])}, {"step": step})
    (checkpoints.folder / "step-000000011.part").mkdir()  # The write that was killed.
    newest = checkpoints.newest()
    assert newest is not None
    tensors, progress = checkpoints.read(newest)
    assert tensors["x"].item() == progress["step"] == 10
    assert [path.name for path in checkpoints.folder.glob("step-*") if path.suffix != ".part"] == ["step-000000010"]
    (newest / "state.json").write_text("{")
    with pytest.raises(WeightsError, match=r"state\.json cannot be read"):
        checkpoints.read(newest)


def test_an_optimizer_goes_on_where_it_was() -> None:
    def stepped(module: nn.Linear, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            module(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    first, second = torch.optim.AdamW(one.parameters(), 0.1), torch.optim.AdamW(two.parameters(), 0.1)
    stepped(one, first, 3)
    two.load_state_dict(one.state_dict())
    load_optimizer(second, {name: tensor.clone() for name, tensor in optimizer_tensors(first).items()})
    stepped(one, first, 2)
    stepped(two, second, 2)
    assert torch.equal(one.weight, two.weight)


FULL = """
import resource, sys
from pathlib import Path
import torch
from models.checkpoint import Checkpoints, save_tensors
from models.errors import TrainingError

folder = Path(sys.argv[1])
checkpoints = Checkpoints(folder)
checkpoints.write(1, {"x": torch.zeros(10)}, {"step": 1})
save_tensors(folder / "best.safetensors", {"x": torch.zeros(10)})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for write in (
    lambda: checkpoints.write(2, {"x": torch.zeros(100_000)}, {"step": 2}),
    lambda: save_tensors(folder / "best.safetensors", {"x": torch.zeros(100_000)}),
):
    try:
        write()
    except TrainingError as error:
        print(error)
"""


def test_a_full_disk_keeps_what_there_was(tmp_path: Path) -> None:
    script = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(script, cwd=REPOSITORY, capture_output=True, text=True, timeout=500, check=True)
    messages = done.stdout.splitlines()
    assert len(messages) == 2 and all("cannot be written" in line and "make room" in line for line in messages)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.safetensors", "step-000000001"]
    tensors, progress = Checkpoints(tmp_path).read(tmp_path / "step-000000001")
    assert progress["step"] == 1 and len(tensors["x"]) == 10
    assert len(read_tensors(tmp_path / "best.safetensors")["x"]) == 10


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be written"):
        save_tensors(tmp_path / "file" / "x.safetensors", {"x": torch.zeros(1)})
