"""Fit the best bridge between two models from a sample that both have encoded."""

from __future__ import annotations

from collections.abc import Callable, Collection
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import check_random_state

from nestvec import _checks
from nestvec.errors import DataError
from nestvec.maps import alignment as ways
from nestvec.maps import guard as guards
from nestvec.maps.residual import ResidualBridge
from nestvec.space import Embeddings

Matrix = NDArray[np.float32]

#: The bridges by name, from the least freedom to the most.
BRIDGES: dict[str, type[ways.Bridge]] = {
    "unchanged": ways.UnchangedBridge,
    "procrustes": ways.ProcrustesBridge,
    "drift": ways.DriftBridge,
    "stiff": ways.StiffBridge,
    "relaxed": ways.RelaxedBridge,
    "ridge": ways.RidgeBridge,
    "low_rank": ways.LowRankBridge,
    "residual": ResidualBridge,
}
_SAME_SIZE = ("unchanged", "drift")
_NESTED = ("procrustes", "drift", "stiff", "relaxed", "ridge")
_FEWEST_PAIRS = 50  # below this, what is held out tells no bridge from another
_FEWEST_ROWS = 20  # of fewer, the 10 nearest are all of them, or nearly
_SAFEST = "procrustes"
_MOST_HELD_OUT = 1000  # pairs; more would cost time and tell no more


def fit(
    *,
    old: Any,
    new: Any,
    kinds: Collection[str] | None = None,
    moves: str = "queries",
    teacher: str = "both",
    dims: Any = None,
    nested: bool = False,
    sample_size: int | None = 2000,
    validation_fraction: float = 0.2,
    random_state: Any = 0,
) -> ways.Bridge:
    """Bridge two models: from a few texts that both have encoded, the best map by held-out pairs.

    Every kind of bridge is fitted on most of the pairs and compared on the rest; the winner is
    fitted again on all. ``.guard_.sentence()`` says what won and by how much.

    Parameters
    ----------
    old, new : Embeddings or (n, dim) arrays
        The same texts by the old and by the new model, best texts like the queries to come and
        like the gallery. If both sides have ids, rows are paired by them, and texts that only one
        side has are left out; else row by row.
    kinds
        Names of `BRIDGES` to compare; by default all that fit (``"residual"`` only where torch is
        installed).
    moves
        ``"queries"``: the bridge takes vectors of the new model to the old space, so that new
        queries search the old gallery as it is. ``"gallery"``: it takes the stored old vectors to
        the new space, where the new model's queries come as they are.
    teacher
        Whose neighbours the bridge should find: the old model's, the new model's (what embedding
        everything again would give), or, if you do not know which model is the better one, those
        that are close by ``"both"``. It decides between kinds; with one kind there is no choice.
    dims, nested
        Sizes and block-triangular form, as in `nestvec.maps.RidgeBridge`; ``nested`` leaves only
        the bridges that have it.
    sample_size
        Pairs to learn from, drawn at random if there are more; None takes all.
    validation_fraction
        Share of them held out for the comparison.
    random_state
        Seed of the sample and of the split.

    Returns
    -------
    Bridge
        A fitted map: ``transform``, ``save``, `nestvec.load_map`. With fewer than 50 pairs (100 if
        the gallery moves) nothing is compared and it is the safest one,
        `nestvec.maps.ProcrustesBridge`.

    Raises
    ------
    DataError
        If the two sides share no text, do not pair up, or hold NaN or Inf.

    Notes
    -----
    The criterion is what search runs on: the 10 nearest, through the bridge, of held-out texts (or,
    if the gallery moves, among them), and how close the teacher's own vectors are for these: 1 is
    its true 10 nearest, 0 is chance. The full size counts as much as all shorter ones together.
    Imitating the old model alone would choose the bridge that forgets what the new one knows.
    Whether the new model is any better is for `nestvec.upgrade.judge` to say.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> old = rng.normal(size=(400, 16))
    >>> new = old @ np.linalg.qr(rng.normal(size=(16, 16)))[0]
    >>> bridge = fit(old=old, new=new)
    >>> bool(np.einsum("nd,nd->n", bridge.transform(new), old).min() > 0)
    True
    """
    if moves not in ("queries", "gallery"):
        raise DataError(f"moves {moves!r} is not one of queries, gallery.")
    if teacher not in ("both", "new", "old"):
        raise DataError(f"teacher {teacher!r} is not one of both, new, old.")
    if not 0 < validation_fraction < 1:
        raise DataError(f"validation_fraction {validation_fraction!r} must lie between 0 and 1.")
    if sample_size is not None and sample_size < 1:
        raise DataError(f"sample_size is {sample_size}; 1 or more, or None for all pairs.")
    old, new = paired(old, new)
    X, y = (new, old) if moves == "queries" else (old, new)
    rng = np.random.default_rng(check_random_state(random_state).randint(2**31 - 1))
    if sample_size is not None and len(X) > sample_size:
        rows = np.sort(rng.choice(len(X), sample_size, replace=False))
        X, y = X[rows], y[rows]
    names = _fitting(kinds, _rows(X).shape[1] == _rows(y).shape[1], nested)

    def fitted(name: str, rows: Any = slice(None)) -> ways.Bridge:
        made: Any = BRIDGES[name]()
        settings = {"dims": dims, "nested": nested, "random_state": random_state}
        made.set_params(**{k: v for k, v in settings.items() if k in made.get_params()})
        return made.fit(X[rows], y[rows])

    n_out = max(1, min(round(len(X) * validation_fraction), _MOST_HELD_OUT))
    n_found_among = len(X) - n_out if moves == "queries" else n_out
    if len(X) < _FEWEST_PAIRS or n_found_among < _FEWEST_ROWS or len(names) == 1:
        name = _SAFEST if _SAFEST in names else names[0]
        bridge = fitted(name)
        sizes = bridge.dims_
        why = "no other fits" if len(names) == 1 else "too few rows"
        bridge.guard_ = guards.Guard(why, 0, sizes, _weights(sizes), {}, name)
        return bridge
    order = rng.permutation(len(X))
    out, held_in = np.sort(order[:n_out]), np.sort(order[n_out:])
    bridges = {name: fitted(name, held_in) for name in names}
    sizes = max((bridge.dims_ for bridge in bridges.values()), key=len)  # some know no others
    guard = guards.judge(
        {name: bridge._map for name, bridge in bridges.items()},
        _scorer(guards.unit(_rows(X)), guards.unit(_rows(y)), out, held_in, sizes, moves, teacher),
        criterion="closeness kept@10 by "
        + ("both models" if teacher == "both" else f"the {teacher} model"),
        n_held_out=n_out,
        dims=sizes,
        weights=_weights(sizes),
    )
    bridge = fitted(guard.winner)
    bridge.guard_ = guard
    return bridge


