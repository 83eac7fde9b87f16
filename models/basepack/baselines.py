"""What a head must beat: logistic regression on plain summaries of the same inputs, on the same training groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.basepack.action import Pooled, columns_of, minimise
from models.basepack.batches import Window, window_features
from models.basepack.watch import CHANGE
from models.losses import known_bce

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
    """Mean and deviation over time of each window's frozen features: float32 ``[N, POOLED]``."""
    rows = []
    for window in windows:
        features, mask = window_features(window)
        known = features[mask > 0]
        rows.append(np.concatenate([known.mean(axis=0), known.std(axis=0)]))
    return np.stack(rows)


def changes(windows: Sequence[Window]) -> Floats:
    """The half of ``pooled_features`` that is of the differences: float32 ``[N, 2560]``."""
    return pooled_features(windows)[:, columns_of(CHANGE).numpy()]


def fit_changes(data: Pooled) -> LogisticRegression:
    """Logistic regression on mean and deviation of the differences' features, of the windows as served."""
    targets = data.targets.numpy()
    return fit_logistic(changes(data.windows), targets, targets.shape[1], known_bce)
