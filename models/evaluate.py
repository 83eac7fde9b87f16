"""A trained model's answers to a manifest, and the report of them."""

from __future__ import annotations

from pathlib import Path

import torch

from models.checkpoint import load_model, read_card
from models.config import DataConfig
from models.data.dataset import ClipDataset
from models.data.manifest import Split, read_manifest
from models.errors import DataError
from models.loading import frozen_features
from models.measures import DRAWS, flat, measure
from models.predict import predict
from models.progress import Report
from models.report import HISTORY_FILE, read_history, write_report
from models.scored import Scored
from models.scoring import chosen_rows, known_of, shown

BATCH = 16


def evaluate_checkpoint(
    folder: Path,
    manifest: Path,
    *,
    split: Split | None = None,
    root: Path | None = None,
    out: Path | None = None,
    cache: Path | None = None,
    device: str | None = None,
    draws: int = DRAWS,
    report: Report | None = None,
) -> dict[str, float | None]:
    """Score every row of a split by the model that training left in ``folder``, and measure what came out.

    Rows are cut into windows as in training and judged by the mean of their scores, at the temperature and the
    thresholds in ``model.json``. Without ``split``: ``test``, else ``val``, else ``train``. ``root`` and ``cache``
    are as in the configuration of data. With ``out`` the report is written there; the keys of the result are those of
    ``models.report.write_report``.

    Raises ``WeightsError`` when the folder holds no whole model, ``DataError`` naming file and line of a row that
    cannot be used, ``ModelError`` when the report cannot be written.
    """
    card = read_card(folder)
    scored, split, windows = _score(folder, manifest, split, root, cache, device, report)
    if out is None:
        return flat(measure(scored, draws))
    about = {
        "model": card.name,
        "weights": card.weights_sha256[:12],
        "manifest": manifest.name,
        "split": split,
        "windows": str(windows),
    }
    history = read_history(folder / HISTORY_FILE)
    return write_report(out, scored, title=f"Report: {card.name}", about=about, history=history, draws=draws)


def score_checkpoint(
    folder: Path, manifest: Path, *, split: Split | None = None, root: Path | None = None, cache: Path | None = None
) -> Scored:
    """The scores that ``evaluate_checkpoint`` measures."""
    return _score(folder, manifest, split, root, cache, None, _quiet)[0]


def _score(
    folder: Path,
    manifest: Path,
    split: Split | None,
    root: Path | None,
    cache: Path | None,
    device: str | None,
    report: Report | None,
) -> tuple[Scored, Split, int]:
    """Scores, the split they are of, and the number of windows."""
    model, card, tokenizer = load_model(folder)
    table = read_manifest(manifest, card.model.heads, root, every_class=False)
    split, rows = chosen_rows(table, split)
    if not any(known_of(row, head) for row in rows for head in card.model.heads):
        there = "the heads " + ", ".join(head.name for head in card.model.heads)
        raise DataError(
            f"{manifest}: no row of split {split} says anything of {there}; fill in labels, masks, captions or answers"
        )
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with shown(report) as progress:
        data = DataConfig(manifest=manifest, root=root, window_s=card.window_s, hop_s=card.hop_s)
        if cache is not None:
            data = data.model_copy(update={"cache": cache})
        encoder = frozen_features(model, data.cache)
        windows = ClipDataset(table, data, card.model, tokenizer, split, False, encoder=encoder)
        answers = predict(
            model.to(place),
            windows,
            tokenizer,
            batch=BATCH,
            device=place,
            advance=lambda done, total: progress("score", done, total, None),
        )
    return answers.scored(card.calibration), split, len(windows)


def _quiet(stage: str, done: int, total: int, loss: float | None) -> None:
    """Shows nothing."""
