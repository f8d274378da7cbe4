"""Means and bootstrap intervals."""

import numpy as np
import pytest

from valle.evaluation.statistics import (
    bootstrap_ci,
    jackknife,
    jackknife_ci,
    left_out,
    nested_ci,
    resampled_means,
)


def test_weighted_mean_and_repeatable_interval():
    first = bootstrap_ci([1.0, 2.0, 6.0], seed=3, weights=[2, 1, 1])
    assert first.mean == pytest.approx(2.5)
    assert first.low < 2.5 < first.high
    assert first == bootstrap_ci([1.0, 2.0, 6.0], seed=3, weights=[2, 1, 1])


def test_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        interval = bootstrap_ci(generator.normal(1.0, 2.0, size=40), seed=trial, num_samples=400)
        covered += interval.low <= 1.0 <= interval.high
    assert (
        180 <= covered <= 198
    )  # 95 % of 200 is 190; the percentile interval of 40 values covers a little less


def test_interval_shrinks_with_more_values():
    values = np.random.default_rng(0).normal(size=400)
    assert bootstrap_ci(values, seed=0) != bootstrap_ci(values, seed=1)
    few, many = bootstrap_ci(values[:20], seed=0), bootstrap_ci(values, seed=0)
    assert many.high - many.low < 0.5 * (few.high - few.low)


def test_equal_values_have_no_spread_and_one_value_no_interval():
    equal = bootstrap_ci([0.3] * 5, seed=0)
    assert (equal.mean, equal.low, equal.high) == pytest.approx((0.3, 0.3, 0.3))
    assert bootstrap_ci([0.3], seed=0).to_dict() == {"mean": 0.3, "low": None, "high": None, "count": 1}


@pytest.mark.parametrize(
    "values, weights", [([], None), ([1.0, np.nan], None), ([1.0], [1.0, 2.0]), ([1.0], [0.0])]
)
def test_what_has_no_mean_is_an_error(values, weights):
    with pytest.raises(ValueError):
        bootstrap_ci(values, seed=0, weights=weights)


def test_seeds_of_a_cut_are_no_more_cuts():
    generator = np.random.default_rng(0)
    cuts = generator.normal(size=30)
    once = nested_ci([[value] for value in cuts], seed=0)
    copied = nested_ci([[value] * 20 for value in cuts], seed=0)
    assert copied.high - copied.low == pytest.approx(once.high - once.low, rel=0.1)
    assert once.mean == pytest.approx(cuts.mean()) and copied.count == 30
    # With seeds that differ the interval is wider, and more seeds make it narrower again.
    few = nested_ci([[value - 3, value + 3] for value in cuts], seed=0)
    many = nested_ci([[value - 3, value + 3] * 10 for value in cuts], seed=0)
    assert few.high - few.low > 1.5 * (once.high - once.low) > many.high - many.low > 0


def test_cuts_with_unequal_numbers_of_seeds_count_the_same():
    assert nested_ci([[1.0], [2.0, 4.0]], seed=0).mean == pytest.approx(2.0)
    means = resampled_means([[1.0], [3.0, 3.0]], seed=0, weights=[1, 3])
    assert set(np.round(means, 6)) == {1.0, 2.5, 3.0}
    with pytest.raises(ValueError, match="one value or more"):
        resampled_means([[1.0], []], seed=0)


def test_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(1).normal(size=10)
    whole, without = jackknife(lambda rows: float(values[rows].mean()), 10)
    interval = jackknife_ci(whole, without, 10)
    error = values.std(ddof=1) / np.sqrt(10)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * 1.959964 * error)
    assert sorted(sum(left_out(23), [])) == list(range(23)) and len(left_out(23)) == 10


def test_too_few_cuts_give_no_jackknife():
    assert jackknife(lambda rows: 1.0, 2) == (1.0, [])
    assert jackknife_ci(1.0, [], 2).low is None
