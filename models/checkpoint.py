"""What is kept on disk: a trained model, and the state that an interrupted training goes on from.

Tensors are safetensors, everything else is JSON, nothing is pickle. Every file or folder is written beside its
place and then renamed, so whatever happens there is a whole one or none.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.calibration import Calibration
from models.config import HeadConfig, ModelConfig, Strict
from models.errors import TrainingError, WeightsError
from models.network import PREFIX, FusionModel, build_model
from models.text import TextTokenizer

WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "model.json"
TOKENIZER_FILE = "tokenizer.json"
BEST_FILE = "best.safetensors"
_STATE_FILE = "state.safetensors"
_PROGRESS_FILE = "state.json"


class ModelCard(Strict):
    """``model.json``: what else is needed to use the weights beside it."""

    format: Literal[1] = 1
    name: str
    """Of the run."""
    model: ModelConfig
    """The network."""
    window_s: float
    """Length of the windows it was trained on."""
    hop_s: float
    """Between windows of a longer stretch."""
    vocabulary: int | None = None
    """Tokens that the text's network knows; ``None`` without text."""
    tokenizer: str | None = None
    """File beside this one; ``None`` without text."""
    calibration: Calibration = Calibration()
    """Temperatures and thresholds, chosen on validation data."""
    training: dict[str, str | int | float | None] = Field(default_factory=dict)
    """How it came about: mode, seed, epochs, steps, validation score."""
    weights_sha256: str = ""
    """Of the weights' file."""


def save_model(folder: Path, model: FusionModel, card: ModelCard, tokenizer: TextTokenizer | None) -> None:
    """Write weights, card and tokenizer into a folder. Raises ``TrainingError`` when it cannot be written."""
    weights = folder / WEIGHTS_FILE
    save_tensors(weights, model.state_dict())
    if tokenizer is not None:
        with replacing(folder / TOKENIZER_FILE) as part:
            tokenizer.save(part)
    card = card.model_copy(update={"weights_sha256": _sha256(weights)})
    with replacing(folder / CARD_FILE) as part:
        part.write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load_model(folder: Path) -> tuple[FusionModel, ModelCard, TextTokenizer | None]:
    """A trained model in evaluation mode, its card and its tokenizer (``None`` without text).

    Raises ``WeightsError`` when a file is absent, broken, or not of the architecture that the card tells.
    """
    card = read_card(folder)
    weights = folder / WEIGHTS_FILE
    tensors = read_tensors(weights)
    if card.weights_sha256 and card.weights_sha256 != _sha256(weights):
        raise WeightsError(f"{weights} is not the file that {CARD_FILE} beside it was written for; copy both anew")
    model = build_model(card.model, card.vocabulary, pretrained=False)
    load_weights(model, tensors, weights)
    tokenizer = TextTokenizer.load(folder / card.tokenizer) if card.tokenizer else None
    return model.eval(), card, tokenizer


