"""Prefixes of a gallery at one byte a number, as the kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nestvec._checks import row_lengths
from nestvec.maps.codes import int8_scale, quarter_steps, quarters
from nestvec.search import kernels
from nestvec.search.kernels._numpy import OFFSET as _OFFSET

_WIDTH = 32  # bytes that one instruction takes
_LEVELS = 127
_ROWS_AT_ONCE = 8192
_IN_ORDER = np.empty(0, np.int32)

Vectors = NDArray[np.float32]


def padded(dim: int) -> int:
    """Return the bytes that a code of ``dim`` numbers takes."""
    return -(-dim // _WIDTH) * _WIDTH


@dataclass(frozen=True, eq=False)
class Codes:
    """Codes of one prefix size: each number in steps of its dimension, L2-normalised before.

    One step for all dimensions would cap recall at .97 (small dimensions would be rounded away);
    and a prefix that was not normalised needs a shortlist twice as long.

    Attributes
    ----------
    values : (n, padded dim) uint8
        128 + steps, 1 to 255; padding is 128.
    scale : (dim,) float32
        The step of each dimension.
    """

    values: NDArray[np.uint8]
    scale: NDArray[np.float32]

    @property
    def dim(self) -> int:
        return len(self.scale)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def queries(self, queries: Vectors) -> NDArray[np.int8]:
        """Return queries (m, dim or more) as the other side of the product, (m, padded dim) int8.

        The steps of the dimensions go into the query, which then gets a step of its own: the order
        of the products is that of the cosines, up to rounding.
        """
        out = np.empty((len(queries), self.values.shape[1]), np.int8)
        kernels.fold(queries, self.scale, out)
        return out

    def rescored(
        self,
        queries: Vectors,
        shortlists: NDArray[np.int32],
        keep: int,
        places: NDArray[np.int32] | None = None,
        rests: Rests | None = None,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the ``keep`` best rows of each shortlist by cosine, as the codes have it.

        The query is not rounded, which is what loses most. ``places`` (n,) says where the code of
        each row is, if they are in another order. ``rests`` makes them finer.
        """
        scores = np.empty((len(queries), keep), np.float32)
        rows = np.empty((len(queries), keep), np.int32)
        at = _IN_ORDER if places is None else places
        asked = queries, shortlists, scores, rows
        if rests is None:
            kernels.rescore_decoded(self.values, self.scale, at, *asked)
        else:
            kernels.rescore_finer(self.values, rests.values, self.scale, rests.steps, at, *asked)
        return rows, scores


@dataclass(frozen=True, eq=False)
class Rests:
    """What rounding to `Codes` left, at two bits a number: 10 with those of the codes.

    Attributes
    ----------
    values : (n, padded dim / 4) uint8
        Which quarter of its step a number lies in, 0 to 3, in the order of the vectors: bits
        ``2 p`` and ``2 p + 1`` of byte ``i`` are of number ``p * padded / 4 + i``.
    steps : (dim,) float32
        Half a quarter of each dimension's step.
    """

    values: NDArray[np.uint8]
    steps: NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.steps.nbytes


def scale_of(sample: Vectors, dim: int) -> NDArray[np.float32]:
    """Return the steps that fit the prefixes of a sample of the gallery, (dim,).

    A dimension that is zero in all of it has the largest of the others' steps: a query that is not
    zero there must not lose its other numbers to it.
    """
    rows = unit_prefixes(sample, dim)
    scale, used = int8_scale(rows), rows.any(axis=0)
    if used.any():
        scale[~used] = scale[used].max()
    return scale


def encode(vectors: Vectors, scale: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    """Write the codes of the prefixes of ``vectors`` (n, full dim) into ``out`` (n, padded)."""
    dim = len(scale)
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        rows = unit_prefixes(vectors[start : start + _ROWS_AT_ONCE], dim)
        steps = np.rint(rows / scale)
        np.clip(steps, -_LEVELS, _LEVELS, out=steps)
        block = out[start : start + len(rows)]
        block[:, :dim] = steps + _OFFSET
        block[:, dim:] = _OFFSET


def rests_scale(sample: Vectors, scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return `Rests.steps` that fit the prefixes of a sample of the gallery, (dim,)."""
    return quarter_steps(unit_prefixes(sample, len(scale)), scale)


def encode_rests(
    vectors: Vectors,
    codes: NDArray[np.uint8],
    scale: NDArray[np.float32],
    out: NDArray[np.uint8],
) -> None:
    """Write what the codes (n, padded) of ``vectors`` leave into ``out`` (n, padded / 4)."""
    dim, width = len(scale), out.shape[1]
    for start in range(0, len(vectors), _ROWS_AT_ONCE):
        rows = unit_prefixes(vectors[start : start + _ROWS_AT_ONCE], dim)
        steps = codes[start : start + len(rows), :dim].astype(np.float32) - _OFFSET
        found = np.zeros((len(rows), 4 * width), np.uint8)
        found[:, :dim] = quarters(rows, steps, scale)
        planes = found.reshape(len(rows), 4, width)
        block = out[start : start + len(rows)]
        block[:] = planes[:, 0] | planes[:, 1] << 2 | planes[:, 2] << 4 | planes[:, 3] << 6


def unit_prefixes(vectors: Vectors, dim: int | None = None) -> Vectors:
    """Return the prefixes L2-normalised, (n, dim); one that is all zeros stays so.

    Nothing forbids a row that is zeros for its first numbers: it is like no query.
    """
    rows = np.ascontiguousarray(vectors[:, :dim], np.float32)
    lengths = row_lengths(rows)
    unit = np.empty(rows.shape, np.float32)
    np.divide(rows, np.where(lengths > 0, lengths, 1)[:, None], out=unit, casting="same_kind")
    return unit
