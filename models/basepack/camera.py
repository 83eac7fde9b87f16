"""A camera that moves, made from one that stood still: pans, zooms, shaking, cuts and flicker.

Nearly all labelled recordings here come from fixed cameras, where whatever moves is an action. A camera that
moves changes the whole picture at once; without examples of that, a pan looks like a brawl.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from models.media import NS_PER_S, Clip, Images

MARGIN = 1.4
"""Side of the pictures that the camera moves over, in sides of what it sees."""
STILL_FPS = 25
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CameraPath:
    """Where a camera looks and how bright its picture is, as a function of time. Lengths in sides of the picture."""

    start: tuple[float, float]
    """Centre at time zero, -1..1 over the range that the margin leaves."""
    velocity: tuple[float, float]
    """Of the pan, in ranges a second; the view turns round at the edges."""
    zoom_rate: float
    """Relative, a second; swings between the whole picture and half of it."""
    shake: float
    """Amplitude in ranges."""
    shake_hz: float
    """Its frequency."""
    flicker: float
    """Relative amplitude of the brightness."""
    flicker_hz: float
    """Its frequency."""
    cut_s: float
    """Seconds between cuts to another part of the picture; infinite without."""

    def at(self, seconds: Floats) -> tuple[Floats, Floats, Floats]:
        """Centres ``[..., 2]`` in -1..1, scales ``[...]`` in 0.5..1 and gains ``[...]`` at times ``[...]``."""
        scene = np.floor(seconds / self.cut_s)
        jump = np.stack([np.sin(scene * 12.9898), np.sin(scene * 78.233)], axis=-1) * (scene > 0)[..., None]
        tremble = np.stack([np.sin(2 * np.pi * self.shake_hz * seconds), np.cos(4.3 * self.shake_hz * seconds)], -1)
        centre = np.asarray(self.start) + np.asarray(self.velocity) * seconds[..., None] + 2 * jump
        centre = _bounce(centre) + self.shake * tremble
        scale = 0.75 + 0.25 * _bounce(1.0 + self.zoom_rate * seconds + 0.7 * scene)
        gain = 1.0 + self.flicker * np.sin(2 * np.pi * self.flicker_hz * seconds)
        return np.clip(centre, -1, 1), scale, gain


def draw_path(random: np.random.Generator) -> CameraPath:
    """One to three kinds of motion, slow to fast."""
    has = random.random(5) < (0.7, 0.35, 0.4, 0.25, 0.25)
    has[0] |= not has.any()
    angle, speed = random.uniform(0, 2 * np.pi), 10 ** random.uniform(-0.8, 0.8)
    return CameraPath(
        start=(random.uniform(-1, 1), random.uniform(-1, 1)),
        velocity=(has[0] * speed * np.cos(angle), has[0] * speed * 0.5 * np.sin(angle)),
        zoom_rate=has[1] * random.uniform(-1.5, 1.5),
        shake=has[2] * 10 ** random.uniform(-1.7, -0.5),
        shake_hz=random.uniform(1.5, 9.0),
        flicker=has[3] * random.uniform(0.03, 0.3),
        flicker_hz=random.uniform(0.5, 12.0),
        cut_s=random.uniform(0.5, 2.0) if has[4] else float("inf"),
    )


def film(pictures: Images, times_ns: NDArray[np.int64], path: CameraPath, size: int) -> Images:
    """uint8 ``[S, h, w, 3]`` shown at ``[S]`` through a moving camera: uint8 ``[S, size, size, 3]``."""
    centre, scale, gain = path.at(times_ns / NS_PER_S)
    half = scale / MARGIN
    middle = centre * (1.0 - half)[:, None]
    matrix = np.zeros((len(pictures), 2, 3), np.float32)
    matrix[:, 0, 0] = matrix[:, 1, 1] = half
    matrix[:, :, 2] = middle
    grid = F.affine_grid(torch.from_numpy(matrix), [len(pictures), 3, size, size], align_corners=False)
    source = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float()
    seen = F.grid_sample(source, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    seen = seen * torch.from_numpy(gain.astype(np.float32))[:, None, None, None]
    out: Images = seen.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return out


def still_clip(picture: Images, seconds: float) -> Clip:
    """A recording of one picture, uint8 ``[h, w, 3]``, in which nothing moves."""
    interval_ns = NS_PER_S // STILL_FPS
    pts = np.arange(int(seconds * STILL_FPS), dtype=np.int64) * interval_ns
    return Clip(pts, np.broadcast_to(picture, (len(pts), *picture.shape)), interval_ns, None)


def _bounce(position: Floats) -> Floats:
    """A position that turns round at -1 and 1."""
    back: Floats = 1.0 - np.abs((position + 1.0) % 4.0 - 2.0)
    return back
