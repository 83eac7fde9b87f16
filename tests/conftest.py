"""Fixtures that every part of the tests may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from engines.tinypack import write_tiny_pack
from engines.tinystateful import write_tiny_stateful_pack

# The same examples on every run: a test either fails always or never.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def tiny_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real pack of a few kilobytes whose answers follow from brightness, motion and loudness; read-only."""
    folder = tmp_path_factory.mktemp("packs") / "tiny"
    write_tiny_pack(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_stateful_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same that remembers; read-only."""
    folder = tmp_path_factory.mktemp("packs") / "tiny-stateful"
    write_tiny_stateful_pack(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test reads or writes the user's home folder or settings; in all the books are checked at every step."""
    for name in [name for name in os.environ if name.startswith("SIGHTWIRE_") and name != "SIGHTWIRE_REQUIRE_E2E"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SIGHTWIRE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SIGHTWIRE_CHECK_BOOKS", "1")
    yield
