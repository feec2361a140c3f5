"""The guard: of several candidates the user gets the best on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from nestvec.errors import DataError

Matrix = NDArray[np.float32]
Scorer = Callable[[Callable[[Matrix], Matrix]], tuple[float, ...]]

_DEPTH = 10  # neighbours, and the cut of nDCG


@dataclass(frozen=True)
class Guard:
    """What was compared on held-out data, and what won.

    Attributes
    ----------
    criterion
        ``"closeness kept@10"`` (no labels: how close at full size the 10 are that a prefix finds;
        1 is the true 10 nearest, 0 is chance), ``"nDCG@10"``, ``"Spearman"``, or for bridges
        ``"closeness kept@10 by both models"``, or by the new or the old one.
    n_held_out
        Rows, queries or pairs the scores are means over; 0 if there were too few to hold any out.
    dims, weights
        Sizes compared, and what each counts in the choice (they sum to 1).
    scores
        For each candidate its score at each size, from the least change to the most: a tie goes to
        the earlier one.
    winner
        The candidate that became the map.
    """

    criterion: str
    n_held_out: int
    dims: tuple[int, ...]
    weights: tuple[float, ...]
    scores: Mapping[str, tuple[float, ...]]
    winner: str

    def score(self, candidate: str) -> float:
        """Return the weighted mean over sizes."""
        return float(np.dot(self.scores[candidate], self.weights))

    def at(self, dim: int) -> Guard:
        """Return the comparison at one size alone."""
        scores = {name: (found[self.dims.index(dim)],) for name, found in self.scores.items()}
        winner = max(scores, key=lambda name: scores[name]) if scores else self.winner
        return replace(self, dims=(dim,), weights=(1.0,), scores=scores, winner=winner)

    def sentence(self) -> str:
        """Say what won, and by how much over what."""
        names = {
            "unchanged": "vectors left unchanged",
            "rotation": "principal rotation kept",
            "learned": "learned map kept",
        }
        won = names.get(self.winner, f"{self.winner} bridge kept")
        if not self.scores:
            if self.criterion == "no other fits":
                return f"{won}: no other was to be compared that fits these two spaces"
            return f"{won}: too few rows to hold any out and compare"
        others = " and ".join(
            f"{self.score(name):.3f} ({name})"
            for name in reversed(list(self.scores))
            if name != self.winner
        )
        sizes = ", ".join(map(str, self.dims))
        equal = len(set(self.weights)) == 1
        weighed = "equally" if equal else " : ".join(f"{weight:.2g}" for weight in self.weights)
        return (
            f"{won}: held-out {self.criterion} {self.score(self.winner):.3f} against {others}, "
            f"{self.n_held_out} held out, weighted {weighed} over {sizes}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Guard:
        """Read what `to_dict` wrote."""
        scores = {name: tuple(found) for name, found in values["scores"].items()}
        tuples = {name: tuple(values[name]) for name in ("dims", "weights")}
        return cls(**{**values, **tuples, "scores": scores})


def judge(
    candidates: Mapping[str, Callable[[Matrix], Matrix]],
    scorer: Scorer,
    *,
    criterion: str,
    n_held_out: int,
    dims: tuple[int, ...],
    weights: tuple[float, ...],
) -> Guard:
    """Score every candidate at every size; the best weighted mean wins, ties to the simpler."""
    scores = {name: scorer(function) for name, function in candidates.items()}
    winner = max(scores, key=lambda name: float(np.dot(scores[name], weights)))
    return Guard(criterion, n_held_out, dims, weights, scores, winner)


def closeness_kept(asks: Matrix, gallery: Matrix, dims: Any) -> Scorer:
    """Score maps without labels: how close at full size the 10 are that a prefix finds."""
    kept = closeness(asks @ gallery.T)

    def scorer(function: Callable[[Matrix], Matrix]) -> tuple[float, ...]:
        a, g = function(asks), function(gallery)
        return tuple(kept(unit(a[:, :d]) @ unit(g[:, :d]).T) for d in dims)

    return scorer


def closeness(true: Matrix) -> Callable[[Matrix], float]:
    """Return what says how close the 10 are that other scores find, by ``true`` cosines.

    For each asking row the mean true cosine of the 10 best by the other scores, on a scale where
    the true 10 nearest are 1 and random rows are 0. Unlike the recall of neighbours it forgives an
    exchange of two that are equally close, which costs a user nothing. Both are (asking, gallery).
    """
    k = min(_DEPTH, true.shape[1])

    def nearest(scores: Matrix) -> NDArray[np.int64]:
        return np.argpartition(-scores, k - 1, axis=1)[:, :k]

    chance = true.mean(axis=1)
    best = np.take_along_axis(true, nearest(true), axis=1).mean(axis=1)
    span = np.maximum(best - chance, 1e-6)  # rows that are all alike have nothing to tell

    def kept(scores: Matrix) -> float:
        mean = np.take_along_axis(true, nearest(scores), axis=1).mean(axis=1)
        return float(((mean - chance) / span).mean())

    return kept


def ndcg(asks: Matrix, gallery: Matrix, relevant: Any, dims: Any) -> Scorer:
    """Score maps with labels: nDCG@10 of queries whose relevant rows (and grades) are known."""
    from sklearn.metrics import ndcg_score

    grades = np.zeros((len(asks), len(gallery)))
    for row, (rows, values) in enumerate(relevant):
        grades[row, rows] = values

    def scorer(function: Callable[[Matrix], Matrix]) -> tuple[float, ...]:
        a, g = function(asks), function(gallery)
        return tuple(
            float(ndcg_score(grades, unit(a[:, :d]) @ unit(g[:, :d]).T, k=_DEPTH, ignore_ties=True))
            for d in dims
        )

    return scorer


def spearman(first: Matrix, second: Matrix, scores: NDArray[np.float64], dims: Any) -> Scorer:
    """Score maps with scored pairs: rank correlation of prefix cosines with the given scores."""
    if len(np.unique(scores)) < 2:
        raise DataError("validation pairs all have one score, so they cannot rank anything.")

    def scorer(function: Callable[[Matrix], Matrix]) -> tuple[float, ...]:
        a, b = function(first), function(second)
        cosines = [(unit(a[:, :d]) * unit(b[:, :d])).sum(axis=1) for d in dims]
        found: list[Any] = [spearmanr(c, scores) for c in cosines]
        return tuple(float(f.statistic) for f in found)

    return scorer


def unit(rows: Matrix) -> Matrix:
    """L2-normalise; a prefix without length stays zero, which is what its cosines are."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
