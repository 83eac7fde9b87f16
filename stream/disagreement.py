"""How far two engines are apart on the same windows, head by head. Sans-I/O: predictions in, figures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engines.manifest import Head, Manifest
from stream.events import HeadRules, has_evidence
from stream.types import ClipWindow, Prediction


@dataclass(frozen=True, slots=True)
class HeadDisagreement:
    """Two engines on one head; shares and means are over the windows compared."""

    windows: int
    """Windows compared: those in which there was something to see or hear."""
    other_top: float | None = None
    """Share of windows with another top label; ``None`` unless one label excludes the others (softmax)."""
    other_side: float | None = None
    """Share of windows in which any label is on another side of its ``on`` threshold; ``None`` without scores."""
    score_difference: float | None = None
    """Mean absolute difference of the scores; ``None`` without scores."""
    mask_agreement: float | None = None
    """Share of the masks' pixels that have the same class; ``None`` without masks."""
    cosine: float | None = None
    """Mean cosine of the embeddings; ``None`` without embeddings."""

    @property
    def share(self) -> float:
        """0 where both say the same, 1 where they never do: of windows, of pixels, or what the cosine lacks to 1."""
        parts = [self.other_top or 0.0, self.other_side or 0.0]
        parts += [1 - like for like in (self.mask_agreement, self.cosine) if like is not None]
        return min(1.0, max(0.0, *parts))


class _HeadSums:
    """What is added up for one head."""

    def __init__(self, old: Head, new: Head) -> None:
        self._old, self._new = HeadRules(old), HeadRules(new)
        self._exclusive = old.activation == "softmax"
        self._windows = self._top = self._side = 0
        self._difference = self._pixels = self._cosine = 0.0
        self._kinds: set[str] = set()

    def add(self, old: Prediction, new: Prediction) -> None:
        """Raises ``ValueError`` when the two cannot be compared: scores, masks or embeddings of other shapes."""
        self._windows += 1
        if old.scores is not None and new.scores is not None:
            if old.scores.shape != new.scores.shape:
                raise ValueError(f"head {old.head} has {new.scores.size} scores, not {old.scores.size}")
            self._kinds.add("scores")
            self._difference += float(np.abs(old.scores - new.scores).mean())
            self._top += int(old.scores.argmax() != new.scores.argmax())
            sides = (old.scores >= self._old.on) != (new.scores >= self._new.on)
            self._side += bool((sides & self._old.reported).any())
        if old.mask is not None and new.mask is not None:
            self._kinds.add("mask")
            self._pixels += _agreement(old.mask, new.mask)
        if old.embedding is not None and new.embedding is not None:
            self._kinds.add("embedding")
            lengths = float(np.linalg.norm(old.embedding) * np.linalg.norm(new.embedding))
            self._cosine += float(old.embedding @ new.embedding) / max(lengths, 1e-12)

    def result(self) -> HeadDisagreement:
        def mean(kind: str, total: float) -> float | None:
            return total / self._windows if kind in self._kinds else None

        return HeadDisagreement(
            windows=self._windows,
            other_top=mean("scores", self._top) if self._exclusive else None,
            other_side=mean("scores", self._side),
            score_difference=mean("scores", self._difference),
            mask_agreement=mean("mask", self._pixels),
            cosine=mean("embedding", self._cosine),
        )


def _agreement(old: np.ndarray, new: np.ndarray) -> float:
    """Share of equal pixels; a mask of another size is brought to the first one's by its nearest pixels."""
    if old.shape != new.shape:
        rows, columns = (np.arange(n) * m // n for n, m in zip(old.shape, new.shape, strict=True))
        new = new[np.ix_(rows, columns)]
    return float((old == new).mean())


class Disagreement:
    """Adds up how far one pack's predictions are from those of another with the same heads."""

    def __init__(self, old: Manifest, new: Manifest) -> None:
        new_heads = {head.name: head for branch in new.branches for head in branch.heads}
        self._heads = {
            head.name: _HeadSums(head, new_heads[head.name]) for branch in old.branches for head in branch.heads
        }

    def add(
        self,
        windows: Sequence[ClipWindow],
        old: Sequence[Sequence[Prediction]],
        new: Sequence[Sequence[Prediction]],
    ) -> None:
        """Compare the predictions of a batch. Windows without anything to see or hear are left out.

        Raises ``ValueError`` when the two cannot be compared.
        """
        for window, before, after in zip(windows, old, new, strict=True):
            found = {prediction.head: prediction for prediction in after}
            for prediction in before:
                if has_evidence(window, prediction):
                    self._heads[prediction.head].add(prediction, found[prediction.head])

    def heads(self) -> Mapping[str, HeadDisagreement]:
        """The figures by head, of those that have been compared at all."""
        results = {name: sums.result() for name, sums in self._heads.items()}
        return {name: result for name, result in results.items() if result.windows}
