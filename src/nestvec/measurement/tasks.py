"""What vectors are asked to do: retrieval, classification, STS, or keep their neighbours.

A task scores any two sides of vectors by inner product and returns one value an item (a query, a
test row, a pair), so that every method can be resampled on the same items.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nestvec import _checks
from nestvec._extras import require
from nestvec.errors import DataError, SpaceError
from nestvec.measurement import bootstrap, label_free, metrics
from nestvec.measurement.nearest import nearest
from nestvec.space import Embeddings, Space

Matrix = NDArray[np.float32]
Values = dict[str, NDArray[np.float64]]

LABEL_FREE_QUERIES = 1000  # rows that ask for their neighbours when nobody else does


def stamped(vectors: Embeddings | ArrayLike, name: str) -> Embeddings:
    """Return Embeddings; a bare array gets the Space of arrays without a stamp."""
    if not isinstance(vectors, Embeddings):
        matrix = _checks.as_matrix(vectors, name=name)
        space = Space.declared("array", dim=matrix.shape[1], normalisation="none")
        vectors = Embeddings(matrix, space)
    if vectors.space.metric == "dot" and not vectors.space.has_unit_rows:
        raise SpaceError(
            f"{name}: {vectors.space.label} is compared by dot product of unnormalised vectors, "
            f"and a prefix is L2-normalised, so sizes cannot be compared. Call normalised() first "
            f"to measure them by cosine."
        )
    return vectors


def check_positive(value: int, name: str) -> None:
    """Refuse a count below 1."""
    if value < 1:
        raise DataError(f"{name}={value}: pass 1 or more.")


def unit(vectors: Embeddings) -> Matrix:
    """Return the rows at length 1."""
    return vectors.normalised().array


class Task:
    """What `nestvec.measure` needs to know of a task."""

    gallery: Embeddings  #: the stored side; maps, quantisers and codes are fitted on it
    asking: Embeddings  #: the side that is compared with it, in the same Space
    metrics: tuple[str, ...]  #: the first is the one the verdict is about
    notes: list[str]  #: what was left out and why

    def score(self, queries: Matrix, gallery: Matrix) -> Values:
        """Return ``{metric: one value an item}`` for two sides compared by inner product."""
        raise NotImplementedError

    def statistic(self, metric: str) -> bootstrap.Statistic:
        """Return what turns the items' values into one number: their mean, unless it is not."""
        return bootstrap.mean

    def n_compared(self, metric: str) -> int:
        """Return how many stored vectors one item is compared with."""
        return len(self.gallery)


@dataclass(eq=False)
class RetrievalTask(Task):
    """Find the relevant documents of each query.

    Parameters
    ----------
    docs, queries
        Embeddings of one Space, or two arrays.
    qrels
        Query id -> document id -> grade; a grade > 0 is relevant. Only queries with a relevant
        document are asked. An id that is not among ``docs`` or ``queries`` is a `DataError`. Ids
        are compared as text, so integers fit the row numbers of arrays.
    k
        Cutoff of the default metrics nDCG@k, R@k and AP@k (and R@100).
    metrics
        Names of ir-measures with a cutoff; the first is the primary one.
    dropped
        Ids that may be judged although ``docs`` lacks them, like documents without text
        (`RetrievalSet.dropped`). Nothing finds them, so relevant ones count against recall.
    """

    docs: Embeddings | ArrayLike
    queries: Embeddings | ArrayLike
    qrels: Mapping[Any, Mapping[Any, int]]
    k: int = 10
    metrics: tuple[str, ...] = ()
    dropped: Collection[Any] = ()
    notes: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        check_positive(self.k, "k")
        self.gallery = stamped(self.docs, "docs")
        queries = stamped(self.queries, "queries")
        self.gallery.space.check_same(queries.space)
        if not self.metrics:
            self.metrics = (f"nDCG@{self.k}", f"R@{self.k}", "R@100", f"AP@{self.k}")
        self.metrics = tuple(dict.fromkeys(self.metrics))
        self.depth = metrics.depth(self.metrics)
        self._doc_ids = [str(i) for i in self.gallery.ids]
        rows = {str(name): row for row, name in enumerate(queries.ids)}
        self.qrels = {str(q): {str(d): g for d, g in of.items()} for q, of in self.qrels.items()}
        _check_known(self.qrels, rows, "queries")
        judged = {d for of in self.qrels.values() for d in of}
        dropped = {str(d) for d in self.dropped} - set(self._doc_ids)
        _check_known(judged - dropped, set(self._doc_ids), "docs")
        self.query_ids = [q for q in rows if any(g > 0 for g in self.qrels.get(q, {}).values())]
        if not self.query_ids:
            raise DataError(
                "qrels: no query has a relevant document (a grade > 0), so there is nothing to "
                "measure. Check the grades, or leave qrels out to measure without labels."
            )
        self.n_queries = len(queries)
        #: rows of ``queries`` that are asked, in order
        self.asked = np.array([rows[q] for q in self.query_ids], dtype=np.int64)
        self.asking = queries[self.asked]
        unasked = len(self.qrels) - len(self.query_ids)
        if unasked:
            self.notes.append(f"{unasked} queries of the qrels have no relevant document.")
        lost = {d for of in self.qrels.values() for d, grade in of.items() if grade > 0} & dropped
        if lost:
            self.notes.append(
                f"{len(lost)} relevant documents were dropped and have no vector (e.g. "
                f"{min(lost)}): no method can find them, and they count against recall."
            )

    def score(self, queries: Matrix, gallery: Matrix) -> Values:
        return self.score_ranking(nearest(queries, gallery, self.depth))

    def score_ranking(self, rows: NDArray[np.int64]) -> Values:
        """Score gallery rows (n_queries, any), best first; -1 stands for nothing found."""
        rankings = [[self._doc_ids[row] for row in found if row >= 0] for found in rows.tolist()]
        return metrics.per_query(rankings, self.query_ids, self.qrels, self.metrics)


