"""Runs a pack's graphs over batches of windows. Knows the modes; nothing of time, queues or events.

In staged mode each sampled frame is encoded once, however many windows share it: its features are kept
per source until no later window can ask for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engines.manifest import Branch, Head, HeadKind, Mode
from engines.open import LoadedPack
from engines.types import Array, Engine
from stream.types import ClipWindow, Frame, Prediction

Features = NDArray[np.float32]
FrameKey = tuple[int, ...]
"""pts of a sample's frame, with look-back of both its frames."""


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


def sample_keys(window: ClipWindow) -> list[FrameKey | None]:
    """Per sample the pts of its frames, ``None`` where the frame is missing."""
    return [None if row[-1] < 0 else tuple(row) for row in window.frame_pts_ns.tolist()]


def sample_frames(window: ClipWindow, sample: int) -> tuple[Frame | None, ...]:
    """The frames of one sample (two with look-back, the earlier first)."""
    lookbacks = window.frame_pts_ns.shape[1]
    return window.frames[sample * lookbacks : (sample + 1) * lookbacks]


class BranchRunner:
    """One branch of a loaded pack. Owned by one engine thread."""

    def __init__(self, pack: LoadedPack, branch: Branch, store: FeatureStore, max_encode: int = 16) -> None:
        self._branch = branch
        self._store = store
        self._max_encode = max_encode
        self._graph: Engine = pack.engines[branch.graph]
        self._encoder: Engine | None = pack.engines[branch.encoder] if branch.encoder else None
        self._inputs = {tensor.name for tensor in self._graph.spec.inputs}

    def run(self, windows: tuple[ClipWindow, ...]) -> list[list[Prediction]]:
        """Predictions of every head for each window, in order. Raises ``InferenceError``."""
        inputs = self._window_inputs(windows)
        outputs = self._graph.infer({name: value for name, value in inputs.items() if name in self._inputs})
        per_head = [read_head(head, outputs, windows) for head in self._branch.heads]
        return [list(predictions) for predictions in zip(*per_head, strict=True)]

    def _window_inputs(self, windows: tuple[ClipWindow, ...]) -> dict[str, Array]:
        inputs: dict[str, Array] = {}
        if self._branch.video is not None:
            keys = [sample_keys(window) for window in windows]
            inputs["frame_mask"] = np.array([[key is not None for key in row] for row in keys], np.float32)
            if self._branch.mode is Mode.STAGED:
                inputs["features"] = self._features(windows, keys)
            else:
                inputs["frames"] = np.stack([self._clip(window) for window in windows])
        if self._branch.audio is not None:
            inputs["audio"] = np.stack([window.audio for window in windows if window.audio is not None])
            inputs["audio_mask"] = np.array([window.audio_coverage for window in windows], np.float32)
        return inputs

    def _features(self, windows: tuple[ClipWindow, ...], keys: list[list[FrameKey | None]]) -> Features:
        """float32 ``[B, T, D]``; zeros for missing samples."""
        self._encode_new(windows, keys)
        width = self._feature_width()
        out = np.zeros((len(windows), len(keys[0]), width), np.float32)
        for b, (window, row) in enumerate(zip(windows, keys, strict=True)):
            rows = self._store.rows(window)
            for t, key in enumerate(row):
                if key is not None:
                    out[b, t] = rows[key]
        self._evict(windows, keys)
        return out

    def _feature_width(self) -> int:
        for tensor in self._graph.spec.inputs:
            if tensor.name == "features":
                return int(tensor.shape[-1])
        raise ValueError(f"graph {self._graph.spec.graph} of a staged branch has no input features")

    def _encode_new(self, windows: tuple[ClipWindow, ...], keys: list[list[FrameKey | None]]) -> None:
        todo: dict[tuple[int, FrameKey], tuple[dict[FrameKey, Features], tuple[Frame | None, ...]]] = {}
        for window, row in zip(windows, keys, strict=True):
            rows = self._store.rows(window)
            for t, key in enumerate(row):
                if key is None:
                    continue
                if key in rows or (id(rows), key) in todo:
                    self._store.reused += 1
                else:
                    todo[id(rows), key] = (rows, sample_frames(window, t))
        jobs = [(key, rows, frames) for (_, key), (rows, frames) in todo.items()]
        for first in range(0, len(jobs), self._max_encode):
            part = jobs[first : first + self._max_encode]
            encoded = self._encode([frames for _, _, frames in part])
            for (key, rows, _), features in zip(part, encoded, strict=True):
                rows[key] = features

    def _encode(self, samples: list[tuple[Frame | None, ...]]) -> Features:
        if self._encoder is None:
            raise ValueError(f"branch {self._branch.name} has no encoder")
        images = [[frame.image for frame in sample if frame is not None] for sample in samples]
        frames = np.stack([np.stack(pair) if len(pair) > 1 else pair[0] for pair in images])
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

    def _clip(self, window: ClipWindow) -> NDArray[np.uint8]:
        """uint8 ``[T, H, W, 3]`` or ``[T, 2, H, W, 3]``; a missing sample repeats the nearest one that is there."""
        video = self._branch.video
        if video is None:
            raise ValueError(f"branch {self._branch.name} has no video")
        count, lookbacks = window.frame_pts_ns.shape
        there = [t for t in range(count) if window.frame_pts_ns[t, -1] >= 0]
        clip = np.zeros((count, lookbacks, video.height, video.width, 3), np.uint8)
        for t in range(count):
            if not there:
                break
            nearest = min(there, key=lambda candidate: abs(candidate - t))
            for place, frame in enumerate(sample_frames(window, nearest)):
                if frame is not None:
                    clip[t, place] = frame.image
        return clip if video.lookback_ns is not None else clip[:, 0]


