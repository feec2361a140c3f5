"""What can be said of embeddings without a label: neighbours kept, rank, distortion, spectrum."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nestvec.measurement.nearest import nearest

Matrix = NDArray[np.float32]
Rows = NDArray[np.int64]

GROUPS = 20  # of rows, left out one after the other for the interval of RankMe
_T_95 = 2.093  # Student's t, 19 degrees of freedom, two-sided 95%
_ROWS_AT_ONCE = 8192


def neighbours(queries: Matrix, gallery: Matrix, k: int, *, own: Rows | None = None) -> Rows:
    """Return the k nearest gallery rows of each query, (n_queries, k), by inner product.

    ``own`` (n_queries,) names the gallery row that is the query itself; it is left out.
    """
    if own is None:
        return nearest(queries, gallery, k)
    k = min(k, len(gallery) - 1)
    rows = nearest(queries, gallery, k + 1)
    keep = rows != own[:, None]
    keep[keep.all(axis=1), -1] = False  # with duplicates its own row may be beyond k + 1
    return rows[keep].reshape(len(rows), k)


def neighbour_recall(truth: Rows, found: Rows) -> NDArray[np.float64]:
    """Return, per query, the share of ``truth`` (n_queries, k) that is in ``found``."""
    return (truth[:, :, None] == found[:, None, :]).any(axis=2).mean(axis=1)


def pair_similarity(queries: Matrix, gallery: Matrix, partners: Rows) -> Matrix:
    """Return the inner products of each query with its ``partners`` (n_queries, m)."""
    out = np.empty(partners.shape, np.float32)
    for start in range(0, len(queries), 512):
        at = slice(start, start + 512)
        out[at] = np.einsum("qd,qmd->qm", queries[at], gallery[partners[at]])
    return out


def gram(matrix: Matrix) -> NDArray[np.float64]:
    """Return ``matrix.T @ matrix`` (dim, dim), summed in float64."""
    total = np.zeros((matrix.shape[1], matrix.shape[1]))
    for start in range(0, len(matrix), _ROWS_AT_ONCE):
        block = matrix[start : start + _ROWS_AT_ONCE].astype(np.float64)
        total += block.T @ block
    return total


def spectrum(matrix: Matrix) -> NDArray[np.float64]:
    """Return the eigenvalues of the uncentred second moment, falling, as shares that sum to 1."""
    values = np.linalg.eigvalsh(gram(matrix))[::-1].clip(min=0)
    return values / values.sum()


def rankme(matrix: Matrix) -> float:
    """Return RankMe, the effective rank of ``matrix`` (n, dim): between 1 and min(n, dim).

    Variant: rows as they are (not centred), singular values (not their squares),
    ``p = sigma / sum(sigma) + 1e-7``, ``exp(-sum(p ln p))``. The singular values come from the
    dim x dim Gram matrix in float64.

    References
    ----------
    Garrido et al., RankMe, ICML 2023, arXiv:2210.02885.
    """
    return _rankme_of_gram(gram(matrix))


def _rankme_of_gram(moments: NDArray[np.float64]) -> float:
    sigma = np.sqrt(np.linalg.eigvalsh(moments).clip(min=0))
    p = sigma / sigma.sum() + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


def rankme_left_out(matrix: Matrix, *, seed: int) -> NDArray[np.float64]:
    """Return RankMe of all rows, then without each of 20 random groups of rows: (21,)."""
    order = np.random.default_rng(seed).permutation(len(matrix))
    groups = [gram(matrix[np.sort(rows)]) for rows in np.array_split(order, GROUPS)]
    total = np.sum(groups, axis=0)
    return np.array([_rankme_of_gram(total)] + [_rankme_of_gram(total - g) for g in groups])


def jackknife(left_out: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return value, low, high of an estimate followed by its leave-one-group-out repeats.

    A bootstrap draws rows twice, and a repeated row adds no rank, so it would be biased here.

    References
    ----------
    Efron and Tibshirani 1993, chapter 11: the grouped (delete-d) jackknife.
    """
    value, repeats = float(left_out[0]), left_out[1:]
    spread = (len(repeats) - 1) / len(repeats) * ((repeats - repeats.mean()) ** 2).sum()
    half = _T_95 * float(np.sqrt(spread))
    return value, value - half, value + half