def _check_known(wanted: Iterable[str], known: Any, name: str) -> None:
    unknown = sorted({w for w in wanted if w not in known})
    if unknown:
        some = ", ".join(sorted(known, key=str)[:3])
        raise DataError(
            f"qrels: {len(unknown)} ids are not among the ids of {name}, e.g. {unknown[0]!r}; "
            f"{name} has ids like {some}. Pass ids= when you encode, or drop these judgements."
        )


@dataclass(eq=False)
class ClassificationTask(Task):
    """Name the class of each test row, from labelled rows.

    Metrics: accuracy of the nearest neighbour (``accuracy_1nn``, primary), of the majority of the
    k nearest (a tie goes to the class whose member is nearest), and of a linear probe. The probe
    is scikit-learn's `RidgeClassifier` at its defaults: a closed form, so 15,000 x 384 rows of 150
    classes take about a second where logistic regression takes minutes over all methods.
    """

    train: Embeddings | ArrayLike
    train_labels: Sequence[Any] | NDArray[Any]
    test: Embeddings | ArrayLike
    test_labels: Sequence[Any] | NDArray[Any]
    k: int = 10
    notes: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        check_positive(self.k, "k")
        self.gallery, self.asking = stamped(self.train, "train"), stamped(self.test, "test")
        self.gallery.space.check_same(self.asking.space)
        train = _one_each(self.train_labels, len(self.gallery), "train_labels")
        test = _one_each(self.test_labels, len(self.asking), "test_labels")
        self._classes, self._train = np.unique(train, return_inverse=True)
        if len(self._classes) < 2:
            raise DataError(f"train_labels: one class only ({self._classes[0]!r}); two are needed.")
        unseen = ~np.isin(test, self._classes)
        if unseen.all():
            raise DataError(
                f"test_labels: no test row is of a class of train_labels. They are like "
                f"{test.tolist()[0]!r} and train_labels like {train.tolist()[0]!r}; pass labels "
                f"of the same classes and of one type."
            )
        if unseen.any():
            self.notes.append(f"{int(unseen.sum())} test rows are of classes without train rows.")
        place = np.searchsorted(self._classes, test).clip(max=len(self._classes) - 1)
        self._test = np.where(unseen, -1, place)
        nearest = ("accuracy_1nn", *([f"accuracy_{self.k}nn"] if self.k > 1 else []))
        self.metrics = nearest
        if find_spec("sklearn"):
            self.metrics = (*nearest, "accuracy_linear_probe")
        else:
            self.notes.append("no linear probe: pip install 'nestvec[measure]' brings it.")

    def score(self, queries: Matrix, gallery: Matrix) -> Values:
        labels = self._train[nearest(queries, gallery, self.k)]  # (n_test, k)
        values = {"accuracy_1nn": labels[:, 0] == self._test}
        if self.k > 1:
            values[f"accuracy_{self.k}nn"] = _majority(labels, len(self._classes)) == self._test
        if "accuracy_linear_probe" in self.metrics:
            linear = require("sklearn.linear_model", extra="measure", why="a linear probe")
            probe = linear.RidgeClassifier().fit(gallery, self._train)
            values["accuracy_linear_probe"] = probe.predict(queries) == self._test
        return {name: hit.astype(np.float64) for name, hit in values.items()}

    def n_compared(self, metric: str) -> int:
        return len(self._classes if metric == "accuracy_linear_probe" else self.gallery)


