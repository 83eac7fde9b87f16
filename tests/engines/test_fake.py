"""The fake engine: a stated rule, the real checks, and failures on order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.errors import InferenceError
from engines.fake import FakeEngine, fake_pack
from engines.manifest import read_manifest
from engines.measure import random_batch
from engines.open import open_pack
from engines.tinypack import REFERENCES, SIZE


def test_the_default_rule_is_the_mean_of_the_inputs(tiny: Path) -> None:
    graph = read_manifest(tiny).graph("watch_encoder")
    frames = np.stack([np.full((2, SIZE, SIZE, 3), level, np.uint8) for level in (0, 51, 255)])
    out = FakeEngine("tiny", graph).infer({"frames": frames})["features"]
    np.testing.assert_allclose(out, [[0, 0], [0.2, 0.2], [1, 1]], atol=1e-6)
    assert out.dtype == np.float32


def test_masks_are_split_at_a_half(tiny: Path) -> None:
    graph = read_manifest(tiny).graph("scene_window")
    inputs = {"frames": np.full((1, 1, SIZE, SIZE, 3), 255, np.uint8), "frame_mask": np.ones((1, 1), np.float32)}
    assert (FakeEngine("tiny", graph).infer(inputs)["scene_mask"] == 1).all()


def test_a_fake_pack_with_the_same_rules_equals_the_real_one(tiny: Path) -> None:
    real = open_pack(tiny, backend="onnxruntime")
    fake = fake_pack(real.manifest, REFERENCES)
    for graph in real.manifest.graphs:
        inputs = random_batch(graph, 3)
        want, got = real.engines[graph.name].infer(inputs), fake.engines[graph.name].infer(inputs)
        for name in want:
            np.testing.assert_allclose(got[name], want[name], atol=1e-4)


def test_it_fails_and_waits_when_told_to(tiny: Path) -> None:
    manifest, slept = read_manifest(tiny), list[float]()
    pack = fake_pack(manifest, latency_s=0.25, sleep=slept.append, fail_on={"watch_encoder": [1]})
    engine, inputs = pack.engines["watch_encoder"], random_batch(manifest.graph("watch_encoder"), 1)
    engine.warmup([1, 4])
    assert slept == []
    engine.infer(inputs)
    with pytest.raises(InferenceError, match="graph watch_encoder failed on batch 1"):
        engine.infer(inputs)
    engine.infer(inputs)
    assert slept == [0.25] * 3
    pack.close()
    with pytest.raises(InferenceError, match="closed"):
        engine.infer(inputs)


def test_it_checks_inputs_and_outputs_like_a_real_one(tiny: Path) -> None:
    graph = read_manifest(tiny).graph("watch_encoder")
    engine = FakeEngine("tiny", graph, lambda _: {"features": np.array([[np.nan, 0]], np.float32)})
    with pytest.raises(InferenceError, match="input frames"):
        engine.infer({"frames": np.zeros((1, SIZE, SIZE, 3), np.uint8)})
    with pytest.raises(InferenceError, match="output features holds NaN"):
        engine.infer(random_batch(graph, 1))
