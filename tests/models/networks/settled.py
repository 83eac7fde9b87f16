"""Normalisation layers with the statistics of real input: freshly made networks hardly tell pictures apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.backbones.base import Backbone


def settle(backbone: Backbone, video: Tensor) -> None:
    """Set running statistics from one batch ``[B, T, H, W, 3]``; leaves the network in evaluation mode."""
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        backbone.train()(video, torch.ones(video.shape[:2]))
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
    backbone.eval()
