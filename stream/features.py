"""The staged mode: each sampled frame is encoded once, however many windows share it.

Its features are kept per source until no later window can ask for them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engines.manifest import VideoInput
from engines.types import Engine
from stream.samples import FrameKey, Pictures, Sample, sample_keys, samples_of
from stream.types import ClipWindow

Features = NDArray[np.float32]

MOST_ENCODED = 16
"""Frames encoded at once."""


@dataclass(slots=True, eq=False)
class _SourceFeatures:
    epoch: int
    rows: dict[FrameKey, Features] = field(default_factory=dict)


class FeatureStore:
    """Features of the frames that later windows share, per source and branch; shared by all engine threads.

    The batcher never has one source's branch in two batches at once, so no two threads touch one entry.
    """

    def __init__(self) -> None:
        self._sources: dict[tuple[str, str, str], _SourceFeatures] = {}
        self.encoded = 0
        """Frames encoded."""
        self.reused = 0
        """Frames whose features were there already."""

    @property
    def sources(self) -> int:
        """Sources (times packs and branches) that something is kept for."""
        return len(self._sources)

    def rows(self, window: ClipWindow) -> dict[FrameKey, Features]:
        """Features kept for a window's source and branch; those of an earlier epoch are let go."""
        key = (window.key.source_id, window.key.pack, window.key.branch)
        kept = self._sources.get(key)
        if kept is None or kept.epoch != window.key.epoch:
            kept = self._sources[key] = _SourceFeatures(window.key.epoch)
        return kept.rows

    def forget(self, source_id: str) -> None:
        """Let go of a source."""
        for key in [key for key in self._sources if key[0] == source_id]:
            del self._sources[key]


class FrameEncoder:
    """Gives windows' features, and runs the encoder for those that are not there yet. Owned by one engine thread."""

    def __init__(self, encoder: Engine, video: VideoInput, width: int, store: FeatureStore, pictures: Pictures) -> None:
        self._encoder = encoder
        self._video = video
        self._width = width
        self._store = store
        self._pictures = pictures

    def features(self, windows: tuple[ClipWindow, ...]) -> Features:
        """float32 ``[B, T, D]``; zeros for missing samples. Raises ``InferenceError``."""
        keys = [sample_keys(window) for window in windows]
        self._encode_new(windows, keys)
        out = np.zeros((len(windows), len(keys[0]), self._width), np.float32)
        for b, (window, row) in enumerate(zip(windows, keys, strict=True)):
            rows = self._store.rows(window)
            for t, key in enumerate(row):
                if key is not None:
                    out[b, t] = rows[key]
        self._evict(windows, keys)
        return out

    def _encode_new(self, windows: tuple[ClipWindow, ...], keys: list[list[FrameKey | None]]) -> None:
        todo: dict[tuple[int, FrameKey], tuple[dict[FrameKey, Features], Sample]] = {}
        for window, row in zip(windows, keys, strict=True):
            rows = self._store.rows(window)
            for key, sample in zip(row, samples_of(window), strict=True):
                if key is None or sample is None:
                    continue
                if key in rows or (id(rows), key) in todo:
                    self._store.reused += 1
                else:
                    todo[id(rows), key] = (rows, sample)
        jobs = [(key, rows, sample) for (_, key), (rows, sample) in todo.items()]
        for first in range(0, len(jobs), MOST_ENCODED):
            part = jobs[first : first + MOST_ENCODED]
            encoded = self._encode([sample for _, _, sample in part])
            for (key, rows, _), features in zip(part, encoded, strict=True):
                rows[key] = features

    def _encode(self, samples: list[Sample]) -> Features:
        frames = self._pictures.stack(samples, self._video)
        self._store.encoded += len(samples)
        features: Features = self._encoder.infer({"frames": frames})["features"]
        return features

    def _evict(self, windows: tuple[ClipWindow, ...], keys: list[list[FrameKey | None]]) -> None:
        """Keep only what the newest window of each source used: later windows start later."""
        newest = {window.key.source_id: (window, row) for window, row in zip(windows, keys, strict=True)}
        for window, row in newest.values():
            rows = self._store.rows(window)
            for key in rows.keys() - {key for key in row if key is not None}:
                del rows[key]
