"""Hard negatives: what a model finds for a query and should not have found.

What is found but not judged may well be right. So nothing that is judged relevant is ever taken,
nor what scores nearly as high as the right document does, nor its near-duplicates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec import _checks
from nestvec.corpus.examples import Examples
from nestvec.corpus.retrieval_set import RetrievalSet
from nestvec.errors import DataError
from nestvec.search.exact import top_k
from nestvec.space import Embeddings, Space

Matrix = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Mined:
    """Triplets, and what the guard did.

    Attributes
    ----------
    examples
        ``"triplets"``: query, relevant document, hard negative; a row a negative.
    n_pairs
        (query, relevant document) pairs that negatives were looked for.
    n_without
        Pairs for which no candidate was left; they are not in ``examples``.
    n_candidates, n_relevant, n_too_close, n_duplicates
        Candidates looked at, and how many of them were left out because they are relevant (or the
        query's own text), score too close to the relevant document, or nearly repeat it.
    """

    examples: Examples
    n_pairs: int
    n_without: int
    n_candidates: int
    n_relevant: int
    n_too_close: int
    n_duplicates: int

    def sentence(self) -> str:
        """Say in one line what was found and what was left out."""
        return (
            f"{len(self.examples):,} triplets of {self.n_pairs:,} pairs ({self.n_without:,} had no "
            f"candidate left); of {self.n_candidates:,} candidates {self.n_relevant:,} are "
            f"relevant, {self.n_too_close:,} score too close to the relevant document, "
            f"{self.n_duplicates:,} nearly repeat it"
        )


def mine_negatives(
    found: RetrievalSet | Examples,
    *,
    documents: Any = None,
    queries: Embeddings | None = None,
    model: Any = "all-MiniLM-L6-v2",
    ranks: tuple[int, int] = (1, 100),
    n_negatives: int = 1,
    highest_share: float | int | None = 0.95,
    near_duplicate: float | int | None = 0.95,
    plan: Any = None,
    seed: int = 0,
) -> Mined:
    """Find hard negatives for each (query, relevant document) pair.

    Parameters
    ----------
    found
        Documents, queries and judgements, or ``"pairs"`` of queries and relevant documents, whose
        documents are then the gallery.
    documents, queries
        Vectors of the documents and queries, by their ids (for pairs: in the order of first
        occurrence, without ids). `Embeddings`; or for the documents a `nestvec.Index`, which is
        searched with ``plan``. None encodes them with ``model``. Cut them first to mine with a
        short prefix.
    model
        See `nestvec.encode`.
    ranks
        Negatives are drawn from these places of each query's ranking, the first is 1.
    n_negatives
        Negatives a pair, drawn without replacement; fewer where fewer are left.
    highest_share
        A candidate that scores above this share of the pair's relevant document is left out: it is
        as likely right. None keeps them (arXiv:2407.15831 found 0.95 best of what it tried).
    near_duplicate
        A candidate whose cosine with the relevant document is this or more is left out. None keeps
        them. The same text is always left out.
    plan
        Of the index; by default what it has stored, else exact search.
    seed
        Of the draw.

    Raises
    ------
    DataError
        If the settings do not fit, ids are unknown, or no candidate was left for any pair.
    SpaceMismatchError
        If documents and queries live in two spaces.
    """
    _check_settings(ranks, n_negatives, highest_share, near_duplicate)
    if isinstance(found, Examples):
        found = as_retrieval_set(found)
        by_row = True
    else:
        by_row = False
    documents, queries = _vectors(found, documents, queries, model, by_row)
    place = {one: row for row, one in enumerate(found.doc_ids)}
    pairs = [
        (row, place[doc])
        for row, query in enumerate(found.query_ids)
        for doc, grade in found.qrels.get(query, {}).items()
        if grade > 0 and doc in place
    ]
    if not pairs:
        raise DataError(f"{found.name}: no query has a relevant document, so there are no pairs.")
    asked = np.unique([query for query, _ in pairs])
    depth = min(ranks[1], len(found.doc_ids))
    if isinstance(documents, Embeddings):
        candidates, rows_of = _exact(documents, queries.array[asked], depth)
    else:
        positives = np.unique([document for _, document in pairs])
        candidates, rows_of = _by_index(documents, queries[asked], positives, depth, place, plan)
    listed = dict(zip(asked.tolist(), candidates, strict=True))
    rows = _unit(queries.array, queries.space)
    return _chosen(
        found,
        pairs,
        {query: ranked[ranks[0] - 1 :] for query, ranked in listed.items()},
        rows,
        rows_of,
        n_negatives,
        highest_share,
        near_duplicate,
        np.random.default_rng(seed),
    )


def as_retrieval_set(pairs: Examples) -> RetrievalSet:
    """Return pairs as documents, queries and judgements; texts that recur are one.

    Ids are row numbers as text, in the order of first occurrence.
    """
    if pairs.kind != "pairs":
        raise DataError(f"negatives are mined for pairs, and these are {pairs.kind}.")
    sides = [{text: str(n) for n, text in enumerate(dict.fromkeys(side))} for side in pairs.texts]
    qrels: dict[str, dict[str, int]] = {}
    for query, document in zip(*pairs.texts, strict=True):
        qrels.setdefault(sides[0][query], {})[sides[1][document]] = 1
    queries, documents = sides
    return RetrievalSet(
        "pairs",
        list(documents.values()),
        list(documents),
        list(queries.values()),
        list(queries),
        qrels,
    )


def _check_settings(
    ranks: tuple[int, int],
    n_negatives: int,
    highest_share: float | int | None,
    near_duplicate: float | int | None,
) -> None:
    if not 1 <= ranks[0] <= ranks[1]:
        raise DataError(f"ranks {ranks!r} are not places: the first is 1, like (1, 100).")
    if n_negatives < 1:
        raise DataError(f"n_negatives {n_negatives!r} must be 1 or more.")
    for name, value in (("highest_share", highest_share), ("near_duplicate", near_duplicate)):
        if value is not None and not 0 < value <= 1:
            raise DataError(f"{name} {value!r} must lie above 0 and at most at 1, or be None.")


def _vectors(
    found: RetrievalSet, documents: Any, queries: Embeddings | None, model: Any, by_row: bool
) -> tuple[Any, Embeddings]:
    """Return documents (Embeddings in the set's order, or an index) and queries, of one Space."""
    from nestvec.encoders import encode

    if documents is None:
        documents = encode(found.doc_texts, model=model, ids=found.doc_ids)
    elif isinstance(documents, Embeddings):
        documents = _in_order(documents, found.doc_ids, "documents", by_row)
    if queries is None:
        queries = encode(found.query_texts, model=model, role="query", ids=found.query_ids)
    else:
        queries = _in_order(queries, found.query_ids, "queries", by_row)
    documents.space.check_same(queries.space)
    return documents, queries


def _in_order(vectors: Embeddings, ids: list[str], what: str, by_row: bool) -> Embeddings:
    if vectors.has_ids and not by_row:
        return vectors[vectors.rows_of(ids)]
    if len(vectors) != len(ids):
        raise DataError(f"{len(vectors)} vectors of {what} for {len(ids)} {what}; one each.")
    return vectors.replaced(vectors.array, vectors.space, np.array(ids))


def _unit(rows: Matrix, space: Space) -> Matrix:
    return rows if space.metric == "dot" or space.has_unit_rows else _checks.normalise(rows)


def _exact(
    documents: Embeddings, queries: Matrix, depth: int
) -> tuple[Rows, Callable[[Rows], Matrix]]:
    rows = _unit(documents.array, documents.space)
    ranked, _ = top_k(_unit(queries, documents.space), rows, depth)
    return ranked, lambda wanted: rows[wanted]


def _by_index(
    index: Any, queries: Embeddings, positives: Rows, depth: int, place: dict[str, int], plan: Any
) -> tuple[list[Rows], Callable[[Rows], Matrix]]:
    """Search an index; its ids, as text, are those of the documents."""
    from nestvec.search.store.snapshot import as_matrix

    hits = index.search(queries, depth, plan=plan)
    listed = [[str(one) for one, _ in hit] for hit in hits]
    unknown = next((one for hit in listed for one in hit if one not in place), None)
    if unknown is not None:
        raise DataError(
            f"the index holds {unknown!r}, which is none of the documents: mine with the index of "
            f"these documents, or leave it out to search their vectors."
        )
    ranked = [np.array([place[one] for one in hit], np.int64) for hit in listed]
    ids = list(place)
    whole = np.issubdtype(hits.ids.dtype, np.integer)
    looked_at = np.unique(np.concatenate([*ranked, positives]))  # read once, not for each pair
    names = [int(ids[row]) if whole else ids[row] for row in looked_at]
    rows = _unit(as_matrix(index.get(names)["vector"]).astype(np.float32), index.space)
    return ranked, lambda wanted: rows[np.searchsorted(looked_at, wanted)]


def _chosen(
    found: RetrievalSet,
    pairs: list[tuple[int, int]],
    candidates: dict[int, Rows],
    queries: Matrix,
    rows_of: Callable[[Rows], Matrix],
    n_negatives: int,
    highest_share: float | int | None,
    near_duplicate: float | int | None,
    rng: np.random.Generator,
) -> Mined:
    relevant: dict[int, set[str]] = {}
    for query, document in pairs:
        relevant.setdefault(query, set()).add(found.doc_texts[document])
    counts = dict.fromkeys(("candidates", "relevant", "too_close", "duplicates"), 0)
    columns: tuple[list[str], list[str], list[str]] = ([], [], [])
    n_without = 0
    for query, document in pairs:
        ranked = candidates[query]
        # by text, so that a relevant document that stands in the gallery twice is left out twice
        right_texts = relevant[query] | {found.query_texts[query]}
        own = np.array([found.doc_texts[row] in right_texts for row in ranked], bool)
        vectors = rows_of(np.append(ranked, document))
        scores = vectors @ queries[query]
        right = scores[-1]
        close = np.zeros(len(ranked), bool)
        if highest_share is not None:
            close = scores[:-1] > right - (1 - highest_share) * abs(right)
        same = np.zeros(len(ranked), bool)
        if near_duplicate is not None:
            lengths = np.linalg.norm(vectors, axis=1)
            cosines = vectors[:-1] @ vectors[-1] / (lengths[:-1] * lengths[-1])
            same = cosines >= near_duplicate
        counts["candidates"] += len(ranked)
        counts["relevant"] += int(own.sum())
        counts["duplicates"] += int((same & ~own).sum())
        counts["too_close"] += int((close & ~same & ~own).sum())
        left = ranked[~(own | close | same)]
        if not len(left):
            n_without += 1
            continue
        for row in rng.choice(left, min(n_negatives, len(left)), replace=False):
            for column, text in zip(
                columns,
                (found.query_texts[query], found.doc_texts[document], found.doc_texts[row]),
                strict=True,
            ):
                column.append(text)
    if not columns[0]:
        raise DataError(
            f"no candidate was left for any of {len(pairs)} pairs. Look deeper (ranks), or raise "
            f"highest_share or near_duplicate, or set them to None."
        )
    return Mined(
        Examples("triplets", columns),
        len(pairs),
        n_without,
        counts["candidates"],
        counts["relevant"],
        counts["too_close"],
        counts["duplicates"],
    )
