"""From a configuration to the batches of every step.

Which windows a step draws, and how they are changed at random, depends on the seed and the step's number alone: a run
that goes on at step n sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from models.backbones.temporal import FrameBackbone
from models.branches import VideoBranch
from models.checkpoint import TOKENIZER_FILE
from models.config import TrainConfig
from models.data.collate import Sample, collate, collate_pairs
from models.data.dataset import ClipDataset
from models.data.features import FrozenFeatures
from models.data.manifest import Manifest, Split, read_manifest
from models.data.mixup import mixup
from models.distill import TeacherScores
from models.errors import DataError
from models.modes import without_labels
from models.network import FusionModel
from models.scoring import known_of
from models.text import TextTokenizer
from models.types import Inputs, Targets

SPLITS: dict[str, tuple[Split, ...]] = {
    "supervised": ("train",),
    "self-supervised": ("train", "unlabelled"),
    "semi-supervised": ("train",),
    "distillation": ("train", "unlabelled"),
}
"""Rows that a mode learns from; semi-supervised training draws the unlabelled ones beside these."""
_TEACHER = "teacher "
"""Before a head's name: its scores, among the targets that mixup blends."""
Pair = tuple[Inputs, Targets]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """What one step draws, on the CPU."""

    inputs: Inputs
    """Of the rows to learn from."""
    targets: Targets
    """What is known of them."""
    teacher: dict[str, Tensor]
    """By head a teacher's scores."""
    weak: Pair | None = None
    """Semi-supervised: rows without labels, hardly changed."""
    strong: Pair | None = None
    """The same rows, changed as training does."""


