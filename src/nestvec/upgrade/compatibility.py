"""A series of models, each asked on the galleries of all before it: AC, AM and their matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec.errors import DataError
from nestvec.measurement.bootstrap import resample
from nestvec.measurement.nearest import nearest
from nestvec.space import Embeddings
from nestvec.upgrade import judgement as judging
from nestvec.upgrade import truth as truths
from nestvec.upgrade.crossing import crossed

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class CompatibilityMatrix:
    """Quality of every model's queries on every earlier gallery.

    Parameters
    ----------
    values : (T, T) float64
        ``values[i, j]`` is the metric of queries of model ``i`` on the gallery of model ``j``, for
        ``j <= i``; what is above the diagonal is not looked at.
    low, high : (T, T) float64, optional
        95% interval of each margin, paired over queries (percentile bootstrap), where it was
        measured.

    Notes
    -----
    Strictly: a tie is no win. Published implementations disagree on that, so margins are here too.

    References
    ----------
    Biondi et al., CoReS: Compatible Representations via Stationarity, TPAMI 2023,
    arXiv:2111.07632.

    Examples
    --------
    >>> found = CompatibilityMatrix([[0.5, 0, 0], [0.6, 0.7, 0], [0.5, 0.6, 0.8]])
    >>> found.ac, round(found.am, 3)  # one of three steps back beats the gallery's own queries
    (0.3333333333333333, 0.617)
    """

    values: Any
    low: Any = None
    high: Any = None

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=np.float64)
        if values.ndim != 2 or values.shape[0] != values.shape[1] or len(values) < 2:
            raise DataError(
                f"a compatibility matrix is square and at least 2 x 2, got shape {values.shape}."
            )
        if not np.isfinite(values[np.tril_indices(len(values))]).all():
            raise DataError("a compatibility matrix needs a number wherever j <= i.")
        object.__setattr__(self, "values", np.tril(values))

    @property
    def margins(self) -> Values:
        """``values[i, j] - values[j, j]`` for ``j < i``, 0 elsewhere: (T, T)."""
        return np.tril(self.values - np.diag(self.values)[None, :], k=-1)

    @property
    def ac(self) -> float:
        """Average compatibility: the share of ``j < i`` in which the margin is above 0."""
        below = np.tril_indices(len(self.values), k=-1)
        return float((self.margins[below] > 0).mean())

    @property
    def am(self) -> float:
        """Average multi-model accuracy: the mean over ``j <= i``."""
        return float(self.values[np.tril_indices(len(self.values))].mean())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "values": self.values.tolist(),
            "margins": self.margins.tolist(),
            "ac": self.ac,
            "am": self.am,
            **{
                f"margins_{name}": one.tolist()
                for name, one in (("low", self.low), ("high", self.high))
                if one is not None
            },
        }


def compatibility_matrix(
    models: Sequence[tuple[Embeddings, Embeddings]],
    *,
    bridges: Mapping[tuple[int, int], Any] | None = None,
    qrels: Mapping[Any, Mapping[Any, int]] | None = None,
    doc_labels: Sequence[Any] | NDArray[Any] | None = None,
    query_labels: Sequence[Any] | NDArray[Any] | None = None,
    dim: int | None = None,
    k: int = 10,
) -> CompatibilityMatrix:
    """Ask each model's queries on the galleries of all models before it.

    Parameters
    ----------
    models
        (documents, queries) of each model, the oldest first; the same things, paired by ids.
    bridges
        ``(i, j)`` to what joins the queries of model ``i`` with the gallery of model ``j``, where
        the models were not trained compatible.
    qrels, doc_labels, query_labels, k
        The truth, as in `judge`: of the oldest model's documents and queries.
    dim
        Cut every gallery that is longer to this size; None is the full one.
    """
    if len(models) < 2:
        raise DataError(f"{len(models)} model given; a series has at least two.")
    docs, queries = models[0]
    truth = truths.choose(docs, queries, qrels, doc_labels, query_labels, k)
    n = len(models)
    found_by = np.zeros((n, n, len(truth.asked)))
    for i, (_, asks) in enumerate(models):
        asks = judging.like(queries, asks, "queries")
        for j, (stored, _) in enumerate(models[: i + 1]):
            stored = judging.like(docs, stored, "docs")
            gallery, moved = crossed(stored, asks, (bridges or {}).get((i, j)))
            found = nearest(judging.cut(moved[truth.asked], dim), judging.cut(gallery, dim), k)
            found_by[i, j] = truth.score(found)
    margins = found_by - found_by[np.arange(n), np.arange(n)]  # of the gallery's own queries
    low, high = resample(margins.reshape(n * n, -1), seed=0).interval()
    below = np.tril(np.ones((n, n)), k=-1)
    return CompatibilityMatrix(
        found_by.mean(axis=2), low.reshape(n, n) * below, high.reshape(n, n) * below
    )
