"""The exported graphs are the networks, whole and in stages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engines import backends
from engines.backends import EngineOptions
from engines.errors import InferenceError
from engines.manifest import MANIFEST_FILE, HeadKind, Mode, check_integrity, read_manifest
from engines.measure import random_batch
from engines.types import Array, Engine
from export.build import ExportError, GraphToExport, export_graph, reference
from export.onnx import base_graphs, export_base
from models.basepack import shape
from models.basepack.labels import ACTIONS, SCENE, SOUNDS
from models.basepack.network import BaseModel, load_weights
from models.basepack.window import OUTPUTS
from models.errors import WeightsError
from models.media import read_clip, sample_pairs

WEIGHTS = Path(__file__).parents[2] / "models" / "weights" / "base"


@pytest.fixture(scope="module")
def model() -> BaseModel:
    return load_weights(WEIGHTS)[0]


@pytest.fixture(scope="module")
def engines(base_pack: Path) -> dict[str, Engine]:
    manifest = read_manifest(base_pack)
    options = EngineOptions(threads=1)
    return {
        graph.name: backends.load(base_pack / graph.file, "base", graph, "onnxruntime", options)
        for graph in manifest.graphs
    }


def test_manifest(base_pack: Path) -> None:
    manifest = read_manifest(base_pack)
    check_integrity(base_pack, manifest)
    watch, scene = manifest.branches
    assert (watch.mode, watch.encoder, watch.graph) == (Mode.STAGED, "encoder", "window")
    assert watch.video is not None
    assert watch.video.samples_in(watch.window_ns) == shape.WATCH_SAMPLES
    assert watch.audio is not None
    assert watch.audio.samples_in(watch.window_ns) == shape.AUDIO_SAMPLES
    heads = {head.kind: head for branch in manifest.branches for head in branch.heads}
    assert heads[HeadKind.ACTION].labels == ACTIONS
    assert heads[HeadKind.CLASS].labels == SOUNDS
    assert heads[HeadKind.SEGMENTATION].labels == SCENE
    for kind in (HeadKind.ACTION, HeadKind.CLASS):
        assert set(heads[kind].thresholds) == set(heads[kind].labels) - set(heads[kind].background)
    assert scene.mode is Mode.CLIP
    assert all(tensor.shape[0] == "batch" for graph in manifest.graphs for tensor in (*graph.inputs, *graph.outputs))


def test_nothing_in_the_graphs_says_where_they_were_made(base_pack: Path) -> None:
    here = str(Path(__file__).parents[2]).encode()
    for path in base_pack.iterdir():
        content = path.read_bytes()
        assert here not in content, path.name
        assert b"site-packages" not in content, path.name


def test_export_is_deterministic(base_pack: Path, tmp_path: Path) -> None:
    again = export_base(WEIGHTS, tmp_path / "again", clips=None)
    assert again.sha256() == read_manifest(base_pack).sha256()


@pytest.mark.parametrize("graph", ["encoder", "window", "segmentation"])
@pytest.mark.parametrize("batch", [1, 5])
def test_graphs_equal_pytorch(
    base_pack: Path, model: BaseModel, engines: dict[str, Engine], graph: str, batch: int
) -> None:
    wanted = next(item for item in base_graphs(model) if item.name == graph)
    inputs = random_batch(read_manifest(base_pack).graph(graph), batch, seed=batch)
    want, got = reference(wanted)(inputs), engines[graph].infer(inputs)
    assert want.keys() == got.keys()
    for name, value in want.items():
        assert got[name].shape == value.shape
        if value.dtype == np.uint8:
            assert (got[name] == value).mean() > 0.999
        else:
            assert np.abs(got[name] - value).max() < 5e-5


def test_stages_equal_the_whole_model_on_raw_windows(model: BaseModel, engines: dict[str, Engine], film: Path) -> None:
    frames, audio = real_windows(film)
    mask = np.ones((len(frames), shape.WATCH_SAMPLES), np.float32)
    mask[-1, :3] = 0
    heard = np.array([1.0] * (len(frames) - 1) + [0.0], np.float32)
    with torch.inference_mode():
        whole = model(*(torch.from_numpy(value) for value in (frames, mask, audio, heard)))
    features = np.stack([engines["encoder"].infer({"frames": window})["features"] for window in frames])
    staged = engines["window"].infer({"features": features, "frame_mask": mask, "audio": audio, "audio_mask": heard})
    for name, want in zip(OUTPUTS, whole, strict=True):
        assert np.abs(staged[name] - want.numpy()).max() <= 1e-4, name


def real_windows(path: Path) -> tuple[Array, Array]:
    """Windows of a real clip: uint8 ``[B, 8, 2, 160, 160, 3]``, float32 ``[B, 32000]``."""
    clip = read_clip(path, shape.WATCH_SIZE, shape.WATCH_SIZE)
    _, pairs = sample_pairs(clip, fps=shape.WATCH_FPS, lookback_ns=shape.LOOKBACK_NS)
    starts = range(0, len(pairs) - shape.WATCH_SAMPLES + 1, 4)
    frames = np.stack([clip.images[pairs[start : start + shape.WATCH_SAMPLES]] for start in starts])
    assert clip.audio is not None
    audio = np.zeros((len(frames), shape.AUDIO_SAMPLES), np.float32)
    for row, start in zip(audio, starts, strict=True):
        cut = clip.audio[start * 4_000 : start * 4_000 + shape.AUDIO_SAMPLES]
        row[: len(cut)] = cut
    return frames, audio


def test_a_module_that_fixes_its_batch_is_refused(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, frames: torch.Tensor) -> torch.Tensor:
            return frames.float().reshape(2, -1).mean(dim=1, keepdim=True)

    graph = GraphToExport("fixed", Fixed(), {"frames": torch.zeros(2, 4, dtype=torch.uint8)}, ("features",))
    with pytest.raises(ExportError):
        export_graph(graph, tmp_path)


def test_absent_weights_end_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights at"):
        export_base(tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST_FILE).exists()


class _Greedy(nn.Module):
    def forward(self, frames: Tensor) -> Tensor:
        return torch.empty(2**62, dtype=torch.uint8)


def test_a_reference_without_memory_is_one_line() -> None:
    graph = GraphToExport("greedy", _Greedy(), {"frames": torch.zeros(1, 1)}, ("out",))
    with pytest.raises(
        InferenceError, match=r"graph greedy: PyTorch, which .*; free memory, or correct the model"
    ) as told:
        reference(graph)({"frames": np.zeros((1, 1), np.float32)})
    assert "\n" not in str(told.value)
