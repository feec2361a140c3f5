"""Retrieval metrics, one value a query, from ir-measures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from nestvec._extras import require
from nestvec.errors import DataError

Qrels = Mapping[str, Mapping[str, int]]  #: query id -> document id -> grade, > 0 is relevant

_CUTOFF = re.compile(r"@(\d+)$")


def depth(metrics: Sequence[str]) -> int:
    """Return how many documents a ranking needs for these metrics: the largest cutoff.

    >>> depth(["nDCG@10", "R@100"])
    100
    """
    cutoffs = [_CUTOFF.search(name) for name in metrics]
    for name, found in zip(metrics, cutoffs, strict=True):
        if not found:
            raise DataError(
                f"metric {name!r} has no cutoff, and a search returns the nearest k only. "
                f"Write one, like nDCG@10, R@100 or AP@10."
            )
    return max(int(found[1]) for found in cutoffs if found)


def per_query(
    rankings: Sequence[Sequence[str]],
    query_ids: Sequence[str],
    qrels: Qrels,
    metrics: Sequence[str],
) -> dict[str, NDArray[np.float64]]:
    """Return ``{metric: values (n_queries,)}`` for ranked document ids, best first.

    The names are those of ir-measures, which computes them (with pytrec_eval where it can).
    ``nDCG@k`` has linear gains and a log2(rank + 1) discount. ``R@k`` is the share of all relevant
    documents among the first k. ``AP@k`` sums the precision at each relevant rank <= k and divides
    by the number of *all* relevant documents. The mAP@10 of the MRL paper (arXiv 2205.13147)
    divides by the relevant ones found in the list, so it is never smaller than this one.
    """
    ir = require("ir_measures", extra="measure", why="scoring a retrieval run")
    try:
        measures = {name: ir.parse_measure(name) for name in metrics}
    except (NameError, ValueError, SyntaxError) as error:
        raise DataError(
            f"ir-measures does not know one of the metrics {', '.join(metrics)} ({error}). "
            f"Use names like nDCG@10, R@100, AP@10, RR@10."
        ) from error
    # pytrec_eval sorts by score and breaks ties by id, so ranks stand in for scores: our own
    # order, ties included, is what is judged.
    run = {
        query: {doc: float(-rank) for rank, doc in enumerate(ranking)}
        for query, ranking in zip(query_ids, rankings, strict=True)
    }
    judged = {query: dict(qrels[query]) for query in query_ids}
    place = {query: row for row, query in enumerate(query_ids)}
    values = {name: np.zeros(len(query_ids)) for name in metrics}
    name_of = {measure: name for name, measure in measures.items()}
    for found in ir.iter_calc(list(measures.values()), judged, run):
        values[name_of[found.measure]][place[found.query_id]] = found.value
    return values
