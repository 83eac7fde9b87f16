"""What fusion and the contrastive loss buy: `python -m bench.ablation --data ../shared/data --json PATH`.

Three sets, none of them large: falls at home (picture, sound, and the sentence that describes the whole clip while
the label is of a stretch of it), fights (picture and sound, of the clips that have both), and ESC-10 (sound and the
title that its author gave it). Every row is scored once, by a model that saw no row of its group, and the numbers are
of these scores together, with 95 % intervals over groups. All models train equally long on cached features of the
frozen trunk; nothing is chosen on the rows that are scored.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console

from bench.common import BenchError, Measured, Row, machine, show, write_json
from models.data import manifest as tables
from models.data.decode import probe
from models.data.importers import ImportOptions, import_folder
from models.data.splits import folds_by_group
from models.errors import ModelError
from models.evaluate import score_checkpoint
from models.measures import measure
from models.metrics import Interval
from models.scored import LabelScores, Scored, ScoredRow
from models.train import train

CHANNELS = {"v": "video", "a": "audio", "t": "text"}


@dataclass(frozen=True, slots=True)
class Study:
    """A set of rows, and what is asked of them."""

    name: str
    folder: str
    """Below the data's folder."""
    modalities: str
    """Of ``vat``."""
    head: dict[str, Any]
    """As in a configuration."""
    folds: int
    window_s: float
    epochs: int


