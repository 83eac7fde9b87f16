"""A pack's answers to a manifest: the same graphs, sampling and thresholds as in the service, and the same report
as for a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.manifest import Branch, Head, HeadKind, Mode
from engines.manifest import Manifest as PackManifest
from engines.open import LoadedPack, open_pack
from engines.types import Array
from export.rows import Windows, row_windows
from export.streamed import streamed
from models.audio import SAMPLE_RATE
from models.calibration import probabilities
from models.config import HeadConfig
from models.data.manifest import Manifest, Row, Split, read_manifest
from models.data.masks import read_mask
from models.errors import DataError, ModelError
from models.measures import DRAWS, flat, measure
from models.media import read_image
from models.progress import Report
from models.report import write_report
from models.scored import HeadScores, LabelScores, Scored
from models.scoring import MaskTally, chosen_rows, known_of, label_targets, row_means, scored_rows, shown

_ENCODE = 16
"""Samples encoded at once."""
_EVALUATED = (HeadKind.ACTION, HeadKind.CLASS, HeadKind.SEGMENTATION)


def evaluate_pack(
    pack_folder: Path,
    manifest: Path,
    *,
    backend: str = "auto",
    precision: str = "fp32",
    require_parity: bool = True,
    split: Split | None = None,
    root: Path | None = None,
    out: Path | None = None,
    draws: int = DRAWS,
    report: Report | None = None,
) -> dict[str, float | None]:
    """Score every row of a split by a pack and measure what came out; the keys are those of ``write_report``.

    The manifest's labels are the pack's, head by head; rows may be recordings, stretches of them, sounds alone, or
    pictures with masks. A row is cut into windows as the service cuts them, and judged by the mean of their scores; a
    stateful branch begins each row with an empty past.
    Of a multi-label head, labels that a row does not list count as absent in it. Without ``split``: ``test``, else
    ``val``, else ``train``. With ``out`` the report is written there.

    Raises ``DataError`` naming file and line of a row that cannot be used, ``ModelError`` when the pack cannot be
    evaluated, and an ``EngineError`` when it cannot be opened.
    """
    pack = open_pack(pack_folder, backend=backend, precision=precision, require_parity=require_parity)
    try:
        heads = _heads(pack.manifest)
        table = read_manifest(manifest, [one.config for one in heads], root, every_class=False)
        split, rows = chosen_rows(table, split)
        asked = _asked(pack.manifest, table, rows, heads)
        with shown(report) as progress:
            scores = tuple(_score(pack, table, rows, asked, progress))
    finally:
        pack.close()
    scored = Scored(scored_rows(table, rows), scores)
    if out is None:
        return flat(measure(scored, draws))
    info = pack.manifest
    about = {
        "pack": f"{info.name} {info.version}",
        "engine": f"{pack.backend}, {pack.precision}",
        "manifest": table.path.name,
        "split": split,
        "heads": ", ".join(one.head.name for one in asked),
    }
    return write_report(out, scored, title=f"Report: pack {info.name}", about=about, draws=draws)


@dataclass(frozen=True, slots=True)
class _PackHead:
    branch: Branch
    head: Head
    config: HeadConfig
    """The head as a manifest of rows knows it."""


def _heads(manifest: PackManifest) -> list[_PackHead]:
    return [
        _PackHead(branch, head, _config(head))
        for branch in manifest.branches
        for head in branch.heads
        if head.kind in _EVALUATED
    ]


def _config(head: Head) -> HeadConfig:
    # Not validated: a pack may have a head of one label, which no training would take.
    return HeadConfig.model_construct(
        name=head.name,
        kind=head.kind.value,
        labels=head.labels,
        multi_label=head.activation == "sigmoid",
        background=head.background,
        weight=1.0,
    )


def _asked(pack: PackManifest, table: Manifest, rows: Sequence[Row], heads: Sequence[_PackHead]) -> list[_PackHead]:
    """Heads that some row says something about. Raises ``DataError`` when there is none."""
    asked = [one for one in heads if any(known_of(row, one.config) for row in rows)]
    if not asked:
        there = ", ".join(f"label:{h.head.name}" for h in heads if h.head.kind is not HeadKind.SEGMENTATION)
        named = sorted({name for row in rows for name in row.labels})
        found = f"; its columns are {', '.join(named)}" if named else ""
        masks = "" if all(one.head.kind is not HeadKind.SEGMENTATION for one in heads) else " or mask"
        raise DataError(
            f"{table.path}: no row says anything about a head of pack {pack.name}{found}; fill a column {there}{masks}"
        )
    return asked


def _score(
    pack: LoadedPack, table: Manifest, rows: Sequence[Row], asked: Sequence[_PackHead], progress: Report
) -> Iterator[HeadScores]:
    for branch in pack.manifest.branches:
        heads = [one for one in asked if one.branch.name == branch.name]
        if heads:
            yield from _score_branch(_Runner(pack, branch), table, rows, heads, progress)


def _score_branch(
    runner: _Runner, table: Manifest, rows: Sequence[Row], heads: Sequence[_PackHead], progress: Report
) -> Iterator[HeadScores]:
    """Every row that says something about one of the heads, through the branch's graphs."""
    wanted = [n for n, row in enumerate(rows) if any(known_of(row, one.config) for one in heads)]
    masks = {
        one.head.name: MaskTally(one.config, len(rows), sum(row.mask is not None for row in rows))
        for one in heads
        if one.head.kind is HeadKind.SEGMENTATION
    }
    owners: list[NDArray[np.int64]] = []
    logits: dict[str, list[Array]] = {one.head.name: [] for one in heads if one.head.name not in masks}
    for done, n in enumerate(wanted, start=1):
        where = table.where(rows[n])
        outputs = runner.run(where, rows[n], {one.head.output for one in heads})
        for one in heads:
            raw = outputs[one.head.output]
            if one.head.name in logits:
                logits[one.head.name].append(raw)
            elif rows[n].mask is not None:
                _add_mask(masks[one.head.name], n, rows[n], where, one, raw[-1])
        owners.append(np.full(len(next(iter(outputs.values()))), n, np.int64))
        progress(f"score {runner.branch.name}", done, len(wanted), None)
    windows = np.concatenate(owners)
    for one in heads:
        name = one.head.name
        yield (
            masks[name].scores() if name in masks else _label_scores(one, rows, np.concatenate(logits[name]), windows)
        )


