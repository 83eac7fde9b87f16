"""Each video backbone survives the export to ONNX, with a free batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.backbones.base import Backbone
from models.backbones.build import build_backbone
from models.backbones.stream import Stage, StreamBackbone
from models.config import VideoConfig
from tests.models.networks.onnx_run import difference
from tests.models.networks.settled import settle

STAGES = (Stage(1, 8, 16, 3, 1, 2), Stage(2, 8, 16, 3, 3, 2))
"""A stream of one block without a past and two with one; more of the same only take longer to export."""


def clip(batch: int, frames: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, frames, 32, 32, 3), dtype=torch.uint8, generator=random)


def build(kind: str) -> Backbone:
    torch.manual_seed(0)
    if kind == "stream":
        stream = StreamBackbone(32, 32, multiplier=0.5, stages=STAGES)
        settle(stream, clip(2, 16))
        return stream
    config = {"backbone": kind, "frames": 16, "width": 32, "height": 32, "width_multiplier": 0.05}
    return build_backbone(VideoConfig.model_validate(config)).eval()


@pytest.mark.parametrize(
    ("kind", "frames"), [("c3d", 16), ("i3d", 9), ("r3d18", 8), ("r2plus1d18", 8), ("stream", 4), ("frame", 2)]
)
def test_clip(kind: str, frames: int) -> None:
    mask = torch.ones(3, frames)
    mask[0, 1], mask[1] = 0, 0
    assert difference(build(kind), clip(3, frames), mask) < 1e-4


class Step(nn.Module):
    """One step of a stream with its states as inputs and outputs."""

    def __init__(self, backbone: StreamBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, frames: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        features, renewed = self.backbone.step(frames, states)
        return (features, *renewed)


def test_stream_with_states() -> None:
    backbone = build("stream")
    assert isinstance(backbone, StreamBackbone)
    with torch.no_grad():
        _, states = backbone.step(clip(3, 5), backbone.initial_states(3))
    assert difference(Step(backbone), clip(3, 1), *states) < 1e-4
