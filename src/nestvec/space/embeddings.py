"""Embeddings: an array, the ids of its rows, and the Space they live in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nestvec import _checks
from nestvec.errors import DataError, DimensionError, SpaceError
from nestvec.space.space import Space


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Vectors that know where they live.

    Parameters
    ----------
    array : (n, size) float32
        One row a thing. Converted to float32 and checked: NaN, Inf and zero rows are refused.
    space
        Where the rows live; ``space.size`` must equal the number of columns.
    ids : (n,) int64 or str, optional
        Unique; row numbers if not given.

    Examples
    --------
    >>> space = Space.declared("my-model", dim=4, nesting_dims=(2, 4))
    >>> vectors = Embeddings(np.eye(4), space)
    >>> vectors.prefix(2)
    Traceback (most recent call last):
    nestvec.errors.DataError: prefix: row 2 is all zeros at 2 dims, so it cannot be normalised.
    >>> vectors[:2].prefix(2).array.shape
    (2, 2)
    """

    array: NDArray[np.float32]
    space: Space
    ids: NDArray[Any] = None  # type: ignore[assignment]  # row numbers until __post_init__

    def __post_init__(self) -> None:
        matrix = _checks.as_matrix(self.array)
        if matrix.shape[1] != self.space.size:
            raise DimensionError(
                f"{matrix.shape[1]} dims given for {self.space.label}: the vectors are not of "
                f"this space."
            )
        if self.space.has_unit_rows:
            _check_unit_rows(matrix, self.space)
        ids = np.arange(len(matrix)) if self.ids is None else self.ids
        object.__setattr__(self, "array", matrix)
        object.__setattr__(self, "ids", _checks.as_ids(ids, len(matrix)))

    def __len__(self) -> int:
        return len(self.array)

    def __repr__(self) -> str:
        return f"Embeddings({len(self)} x {self.space.size}, {self.space.label})"

    def __getitem__(self, rows: Any) -> Embeddings:
        """Return some rows, as Embeddings."""
        if isinstance(rows, (int, np.integer)):
            rows = slice(rows, rows + 1 or None)
        return Embeddings(self.array[rows], self.space, self.ids[rows])

    @property
    def dim(self) -> int:
        """Number of columns."""
        return self.space.size

    @property
    def bytes_per_vector(self) -> int:
        """Bytes one row takes as float32."""
        return 4 * self.space.size

    def prefix(self, dim: int, *, allow_untrained: bool = False) -> Embeddings:
        """Cut to the first ``dim`` numbers, then L2-normalise each row.

        Raises
        ------
        DimensionError
            If ``dim`` is not a nesting dim of the Space, unless ``allow_untrained``.
        SpaceError
            If the vectors are compared by dot product and are not normalised: their lengths mean
            something that a normalised prefix would lose.
        """
        if self.space.metric == "dot" and not self.space.has_unit_rows:
            raise SpaceError(
                f"{self.space.label} is compared by dot product of unnormalised vectors; a prefix "
                f"is L2-normalised and would lose their lengths. Call normalised() first."
            )
        space = self.space.prefix(dim, allow_untrained=allow_untrained)
        if dim == self.dim:
            return self
        cut = _checks.normalise(self.array[:, :dim], name="prefix")
        return Embeddings(cut, space, self.ids)

    def normalised(self) -> Embeddings:
        """Return the vectors with every row at length 1; nothing changes if they are already."""
        if self.space.has_unit_rows:
            return self
        space = replace(self.space, normalisation="l2")
        return Embeddings(_checks.normalise(self.array), space, self.ids)

    def rows_of(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Return the row numbers of some ids; an unknown id is a `DataError`."""
        wanted = np.asarray(ids, dtype=self.ids.dtype if self.ids.dtype.kind == "i" else np.str_)
        order = np.argsort(self.ids, kind="stable")
        at = np.searchsorted(self.ids, wanted, sorter=order)
        rows = order[np.minimum(at, len(order) - 1)]
        wrong = self.ids[rows] != wanted
        if wrong.any():
            raise DataError(f"unknown id {wanted[wrong].ravel()[0]!r} ({int(wrong.sum())} in all).")
        return rows.astype(np.int64)

    def batches(self, size: int = 8192) -> Iterator[NDArray[np.float32]]:
        """Yield the rows in blocks, in order."""
        for start in range(0, len(self), size):
            yield self.array[start : start + size]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write vectors, ids and stamp; the ending chooses the format.

        ``.safetensors`` and ``.npz`` need nothing more; ``.parquet``, ``.arrow`` and ``.lance``
        need ``nestvec[index]``. Written beside and renamed: never half a file.
        """
        from nestvec.space import files

        return files.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, space: Space | None = None) -> Embeddings:
        """Read vectors with their stamp; a file without one needs ``space``.

        See `nestvec.load` for the formats and for what is refused.
        """
        from nestvec.space import files

        return files.load(path, space=space)


def _check_unit_rows(matrix: NDArray[np.float32], space: Space) -> None:
    for start in range(0, len(matrix), 65_536):
        norms = np.linalg.norm(matrix[start : start + 65_536], axis=1)
        off = np.abs(norms - 1) > 1e-3  # float16 vectors are within 5e-4
        if off.any():
            row = start + int(np.argmax(off))
            raise DataError(
                f"row {row} has length {norms[row - start]:.4g}, but {space.label} holds vectors of "
                f"length 1. Normalise them, or declare the space with normalisation='none'."
            )
