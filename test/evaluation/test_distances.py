"""Fréchet and kernel distance on sets whose distance is known in closed form."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from valle.evaluation import distances
from valle.evaluation.distances import KERNEL_SCALE, frechet_distance, kernel_distance

CORNERS = np.array(
    [[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]
)  # mean 0, covariance 4/3 of the identity


def gaussian(seed: int, rows: int, width: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return shift + scale * np.random.default_rng(seed).standard_normal((rows, width))


def test_frechet_distance_of_known_means_and_covariances():
    assert frechet_distance(CORNERS, CORNERS + [3.0, 4.0]) == pytest.approx(25.0)  # the squared shift alone
    # Twice as wide: each of two standard deviations goes from s to 2 s, and s² = 4/3.
    assert frechet_distance(CORNERS, 2 * CORNERS) == pytest.approx(2 * 4 / 3)
    assert frechet_distance(CORNERS, 2 * CORNERS + [3.0, 4.0]) == pytest.approx(25.0 + 8 / 3)
    # All in one point: the whole spread counts.
    assert frechet_distance(CORNERS, np.zeros((5, 2))) == pytest.approx(8 / 3)


def test_frechet_distance_is_the_published_formula():
    mixing = np.random.default_rng(0).standard_normal((6, 6))
    a, b = gaussian(1, 80, 6) @ mixing, gaussian(2, 50, 6, shift=0.3)
    covariances = [np.cov(rows, rowvar=False) for rows in (a, b)]
    root = np.trace(sqrtm(covariances[0] @ covariances[1])).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + sum(map(np.trace, covariances)) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rows", [4, 300])  # fewer and more than dimensions
def test_a_set_and_itself_are_at_distance_0(rows):
    a = gaussian(0, rows, 32, shift=5.0, scale=3.0)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(a, a[::-1]) == pytest.approx(0.0, abs=1e-9)
    assert kernel_distance(a, a) == pytest.approx(0.0, abs=1e-6)


def test_both_grow_with_the_shift_and_with_the_spread():
    a = gaussian(0, 200, 16)
    for distance in (frechet_distance, kernel_distance):
        by_shift = [distance(a, gaussian(1, 200, 16, shift=shift)) for shift in (0.0, 0.5, 1.0, 2.0)]
        by_scale = [distance(a, gaussian(1, 200, 16, scale=scale)) for scale in (1.0, 1.5, 2.0, 3.0)]
        assert by_shift == sorted(by_shift) and by_scale == sorted(by_scale)
        assert by_shift[1] > by_shift[0] + 0.1 and by_scale[1] > by_scale[0] + 0.1


def test_kernel_distance_by_hand():
    # D = 1: kernel (x y + 1)³. Within {0, 2} 1, within {1, 1, 1} 8, across 1 three times and 27 three times.
    a, b = np.array([[0.0], [2.0]]), np.ones((3, 1))
    assert kernel_distance(a, b) == pytest.approx(KERNEL_SCALE * (1 + 8 - 2 * (1 * 3 + 27 * 3) / 6))
    # As many rows: pairs of equal index are left out. Across {0, 2} and {1, 3}: 0 with 3 gives 1, 2 with 1 gives 27.
    b = np.array([[1.0], [3.0]])
    assert kernel_distance(a, b) == pytest.approx(KERNEL_SCALE * (1 + 64 - 2 * (1 + 27) / 2))


def test_kernel_distance_of_one_kind_is_0_in_the_mean_for_any_size():
    for rows, others in ((4, 4), (4, 9), (30, 30)):
        values = [
            kernel_distance(gaussian(seed, rows, 4), gaussian(1000 + seed, others, 4)) for seed in range(400)
        ]
        error = np.std(values) / np.sqrt(len(values))
        assert abs(np.mean(values)) < 4 * error
        assert min(values) < 0 < max(values)
    # which the Fréchet distance is not: of fewer rows it is larger
    small, large = (frechet_distance(gaussian(0, n, 8), gaussian(1, n, 8)) for n in (10, 1000))
    assert small > 10 * large > 0


def test_kernel_distance_does_not_depend_on_the_blocks(monkeypatch):
    a, b, c = gaussian(0, 50, 8), gaussian(1, 50, 8, shift=1.0), gaussian(2, 31, 8)
    whole = kernel_distance(a, b), kernel_distance(a, c)
    monkeypatch.setattr(distances, "BLOCK", 7)
    assert (kernel_distance(a, b), kernel_distance(a, c)) == pytest.approx(whole)


def test_what_is_no_pair_of_sets_is_refused():
    good = np.zeros((3, 4))
    for bad in (np.zeros((3, 5)), np.zeros(4), np.zeros((1, 4)), np.full((3, 4), np.nan)):
        for distance in (frechet_distance, kernel_distance):
            with pytest.raises(ValueError, match="embeddings"):
                distance(good, bad)
            with pytest.raises(ValueError, match="embeddings"):
                distance(bad, good)
