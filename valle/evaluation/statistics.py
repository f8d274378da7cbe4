"""Averages with intervals: every figure of the evaluation is a mean over cuts or clips with a bootstrap interval.

The cut is the unit that is drawn again: frames of one recording are not independent. Where a model continued a cut
several times, cuts are drawn first, then as many of each one's continuations as it has. Source: Efron & Tibshirani,
"An Introduction to the Bootstrap" (1993), chapters 8 (several levels), 11 (jackknife), 13 (percentile intervals).
"""

from collections.abc import Callable, Sequence
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


def resampled_means(
    values: Sequence[Sequence[float]],
    seed: int,
    weights: Sequence[float] | np.ndarray | None = None,
    num_samples: int = 2000,
) -> np.ndarray:
    """Means of resamples over cuts and, inside each drawn cut, over its seeds.

    Args:
        values: a cut's values, one a seed, for each cut; at least one each.
        seed: seed of the resampling.
        weights: (n,) weight of each cut; None weighs all the same.
        num_samples: resamples.

    Returns:
        (num_samples,).
    """
    if not values or not all(len(part) for part in values):
        raise ValueError("expected one value or more of each of one cut or more")
    counts = np.array([len(part) for part in values])
    table = np.zeros((len(values), counts.max()))
    for row, part in enumerate(values):
        table[row, : len(part)] = part
    weight = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    generator = np.random.default_rng(seed)
    slots = np.arange(counts.max())
    means = np.empty(num_samples)
    at_once = max(1, 2_000_000 // table.size)
    for start in range(0, num_samples, at_once):
        size = min(at_once, num_samples - start)
        cuts = generator.integers(0, len(values), size=(size, len(values)))  # (b, n)
        draws = generator.random((size, *table.shape)) * counts[cuts][..., None]  # (b, n, m)
        picked = table[cuts[..., None], draws.astype(np.int64)]
        inside = slots < counts[cuts][..., None]
        of_cut = (picked * inside).sum(axis=2) / counts[cuts]
        sampled = weight[cuts]
        means[start : start + size] = (of_cut * sampled).sum(axis=1) / np.maximum(sampled.sum(axis=1), 1e-12)
    return means


def nested_ci(values: Sequence[Sequence[float]], seed: int, level: float = 0.95) -> Interval:
    """Mean over cuts of each cut's mean over seeds, with a percentile bootstrap interval over both.

    Args:
        values: a cut's values, one a seed, for each cut.
        seed: seed of the resampling.
        level: coverage of the interval.

    Returns:
        With the number of cuts as count.
    """
    mean = float(np.mean([np.mean(part) for part in values]))
    if len(values) < 2:
        return Interval(mean, None, None, len(values))
    low, high = np.quantile(resampled_means(values, seed), [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), len(values))


NORMAL_95 = 1.959964  # standard errors on either side that hold 95 %


def left_out(number: int, groups: int = 10) -> list[list[int]]:
    """Indices 0 … number - 1 in at most so many groups of about equal size, as `jackknife_ci` leaves them out."""
    return [part.tolist() for part in np.array_split(np.arange(number), min(groups, number))]


def jackknife_ci(whole: float, without: Sequence[float], count: int) -> Interval:
    """A figure that is no mean, such as a distance of two sets, with its delete-a-group jackknife interval.

    A bootstrap would draw cuts twice, which makes a set look smaller than it is and so moves such a distance.

    Args:
        whole: the figure of all cuts.
        without: the figure without each group of cuts.
        count: number of cuts.
    """
    if len(without) < 2:
        return Interval(whole, None, None, count)
    values = np.asarray(without)
    error = np.sqrt((len(values) - 1) / len(values) * np.square(values - values.mean()).sum())
    return Interval(whole, float(whole - NORMAL_95 * error), float(whole + NORMAL_95 * error), count)


def jackknife(figure: Callable[[list[int]], float], number: int) -> tuple[float, list[float]]:
    """A figure of cuts 0 … number - 1, and without each group of `left_out`."""
    everything = list(range(number))
    groups = left_out(number)
    if len(groups) < 3:  # too few cuts to leave some out
        return figure(everything), []
    return figure(everything), [figure([i for i in everything if i not in set(group)]) for group in groups]
