"""Small codes for prefix rows: int8 with one scale a dimension, two bits more, packed signs.

Plain functions on float32 matrices, numpy only. A code is made of a prefix that was
L2-normalised after its cut, so the scale belongs to one size and is kept beside the codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nestvec._checks import as_matrix
from nestvec.errors import DataError, DimensionError

_LEVELS = 127  # symmetric: -127..127, so that a vector and its negative have mirrored codes


def int8_scale(matrix: ArrayLike) -> NDArray[np.float32]:
    """Return the step of each dimension, (dim,): the largest absolute value seen, over 127.

    A dimension that is zero in every row gets step 1, so its codes are all 0.

    >>> int8_scale([[1.27, 0.0], [-0.5, 0.0]])
    array([0.01, 1.  ], dtype=float32)
    """
    rows = as_matrix(matrix, allow_zero_rows=True)
    # The extremes by themselves: np.abs would copy a gallery that may be a memory map.
    largest = np.maximum(rows.max(axis=0), -rows.min(axis=0))
    step = largest.astype(np.float32) / np.float32(_LEVELS)
    return np.where(step > 0, step, np.float32(1)).astype(np.float32)


def int8_encode(matrix: ArrayLike, scale: NDArray[np.float32]) -> NDArray[np.int8]:
    """Round each number to its dimension's nearest step, (n, dim) int8, ties to even.

    Values beyond the scale (queries are not in the gallery it was fitted on) are clipped at 127
    steps. Raises `DimensionError` if the matrix and the scale differ in dim.
    """
    scale = _as_scale(scale)
    rows = as_matrix(matrix, dim=len(scale), allow_zero_rows=True)
    steps = np.rint(rows / scale)
    return np.clip(steps, -_LEVELS, _LEVELS, out=steps).astype(np.int8)


def int8_decode(codes: NDArray[np.int8], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the float32 vectors, (n, dim), that int8 codes stand for."""
    scale = _as_scale(scale)
    if codes.dtype != np.int8 or codes.ndim != 2 or codes.shape[1] != len(scale):
        raise DimensionError(
            f"codes of shape {codes.shape} and dtype {codes.dtype} do not fit a scale of "
            f"{len(scale)} dims: (n, {len(scale)}) int8 is expected."
        )
    return codes * scale


def quarters(
    matrix: NDArray[np.float32], codes: NDArray[Any], scale: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Return in which quarter of its step each number lies, (n, dim) uint8, 0 to 3.

    A code of 8 bits and these two stand for ``codes * scale + (2 * quarters - 3) * scale / 8``.

    >>> quarters(np.float32([[0.6, 1.0, 1.4]]), np.float32([[1, 1, 1]]), np.ones(3, np.float32))
    array([[0, 2, 3]], dtype=uint8)
    """
    inside = np.floor((matrix / scale - codes) * 4 + 2)
    return np.clip(inside, 0, 3, out=inside).astype(np.uint8)


def quarter_steps(sample: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what half of a quarter is worth in each dimension, (dim,) float32.

    Nothing, in one that is all zeros: a quarter has no middle at 0, and the step there means none.
    """
    return np.where(sample.any(axis=0), scale / 8, np.float32(0)).astype(np.float32)


def binary_encode(matrix: ArrayLike) -> NDArray[np.uint8]:
    """Pack the signs, eight dimensions a byte, (n, ceil(dim / 8)) uint8; zero counts as positive.

    The first dimension is the highest bit; spare bits of the last byte are 0.

    >>> binary_encode([[1.0, -1.0, 0.0]])
    array([[160]], dtype=uint8)
    """
    return np.packbits(as_matrix(matrix, allow_zero_rows=True) >= 0, axis=1)


def binary_decode(codes: NDArray[np.uint8], dim: int) -> NDArray[np.float32]:
    """Return the signs as float32, (n, dim) of +1 and -1."""
    if codes.dtype != np.uint8 or codes.ndim != 2 or codes.shape[1] != -(-dim // 8):
        raise DimensionError(
            f"binary codes of shape {codes.shape} and dtype {codes.dtype} do not hold {dim} "
            f"dims: (n, {-(-dim // 8)}) uint8 is expected."
        )
    bits = np.unpackbits(codes, axis=1, count=dim)
    return bits.astype(np.float32) * 2 - 1


def _as_scale(scale: ArrayLike) -> NDArray[np.float32]:
    steps = np.asarray(scale, dtype=np.float32)
    if steps.ndim != 1 or not (np.isfinite(steps) & (steps > 0)).all():
        raise DataError(
            f"an int8 scale is one positive number a dimension, got shape {steps.shape}. "
            f"Make it with int8_scale(gallery prefix)."
        )
    return steps
