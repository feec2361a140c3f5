"""The door: whatever a user hands in is checked once, here, and then is a float32 matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nestvec.errors import DataError, DimensionError

_LONGEST_ID = 1000  # characters
_BLOCK = 65_536  # rows looked at together, so that checking a memory map stays small


def as_matrix(
    values: ArrayLike,
    *,
    name: str = "embeddings",
    dim: int | None = None,
    allow_zero_rows: bool = False,
    first_row: int = 0,
) -> NDArray[np.float32]:
    """Return ``values`` as a finite float32 matrix ``(n, dim)``, or say which row is wrong.

    float64, float16 and integers are converted; a float32 array (a memory map, too) is returned
    without a copy. ``first_row`` is the number of the first row, for messages. Raises `DataError`
    for ragged, empty, non-numeric, NaN, Inf or zero rows and `DimensionError` for the wrong number
    of columns.
    """
    try:
        array = np.asarray(values)  # a memory map stays mapped
    except ValueError as error:
        raise DataError(f"{name}: the rows have different lengths ({error}).") from error
    if array.dtype == object or array.dtype.kind not in "fiub":
        raise DataError(
            f"{name}: expected a matrix of numbers (n, dim), got dtype {array.dtype} "
            f"and shape {array.shape}."
        )
    if array.ndim != 2:
        hint = " Pass x[None, :] for a single vector." if array.ndim == 1 else ""
        raise DataError(f"{name}: expected a matrix (n, dim), got shape {array.shape}.{hint}")
    if 0 in array.shape:
        raise DataError(f"{name}: empty, shape {array.shape}; at least one row is needed.")
    if dim is not None and array.shape[1] != dim:
        raise DimensionError(f"{name}: {array.shape[1]} dims given where {dim} are expected.")
    if array.dtype != np.float32:
        with np.errstate(over="ignore"):  # a float64 too large becomes Inf and is reported below
            array = array.astype(np.float32)
    for start in range(0, len(array), _BLOCK):
        block = array[start : start + _BLOCK]
        first = first_row + start
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            raise DataError(
                f"{name}: row {first + int(np.argmin(finite))} holds NaN or Inf "
                f"({int((~finite).sum())} such rows in rows {first}..{first + len(block) - 1}). "
                f"Drop or re-embed them."
            )
        if not allow_zero_rows:
            nonzero = block.any(axis=1)
            if not nonzero.all():
                raise DataError(
                    f"{name}: row {first + int(np.argmin(nonzero))} is all zeros, so it has no "
                    f"direction and no cosine. Drop it, or re-embed its text."
                )
    return array


def as_ids(ids: Any, n: int, *, name: str = "ids", first_row: int = 0) -> NDArray[Any]:
    """Return ids as int64 or str array ``(n,)`` without duplicates, or raise `DataError`.

    ``first_row`` is the number of the first row, for messages.
    """
    if isinstance(ids, (list, tuple)):
        _check_texts(ids, name, first_row)
    array = np.asarray(ids)
    if array.dtype.kind == "O" or array.dtype.itemsize > 4 * _LONGEST_ID:
        _check_texts(array.ravel().tolist(), name, first_row)
    if array.dtype.kind in "iu":
        if array.size and array.max() > np.iinfo(np.int64).max:
            raise DataError(f"{name}: id {array.max()} does not fit int64; pass ids as strings.")
        array = array.astype(np.int64)
    elif array.dtype.kind in "OU":
        array = np.array([str(i) for i in array.ravel()], dtype=np.str_).reshape(array.shape)
    else:
        raise DataError(f"{name}: ids are integers or strings, got dtype {array.dtype}.")
    if array.shape != (n,):
        raise DataError(f"{name}: {array.shape} ids for {n} rows; one id a row is needed.")
    if array.dtype.kind == "U" and not is_unicode("".join(array.tolist())):
        row = next(row for row, one in enumerate(array.tolist()) if not is_unicode(one))
        raise DataError(
            f"{name}: the id of row {first_row + row}, {str(array[row])!r}, holds half of a "
            f"character (a lone surrogate), so it cannot be written as UTF-8. Replace it."
        )
    unique, counts = np.unique(array, return_counts=True)
    if len(unique) != n:
        twice = int(np.flatnonzero(counts > 1)[0])
        rows = (first_row + np.flatnonzero(array == unique[twice])[:2]).tolist()
        raise DataError(
            f"{name}: {n - len(unique)} duplicate ids; {unique[twice].item()!r} stands in rows "
            f"{rows[0]} and {rows[1]}. Ids must be unique."
        )
    return array


def _check_texts(ids: Sequence[Any], name: str, first_row: int) -> None:
    """Refuse what numpy's texts, all as wide as the longest and ended by NUL, cannot hold."""
    for row, one in enumerate(ids, first_row):
        if not isinstance(one, str):
            continue
        if len(one) > _LONGEST_ID:
            raise DataError(
                f"{name}: the id of row {row} has {len(one):,} characters, and {_LONGEST_ID:,} are "
                f"the most: {one[:40]!r}... Keep long texts beside the ids."
            )
        if one.endswith("\0"):
            raise DataError(
                f"{name}: the id of row {row}, {one!r}, ends in a NUL character. Strip it."
            )


def is_unicode(text: str) -> bool:
    """Tell whether a text has no lone surrogates, which neither files nor tokenizers take."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def normalise(matrix: NDArray[np.float32], *, name: str = "embeddings") -> NDArray[np.float32]:
    """L2-normalise the rows; a row without length is a `DataError` that names it."""
    norms = row_lengths(matrix)
    if not norms.all():
        raise DataError(
            f"{name}: row {int(np.argmin(norms))} is all zeros at {matrix.shape[1]} dims, "
            f"so it cannot be normalised."
        )
    unit = np.empty(matrix.shape, dtype=np.float32)
    np.divide(matrix, norms[:, None], out=unit, casting="same_kind")
    return unit


def row_lengths(matrix: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return L2 lengths of the rows (n,), summed in float64: squares of float32 can overflow."""
    return np.sqrt(np.einsum("ij,ij->i", matrix, matrix, dtype=np.float64))


def row_off_unit(matrix: NDArray[np.float32]) -> int | None:
    """Return the first row that is not of length 1 (to the rounding of float16), or None."""
    for start in range(0, len(matrix), _BLOCK):
        off = np.abs(row_lengths(matrix[start : start + _BLOCK]) - 1) > 1e-3
        if off.any():
            return start + int(np.argmax(off))
    return None
