"""Exact nearest rows for every kind of candidate, sparse codes among them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nestvec.search.exact import top_k

Matrix = NDArray[np.float32]
Rows = NDArray[np.int64]

_SPARSE = 1 / 8  # share of nonzeros below which a sparse product is the cheaper one
_SCORES_AT_ONCE = 1 << 23


def nearest(queries: Matrix, gallery: Matrix, k: int) -> Rows:
    """Return the k rows of largest inner product, (n_queries, k), ties to the lower row.

    `nestvec.search.exact.top_k` looks again, in float64, at every row that might be among the k.
    Where most rows score exactly 0, as sparse codes do, that is every row; so those are
    multiplied as sparse matrices and sorted.
    """
    if np.count_nonzero(gallery) > _SPARSE * gallery.size:
        return top_k(queries, gallery, k)[0]
    from scipy.sparse import csr_array

    stored = csr_array(gallery).T.tocsr()
    k = min(k, len(gallery))
    rows = np.empty((len(queries), k), np.int64)
    step = max(1, _SCORES_AT_ONCE // len(gallery))
    for start in range(0, len(queries), step):
        scores = (csr_array(queries[start : start + step]) @ stored).toarray()
        rows[start : start + step] = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return rows
