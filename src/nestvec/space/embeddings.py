"""Embeddings: an array, the ids of its rows, and the Space they live in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nestvec import _checks
from nestvec.errors import DataError, DimensionError, SpaceError
from nestvec.space.space import Space


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Embeddings:
    """Vectors that know where they live.

    Parameters
    ----------
    array : (n, size) float32
        One row a thing. Converted to float32 and checked: NaN, Inf and zero rows are refused.
    space
        Where the rows live; ``space.size`` must equal the number of columns.
    ids : (n,) int64 or str, optional
        Unique; row numbers if not given, and ``has_ids`` is False then.

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
    ids: NDArray[Any]
    has_ids: bool = field(init=False)
    """Whether the ids were given. Row numbers say nothing beyond these rows."""

    def __init__(self, array: ArrayLike, space: Space, ids: ArrayLike | None = None) -> None:
        matrix = _checks.as_matrix(array)
        if matrix.shape[1] != space.size:
            raise DimensionError(
                f"{matrix.shape[1]} dims given for {space.label}: the vectors are not of this "
                f"space."
            )
        if space.has_unit_rows:
            _check_unit_rows(matrix, space)
        object.__setattr__(self, "has_ids", ids is not None)
        ids = np.arange(len(matrix)) if ids is None else ids
        object.__setattr__(self, "array", matrix)
        object.__setattr__(self, "space", space)
        object.__setattr__(self, "ids", _checks.as_ids(ids, len(matrix)))

    def __len__(self) -> int:
        return len(self.array)

    def __repr__(self) -> str:
        return f"Embeddings({len(self)} x {self.space.size}, {self.space.label})"

    def __getitem__(self, rows: Any) -> Embeddings:
        """Return some rows, as Embeddings."""
        if isinstance(rows, (int, np.integer)):
            row = range(len(self))[rows]  # IndexError beyond the end, so that iterating ends
            rows = slice(row, row + 1)
        return self.replaced(self.array[rows], self.space, self.ids[rows])

    def replaced(
        self, array: ArrayLike, space: Space, ids: NDArray[Any] | None = None
    ) -> Embeddings:
        """Return other vectors of the same things, or with ``ids`` of some: ids stay what they are.

        Examples
        --------
        >>> space = Space.declared("my-model", dim=4)
        >>> Embeddings(np.eye(4), space).replaced(np.eye(4)[::-1], space).has_ids
        False
        """
        found = Embeddings(array, space, self.ids if ids is None else ids)
        object.__setattr__(found, "has_ids", self.has_ids)
        return found

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
        return self.replaced(cut, space)

    def normalised(self) -> Embeddings:
        """Return the vectors with every row at length 1; nothing changes if they are already."""
        if self.space.has_unit_rows:
            return self
        space = replace(self.space, normalisation="l2")
        return self.replaced(_checks.normalise(self.array), space)

    def rows_of(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Return the row numbers of some ids; an unknown id is a `DataError`."""
        wanted = np.asarray(ids)
        if self.ids.dtype.kind != "i":
            wanted = wanted.astype(np.str_)
        elif wanted.dtype.kind not in "iu" and wanted.size:
            raise DataError(f"ids here are integers, and {wanted.ravel()[0]!r} is none.")
        order = np.argsort(self.ids, kind="stable")
        at = np.searchsorted(self.ids, wanted, sorter=order)
        rows = order[np.minimum(at, len(order) - 1)]
        wrong = self.ids[rows] != wanted
        if wrong.any():
            first = wanted[wrong].ravel()[0].item()
            raise DataError(f"unknown id {first!r} ({int(wrong.sum())} in all).")
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
    def load(cls, path: str | os.PathLike[str], *, space: Space | str | None = None) -> Embeddings:
        """Read vectors with their stamp; a file without one needs ``space``.

        See `nestvec.load` for the formats and for what is refused.
        """
        from nestvec.space import files

        return files.load(path, space=space)


def _check_unit_rows(matrix: NDArray[np.float32], space: Space) -> None:
    row = _checks.row_off_unit(matrix)
    if row is not None:
        length = _checks.row_lengths(matrix[row : row + 1])[0]
        raise DataError(
            f"row {row} has length {length:.4g}, but {space.label} holds vectors of "
            f"length 1. Normalise them, or declare the space with normalisation='none'."
        )
