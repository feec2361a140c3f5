"""Full vectors of a gallery, row by row in one memory-mapped file, which reranking reads.

The store of record is columnar and versioned, and takes a millisecond to gather 200 rows; a warm
memory map takes a twentieth of it. Each row is checked as it is read: the sum of its words is kept
beside it, in memory. Keys and ids are mapped too: an answer reads few of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec.search import kernels, sealed
from nestvec.search.store import Rows as StoredRows
from nestvec.search.store.layout import Layout
from nestvec.search.store.snapshot import as_matrix

Rows = NDArray[np.int32]

_MAPPED = ("vectors", "row_ids", "updated", "ids", "id_bytes", "id_ends")
_ALL = slice(None)
_SAMPLE = 100_000
_BYTES_AT_ONCE = 1 << 24
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
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    # Written, not mapped: what does not fit on the disk is an error then, not the process's end.
    with (part / "vectors.npy").open("wb") as file:
        dtype = np.dtype(layout.precision)
        header = {"descr": dtype.str, "fortran_order": False, "shape": (n, layout.space.size)}
        np.lib.format.write_array_header_1_0(file, header)
        arrays = _gathered(
            blocks, n, layout, sizes, lambda at, some: file.write(some.data), progress
        )
    sealed.seal(folder, arrays, {"version": version}, written=["vectors.npy"])


def in_memory(
    folder: Path,
    blocks: Iterable[StoredRows],
    *,
    n: int,
    layout: Layout,
    sizes: Iterable[int],
    version: int,
    progress: Callable[[int], object],
) -> Mirror:
    """Return what `build` would write to ``folder``, where nothing can be written."""
    vectors = np.empty((n, layout.space.size), layout.precision)

    def put(at: int, some: NDArray[Any]) -> None:
        vectors[at : at + len(some)] = some

    arrays = _gathered(blocks, n, layout, sizes, put, progress)
    vectors.flags.writeable = False  # as a mapped file is: one compiled kernel fits both
    mirror = Mirror(folder, {"version": version}, {"vectors": vectors, **arrays})
    mirror.resident_bytes = vectors.nbytes + sum(array.nbytes for array in arrays.values())
    return mirror


def _gathered(
    blocks: Iterable[StoredRows],
    n: int,
    layout: Layout,
    sizes: Iterable[int],
    put: Callable[[int, NDArray[Any]], object],
    progress: Callable[[int], object],
) -> sealed.Arrays:
    """Hand the vectors to ``put`` and return the rest."""
    row_ids, updated = np.empty(n, np.int64), np.empty(n, np.int64)
    sums = {f"sums-{size}": np.empty(n, np.uint32) for size in sizes}
    ids: list[NDArray[Any]] = []  # copied: a column that is kept would keep the vectors beside it
    texts = bytearray()
    at = 0
    for block in blocks:
        vectors = np.ascontiguousarray(as_matrix(block.columns["vector"]))
        span = slice(at, at + len(vectors))
        row_ids[span], updated[span] = block.keys
        for name, kept in sums.items():
            kept[span] = _word_sums(vectors[:, : int(name.removeprefix("sums-"))])
        put(at, vectors)
        if layout.id_type == "int":
            ids.append(block.columns["id"].to_numpy().copy())
        else:
            encoded = [text.encode() for text in block.columns["id"].to_pylist()]
            ids.append(np.array([len(one) for one in encoded], np.int64))
            texts += b"".join(encoded)
        progress(len(vectors))
        at = span.stop
    found = np.concatenate([np.empty(0, np.int64), *ids])
    if layout.id_type == "int":
        packed = {"ids": found}
    else:
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(found)])
        packed = {"id_bytes": np.frombuffer(bytes(texts), np.uint8), "id_ends": ends}
    return {"row_ids": row_ids, "updated": updated, **packed, **sums}


def _word_sums(vectors: NDArray[Any]) -> NDArray[np.uint32]:
    words = vectors.view(_WORDS[vectors.dtype.name])
    return words.sum(axis=1, dtype=np.uint32)


class Mirror:
    """An opened mirror.

    Attributes
    ----------
    vectors : (n, dim) float32 or float16, memory-mapped
        As the store has them. A row's number here is its number in every structure. They are not
        checked: `unit` is the way to them.
    row_ids, updated : (n,) int64
        The store's row, and the version that wrote it last. A row here is valid while both are.
    """

    def __init__(self, folder: Path, about: dict[str, Any], arrays: sealed.Arrays) -> None:
        self.folder = folder
        self.version: int = about["version"]
        self.vectors = arrays.pop("vectors")
        self.row_ids, self.updated = arrays["row_ids"], arrays["updated"]
        self._ids = arrays
        found = (
            (int(name.removeprefix("sums-")), sums)
            for name, sums in arrays.items()
            if name.startswith("sums-")
        )
        self._sums = dict(sorted(found))
        self.resident_bytes = sum(sums.nbytes for sums in self._sums.values())
        self.sizes = tuple(self._sums)  #: Prefix sizes that rows can be reranked at.
        kind = self.vectors.dtype
        if self.vectors.shape != (len(self), self.sizes[-1]) or not kind.isnative:
            raise sealed.Damaged(f"{self._file} has changed: its header does not fit the rest.")
        self._words = self.vectors.view(_WORDS[kind.name])

    @classmethod
    def open(cls, folder: Path) -> Mirror:
        """Open what `build` wrote; raises `Damaged`."""
        return cls(folder, *sealed.load(folder, mapped=_MAPPED, unchecked=["vectors"]))

    @property
    def _file(self) -> Path:
        return self.folder / "vectors.npy"

    def __len__(self) -> int:
        return len(self.row_ids)

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

        Raises `Damaged` if a row is not as it was written.
        """
        scores = np.empty((len(queries), keep), np.float32)
        rows = np.empty((len(queries), keep), np.int32)
        sums = self._sums[queries.shape[1]]
        bad = kernels.rerank(self._words, sums, queries, shortlists, scores, rows)
        if bad != kernels.NOTHING:
            raise self.damaged(int(bad))
        return rows, scores

    def unit(
        self, rows: slice | NDArray[Any] = _ALL, dim: int | None = None
    ) -> NDArray[np.float32]:
        """Return some rows, or prefixes of them, L2-normalised, float32.

        A prefix that is all zeros stays so. Raises `Damaged` if a row is not as it was written.
        """
        size = dim if dim in self._sums else self.sizes[-1]
        words, sums = self._words[rows], self._sums[size][rows]
        words.flags.writeable = False  # as mapped ones are
        out = np.empty((len(words), dim or size), np.float32)
        bad = kernels.unit(words, sums, size, out)
        if bad != kernels.NOTHING:
            raise self.damaged(int(np.arange(len(self))[rows][bad]))
        return out

    def words(self, size: int) -> tuple[NDArray[Any], NDArray[np.uint32]]:
        """Return the vectors as words, and the sums of each row's first ``size``."""
        return self._words, self._sums[size]

    def damaged(self, row: int) -> sealed.Damaged:
        """Return what to raise for a row that is not as it was written."""
        return sealed.Damaged(f"row {row} of {self._file} has changed since it was written.")

    def unit_rows(self, start: int, end: int) -> NDArray[np.float32]:
        """Return rows start to end, L2-normalised, float32."""
        return self.unit(slice(start, end))

    def blocks(self, dim: int | None = None) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield the first row's number and some rows as `unit` has them, in order."""
        n_rows = max(1, _BYTES_AT_ONCE // (4 * self.sizes[-1]))
        for start in range(0, len(self), n_rows):
            yield start, self.unit(slice(start, start + n_rows), dim)

    def sample(self, dim: int, n: int = _SAMPLE, *, seed: int = 0) -> NDArray[np.float32]:
        """Return up to ``n`` rows, drawn by seed, as `unit` has them."""
        if n >= len(self):
            return self.unit(dim=dim)
        rows = np.random.default_rng(seed).choice(len(self), n, replace=False)
        return self.unit(np.sort(rows), dim)
