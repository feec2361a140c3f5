"""Exact search over arrays in memory: the oracle that every faster structure is measured against.

Scores do not depend on the batch, the thread count or the row's place: a float32 product only
finds the candidates, within its error bound, and those are scored again in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nestvec._checks import normalise
from nestvec.maps import codes
from nestvec.search.cascade import Stage

_SCORES_AT_ONCE = 1 << 24  # float32 scores held at a time: 64 MB
_PAIR_BYTES = 1 << 26  # gathered vectors held at a time when pairs are rescored

Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]


def top_k(queries: Vectors, gallery: Vectors, k: int) -> tuple[Rows, Vectors]:
    """Return the ``k`` gallery rows with the largest inner product for every query, exactly.

    Parameters
    ----------
    queries, gallery : (n_queries, dim), (n_gallery, dim) float32
        Normalise both for cosine.
    k
        At most ``n_gallery`` rows come back.

    Returns
    -------
    rows : (n_queries, k) int64
        Best first; equal scores by the lower row.
    scores : (n_queries, k) float32
        Inner products, summed in float64.
    """
    k = min(k, len(gallery))
    rows = np.empty((len(queries), k), np.int64)
    scores = np.empty((len(queries), k), np.float32)
    longest = float(np.sqrt(np.einsum("nd,nd->n", gallery, gallery).max()))
    step = max(1, _SCORES_AT_ONCE // len(gallery))
    for start in range(0, len(queries), step):
        block = queries[start : start + step]
        rough = block @ gallery.T  # (b, n_gallery)
        kth = np.partition(rough, len(gallery) - k, axis=1)[:, len(gallery) - k]
        slack = _rounding_bound(block, longest)
        b, candidates = np.nonzero(rough >= (kth - 2 * slack)[:, None])
        exact = _pair_scores(block, gallery, b, candidates)
        rows[start : start + step], scores[start : start + step] = _best(
            b, candidates, exact, len(block), k
        )
    return rows, scores


def rerank(queries: Vectors, gallery: Vectors, shortlist: Rows, k: int) -> tuple[Rows, Vectors]:
    """Order each query's ``shortlist`` (n_queries, n_short) by inner product and keep ``k``."""
    n_queries, n_short = shortlist.shape
    at = np.repeat(np.arange(n_queries), n_short)
    exact = _pair_scores(queries, gallery, at, shortlist.ravel())
    return _best(at, shortlist.ravel(), exact, n_queries, min(k, n_short))


def _rounding_bound(queries: Vectors, longest: float) -> Vectors:
    """Largest error a float32 dot product of this length can have: dim * u * |q| * |g|."""
    lengths = np.linalg.norm(queries, axis=1)
    unit = float(np.finfo(np.float32).eps)
    return np.asarray(queries.shape[1] * unit * longest * lengths, np.float32)


def _pair_scores(queries: Vectors, gallery: Vectors, at: Rows, rows: Rows) -> Vectors:
    """Inner products of the pairs (queries[at[i]], gallery[rows[i]]), summed in float64."""
    out = np.empty(len(at), np.float32)
    step = max(1, _PAIR_BYTES // (16 * queries.shape[1]))
    for start in range(0, len(at), step):
        q = queries[at[start : start + step]].astype(np.float64)
        g = gallery[rows[start : start + step]].astype(np.float64)
        out[start : start + step] = np.multiply(q, g, out=q).sum(axis=1)
    return out


def _best(at: Rows, rows: Rows, scores: Vectors, n: int, k: int) -> tuple[Rows, Vectors]:
    order = np.lexsort((rows, -scores, at))  # by query, best score, lower row
    begins = np.searchsorted(at[order], np.arange(n))
    pick = order[begins[:, None] + np.arange(k)]
    return rows[pick].astype(np.int64), scores[pick]


def stage_gallery(gallery: Vectors, stage: Stage, *, unit: bool) -> Vectors:
    """Return the gallery (n_gallery, dim) as a stage stores it: cut, normalised, coded.

    Codes stand as the float32 values they decode to, so that one product serves every precision.
    """
    cut = _cut(gallery, stage.dim, unit, "gallery")
    if stage.precision == "float16":
        return cut.astype(np.float16).astype(np.float32)
    if stage.precision in ("int8", "int10"):
        scale = codes.int8_scale(cut)
        coded = codes.int8_encode(cut, scale)
        decoded = codes.int8_decode(coded, scale)
        if stage.precision == "int10":
            odd = 2.0 * codes.quarters(cut, coded, scale) - 3
            decoded += (odd * codes.quarter_steps(cut, scale)).astype(np.float32)
        return decoded
    return _signs(cut) if stage.precision == "binary" else cut


def stage_queries(queries: Vectors, stage: Stage, *, unit: bool) -> Vectors:
    """Return the queries (n_queries, dim) as a stage compares them.

    They stay float32, except for binary, where both sides are signs and the score is
    ``dim - 2 * Hamming distance``.
    """
    cut = _cut(queries, stage.dim, unit, "queries")
    return _signs(cut) if stage.precision == "binary" else cut


def _cut(matrix: Vectors, dim: int, unit: bool, name: str) -> Vectors:
    prefix = np.ascontiguousarray(matrix[:, :dim])
    return normalise(prefix, name=name) if unit else prefix


def _signs(matrix: Vectors) -> Vectors:
    return codes.binary_decode(codes.binary_encode(matrix), matrix.shape[1])
