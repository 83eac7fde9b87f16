"""Windows of a manifest's recordings as training, validation and evaluation see them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from models.config import AugmentConfig, DataConfig, ModelConfig
from models.data.augment import View, draw_view, weakened
from models.data.cache import ArrayCache
from models.data.collate import Sample
from models.data.features import Encoder
from models.data.manifest import Manifest, Row, Split
from models.data.recordings import Recordings, sampling_of, usable
from models.data.render import Renderer, Tokenizer, Window
from models.data.windows import cut_windows
from models.errors import DataError
from models.media import NS_PER_S
from models.types import VOID

SHORTEST_NS = NS_PER_S // 100
"""A stretch that is shorter holds nothing."""


class ClipDataset(Dataset[Sample]):
    """One split of a manifest, cut into windows; ``collate`` makes batches of its samples.

    Frames are sampled as the service samples them. In training each sample is changed at random by a generator
    seeded with (``seed``, epoch, index) alone, so that a resumed run, and any number of workers, sees the same.
    With an ``encoder`` and no segmentation head the video is its features, computed once and kept: for training
    those of ``feature_variants`` random views of each window, taken in turn.

    Raises ``DataError`` when a file is broken, or lacks what the model takes (unless ``skip_broken``), when a row
    lies outside its file, or when the split has no rows.
    """

    def __init__(
        self,
        manifest: Manifest,
        config: DataConfig,
        model: ModelConfig,
        tokenizer: Tokenizer | None,
        split: Split | tuple[Split, ...],
        training: bool,
        *,
        seed: int = 0,
        encoder: Encoder | None = None,
    ) -> None:
        if tokenizer is None and model.text is not None:
            raise ValueError("a model with text needs a tokenizer")
        self.manifest = manifest
        self.config = config
        self.model = model
        self.training = training
        self.skipped: list[str] = []
        """What was left out because of ``skip_broken``, one message each."""
        self._seed = seed
        self._window_ns = round(config.window_s * NS_PER_S)
        if any(head.kind == "segmentation" for head in model.heads):
            encoder = None
        self._views = config.feature_variants if encoder is not None else None
        cache = ArrayCache(config.cache, round(config.cache_gb * 1e9))
        self._recordings = Recordings(cache, sampling_of(config, model))
        self._renderer = Renderer(model, self._recordings, cache, tokenizer, encoder, self._window_ns)
        # In shared memory, so that data loaders' workers that outlive an epoch see it rise.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._splits = (split,) if isinstance(split, str) else split
        self.windows: tuple[Window, ...] = tuple(self._cut())
        """In the order of the manifest."""
        if not self.windows:
            raise DataError(f"{manifest.path} has no usable rows of split {' or '.join(self._splits)}; add some")

    def __len__(self) -> int:
        return len(self.windows)

    def set_epoch(self, epoch: int) -> None:
        """Choose which random changes samples undergo from now on."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> Sample:
        """Raises ``DataError`` when the file can't be decoded."""
        return self._sample(index, self.config.augment if self.training else None, 0)

    def pair(self, index: int) -> tuple[Sample, Sample]:
        """The same window changed a little and changed as training does: for pseudo-labels."""
        return self._sample(index, weakened(self.config.augment), 1), self._sample(index, self.config.augment, 0)

    def label_counts(self, head: str) -> Tensor:
        """int64 ``[labels]``: windows that show each label; for a segmentation head pixels."""
        config = next(h for h in self.model.heads if h.name == head)
        counts = torch.zeros(len(config.labels), dtype=torch.int64)
        for window in self.windows:
            row = self.manifest.rows[window.row]
            if config.kind == "segmentation":
                if row.mask is not None:
                    mask = torch.from_numpy(self._renderer.mask(row, self.manifest.where(row), config))
                    counts += torch.bincount(mask[mask != VOID], minlength=len(counts))
            elif row.split != "unlabelled":
                for label in row.labels.get(head, ()):
                    counts[config.labels.index(label)] += 1
        return counts

    def texts(self) -> list[str]:
        """Captions, questions and answers of the split's rows: what a tokenizer learns from."""
        rows = (self.manifest.rows[n] for n in dict.fromkeys(window.row for window in self.windows))
        return [text for row in rows for text in (row.caption, row.question, row.answer) if text]

    def _cut(self) -> list[Window]:
        windows = []
        for number, row in enumerate(self.manifest.rows):
            if row.split in self._splits:
                try:
                    windows += self._cut_row(number, row)
                except DataError as error:
                    if not self.config.skip_broken:
                        raise
                    self.skipped.append(str(error))
        return windows

    def _cut_row(self, number: int, row: Row) -> list[Window]:
        where = self.manifest.where(row)
        try:
            info = self._recordings.info(row.path)
            usable(row.path, info, self.model, text=bool(row.caption))
            if self.config.skip_broken:
                # Decoding alone tells whether a file is whole; the outcome is kept.
                self._recordings.around(row.path, round((row.start or 0.0) * NS_PER_S))
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        if row.mask is not None and not info.still:
            raise DataError(f"{where}: a mask goes with a picture, not with {row.path.name}; extract the frame")
        start_ns = round((row.start or 0.0) * NS_PER_S)
        end_ns = info.duration_ns if row.end is None else min(round(row.end * NS_PER_S), info.duration_ns)
        if not info.still and end_ns - start_ns < SHORTEST_NS:
            raise DataError(
                f"{where}: starts at {start_ns / NS_PER_S:g} s, {row.path.name} ends at "
                f"{info.duration_ns / NS_PER_S:.2f} s; correct start"
            )
        hop_ns = round(self.config.hop_s * NS_PER_S)
        starts = cut_windows(start_ns, end_ns, info.duration_ns, window_ns=self._window_ns, hop_ns=hop_ns)
        return [Window(number, start, (start_ns, end_ns)) for start in ([0] if info.still else starts)]

    def _sample(self, index: int, augment: AugmentConfig | None, stream: int) -> Sample:
        """``stream`` tells apart the generators of several views of one window."""
        window = self.windows[index]
        row, epoch = self.manifest.rows[window.row], int(self._epoch)
        where, render = self.manifest.where(row), self._renderer
        view = View()
        if augment is not None:
            look = epoch if self._views is None else epoch % self._views
            view = draw_view(augment, np.random.default_rng([self._seed, look, index, stream]))
        try:
            video, video_mask = render.video(row, window, view)
            random = np.random.default_rng([self._seed, epoch, index, stream, 1])
            audio, audio_mask = render.audio(row, window, view, augment, random)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        heads = render.targets(row, where, view)
        texts = render.texts(row)
        return Sample(window.row, window.start_ns, video, video_mask, audio, audio_mask, **texts, heads=heads)
