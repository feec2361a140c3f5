"""Adaptive classification over probabilities: choose thresholds, apply them, score the cascade.

A row stops at the first size whose confidence, the largest probability, reaches that size's
threshold; the last size always answers (Kusupati et al. 2022, arXiv 2205.13147). For heads that
were trained elsewhere: hand in what they say. `AdaptiveClassifier` fits its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nestvec.classify._search import paper_thresholds, sparing_thresholds
from nestvec.classify.report import AdaptiveReport, report_of
from nestvec.errors import DataError, DimensionError
from nestvec.space import parse_dims

Rule = Literal["sparing", "paper"]
Cost = Literal["stop", "accumulated"]

#: One (n, n_classes) a size, by size or in one array (n_dims, n, n_classes) beside ``dims``
Probabilities = Mapping[int, Any] | Sequence[Any] | NDArray[Any]


def choose_thresholds(
    probabilities: Probabilities,
    y: Any,
    dims: Iterable[int] | None = None,
    *,
    rule: Rule = "sparing",
    tolerance: float | int = 0.0,
    margin: float | int = 0.5,
    cost: Cost = "stop",
    grid: int = 100,
) -> AdaptiveReport:
    """Choose the confidence at which a row stops at each size, on held-out rows.

    Parameters
    ----------
    probabilities : {dim: (n, n_classes)} or (n_dims, n, n_classes)
        What the head of each size says of rows that it was not trained on; each row sums to 1.
    y : (n,) int
        The right class of each row, as the number of its column.
    dims
        Sizes, rising, of an array; of a mapping, which of its sizes to use (None: all).
    rule
        ``"sparing"``: the fewest dims at which the cascade is as accurate on these rows as the
        largest size. ``"paper"``: for each size the smallest of ``grid`` values in [0, 1] at which
        it and the next size make the most accurate cascade of two (the other parameters do
        nothing, and a ``tolerance`` is refused).
    tolerance
        Accuracy that may be lost, in [0, 1): 0.005 is half a point.
    margin
        Standard errors by which the accuracy kept has to exceed what is asked: the cheapest of many
        thresholds is also the luckiest, more so on few rows, and loses on fresh ones what it
        seems to have here. 0 takes the rows at their word.
    cost
        What is made small: ``"stop"``, the size at which a row stops, or ``"accumulated"``, the sum
        of the sizes computed until then. With the latter a size that saves too little is skipped.
    grid
        Thresholds tried a size: so many quantiles of its confidences, and so many values in [0, 1].

    Returns
    -------
    AdaptiveReport
        With ``thresholds``, on these rows; without intervals, because it was chosen on them. A
        larger ``tolerance`` never has a larger cost here; without a margin the cost is at most
        that of the paper's thresholds if what these lose is tolerated.

    Raises
    ------
    DataError
        If the rows are no probabilities, a label has no column, or a parameter does not fit.
    DimensionError
        If there is not one size an array, or a size is not in the mapping.

    Notes
    -----
    The accuracy asked for is that of the largest size minus ``tolerance``. Let ``gain`` be the
    rows that the cascade has right and the largest size has wrong minus those the other way round,
    and ``split`` their sum. The thresholds are the cheapest met with
    ``gain - margin * sqrt(split + 1) >= -tolerance * n``; to stop nowhere before the largest size
    is always allowed. They are met in coordinate descents on ``dims - price * right answers``,
    each exact along its coordinate, over 40 prices and from three starts, one of them the
    paper's thresholds.

    Examples
    --------
    >>> sure, unsure = [0.9, 0.1], [0.6, 0.4]
    >>> probabilities = {2: [sure, unsure, sure, unsure], 8: [sure, sure[::-1], sure, sure[::-1]]}
    >>> found = choose_thresholds(probabilities, [0, 1, 0, 1], margin=0)
    >>> found.accuracy, found.expected_dim
    (1.0, 5.0)
    >>> apply_cascade(probabilities, found.thresholds)
    (array([0, 1, 0, 1]), array([0, 1, 0, 1]))
    """
    check_settings(rule=rule, tolerance=tolerance, margin=margin, cost=cost, grid=grid)
    said = _read(probabilities, dims)
    hits = said.answers == _labels(y, said, unknown=False)
    thresholds = find_thresholds(
        said.confidence,
        hits,
        said.dims,
        rule=rule,
        tolerance=tolerance,
        margin=margin,
        cost=cost,
        grid=grid,
    )
    return report_of(hits, stops(said.confidence, thresholds), said.dims, thresholds)


def apply_cascade(
    probabilities: Probabilities, thresholds: Any
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each row's class and which size gave it, both (n,) int64.

    Parameters
    ----------
    probabilities : {dim: (n, n_classes)} or (n_dims, n, n_classes)
        What the head of each size says, sizes rising.
    thresholds : (n_dims,)
        As `choose_thresholds` returns; the last does not matter, because the last size answers.
    """
    said = _read(probabilities, None, named=False)
    place = stops(said.confidence, _thresholds(thresholds, said))
    return said.answers[place, np.arange(len(place))], place


