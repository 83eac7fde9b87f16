"""The training configuration: one YAML file, checked before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from models import config
from models.config import Positive, Rate, Share, Strict


class Schedule(Strict):
    """One optimisation: AdamW under a cosine after a short linear rise."""

    steps: Positive
    """Updates."""
    batch: Positive
    """Items of an update."""
    learning_rate: Rate
    """At its highest."""
    weight_decay: Share
    """Decoupled (Loshchilov and Hutter, ICLR 2019)."""


class ActionFit(Strict):
    """The linear action head: full-batch logistic regression with an L2 penalty, so nothing is random."""

    penalty: Annotated[float, Field(gt=0)]
    """Of the squared weights on standardised inputs."""
    frame_scale: Annotated[float, Field(gt=0, le=1)]
    """Scale of the frames' own features against their differences': the smaller, the heavier their penalty."""
    audio_scale: Annotated[float, Field(gt=0, le=1)]
    """The same for sound."""
    iterations: Positive = 60
    """Of L-BFGS, at the most."""


class TestGroups(Strict):
    """Groups that no shipped weight, threshold or temperature has seen."""

    __test__ = False
    fights: tuple[str, ...]
    """``source_id``"""
    gmdcsa24: tuple[str, ...]
    """Subjects."""
    ut_interaction: tuple[str, ...]
    """Sequences."""
    weizmann: tuple[str, ...]
    """Subjects."""
    esc10: tuple[str, ...]
    """Folds."""


class TrainConfig(Strict):
    """Everything a run depends on, but for the data."""

    recipe: Literal["base"] = "base"
    """Tells this configuration from those of ``models.train``."""
    data: Path
    """Folder of the training data."""
    cache: Path = Path(".sightwire/cache")
    """Features of the frozen trunk and the state of unfinished runs; may be deleted at any time."""
    out: Path = Path("models/weights/base")
    """Where the weights go."""
    seed: int = 0
    """Of everything random."""
    threads: Positive = 1
    """Of PyTorch; another number gives slightly other weights."""
    folds: Annotated[int, Field(ge=2, le=10)] = 3
    """Cross-validation over the training groups, for temperatures and thresholds."""
    sound: Schedule
    """The audio encoder and the class head."""
    action: ActionFit
    """The action head."""
    decoder: Schedule
    """The segmentation decoder."""
    video_dropout: Share = 0.2
    """Share of training windows without a picture."""
    audio_dropout: Share = 0.3
    """Share of training windows without sound."""
    limit: Positive | None = None
    """Recordings per data set, for a quick trial; all without."""
    test: TestGroups
    """Held out."""


def read_config(path: Path) -> TrainConfig:
    """Read a configuration. Raises ``ConfigError`` naming the file and the key."""
    return config.read_config(path, TrainConfig)
