"""Intervals: a paired bootstrap over the items (queries, rows, pairs) that a task scores.

Every method is resampled with the same draws, so the interval of a difference counts only what
the two methods do differently. A resample is kept as how often each item was drawn; a statistic
takes those counts as weights, so all resamples of all methods are one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

#: counts (n_resamples, n_items), values (n_rows, n_items) -> (n_resamples, n_rows)
Statistic = Callable[[Array, Array], Array]

_CELLS = 1 << 23  # counts held at a time: 64 MB


def mean(counts: Array, values: Array) -> Array:
    """Return the mean of each row of ``values`` under each row of counts."""
    return counts @ values.T / counts.sum(axis=1, keepdims=True)


def spearman(gold: ArrayLike) -> Statistic:
    """Return the statistic "Spearman's rank correlation with ``gold`` (n_items,)".

    Ties get the mean of their ranks, as in ``scipy.stats.spearmanr``; a pair drawn twice is a tie
    with itself. A constant side orders nothing: its correlation is 0, where scipy says NaN.
    """
    gold = np.asarray(gold, np.float64)

    def correlation(counts: Array, values: Array) -> Array:
        total = counts.sum(axis=1)
        centred_gold = _weighted_ranks(gold, counts) - (total[:, None] + 1) / 2
        gold_length = np.sqrt((counts * centred_gold**2).sum(axis=1))
        out = np.empty((len(counts), len(values)))
        for row, value in enumerate(values):
            centred = _weighted_ranks(value, counts) - (total[:, None] + 1) / 2
            length = np.sqrt((counts * centred**2).sum(axis=1))
            both = length * gold_length
            product = (counts * centred * centred_gold).sum(axis=1)
            out[:, row] = np.divide(product, both, out=np.zeros(len(counts)), where=both > 0)
        return out

    return correlation


def _weighted_ranks(values: Array, counts: Array) -> Array:
    """Ranks 1..n, ties sharing their mean, of a sample with ``counts`` copies of each value."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    begins = np.searchsorted(group[order], np.arange(group.max() + 1))
    size = np.add.reduceat(counts[:, order], begins, axis=1)  # (n_resamples, n_groups)
    ranks = np.cumsum(size, axis=1) - size + (size + 1) / 2
    return ranks[:, group]


@dataclass(frozen=True)
class Estimate:
    """Point values (n_rows,) and their resampled draws (n_resamples, n_rows)."""

    value: Array
    draws: Array

    def interval(self) -> tuple[Array, Array]:
        """Return the 95% percentile interval of each row."""
        return _percentiles(self.draws)

    def difference(self, to: int) -> tuple[Array, Array, Array]:
        """Return each row minus row ``to``: value, low, high (95%, paired)."""
        low, high = _percentiles(self.draws - self.draws[:, [to]])
        return self.value - self.value[to], low, high


def _percentiles(draws: Array) -> tuple[Array, Array]:
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    return low, high


def resample(
    values: Array, statistic: Statistic = mean, *, n_resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Bootstrap a statistic of ``values`` (n_rows, n_items); the same seed draws the same items.

    References
    ----------
    Efron and Tibshirani, An Introduction to the Bootstrap, 1993: the percentile interval.
    """
    n = values.shape[1]
    rng = np.random.default_rng(seed)
    draws = np.empty((n_resamples, len(values)))
    step = max(1, _CELLS // n)
    for start in range(0, n_resamples, step):
        size = min(step, n_resamples - start)
        picked = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(picked.ravel(), minlength=size * n).reshape(size, n)
        draws[start : start + size] = statistic(counts.astype(np.float64), values)
    return Estimate(statistic(np.ones((1, n)), values)[0], draws)