@dataclass(frozen=True, slots=True)
class Data:
    """What a run learns from and is measured on."""

    manifest: Manifest
    """All rows."""
    train: ClipDataset
    """Windows to learn from."""
    unlabelled: ClipDataset | None
    """Semi-supervised training's windows without labels."""
    val: ClipDataset
    """Windows to be measured on while training, and calibrated on."""
    test: ClipDataset | None
    """Windows that the report is about; ``None`` where the manifest has none."""

    @property
    def counts(self) -> dict[str, Tensor]:
        """Training windows by label, as ``Objective`` takes them."""
        heads = [head for head in self.train.model.heads if head.kind in ("class", "action")]
        return {head.name: _counts(self.train, head.name, multi_label=head.multi_label) for head in heads}

    def steps_per_epoch(self, batch: int) -> int:
        """Batches in which the larger set is seen once."""
        return max(len(windows) // batch or 1 for windows in (self.train, self.unlabelled) if windows is not None)


def read_rows(config: TrainConfig) -> Manifest:
    """The manifest, checked for what the mode needs. Raises ``DataError``."""
    data = config.data
    labelled = config.mode != "self-supervised"
    manifest = read_manifest(data.manifest, config.model.heads, data.root, every_class=labelled)
    if not any(row.split == "val" for row in manifest.rows):
        raise DataError(f"{data.manifest}: no row has split val, so nothing tells when training is good; mark some")
    rows = [row for row in manifest.rows if row.split == "val"]
    if labelled and not any(known_of(row, head) for row in rows for head in config.model.heads):
        raise DataError(f"{data.manifest}: no row of split val says anything of the model's heads; label some")
    return manifest


def find_tokenizer(config: TrainConfig, manifest: Manifest, *, resumed: bool) -> TextTokenizer | None:
    """The run's own from before if it is resumed, that of the run it starts from, or one learned from the texts.

    ``None`` without text. Raises ``DataError`` or ``WeightsError``.
    """
    if config.model.text is None:
        return None
    before = [config.out] if resumed else []
    for folder in [*before, *([] if config.init is None else [config.init, config.init.parent])]:
        if (folder / TOKENIZER_FILE).is_file():
            return TextTokenizer.load(folder / TOKENIZER_FILE)
    splits = {*SPLITS[config.mode], "unlabelled" if config.mode == "semi-supervised" else "train"}
    rows = [row for row in manifest.rows if row.split in splits]
    texts = [text for row in rows for text in (row.caption, row.question, row.answer) if text]
    return TextTokenizer.train(texts, config.model.text.vocabulary)


def load_data(config: TrainConfig, manifest: Manifest, tokenizer: TextTokenizer | None, model: FusionModel) -> Data:
    """The windows; a frozen frame backbone's features take the place of frames. Raises ``DataError``."""
    encoder = frozen_features(model, config.data.cache)

    def windows(splits: tuple[Split, ...], *, training: bool) -> ClipDataset:
        return ClipDataset(
            manifest, config.data, config.model, tokenizer, splits, training, seed=config.seed, encoder=encoder
        )

    train, val = windows(SPLITS[config.mode], training=True), windows(("val",), training=False)
    unlabelled = windows(("unlabelled",), training=True) if config.mode == "semi-supervised" else None
    tested = any(row.split == "test" for row in manifest.rows)
    return Data(manifest, train, unlabelled, val, windows(("test",), training=False) if tested else None)


def frozen_features(model: FusionModel, cache: Path) -> FrozenFeatures | None:
    """The encoder of a frozen frame backbone; ``None`` where the model learns from frames themselves."""
    video = model.config.video
    if video is None or not video.frozen or video.backbone != "frame":
        return None
    branch = model.branch("video")
    assert isinstance(branch, VideoBranch) and isinstance(branch.backbone, FrameBackbone)
    return FrozenFeatures(branch.backbone.pretrained(), video, cache)


def draws(config: TrainConfig, data: Data, begin: int, end: int, *, rank: int = 0, world: int = 1) -> Iterator[Drawn]:
    """What steps ``begin`` to ``end`` draw in one of ``world`` processes: its share of ``optim.batch`` rows.

    Raises ``DataError`` when a file cannot be decoded.
    """
    reader = _Reader(config, rank, world)
    labelled = reader.stream(data.train, _Collate(config, data.train), begin, end)
    pairs: Iterator[tuple[Pair, Pair] | None] = repeat(None)
    if data.unlabelled is not None:
        pairs = reader.stream(_Pairs(data.unlabelled), collate_pairs, begin, end)
    for step, (inputs, targets), pair in zip(range(begin, end), labelled, pairs, strict=False):
        if config.data.augment.mixup:
            random = np.random.default_rng([config.seed, step, rank])
            inputs, targets = mixup(inputs, targets, config.data.augment.mixup, random)
        heads = {name: value for name, value in targets.heads.items() if not name.startswith(_TEACHER)}
        scores = {n.removeprefix(_TEACHER): value for n, value in targets.heads.items() if n.startswith(_TEACHER)}
        known = Targets(heads, targets.weight, targets.index)
        if pair is None:
            yield Drawn(inputs, known, scores)
        else:
            (weak, _), (strong, unknown) = pair
            unknown = without_labels(unknown)
            yield Drawn(inputs, known, scores, (weak, unknown), (strong, unknown))


class _Reader:
    """Makes streams of batches that depend on the number of the step alone."""

    def __init__(self, config: TrainConfig, rank: int, world: int) -> None:
        self._config = config
        self._rank = rank
        self._world = world

    def stream(
        self, windows: ClipDataset | _Pairs, gather: Callable[[Sequence[Any]], T], begin: int, end: int
    ) -> Iterator[T]:
        """One batch for each step. Windows are gone through in passes, each in an order of its own."""
        config, size = self._config, len(windows)
        sampler = _Pass(config.optim.batch, self._rank, self._world)
        workers = config.data.workers
        loader = DataLoader(
            windows,
            batch_sampler=sampler,
            collate_fn=gather,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_one_thread,
            pin_memory=False,
        )
        step, in_pass = begin, size // config.optim.batch or 1
        while step < end:
            number, first = divmod(step, in_pass)
            sampler.order = np.random.default_rng([config.seed, number]).permutation(size)
            sampler.range = range(first, min(in_pass, first + end - step))
            windows.set_epoch(number)
            yield from loader
            step += len(sampler)


class _Pass(Sampler[list[int]]):
    """The batches of a part of one pass: each process's own rows."""

    def __init__(self, batch: int, rank: int, world: int) -> None:
        self.order = np.zeros(0, np.int64)
        self.range = range(0)
        self._batch = batch
        self._mine = slice(rank * batch // world, (rank + 1) * batch // world)

    def __iter__(self) -> Iterator[list[int]]:
        # Of fewer windows than a batch some are drawn more than once.
        order = self.order if len(self.order) >= self._batch else np.resize(self.order, self._batch)
        for place in self.range:
            yield order[place * self._batch : (place + 1) * self._batch][self._mine].tolist()

    def __len__(self) -> int:
        return len(self.range)


class _Pairs(Dataset[tuple[Sample, Sample]]):
    """Each window changed a little, and changed as training does."""

    def __init__(self, windows: ClipDataset) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> tuple[Sample, Sample]:
        return self._windows.pair(index)

    def set_epoch(self, epoch: int) -> None:
        """As ``ClipDataset.set_epoch``."""
        self._windows.set_epoch(epoch)


class _Collate:
    """Batches of samples, with a teacher's scores among the targets where there is one."""

    def __init__(self, config: TrainConfig, windows: ClipDataset) -> None:
        self._rows = windows.manifest.rows
        self._scores: TeacherScores | None = None
        if config.distill is not None:
            root = config.data.root or config.data.manifest.parent
            self._scores = TeacherScores(config.distill.scores, config.model.heads, root, config.data.hop_s / 2)
            if all(self._scores.find(self._rows[w.row].path, w.start_ns) is None for w in windows.windows):
                raise DataError(
                    f"{config.distill.scores} has no scores of any training window; its paths "
                    f"must be relative to {root}"
                )

    def __call__(self, samples: Sequence[Sample]) -> Pair:
        inputs, targets = collate(samples)
        hidden = [self._rows[sample.row].split == "unlabelled" for sample in samples]
        heads = dict(targets.heads)
        for name, unknown in without_labels(targets).heads.items():
            keep = torch.tensor(hidden).reshape(-1, *(1 for _ in unknown.shape[1:]))
            heads[name] = torch.where(keep, unknown, targets.heads[name])
        if self._scores is not None:
            scores = self._scores.of([(self._rows[sample.row].path, sample.start_ns) for sample in samples])
            heads |= {_TEACHER + name: value for name, value in scores.items()}
        return inputs, Targets(heads, targets.weight, targets.index)


def _counts(windows: ClipDataset, head: str, *, multi_label: bool) -> Tensor:
    shown = windows.label_counts(head)
    if not multi_label:
        return shown
    rows = (windows.manifest.rows[window.row] for window in windows.windows)
    known = sum(head in row.labels and row.split != "unlabelled" for row in rows)
    return torch.stack([known - shown, shown])


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
