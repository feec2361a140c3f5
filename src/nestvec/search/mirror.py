"""Full vectors of a gallery, row by row in one memory-mapped file, which reranking reads.

The store of record is columnar and versioned, and takes a millisecond to gather 200 rows; a warm
memory map takes a twentieth of it. Each row is checked as it is read: the sum of its words is kept
beside it, in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec._checks import normalise
from nestvec.search import kernels, sealed
from nestvec.search.store import Rows as StoredRows
from nestvec.search.store.layout import Layout
from nestvec.search.store.snapshot import as_matrix

Rows = NDArray[np.int32]

_SAMPLE = 100_000
_ROWS_AT_ONCE = 65_536
_WORDS = {"float32": np.uint32, "float16": np.uint16}


def build(
    folder: Path,
    blocks: Iterable[StoredRows],
    *,
    n: int,
    layout: Layout,
    sizes: Iterable[int],
    version: int,
    progress: Callable[[int], object],
) -> None:
    """Write the ``n`` rows of a version, with their ids, and sums for every prefix of ``sizes``."""
    part = sealed.part_of(folder)
    part.mkdir(parents=True, exist_ok=True)
    shape = (n, layout.space.size)
    vectors = np.lib.format.open_memmap(
        part / "vectors.npy", "w+", np.dtype(layout.precision), shape
    )
    row_ids, updated = np.empty(n, np.int64), np.empty(n, np.int64)
    sums = {size: np.empty(n, np.uint32) for size in sizes}
    ids = []
    at = 0
    for block in blocks:
        span = slice(at, at + len(block.keys.row_ids))
        row_ids[span], updated[span] = block.keys
        vectors[span] = as_matrix(block.columns["vector"])
        ids.append(block.columns["id"])
        for size, kept in sums.items():
            kept[span] = _word_sums(vectors[span], size)
        progress(span.stop - at)
        at = span.stop
    vectors.flush()
    del vectors
    arrays = {"row_ids": row_ids, "updated": updated, **_packed(ids, layout.id_type)}
    arrays |= {f"sums-{size}": kept for size, kept in sums.items()}
    for name, array in arrays.items():
        sealed.write_array(part, name, array)
    sealed.seal(folder, {"version": version, "sizes": list(sums), "arrays": list(arrays)})


def _packed(columns: list[Any], id_type: str) -> dict[str, NDArray[Any]]:
    if id_type == "int":
        values = [column.to_numpy() for column in columns]
        return {"ids": np.concatenate(values) if values else np.empty(0, np.int64)}
    texts = [text.encode() for column in columns for text in column.to_pylist()]
    ends = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return {"id_bytes": np.frombuffer(b"".join(texts), np.uint8), "id_ends": ends}


def _word_sums(vectors: NDArray[Any], size: int) -> NDArray[np.uint32]:
    words = vectors[:, :size].view(_WORDS[vectors.dtype.name])
    return words.sum(axis=1, dtype=np.uint32)


class Mirror:
    """An opened mirror.

    Attributes
    ----------
    vectors : (n, dim) float32 or float16, memory-mapped
        As the store has them. A row's number here is its number in every structure.
    row_ids, updated : (n,) int64
        The store's row, and the version that wrote it last. A row here is valid while both are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        about = sealed.about(folder)
        found = sealed.load(folder, about["arrays"], mapped=["vectors"])
        self.version: int = about["version"]
        self.vectors = found.pop("vectors")
        self.row_ids, self.updated = found["row_ids"], found["updated"]
        self.resident_bytes = sum(array.nbytes for array in found.values())
        self._ids = found
        self._sums = {size: found[f"sums-{size}"] for size in about["sizes"]}
        self._words = self.vectors.view(_WORDS[self.vectors.dtype.name])

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Prefix sizes that rows can be reranked at."""
        return tuple(self._sums)

    def ids(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Return the ids of some rows, of any shape."""
        if "ids" in self._ids:
            return self._ids["ids"][rows]
        ends, text = self._ids["id_ends"], self._ids["id_bytes"]
        flat = [bytes(text[ends[r] : ends[r + 1]]).decode() for r in np.ravel(rows)]
        return np.array(flat, dtype=np.str_).reshape(np.shape(rows))

    def rerank(
        self, queries: NDArray[np.float32], shortlists: Rows, keep: int
    ) -> tuple[Rows, NDArray[np.float32]]:
        """Return the ``keep`` best rows of each shortlist by cosine at the queries' size.

        The queries are L2-normalised. Raises `Damaged` if a row is not as it was written.
        """
        scores = np.empty((len(queries), keep), np.float32)
        rows = np.empty((len(queries), keep), np.int32)
        sums = self._sums[queries.shape[1]]
        bad = kernels.rerank(self._words, sums, queries, shortlists, scores, rows)
        if bad != kernels.NOTHING:
            raise sealed.Damaged(
                f"row {bad} of {self.folder / 'vectors.npy'} has changed since it was written."
            )
        return rows, scores

    def unit_rows(self, start: int, end: int) -> NDArray[np.float32]:
        """Return rows start to end, L2-normalised, float32."""
        return normalise(np.ascontiguousarray(self.vectors[start:end], dtype=np.float32))

    def blocks(self, n_rows: int = _ROWS_AT_ONCE) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield the first row's number and the vectors of some rows, in order."""
        for start in range(0, len(self), n_rows):
            yield start, np.asarray(self.vectors[start : start + n_rows], np.float32)

    def sample(self, n: int = _SAMPLE, *, seed: int = 0) -> NDArray[np.float32]:
        """Return up to ``n`` rows drawn by seed, in order."""
        if n >= len(self):
            return np.asarray(self.vectors, np.float32)
        rows = np.random.default_rng(seed).choice(len(self), n, replace=False)
        return np.asarray(self.vectors[np.sort(rows)], np.float32)
