"""From values an item to tidy rows: interval, paired difference, price."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec._checks import normalise
from nestvec.measurement import bootstrap, label_free
from nestvec.measurement.curve import KEYS
from nestvec.measurement.tasks import Task, Values

Matrix = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Scored:
    """A candidate that has been scored, and may be forgotten: its price and its values."""

    method: str
    dim: int | None
    precision: str | None
    bytes_per_vector: int | None
    macs: tuple[int, int] | None  # for each compared vector, and once a query
    note: str
    values: Values
    layer: int | None = None  # None is the last


def quality_rows(
    task: Task, scored: Sequence[Scored], *, dataset: str, n_resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Resample every method on the same items; row 0 is the full size."""
    columns = {}
    for metric in task.metrics:
        values = np.stack([s.values[metric] for s in scored])
        estimate = bootstrap.resample(
            values, task.statistic(metric), n_resamples=n_resamples, seed=seed
        )
        interval = estimate.interval()
        columns[metric] = (estimate.value, *interval, *estimate.difference(to=0), values.shape[1])
    rows = []
    for at, one in enumerate(scored):
        for metric, (value, low, high, diff, diff_low, diff_high, n) in columns.items():
            macs = None
            if one.macs is not None:
                macs = one.macs[0] * task.n_compared(metric) + one.macs[1]
            rows.append(
                _row(
                    dataset=dataset,
                    method=one.method,
                    dim=one.dim,
                    layer=one.layer,
                    precision=one.precision,
                    metric=metric,
                    value=value[at],
                    low=low[at],
                    high=high[at],
                    difference=diff[at],
                    difference_low=diff_low[at],
                    difference_high=diff_high[at],
                    n=n,
                    seed=seed,
                    bytes_per_vector=one.bytes_per_vector,
                    macs_per_query=macs,
                    note=one.note,
                )
            )
    return rows


def rank_rows(
    nested: Mapping[str, Matrix],
    sizes: Sequence[int],
    rotations: Collection[str],
    *,
    dataset: str,
    seed: int,
) -> list[dict[str, Any]]:
    """RankMe of every prefix, and of every block between two sizes, with jackknife intervals.

    ``rotations`` names the methods whose rank at the full size is that of the vectors as given.
    """
    full = label_free.rankme_left_out(nested["full"], seed=seed)
    rows = []
    for method, side in nested.items():
        plain = method == "full"
        start = 0
        for dim in [d for d in sizes if d <= side.shape[1]]:
            whole = dim == side.shape[1]
            name = "truncation" if plain and not whole else method
            shared = {
                "dataset": dataset,
                "method": name,
                "dim": dim,
                "precision": "float32",
                "n": len(side),
                "seed": seed,
                "bytes_per_vector": 4 * dim,
                "macs_per_query": None,
            }
            if not (whole and method in rotations):
                left_out = label_free.rankme_left_out(normalise(side[:, :dim]), seed=seed)
                value, low, high = label_free.jackknife(left_out)
                difference = label_free.jackknife(left_out - full)
                rows.append(
                    _row(
                        **shared,
                        metric="rankme",
                        value=value,
                        low=low,
                        high=high,
                        difference=difference[0],
                        difference_low=difference[1],
                        difference_high=difference[2],
                        note="uncentred rows, singular values, eps 1e-7",
                    )
                )
            left_out = label_free.rankme_left_out(side[:, start:dim], seed=seed)
            value, low, high = label_free.jackknife(left_out)
            rows.append(
                _row(
                    **shared,
                    metric="rankme_block",
                    value=value,
                    low=low,
                    high=high,
                    difference=None,
                    difference_low=None,
                    difference_high=None,
                    note=f"numbers {start} to {dim - 1} of the full-size rows, {dim - start} dims",
                )
            )
            start = dim
    return rows


def _row(**values: Any) -> dict[str, Any]:
    """Return a row with every key in order, NumPy numbers and NaN made plain."""
    row: dict[str, Any] = {}
    for key in KEYS:
        value = values.pop(key, None)
        if isinstance(value, np.generic):
            value = value.item()
        row[key] = None if isinstance(value, float) and not math.isfinite(value) else value
    assert not values, f"no such keys: {values}"
    return row
