"""The whole model survives the export to ONNX, with a free batch, whatever is absent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from models.fusion import ConcatFusion, Fused, GatedFusion
from models.network import FusionModel
from models.types import Inputs
from tests.models.networks.onnx_run import difference

MakeModel = Callable[..., FusionModel]


class Served(nn.Module):
    """Tensors in, tensors out."""

    def __init__(self, model: FusionModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        out = self.model(Inputs(*given))
        return (out.fused, out.fused_tokens, *out.embeddings.values(), *out.logits.values())


def test_window_of_cached_features(make_model: MakeModel, batch: Inputs) -> None:
    # Row by row: all, some samples and text, nothing.
    assert batch.tokens is not None
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    tokens = batch.tokens * torch.tensor([[1], [1], [0]])
    features = torch.randn(3, 3, 2560, generator=torch.Generator().manual_seed(0))
    shown = replace(batch, video=features, video_mask=mask, audio_mask=torch.tensor([1.0, 0.0, 0.0]), tokens=tokens)
    given = [getattr(shown, name) for name in Inputs.__slots__]
    assert difference(Served(make_model("attention")), *given) < 1e-4


def test_raw_frames_with_segmentation(make_model: MakeModel, batch: Inputs) -> None:
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert batch.video is not None
    assert difference(Served(make_model()), batch.video, mask) < 1e-4


class Joined(nn.Module):
    """The fusions that need no tokens over time."""

    def __init__(self, fusion: nn.Module) -> None:
        super().__init__()
        self.fusion = fusion

    def forward(self, vectors: Tensor, present: Tensor) -> tuple[Tensor, ...]:
        fused: Fused = self.fusion(vectors, present > 0, ())
        return (fused.vector, fused.tokens)


@pytest.mark.parametrize("fusion", [ConcatFusion(8, 3), GatedFusion(8, 3)])
def test_fusion(fusion: nn.Module) -> None:
    present = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    vectors = torch.randn(3, 3, 8, generator=torch.Generator().manual_seed(0)) * present[:, :, None]
    assert difference(Joined(fusion), vectors, present) < 1e-4
