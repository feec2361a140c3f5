"""What an upgrade will take, before it is begun: some rows are embedded, and timed."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from nestvec._extras import require
from nestvec.errors import DataError
from nestvec.search.index import Index
from nestvec.space import Embeddings, Space
from nestvec.upgrade.sources import NewVectors, Source, check_column, has_content

pa = require("pyarrow", extra="index", why="an index")

_BATCH = 256  # as a backfill has them


@dataclass(frozen=True)
class Estimate:
    """What re-embedding all rows of an index takes.

    Parameters
    ----------
    rows, sampled
        Of the index; how many were embedded to find out.
    rows_per_second, seconds
        As measured here; for all rows.
    characters
        Of all texts, about; what services that embed charge for (a token is about four).
    bytes
        Of the new vectors on disk. A finish needs as much again, until the old ones are gone.
    cost
        ``characters`` at the price that was given; None if none was.
    """

    rows: int
    sampled: int
    rows_per_second: float
    seconds: float
    characters: int
    bytes: int
    cost: float | None

    @property
    def sentence(self) -> str:
        """What it comes to."""
        paid = "" if self.cost is None else f", {self.cost:,.2f} to pay"
        return (
            f"{self.rows:,} rows at {self.rows_per_second:,.0f} a second: "
            f"{duration(self.seconds)}, {self.characters:,} characters{paid}, "
            f"{self.bytes / 1e6:,.0f} MB of new vectors (measured on {self.sampled:,} rows)."
        )


def estimate(
    index: Index | str | os.PathLike[str],
    source: Source,
    *,
    column: str,
    space: Space | None = None,
    sample_size: int = 256,
    price_per_million: float | int | None = None,
    seed: int = 0,
) -> Estimate:
    """Say what an upgrade will take, by embedding a random sample of rows.

    Parameters
    ----------
    index, source, column
        As for `Upgrade.backfill`; vectors that are made already take no time.
    space
        The new Space, where the source is a function that returns arrays.
    sample_size
        Rows to embed; the first of them (up to 32) are not timed, for models warm up, unless there
        are no others.
    price_per_million
        Of a million characters.
    """
    if isinstance(source, Embeddings):
        raise DataError("vectors that are made already need no estimate: they cost nothing more.")
    found = index if isinstance(index, Index) else Index.open(index)
    ids, texts, _ = sample_texts(found, column, sample_size, seed=seed)
    known = space or getattr(source, "space", None)
    if known is None:
        raise DataError("a function does not say of which Space its vectors are: pass space=.")
    vectors = NewVectors(source, column, known, found.schema.names)
    first = max(1, min(_BATCH, len(ids)) // 8)
    started = time.perf_counter()
    vectors.of(ids[:first], texts[:first])  # a model's first batch is slower
    n_timed = first
    if first < len(ids):
        n_timed, started = len(ids) - first, time.perf_counter()
    for at in range(first, len(ids), _BATCH):
        vectors.of(ids[at : at + _BATCH], texts[at : at + _BATCH])
    rate = n_timed / (time.perf_counter() - started)
    n = len(found)
    characters = round(n * float(np.mean([len(str(text)) for text in texts])))
    return Estimate(
        rows=n,
        sampled=len(ids),
        rows_per_second=rate,
        seconds=n / rate,
        characters=characters,
        bytes=n * known.size * np.dtype(found.stats()["precision"]).itemsize,
        cost=None if price_per_million is None else characters / 1e6 * price_per_million,
    )


def sample_texts(
    index: Index, column: str, n: int, *, seed: int = 0
) -> tuple[np.ndarray, list[Any], int]:
    """Return ids and texts of ``n`` rows drawn at random, and the version they are of."""
    check_column(column, index.schema.names)
    snapshot = index._home.snapshot()
    row_ids = snapshot.keys().row_ids
    if not len(row_ids):
        raise DataError(f"{index.path} has no rows: nothing is to be upgraded.")
    order = np.random.default_rng(seed).permutation(len(row_ids))
    for most in (n, len(order)):  # all, if that many have nothing to embed
        table = snapshot.read(np.sort(row_ids[order[:most]]), ["id", column])
        table = table.filter(pa.array(has_content(table[column].to_pylist())))[:n]
        if len(table):
            break
    else:
        raise DataError(f"the column {column!r} of {index.path} holds nothing to embed.")
    ids = np.array(table["id"].to_pylist())
    return ids, table[column].to_pylist(), snapshot.version


def duration(seconds: float) -> str:
    """Return a time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
