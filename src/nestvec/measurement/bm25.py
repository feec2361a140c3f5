"""The word-matching baselines of retrieval: BM25, and its fusion with dense search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nestvec._extras import require

Rows = NDArray[np.int64]

FUSION_DEPTH = 100  # documents of each list that are fused
_RRF_K = 60


def bm25(docs: Sequence[str], queries: Sequence[str], depth: int) -> Rows:
    """Return the best ``depth`` documents of each query, (n_queries, depth) rows, -1 for none.

    bm25s (Lucene's BM25, k1=0.9, b=0.4 as in BEIR) on words stemmed by PyStemmer, English stop
    words dropped. A document that shares no word with the query is not found.
    """
    bm25s = require("bm25s", extra="measure", why="the baseline bm25")
    stemmer = require("Stemmer", extra="measure", why="the baseline bm25").Stemmer("english")
    tokens = [
        bm25s.tokenize(list(texts), stopwords="en", stemmer=stemmer, show_progress=False)
        for texts in (docs, queries)
    ]
    depth = min(depth, len(docs))
    if not any(len(words) for words in tokens[0].ids):  # bm25s fails without a single word
        return np.full((len(queries), depth), -1, np.int64)
    index = bm25s.BM25(k1=0.9, b=0.4, method="lucene")
    index.index(tokens[0], show_progress=False)
    rows, scores = index.retrieve(tokens[1], k=depth, show_progress=False)
    return np.where(np.asarray(scores) > 0, np.asarray(rows), -1).astype(np.int64)


def reciprocal_rank_fusion(*rankings: Rows, n_docs: int) -> Rows:
    """Fuse rankings (n_queries, any) by the sum of 1 / (60 + rank); ties to the lower row.

    References
    ----------
    Cormack, Clarke, Buettcher, Reciprocal rank fusion, SIGIR 2009 (k = 60 is theirs).
    """
    depth = max(r.shape[1] for r in rankings)
    fused = np.full((len(rankings[0]), min(depth, n_docs)), -1, np.int64)
    for query in range(len(fused)):
        scores = np.zeros(n_docs)
        for ranking in rankings:
            rows = ranking[query]
            found = rows >= 0
            scores[rows[found]] += 1 / (_RRF_K + 1 + np.flatnonzero(found))
        best = np.argsort(-scores, kind="stable")[: fused.shape[1]]
        kept = best[scores[best] > 0]
        fused[query, : len(kept)] = kept
    return fused
