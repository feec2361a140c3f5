"""A navigable graph: built at full precision by faiss, walked on one-byte codes by our kernel.

HNSW (Malkov and Yashunin, arXiv:1603.09320) spends its time waiting for memory. The walk here
reads a quarter of the bytes (codes in place of float32) and asks for them ahead of time; a rerank
by full vectors then puts the shortlist in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec._extras import require
from nestvec.search import kernels
from nestvec.search.structures.codes import Codes

Arrays = dict[str, NDArray[Any]]

NEIGHBOURS = 32  # of a row on the upper levels; twice as many on the ground
EF_CONSTRUCTION = 80
_ROWS_AT_ONCE = 4096


def build(
    rows_between: Callable[[int, int], NDArray[np.float32]],
    n: int,
    *,
    neighbours: int = NEIGHBOURS,
    ef_construction: int = EF_CONSTRUCTION,
    progress: Callable[[int], object] | None = None,
) -> Arrays:
    """Build the graph over ``n`` L2-normalised vectors, read by ``rows_between(start, end)``.

    Returns
    -------
    dict
        ``links`` (n, 2 * neighbours) int32, the ground level, -1 behind the last; and the upper
        levels one behind the other, lowest first: ``upper`` (m, neighbours) int32 in the numbering
        of their own level, ``upper_rows`` (m,) the gallery row, ``down`` (m,) the place one level
        below, ``level_starts``. The walk begins at the first place of the highest level.
    """
    faiss = require("faiss", extra="index", why="building a graph")
    dim = rows_between(0, 1).shape[1]
    index = faiss.IndexHNSWFlat(dim, neighbours, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = ef_construction
    for start in range(0, n, _ROWS_AT_ONCE):
        rows = rows_between(start, min(start + _ROWS_AT_ONCE, n))
        index.add(rows)
        if progress is not None:
            progress(len(rows))
    return _arrays(faiss, index.hnsw)


def _arrays(faiss: Any, hnsw: Any) -> Arrays:
    offsets = faiss.vector_to_array(hnsw.offsets).astype(np.int64)
    flat = faiss.vector_to_array(hnsw.neighbors)
    heights = faiss.vector_to_array(hnsw.levels)  # 1 for a row that is on the ground only
    begins = faiss.vector_to_array(hnsw.cum_nneighbor_per_level)
    ground = np.arange(begins[0], begins[1])
    links = np.empty((len(heights), len(ground)), np.int32)
    for start in range(0, len(heights), 1 << 16):
        some = offsets[start : min(start + (1 << 16), len(heights))]
        links[start : start + len(some)] = flat[some[:, None] + ground]

    place = np.full(len(heights), -1, np.int32)  # of a row on the level at hand
    below: NDArray[np.int32] | None = None  # and on the one under it
    upper, upper_rows, down, level_starts = [], [], [], [0]
    for level in range(1, hnsw.max_level + 1):
        rows = np.flatnonzero(heights > level).astype(np.int32)
        if level == hnsw.max_level:  # the entry comes first
            rows = np.concatenate([[hnsw.entry_point], rows[rows != hnsw.entry_point]])
        rows = rows.astype(np.int32)
        own = np.arange(begins[level], begins[level + 1])
        neighbours = flat[offsets[rows][:, None] + own]
        place[rows] = np.arange(len(rows), dtype=np.int32)
        upper.append(np.where(neighbours >= 0, place[neighbours], -1).astype(np.int32))
        upper_rows.append(rows)
        down.append(rows if below is None else below[rows])
        level_starts.append(level_starts[-1] + len(rows))
        below = place.copy()
    if not upper:  # all rows on the ground: one level of the entry alone
        entry = np.array([hnsw.entry_point], np.int32)
        upper, upper_rows, down, level_starts = (
            [np.full((1, 1), -1, np.int32)],
            [entry],
            [entry],
            [0, 1],
        )
    return {
        "links": links,
        "upper": np.ascontiguousarray(np.concatenate(upper)),
        "upper_rows": np.concatenate(upper_rows),
        "down": np.concatenate(down).astype(np.int32),
        "level_starts": np.array(level_starts, np.int64),
    }


class Graph:
    """A built graph, ready to be walked on codes of any size. Several threads may search it."""

    def __init__(self, arrays: Arrays) -> None:
        self.links = arrays["links"]
        #: What a walk reads, in the order of the kernel's arguments.
        self.arrays = tuple(
            arrays[n] for n in ("links", "upper", "level_starts", "upper_rows", "down")
        )
        # Which rows a walk met, and a count of walks: as many as threads search at once.
        self._scratches: list[tuple[NDArray[np.uint16], NDArray[np.int64]]] = []

    def __len__(self) -> int:
        return len(self.links)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def scratch_bytes(self) -> int:
        """Bytes that walks write to, kept for the next ones."""
        return sum(seen.nbytes + clock.nbytes for seen, clock in [*self._scratches])

    def borrow(self) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """Lend a thread what its walk writes to; `give_back` keeps it for the next."""
        try:
            return self._scratches.pop()
        except IndexError:
            return np.zeros(len(self.links), np.uint16), np.zeros(1, np.int64)

    def give_back(self, scratch: tuple[NDArray[np.uint16], NDArray[np.int64]]) -> None:
        """Take what `borrow` lent."""
        self._scratches.append(scratch)

    def search(self, codes: Codes, queries: NDArray[np.int8], ef: int) -> NDArray[np.int32]:
        """Return the ``ef`` best rows the walk meets, (m, ef), best first, `NOTHING` at the end."""
        scores = np.empty((len(queries), ef), np.int32)
        rows = np.empty((len(queries), ef), np.int32)
        scratch = self.borrow()
        kernels.walk(*self.arrays, codes.values, queries, *scratch, scores, rows)
        self.give_back(scratch)
        return rows
