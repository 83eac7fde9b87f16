"""From a window's place to its tensors: frames or features, sound, text and targets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.audio import SAMPLE_RATE
from models.config import AugmentConfig, HeadConfig, ModelConfig
from models.data.augment import View, change_frames, change_mask, change_sound, draw_hearing, fit_sound
from models.data.cache import ArrayCache, Arrays, cache_key, file_identity
from models.data.features import Encoder
from models.data.manifest import CLASSIFYING, Row
from models.data.masks import read_mask
from models.data.recordings import Recordings
from models.data.windows import sample_times, take_audio, take_frames
from models.media import NS_PER_S
from models.tokens import START
from models.types import VOID


class Tokenizer(Protocol):
    """As ``models.text.TextTokenizer``."""

    def encode(self, texts: list[str], max_tokens: int, *, ends: bool = False) -> Tensor:
        """int64 ``[B, L]``; with ``ends`` the start and end tokens stand around each text."""
        ...


@dataclass(frozen=True, slots=True)
class Window:
    """Where one sample comes from."""

    row: int
    """Number of its row in the manifest, from 0."""
    start_ns: int
    """Where it begins in the file."""
    span_ns: tuple[int, int]
    """The row's stretch of the file."""


def place(window: Window, view: View, window_ns: int) -> tuple[int, int]:
    """Start and length in ns of what a changed window covers.

    A moved window stays in its stretch, or keeps all of a shorter one in sight; a faster one covers more on both
    sides.
    """
    start_ns = window.start_ns
    if view.shift_s:
        ends = (window.span_ns[0], window.span_ns[1] - window_ns, start_ns)
        start_ns = min(max(start_ns + round(view.shift_s * NS_PER_S), min(ends)), max(ends))
    length_ns = round(window_ns * view.speed)
    return start_ns - (length_ns - window_ns) // 2, length_ns


