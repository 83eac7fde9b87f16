"""Whether a measured quantity grows: least squares with a confidence interval."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Slope:
    """Change of y for each unit of x, and the 95 % confidence interval of it."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Slope:
        """The same for another unit of x."""
        return Slope(self.value * factor, self.low * factor, self.high * factor)


def fit(xs: Sequence[float], ys: Sequence[float]) -> Slope:
    """Ordinary least squares; the interval takes deviations for independent. Raises ``ValueError`` under 3 points."""
    if len(xs) < 3 or min(xs) == max(xs):
        raise ValueError("a slope needs three points at different places")
    x, y = np.asarray(xs, np.float64), np.asarray(ys, np.float64)
    slope, intercept = np.polyfit(x, y, 1)
    freedom = len(x) - 2
    spread = math.sqrt(float(np.sum((y - slope * x - intercept) ** 2)) / freedom)
    error = spread / math.sqrt(float(np.sum((x - x.mean()) ** 2)))
    margin = t_quantile(0.975, freedom) * error
    return Slope(float(slope), float(slope) - margin, float(slope) + margin)


def t_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t distribution.

    By the expansion in 1/n of Abramowitz and Stegun 26.7.5, exact for 1 and 2 degrees of freedom.
    """
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z = statistics.NormalDist().inv_cdf(p)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def block_medians(xs: Sequence[float], ys: Sequence[float], blocks: int) -> tuple[list[float], list[float]]:
    """Medians of so many consecutive stretches: neighbours depend on each other, stretches hardly do."""
    edges = np.linspace(0, len(xs), min(blocks, len(xs)) + 1).astype(int)
    pairs = [(begin, end) for begin, end in itertools.pairwise(edges.tolist()) if end > begin]
    return (
        [statistics.median(xs[begin:end]) for begin, end in pairs],
        [statistics.median(ys[begin:end]) for begin, end in pairs],
    )
