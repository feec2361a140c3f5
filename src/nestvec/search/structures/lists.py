"""Inverted lists: full-size centroids, and in each list the codes of its rows, one after the other.

The cheapest structure to build and to hold: a short prefix of each row stays in memory, about
``dim + 4`` bytes, and full vectors are read from disk for the shortlist alone. Centroids at full
size pick better lists than centroids of prefixes do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec._extras import require
from nestvec.search import kernels
from nestvec.search.structures.codes import Codes, encode, scale_of

_SAMPLE_PER_LIST = 48  # rows that k-means sees for each centroid
_ROWS_AT_ONCE = 16_384


def usual_n_lists(n: int) -> int:
    """Return the power of two up to 4 times the root of ``n``: 512 of 50,000, 4096 of a million."""
    return 1 << int(np.log2(4.1 * np.sqrt(max(1, n))))


def centroids(vectors: NDArray[np.float32], n_lists: int, *, seed: int = 0) -> NDArray[np.float32]:
    """Return ``n_lists`` L2-normalised centroids (k-means on a sample), (n_lists, dim) float32."""
    faiss = require("faiss", extra="index", why="building inverted lists")
    n_sample = min(len(vectors), n_lists * _SAMPLE_PER_LIST)
    rows = np.random.default_rng(seed).choice(len(vectors), n_sample, replace=False)
    sample = np.ascontiguousarray(vectors[np.sort(rows)], dtype=np.float32)
    means = faiss.Kmeans(
        vectors.shape[1],
        n_lists,
        niter=10,
        spherical=True,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=_SAMPLE_PER_LIST,
    )
    means.train(sample)
    return np.asarray(means.centroids, np.float32)


def assign(
    vectors: NDArray[np.float32],
    centroids: NDArray[np.float32],
    *,
    progress: Callable[[int], object] | None = None,
) -> NDArray[np.int32]:
    """Return the list of each row: the centroid with the largest inner product, (n,) int32."""
    faiss = require("faiss", extra="index", why="building inverted lists")
    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids))
    out = np.empty(len(vectors), np.int32)
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        rows = np.ascontiguousarray(vectors[start : start + _ROWS_AT_ONCE], dtype=np.float32)
        out[start : start + len(rows)] = index.search(rows, 1)[1][:, 0]
        if progress is not None:
            progress(len(rows))
    return out


class Lists:
    """Centroids and the order of the rows by list. Several threads may search it."""

    def __init__(self, arrays: dict[str, NDArray[Any]]) -> None:
        self.starts, self.numbers = arrays["starts"], arrays["numbers"]
        means = arrays["centroids"]
        # The choice of lists needs no more than codes, which read a quarter of the bytes.
        scale = scale_of(means, means.shape[1])
        self._means = Codes(np.empty((len(means), -(-means.shape[1] // 32) * 32), np.uint8), scale)
        encode(means, scale, self._means.values)

    @property
    def n_lists(self) -> int:
        return len(self.starts) - 1

    @staticmethod
    def order(lists: NDArray[np.int32], n_lists: int) -> dict[str, NDArray[Any]]:
        """Return ``starts`` (n_lists + 1,) int64 and ``numbers`` (n,) int32, rows by list."""
        numbers = np.argsort(lists, kind="stable").astype(np.int32)
        starts = np.zeros(n_lists + 1, np.int64)
        np.cumsum(np.bincount(lists, minlength=n_lists), out=starts[1:])
        return {"starts": starts, "numbers": numbers}

    def search(
        self,
        codes: Codes,
        queries: NDArray[np.float32],
        keep: int,
        probes: int,
        alive: NDArray[np.bool_],
    ) -> NDArray[np.int32]:
        """Return the ``keep`` best rows of the nearest ``probes`` lists, (m, keep), best first.

        ``codes`` are in the order of ``numbers``.
        """
        m, probes = len(queries), min(probes, self.n_lists)
        chosen = np.empty((m, probes), np.int32)
        scores = np.empty((m, probes), np.int32)
        everyone = np.empty(0, np.bool_)
        kernels.scan(self._means.values, self._means.queries(queries), everyone, scores, chosen)
        rows = np.empty((m, keep), np.int32)
        scores = np.empty((m, keep), np.int32)
        kernels.scan_lists(
            codes.values,
            self.starts,
            self.numbers,
            chosen,
            codes.queries(queries),
            alive,
            scores,
            rows,
        )
        return rows