def read_card(folder: Path) -> ModelCard:
    """A model's card. Raises ``WeightsError`` when it is absent or broken."""
    path = folder / CARD_FILE
    try:
        return ModelCard.model_validate_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise WeightsError(f"no trained model in {folder} ({CARD_FILE} is absent); finish its training first") from None
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} cannot be read ({error})") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise WeightsError(f"{path}: {key}: {first['msg']}; take the file that training wrote") from error


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Fill a module. Raises ``WeightsError`` naming ``path`` and the first parameter that does not fit."""
    expected = module.state_dict()
    for name, tensor in expected.items():
        if name not in tensors:
            raise WeightsError(f"{path} is of another architecture: it has no parameter {name}; {_REMEDY}")
        if tensors[name].shape != tensor.shape:
            there, here = list(tensors[name].shape), list(tensor.shape)
            raise WeightsError(f"{path} is of another architecture: {name} is {there}, not {here}; {_REMEDY}")
    if odd := sorted(set(tensors) - set(expected)):
        raise WeightsError(f"{path} is of another architecture: it has a parameter {odd[0]} too many; {_REMEDY}")
    module.load_state_dict(dict(tensors))


def start_from(model: FusionModel, path: Path) -> list[str]:
    """Continue from the weights of another run: its folder, or a safetensors file of such weights.

    Branches must fit; fusion, heads and what lies between start anew where they differ, as do heads with other
    labels and branches that the other run had not. Returns what started anew, a line each.
    Raises ``WeightsError`` when a branch differs, or none is shared.
    """
    weights = path / WEIGHTS_FILE if path.is_dir() else path
    tensors = read_tensors(weights)
    there: dict[str, HeadConfig] = {}
    if (weights.parent / CARD_FILE).is_file():
        there = {head.name: head for head in read_card(weights.parent).model.heads}
    for head in model.config.heads:
        if head.name in there and there[head.name].labels != head.labels:
            tensors = {k: v for k, v in tensors.items() if not k.startswith(f"heads.{PREFIX}{head.name}.")}
    expected = model.state_dict()
    chosen: dict[str, Tensor] = {}
    anew = []
    for part in dict.fromkeys(_component(name) for name in expected):
        names = [name for name in expected if _component(name) == part]
        odd = next((n for n in names if n not in tensors or tensors[n].shape != expected[n].shape), None)
        if odd is None:
            chosen |= {name: tensors[name] for name in names}
        elif part.startswith("branches.") and any(_component(name) == part for name in tensors):
            there_shape = list(tensors[odd].shape) if odd in tensors else "absent"
            raise WeightsError(
                f"{weights} is of another architecture: {odd} is {there_shape}, not {list(expected[odd].shape)}; "
                "make model the same there, or leave init out"
            )
        else:
            anew.append(f"{part} starts anew: {weights} has " + ("none" if odd not in tensors else "another"))
    if not any(name.startswith("branches.") for name in chosen):
        raise WeightsError(f"{weights} has no branch of this model ({', '.join(model.taken)}); leave init out")
    model.load_state_dict({**expected, **chosen})
    return anew


def _component(name: str) -> str:
    first, second, *_ = name.split(".")
    return first if first == "fusion" else f"{first}.{second}"


_REMEDY = "take the configuration it was trained with, or another output folder"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all. Raises ``TrainingError`` when it cannot be written."""
    with replacing(path) as part:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part, metadata)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises ``WeightsError`` when it is absent or broken."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise WeightsError(f"no weights at {path}; train first, or correct the path") from None
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise WeightsError(f"{path} is not a whole safetensors file ({reason}); write it anew") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside ``path`` to write a file or folder to; what was written takes its place at the end.

    Raises ``TrainingError`` when it cannot be written; what was at ``path`` stays.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        _sync(part)
        part.replace(path)
        _sync(path.parent)
    # The library of safetensors reports a full disk as an error of its own.
    except (OSError, SafetensorError) as error:
        _remove(part)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise TrainingError(
            f"{path} cannot be written ({reason}); make room and start again, the last checkpoint is kept"
        ) from error


class Checkpoints:
    """The state of a training, in ``step-N`` folders of which the newest is whole and the others are gone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def newest(self) -> Path | None:
        """The one to go on from; ``None`` at the beginning."""
        return max((path for path in self.folder.glob("step-*") if not path.name.endswith(".part")), default=None)

    def write(self, step: int, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        """Keep a state after so many steps in place of the one before. Raises ``TrainingError`` as ``replacing``."""
        path = self.folder / f"step-{step:09d}"
        if path.exists():
            return
        for stale in self.folder.glob("step-*.part"):
            _remove(stale)
        with replacing(path) as part:
            part.mkdir(parents=True)
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, part / _STATE_FILE)
            (part / _PROGRESS_FILE).write_text(json.dumps(progress, indent=1) + "\n", encoding="utf-8")
            for file in part.iterdir():
                _sync(file)
        for older in self.folder.glob("step-*"):
            if older != path:
                _remove(older)

    def read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and the rest. Raises ``WeightsError`` when the files are broken."""
        tensors = read_tensors(path / _STATE_FILE)
        try:
            progress: dict[str, Any] = json.loads((path / _PROGRESS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise WeightsError(f"{path / _PROGRESS_FILE} cannot be read ({error}); delete {path}") from error
        return tensors, progress


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's moments by ``parameter number.name``."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, moments in state.items() for name, value in moments.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer back its moments, as ``optimizer_tensors`` named them."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin so, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
