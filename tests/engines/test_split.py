"""Splitting a batch changes nothing but how much is run at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.backends import EngineOptions
from engines.errors import InferenceError
from engines.fake import FakeEngine
from engines.manifest import Manifest, TensorSpec, read_manifest
from engines.measure import random_batch
from engines.split import PART_BYTES, SplitEngine, best_part, in_parts
from engines.tinypack import REFERENCES
from engines.types import Array, Tensors


@pytest.fixture
def manifest(tiny: Path) -> Manifest:
    return read_manifest(tiny)


@pytest.mark.parametrize(("batch", "parts"), [(1, [1]), (3, [3]), (4, [3, 1]), (7, [3, 3, 1])])
def test_parts_are_put_together_in_order(manifest: Manifest, batch: int, parts: list[int]) -> None:
    graph, seen = manifest.graph("watch_window"), list[int]()

    def rule(inputs: Tensors) -> dict[str, Array]:
        seen.append(len(inputs["audio"]))
        return REFERENCES["watch_window"](inputs)

    inputs = random_batch(graph, batch)
    got = SplitEngine(FakeEngine("tiny", graph, rule), 3).infer(inputs)
    assert seen == parts
    for name, want in REFERENCES["watch_window"](inputs).items():
        np.testing.assert_allclose(got[name], want, atol=1e-5)


def test_tensors_of_different_batch_are_refused_before_cutting(manifest: Manifest) -> None:
    graph = manifest.graph("watch_window")
    inputs = random_batch(graph, 8) | {"audio_mask": np.ones(7, np.float32)}
    with pytest.raises(InferenceError, match=r"audio_mask is float32\[7\], must be float32\[8\]"):
        SplitEngine(FakeEngine("tiny", graph), 2).infer(inputs)


def test_warmup_runs_every_size_a_part_can_have(manifest: Manifest) -> None:
    graph, seen = manifest.graph("watch_encoder"), list[int]()

    def rule(inputs: Tensors) -> dict[str, Array]:
        seen.append(len(inputs["frames"]))
        return REFERENCES["watch_encoder"](inputs)

    engine = SplitEngine(FakeEngine("tiny", graph, rule), 3)
    engine.warmup([1, 16])
    assert seen == [1, 2, 3]
    engine.warmup([2])
    assert seen == [1, 2, 3, 1, 2]


def test_the_best_part_follows_the_size_of_an_item(manifest: Manifest) -> None:
    def part(*shape: int | str) -> int:
        tensor = TensorSpec(name="frames", dtype="uint8", shape=shape)
        return best_part(manifest.graph("watch_encoder").model_copy(update={"inputs": (tensor,)}))

    assert part("batch", 2, 160, 160, 3) == 2
    assert part("batch", 1, 240, 320, 3) == 1
    assert part("batch", 16, 1080, 1920, 3) == 1
    assert part("batch") == PART_BYTES


def test_an_engine_that_splits_already_is_not_split_again(manifest: Manifest) -> None:
    graph = manifest.graph("watch_window")
    split = SplitEngine(FakeEngine("tiny", graph), 1)
    assert in_parts(split, graph, "cpu") is split


def test_missing_tensors_are_refused(manifest: Manifest) -> None:
    engine = SplitEngine(FakeEngine("tiny", manifest.graph("watch_window")), 2)
    with pytest.raises(InferenceError, match="needs inputs"):
        engine.infer({})


@pytest.mark.parametrize("kept", [False, True])
def test_openvino_runs_graphs_of_large_items_one_by_one(
    tiny: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    openvino = pytest.importorskip("engines.openvino_engine")
    monkeypatch.setattr("engines.split.PART_BYTES", 1)
    graph = manifest.graph("watch_window")
    options = EngineOptions(cache_dir=tmp_path / "kept" if kept else None)
    inputs = random_batch(graph, 3)
    for _ in range(2):  # compiled, then from the cache
        engine = openvino.load(tiny / graph.file, "tiny", graph, options)
        assert isinstance(engine, SplitEngine)
        for name, want in REFERENCES["watch_window"](inputs).items():
            np.testing.assert_allclose(engine.infer(inputs)[name], want, atol=1e-4)
        with pytest.raises(InferenceError, match=r"must be float32\[3, 32000"):
            engine.infer({**inputs, "audio": inputs["audio"][:, :-1]})