class Renderer:
    """Makes the tensors of one window under one view. All methods raise ``DataError``."""

    def __init__(
        self,
        model: ModelConfig,
        recordings: Recordings,
        cache: ArrayCache,
        tokenizer: Tokenizer | None,
        encoder: Encoder | None,
        window_ns: int,
    ) -> None:
        self._model = model
        self._recordings = recordings
        self._cache = cache
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._window_ns = window_ns

    def video(self, row: Row, window: Window, view: View) -> tuple[Tensor | None, Tensor | None]:
        """``Inputs.video`` and ``Inputs.video_mask`` of one row; zeros where the file has no pictures."""
        config = self._model.video
        if config is None:
            return None, None
        if not self._recordings.info(row.path).video:
            kind = torch.uint8 if self._encoder is None else torch.float32
            return torch.zeros(self._shape(), dtype=kind), torch.zeros(config.frames)
        if self._encoder is None:
            frames, mask = self._frames(row, window, view)
            return torch.from_numpy(frames), torch.from_numpy(mask)
        key = cache_key(
            file_identity(row.path),
            place(window, view, self._window_ns),
            replace(view, shift_s=0.0),
            (config.width, config.height, config.frames, config.lookback_ms),
            self._encoder.checksum,
        )
        kept = self._cache.get(key, lambda: self._features(row, window, view))
        features, mask = (np.array(kept[name], np.float32) for name in ("features", "mask"))
        return torch.from_numpy(features), torch.from_numpy(mask)

    def _features(self, row: Row, window: Window, view: View) -> Arrays:
        assert self._encoder is not None
        frames, mask = self._frames(row, window, view)
        features = np.zeros(self._shape(), np.float16)
        if mask.any():
            features[mask > 0] = self._encoder.encode(frames[mask > 0])
        return {"features": features, "mask": mask}

    def _frames(self, row: Row, window: Window, view: View) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Frames and mask; a picture is the last sample, where the service would have a moment's frame."""
        config = self._model.video
        assert config is not None
        stretch = self._recordings.around(row.path, window.start_ns)
        if self._recordings.info(row.path).still:
            pair = () if config.lookback_ms is None else (2,)
            frames = np.zeros((config.frames, *pair, *stretch.images.shape[1:]), np.uint8)
            mask = np.zeros(config.frames, np.float32)
            frames[-1], mask[-1] = change_frames(np.array(stretch.images[0]), view), 1.0
            return frames, mask
        start_ns, length_ns = place(window, view, self._window_ns)
        lookback_ms = config.lookback_ms
        frames, mask = take_frames(
            stretch,
            sample_times(start_ns, length_ns, config.frames),
            period_ns=self._window_ns // config.frames,
            lookback_ns=None if lookback_ms is None else round(lookback_ms * 1_000_000 * view.speed),
        )
        return change_frames(frames, view), mask

    def _shape(self) -> tuple[int, ...]:
        config = self._model.video
        assert config is not None
        if self._encoder is not None:
            return (config.frames, self._encoder.features)
        return (config.frames, *(() if config.lookback_ms is None else (2,)), config.height, config.width, 3)

    def audio(
        self, row: Row, window: Window, view: View, augment: AugmentConfig | None, random: np.random.Generator
    ) -> tuple[Tensor | None, Tensor | None]:
        """``Inputs.audio`` and ``Inputs.audio_mask`` of one row."""
        if self._model.audio is None:
            return None, None
        start_ns, length_ns = place(window, view, self._window_ns)
        audio, coverage = take_audio(self._recordings.around(row.path, window.start_ns), start_ns, length_ns)
        audio = fit_sound(audio, self._window_ns * SAMPLE_RATE // NS_PER_S)
        if augment is not None and coverage > 0:
            audio = change_sound(audio, draw_hearing(augment, random), random)
        return torch.from_numpy(audio), torch.tensor(coverage, dtype=torch.float32)

    def texts(self, row: Row) -> dict[str, Tensor | None]:
        """``tokens`` and, for dialogue, ``question`` and ``answer`` of ``Inputs``."""
        config, tokenizer = self._model.text, self._tokenizer
        if config is None or tokenizer is None:
            return {}
        texts: dict[str, Tensor | None] = {"tokens": tokenizer.encode([row.caption], config.max_tokens)[0]}
        if any(head.kind == "dialogue" for head in self._model.heads):
            texts["question"] = tokenizer.encode([row.question], config.max_tokens)[0]
            texts["answer"], _ = self._dialogue(row)
        return texts

    def _dialogue(self, row: Row) -> tuple[Tensor, Tensor]:
        """The answer behind its start token, and the token that follows each."""
        assert self._tokenizer is not None and self._model.text is not None
        if not row.answer:
            return torch.tensor([START]), torch.tensor([VOID])
        whole = self._tokenizer.encode([row.answer], self._model.text.max_tokens + 1, ends=True)[0]
        return whole[:-1], whole[1:]

    def targets(self, row: Row, where: str, view: View) -> dict[str, Tensor]:
        """``Targets.heads`` of one row."""
        heads: dict[str, Tensor] = {}
        for head in self._model.heads:
            if head.kind in CLASSIFYING:
                heads[head.name] = label_target(row, head)
            elif head.kind == "segmentation":
                heads[head.name] = torch.from_numpy(change_mask(self.mask(row, where, head), view))
            elif head.kind == "dialogue":
                heads[head.name] = self._dialogue(row)[1]
        return heads

    def mask(self, row: Row, where: str, head: HeadConfig) -> NDArray[np.int64]:
        """Class indices int64 ``[H, W]`` at the size of the video, ``VOID`` where unknown."""
        video = self._model.video
        assert video is not None
        if row.mask is None:
            return np.full((video.height, video.width), VOID, np.int64)
        return read_mask(row, where, (video.width, video.height), len(head.labels))


def label_target(row: Row, head: HeadConfig) -> Tensor:
    """float32 ``[labels]``: one-hot, or each label 0 or 1; NaN where nothing is known."""
    if row.split == "unlabelled" or head.name not in row.labels:
        return torch.full((len(head.labels),), float("nan"))
    shown = row.labels[head.name]
    return torch.tensor([float(label in shown) for label in head.labels])
