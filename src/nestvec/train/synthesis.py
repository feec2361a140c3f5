"""Training pairs from a corpus without any label: diverse documents, and queries made of them.

The documents are clustered, sampled from every cluster by its size, near its centre first, and each
asks for itself through a rule or a function of the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nestvec import _checks
from nestvec._extras import require
from nestvec._progress import progress
from nestvec.corpus.examples import Examples
from nestvec.corpus.query_rules import query_rule
from nestvec.corpus.retrieval_set import RetrievalSet, Texts
from nestvec.errors import DataError
from nestvec.space import Embeddings

#: A document's text -> a query for it, or (query, document without it), or None.
MakeQuery = Callable[[str], str | tuple[str, str] | None]

_FEWEST_DOCUMENTS = 20
_FEWEST_A_CLUSTER = 2
_MOST_CLUSTERS = 1000


@dataclass(frozen=True)
class Synthetic:
    """Queries made of documents.

    Attributes
    ----------
    found : RetrievalSet
        Every document, without what asks for it where a rule took it out; the queries; which
        document each is of. `mine_negatives` takes it.
    examples : Examples
        ``"pairs"``: query, document.
    n_clusters
        How many the corpus was divided into.
    n_covered
        Clusters with a query.
    n_without
        Documents that were drawn and gave no query.
    """

    found: RetrievalSet
    examples: Examples
    n_clusters: int
    n_covered: int
    n_without: int

    def sentence(self) -> str:
        """Say in one line what was made."""
        return (
            f"{len(self.examples):,} pairs from {len(self.found.doc_ids):,} documents, of "
            f"{self.n_covered:,} of {self.n_clusters:,} clusters; {self.n_without:,} documents "
            f"that were drawn gave no query"
        )


def synthesize(
    documents: Texts,
    n: int,
    *,
    queries: str | MakeQuery = "summary",
    titles: Sequence[str] | None = None,
    vectors: Embeddings | None = None,
    model: Any = "all-MiniLM-L6-v2",
    n_clusters: int | None = None,
    temperature: float | int = 1.0,
    seed: int = 0,
) -> Synthetic:
    """Make training pairs of a corpus that has no labels.

    Parameters
    ----------
    documents
        Texts with ids.
    n
        Documents to draw. A rule looks first which documents can ask, and draws among those; a
        function is called for those drawn alone, so it may be slow.
    queries
        ``"title"``, ``"summary"`` or ``"lead"`` (see `nestvec.corpus.query_rule`), or a function:
        text to query (or to ``(query, document)``, or None if it gives none).
    titles
        One a document, for ``queries="title"``.
    vectors
        Of the documents, in their order or by their ids; None encodes them with ``model``.
    model
        See `nestvec.encode`.
    n_clusters, temperature, seed
        Of `sample_documents`.

    Raises
    ------
    DataError
        If the corpus is too small to cluster, the settings do not fit, or no query was made.

    Notes
    -----
    Queries that recur are left out, since it could not be told which document they ask for.

    References
    ----------
    Chandradevan, Dhole and Agichtein, DUQGen, NAACL 2024, arXiv:2404.02489. There a language model
    writes the queries; here whatever you hand in does, and without one the rule.
    """
    if titles is not None and len(titles) != len(documents):
        raise DataError(f"{len(titles)} titles for {len(documents)} documents; one each.")
    if queries == "title" and titles is None:
        raise DataError("queries='title' needs the titles: pass titles=, or take 'summary'.")
    texts = list(documents.texts)
    asks: list[str | None] = [None] * len(texts)
    able = np.ones(len(texts), bool)
    if isinstance(queries, str):
        rule = query_rule(queries)
        for row, text in enumerate(documents.texts):
            made = rule(text, titles[row] if titles is not None else "")
            if made is not None:
                asks[row], texts[row] = made
        able = _once(asks)
    array = _vectors(documents, vectors, model)
    rows, clusters = sample_documents(
        array, n, n_clusters=n_clusters, temperature=temperature, among=able, seed=seed
    )
    if not isinstance(queries, str):
        with progress("queries", len(rows), show=len(rows) >= 100, unit="documents") as advance:
            for row in rows:
                asks[row], texts[row] = _asked(queries, documents, int(row))
                advance(1)
        drawn = np.zeros(len(texts), bool)
        drawn[rows] = True
        able = _once([ask if here else None for ask, here in zip(asks, drawn, strict=True)])
    kept = [int(row) for row in rows if able[row]]
    if not kept:
        raise DataError(
            f"none of {len(rows)} documents gave a query. Take another rule, or a function that "
            f"writes queries."
        )
    ids = documents.ids
    found = RetrievalSet(
        "synthetic",
        list(ids),
        texts,
        [f"{ids[row]}?" for row in kept],
        [str(asks[row]) for row in kept],
        {f"{ids[row]}?": {ids[row]: 1} for row in kept},
    )
    pairs = Examples("pairs", ([str(asks[row]) for row in kept], [texts[row] for row in kept]))
    n_covered = len(np.unique(clusters[kept]))
    n_made = int(clusters.max()) + 1
    return Synthetic(found, pairs, n_made, n_covered, len(rows) - len(kept))


def sample_documents(
    vectors: Embeddings | ArrayLike,
    n: int,
    *,
    n_clusters: int | None = None,
    temperature: float | int = 1.0,
    among: ArrayLike | None = None,
    seed: int = 0,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw documents from every cluster of a corpus, by its size, near its centre first.

    Parameters
    ----------
    vectors : (n_documents, dim)
        Compared by cosine.
    n
        Documents to draw; all, if there are no more.
    n_clusters
        Of k-means; by default one for ten documents, at most 1,000 and at most ``n``.
    temperature
        Of the draw within a cluster, whose chances are softmax(cosine with the centre /
        temperature).
    among : (n_documents,) bool, optional
        Those that may be drawn. The others take part in the clustering.
    seed
        Of the clustering and the draw.

    Returns
    -------
    rows : (m,) int64
        Those drawn, sorted.
    clusters : (n_documents,) int64
        Of every document.

    Raises
    ------
    DataError
        If the corpus is too small to cluster, or the settings do not fit.
    """
    cluster = require("sklearn.cluster", extra="fit", why="clustering documents")
    array = vectors.array if isinstance(vectors, Embeddings) else vectors
    unit = _checks.normalise(_checks.as_matrix(array, name="vectors"), name="vectors")
    may = np.ones(len(unit), bool) if among is None else np.asarray(among, bool)
    if len(may) != len(unit):
        raise DataError(f"among has {len(may)} entries for {len(unit)} documents.")
    if n < 1 or not temperature > 0:
        raise DataError(f"n {n!r} must be 1 or more, and temperature {temperature!r} above 0.")
    if len(unit) < _FEWEST_DOCUMENTS:
        raise DataError(
            f"{len(unit)} documents are too few to cluster: {_FEWEST_DOCUMENTS} or more are "
            f"needed. Write queries for them by hand, or take more documents."
        )
    most = len(unit) // _FEWEST_A_CLUSTER
    if n_clusters is None:
        n_clusters = max(1, min(len(unit) // 10, _MOST_CLUSTERS, n))
    if not 1 <= n_clusters <= most:
        raise DataError(
            f"n_clusters {n_clusters} does not fit {len(unit)} documents: 1 to {most}, so that a "
            f"cluster has {_FEWEST_A_CLUSTER} on average."
        )
    if not may.any():
        raise DataError("no document can be drawn: none gives a query by this rule.")
    means = cluster.MiniBatchKMeans(n_clusters, n_init=1, batch_size=4096, random_state=seed)
    labels = means.fit_predict(unit).astype(np.int64)
    centres = np.zeros((n_clusters, unit.shape[1]))
    np.add.at(centres, labels, unit)  # k-means' own are those of its last sample
    lengths = np.maximum(np.linalg.norm(centres, axis=1), 1e-12)
    closeness = np.einsum("nd,nd->n", unit, centres[labels]) / lengths[labels]
    rng = np.random.default_rng(seed)
    drawn = []
    there = np.bincount(labels[may], minlength=n_clusters)
    for number, quota in enumerate(shares(there, n)):
        rows = np.flatnonzero((labels == number) & may)
        if quota:
            chance = np.exp((closeness[rows] - closeness[rows].max()) / temperature)
            drawn.append(rng.choice(rows, quota, replace=False, p=chance / chance.sum()))
    return np.sort(np.concatenate(drawn)).astype(np.int64), labels


def shares(sizes: Sequence[int] | NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Divide ``n`` draws among clusters by their sizes, each at least one, none more than it has.

    Where there are fewer draws than clusters, the largest get one.

    >>> shares([6, 3, 1, 0], 5).tolist(), shares([6, 3, 1, 0], 2).tolist()
    ([3, 1, 1, 0], [1, 1, 0, 0])
    """
    counts = np.asarray(sizes, np.int64)
    n = min(n, int(counts.sum()))
    if n < np.count_nonzero(counts):
        found = np.zeros_like(counts)
        found[np.argsort(-counts, kind="stable")[:n]] = 1
        return found
    ideal = n * counts / counts.sum()
    found = np.maximum(np.floor(ideal).astype(np.int64), counts > 0)
    while found.sum() < n:
        found[np.argmax(np.where(found < counts, ideal - found, -np.inf))] += 1
    while found.sum() > n:
        found[np.argmax(np.where(found > 1, found - ideal, -np.inf))] -= 1
    return found


def _once(asks: Sequence[str | None]) -> NDArray[np.bool_]:
    """Say which queries are there, and there once."""
    times: dict[str, int] = {}
    for ask in asks:
        if ask is not None:
            times[ask.casefold()] = times.get(ask.casefold(), 0) + 1
    return np.array([ask is not None and times[ask.casefold()] == 1 for ask in asks])


def _vectors(documents: Texts, vectors: Embeddings | None, model: Any) -> Embeddings:
    from nestvec.encoders import encode

    if vectors is None:
        return encode(documents.texts, model=model, ids=documents.ids)
    if vectors.has_ids:
        return vectors[vectors.rows_of(documents.ids)]
    if len(vectors) != len(documents):
        raise DataError(f"{len(vectors)} vectors for {len(documents)} documents; one each.")
    return vectors


def _asked(make: MakeQuery, documents: Texts, row: int) -> tuple[str | None, str]:
    """Call the user's function for a document."""
    text = documents.texts[row]
    made = make(text)
    query, rest = made if isinstance(made, tuple) else (made, text)
    if query is None:
        return None, text
    if not isinstance(query, str) or not isinstance(rest, str) or not rest.strip():
        raise DataError(
            f"the function returned {made!r} for document {documents.ids[row]!r}: a query, a "
            f"(query, document) pair of texts, or None is needed."
        )
    return (query.strip() or None), rest
