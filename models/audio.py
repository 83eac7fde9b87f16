"""The audio encoder: log-mel spectrogram as a convolution, then a small depthwise CNN."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

SAMPLE_RATE = 16_000
FRAME = 400
"""Samples of one analysis frame: 25 ms."""
STEP = 320
"""Samples between frames: 20 ms."""
N_FFT = 512
MELS = 64
EMBEDDING = 128
"""Length of an audio embedding."""


class LogMel(nn.Module):
    """Log-mel spectrogram inside the network, so that there is no second implementation to disagree with.

    The Fourier transform is a convolution with windowed cosines and sines; the mel scale is Slaney's
    (Auditory Toolbox, 1998), each filter normalised to unit area, as in librosa.
    """

    fourier: Tensor
    mel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fourier", torch.from_numpy(_fourier()), persistent=False)
        self.register_buffer("mel", torch.from_numpy(mel_filters()), persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        """float32 waveform ``[B, N]`` in -1..1 to ``[B, MELS, frames]``, about -2..2."""
        return compress(self.power(audio))

    def power(self, audio: Tensor) -> Tensor:
        """float32 waveform ``[B, N]`` to mel power ``[B, MELS, frames]``; the power of a mixture is nearly the sum."""
        parts = F.conv1d(audio[:, None], self.fourier, stride=STEP, padding=(FRAME - STEP) // 2)
        real, imaginary = parts.chunk(2, dim=1)
        power = real.square() + imaginary.square()
        return torch.matmul(self.mel, power)


def compress(power: Tensor) -> Tensor:
    """Mel power to log-mel. Silence lies at log 1e-6 = -13.8, loud sound near 5: the range becomes about -2..2."""
    return (torch.log(power + 1e-6) + 5.0) / 5.0


class DepthwiseBlock(nn.Module):
    """Depthwise then pointwise convolution, each with batch normalisation (Howard et al., arXiv:1704.04861)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
            nn.BatchNorm2d(inputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """float32 ``[B, C, H, W]`` to ``[B, C', H/stride, W/stride]``."""
        out: Tensor = self.layers(x)
        return out


class AudioEncoder(nn.Module):
    """Log-mel spectrogram to one embedding per window."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 128), dropout: float = 0.3) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        pairs = pairwise(widths)
        self.blocks = nn.Sequential(
            *(nn.Sequential(DepthwiseBlock(narrow, wide, 2), DepthwiseBlock(wide, wide, 1)) for narrow, wide in pairs)
        )
        self.project = nn.Sequential(nn.Dropout(dropout), nn.Linear(2 * widths[-1], EMBEDDING), nn.ReLU(inplace=True))

    def forward(self, spectrogram: Tensor) -> Tensor:
        """float32 ``[B, MELS, frames]`` to ``[B, EMBEDDING]``."""
        return self.summarise(self.over_time(spectrogram))

    def over_time(self, spectrogram: Tensor) -> Tensor:
        """float32 ``[B, MELS, frames]`` to maps without frequency, ``[B, widths[-1], frames / 16]`` by default."""
        maps: Tensor = self.blocks(self.stem(spectrogram[:, None])).mean(dim=2)
        return maps

    def summarise(self, maps: Tensor) -> Tensor:
        """Maps as ``over_time`` gives them to ``[B, EMBEDDING]``."""
        # The mean hears rain, the maximum a sneeze.
        embedding: Tensor = self.project(torch.cat([maps.mean(dim=2), maps.amax(dim=2)], dim=1))
        return embedding


class SpecAugment(nn.Module):
    """Masks a stretch of time and a band of mel in training (Park et al., Interspeech 2019).

    ``chance`` is that of each sample. What is masked takes the sample's mean, which says least.
    """

    TIME = 0.3
    """Longest stretch, as a share of the window."""
    BAND = 0.25
    """Widest band, as a share of the mels."""

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.chance = chance

    def forward(self, spectrogram: Tensor) -> Tensor:
        """float32 ``[B, MELS, frames]`` to the same shape; in evaluation mode unchanged."""
        if not self.training or self.chance == 0.0:
            return spectrogram
        batch, mels, frames = spectrogram.shape
        device = spectrogram.device
        hidden = (
            _stretch(batch, mels, self.BAND, device)[:, :, None] | _stretch(batch, frames, self.TIME, device)[:, None]
        )
        chosen = torch.rand(batch, device=device) < self.chance
        mean = spectrogram.mean(dim=(1, 2), keepdim=True)
        return torch.where(hidden & chosen[:, None, None], mean, spectrogram)


def _stretch(batch: int, length: int, share: float, device: torch.device) -> Tensor:
    """bool ``[batch, length]``: in each row one stretch of random place and of random length up to a share."""
    extent = torch.rand(batch, 1, device=device) * share * length
    start = torch.rand(batch, 1, device=device) * (length - extent)
    at = torch.arange(length, device=device)
    return (at >= start) & (at < start + extent)


def mel_filters() -> NDArray[np.float32]:
    """float32 ``[MELS, N_FFT/2 + 1]``: triangles on Slaney's mel scale from 0 Hz to half the sample rate."""
    edges = _mel_to_hz(np.linspace(0.0, _hz_to_mel(SAMPLE_RATE / 2), MELS + 2))
    bins = np.linspace(0.0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
    rising = (bins[None] - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins[None]) / np.diff(edges)[1:, None]
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    return (triangles * (2.0 / (edges[2:] - edges[:-2]))[:, None]).astype(np.float32)


def _fourier() -> NDArray[np.float32]:
    """float32 ``[2 (N_FFT/2 + 1), 1, FRAME]``: cosines, then sines, under a Hann window."""
    time = np.arange(FRAME)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * time / FRAME)
    angle = 2 * np.pi * np.arange(N_FFT // 2 + 1)[:, None] * time[None] / N_FFT
    return (np.concatenate([np.cos(angle), np.sin(angle)]) * window).astype(np.float32)[:, None]


_LINEAR_HZ = 200.0 / 3
_BREAK_HZ = 1000.0
_LOG_STEP = math.log(6.4) / 27.0


def _hz_to_mel(hz: float) -> float:
    if hz < _BREAK_HZ:
        return hz / _LINEAR_HZ
    return _BREAK_HZ / _LINEAR_HZ + math.log(hz / _BREAK_HZ) / _LOG_STEP


def _mel_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    knee = _BREAK_HZ / _LINEAR_HZ
    return np.where(mel < knee, mel * _LINEAR_HZ, _BREAK_HZ * np.exp(_LOG_STEP * (mel - knee)))
