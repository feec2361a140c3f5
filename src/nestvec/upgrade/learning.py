"""Learn the bridge again while rows are re-embedded: each that is done is a pair more.

The better of the two stays, by rows that neither was fitted on. What is in use is changed by one
rename, that of ``upgrade.json``, which names it; whoever has the index open follows at the next
search.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec._atomic import written_beside
from nestvec.errors import DataError
from nestvec.maps import guard as guards
from nestvec.maps.alignment import row_hashes
from nestvec.maps.base import FittedMap
from nestvec.search.transition import FOLDER, STATE, State, bridge_names
from nestvec.search.upgrading import Upgrading
from nestvec.search.view import View
from nestvec.space import Embeddings
from nestvec.upgrade.bridge import fit
from nestvec.upgrade.calibration import calibrate
from nestvec.upgrade.order import vectors_of

_FEWEST = 400  # pairs; of fewer, those that are held out say little of which is the better one
_MOST = 3200  # pairs; benchmarks/bridge.py finds little more in those beyond
_HELD_OUT = 0.2  # of the rows that are done
_FEWEST_TO_COMPARE = 20  # rows on either side, or nothing is learned of them
_MEASURED = 2000  # rows that scores are put on one scale by


def rows_until(upgrading: Upgrading, old: View, new: View) -> int:
    """Return how many more rows are to be done before the bridge is learned again, 1 or more."""
    if upgrading.state.pairs >= _MOST:
        return len(old)
    return max(1, _due_at(upgrading.state) - len(_with_two_vectors(upgrading, old, new)))


def n_learned_from(bridge: Any) -> int:
    """Return how many pairs a bridge was fitted on; 0 if it does not say."""
    return len(getattr(bridge, "seen_", ()))


def again(upgrading: Upgrading, *, seed: int) -> bool:
    """Learn the bridge again if that is due, and use the better one; tell whether it was due.

    Whoever calls this holds the lock of the upgrade, and ``upgrading`` is of its newest state.
    """
    old, new = upgrading.views()
    sides = upgrading.sides(old, new)
    state = upgrading.state
    done = _with_two_vectors(upgrading, old, new)
    if state.pairs >= _MOST or len(done) < _due_at(state) or sides.is_done.all():
        return False
    rng = np.random.default_rng(seed)
    some = np.sort(rng.permutation(done)[: ceil(_MOST / (1 - _HELD_OUT))])
    ids = np.arange(len(some))
    places = np.flatnonzero(sides.is_done)[some]
    before, after = (
        Embeddings(guards.unit(vectors_of(view, rows)), space, ids)
        for view, rows, space in (
            (old, sides.keys.row_ids[places], old.space),
            (new, sides.new_row[some], upgrading.space),
        )
    )
    seen = seen_by(upgrading.bridge, after.array)
    seen |= np.isin(sides.keys.row_ids[places], upgrading.known.learned)
    alike = row_hashes(after.array)  # rows that are equal are on one side of the split
    distinct = np.sort(np.unique(alike, return_index=True)[1])
    unseen = distinct[~seen[distinct]]
    out = np.sort(rng.permutation(unseen)[: round(_HELD_OUT * len(distinct))])
    held_in = ids[~np.isin(alike, alike[out])]
    changed, known = replace(state, pairs=round((1 - _HELD_OUT) * len(ids))), None
    made = upgrading.bridge
    if min(len(out), len(held_in)) >= _FEWEST_TO_COMPARE:
        made = fit(old=before[held_in], new=after[held_in], sample_size=None, random_state=seed)
    if made is not upgrading.bridge and _better(made, upgrading.bridge, after[out], before[out]):
        measured = np.sort(rng.permutation(ids)[:_MEASURED])
        try:
            scale, known = calibrate(made, after[out], after[measured], before[measured])
        except DataError:  # its scores cannot be merged with new ones: the old one stays
            pass
        else:
            known.learned = sides.keys.row_ids[places[held_in]]
            changed = replace(changed, calibration=scale, fit=state.fit + 1)
    folder = upgrading.home.path / FOLDER
    bridge_name, known_name = bridge_names(changed.fit)
    if known is not None:
        made.save(folder / bridge_name)
        with written_beside(folder / known_name) as scratch:
            known.save(scratch)
    with written_beside(upgrading.home.path / STATE) as scratch:
        changed.save(scratch)
    for path in folder.iterdir():  # also what a kill has left
        of_a_bridge = path.name.lstrip(".").startswith(("bridge", "sample"))
        if of_a_bridge and path.name not in (bridge_name, known_name):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    return True


def seen_by(bridge: Any, rows: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Tell which rows of the new Space a bridge was fitted on, (n,); none if it does not say."""
    return np.isin(row_hashes(rows), getattr(bridge, "seen_", ()))


def _due_at(state: State) -> int:
    """Return how many rows have to be done for a bridge of twice as many pairs."""
    pairs = min(max(_FEWEST, 2 * state.pairs), _MOST)
    return ceil(pairs / (1 - _HELD_OUT))


def _with_two_vectors(upgrading: Upgrading, old: View, new: View) -> NDArray[np.int64]:
    """Return which done rows have two vectors, each by its own model."""
    sides = upgrading.sides(old, new)
    return np.flatnonzero(~sides.bridged[sides.is_done])


def _better(made: FittedMap, used: FittedMap, new: Embeddings, old: Embeddings) -> bool:
    """Whether these rows find each other better through ``made``; neither has learned from them."""
    true = [guards.closeness(_others(rows @ rows.T)) for rows in (new.array, old.array)]

    def through(bridge: FittedMap) -> float:
        scores = _others(guards.unit(bridge.transform(new).array) @ old.array.T)
        return float(np.mean([kept(scores) for kept in true]))

    return through(made) > through(used)


def _others(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return scores of each row with all others, (n, n - 1)."""
    return scores[~np.eye(len(scores), dtype=bool)].reshape(len(scores), -1)
