"""The front end of audio spectrogram transformers, as a module whose ONNX nodes go into the graph."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

FRAME, STEP, N_FFT = 400, 160, 512
"""Samples of an analysis frame, between frames, and of the Fourier transform."""
LOWEST_HZ = 20
PREEMPHASIS = 0.97
FLOOR = 1.192092955078125e-07
"""Least mel power."""


class KaldiMel(nn.Module):
    """Kaldi's log-mel filter bank, normalised: what ``ASTFeatureExtractor`` of transformers computes.

    Audio spectrogram transformer: Gong et al., Interspeech 2021. Removing a frame's mean, pre-emphasis, the window
    and the Fourier transform are linear, so they are one convolution. ``filters`` is float ``[257, mels]``, ``mean``
    and ``std`` those of the extractor.
    """

    kernel: Tensor
    filters: Tensor

    def __init__(self, filters: NDArray[np.floating], length: int, mean: float, std: float) -> None:
        super().__init__()
        self.length, self.mean, self.scale = length, mean, 2 * std
        self.register_buffer("kernel", torch.from_numpy(_kernel().astype(np.float32))[:, None])
        self.register_buffer("filters", torch.from_numpy(filters.T.astype(np.float32).copy()))

    def forward(self, audio: Tensor) -> Tensor:
        """float32 ``[B, N]`` to float32 ``[B, length, mels]``; what is short is filled up with zeros."""
        real, imaginary = F.conv1d(audio[:, None], self.kernel, stride=STEP).chunk(2, dim=1)
        power = torch.matmul(self.filters, real.square() + imaginary.square())
        mel = power.clamp(min=FLOOR).log().transpose(1, 2)[:, : self.length]
        return (F.pad(mel, (0, 0, 0, self.length - mel.shape[1])) - self.mean) / self.scale


def _kernel() -> NDArray[np.float64]:
    """float64 ``[2 * 257, FRAME]``: rows give the real, then the imaginary parts of a frame's spectrum."""
    centre = np.eye(FRAME) - 1 / FRAME
    emphasise = np.eye(FRAME) - PREEMPHASIS * np.eye(FRAME, k=-1)
    emphasise[0, 0] = 1 - PREEMPHASIS
    window = np.diag(np.hanning(FRAME))
    angle = -2 * np.pi * np.outer(np.arange(N_FFT // 2 + 1), np.arange(FRAME)) / N_FFT
    fourier = np.concatenate([np.cos(angle), np.sin(angle)])
    return np.asarray(fourier @ window @ emphasise @ centre)