def paired(old: Any, new: Any) -> tuple[Any, Any]:
    """Return both sides with row ``i`` the same thing: by ids if both have them, else in order."""
    if isinstance(old, Embeddings) and isinstance(new, Embeddings) and old.has_ids and new.has_ids:
        known = set(new.ids.tolist())
        shared = [i for i in old.ids.tolist() if i in known]
        if not shared:
            raise DataError(
                f"the two sides share no id: old has ids like {old.ids[0].item()!r}, new like "
                f"{new.ids[0].item()!r}. Encode the same texts with both models, under the same "
                f"ids."
            )
        return old[old.rows_of(shared)], new[new.rows_of(shared)]
    old, new = (
        side if isinstance(side, Embeddings) else _checks.as_matrix(side, name=name)
        for name, side in (("old", old), ("new", new))
    )
    if len(old) != len(new):
        raise DataError(
            f"{len(old)} old and {len(new)} new vectors do not pair up: give both sides ids, or "
            f"the same texts in the same order."
        )
    return old, new


def _fitting(kinds: Collection[str] | None, same_size: bool, nested: bool) -> list[str]:
    """Return the names of the bridges to compare, from the least freedom to the most."""
    for kind in kinds or ():
        if kind not in BRIDGES:
            raise DataError(f"kind {kind!r} is not one of {', '.join(BRIDGES)}.")
    able = [
        name
        for name in BRIDGES
        if (same_size or name not in _SAME_SIZE) and (not nested or name in _NESTED)
    ]
    if kinds is None and find_spec("torch") is None:
        able = [name for name in able if name != "residual"]
    names = [name for name in able if kinds is None or name in kinds]
    if not names:
        raise DataError(
            f"none of the kinds {', '.join(kinds or ())} fits here"
            + (" with nested=True" if nested else "")
            + f"; choose from {', '.join(able)}."
        )
    return names


def _scorer(
    own: Matrix,
    still: Matrix,
    out: NDArray[np.int64],
    held_in: NDArray[np.int64],
    sizes: tuple[int, ...],
    moves: str,
    teacher: str,
) -> guards.Scorer:
    """Score bridges from ``own`` to ``still`` by what is found through them, as it is searched.

    What moves was held out: a bridge says nothing of rows that it was fitted on.
    """
    queries = moves == "queries"
    by_model = {"new": own if queries else still, "old": still if queries else own}

    def asked(moved: Matrix, others: Matrix) -> Matrix:
        return moved @ others.T if queries else others @ moved.T

    kept = [
        guards.closeness(asked(rows[out], rows[held_in]))
        for model, rows in by_model.items()
        if teacher in ("both", model)
    ]

    def scorer(bridge: Callable[[Matrix], Matrix]) -> tuple[float, ...]:
        moved, found = bridge(own[out]), []
        for d in sizes:
            scores = asked(guards.unit(moved[:, :d]), guards.unit(still[held_in][:, :d]))
            found.append(float(np.mean([one(scores) for one in kept])))
        return tuple(found)

    return scorer


def _rows(side: Any) -> Matrix:
    return side.array if isinstance(side, Embeddings) else side


def _weights(sizes: tuple[int, ...]) -> tuple[float, ...]:
    """Return what each size counts in the choice."""
    *shorter, _ = sizes  # at the full one answers are ranked: it is worth all others together
    return (*(0.5 / len(shorter) for _ in shorter), 0.5) if shorter else (1.0,)
