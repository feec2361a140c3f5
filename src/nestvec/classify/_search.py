"""Where to stop: one confidence threshold a size, searched for on held-out rows.

A row stops at the first size whose confidence reaches that size's threshold. What one threshold
does to accuracy and cost while the others stand is a cumulative sum over the rows sorted by
confidence, so each step of a coordinate descent is exact and takes a millisecond.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PRICES = 40  # dims that one more right answer may cost, from next to nothing to everything
_SWEEPS = 20  # of one descent; it has settled long before

Confidence = NDArray[np.float64]  # (n_dims, n): the largest probability
Hits = NDArray[np.bool_]  # (n_dims, n): whether that class is the right one
Cuts = NDArray[np.int64]  # (n_dims - 1,): which of a size's levels is its threshold


def paper_thresholds(confidence: Confidence, hits: Hits, *, grid: int) -> NDArray[np.float64]:
    """Return the thresholds (n_dims,) of Kusupati et al. 2022 (arXiv 2205.13147, appendix).

    For each size, of ``grid`` values in [0, 1] the smallest at which a cascade of two, this size
    and the next, is most accurate.
    """
    found = np.zeros(len(hits))  # the last size always answers
    levels = np.linspace(0, 1, grid)
    for k in range(len(hits) - 1):
        rank = np.searchsorted(levels, confidence[k], side="right")
        gain = hits[k].astype(np.int64) - hits[k + 1]
        found[k] = levels[np.argmax(_above(rank, gain, grid)[:grid])]
    return found


def sparing_thresholds(
    confidence: Confidence,
    hits: Hits,
    dims: Sequence[int],
    *,
    tolerance: float | int = 0.0,
    margin: float | int = 0.0,
    accumulated: bool = False,
    grid: int = 100,
) -> NDArray[np.float64]:
    """Return the cheapest thresholds found (n_dims,) that lose at most ``tolerance`` accuracy.

    Infinity is the threshold of a size at which no row stops. See `choose_thresholds`.
    """
    frontier = _Frontier(confidence, hits, dims, margin=margin, accumulated=accumulated, grid=grid)
    frontier.search(paper_thresholds(confidence, hits, grid=grid))
    n = hits.shape[1]
    return frontier.cheapest(int(np.ceil(hits[-1].sum() - tolerance * n - 1e-6)))


class _Frontier:
    """The least cost met for each number of right answers, and the thresholds that had it.

    The search does not know what accuracy will be asked for, so asking for less never costs more.
    """

    def __init__(
        self,
        confidence: Confidence,
        hits: Hits,
        dims: Sequence[int],
        *,
        margin: float | int,
        accumulated: bool,
        grid: int,
    ) -> None:
        self.hits, self.dims, self.n = hits, dims, hits.shape[1]
        self.margin, self.accumulated = margin, accumulated
        shares = np.linspace(0, 1, grid)
        self.levels = [  # of each size but the last; the paper's grid is among them
            np.unique([*np.quantile(own, shares), *shares, np.inf]) for own in confidence[:-1]
        ]
        self.rank = [  # a row stops if its rank is above the cut
            np.searchsorted(levels, own, side="right")
            for levels, own in zip(self.levels, confidence, strict=False)
        ]
        self.never = np.array([len(levels) - 1 for levels in self.levels], np.int64)
        self.cost = np.full(self.n + 1, np.inf)  # summed over the rows
        self.cuts = np.tile(self.never, (self.n + 1, 1))
        self.cost[hits[-1].sum()] = self.n * dims[-1]  # all rows at the last size: nothing to doubt

    def search(self, start: NDArray[np.float64]) -> None:
        """Descend at every price from both ends, each from where the last one led."""
        prices = np.geomspace(self.dims[0] / 100, self.dims[-1] * self.n, _PRICES)
        near = [np.searchsorted(*pair) for pair in zip(self.levels, start, strict=False)]
        for cuts, order in (
            (self.never, prices[::-1]),
            (np.zeros_like(self.never), prices),
            (np.array(near, np.int64), prices[::-1]),
        ):
            for price in order:
                cuts = self._descend(cuts, price)

    def cheapest(self, needed: int) -> NDArray[np.float64]:
        best = max(needed, 0) + int(np.argmin(self.cost[max(needed, 0) :]))
        chosen = zip(self.levels, self.cuts[best], strict=True)
        return np.array([*(levels[cut] for levels, cut in chosen), 0.0])

    def _descend(self, cuts: Cuts, price: float) -> Cuts:
        for _ in range(_SWEEPS):
            better = self._sweep(cuts, price)
            if (better == cuts).all():
                break
            cuts = better
        return cuts

    def _sweep(self, cuts: Cuts, price: float) -> Cuts:
        """Set each threshold to the best one while the others stand; note all that was met."""
        cuts = cuts.copy()
        last = self.hits[-1].astype(np.int64)
        # Forwards: which rows come to each size, and the gain, split and cost that precede them.
        came, before = [], []
        alive, gain_now, split_now, cost_now, toll = np.ones(self.n, bool), 0, 0, 0.0, 0.0
        for k, cut in enumerate(cuts):
            came.append(alive)
            before.append((gain_now, split_now, cost_now + toll * alive.sum()))
            stops = alive & (self.rank[k] > cut)
            change = self.hits[k][stops] - last[stops]
            gain_now += int(change.sum())
            split_now += int(np.abs(change).sum())
            cost_now += (toll + self.dims[k]) * float(stops.sum())
            alive = alive & ~stops
            toll += self._toll(k, cut)
        # Backwards: what becomes of the rows that go on is known when a size is set.
        later, cost = np.zeros(self.n, np.int64), np.full(self.n, float(self.dims[-1]))
        for k in reversed(range(len(cuts))):
            here, size, toll = came[k], len(self.levels[k]), self._toll(k, 0)
            rank, own = self.rank[k][here], (self.hits[k] - last)[here]
            gain0, split0, cost0 = before[k]
            on, on_cost = later[here], cost[here]
            gain = gain0 + on.sum() + _above(rank, own - on, size)
            split = split0 + np.abs(on).sum() + _above(rank, np.abs(own) - np.abs(on), size)
            total = cost0 + on_cost.sum() + _above(rank, self.dims[k] - toll - on_cost, size)
            total[:-1] += toll * len(rank)
            sure = last.sum() + gain - self.margin * np.sqrt(split + 1)
            cuts[k] = np.argmin(total - price * sure)
            self._note(k, cuts, sure, total)
            stops = self.rank[k] > cuts[k]
            later = np.where(stops, self.hits[k] - last, later)
            cost = np.where(stops, self.dims[k], cost + self._toll(k, cuts[k]))
        return cuts

    def _toll(self, k: int, cut: int | np.integer) -> float:
        """Return what a row pays to pass size k; one at which no row stops is not computed."""
        return float(self.dims[k]) if self.accumulated and cut < self.never[k] else 0.0

    def _note(
        self, k: int, cuts: Cuts, sure: NDArray[np.float64], total: NDArray[np.float64]
    ) -> None:
        right = np.floor(sure + 1e-6).astype(np.int64)
        order = np.argsort(-total, kind="stable")  # the cheapest of equals is written last
        order = order[(right[order] >= 0) & (total[order] < self.cost[right[order]])]
        self.cost[right[order]] = total[order]
        changed = np.tile(cuts, (len(order), 1))
        changed[:, k] = order
        self.cuts[right[order]] = changed


def _above(rank: NDArray[np.int64], values: NDArray[Any], size: int) -> NDArray[np.float64]:
    """Return for j = 0..size-1 the sum of the values whose rank is above j, (size,)."""
    sums = np.bincount(rank, weights=values, minlength=size).astype(np.float64)
    return sums[::-1].cumsum()[::-1] - sums
