"""What a model said of a manifest's rows beside what is known of them: the material of measures and reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """One row of a manifest."""

    name: str
    """How reports name it: the file, and the span where it is not the whole file."""
    group: str
    """Rows of one group are no independent evidence; intervals draw whole groups."""


@dataclass(frozen=True, slots=True, eq=False)
class LabelScores:
    """A ``class`` or ``action`` head."""

    head: str
    """Its name."""
    labels: tuple[str, ...]
    """In the order of the columns."""
    multi_label: bool
    """Several labels may hold at once."""
    scores: Floats
    """float ``[N, labels]``: probability of each label, the mean over the row's windows."""
    targets: Floats
    """float ``[N, labels]``: 1 or 0, NaN where unknown (for a single-label head the whole row)."""
    thresholds: dict[str, float]
    """Score at which a label counts as said, for a multi-label head; a half for labels not listed."""


@dataclass(frozen=True, slots=True, eq=False)
class MaskExample:
    """One picture to show."""

    row: int
    """Which row it is of."""
    picture: NDArray[np.uint8]
    """uint8 ``[h, w, 3]`` RGB."""
    truth: NDArray[np.integer[Any]]
    """``[h, w]``: class indices; anything that is not a class's index is void."""
    predicted: NDArray[np.integer[Any]]
    """``[h, w]``: class indices."""


@dataclass(frozen=True, slots=True, eq=False)
class MaskScores:
    """A ``segmentation`` head."""

    head: str
    """Its name."""
    labels: tuple[str, ...]
    """By class index."""
    confusions: NDArray[np.int64]
    """int64 ``[N, classes, classes]``: pixels by truth and prediction; zeros for a row without a mask."""
    examples: tuple[MaskExample, ...]
    """Pictures that may be shown."""


@dataclass(frozen=True, slots=True, eq=False)
class RetrievalScores:
    """An ``embedding`` head, asked for clips by their captions."""

    head: str
    """Its name."""
    captions: tuple[str, ...]
    """Of each row; empty where it has none: such a clip is in the gallery, but nobody asks for it."""
    clips: Floats
    """float ``[N, E]``, unit length."""
    texts: Floats
    """float ``[N, E]``, unit length: of the captions; rows without a caption are not looked at."""


@dataclass(frozen=True, slots=True, eq=False)
class AnswerScores:
    """A ``dialogue`` head."""

    head: str
    """Its name."""
    questions: tuple[str, ...]
    """Of each row; empty where it has none."""
    answers: tuple[str, ...]
    """The answers wanted."""
    given: tuple[str, ...]
    """The model's."""


HeadScores = LabelScores | MaskScores | RetrievalScores | AnswerScores


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """A model's answers to a manifest."""

    rows: tuple[ScoredRow, ...]
    """The rows, to which the first axis of every head's arrays belongs."""
    heads: tuple[HeadScores, ...]
    """Heads that the manifest says something about."""
