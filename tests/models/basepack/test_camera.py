"""The camera that is made to move."""

from __future__ import annotations

import numpy as np
import pytest

from models.basepack.camera import CameraPath, draw_path, film, still_clip

STEADY = CameraPath((0.0, 0.0), (0.0, 0.0), 0.0, 0.0, 1.0, 0.0, 1.0, float("inf"))
TIMES = np.arange(0, 2_000_000_000, 40_000_000)


@pytest.fixture
def picture() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """uint8 ``[64, 64, 3]``: brighter to the right."""
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(ramp[None, :, None], (64, 64, 3)))


def test_a_steady_camera_over_a_still_picture_sees_no_motion(
    picture: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
) -> None:
    clip = still_clip(picture, 2.0)
    assert (clip.duration_ns, len(clip.images)) == (2_000_000_000, 50)
    seen = film(clip.images, clip.pts_ns, STEADY, 48)
    assert seen.shape == (50, 48, 48, 3)
    assert (seen == seen[:1]).all()


def test_a_pan_moves_the_picture(picture: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    path = CameraPath((-1.0, 0.0), (1.0, 0.0), 0.0, 0.0, 1.0, 0.0, 1.0, float("inf"))
    clip = still_clip(picture, 2.0)
    brightness = film(clip.images, clip.pts_ns, path, 48).mean(axis=(1, 2, 3))
    assert (np.diff(brightness) > 0).all()


def test_a_cut_is_one_step() -> None:
    path = CameraPath((0.0, 0.0), (0.0, 0.0), 0.0, 0.0, 1.0, 0.0, 1.0, 0.9)
    centre, scale, _ = path.at(TIMES / 1e9)
    steps = np.flatnonzero((np.abs(np.diff(centre, axis=0)).sum(axis=1) > 0) | (np.diff(scale) != 0))
    assert steps.tolist() == [22, 44]


@pytest.mark.parametrize("seed", range(20))
def test_every_path_stays_inside_and_moves(seed: int) -> None:
    path = draw_path(np.random.default_rng(seed))
    centre, scale, gain = path.at(TIMES / 1e9)
    assert np.abs(centre).max() <= 1
    assert (scale >= 0.5).all()
    assert (scale <= 1).all()
    assert (gain > 0).all()
    assert np.ptp(centre, axis=0).max() + np.ptp(scale) + np.ptp(gain) > 0.01
