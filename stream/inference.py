"""Runs a pack's graphs over batches of windows. Knows the modes; nothing of time, queues or events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from engines.manifest import Branch, Head, HeadKind, Mode
from engines.open import LoadedPack
from engines.types import Array, Engine
from stream.features import MOST_ENCODED, FrameEncoder
from stream.memory import SourceMemory
from stream.samples import nearest, samples_of
from stream.stepping import Stepper
from stream.types import ClipWindow, Prediction


class InferenceSession:
    """One branch of a loaded pack, in whatever mode. Owned by one engine thread.

    ``memory`` holds what windows share, and is shared by the sessions of all threads.
    """

    def __init__(self, pack: LoadedPack, branch: Branch, memory: SourceMemory) -> None:
        self._branch = branch
        self._graph: Engine = pack.engines[branch.graph]
        self._pictures = memory.pictures
        inputs = self._graph.spec.inputs
        self._inputs = {tensor.name: tensor for tensor in inputs}
        self._encoder: FrameEncoder | None = None
        self._stepper: Stepper | None = None
        if branch.video is not None and branch.encoder is not None:
            width = int(self._inputs["features"].shape[-1])
            encoder = pack.engines[branch.encoder]
            self._encoder = FrameEncoder(encoder, branch.video, width, memory.features, memory.pictures)
        if branch.video is not None and branch.mode is Mode.STATEFUL:
            states = memory.states(branch, inputs)
            self._stepper = Stepper(self._graph, branch, branch.video, states, memory.pictures)

    def run(self, windows: tuple[ClipWindow, ...]) -> list[list[Prediction]]:
        """Predictions of every head for each window, in order. Raises ``InferenceError``.

        Windows of one source are given in order, in one call and from call to call.
        """
        sound = self._sound(windows)
        if self._stepper is not None:
            outputs = self._stepper.infer(windows, sound)
        else:
            inputs = {**self._video(windows), **sound}
            outputs = self._graph.infer({name: value for name, value in inputs.items() if name in self._inputs})
        per_head = [read_head(head, outputs, windows) for head in self._branch.heads]
        return [list(predictions) for predictions in zip(*per_head, strict=True)]

    def _sound(self, windows: tuple[ClipWindow, ...]) -> dict[str, Array]:
        if self._branch.audio is None:
            return {}
        return {
            "audio": np.stack([window.audio for window in windows if window.audio is not None]),
            "audio_mask": np.array([window.audio_coverage for window in windows], np.float32),
        }

    def _video(self, windows: tuple[ClipWindow, ...]) -> dict[str, Array]:
        video = self._branch.video
        if video is None:
            return {}
        inputs: dict[str, Array] = {
            "frame_mask": np.stack([window.frame_pts_ns[:, -1] >= 0 for window in windows]).astype(np.float32)
        }
        if self._encoder is not None:
            inputs["features"] = self._encoder.features(windows)
        else:
            samples = [sample for window in windows for sample in nearest(samples_of(window))]
            frames = self._pictures.stack(samples, video)
            inputs["frames"] = frames.reshape(len(windows), -1, *frames.shape[1:])
        return inputs


class PackRunner:
    """All branches of one loaded pack. Owned by one engine thread."""

    def __init__(self, pack: LoadedPack, memory: SourceMemory) -> None:
        self.pack = pack
        self._branches = {branch.name: InferenceSession(pack, branch, memory) for branch in pack.manifest.branches}

    def run(self, branch: str, windows: tuple[ClipWindow, ...]) -> list[list[Prediction]]:
        """Predictions per window. Raises ``InferenceError``."""
        return self._branches[branch].run(windows)

    def warmup(self, max_batch: int) -> None:
        """Meet every lazy set-up of the backends before the first real window."""
        encoders = {branch.encoder for branch in self.pack.manifest.branches}
        for name, engine in self.pack.engines.items():
            engine.warmup(sorted({1, MOST_ENCODED if name in encoders else max_batch}))

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
