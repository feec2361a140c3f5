"""Put scores of bridged queries on the scale of the new model's own scores."""

from __future__ import annotations

import numpy as np

from nestvec import _checks
from nestvec.errors import DataError
from nestvec.maps.base import FittedMap
from nestvec.search.structures.codes import unit_prefixes
from nestvec.search.transition import Calibration, Yardstick
from nestvec.search.transition import nearest as nearest_scores
from nestvec.space import Embeddings

_FEWEST_ROWS = 20
_LEAST_CORRELATION = 0.05
_MOST_QUERIES = 1000


def calibrate(
    bridge: FittedMap, queries: Embeddings, new: Embeddings, old: Embeddings
) -> tuple[Calibration, Yardstick]:
    """Compare bridged scores with the new model's own, on rows that have both vectors.

    A gallery of which some rows have new vectors gives two lists of answers. To merge them, the
    best that the bridge finds has to count as much as the best that the new model would find among
    the same rows. How much that is differs by query, and is known for each: the rows of this sample
    are scored both ways when it is asked (`Yardstick`). What is learned here is how fast scores
    fall from the best on, there and here: the slope between the one list, sorted, and the other.

    Parameters
    ----------
    bridge
        From the new Space to the old one.
    queries : (n_queries, dim_new)
        Of the new Space, best ones that the bridge was not fitted on.
    new, old : (n, dim_new), (n, dim_old)
        The same rows of the gallery by both models. A query with the id of one of them is not
        compared with that one.

    Raises
    ------
    DataError
        If there are fewer than 20 rows, or bridged scores say nothing of the new ones.
    """
    if len(new) < _FEWEST_ROWS:
        raise DataError(
            f"{len(new)} rows by both models are too few to compare their scores; give "
            f"{_FEWEST_ROWS} or more, best 2,000."
        )
    queries = queries[: min(len(queries), _MOST_QUERIES)]
    known = Yardstick(_checks.normalise(new.array), _checks.normalise(old.array))
    here = _checks.normalise(queries.array) @ known.new.T
    bridged = bridge.transform(queries).array
    there = unit_prefixes(bridged, old.dim) @ known.old.T
    own = np.zeros(here.shape, bool)
    if queries.has_ids and new.has_ids and queries.ids.dtype.kind == new.ids.dtype.kind:
        own = queries.ids[:, None] == new.ids  # no pair, but the row itself
    here[own] = there[own] = -np.inf
    sorted_there, sorted_here = nearest_scores(there), nearest_scores(here)
    slope = _slope(sorted_there, sorted_here)
    slopes = []
    for dim in old.space.nesting_dims:
        at_dim = unit_prefixes(bridged, dim) @ known.old_at(dim).T
        at_dim[own] = -np.inf
        slopes.append((dim, _slope(nearest_scores(at_dim), sorted_here)))
    nearest = np.argsort(-there, axis=1, kind="stable")[:, : sorted_there.shape[1]]
    x, y = (_centred(np.take_along_axis(one, nearest, axis=1)) for one in (there, here))
    deviations = np.sqrt((x * x).sum() * (y * y).sum())
    correlation = float((x * y).sum() / deviations) if deviations else 0.0
    if correlation < _LEAST_CORRELATION:
        raise DataError(
            f"scores through this bridge say nothing of the new model's (correlation "
            f"{correlation:.2f} over {x.size:,} pairs), so the two cannot be merged. Are the "
            f"sample's vectors in the order of its ids? Else fit the bridge on more pairs, or "
            f"re-embed all rows into a new index."
        )
    error = float(np.sqrt(np.mean((slope * x - y) ** 2)))
    return Calibration(slope, correlation, error, x.size, tuple(slopes)), known


def _slope(there: np.ndarray, here: np.ndarray) -> float:
    """Return how much faster sorted scores fall ``here``, from the best on."""
    x, y = _centred(there), _centred(here)
    return float((x * y).sum() / max(float((x * x).sum()), 1e-12))


def _centred(scores: np.ndarray) -> np.ndarray:
    return (scores - scores.mean(axis=1, keepdims=True)).astype(np.float64)
