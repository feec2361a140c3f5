"""What might win: every other way to spend the same bytes, as two sides to compare.

Whatever a method stores is decoded to float32 vectors whose inner product is the score the method
gives, so one task can score all of them and the bytes are counted here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec._checks import normalise
from nestvec._extras import require
from nestvec.errors import DataError
from nestvec.maps import codes

Matrix = NDArray[np.float32]

ROTATIONS = ("random_rotation", "principal_rotation")
BY_WORDS = ("bm25", "bm25_fusion")  #: these need ``texts``

#: Every baseline, in the order of the table.
NAMES = (
    "truncation",
    *ROTATIONS,
    "int8",
    "binary",
    "product_quantisation",
    "csr",
    *BY_WORDS,
)

_PQ_ITERATIONS = 10  # of k-means; 25 lower the error by less than 1% (up to 2% at 3 dims a code)
_PQ_ITERATIONS_FINE = 3  # at 1 or 2 dims a code: hardly an error is left, and most of the time
_CSR_BUDGETS = 4
_CSR_MOST_BYTES = 1 << 31  # of the sparse codes scored densely


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to store a gallery, decoded to what it is compared by.

    ``gallery`` and ``queries`` are (n, any) float32; ``macs_each`` counts the multiply-adds (or
    look-ups, or one-bit products) a stored vector costs, ``macs_once`` those a query costs before.
    """

    method: str
    dim: int
    precision: str
    gallery: Matrix
    queries: Matrix
    bytes_per_vector: int
    macs_each: int
    macs_once: int = 0
    note: str = ""


def chosen(baselines: bool | Iterable[str]) -> tuple[str, ...]:
    """Return names of baselines: all, only ``truncation``, or those that are named."""
    if isinstance(baselines, bool):
        return NAMES if baselines else ("truncation",)
    names = (baselines,) if isinstance(baselines, str) else tuple(baselines)
    unknown = [n for n in names if n not in NAMES]
    if unknown:
        raise DataError(f"baseline {unknown[0]!r} is not one of {', '.join(NAMES)}.")
    return names


def rotated(name: str, gallery: Matrix, queries: Matrix, *, seed: int) -> tuple[Matrix, Matrix]:
    """Return both sides after ``random_rotation`` or ``principal_rotation``, fitted on gallery."""
    require("sklearn", extra="fit", why=f"the baseline {name}")
    from nestvec.maps import PrincipalRotation, RandomRotation

    rotation: Any = (
        PrincipalRotation() if name == "principal_rotation" else RandomRotation(random_state=seed)
    )
    rotation.fit(gallery)
    return rotation.transform(gallery), rotation.transform(queries)


def prefixes(
    method: str, gallery: Matrix, queries: Matrix, dims: Sequence[int]
) -> Iterator[Candidate]:
    """Yield float32 prefixes, re-normalised after the cut; the whole vector is a prefix too."""
    for dim in dims:
        yield Candidate(
            method,
            dim,
            "float32",
            normalise(gallery[:, :dim], name=f"{method} at {dim} dims"),
            normalise(queries[:, :dim], name=f"{method} at {dim} dims, queries"),
            bytes_per_vector=4 * dim,
            macs_each=dim,
        )


def int8(method: str, gallery: Matrix, queries: Matrix, dims: Sequence[int]) -> Iterator[Candidate]:
    """Yield prefixes whose stored side is int8, one scale a dimension; queries stay float32."""
    for cut in prefixes(method, gallery, queries, dims):
        scale = codes.int8_scale(cut.gallery)
        decoded = codes.int8_decode(codes.int8_encode(cut.gallery, scale), scale)
        yield Candidate(method, cut.dim, "int8", decoded, cut.queries, cut.dim, cut.dim)


def binary(
    method: str, gallery: Matrix, queries: Matrix, dims: Sequence[int]
) -> Iterator[Candidate]:
    """Yield prefixes with the signs alone on both sides: the score is 1 - 2 * Hamming / dim."""
    for dim in dims:
        scale = np.float32(dim**-0.5)
        g, q = (
            codes.binary_decode(codes.binary_encode(side[:, :dim]), dim) * scale
            for side in (gallery, queries)
        )
        yield Candidate(method, dim, "binary", g, q, -(-dim // 8), dim)


def product_quantisation(
    gallery: Matrix, queries: Matrix, dims: Sequence[int]
) -> Iterator[Candidate]:
    """Yield product quantisers of the full vectors at the bytes of each size's int8 prefix.

    At most ``dim`` bytes for each size: the most sub-quantisers that divide the full size, of 8
    bits each (fewer for galleries under 256 rows). Queries are not quantised. Trained on at most
    256 * 256 rows.

    References
    ----------
    Jegou, Douze, Schmid, Product quantization for nearest neighbor search, TPAMI 2011.
    """
    faiss = require("faiss", extra="index", why="the baseline product_quantisation")
    full = gallery.shape[1]
    n_bits = min(8, int(np.log2(len(gallery))))
    if n_bits < 2:
        raise DataError(f"{len(gallery)} rows are too few to learn a product quantiser.")
    divisors = [m for m in range(1, full + 1) if full % m == 0]
    budgets = sorted({max(m for m in divisors if m <= d) for d in dims})
    step = -(-len(gallery) // 65_536)

    def quantised(n_codes: int) -> tuple[int, Matrix]:
        # One thread each: faiss' k-means on few dims gets slower with more (seen on 2 cores).
        faiss.omp_set_num_threads(1)
        index = faiss.IndexPQ(full, n_codes, n_bits, faiss.METRIC_INNER_PRODUCT)
        index.pq.cp.niter = _PQ_ITERATIONS if n_codes <= full // 3 else _PQ_ITERATIONS_FINE
        index.pq.cp.min_points_per_centroid = 1  # no warning: small galleries are what they are
        index.train(np.ascontiguousarray(gallery[::step]))
        return index.sa_code_size(), index.sa_decode(index.sa_encode(gallery))

    with ThreadPoolExecutor(2) as pool:
        for n_codes, (size, decoded) in zip(budgets, pool.map(quantised, budgets), strict=True):
            yield Candidate(
                "product_quantisation",
                full,
                "pq",
                decoded,
                queries,
                size,
                macs_each=n_codes,
                macs_once=(1 << n_bits) * full,
                note=f"{n_codes} codes of {n_bits} bits, {full // n_codes} dims each",
            )


def csr(gallery: Matrix, queries: Matrix, dims: Sequence[int], *, seed: int) -> Iterator[Candidate]:
    """Yield sparse codes at the bytes of the smallest float32 prefixes (arXiv 2503.01776).

    An active value takes 4 bytes: its index as uint16 and its value as float16 (rounded for
    real). So k = d active values stand beside the float32 prefix of size d, at the same bytes.
    """
    require("torch", extra="fit", why="the baseline csr")
    from nestvec.measurement.sparse import SparseCoder

    full = gallery.shape[1]
    for active in [d for d in dims if d <= full // 3][:_CSR_BUDGETS]:
        coder = SparseCoder(active, seed=seed).fit(gallery)
        if 4 * coder.hidden * len(gallery) > _CSR_MOST_BYTES:
            raise DataError(f"csr is scored densely, and {len(gallery):,} rows are too many.")
        yield Candidate(
            "csr",
            full,
            "sparse",
            coder.transform(gallery),
            coder.transform(queries),
            bytes_per_vector=4 * active,
            macs_each=active,
            macs_once=full * coder.hidden,
            note=f"{active} of {coder.hidden} latents active; trained {coder.steps} steps",
        )
