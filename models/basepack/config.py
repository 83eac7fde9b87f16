"""The training configuration: one YAML file, checked before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from models import config
from models.config import Fraction01, NonNegative, Positive, Rate, Share, Strict


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
    """The action head: full-batch logistic regressions with an L2 penalty, so nothing is random."""

    penalty: Annotated[float, Field(gt=0)]
    """Of the squared weights on standardised inputs."""
    frame_weight: Fraction01
    """Say of the expert that sees how things look, against 1 of the one that sees what changes."""
    band_weight: Fraction01
    """Say of the one that sees at which height it changes."""
    joint_weight: NonNegative
    """Say of the one that sees around which joints it changes."""
    audio_weight: Fraction01
    """Say of the one that hears."""
    iterations: Positive = 60
    """Of L-BFGS, at the most."""


class SoundConfig(Strict):
    """The sound network."""

    mixtures: Positive = 6000
    """Of each fold of ESC-10."""
    steps: Positive = 500
    """Updates."""
    distill: NonNegative = 1.0
    """Weight of agreeing with the teacher; 0 needs none."""


class JointConfig(Strict):
    """The finder of joints."""

    steps: Positive = 300
    """Updates."""
    batch: Positive = 96
    """Frames of an update."""
    learning_rate: Rate = 3e-3
    """At its highest."""


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
    sound: SoundConfig = SoundConfig()
    """The sound network and the class head."""
    joints: JointConfig = JointConfig()
    """The finder of joints."""
    action: ActionFit
    """The action head."""
    decoder: Schedule
    """The segmentation decoder."""
    limit: Positive | None = None
    """Recordings per data set, for a quick trial; all without."""


def read_config(path: Path) -> TrainConfig:
    """Read a configuration. Raises ``ConfigError`` naming the file and the key."""
    return config.read_config(path, TrainConfig)