class PackRunner:
    """All branches of one loaded pack. Owned by one engine thread."""

    def __init__(self, pack: LoadedPack, store: FeatureStore) -> None:
        self.pack = pack
        self._branches = {branch.name: BranchRunner(pack, branch, store) for branch in pack.manifest.branches}

    def run(self, branch: str, windows: tuple[ClipWindow, ...]) -> list[list[Prediction]]:
        """Predictions per window. Raises ``InferenceError``."""
        return self._branches[branch].run(windows)

    def warmup(self, max_batch: int) -> None:
        """Meet every lazy set-up of the backends before the first real window."""
        for engine in self.pack.engines.values():
            engine.warmup(sorted({1, max_batch}))

    def close(self) -> None:
        """Free the engines."""
        self.pack.close()


def read_head(head: Head, outputs: Mapping[str, Array], windows: Iterable[ClipWindow]) -> list[Prediction]:
    """One head's predictions from a graph's outputs."""
    raw = outputs[head.output]
    scores = without = None
    if head.kind in (HeadKind.ACTION, HeadKind.CLASS):
        scores = activate(head, raw)
        without = {modality: activate(head, outputs[name]) for modality, name in head.without.items()}
    predictions = []
    for b, window in enumerate(windows):
        predictions.append(
            Prediction(
                key=window.key,
                head=head.name,
                scores=None if scores is None else scores[b],
                contributions={}
                if scores is None or without is None
                else {str(modality): scores[b] - less[b] for modality, less in without.items()},
                mask=raw[b] if head.kind is HeadKind.SEGMENTATION else None,
                embedding=raw[b] if head.kind is HeadKind.EMBEDDING else None,
            )
        )
    return predictions


def activate(head: Head, logits: Array) -> NDArray[np.float32]:
    """Probabilities from logits ``[B, labels]``, at the head's temperature."""
    scaled = logits.astype(np.float32) / np.float32(head.temperature)
    if head.activation == "sigmoid":
        # Clipped so that exp cannot overflow; beyond ±60 the result is 0 or 1 in float32 anyway.
        result = 1 / (1 + np.exp(-np.clip(scaled, -60, 60)))
    else:
        exp = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
        result = exp / exp.sum(axis=-1, keepdims=True)
    return np.asarray(result, np.float32)
