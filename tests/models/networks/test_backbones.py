"""Shapes, holes and parts of the video backbones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.backbones.base import Backbone, Sequence, hold, pool
from models.backbones.build import build_backbone
from models.backbones.i3d import pad_same
from models.config import VideoConfig
from tests.models.networks.settled import settle

# Backbone, frames, tokens.
CASES = [("c3d", 32, 2), ("i3d", 17, 2), ("i3d", 4, 1), ("r3d18", 9, 2), ("r2plus1d18", 9, 2), ("stream", 5, 1)]
CASES += [("frame", 3, 3)]


def build(kind: str, *, lookback: bool = False) -> Backbone:
    torch.manual_seed(0)
    config = {"backbone": kind, "frames": 16, "width": 32, "height": 48, "width_multiplier": 0.05}
    if lookback:
        config["lookback_ms"] = 60
    backbone = build_backbone(VideoConfig.model_validate(config))
    if kind != "frame":
        settle(backbone, clip(2, 16))
    return backbone.eval()


def clip(batch: int, frames: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, frames, 48, 32, 3), dtype=torch.uint8, generator=random)


@pytest.mark.parametrize(("kind", "frames", "tokens"), CASES)
def test_tokens(kind: str, frames: int, tokens: int) -> None:
    backbone = build(kind)
    with torch.inference_mode():
        out = backbone(clip(2, frames), torch.ones(2, frames))
        same = backbone(clip(2, frames).float(), torch.ones(2, frames))
    assert out.tokens.shape == (2, tokens, backbone.features)
    assert out.tokens.dtype == torch.float32 and bool(out.mask.all())
    assert torch.equal(out.tokens, same.tokens)
    assert float((out.tokens[0] - out.tokens[1]).abs().max()) > 1e-5


@pytest.mark.parametrize(("kind", "frames", "tokens"), CASES)
def test_missing_frames_may_hold_anything(kind: str, frames: int, tokens: int) -> None:
    backbone = build(kind)
    mask = torch.ones(3, frames)
    mask[0, 1], mask[1], mask[2, 0] = 0, 0, 0
    video = clip(3, frames).float()
    spoiled = torch.where(mask[:, :, None, None, None] > 0, video, torch.nan)
    with torch.inference_mode():
        want, got = backbone(video, mask), backbone(spoiled, mask)
    assert torch.equal(want.tokens, got.tokens)
    assert torch.isfinite(got.tokens).all()
    assert not got.mask[1].any() and float(got.tokens[1].abs().sum()) == 0.0


@pytest.mark.parametrize("kind", ["c3d", "i3d", "r3d18", "r2plus1d18", "stream"])
def test_gradient_reaches_every_parameter(kind: str) -> None:
    backbone = build(kind).train()
    frames = 16
    backbone(clip(2, frames), torch.ones(2, frames)).tokens.square().sum().backward()
    silent = [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_pairs_and_features_of_the_frame_backbone() -> None:
    backbone = build("frame", lookback=True)
    pairs = torch.stack([clip(2, 3), clip(2, 3).flip(1)], dim=2)
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    with torch.inference_mode():
        features = backbone.encode(pairs, mask)  # type: ignore[operator]
        assert features.shape == (2, 3, 2560)
        features[1, 1] = torch.nan
        want, got = backbone(pairs, mask), backbone(features, mask)
    assert torch.allclose(want.tokens, got.tokens, atol=1e-5)
    assert got.mask.tolist() == [[True, True, True], [True, False, True]]


def test_the_order_of_samples_matters() -> None:
    backbone = build("frame")
    video = clip(1, 3)
    with torch.inference_mode():
        forwards = backbone(video, torch.ones(1, 3)).tokens.mean(dim=1)
        backwards = backbone(video.flip(1), torch.ones(1, 3)).tokens.mean(dim=1)
    assert float((forwards - backwards).abs().max()) > 1e-4


def test_hold_takes_the_newest_frame_before() -> None:
    video = torch.arange(10.0).reshape(2, 5, 1)
    mask = torch.tensor([[0.0, 1.0, 0.0, 0.0, 1.0], [0.0] * 5])
    assert hold(video, mask)[:, :, 0].tolist() == [[1, 1, 1, 1, 4], [0] * 5]


def test_pool_is_mean_and_deviation_of_what_is_there() -> None:
    tokens = torch.tensor([[[1.0], [3.0], [torch.nan]], [[7.0], [0.0], [0.0]], [[5.0], [5.0], [5.0]]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    got = pool(Sequence(torch.where(mask[:, :, None], tokens, 0.0), mask))
    assert torch.allclose(got, torch.tensor([[2.0, 1.0], [7.0, 0.0], [0.0, 0.0]]), atol=1e-5)


@pytest.mark.parametrize(("size", "kernel", "stride", "want"), [(8, 7, 2, 4), (7, 7, 2, 4), (5, 3, 2, 3), (4, 1, 1, 4)])
def test_same_padding(size: int, kernel: int, stride: int, want: int) -> None:
    x = torch.zeros(1, 1, size, size, size)
    padded = pad_same(x, (kernel,) * 3, (stride,) * 3)
    assert torch.nn.functional.max_pool3d(padded, kernel, stride).shape[2:] == (want,) * 3
    # Where the border is odd, the larger part lies behind.
    edges = padded.shape[2] - size
    marked = pad_same(torch.ones_like(x), (kernel,) * 3, (stride,) * 3)
    assert int((marked[0, 0, :, edges // 2 or 0, edges // 2 or 0] == 0).sum()) == edges
    assert float(marked[0, 0, edges // 2, edges // 2, edges // 2]) == 1.0
