"""Data and small pieces that the tests of the networks share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.basepack.batches import LabelledMel
from models.basepack.cache import Encoded, Track
from models.basepack.network import BaseModel, load_weights
from models.basepack.tables import Recording, Span

ROOT = Path(__file__).parents[3]
WEIGHTS = ROOT / "models" / "weights" / "base"


@pytest.fixture(scope="session")
def shipped() -> BaseModel:
    """The model with the shipped weights."""
    return load_weights(WEIGHTS)[0]


@pytest.fixture
def encoded() -> list[Encoded]:
    """Two recordings whose features tell a fight from none, one with sound."""
    random = np.random.default_rng(0)
    made = []
    for n, (label, level) in enumerate((("fight", 1.0), ("normal", -1.0))):
        features = (random.standard_normal((12, 2560)) * 0.3 + level).astype(np.float16)
        track = Track(features, np.ones(12, bool), 0.0)
        mel = random.random((64, 150)).astype(np.float32) if n else None
        recording = Recording(Path(f"{label}.mp4"), "fights", str(n), (Span(label, 0.0, float("inf")),))
        made.append(Encoded(recording, (track,), mel, 3.0))
    return made


@pytest.fixture
def sounds() -> list[LabelledMel]:
    """Two sounds in different bands."""
    made = []
    for label in (0, 3):
        power = np.full((64, 250), 1e-6, np.float32)
        power[label * 15 : label * 15 + 10] = 1.0
        made.append(LabelledMel(power, label, "1", f"{label}.flac"))
    return made
