from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.manifest import Manifest, file_sha256, read_manifest, write_manifest
from engines.tinypack import write_tiny_pack


@pytest.fixture(scope="session")
def tiny_master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pack, written once; do not change it."""
    folder = tmp_path_factory.mktemp("packs") / "tiny"
    write_tiny_pack(folder)
    return folder


@pytest.fixture
def tiny(tiny_master: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pack that a test may damage."""
    return Path(shutil.copytree(tiny_master, tmp_path / "tiny"))


@pytest.fixture
def rehash(tiny: Path) -> Callable[[str], Manifest]:
    """Makes the manifest agree with a graph file that a test has changed."""

    def update(name: str) -> Manifest:
        manifest = read_manifest(tiny)
        graphs = tuple(
            graph.model_copy(update={"sha256": file_sha256(tiny / graph.file)}) if graph.name == name else graph
            for graph in manifest.graphs
        )
        changed = manifest.model_copy(update={"graphs": graphs})
        write_manifest(tiny, changed)
        return changed

    return update
