"""Random changes do what they say, to picture, mask and sound alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import AugmentConfig
from models.data.augment import (
    Hearing,
    View,
    change_frames,
    change_mask,
    change_sound,
    draw_hearing,
    draw_view,
    fit_sound,
    weakened,
)
from models.data.mixup import mixup
from models.types import VOID, Inputs, Targets

OFF = AugmentConfig(crop=0, flip=0, colour=0, time_jitter_s=0, speed=0, gain_db=0, noise=0)


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(40, 200, (3, 24, 32, 3), np.uint8)


def test_nothing_changes_when_all_is_off() -> None:
    random = np.random.default_rng(0)
    assert draw_view(OFF, random) == View()
    hearing = draw_hearing(OFF, random)
    sound = np.linspace(-0.5, 0.5, 100, dtype=np.float32)
    assert np.array_equal(change_sound(sound, hearing, random), sound)
    frames = picture()
    assert np.array_equal(change_frames(frames, View()), frames)
    mask = np.arange(24 * 32).reshape(24, 32) % 5
    assert np.array_equal(change_mask(mask, View()), mask)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_views_stay_within_their_bounds(seed: int) -> None:
    config = AugmentConfig()
    view = draw_view(config, np.random.default_rng(seed))
    assert abs(view.shift_s) <= config.time_jitter_s and abs(view.speed - 1) <= config.speed
    assert 1 - config.crop <= view.width <= 1 and view.left >= 0 and view.left + view.width <= 1 + 1e-9
    assert 1 - config.crop <= view.height <= 1 and view.top >= 0 and view.top + view.height <= 1 + 1e-9
    weak = draw_view(weakened(config), np.random.default_rng(seed))
    assert weak.speed == weak.contrast == weak.saturation == 1 and weak.width >= 0.95
    assert weakened(OFF) == OFF.model_copy(update={"spec_augment": weakened(OFF).spec_augment})


def test_crop_and_flip() -> None:
    frames = picture()
    assert np.array_equal(change_frames(frames, View(flip=True)), frames[:, :, ::-1])
    flat = np.zeros((24, 32, 3), np.uint8)
    flat[:12, :16] = 200
    half = change_frames(flat, View(left=0.0, top=0.0, width=0.5, height=0.5))
    assert half.shape == flat.shape and (half == 200).all()


@pytest.mark.parametrize("flip", [False, True])
def test_mask_and_picture_are_cropped_alike(flip: bool) -> None:
    mask = np.kron(np.arange(12).reshape(3, 4), np.ones((16, 16), np.int64))
    image = np.repeat((mask * 20)[..., None], 3, axis=2).astype(np.uint8)
    view = View(left=0.13, top=0.08, width=0.8, height=0.83, flip=flip)
    cropped, drawn = change_frames(image, view), change_mask(mask, view)
    same = np.abs(cropped[..., 0].astype(int) - drawn * 20) <= 1
    # Only where a class ends does the picture blend and the mask choose.
    assert same.mean() > 0.85
    assert set(np.unique(drawn)) <= set(range(12))
    inner = drawn[1:-1, 1:-1]
    around = np.stack(
        [drawn[1 + y : drawn.shape[0] - 1 + y, 1 + x : drawn.shape[1] - 1 + x] for y in (-1, 0, 1) for x in (-1, 0, 1)]
    )
    assert same[1:-1, 1:-1][(around == inner).all(axis=0)].all()


def test_void_survives() -> None:
    mask = np.full((24, 32), VOID, np.int64)
    assert (change_mask(mask, View(width=0.7, height=0.7, flip=True)) == VOID).all()


def test_colours_against_a_plain_reference() -> None:
    frames = picture().astype(np.float64)
    view = View(brightness=1.1, contrast=0.8, saturation=1.3)
    luma = np.array([0.299, 0.587, 0.114])
    grey = (frames @ luma)[..., None]
    saturated = grey + (frames - grey) * view.saturation
    mean = (frames @ luma).mean()
    wanted = ((saturated - mean) * view.contrast + mean) * view.brightness
    got = change_frames(picture(), view)
    assert np.abs(got - np.clip(wanted, 0, 255)).max() <= 0.51


def test_gain_and_noise() -> None:
    random = np.random.default_rng(0)
    tone = (0.1 * np.sin(np.arange(16_000) * 0.2)).astype(np.float32)
    louder = change_sound(tone, Hearing(gain_db=6.0206), random)
    assert np.allclose(louder, 2 * tone, atol=1e-5)
    for colour in (0.0, 1.0, 2.0):
        noise = change_sound(tone, Hearing(noise_db=10.0, colour=colour), random) - tone
        assert 10 * np.log10(np.mean(tone**2) / np.mean(noise**2)) == pytest.approx(10.0, abs=0.1)
    assert np.abs(change_sound(tone, Hearing(gain_db=60.0), random)).max() <= 1.0
    silence = np.zeros(100, np.float32)
    assert np.array_equal(change_sound(silence, Hearing(noise_db=5.0), random), silence)


def test_speed_keeps_the_length() -> None:
    ramp = np.linspace(0, 1, 1150, dtype=np.float32)
    assert np.allclose(fit_sound(ramp, 1000), np.linspace(0, 1, 1000), atol=1e-5)
    assert fit_sound(ramp, 1150) is ramp


def batch() -> tuple[Inputs, Targets]:
    """Five rows: two with picture and sound, one without sound, one unlabelled, one with a caption."""
    video = torch.arange(5).mul(50).to(torch.uint8).reshape(5, 1, 1, 1, 1).repeat(1, 2, 2, 2, 3)
    audio = torch.arange(5.0)[:, None].repeat(1, 4) / 10
    audio_mask = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    tokens = torch.zeros(5, 3, dtype=torch.int64)
    tokens[4] = 7
    heads = torch.eye(2)[[0, 1, 0, 1, 0]].clone()
    heads[3] = float("nan")
    inputs = Inputs(video, torch.ones(5, 2), audio, audio_mask, tokens)
    return inputs, Targets({"action": heads}, torch.ones(5), torch.arange(5))


def test_mixup_blends_what_is_alike_and_leaves_the_rest() -> None:
    inputs, targets = batch()
    blended = 0
    for seed in range(60):
        mixed, labels = mixup(inputs, targets, 1.0, np.random.default_rng(seed))
        assert mixed.video is not None and mixed.audio is not None
        action = labels.heads["action"]
        assert action[3].isnan().all() and not action[[0, 1, 2, 4]].isnan().any()
        assert torch.allclose(action[[0, 1, 2, 4]].sum(dim=1), torch.ones(4))
        for row in (2, 3, 4):
            assert torch.equal(mixed.video[row], inputs.video[row].float()), "rows unlike all others stay"
        share = action[0, 0]
        assert torch.allclose(mixed.video[0], torch.full_like(mixed.video[0], 50.0) * (1 - share))
        assert torch.allclose(mixed.audio[0], torch.full((4,), 0.1) * (1 - share))
        blended += int(0 < share < 1)
        again, _ = mixup(inputs, targets, 1.0, np.random.default_rng(seed))
        assert torch.equal(again.video, mixed.video)
    assert blended > 5
    assert mixup(inputs, targets, 0.0, np.random.default_rng(0))[0] is inputs


def test_mixup_leaves_masks_and_questions_alone() -> None:
    video, there = torch.zeros(2, 1, 4, 4, 3, dtype=torch.uint8), torch.ones(2, 1)
    mask = torch.zeros(2, 4, 4, dtype=torch.int64)
    for heads, question in (({"street": mask}, None), ({"class": torch.eye(2)}, torch.ones(2, 3, dtype=torch.int64))):
        inputs = Inputs(
            video + torch.tensor([0, 9], dtype=torch.uint8).reshape(2, 1, 1, 1, 1), there, question=question
        )
        for seed in range(5):
            mixed, out = mixup(inputs, Targets(heads), 1.0, np.random.default_rng(seed))
            assert torch.equal(mixed.video, inputs.video.float())
            assert all(torch.equal(out.heads[name], value) for name, value in heads.items())


def test_mixup_never_leaves_a_row_without_its_video() -> None:
    there = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    inputs = Inputs(torch.ones(2, 2, 2, 2, 3), there)
    for seed in range(5):
        mixed, _ = mixup(inputs, Targets({"class": torch.eye(2)}), 1.0, np.random.default_rng(seed))
        assert torch.equal(mixed.video_mask, there)
