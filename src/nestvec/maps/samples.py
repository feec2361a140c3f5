"""What the adaptor learns from and what it is judged on: rows, queries and relevance, split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec import _checks
from nestvec.errors import DataError, SpaceError
from nestvec.maps import guard
from nestvec.space import Embeddings

Matrix = NDArray[np.float32]
_MOST_HELD_OUT = 1000  # rows; more would cost time and tell no more


@dataclass(frozen=True)
class Labels:
    """Queries (unit rows) with, for each, the rows of its relevant documents and their grades."""

    queries: Matrix
    relevant: list[NDArray[np.int64]]
    grades: list[NDArray[np.float64]]

    def __len__(self) -> int:
        return len(self.queries)

    def some(self, rows: NDArray[np.int64]) -> Labels:
        """Return some of the queries."""
        return Labels(
            self.queries[rows], [self.relevant[i] for i in rows], [self.grades[i] for i in rows]
        )

    def moved(self, kept: NDArray[np.int64]) -> Labels:
        """Return the labels for the documents ``kept`` (sorted rows), numbered anew."""
        return replace(self, relevant=[np.searchsorted(kept, rows) for rows in self.relevant])

    def without(self, documents: NDArray[np.int64]) -> Labels:
        """Leave out some documents, and queries that have no other."""
        keep = [~np.isin(rows, documents) for rows in self.relevant]
        left = np.flatnonzero([bool(k.any()) for k in keep])
        return Labels(
            self.queries[left],
            [self.relevant[i][keep[i]] for i in left],
            [self.grades[i][keep[i]] for i in left],
        )


@dataclass(frozen=True)
class Examples:
    """What a map is trained on: unit rows of documents, and queries without or with labels."""

    rows: Matrix
    unlabelled: Matrix | None = None
    labels: Labels | None = None


@dataclass(frozen=True)
class Split:
    """The held-in part to train on, the held-out part as two scorers, and both parts together."""

    held_in: Examples
    everything: Examples
    criterion: str
    n_held_out: int
    stop: guard.Scorer  # for early stopping
    judge: guard.Scorer  # for the guard


def unit_rows(values: Any, documents: Any, *, name: str, dim: int) -> Matrix:
    """Return rows at length 1; Embeddings must be of the documents' Space."""
    if isinstance(values, Embeddings):
        refuse_lengths(values)
        if isinstance(documents, Embeddings):
            documents.space.check_same(values.space)
        values = values.array
    return _checks.normalise(_checks.as_matrix(values, name=name, dim=dim), name=name)


def refuse_lengths(values: Any) -> None:
    """Raise `SpaceError` for vectors whose lengths mean something: only directions are learned."""
    if isinstance(values, Embeddings) and values.space.metric == "dot":
        if not values.space.has_unit_rows:
            raise SpaceError(
                f"{values.space.label} is compared by dot product of unnormalised vectors; an "
                f"adaptor keeps directions only. Call normalised() first, or use a "
                f"PrincipalRotation, which keeps every inner product."
            )


def read_labels(qrels: Any, queries: Any, documents: Any, *, dim: int) -> Labels:
    """Read relevance as ``{query id: {document id: grade}}`` or as (query row, document row) pairs.

    Queries without a relevant document (grade > 0) are left out; an id or row that does not exist
    is a `DataError`.
    """
    vectors = unit_rows(queries, documents, name="queries", dim=dim)
    found: dict[int, dict[int, float]] = {}
    if isinstance(qrels, Mapping):
        if not isinstance(queries, Embeddings) or not isinstance(documents, Embeddings):
            raise DataError(
                "qrels by id need queries and documents with ids, that is Embeddings. "
                "For arrays pass rows: an (n_pairs, 2) int array of (query, document)."
            )
        graded = {q: {d: g for d, g in r.items() if g > 0} for q, r in qrels.items()}
        graded = {q: r for q, r in graded.items() if r}
        asked = queries.rows_of(list(graded)) if graded else []
        for row, relevant in zip(asked, graded.values(), strict=True):
            at = documents.rows_of(list(relevant))
            found[int(row)] = dict(zip(at.tolist(), relevant.values(), strict=True))
    else:
        pairs = np.asarray(qrels)
        if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind not in "iu":
            raise DataError(
                f"qrels: expected {{query id: {{document id: grade}}}} or an (n_pairs, 2) int "
                f"array of (query row, document row), got shape {pairs.shape} of {pairs.dtype}."
            )
        limits = np.array([len(vectors), len(documents)])
        outside = ((pairs < 0) | (pairs >= limits)).any(axis=1)
        if outside.any():
            row = int(np.argmax(outside))
            raise DataError(
                f"qrels: pair {row} is {pairs[row].tolist()}, but there are {limits[0]} queries "
                f"and {limits[1]} documents."
            )
        for query, document in pairs.tolist():
            found.setdefault(query, {})[document] = 1.0
    if not found:
        raise DataError("qrels name no relevant document (grade > 0); leave qrels out.")
    order = sorted(found)
    return Labels(
        vectors[order],
        [np.array(list(found[q]), dtype=np.int64) for q in order],
        [np.array(list(found[q].values()), dtype=np.float64) for q in order],
    )


