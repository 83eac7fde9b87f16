"""Engines are timed alone, or beside others that are kept busy."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from engines.errors import InferenceError
from engines.fake import FakeEngine
from engines.manifest import Manifest, read_manifest
from engines.measure import random_batch, time_batch
from engines.tinypack import REFERENCES
from engines.types import Array, Tensors


@pytest.fixture
def manifest(tiny: Path) -> Manifest:
    return read_manifest(tiny)


def test_engines_beside_run_until_the_timing_ends(manifest: Manifest) -> None:
    graph, beside = manifest.graph("watch_encoder"), threading.Event()

    def neighbour(inputs: Tensors) -> dict[str, Array]:
        beside.set()
        return REFERENCES["watch_encoder"](inputs)

    def timed(inputs: Tensors) -> dict[str, Array]:
        assert beside.wait(30), "nothing ran beside"
        return REFERENCES["watch_encoder"](inputs)

    batch, before = random_batch(graph, 2), threading.active_count()
    engine, other = FakeEngine("tiny", graph, timed), FakeEngine("tiny", graph, neighbour)
    found = time_batch(engine, batch, repeats=3, beside=[other])
    assert (found.batch, found.p50_ms > 0) == (2, True)
    assert threading.active_count() == before


def test_what_fails_beside_is_raised(manifest: Manifest) -> None:
    graph, failed = manifest.graph("watch_encoder"), threading.Event()

    def broken(inputs: Tensors) -> dict[str, Array]:
        failed.set()
        raise InferenceError("out of order")

    def timed(inputs: Tensors) -> dict[str, Array]:
        assert failed.wait(30)
        return REFERENCES["watch_encoder"](inputs)

    engines = FakeEngine("tiny", graph, timed), FakeEngine("tiny", graph, broken)
    with pytest.raises(InferenceError, match="out of order"):
        time_batch(engines[0], random_batch(graph, 1), repeats=3, beside=engines[1:])