def score_cascade(
    probabilities: Probabilities,
    y: Any,
    thresholds: Any,
    dims: Iterable[int] | None = None,
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> AdaptiveReport:
    """Measure a cascade on test rows, with 95% intervals paired by row (bootstrap).

    Parameters are those of `choose_thresholds` and `apply_cascade`; a ``y`` of -1 is a class that
    no head knows, which counts as wrong.
    """
    said = _read(probabilities, dims)
    hits = said.answers == _labels(y, said, unknown=True)
    found = _thresholds(thresholds, said)
    place = stops(said.confidence, found)
    return report_of(hits, place, said.dims, found, n_resamples=n_resamples, seed=seed)


def find_thresholds(
    confidence: NDArray[np.float64],
    hits: NDArray[np.bool_],
    dims: Sequence[int],
    *,
    rule: Rule,
    tolerance: float | int,
    margin: float | int,
    cost: Cost,
    grid: int = 100,
) -> NDArray[np.float64]:
    """Return thresholds (n_dims,) by confidences and hits alone, both (n_dims, n)."""
    if rule == "paper":
        return paper_thresholds(confidence, hits, grid=grid)
    return sparing_thresholds(
        confidence,
        hits,
        dims,
        tolerance=tolerance,
        margin=margin,
        accumulated=cost == "accumulated",
        grid=grid,
    )


def check_settings(*, rule: Any, tolerance: Any, margin: Any, cost: Any, grid: Any = 100) -> None:
    """Raise `DataError` for settings that do not fit."""
    for name, value, known in (("rule", rule, Rule), ("cost", cost, Cost)):
        if value not in known.__args__:
            raise DataError(f"{name}={value!r}: choose {' or '.join(map(repr, known.__args__))}.")
    if not 0 <= tolerance < 1:
        raise DataError(
            f"tolerance={tolerance!r} is not in [0, 1): it is the accuracy that may be lost, and "
            f"0.005 is half a point."
        )
    if tolerance and rule == "paper":
        raise DataError(
            f"tolerance={tolerance!r}: the paper's rule knows none. Pass rule='sparing', or no "
            f"tolerance."
        )
    if not 0 <= margin < np.inf:
        raise DataError(f"margin={margin!r}: pass 0 or more standard errors.")
    if int(grid) != grid or grid < 2:
        raise DataError(f"grid={grid!r}: at least two thresholds a size are tried.")


def stops(confidence: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return where each row stops, (n,): the first size that is sure enough, else the last."""
    sure = confidence >= thresholds[:, None]
    sure[-1] = True
    return sure.argmax(axis=0)


class _Said(NamedTuple):
    dims: tuple[int, ...]
    answers: NDArray[np.int64]  # (n_dims, n)
    confidence: NDArray[np.float64]  # (n_dims, n)
    n_classes: int


def _read(probabilities: Probabilities, dims: Iterable[int] | None, *, named: bool = True) -> _Said:
    """Keep of each size its answers and how sure they are."""
    if isinstance(probabilities, Mapping):
        sizes = parse_dims(probabilities if dims is None else dims)
        missing = [d for d in sizes if d not in probabilities]
        if missing:
            raise DimensionError(
                f"no probabilities for {missing[0]} dims; there are some for "
                f"{', '.join(map(str, sorted(probabilities)))}."
            )
        blocks = [probabilities[d] for d in sizes]
    else:
        blocks = list(probabilities)
        if dims is None and named:
            raise DimensionError(
                f"{len(blocks)} arrays of probabilities without their sizes: pass dims=, or a "
                f"mapping from size to array."
            )
        sizes = tuple(range(1, len(blocks) + 1)) if dims is None else parse_dims(dims)
        if len(sizes) != len(blocks):
            raise DimensionError(
                f"dims {sizes} are {len(sizes)} sizes for {len(blocks)} arrays of probabilities; "
                f"one size an array is needed, rising."
            )
    if not blocks:
        raise DataError("no probabilities given: pass one (n, n_classes) a size.")
    tables = [
        _checked(block, f"probabilities[{d}]") for d, block in zip(sizes, blocks, strict=True)
    ]
    for d, table in zip(sizes, tables, strict=True):
        if table.shape != tables[0].shape:
            raise DataError(
                f"probabilities[{d}] is {table.shape} and probabilities[{sizes[0]}] is "
                f"{tables[0].shape}; all sizes speak of the same rows and classes."
            )
    answers = np.stack([table.argmax(axis=1) for table in tables])
    confidence = np.stack([table.max(axis=1) for table in tables]).astype(np.float64)
    return _Said(sizes, answers, confidence, tables[0].shape[1])


def _checked(block: Any, name: str) -> NDArray[Any]:
    table = np.asarray(block)
    if table.ndim != 2 or 0 in table.shape or table.dtype.kind not in "fiub":
        raise DataError(
            f"{name}: expected (n, n_classes) numbers, got shape {table.shape}, {table.dtype}."
        )
    if table.shape[1] < 2:
        raise DataError(f"{name}: one class only; two are needed.")
    wrong = ~(np.abs(table.sum(axis=1, dtype=np.float64) - 1) < 0.01)  # NaN is wrong, too
    wrong |= ~(table >= 0).all(axis=1)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(
            f"{name}: row {row} is no row of probabilities (lowest {table[row].min():.4g}, sum "
            f"{table[row].sum():.4g}). Pass the softmax of the logits."
        )
    return table


def _labels(y: Any, said: _Said, *, unknown: bool) -> NDArray[np.int64]:
    labels, n = np.asarray(y), said.answers.shape[1]
    if labels.shape != (n,):
        raise DataError(f"y: shape {labels.shape} for {n} rows; one label a row is needed.")
    if labels.dtype.kind not in "iu":
        raise DataError(
            f"y: expected column numbers from 0 to {said.n_classes - 1}, got {labels.dtype}."
        )
    wrong = (labels < (-1 if unknown else 0)) | (labels >= said.n_classes)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(
            f"y: row {row} has label {labels[row]}, which is no column of the probabilities: they "
            f"have classes 0 to {said.n_classes - 1}."
        )
    return labels.astype(np.int64)


def _thresholds(given: Any, said: _Said) -> NDArray[np.float64]:
    thresholds = np.array(given, dtype=np.float64)
    if thresholds.shape != (len(said.dims),) or np.isnan(thresholds).any():
        raise DataError(
            f"thresholds: expected {len(said.dims)} numbers, one a size, got {given!r}."
        )
    thresholds[-1] = 0
    return thresholds
