"""What an upgrade is judged by: relevance judgements, classes, or the old model's neighbours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec.errors import DataError
from nestvec.measurement.label_free import neighbour_recall
from nestvec.measurement.nearest import nearest
from nestvec.measurement.tasks import RetrievalTask, check_positive, unit
from nestvec.space import Embeddings

Rows = NDArray[np.int64]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Truth:
    """Which documents a query should find, and how a ranking of them is scored.

    Attributes
    ----------
    metric
        Its name, like ``"nDCG@10"``; values lie in [0, 1].
    source
        ``"qrels"``, ``"labels"`` or ``"neighbours"``.
    asked
        Rows of the queries that can be judged, in order.
    score
        Gallery rows (n_asked, k), best first -> one value a query (n_asked,).
    relevant
        Number of an asked query -> its relevant gallery rows.
    """

    metric: str
    source: str
    asked: Rows
    score: Callable[[Rows], Values]
    relevant: Callable[[int], Rows]


def choose(
    docs: Embeddings,
    queries: Embeddings,
    qrels: Mapping[Any, Mapping[Any, int]] | None,
    doc_labels: Sequence[Any] | NDArray[Any] | None,
    query_labels: Sequence[Any] | NDArray[Any] | None,
    k: int,
) -> Truth:
    """Return the best truth there is: judgements, else classes, else the old model's neighbours."""
    check_positive(k, "k")
    if qrels is not None and (doc_labels is not None or query_labels is not None):
        raise DataError("judge by qrels or by labels, not by both.")
    if (doc_labels is None) != (query_labels is None):
        raise DataError("labels are needed of both sides: doc_labels and query_labels.")
    if qrels is not None:
        return by_qrels(docs, queries, qrels, k)
    if doc_labels is not None:
        return by_labels(docs, queries, doc_labels, query_labels, k)
    return by_neighbours(docs, queries, k)


def by_qrels(
    docs: Embeddings, queries: Embeddings, qrels: Mapping[Any, Mapping[Any, int]], k: int
) -> Truth:
    """Judge by nDCG@k; only queries with a relevant document are asked."""
    metric = f"nDCG@{k}"
    task = RetrievalTask(docs, queries, qrels, metrics=(metric,))
    row_of = {str(name): row for row, name in enumerate(docs.ids.tolist())}
    relevant = [
        np.array([row_of[d] for d, grade in task.qrels[q].items() if grade > 0], dtype=np.int64)
        for q in task.query_ids
    ]
    return Truth(
        metric,
        "qrels",
        task.asked,
        lambda rows: task.score_ranking(rows)[metric],
        relevant.__getitem__,
    )


def by_labels(
    docs: Embeddings, queries: Embeddings, doc_labels: Any, query_labels: Any, k: int
) -> Truth:
    """Judge by how many of the k found are of the query's class."""
    of_docs, of_queries = np.asarray(doc_labels), np.asarray(query_labels)
    for labels, side, name in ((of_docs, docs, "doc"), (of_queries, queries, "query")):
        if labels.shape != (len(side),):
            raise DataError(
                f"{name}_labels: shape {labels.shape} for {len(side)} rows; one label a row is "
                f"needed."
            )
    asked = np.flatnonzero(np.isin(of_queries, of_docs))
    if not len(asked):
        raise DataError("query_labels: no query is of a class that the documents have.")
    wanted = of_queries[asked]
    return Truth(
        f"same class@{k}",
        "labels",
        asked,
        lambda rows: (of_docs[rows] == wanted[:, None]).mean(axis=1),
        lambda i: np.flatnonzero(of_docs == wanted[i]),
    )


def by_neighbours(docs: Embeddings, queries: Embeddings, k: int) -> Truth:
    """Judge by how many of the k that the old model finds at full size are found.

    The old model is right by definition, so this can tell that nothing changes and never that
    anything gets better. (By the new model's neighbours a wrong model would be right.)
    """
    found = nearest(unit(queries), unit(docs), k)
    return Truth(
        f"old neighbours kept@{k}",
        "neighbours",
        np.arange(len(queries)),
        lambda rows: neighbour_recall(found, rows),
        found.__getitem__,
    )
