"""Means and bootstrap intervals."""

import numpy as np
import pytest

from valle.evaluation.statistics import bootstrap_ci


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
