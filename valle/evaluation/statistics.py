"""Averages with intervals: every figure of the evaluation is a mean over cuts or clips with a bootstrap interval.

The cut is the unit that is drawn again: frames of one recording are not independent. Source: Efron & Tibshirani,
"An Introduction to the Bootstrap" (1993), chapter 13 (percentile intervals).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its interval; the bounds are None where one value allows no interval."""

    mean: float
    low: float | None
    high: float | None
    count: int

    def to_dict(self) -> dict[str, float | int | None]:
        """As it stands in `results.json`."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "count": self.count}


def bootstrap_ci(
    values: Sequence[float] | np.ndarray,
    seed: int,
    weights: Sequence[float] | np.ndarray | None = None,
    num_samples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Mean over cuts with a percentile bootstrap interval.

    Args:
        values: (n,) one value per cut; for a paired comparison, the differences.
        seed: seed of the resampling; equal seeds give equal intervals.
        weights: (n,) weight of each cut, e.g. its frames, for a mean per frame; None weighs all the same.
        num_samples: resamples.
        level: coverage of the interval, 0 to 1.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    data = np.asarray(values, dtype=np.float64)
    weight = np.ones_like(data) if weights is None else np.asarray(weights, dtype=np.float64)
    if data.ndim != 1 or data.size == 0 or data.shape != weight.shape:
        raise ValueError(
            f"expected one value and one weight per cut, found shapes {data.shape} and {weight.shape}"
        )
    if not np.isfinite(data).all() or weight.sum() <= 0:
        raise ValueError("values must be finite and weights must not sum to zero")
    mean = float((data * weight).sum() / weight.sum())
    if data.size < 2:
        return Interval(mean, None, None, data.size)
    picks = np.random.default_rng(seed).integers(0, data.size, size=(num_samples, data.size))
    sampled_weight = weight[picks]  # (num_samples, n)
    means = (data[picks] * sampled_weight).sum(axis=1) / np.maximum(sampled_weight.sum(axis=1), 1e-12)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), data.size)
