"""Whether a difference between two sets of seeds is more than chance."""

import math
from dataclasses import dataclass
from statistics import mean, stdev, variance

import mpmath

# The track's bar for a new record: better by so many nats a token, at such a p (README of the challenge).
MARGIN_NATS = 0.005
SIGNIFICANCE = 0.01


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) of a figure over seeds; std is None for a single seed."""

    mean: float
    std: float | None


def spread(values: list[float]) -> Spread:
    """Mean and deviation of at least one value."""
    return Spread(mean(values), stdev(values) if len(values) > 1 else None)


def welch(lower: list[float], higher: list[float], margin: float = 0.0) -> float:
    """One-sided p of Welch's t-test: the chance of such samples if `lower` is not below `higher` by over `margin`.

    Both need two values. Source: Welch (1947), Biometrika 34; degrees of freedom by Satterthwaite (1946).
    """
    gap = mean(higher) - mean(lower) - margin
    errors = [variance(sample) / len(sample) for sample in (lower, higher)]
    if sum(errors) == 0:
        return 0.0 if gap > 0 else 1.0
    freedom = sum(errors) ** 2 / sum(
        error**2 / (len(sample) - 1) for error, sample in zip(errors, (lower, higher), strict=True)
    )
    return _student_tail(gap / math.sqrt(sum(errors)), freedom)


def _student_tail(t: float, freedom: float) -> float:
    """P(T > t) of Student's distribution, by the regularized incomplete beta function."""
    beyond = float(mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True)) / 2
    return beyond if t > 0 else 1 - beyond
