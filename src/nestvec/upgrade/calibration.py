"""Put scores of bridged queries on the scale of the new model's own scores."""

from __future__ import annotations

import numpy as np

from nestvec import _checks
from nestvec.errors import DataError
from nestvec.maps.base import FittedMap
from nestvec.search.transition import Calibration
from nestvec.space import Embeddings

_NEAREST = 20  # rows a query: the scale has to be right where answers are
_FEWEST_ROWS = 20
_MOST_QUERIES = 1000


def calibrate(
    bridge: FittedMap, queries: Embeddings, new: Embeddings, old: Embeddings
) -> Calibration:
    """Fit the line that takes a bridged cosine to the cosine of the new vectors.

    A gallery of which some rows have new vectors gives two lists of answers. To merge them, a
    bridged score has to say what the new model's own would be, on average: a regression of the one
    on the other, over the rows nearest by the bridge (which is what the list holds; choosing them
    by the regressor biases nothing).

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
    here = _unit(queries) @ _unit(new).T
    there = _unit(bridge.transform(queries)) @ _unit(old).T
    if queries.has_ids and new.has_ids and queries.ids.dtype.kind == new.ids.dtype.kind:
        there[queries.ids[:, None] == new.ids] = -np.inf  # no pair, but the row itself
    nearest = np.argsort(-there, axis=1, kind="stable")[:, : min(_NEAREST, len(new) - 1)]
    x, y = (np.take_along_axis(one, nearest, axis=1).ravel().astype(float) for one in (there, here))
    slope = float(np.cov(x, y, bias=True)[0, 1] / max(x.var(), 1e-12))
    offset = float(y.mean() - slope * x.mean())
    correlation = float(np.corrcoef(x, y)[0, 1]) if x.std() and y.std() else 0.0
    if not slope > 0:
        raise DataError(
            f"scores through this bridge say nothing of the new model's (correlation "
            f"{correlation:.2f} over {len(x):,} pairs), so the two cannot be merged. Are the "
            f"sample's vectors in the order of its ids? Else fit the bridge on more pairs, or "
            f"re-embed all rows into a new index."
        )
    error = float(np.sqrt(np.mean((slope * x + offset - y) ** 2)))
    return Calibration(slope, offset, correlation, error, len(x))


def _unit(vectors: Embeddings) -> np.ndarray:
    return vectors.array if vectors.space.has_unit_rows else _checks.normalise(vectors.array)
