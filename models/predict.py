"""A trained model's answers to the windows of a data set, gathered into the manifest's rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from models.calibration import Calibration, calibrate, probabilities
from models.config import HeadConfig
from models.data.collate import collate
from models.data.dataset import ClipDataset
from models.measures import measure
from models.metrics import Floats, Indices, retrieval_ranks
from models.network import FusionModel, newest
from models.scored import AnswerScores, HeadScores, LabelScores, RetrievalScores, Scored
from models.scoring import MaskTally, known_of, label_targets, row_means, scored_rows
from models.text import TextTokenizer
from models.types import Inputs, Outputs

MAIN = ("accuracy", "mean_ap", "miou", "r1", "word_f1")
"""The measure that each kind of head is chosen by."""


@dataclass(slots=True)
class Answers:
    """What a model said of a data set's windows. The rows are those of the manifest that have windows."""

    windows: ClipDataset
    """The data set."""
    rows: tuple[int, ...]
    """Numbers of the rows in the manifest."""
    owners: Indices
    """int64 ``[W]``: which of ``rows`` each window is of."""
    logits: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Of ``class`` and ``action`` heads float32 ``[W, labels]``."""
    vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """float32 ``[W, E]``: each modality's place in the shared space, and under its name that of an embedding head,
    which does not look at the text; zeros where absent."""
    masks: dict[str, MaskTally] = field(default_factory=dict)
    """Of segmentation heads."""
    replies: dict[str, dict[int, str]] = field(default_factory=dict)
    """Of dialogue heads, by place in ``rows``: the answer given."""

    def targets(self, head: HeadConfig) -> NDArray[np.float32]:
        """float32 ``[R, labels]``: what is known of the rows."""
        return label_targets([self.windows.manifest.rows[n] for n in self.rows], head)

    def calibrated(self) -> Calibration:
        """Temperatures and thresholds by which these windows' scores are right."""
        heads = [head for head in self.windows.model.heads if head.name in self.logits]
        targets = {head.name: self.targets(head)[self.owners] for head in heads}
        return calibrate(self.logits, targets, heads)

    def scored(self, calibration: Calibration) -> Scored:
        """The rows' scores beside what is known of them, for the heads that the manifest says something of."""
        manifest = self.windows.manifest
        rows = [manifest.rows[n] for n in self.rows]
        known = [head for head in self.windows.model.heads if any(known_of(row, head) for row in rows)]
        found = [self._head(head, calibration) for head in known]
        return Scored(scored_rows(manifest, rows), tuple(head for head in found if head is not None))

    def _head(self, head: HeadConfig, calibration: Calibration) -> HeadScores | None:
        rows = [self.windows.manifest.rows[n] for n in self.rows]
        if head.name in self.logits:
            scores = probabilities(
                self.logits[head.name], calibration.temperature(head.name), multi_label=head.multi_label
            )
            limits = {label: limit.on for label, limit in calibration.thresholds(head.name).items()}
            means = row_means(scores, self.owners, len(rows))
            return LabelScores(head.name, head.labels, head.multi_label, means, self.targets(head), limits)
        if head.name in self.masks:
            return self.masks[head.name].scores()
        if head.name in self.vectors:
            clips, texts = self.places(head.name), self.places("text")
            return RetrievalScores(head.name, tuple(row.caption for row in rows), clips, texts)
        if head.name in self.replies:
            given = tuple(self.replies[head.name].get(n, "") for n in range(len(rows)))
            questions, wanted = tuple(row.question for row in rows), tuple(row.answer for row in rows)
            return AnswerScores(head.name, questions, wanted, given)
        return None

    def places(self, name: str) -> Floats:
        """float64 ``[R, E]``: each row's place in the shared space, of unit length; zeros where absent."""
        means = row_means(self.vectors[name], self.owners, len(self.rows))
        return np.asarray(means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12), np.float64)

    def agreement(self) -> float:
        """Mean reciprocal rank at which a row's modalities find each other, over all pairs of them; nan without any."""
        captions = np.array([self.windows.manifest.rows[n].caption for n in self.rows])
        same = (captions[:, None] == captions[None]) & (captions != "")[:, None] | np.eye(len(captions), dtype=bool)
        found = []
        names = [name for name in ("video", "audio", "text") if name in self.vectors]
        for one, other in permutations(names, 2):
            a, b = self.places(one), self.places(other)
            both = np.flatnonzero((np.abs(a).sum(axis=1) > 0) & (np.abs(b).sum(axis=1) > 0))
            if len(both) > 1:
                ranks = retrieval_ranks(a[both] @ b[both].T, same[np.ix_(both, both)])
                found.append(float((1 / ranks).mean()))
        return float(np.mean(found)) if found else float("nan")


