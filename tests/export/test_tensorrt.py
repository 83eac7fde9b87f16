"""TensorRT engines are built, for real and without a GPU, of every kind of network that there is to export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engines import backends
from engines.backends import EngineOptions
from engines.manifest import BatchProfile, GraphFile, GraphSpec, file_sha256, read_manifest
from export.build import GraphToExport, export_graph, quiet_exporter, save_graph
from export.quantize import add_variants
from models.backbones.base import Backbone, pool
from models.backbones.c3d import C3D
from models.backbones.i3d import I3D
from models.backbones.r3d import R3D
from models.backbones.stream import STAGES, StreamBackbone

if "tensorrt" not in backends.installed():
    pytest.skip("no form of TensorRT is installed", allow_module_level=True)

from engines.tensorrt_library import RTX

if not RTX and not torch.cuda.is_available():
    pytest.skip("tensorrt itself builds on a GPU only", allow_module_level=True)

SIDE = 32


def built(folder: Path, graph: GraphSpec, precision: str = "fp32") -> int:
    """Bytes of the engine of a graph, for batches of 1 to 4."""
    small = graph.model_copy(update={"batch": BatchProfile(usual=2, largest=4)})
    options = EngineOptions(precision=precision, device="cuda")
    return backends.compile_graph(folder / graph.file, "p", small, "tensorrt", options).size


class Window(nn.Module):
    """A backbone over one window: frames and their mask to one vector."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        return pool(self.backbone(frames, frame_mask))


class Step(nn.Module):
    """One frame through the streaming backbone, its states as inputs and outputs."""

    def __init__(self, backbone: StreamBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, frames: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        features, renewed = self.backbone.step(frames, states)
        return (features, *renewed)


@pytest.mark.parametrize("graph", ["encoder", "window", "segmentation"])
def test_the_base_pack(base_pack: Path, graph: str) -> None:
    assert built(base_pack, read_manifest(base_pack).graph(graph)) > 100_000


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_converted_graphs(conv_pack: object, precision: str) -> None:
    pack = conv_pack
    manifest = add_variants(pack.folder, ["fp16", "int8_symmetric"], [pack.clip])  # type: ignore[attr-defined]
    graph = manifest.graph("small")
    file = graph.artifact("tensorrt", precision)
    assert isinstance(file, GraphFile)
    assert file.sha256 == file_sha256(pack.folder / file.file)  # type: ignore[attr-defined]
    assert built(pack.folder, graph, precision) > 1000  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "frames"),
    [
        (lambda: C3D(SIDE, SIDE, multiplier=0.125), 16),
        (lambda: I3D(multiplier=0.125), 16),
        (lambda: R3D(factored=True, multiplier=0.125), 8),
    ],
    ids=["c3d", "i3d", "r2plus1d"],
)
def test_video_networks(tmp_path: Path, make: Callable[[], Backbone], frames: int) -> None:
    example = {
        "frames": torch.zeros(2, frames, SIDE, SIDE, 3, dtype=torch.uint8),
        "frame_mask": torch.ones(2, frames),
    }
    graph = export_graph(GraphToExport("video", Window(make()).eval(), example, ("features",)), tmp_path)
    assert built(tmp_path, graph) > 1000


def test_the_streaming_network_with_its_states(tmp_path: Path) -> None:
    backbone = StreamBackbone(SIDE, SIDE, multiplier=0.25, stages=STAGES[:2])
    states = backbone.initial_states(2)
    names = [f"state_{n}" for n in range(len(states))]
    frames = torch.zeros(2, 1, SIDE, SIDE, 3, dtype=torch.uint8)
    batch = {0: torch.export.Dim("batch", min=1, max=4096)}
    with quiet_exporter():
        program = torch.onnx.export(
            Step(backbone).eval(),
            (frames, *states),
            input_names=["frames", *names],
            output_names=["features", *(f"next_{n}" for n in range(len(states)))],
            opset_version=18,
            dynamo=True,
            dynamic_shapes=(batch, tuple(batch for _ in states)),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    graph = save_graph("step", program.model_proto, tmp_path)
    assert len(graph.outputs) == 1 + len(states)
    assert built(tmp_path, graph) > 1000
