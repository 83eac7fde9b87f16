"""A tiny model of all modalities and tasks, and batches for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from models.config import AudioConfig, FusionConfig, HeadConfig, ModelConfig, TextConfig, VideoConfig
from models.network import FusionModel, build_model
from models.types import Inputs

HEADS = (
    HeadConfig(name="action", kind="action", labels=("run", "walk")),
    HeadConfig(name="items", kind="class", labels=("a", "b", "c")),
    HeadConfig(name="scene", kind="segmentation", labels=("sky", "road", "tree")),
    HeadConfig(name="find", kind="embedding"),
    HeadConfig(name="talk", kind="dialogue"),
)
MakeModel = Callable[..., FusionModel]


def tiny(kind: str = "concat", *, frozen: bool = True, modality_dropout: float = 0.2) -> ModelConfig:
    return ModelConfig(
        video=VideoConfig(width=32, height=32, frames=3, frozen=frozen, lookback_ms=60),
        audio=AudioConfig(widths=(4, 8)),
        text=TextConfig(width=16, heads=2, layers=1, vocabulary=64),
        fusion=FusionConfig.model_validate({"kind": kind, "width": 32, "modality_dropout": modality_dropout}),
        embedding=12,
        heads=HEADS,
    )


@pytest.fixture
def make_model() -> MakeModel:
    """A tiny model by the kind of its fusion, the same at each call."""

    def make(kind: str = "concat", **options: object) -> FusionModel:
        torch.manual_seed(0)
        return build_model(tiny(kind, **options))  # type: ignore[arg-type]

    return make


@pytest.fixture
def batch() -> Inputs:
    """Three windows with everything."""
    random = torch.Generator().manual_seed(1)
    return Inputs(
        video=torch.randint(0, 256, (3, 3, 2, 32, 32, 3), dtype=torch.uint8, generator=random),
        video_mask=torch.ones(3, 3),
        audio=torch.rand(3, 8000, generator=random) - 0.5,
        audio_mask=torch.ones(3),
        tokens=torch.tensor([[5, 6, 7], [8, 9, 0], [10, 0, 0]]),
        question=torch.tensor([[11, 12], [13, 0], [0, 0]]),
        answer=torch.tensor([[2, 14, 15], [2, 16, 0], [2, 0, 0]]),
    )