def predict(
    model: FusionModel,
    windows: ClipDataset,
    tokenizer: TextTokenizer | None,
    *,
    batch: int,
    device: torch.device | str = "cpu",
    advance: Callable[[int, int], None] | None = None,
) -> Answers:
    """Ask a model about every window of a data set. ``advance`` is told windows done and in all.

    The model is put into evaluation mode. Raises ``DataError`` when a file cannot be decoded.
    """
    model.eval()
    numbers = np.array([window.row for window in windows.windows], np.int64)
    rows, owners = np.unique(numbers, return_inverse=True)
    answers = Answers(windows, tuple(rows.tolist()), owners.astype(np.int64))
    for head in windows.model.heads:
        if head.kind == "segmentation":
            masked = sum(windows.manifest.rows[n].mask is not None for n in answers.rows)
            answers.masks[head.name] = MaskTally(head, len(rows), masked)
    loader = DataLoader(windows, batch, collate_fn=collate, num_workers=windows.config.workers)
    parts: dict[str, list[Tensor]] = {}
    done = 0
    for inputs, targets in loader:
        moved = inputs.to(device)
        with torch.inference_mode():
            outputs, mute = model(moved), _mute(model, moved)
        mine = owners[done : done + len(outputs.fused)]
        for name, tensor in _kept(model, outputs, mute):
            parts.setdefault(name, []).append(tensor.float().cpu())
        _add_masks(answers, inputs, outputs, targets.heads, mine)
        _add_replies(answers, model, moved, tokenizer, mine)
        done += len(mine)
        if advance is not None:
            advance(done, len(windows))
    for name, tensors in parts.items():
        kind, _, key = name.partition(" ")
        (answers.logits if kind == "logits" else answers.vectors)[key] = torch.cat(tensors).numpy()
    return answers


def main_measures(scored: Scored) -> dict[str, float]:
    """By head the measure that it is chosen by; heads of which nothing is known are left out."""
    found: dict[str, tuple[str, float]] = {}
    for one in measure(scored, draws=0):
        if one.label is None and one.name in MAIN and not np.isnan(one.interval.value):
            found.setdefault(one.head, (f"{one.head}_{one.name}", one.interval.value))
    return dict(found.values())


def _mute(model: FusionModel, inputs: Inputs) -> Outputs | None:
    """Answers that do not look at the text, where a head is asked by text."""
    if not any(head.kind == "embedding" for head in model.config.heads):
        return None
    return model.without(inputs, "text")


def _kept(model: FusionModel, outputs: Outputs, mute: Outputs | None) -> list[tuple[str, Tensor]]:
    kept = [(f"vectors {name}", tensor) for name, tensor in outputs.embeddings.items()]
    for head in model.config.heads:
        if head.kind in ("class", "action"):
            kept.append((f"logits {head.name}", outputs.logits[head.name]))
        elif head.kind == "embedding" and mute is not None:
            kept.append((f"vectors {head.name}", mute.logits[head.name]))
    return kept


def _add_masks(answers: Answers, inputs: Inputs, outputs: Outputs, targets: dict[str, Tensor], owners: Indices) -> None:
    for name, tally in answers.masks.items():
        if name not in outputs.logits or inputs.video is None or inputs.video_mask is None:
            continue
        predicted = outputs.logits[name].argmax(dim=1).cpu().numpy()
        pictures = newest(inputs.video, inputs.video_mask)
        for n, owner in enumerate(owners.tolist()):
            if answers.windows.manifest.rows[answers.rows[owner]].mask is not None:
                picture = pictures[n].to(torch.uint8).numpy() if tally.wants_picture() else None
                tally.add(owner, targets[name][n].numpy(), predicted[n], picture)


def _add_replies(
    answers: Answers, model: FusionModel, inputs: Inputs, tokenizer: TextTokenizer | None, owners: Indices
) -> None:
    for head in model.config.heads:
        if head.kind == "dialogue" and inputs.question is not None and tokenizer is not None:
            said = tokenizer.decode(model.reply(inputs, head.name).cpu())
            replies = answers.replies.setdefault(head.name, {})
            for owner, text in zip(owners.tolist(), said, strict=True):
                replies.setdefault(owner, text)
