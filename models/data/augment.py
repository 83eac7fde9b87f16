"""Random changes to training windows. A ``View`` says what is changed; picture, mask and sound follow the same one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from models.config import AugmentConfig

LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601."""


@dataclass(frozen=True, slots=True)
class View:
    """One way of looking at a window and of hearing it. The defaults change nothing."""

    shift_s: float = 0.0
    """The window is moved by this."""
    speed: float = 1.0
    """Video and sound run this much faster; the window covers as much more."""
    left: float = 0.0
    """Share of the width that a crop takes away there."""
    top: float = 0.0
    """Share of the height."""
    width: float = 1.0
    """Share of the width that the crop leaves."""
    height: float = 1.0
    """Share of the height."""
    flip: bool = False
    """Left and right exchanged."""
    brightness: float = 1.0
    """Factor on all values."""
    contrast: float = 1.0
    """Factor on what differs from the mean."""
    saturation: float = 1.0
    """Factor on what differs from grey."""


@dataclass(frozen=True, slots=True)
class Hearing:
    """Changes to the sound alone."""

    gain_db: float = 0.0
    """Louder by this."""
    noise_db: float | None = None
    """Noise this far below the sound; none without."""
    colour: float = 0.0
    """The noise's power falls with frequency to this power: 0 is white, 1 pink."""


_WEAK = AugmentConfig(crop=0.05, flip=0.5, colour=0.0, time_jitter_s=0.1, speed=0.0, gain_db=3.0, noise=0.0)


def weakened(config: AugmentConfig) -> AugmentConfig:
    """What hardly changes the answer, for pseudo-labels (FixMatch: Sohn et al., NeurIPS 2020); never more."""
    values = {name: min(value, getattr(_WEAK, name)) for name, value in config}
    return AugmentConfig(**values)


def draw_view(config: AugmentConfig, random: np.random.Generator) -> View:
    """A view at random."""
    width, height = 1.0 - config.crop * random.random(2)
    left, top = random.random(2) * (1.0 - width, 1.0 - height)
    brightness, contrast, saturation = 1.0 + config.colour * random.uniform(-1, 1, 3)
    return View(
        shift_s=float(random.uniform(-1, 1) * config.time_jitter_s),
        speed=float(1.0 + config.speed * random.uniform(-1, 1)),
        left=float(left),
        top=float(top),
        width=float(width),
        height=float(height),
        flip=bool(random.random() < config.flip),
        brightness=float(brightness),
        contrast=float(contrast),
        saturation=float(saturation),
    )


def draw_hearing(config: AugmentConfig, random: np.random.Generator) -> Hearing:
    """Changes to the sound at random."""
    noisy = random.random() < config.noise
    below = float(random.uniform(5.0, 30.0))
    gain = float(random.uniform(-1, 1) * config.gain_db)
    return Hearing(gain, below if noisy else None, float(random.uniform(0.0, 2.0)))


def change_frames(frames: NDArray[np.uint8], view: View) -> NDArray[np.uint8]:
    """Crop, mirror and recolour frames uint8 ``[..., H, W, 3]``, all the same way and to the same size."""
    plain = replace(view, shift_s=0.0, speed=1.0)
    if plain == View() or not frames.size:
        return frames
    pictures = torch.from_numpy(frames).reshape(-1, *frames.shape[-3:])
    rows, columns = _box(frames.shape[-3], frames.shape[-2], view)
    x = pictures[:, rows, columns].permute(0, 3, 1, 2)
    if x.shape[2:] != frames.shape[-3:-1]:
        x = F.interpolate(x, size=frames.shape[-3:-1], mode="bilinear", align_corners=False)
    if view.flip:
        x = x.flip(-1)
    x = _recolour(x, view)
    changed: NDArray[np.uint8] = x.permute(0, 2, 3, 1).reshape(frames.shape).contiguous().numpy()
    return changed


def change_mask(mask: NDArray[np.int64], view: View) -> NDArray[np.int64]:
    """Crop and mirror class indices int64 ``[H, W]`` as ``change_frames`` does, by nearest pixel."""
    rows, columns = _box(mask.shape[0], mask.shape[1], view)
    cut = torch.from_numpy(mask)[rows, columns]
    # Class indices are small whole numbers: float32 holds them.
    scaled = F.interpolate(cut[None, None].float(), size=mask.shape, mode="nearest-exact")[0, 0].long()
    changed: NDArray[np.int64] = (scaled.flip(-1) if view.flip else scaled).contiguous().numpy()
    return changed


def change_sound(audio: NDArray[np.float32], hearing: Hearing, random: np.random.Generator) -> NDArray[np.float32]:
    """Gain and noise on a waveform float32 ``[N]``; stays in -1..1."""
    out = audio * np.float32(10 ** (hearing.gain_db / 20))
    if hearing.noise_db is not None:
        power = float(np.mean(np.square(out, dtype=np.float64)))
        noise = _noise(len(out), hearing.colour, random)
        out = out + noise * np.float32(np.sqrt(power) * 10 ** (-hearing.noise_db / 20))
    clipped: NDArray[np.float32] = np.clip(out, -1.0, 1.0)
    return clipped


def fit_sound(audio: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """A waveform float32 ``[M]`` played faster or slower, so that it has ``count`` samples."""
    if len(audio) == count:
        return audio
    at = np.linspace(0.0, len(audio) - 1, count)
    return np.interp(at, np.arange(len(audio)), audio).astype(np.float32)


def _box(height: int, width: int, view: View) -> tuple[slice, slice]:
    rows, columns = max(1, round(view.height * height)), max(1, round(view.width * width))
    top, left = min(round(view.top * height), height - rows), min(round(view.left * width), width - columns)
    return slice(top, top + rows), slice(left, left + columns)


def _recolour(pictures: Tensor, view: View) -> Tensor:
    """Brightness, contrast and saturation at once: each is an affine map of the colour, so one product does."""
    if view.brightness == view.contrast == view.saturation == 1.0:
        return pictures
    colours = pictures.contiguous().float().flatten(2)
    luma = torch.tensor(LUMA)
    blend = view.saturation * torch.eye(3) + (1.0 - view.saturation) * luma[None]
    matrix = view.brightness * view.contrast * blend
    offset = view.brightness * (1.0 - view.contrast) * (colours.mean(dim=(0, 2)) @ luma)
    changed = torch.baddbmm(offset.expand(len(colours), 3, 1), matrix.expand(len(colours), 3, 3), colours)
    return changed.round_().clamp_(0.0, 255.0).to(torch.uint8).reshape(pictures.shape)


def _noise(count: int, colour: float, random: np.random.Generator) -> NDArray[np.float32]:
    """Noise of unit power whose spectrum falls by ``colour``."""
    spectrum = np.fft.rfft(random.standard_normal(count))
    spectrum *= np.maximum(np.arange(len(spectrum)), 1.0) ** (-colour / 2)
    noise = np.fft.irfft(spectrum, count)
    unit: NDArray[np.float32] = (noise / (np.sqrt(np.mean(noise**2)) + 1e-12)).astype(np.float32)
    return unit