STUDIES = (
    Study(
        "gmdcsa24",
        "actions/gmdcsa24",
        "vat",
        {"name": "action", "kind": "action", "labels": ["fall", "sit", "stand", "walk"], "multi_label": True},
        folds=3,
        window_s=2.0,
        epochs=40,
    ),
    Study(
        "fights",
        "actions/fights",
        "va",
        {"name": "action", "kind": "action", "labels": ["fight", "normal"]},
        folds=5,
        window_s=2.0,
        epochs=15,
    ),
    Study(
        "esc10",
        "sounds/esc10",
        "at",
        {
            "name": "class",
            "kind": "class",
            "labels": [
                "dog_bark", "rain", "sea_waves", "baby_cry", "clock_tick",
                "person_sneeze", "helicopter", "chainsaw", "rooster", "fire_crackling",
            ],
        },
        folds=4,
        window_s=5.0,
        epochs=30,
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Variant:
    """One model of the table."""

    modalities: str
    fusion: str = "concat"
    contrastive: float = 0.0

    @property
    def key(self) -> str:
        """For the JSON."""
        return f"{self.modalities}_{self.fusion}_{'con' if self.contrastive else 'nocon'}"


def variants(study: Study) -> Iterator[Variant]:
    """Each subset of the modalities; for all together each fusion, without and with the contrastive loss."""
    everything = study.modalities
    for size in range(1, len(everything)):
        for subset in _subsets(everything, size):
            yield Variant(subset)
    for fusion in ("concat", "gated", "attention"):
        for contrastive in (0.0, 0.1):
            yield Variant(everything, fusion, contrastive)


def _subsets(letters: str, size: int) -> list[str]:
    found = [""]
    for letter in letters:
        found += [kept + letter for kept in found]
    return [kept for kept in found if len(kept) == size]


def rows_of(study: Study, data: Path, work: Path) -> tuple[tables.Row, ...]:
    """The rows that are labelled, each with all of the study's modalities as far as the set has them."""
    found = import_folder(
        study.name, data / study.folder, work / f"{study.name}.csv", ImportOptions(captions="own")
    ).rows
    wanted = set(study.head["labels"])
    told = {row.path: row.caption for row in found if row.caption}
    kept = []
    for row in found:
        labels = tuple(label for label in row.labels.get(study.head["name"], ()) if label in wanted)
        if not row.labels or (not labels and not study.head.get("multi_label")):
            continue
        if study.modalities == "va" and not probe(row.path).audio:
            continue
        kept.append(row.model_copy(update={"labels": {study.head["name"]: labels}, "caption": told.get(row.path, "")}))
    return tuple(kept)


def configuration(study: Study, variant: Variant, manifest: Path, cache: Path, out: Path) -> dict[str, Any]:
    """What is trained."""
    model: dict[str, Any] = {
        "fusion": {"kind": variant.fusion, "width": 96, "dropout": 0.3, "modality_dropout": 0.2},
        "embedding": 64,
        "heads": [study.head],
    }
    if "v" in variant.modalities:
        model["video"] = {"backbone": "frame", "frozen": True, "weights": "imagenet", "frames": 8, "lookback_ms": 60}
    if "a" in variant.modalities:
        model["audio"] = {}
    if "t" in variant.modalities:
        model["text"] = {"width": 64, "layers": 1, "vocabulary": 500}
    return {
        "name": study.name,
        "out": str(out),
        "model": model,
        "data": {
            "manifest": str(manifest),
            "window_s": study.window_s,
            "hop_s": 0.5 if study.name == "gmdcsa24" else study.window_s,
            "cache": str(cache),
        },
        "loss": {"contrastive": variant.contrastive},
        "optim": {
            "epochs": study.epochs,
            "batch": 32,
            "learning_rate": 1e-3,
            "weight_decay": 0.1,
            "ema": 0.98,
            "keep": "last",
        },
    }


def score(study: Study, variant: Variant, rows: Sequence[tables.Row], work: Path) -> Interval:
    """Accuracy, or for several labels the mean AUROC, of all rows by models that did not see their groups."""
    folds = folds_by_group(rows, study.folds, seed=0)
    heads: list[LabelScores] = []
    scored_rows: list[ScoredRow] = []
    for fold in range(study.folds):
        splits = ["val" if at == fold else "train" for at in folds]
        manifest = work / f"{study.name}-{fold}.jsonl"
        tables.write_manifest(
            manifest, [row.model_copy(update={"split": split}) for row, split in zip(rows, splits, strict=True)]
        )
        out = work / f"{study.name}-{variant.key}-{fold}"
        config = out.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(configuration(study, variant, manifest, work / "cache", out)))
        train(config, report=lambda *_: None)
        scored = score_checkpoint(out, manifest, split="val")
        heads.append(next(head for head in scored.heads if isinstance(head, LabelScores)))
        scored_rows += scored.rows
        shutil.rmtree(out)
    joined = replace(
        heads[0],
        scores=np.concatenate([head.scores for head in heads]),
        targets=np.concatenate([head.targets for head in heads]),
    )
    wanted = "mean_auc" if joined.multi_label else "accuracy"
    return next(one.interval for one in measure(Scored(tuple(scored_rows), (joined,))) if one.name == wanted)


def run(data: Path, work: Path, studies: Sequence[Study], console: Console) -> list[Measured]:
    """Train and score every variant of every study. Raises ``ModelError`` when the data is not there."""
    found = []
    for study in studies:
        rows = rows_of(study, data, work)
        groups = len({row.group for row in rows})
        figures = []
        for variant in variants(study):
            with console.status(f"{study.name}: {variant.key}"):
                interval = score(study, variant, rows, work)
            what = "mean AUROC" if study.head.get("multi_label") else "accuracy"
            named = "+".join(CHANNELS[letter] for letter in variant.modalities)
            meaning = f"{study.name} {what}: {named}, {variant.fusion}, λ = {variant.contrastive:g}"
            key = f"{study.name}_{variant.key}"
            figures += [
                Row(key, interval.value, meaning),
                Row(f"{key}_low", interval.low, "  lower end of the 95 % interval"),
                Row(f"{key}_high", interval.high, "  upper end"),
            ]
        notes = (f"{len(rows)} rows of {groups} groups, {study.folds} folds by group, {study.epochs} epochs each.",)
        measured = Measured(tuple(figures), notes)
        show(console, study.name, measured)
        found.append(measured)
    return found


def main(given: list[str] | None = None) -> int:
    """Exit code 0 when everything was measured; 1 with one line otherwise."""
    parser = argparse.ArgumentParser(prog="python -m bench.ablation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--only", choices=[study.name for study in STUDIES], action="append", help="these studies")
    parser.add_argument("--work", type=Path, help="folder for features and models that is kept [a temporary one]")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures here, under flat keys")
    options = parser.parse_args(given)
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 120)
    chosen = [study for study in STUDIES if not options.only or study.name in options.only]
    try:
        with tempfile.TemporaryDirectory() as temporary:
            work = options.work or Path(temporary)
            work.mkdir(parents=True, exist_ok=True)
            found = run(options.data.resolve(), work, chosen, console)
        if options.json is not None:
            write_json(options.json, found, machine())
    except (BenchError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
