"""Where a training stands: what a checkpoint holds beside tensors, and what follows from a step's number."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass
class RunState:
    """What changes from step to step."""

    step: int = 0
    """Steps done."""
    best: float | None = None
    """Best validation score so far."""
    best_epoch: int = 0
    """When that was."""
    stopped: bool = False
    """Whether training has ended before its time."""
    recent: float | None = None
    """Mean loss of late."""
    sums: dict[str, float] = field(default_factory=dict)
    """Of this epoch's losses by name."""
    summed: int = 0
    """Over how many steps."""
    history: list[dict[str, float]] = field(default_factory=list)
    """One record for each epoch."""

    def add(self, losses: Mapping[str, float]) -> None:
        """Count the losses of a step."""
        self.step += 1
        self.summed += 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.recent = losses["loss"] if self.recent is None else 0.95 * self.recent + 0.05 * losses["loss"]

    def end_epoch(self, epoch: int, score: float, measures: Mapping[str, float]) -> bool:
        """Record an epoch; true when it is the best so far."""
        names = {name: "train_loss" if name == "loss" else f"{name} loss" for name in self.sums}
        means = {names[name]: total / max(1, self.summed) for name, total in self.sums.items()}
        self.history.append({"epoch": epoch, "step": self.step, **means, **measures, "score": score})
        self.sums, self.summed = {}, 0
        better = self.best is None or score > self.best
        if better:
            self.best, self.best_epoch = score, epoch
        return better


def pace(step: int, total: int, warmup: int) -> float:
    """Share of the learning rate at a step: a rising line, then half a cosine (Loshchilov and Hutter, ICLR 2017).

    The rise takes at most a fifth of all steps.
    """
    warmup = min(warmup, total // 5)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def seed_step(seed: int, step: int, process: int) -> None:
    """Let everything random in a step depend on these numbers alone, in all libraries."""
    number = int(np.random.SeedSequence([seed, step, process]).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Keys of nested settings, joined by dots, whose values differ."""
    found = []
    for key in sorted({*before, *now}):
        one, other = before.get(key), now.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += differences(one, other, f"{prefix}{key}.")
        elif one != other:
            found.append(prefix + key)
    return found
