"""A short clip, and running a pack's graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from engines import backends
from engines.backends import EngineOptions
from engines.manifest import check_integrity, read_manifest
from engines.types import Array, Tensors

FPS, SECONDS, RATE = 10, 3, 16_000
Run = Callable[[Path, Tensors], dict[str, Array]]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds at 10 fps: a bright bar that moves over noise, and a rising tone."""
    path = tmp_path_factory.mktemp("clips") / "bar.mkv"
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as out:
        video = out.add_stream("ffv1", rate=FPS)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv444p"
        audio = out.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for n in range(FPS * SECONDS):
            picture = random.integers(0, 120, (48, 64, 3), np.uint8)
            picture[:, 2 * n : 2 * n + 6] = 250
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            time = (np.arange(RATE // FPS) + n * RATE // FPS) / RATE
            samples = (12_000 * np.sin(2 * np.pi * (200 + 300 * time) * time)).astype(np.int16)[None]
            sound = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            sound.sample_rate, sound.pts = RATE, n * RATE // FPS
            out.mux(audio.encode(sound))
        out.mux(video.encode())
        out.mux(audio.encode())
    return path


@pytest.fixture(scope="session")
def run() -> Run:
    """Run a pack's first graph that takes these inputs, on ONNX Runtime."""

    def on_onnxruntime(pack: Path, inputs: Tensors) -> dict[str, Array]:
        manifest = read_manifest(pack)
        check_integrity(pack, manifest)
        graph = next(g for g in manifest.graphs if {tensor.name for tensor in g.inputs} == inputs.keys())
        engine = backends.load(pack / graph.file, manifest.name, graph, "onnxruntime", EngineOptions(threads=1))
        try:
            return engine.infer(inputs)
        finally:
            engine.close()

    return on_onnxruntime


@pytest.fixture
def pictures() -> Callable[..., Array]:
    """Random uint8 frames of a shape, each row of the batch darker than the one before."""
    random = np.random.default_rng(7)

    def make(*shape: int) -> Array:
        light = np.linspace(1, 0.3, shape[0]).reshape(-1, *(1 for _ in shape[1:]))
        return (random.integers(0, 256, shape) * light).astype(np.uint8)

    return make
