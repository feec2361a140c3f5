"""What a cascade of classifiers is worth: accuracy, and the dims it took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec.measurement.bootstrap import resample


@dataclass(frozen=True)
class AdaptiveReport:
    """Accuracy of an adaptive cascade beside that of each size alone, with what it costs.

    Attributes
    ----------
    dims
        The sizes, rising; the last is the full size.
    thresholds
        The confidence at which a row stops at each size. Infinity: the size is not computed at
        all. The last is 0: the full size always answers.
    accuracies
        Share of the rows that each size alone gets right.
    shares
        Share of the rows that stop at each size; they sum to 1.
    accuracy
        Of the cascade.
    expected_dim
        Mean size at which a row stops: what it takes if a larger size goes on from the smaller
        one's work, as one tied head does.
    accumulated_dim
        Mean of all dims multiplied on the way there: what it takes with a head of its own a size.
    n
        Rows.
    difference
        ``accuracy`` minus that of the full size.
    low, high, difference_low, difference_high
        95% intervals of ``accuracy`` and of ``difference``, paired by row. None on the rows that
        the thresholds were chosen on, where they would flatter.
    """

    dims: tuple[int, ...]
    thresholds: tuple[float, ...]
    accuracies: tuple[float, ...]
    shares: tuple[float, ...]
    accuracy: float
    expected_dim: float
    accumulated_dim: float
    n: int
    difference: float
    low: float | None = None
    high: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None

    @property
    def full_accuracy(self) -> float:
        """Accuracy of the full size alone."""
        return self.accuracies[-1]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; the threshold of a size that is not computed is None."""
        found = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        found["thresholds"] = [t if math.isfinite(t) else None for t in self.thresholds]
        return {**found, "full_accuracy": self.full_accuracy}

    def __str__(self) -> str:
        lines = [f"{'dims':>6}  {'accuracy alone':>14}  {'stops at':>8}  {'share of rows':>13}"]
        for d, alone, t, share in zip(
            self.dims, self.accuracies, self.thresholds, self.shares, strict=True
        ):
            stops = f"{t:.3f}" if math.isfinite(t) else "skipped"
            lines.append(f"{d:>6}  {alone:>14.4f}  {stops:>8}  {share:>13.1%}")
        return "\n".join([*lines, self.sentence()])

    def sentence(self) -> str:
        """Say what the cascade keeps, and what it takes."""
        against = f"{self.difference:+.4f}"
        if self.difference_low is not None:
            against += f" [{self.difference_low:+.4f}, {self.difference_high:+.4f}]"
        return (
            f"cascade: accuracy {self.accuracy:.4f} at {self.expected_dim:.1f} expected dims of "
            f"{self.dims[-1]}, {self.dims[-1] / self.expected_dim:.1f} times fewer "
            f"({self.accumulated_dim:.1f} if every size has a head of its own); {against} to the "
            f"full size's {self.full_accuracy:.4f}, n={self.n:,}"
        )


def report_of(
    hits: NDArray[np.bool_],
    place: NDArray[np.int64],
    dims: Sequence[int],
    thresholds: NDArray[np.float64],
    *,
    n_resamples: int = 0,
    seed: int = 0,
) -> AdaptiveReport:
    """Make the report of ``hits`` (n_dims, n) and where each row stopped, ``place`` (n,)."""
    n = hits.shape[1]
    sizes = np.asarray(dims)
    right = np.stack([hits[place, np.arange(n)], hits[-1]]).astype(np.float64)
    computed = np.where(np.isfinite(thresholds), sizes, 0).cumsum()
    intervals: dict[str, float] = {}
    if n_resamples:
        found = resample(right, n_resamples=n_resamples, seed=seed)
        low, high = found.interval()
        _, below, above = found.difference(to=1)
        names = ("low", "high", "difference_low", "difference_high")
        values = (low, high, below, above)
        intervals = {name: float(v[0]) for name, v in zip(names, values, strict=True)}
    return AdaptiveReport(
        dims=tuple(int(d) for d in dims),
        thresholds=tuple(float(t) for t in thresholds),
        accuracies=tuple(hits.mean(axis=1).tolist()),
        shares=tuple((np.bincount(place, minlength=len(sizes)) / n).tolist()),
        accuracy=float(right[0].mean()),
        expected_dim=float(sizes[place].mean()),
        accumulated_dim=float(computed[place].mean()),
        n=n,
        difference=float(right[0].mean() - right[1].mean()),
        **intervals,
    )