def _label_scores(one: _PackHead, rows: Sequence[Row], logits: Array, owners: NDArray[np.int64]) -> LabelScores:
    scores = probabilities(logits, one.head.temperature, multi_label=one.config.multi_label)
    return LabelScores(
        head=one.head.name,
        labels=one.head.labels,
        multi_label=one.config.multi_label,
        scores=row_means(scores, owners, len(rows)),
        targets=label_targets(rows, one.config),
        thresholds={label: limit.on for label, limit in one.head.thresholds.items()},
    )


def _add_mask(tally: MaskTally, number: int, row: Row, where: str, one: _PackHead, predicted: Array) -> None:
    height, width = predicted.shape
    truth = read_mask(row, where, (width, height), len(one.head.labels))
    picture = read_image(row.path, width, height) if tally.wants_picture() else None
    tally.add(number, truth, predicted, picture)


class _Runner:
    """One branch of a pack, run as the service runs it."""

    def __init__(self, pack: LoadedPack, branch: Branch) -> None:
        if branch.audio is not None and branch.audio.sample_rate != SAMPLE_RATE:
            raise ModelError(
                f"pack {pack.manifest.name}: branch {branch.name} takes sound at {branch.audio.sample_rate} Hz, "
                f"evaluation reads it at {SAMPLE_RATE} Hz; export the pack for that rate"
            )
        self.branch = branch
        self._graph = pack.engines[branch.graph]
        self._encoder = pack.engines[branch.encoder] if branch.encoder else None
        self._inputs = {tensor.name: tensor for tensor in pack.manifest.graph(branch.graph).inputs}

    def run(self, where: str, row: Row, outputs: set[str]) -> dict[str, Array]:
        """Outputs of the window graph for each window of a row, in order. Raises ``DataError``, ``InferenceError``."""
        cut = row_windows(where, row, self.branch)
        if self.branch.mode is Mode.STATEFUL:
            parts: list[Mapping[str, Array]] = list(streamed(self._graph, self.branch, cut))
        else:
            parts = [self._judged(windows) for windows in cut]
        return {name: np.concatenate([part[name] for part in parts]) for name in outputs}

    def _judged(self, windows: Windows) -> Mapping[str, Array]:
        inputs = self._window_inputs(windows)
        return self._graph.infer({name: inputs[name] for name in self._inputs})

    def _window_inputs(self, windows: Windows) -> dict[str, Array]:
        inputs: dict[str, Array] = {"audio": windows.audio, "audio_mask": windows.coverage}
        if self.branch.video is not None:
            inputs["frame_mask"] = windows.present[windows.samples].astype(np.float32)
            if self.branch.mode is Mode.STAGED:
                inputs["features"] = self._features(windows)[windows.samples]
            else:
                inputs["frames"] = windows.clips()
        return inputs

    def _features(self, windows: Windows) -> NDArray[np.float32]:
        """float32 ``[S, D]``: of each sample once, zeros where it is missing."""
        assert self._encoder is not None
        width = self._inputs["features"].shape[-1]
        features = np.zeros((len(windows.present), int(width)), np.float32)
        there = np.flatnonzero(windows.present)
        for first in range(0, len(there), _ENCODE):
            part = there[first : first + _ENCODE]
            features[part] = self._encoder.infer({"frames": windows.frames[part]})["features"]
        return features
