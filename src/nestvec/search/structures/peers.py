"""faiss's own indexes as structures: for comparison, and where one of them suits the data better.

They hold full vectors or codes of their own in memory. The last stage of a plan reads the full
vectors from disk as it does behind our structures, which makes a code a first stage ("refine").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nestvec._extras import require
from nestvec.search.structures.lists import usual_n_lists

_ROWS_AT_ONCE = 16_384
_TRAINED_ON = 100_000


class Kind(NamedTuple):
    """How faiss makes it (its index factory's words), the knob of a search, and its default.

    ``precision`` is what its rows are found by, as a plan's first stage says it.
    """

    factory: str
    knob: str
    default: int
    precision: str = "float32"


KINDS = {
    "faiss_hnsw": Kind("HNSW32,Flat", "ef", 64),
    "faiss_hnsw_sq8": Kind("HNSW32,SQ8", "ef", 64, "int8"),
    "faiss_hnsw_panorama": Kind("HNSW32,FlatPanorama8", "ef", 64),
    "faiss_ivf": Kind("IVF{n_lists},Flat", "probes", 32),
    "faiss_ivf_rabitq": Kind("IVF{n_lists},RaBitQ", "probes", 32, "binary"),
}


def build(
    name: str,
    rows_between: Callable[[int, int], NDArray[np.float32]],
    n: int,
    *,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> dict[str, NDArray[Any]]:
    """Build one over ``n`` L2-normalised vectors; return it as bytes, ``{"index": (m,) uint8}``."""
    faiss = require("faiss", extra="index", why=f"the structure {name}")
    kind = KINDS[name]
    index = _made(faiss, kind, rows_between(0, 1).shape[1], n)
    if not index.is_trained:
        starts = np.arange(0, n, 64)
        chosen = np.random.default_rng(seed).permutation(starts)[: _TRAINED_ON // 64]
        index.train(
            np.concatenate([rows_between(s, min(s + 64, n)) for s in np.sort(chosen).tolist()])
        )
    for start in range(0, n, _ROWS_AT_ONCE):
        rows = rows_between(start, min(start + _ROWS_AT_ONCE, n))
        index.add(rows)
        if progress is not None:
            progress(len(rows))
    return {"index": faiss.serialize_index(index)}


def _made(faiss: Any, kind: Kind, dim: int, n: int) -> Any:
    words = kind.factory.format(n_lists=min(n, usual_n_lists(n)))
    if kind is KINDS["faiss_hnsw_panorama"]:  # L2 alone, which orders vectors of length 1 alike
        index = faiss.IndexHNSWFlatPanorama(dim, 32, 8)
    else:
        index = faiss.index_factory(dim, words, faiss.METRIC_INNER_PRODUCT)
    if kind.knob == "ef":
        index.hnsw.efConstruction = 80
    else:
        index.cp.min_points_per_centroid = 1  # the sample is as large as we mean it to be
    return index


class Peer:
    """One of faiss's indexes. Several threads may search it."""

    def __init__(self, name: str, arrays: dict[str, NDArray[Any]]) -> None:
        self.name, self.kind = name, KINDS[name]
        self._faiss = require("faiss", extra="index", why=f"the structure {name}")
        self.nbytes = arrays["index"].nbytes
        self._index = self._faiss.deserialize_index(arrays["index"])

    def search(
        self, queries: NDArray[np.float32], keep: int, knob: int, alive: NDArray[np.bool_]
    ) -> NDArray[np.int32]:
        """Return the ``keep`` best rows of L2-normalised queries, (m, keep), -1 at the end."""
        selector = None
        if len(alive):
            packed = np.packbits(alive, bitorder="little")
            selector = self._faiss.IDSelectorBitmap(packed)
        if self.kind.knob == "ef":
            options = self._faiss.SearchParametersHNSW(efSearch=max(knob, keep), sel=selector)
        else:
            options = self._faiss.SearchParametersIVF(nprobe=knob, sel=selector)
        before = self._faiss.omp_get_max_threads()
        self._faiss.omp_set_num_threads(1)  # of this thread: threads come from the caller
        try:
            return self._index.search(queries, keep, params=options)[1].astype(np.int32)
        finally:
            self._faiss.omp_set_num_threads(before)

    def n_scored(self, knob: int) -> int:
        """Return about how many rows a search scores: `ef`, or a share of the lists."""
        if self.kind.knob == "ef":
            return knob
        return round(self._index.ntotal * min(1, knob / self._index.nlist))
