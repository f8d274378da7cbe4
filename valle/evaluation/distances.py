"""How far one set of sounds is from another, with no sound compared to a certain other one: on their embeddings.

Both distances take one row a window of audio (`embeddings.py`), as many windows as there are.

- Fréchet distance (Heusel et al., arXiv 1706.08500, equation 6; of audio: Kilgour et al., arXiv 1812.08466): between
  two normal distributions with the sets' means and covariances. 0 is identical. It is in the square of the embedding's
  unit, and too large for small sets: compare it only between sets of equal size.
- Kernel distance (Bińkowski et al., arXiv 1801.01401, section 4; of audio: Chung et al., arXiv 2502.15602): the squared
  maximum mean discrepancy with the kernel (x·y / D + 1)³, times 1000. Its expectation does not depend on the number of
  windows and is 0 for two sets of one kind; so it is sometimes a little below 0.

Both depend on the scale of the embedding: figures of different embeddings do not compare.
"""

import numpy as np

KERNEL_DEGREE = 3
KERNEL_SCALE = 1000.0  # the figure for squared discrepancy 1, as tables of the field print it
BLOCK = 2048  # rows whose kernel values are held at a time


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two sets of embeddings: |mean difference|² + tr(A + B - 2 (A B)^½) of their covariances.

    Args:
        a: (n, D), n at least 2.
        b: (m, D), m at least 2.

    Returns:
        0 for equal sets; never below.

    Raises:
        ValueError: other shapes, or values that are not finite.
    """
    one, two = _checked(a, b)
    shift = one.mean(axis=0) - two.mean(axis=0)
    # With A = X'X for the scaled, centred rows X, and B = Y'Y, the trace of (A B)^½ is the sum of the singular values
    # of X Y'. That needs no root of a matrix that is singular where there are fewer windows than dimensions.
    roots = [_triangle(rows) for rows in (one, two)]  # (k, D), k = min(n, D)
    overlap = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    spread = sum(float((root**2).sum()) for root in roots)
    return max(0.0, float(shift @ shift + spread - 2.0 * overlap))


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of two sets of embeddings, times `KERNEL_SCALE`.

    Where both sets have as many rows, row i of one is not compared with row i of the other (Gretton et al., JMLR 13,
    2012, equation 4; otherwise equation 3). That stays unbiased where the two rows belong together, as a window and its
    resynthesis, and it is exactly 0 for a set and itself.

    Args:
        a: (n, D), n at least 2.
        b: (m, D), m at least 2.

    Raises:
        ValueError: other shapes, or values that are not finite.
    """
    one, two = _checked(a, b)
    n, m = len(one), len(two)
    within = _kernel_sum(one, one, diagonal=False) / (n * (n - 1))
    within += _kernel_sum(two, two, diagonal=False) / (m * (m - 1))
    across = _kernel_sum(one, two, diagonal=n != m) / (n * m if n != m else n * (n - 1))
    return KERNEL_SCALE * (within - 2.0 * across)


def _checked(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    one, two = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if one.ndim != 2 or two.ndim != 2 or one.shape[1] != two.shape[1] or min(len(one), len(two)) < 2:
        raise ValueError(
            f"embeddings of shapes {one.shape} and {two.shape}, expected (n, D) and (m, D), n, m >= 2"
        )
    if not (np.isfinite(one).all() and np.isfinite(two).all()):
        raise ValueError("embeddings that are not finite")
    return one, two


def _triangle(rows: np.ndarray) -> np.ndarray:
    """(n, D) -> R of (k, D) with R'R the covariance."""
    centred = (rows - rows.mean(axis=0)) / np.sqrt(len(rows) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r"))


def _kernel_sum(one: np.ndarray, two: np.ndarray, diagonal: bool) -> float:
    """Sum of the kernel over all pairs; without those of equal index, unless `diagonal`."""
    width = one.shape[1]
    total = 0.0
    for start in range(0, len(one), BLOCK):
        values = (one[start : start + BLOCK] @ two.T / width + 1.0) ** KERNEL_DEGREE
        total += float(values.sum())
        if not diagonal:
            total -= float(np.diagonal(values, offset=start).sum())
    return total
