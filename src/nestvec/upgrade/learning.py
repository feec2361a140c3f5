"""Learn the bridge again while rows are re-embedded: each that is done is a pair more.

The better of the two stays, by rows that were held out. What is in use is changed by one rename,
that of ``upgrade.json``, which names it; whoever has the index open follows at the next search.
"""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from nestvec._atomic import written_beside
from nestvec.errors import DataError
from nestvec.maps import guard as guards
from nestvec.maps.base import FittedMap
from nestvec.search.store import durable
from nestvec.search.transition import FOLDER, STATE, bridge_names
from nestvec.search.upgrading import Upgrading
from nestvec.search.view import View
from nestvec.space import Embeddings
from nestvec.upgrade.bridge import fit
from nestvec.upgrade.calibration import calibrate
from nestvec.upgrade.order import vectors_of

_FEWEST = 500  # pairs; fewer say little of which bridge is the better one
_MOST = 4000  # pairs; benchmarks/bridge.py finds little more in those beyond
_HELD_OUT = 1000  # at most, and a fifth
_MEASURED = 2000  # rows that scores are put on one scale by


def rows_until(upgrading: Upgrading, old: View, new: View) -> int:
    """Return how many more rows are to be done before the bridge is learned again, 1 or more."""
    pairs = upgrading.state.pairs
    if pairs >= _MOST:
        return len(old)
    return max(1, max(_FEWEST, 2 * pairs) - len(_pairs(upgrading, old, new)))


def again(upgrading: Upgrading, *, seed: int) -> bool:
    """Learn the bridge again if that is due, and use the better one; tell whether it was due."""
    old, new = upgrading.views()
    sides = upgrading.sides(old, new)
    state = upgrading.state
    done = _pairs(upgrading, old, new)
    if state.pairs >= _MOST or len(done) < max(_FEWEST, 2 * state.pairs) or sides.is_done.all():
        return False
    rng = np.random.default_rng(seed)
    some = np.sort(rng.permutation(done)[:_MOST])
    ids = np.arange(len(some))
    places = np.flatnonzero(sides.is_done)[some]
    before, after = (
        Embeddings(guards.unit(vectors_of(view, rows)), space, ids)
        for view, rows, space in (
            (old, sides.keys.row_ids[places], old.space),
            (new, sides.new_row[some], upgrading.space),
        )
    )
    order = rng.permutation(ids)
    n_out = min(len(ids) // 5, _HELD_OUT)
    out, held_in = np.sort(order[:n_out]), np.sort(order[n_out:])
    made = fit(old=before[held_in], new=after[held_in], sample_size=None, random_state=seed)
    changed = replace(state, pairs=len(done))
    known = None
    if _better(made, upgrading.bridge, after[out], before[out]):
        measured = np.sort(order[:_MEASURED])
        try:
            scale, known = calibrate(made, after[out], after[measured], before[measured])
        except DataError:  # its scores cannot be merged with new ones
            pass
        else:
            changed = replace(changed, calibration=scale, fit=state.fit + 1)
    folder = upgrading.index.path / FOLDER
    bridge_name, known_name = bridge_names(changed.fit)
    with durable.storage_errors(folder):
        if known is not None:
            made.save(folder / bridge_name)
            with written_beside(folder / known_name) as scratch:
                known.save(scratch)
        with written_beside(upgrading.index.path / STATE) as scratch:
            changed.save(scratch)
        if known is not None:
            bridge_name, known_name = bridge_names(state.fit)
            shutil.rmtree(folder / bridge_name, ignore_errors=True)
            (folder / known_name).unlink(missing_ok=True)
    return True


def _pairs(upgrading: Upgrading, old: View, new: View) -> NDArray[np.int64]:
    """Return which done rows have two vectors, each by its own model."""
    return np.flatnonzero(~upgrading.sides(old, new).bridged)


def _better(made: FittedMap, used: FittedMap, new: Embeddings, old: Embeddings) -> bool:
    """Whether these rows find each other better through ``made``, which has learned from none."""
    true = [guards.closeness(_others(rows @ rows.T)) for rows in (new.array, old.array)]

    def through(bridge: FittedMap) -> float:
        scores = _others(guards.unit(bridge.transform(new).array) @ old.array.T)
        return float(np.mean([kept(scores) for kept in true]))

    return through(made) > through(used)


def _others(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return scores of each row with all others, (n, n - 1)."""
    return scores[~np.eye(len(scores), dtype=bool)].reshape(len(scores), -1)
