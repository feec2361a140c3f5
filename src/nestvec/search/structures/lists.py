"""Inverted lists: full-size centroids, and in each list the codes of its rows, one after the other.

The cheapest structure to build and to hold: a short prefix of each row stays in memory, about
``dim + 4`` bytes, and full vectors are read from disk for the shortlist alone. Centroids at full
size pick better lists than centroids of prefixes do, and are found by way of prefixes: k-means runs
on the principal dims that hold most of the energy, and a row's list is the best at full size of
those that are best on such dims.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec._atomic import written_beside
from nestvec._extras import require
from nestvec.search import kernels
from nestvec.search.structures.codes import Codes, encode, padded, scale_of, unit_prefixes

_SAMPLE_PER_LIST = 40  # rows that k-means sees for each centroid
_ROWS_AT_ONCE = 65_536
_STRETCH = 64  # neighbouring rows that are drawn together
_ENERGY = 0.75  # of the rows, on which k-means runs
_ENERGY_OF_MEANS = 0.85  # by which the lists of a row are chosen that are compared at full size
_COMPARED = 16


def usual_n_lists(n: int) -> int:
    """Return the power of two up to 4 times the root of ``n``: 512 of 50,000, 4096 of a million."""
    return 1 << int(np.log2(4.1 * np.sqrt(max(1, n))))


def build(
    rows_between: Callable[[int, int], NDArray[np.float32]],
    n: int,
    part: Path | None = None,
    *,
    n_lists: int | None = None,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> dict[str, NDArray[Any]]:
    """Cluster ``n`` L2-normalised vectors, read by ``rows_between(start, end)``, into lists.

    What is done is kept in the folder ``part``, if there is one, where a build that was interrupted
    goes on.

    Returns
    -------
    dict
        ``centroids`` (n_lists, dim) float32, L2-normalised; ``numbers`` (n,) int32, the rows by
        list; ``starts`` (n_lists + 1,) int64, where each list begins.
    """
    wanted = min(n, n_lists or usual_n_lists(n))
    means = _kept(part, f"centroids-{wanted}-{seed}")
    if means is None:
        means = _centroids(rows_between, n, wanted, seed)
        _keep(part, f"centroids-{wanted}-{seed}", means)
    nearest = _nearest(means)
    lists = np.empty(n, np.int32)
    for start in range(0, n, _ROWS_AT_ONCE):
        end = min(start + _ROWS_AT_ONCE, n)
        found = _kept(part, f"lists-{wanted}-{seed}-{start}")
        if found is None or len(found) != end - start:
            found = nearest(rows_between(start, end))
            _keep(part, f"lists-{wanted}-{seed}-{start}", found)
        lists[start:end] = found
        if progress is not None:
            progress(end - start)
    starts = np.zeros(wanted + 1, np.int64)
    np.cumsum(np.bincount(lists, minlength=wanted), out=starts[1:])
    numbers = np.argsort(lists, kind="stable").astype(np.int32)
    return {"centroids": means, "numbers": numbers, "starts": starts}


def _centroids(
    rows_between: Callable[[int, int], NDArray[np.float32]], n: int, n_lists: int, seed: int
) -> NDArray[np.float32]:
    """K-means on a sample of stretches of rows, which a disk reads better than single ones."""
    faiss = require("faiss", extra="index", why="building inverted lists")
    stretches = np.arange(0, n, _STRETCH)
    wanted = -(-min(n, n_lists * _SAMPLE_PER_LIST) // _STRETCH)
    chosen = np.random.default_rng(seed).choice(stretches, min(wanted, len(stretches)), False)
    sample = np.concatenate(
        [rows_between(s, min(s + _STRETCH, n)) for s in np.sort(chosen).tolist()]
    )
    n_lists = min(n_lists, len(sample))
    short = np.ascontiguousarray(sample @ _axes(sample, _ENERGY).T)
    roughly = faiss.Kmeans(
        short.shape[1],
        n_lists,
        niter=8,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=2 * _SAMPLE_PER_LIST,
    )
    roughly.train(short)
    means = _means(sample, roughly.assign(short)[1], n_lists, seed)
    return _means(sample, _nearest(means)(sample), n_lists, seed)


def _axes(rows: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    """Return the principal directions that hold a share of the energy of rows, (dims, dim)."""
    energy, axes = np.linalg.eigh((rows.T @ rows).astype(np.float64))
    held = np.cumsum(energy[::-1])
    dims = int(np.searchsorted(held, share * held[-1])) + 1
    return np.ascontiguousarray(axes[:, ::-1].T[:dims], np.float32)


def _nearest(
    means: NDArray[np.float32],
) -> Callable[[NDArray[np.float32]], NDArray[np.int32]]:
    """Return what finds the centroid (k, dim) with the largest product with each row (m, dim)."""
    faiss = require("faiss", extra="index", why="building inverted lists")
    dim = means.shape[1]
    axes = _axes(means, _ENERGY_OF_MEANS)
    turn = faiss.LinearTransform(dim, len(axes), False)
    faiss.copy_array_to_vector(axes.ravel(), turn.A)
    turn.is_trained = True
    short = faiss.IndexPreTransform(turn, faiss.IndexFlatIP(len(axes)))
    index = faiss.IndexRefineFlat(short)
    index.add(means)
    index.k_factor = min(_COMPARED, len(means))
    return lambda rows: index.search(rows, 1)[1][:, 0].astype(np.int32)


def _means(
    rows: NDArray[np.float32], lists: NDArray[Any], n_lists: int, seed: int
) -> NDArray[np.float32]:
    """Return the L2-normalised mean of each list; of one without rows, some row."""
    counts = np.bincount(lists, minlength=n_lists)
    order = np.argsort(lists, kind="stable")
    some = counts > 0
    starts = (np.cumsum(counts) - counts)[some]
    sums = rows[np.random.default_rng(seed).choice(len(rows), n_lists, replace=False)]
    sums[some] = np.add.reduceat(rows[order], starts)
    return unit_prefixes(sums)


def _kept(part: Path | None, name: str) -> NDArray[Any] | None:
    if part is None:
        return None
    try:
        return np.load(part / f"{name}.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None


def _keep(part: Path | None, name: str, array: NDArray[Any]) -> None:
    if part is None:
        return
    with (  # it only saves time
        contextlib.suppress(OSError),
        written_beside(part / f"{name}.npy") as scratch,
        scratch.open("wb") as file,
    ):
        np.save(file, array, allow_pickle=False)


class Lists:
    """Centroids and the order of the rows by list. Several threads may search it."""

    def __init__(self, arrays: dict[str, NDArray[Any]]) -> None:
        self.starts, self.numbers = arrays["starts"], arrays["numbers"]
        means = arrays["centroids"]
        # The choice of lists needs no more than codes, which read a quarter of the bytes.
        scale = scale_of(means, means.shape[1])
        self.means = Codes(np.empty((len(means), padded(means.shape[1])), np.uint8), scale)
        encode(means, scale, self.means.values)

    @functools.cached_property
    def places(self) -> NDArray[np.int32]:
        """Where each row stands in the order of the lists, (n,); made when it is asked for."""
        found = np.empty(len(self.numbers), np.int32)
        found[self.numbers] = np.arange(len(found), dtype=np.int32)
        return found

    @property
    def n_lists(self) -> int:
        return len(self.starts) - 1

    @property
    def nbytes(self) -> int:
        known = self.__dict__.get("places")
        places = 0 if known is None else known.nbytes
        return self.starts.nbytes + self.numbers.nbytes + self.means.nbytes + places

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
        kernels.scan(self.means.values, self.means.queries(queries), everyone, scores, chosen)
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