def _majority(labels: NDArray[np.int64], n_classes: int) -> NDArray[np.int64]:
    """Return the commonest label of each row, ties to the one that stands first."""
    votes = np.zeros((len(labels), n_classes), np.int64)
    row = np.arange(len(labels))[:, None]
    np.add.at(votes, (row, labels), 1)
    mine = votes[row, labels]  # (n, k): votes of the label at each place
    return labels[row[:, 0], (mine == mine.max(axis=1, keepdims=True)).argmax(axis=1)]


@dataclass(eq=False)
class STSTask(Task):
    """Order pairs by similarity: Spearman's correlation of the cosine with ``scores`` (n,)."""

    first: Embeddings | ArrayLike
    second: Embeddings | ArrayLike
    scores: Sequence[float] | NDArray[Any]
    notes: list[str] = field(default_factory=list, init=False)
    metrics: tuple[str, ...] = field(default=("spearman",), init=False)

    def __post_init__(self) -> None:
        self.gallery, self.asking = stamped(self.first, "first"), stamped(self.second, "second")
        self.gallery.space.check_same(self.asking.space)
        if len(self.gallery) != len(self.asking):
            raise DataError(
                f"first has {len(self.gallery)} rows and second {len(self.asking)}; row i of one "
                f"is paired with row i of the other."
            )
        gold = _one_each(self.scores, len(self.gallery), "scores").astype(np.float64)
        if not np.isfinite(gold).all() or np.ptp(gold) == 0:
            raise DataError("scores: NaN, Inf or all equal; a rank correlation needs an order.")
        self._spearman = bootstrap.spearman(gold)

    def score(self, queries: Matrix, gallery: Matrix) -> Values:
        return {"spearman": np.einsum("nd,nd->n", queries, gallery, dtype=np.float64)}

    def statistic(self, metric: str) -> bootstrap.Statistic:
        return self._spearman

    def n_compared(self, metric: str) -> int:
        return 1


@dataclass(eq=False)
class LabelFreeTask(Task):
    """Keep the full-size neighbours: what can be measured with no labels at all.

    Parameters
    ----------
    docs, queries
        Without ``queries``, the documents ask for their own neighbours, themselves excluded: all
        of them, or `LABEL_FREE_QUERIES` seeded ones.
    k
        Neighbours: ``neighbour_recall@k`` is the share of the full size's k nearest that a method
        finds among its own k nearest (primary). ``distortion_near`` and ``distortion_random`` are
        the mean absolute change of similarity over those k neighbours and over k random
        documents of each query (arXiv 2407.20243 finds that it tracks the loss of nDCG).
    """

    docs: Embeddings | ArrayLike
    queries: Embeddings | ArrayLike | None = None
    k: int = 10
    seed: int = 0
    notes: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        check_positive(self.k, "k")
        self.gallery = stamped(self.docs, "docs")
        if len(self.gallery) < 2:
            raise DataError("docs: 1 row has no neighbours; at least 2 are needed.")
        rng = np.random.default_rng(self.seed)
        self._own = None
        if self.queries is not None:
            self.asking = stamped(self.queries, "queries")
            self.gallery.space.check_same(self.asking.space)
        else:
            rows = np.arange(len(self.gallery))
            if len(rows) > LABEL_FREE_QUERIES:
                rows = np.sort(rng.choice(rows, LABEL_FREE_QUERIES, replace=False))
                self.notes.append(
                    f"{len(rows):,} of {len(self.gallery):,} documents, drawn by seed, ask for "
                    f"their neighbours among all of them."
                )
            self._own, self.asking = rows, self.gallery[rows]
        self.metrics = (f"neighbour_recall@{self.k}", "distortion_near", "distortion_random")
        self._random = rng.integers(len(self.gallery), size=(len(self.asking), self.k))

    @cached_property
    def _truth(self) -> tuple[NDArray[np.int64], Matrix, Matrix]:
        queries, gallery = unit(self.asking), unit(self.gallery)
        near = label_free.neighbours(queries, gallery, self.k, own=self._own)
        return (
            near,
            label_free.pair_similarity(queries, gallery, near),
            label_free.pair_similarity(queries, gallery, self._random),
        )

    def score(self, queries: Matrix, gallery: Matrix) -> Values:
        near, near_similarity, random_similarity = self._truth
        found = label_free.neighbours(queries, gallery, self.k, own=self._own)
        changes = {
            "distortion_near": (near, near_similarity),
            "distortion_random": (self._random, random_similarity),
        }
        values = {self.metrics[0]: label_free.neighbour_recall(near, found)}
        for name, (partners, before) in changes.items():
            now = label_free.pair_similarity(queries, gallery, partners)
            values[name] = np.abs(now - before).mean(axis=1, dtype=np.float64)
        return values


def _one_each(values: Any, n: int, name: str) -> NDArray[Any]:
    array = np.asarray(values)
    if array.shape != (n,):
        raise DataError(f"{name}: shape {array.shape} for {n} rows; one value a row is needed.")
    return array