def draw(n: int, size: int, always: list[Labels], rng: np.random.Generator) -> NDArray[np.int64]:
    """Choose rows to learn from, sorted: at most ``size`` at random, and every relevant one."""
    chosen = np.arange(n) if n <= size else rng.choice(n, size, replace=False)
    return np.unique(np.concatenate([chosen, *(r for labels in always for r in labels.relevant)]))


def split(
    everything: Examples, *, dims: tuple[int, ...], fraction: float, rng: np.random.Generator
) -> Split:
    """Hold out labelled queries, else unlabelled queries, else documents.

    Every second held-out query shares no relevant document with training: pairs that name one are
    left out. The others stand for queries about documents that the labels know.
    """
    rows, unlabelled, labels = everything.rows, everything.unlabelled, everything.labels
    if labels is not None and len(labels) > 1:
        out, held_in = _part(len(labels), fraction, rng)
        held, new = labels.some(out), labels.some(out[::2])
        seen = labels.some(held_in).without(np.concatenate(new.relevant))
        if len(seen):
            relevant = list(zip(held.relevant, held.grades, strict=True))
            scorer = guard.ndcg(held.queries, rows, relevant, dims)
            held_in_part = replace(everything, labels=seen)
            return Split(held_in_part, everything, "nDCG@10", len(out), scorer, scorer)
    everything = replace(everything, labels=None)
    if unlabelled is not None and len(unlabelled) > 1:
        out, held_in = _part(len(unlabelled), fraction, rng)
        asks, part = unlabelled[out], replace(everything, unlabelled=unlabelled[held_in])
    else:
        out, held_in = _part(len(rows), fraction, rng)
        asks, part = rows[out], Examples(rows[held_in])
    # The held-in rows are the gallery: as in use, a new row asks among rows that were fitted.
    stop, judge = (guard.closeness_kept(asks[half::2], part.rows, dims) for half in (0, 1))
    return Split(part, everything, "closeness kept@10", len(asks[1::2]), stop, judge)


def _part(
    n: int, fraction: float, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    n_out = min(max(2, round(n * fraction)), _MOST_HELD_OUT, n - 1)
    order = rng.permutation(n)
    return np.sort(order[:n_out]), np.sort(order[n_out:])


def judged_by_queries(parts: Split, labels: Labels, rows: Matrix, dims: tuple[int, ...]) -> Split:
    """Let the guard judge by the user's own queries instead."""
    relevant = list(zip(labels.relevant, labels.grades, strict=True))
    scorer = guard.ndcg(labels.queries, rows, relevant, dims)
    return replace(parts, criterion="nDCG@10", n_held_out=len(labels), judge=scorer)


def judged_by_pairs(
    parts: Split, validation: Any, documents: Any, dims: tuple[int, ...], *, dim: int
) -> Split:
    """Let the guard judge by the user's own scored pairs instead."""
    if not isinstance(validation, tuple) or len(validation) != 3:
        raise DataError(
            "validation is a tuple: (queries, qrels), or (first, second, scores) for pairs."
        )
    first, second = (unit_rows(v, documents, name="pairs", dim=dim) for v in validation[:2])
    scores = np.asarray(validation[2], dtype=np.float64)
    if scores.shape != (len(first),) or len(first) != len(second):
        raise DataError(
            f"validation: {len(first)} and {len(second)} rows with scores of shape "
            f"{scores.shape}; one score a pair is needed."
        )
    scorer = guard.spearman(first, second, scores, dims)
    return replace(parts, criterion="Spearman", n_held_out=len(scores), judge=scorer)
