"""What the learning modes buy when labels are few: `python -m bench.learning_modes --data ../shared/data --json PATH`.

ESC-10 by official fold: two labelled clips of each class from the training folds, the other training clips without
labels, and the fold left out to be scored. The configurations are `models/configs/esc10-*.yaml`. Every clip is scored
once, and the numbers are of these scores together, with 95 % intervals over the recordings that clips were cut from.
All runs take equally many steps, keep their last weights, and choose nothing on the fold that is scored.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from rich.console import Console

from bench.common import BenchError, Measured, Row, machine, show, write_json
from models.basepack.teacher import Teacher, zero_shot
from models.data import manifest as tables
from models.data.importers import import_folder
from models.distill import save_scores
from models.errors import ModelError
from models.evaluate import score_checkpoint
from models.measures import measure
from models.media import read_audio
from models.scored import LabelScores, Scored, ScoredRow
from models.train import train

CONFIGS = Path(__file__).parents[1] / "models" / "configs"
RUNS = ("esc10-few", "esc10-pretrain", "esc10-finetune", "esc10-semi", "esc10-distil", "esc10-all")
"""In this order: fine-tuning goes on from pretraining."""
MEANINGS = {
    "esc10-few": "20 labels",
    "esc10-finetune": "20 labels, after self-supervised training with titles",
    "esc10-semi": "20 labels, and pseudo-labels",
    "esc10-distil": "20 labels, and a teacher's scores",
    "esc10-all": "all labels",
}
LABELLED = 2
"""Clips of each class with a label."""
_SHARPNESS = 1e-4
"""Least score of the teacher: its ten scores are divided by their sum."""


def folds_of(data: Path, work: Path) -> list[tuple[tables.Row, ...]]:
    """The clips of each official fold."""
    rows = import_folder("esc10", data / "sounds" / "esc10", work / "esc10.csv").rows
    numbers = [int(row.path.stem.partition("_")[2].partition("-")[0]) for row in rows]
    return [tuple(row for row, at in zip(rows, numbers, strict=True) if at == fold) for fold in sorted(set(numbers))]


def write_manifests(folds: Sequence[Sequence[tables.Row]], left: int, folder: Path) -> None:
    """``few.csv`` and ``all.csv``: fold ``left`` is validation, of which nothing is chosen."""
    random = np.random.default_rng(left)
    few: list[tables.Row] = []
    train = [row for fold, rows in enumerate(folds) if fold != left for row in rows]
    for label in sorted({row.labels["class"] for row in train}):
        rows = [row for row in train if row.labels["class"] == label]
        chosen = set(random.permutation(len(rows))[:LABELLED].tolist())
        for number, row in enumerate(rows):
            unknown = {"split": "unlabelled", "labels": {}}
            few.append(row.model_copy(update={"split": "train"} if number in chosen else unknown))
    val = [row.model_copy(update={"split": "val"}) for row in folds[left]]
    tables.write_manifest(folder / "few.csv", [*few, *val])
    tables.write_manifest(folder / "all.csv", [*(row.model_copy(update={"split": "train"}) for row in train), *val])


def write_teacher(folds: Sequence[Sequence[tables.Row]], data: Path, path: Path) -> float:
    """The teacher's scores of all clips, and its accuracy without any label. Training sees those of its folds."""
    teacher, rows = Teacher(data), [row for fold in folds for row in fold]
    raw = []
    for row in rows:
        audio = read_audio(row.path)
        if audio is None:
            raise BenchError(f"{row.path} holds no sound; get the data again")
        raw.append(teacher.scores(audio, stretches=8))
    scores = zero_shot(np.stack(raw), teacher.names) + _SHARPNESS
    scores /= scores.sum(axis=1, keepdims=True)
    labels = yaml.safe_load((CONFIGS / "esc10-few.yaml").read_text(encoding="utf-8"))["model"]["heads"][0]["labels"]
    truth = np.array([labels.index(row.labels["class"][0]) for row in rows])
    save_scores(path, [str(row.path) for row in rows], [0.0] * len(rows), {"class": scores})
    return float((scores.argmax(axis=1) == truth).mean())


def run_config(name: str, folder: Path, work: Path, steps: int | None) -> None:
    """Train by a configuration, with its paths moved to ``folder``."""
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    values["out"] = str(folder / name)
    values["data"] |= {"manifest": str(folder / Path(values["data"]["manifest"]).name), "cache": str(work / "cache")}
    if "init" in values:
        values["init"] = str(folder / Path(values["init"]).name)
    if "distill" in values:
        values["distill"]["scores"] = str(work / "teacher.npz")
    if steps is not None:
        values["optim"] |= {"epochs": 1, "epoch_steps": steps}
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    train(config, report=lambda *_: None)


def run(data: Path, work: Path, steps: int | None, left_out: int | None, console: Console) -> Measured:
    """Train every mode, with each of the first ``left_out`` folds (``None``: of all) left out in turn, and score it.

    Raises ``ModelError`` when the data is not there.
    """
    folds = folds_of(data, work)
    teacher = write_teacher(folds, data, work / "teacher.npz")
    heads: dict[str, list[LabelScores]] = {name: [] for name in MEANINGS}
    clips: list[ScoredRow] = []
    for left in range(len(folds))[:left_out]:
        folder = work / f"fold{left + 1}"
        folder.mkdir(parents=True, exist_ok=True)
        write_manifests(folds, left, folder)
        for name in RUNS:
            with console.status(f"fold {left + 1}: {name}"):
                run_config(name, folder, work, steps)
            if name in MEANINGS:
                scored = score_checkpoint(folder / name, folder / "all.csv", split="val", cache=work / "cache")
                heads[name].append(next(head for head in scored.heads if isinstance(head, LabelScores)))
        clips += scored.rows
    rows = [Row("esc10_teacher", teacher, "the teacher alone, no label", at_least=None)]
    for name, parts in heads.items():
        joined = replace(
            parts[0],
            scores=np.concatenate([part.scores for part in parts]),
            targets=np.concatenate([part.targets for part in parts]),
        )
        found = next(one.interval for one in measure(Scored(tuple(clips), (joined,))) if one.name == "accuracy")
        key = name.replace("-", "_")
        rows.append(Row(key, found.value, f"accuracy: {MEANINGS[name]}"))
        rows.append(Row(f"{key}_low", found.low, "  lower end of the 95 % interval"))
        rows.append(Row(f"{key}_high", found.high, "  upper end"))
    return Measured(
        tuple(rows),
        (f"ESC-10, {len(clips)} clips scored of {len(folds)} folds, sound alone, {steps or 'all'} steps of each run.",),
    )


def main(given: list[str] | None = None) -> int:
    """Exit code 0 when everything was measured; 1 with one line otherwise."""
    parser = argparse.ArgumentParser(prog="python -m bench.learning_modes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--steps", type=int, help="of each run [as configured]")
    parser.add_argument("--folds", type=int, help="leave out only the first folds in turn [all]")
    parser.add_argument("--work", type=Path, help="folder for sounds and models that is kept [a temporary one]")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures here, under flat keys")
    options = parser.parse_args(given)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            work = (options.work or Path(temporary)).resolve()
            work.mkdir(parents=True, exist_ok=True)
            found = run(options.data.resolve(), work, options.steps, options.folds, console)
        show(console, "learning modes", found)
        if options.json is not None:
            write_json(options.json, [found], machine())
    except (BenchError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
