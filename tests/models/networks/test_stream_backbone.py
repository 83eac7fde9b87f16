"""The streaming backbone: frame by frame equals the whole clip, for as long as one likes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.backbones.stream import STAGES, States, StreamBackbone
from tests.models.networks.settled import settle


@pytest.fixture(scope="module")
def backbone() -> StreamBackbone:
    torch.manual_seed(0)
    made = StreamBackbone(32, 48, multiplier=0.1)
    settle(made, clip(2, 16, seed=3))
    return made


def clip(batch: int, frames: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, frames, 32, 48, 3), dtype=torch.uint8, generator=random)


def run(backbone: StreamBackbone, video: Tensor, chunk: int) -> tuple[Tensor, States]:
    states, out = backbone.initial_states(len(video)), []
    with torch.inference_mode():
        for frames in video.split(chunk, dim=1):
            features, states = backbone.step(frames, states)
            out.append(features)
    return torch.cat(out, dim=1), states


@pytest.mark.parametrize("chunk", [1, 7])
def test_frame_by_frame_equals_the_whole_clip(backbone: StreamBackbone, chunk: int) -> None:
    video = clip(2, 240)
    want, last = run(backbone, video, 240)
    got, states = run(backbone, video, chunk)
    assert want.shape == (2, 240, backbone.features)
    assert float(want.std()) > 0.01
    assert float((want - got).abs().max()) < 1e-4
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(last, states, strict=True))


def test_forward_is_the_vector_after_the_newest_frame(backbone: StreamBackbone) -> None:
    video = clip(2, 12)
    want, _ = run(backbone, video, 1)
    with torch.inference_mode():
        got = backbone(video, torch.ones(2, 12))
    assert torch.allclose(got.tokens[:, 0], want[:, -1], atol=1e-5)


def test_no_frame_knows_of_a_later_one(backbone: StreamBackbone) -> None:
    video = clip(1, 10)
    changed = video.clone()
    changed[:, 6:] = 255 - changed[:, 6:]
    a, b = run(backbone, video, 10)[0], run(backbone, changed, 10)[0]
    assert torch.allclose(a[:, :6], b[:, :6], atol=1e-6)
    assert float((a[:, 6:] - b[:, 6:]).abs().max()) > 1e-3


def test_states_match_their_shapes_and_stay_bounded(backbone: StreamBackbone) -> None:
    shapes = [tuple(state.shape) for state in backbone.initial_states(3)]
    assert shapes == [(3, *shape) for shape in backbone.state_shapes()]
    _, states = run(backbone, clip(3, 200), 50)
    assert [tuple(state.shape) for state in states] == shapes
    # The weight of the averages tends to one and is never above it: nothing counts the frames.
    assert float((states[0] - 1.0).abs().max()) < 1e-4
    with torch.inference_mode():
        _, again = backbone.step(clip(3, 50), states)
    assert float(again[0].max()) <= 1.0 + 1e-5


def test_an_error_in_the_states_dies_out(backbone: StreamBackbone) -> None:
    video = clip(1, 300, seed=5)
    want, _ = run(backbone, video, 300)
    spoiled = tuple(state + 1.0 for state in backbone.initial_states(1))
    with torch.inference_mode():
        got, _ = backbone.step(video, spoiled)
    assert float((want - got)[:, 0].abs().max()) > 1e-3
    assert float((want - got)[:, -1].abs().max()) < 1e-5


def test_streams_of_a_batch_do_not_meet(backbone: StreamBackbone) -> None:
    video = clip(3, 8)
    together, alone = run(backbone, video, 1)[0], run(backbone, video[1:2], 1)[0]
    assert torch.allclose(together[1:2], alone, atol=1e-5)


def test_stages_have_blocks_with_and_without_a_past() -> None:
    assert {stage.reach for stage in STAGES} == {1, 3, 5}
