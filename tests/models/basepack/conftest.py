"""Data and small pieces that the tests of the networks share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.basepack.cache import Encoded, Track
from models.basepack.network import BaseModel, load_weights
from models.basepack.tables import Recording, Span
from models.basepack.watch import FEATURES

ROOT = Path(__file__).parents[3]
WEIGHTS = ROOT / "models" / "weights" / "base"


@pytest.fixture(scope="session")
def shipped() -> BaseModel:
    """The model with the shipped weights."""
    return load_weights(WEIGHTS)[0]


@pytest.fixture
def encoded() -> list[Encoded]:
    """Four recordings whose features tell a fight from none, one with sound."""
    random = np.random.default_rng(0)
    made = []
    for n, (label, level) in enumerate((("fight", 2.0), ("normal", 0.5), ("fight", 2.0), ("normal", 0.5))):
        features = np.abs(random.standard_normal((24, FEATURES)) * 0.3 + level).astype(np.float16)
        track = Track(features, np.ones(24, bool), 0.0)
        mel = random.random((64, 150)).astype(np.float32) if n == 1 else None
        recording = Recording(Path(f"{label}{n}.mp4"), "fights", str(n), (Span(label, 0.0, float("inf")),))
        made.append(Encoded(recording, (track,), mel, 3.0))
    return made
