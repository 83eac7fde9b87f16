"""What a head must beat: logistic regression on plain summaries of the same inputs, on the same training groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.audio import compress
from models.basepack.action import minimise
from models.basepack.batches import Window, window_features
from models.losses import known_bce, known_cross_entropy

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class LogisticRegression:
    """A linear model on standardised inputs."""

    centre: Tensor
    scale: Tensor
    linear: nn.Linear

    def scores(self, inputs: Floats) -> Floats:
        """Logits float32 ``[N, labels]`` of inputs ``[N, D]``."""
        with torch.inference_mode():
            logits: Floats = self.linear((torch.from_numpy(inputs) - self.centre) * self.scale).numpy()
        return logits


def fit_logistic(
    inputs: Floats,
    targets: NDArray[np.generic],
    labels: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    penalty: float = 1e-3,
    steps: int = 60,
) -> LogisticRegression:
    """Fit by L-BFGS with an L2 penalty, from zero: nothing random."""
    x, truth = torch.from_numpy(inputs), torch.from_numpy(targets)
    model = LogisticRegression(x.mean(dim=0), 1.0 / (x.std(dim=0) + 1e-3), nn.Linear(x.shape[1], labels))
    minimise(model.linear, (x - model.centre) * model.scale, lambda logits: loss(logits, truth), penalty, steps)
    return model


def pooled_features(windows: Sequence[Window]) -> Floats:
    """Mean and deviation over time of each window's frozen features: float32 ``[N, 5120]``."""
    rows = []
    for window in windows:
        features, mask = window_features(window)
        known = features[mask > 0]
        rows.append(np.concatenate([known.mean(axis=0), known.std(axis=0)]))
    return np.stack(rows)


def pooled_mel(cuts: Floats) -> Floats:
    """Mean and deviation over time of log-mel: float32 ``[N, 64, frames]`` of mel power to ``[N, 128]``."""
    levels = compress(torch.from_numpy(cuts)).numpy()
    return np.concatenate([levels.mean(axis=2), levels.std(axis=2)], axis=1)


def fit_actions(windows: Sequence[Window]) -> LogisticRegression:
    """On the training windows as served."""
    targets = np.stack([window.targets for window in windows])
    return fit_logistic(pooled_features(windows), targets, targets.shape[1], known_bce)


def fit_sounds(cuts: Floats, targets: NDArray[np.int64], labels: int) -> LogisticRegression:
    """On the training sounds as served."""
    return fit_logistic(pooled_mel(cuts), targets, labels, lambda a, b: known_cross_entropy(a, b, smoothing=0.0))
