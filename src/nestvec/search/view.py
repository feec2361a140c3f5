"""One version of an index as a search sees it: derived rows that are still true, and fresh ones.

A derived row is true while the record has its row id with the same version of last update; an
upsert keeps the id, so the id alone would pass off an old vector as the new one. All other rows of
the record are fresh: they are few, in memory, and scored exactly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nestvec._checks import normalise
from nestvec.search.exact import top_k
from nestvec.search.generation import Generation
from nestvec.search.store import Keys, Snapshot
from nestvec.search.store.snapshot import as_matrix

_EVERY = np.empty(0, np.bool_)  # what the kernels take for "all rows"
_FILTERS_KEPT = 16


class _Fragment(NamedTuple):
    """A piece of the record: where its true rows are derived, and its fresh ones."""

    places: NDArray[np.int64]
    row_ids: NDArray[np.int64]
    vectors: NDArray[np.float32]
    ids: NDArray[Any]


class Mask(NamedTuple):
    """Rows that may be found: ``derived`` (empty if all are) and ``fresh``, and how many."""

    derived: NDArray[np.bool_]
    fresh: NDArray[np.bool_]
    n_derived: int


class View:
    """A snapshot of the record joined to a generation of derived rows; it never changes.

    Rows are numbered: those of the generation first, fresh ones behind them.
    """

    def __init__(
        self, snapshot: Snapshot, generation: Generation, before: View | None = None
    ) -> None:
        self.snapshot = snapshot
        self.generation = generation
        known: dict[Any, _Fragment] = {}
        if before is not None and before.generation is generation:
            self._order, known = before._order, before._fragments
        else:
            self._order = np.argsort(generation.mirror.row_ids, kind="stable")
        snapshot.keys()
        self._fragments = {
            mark: known.get(mark) or self._resolve(keys)
            for mark, keys in snapshot.known_keys.items()
        }
        alive = np.zeros(len(generation), np.bool_)
        for fragment in self._fragments.values():
            alive[fragment.places] = True
        n_alive = int(np.count_nonzero(alive))
        parts = [fragment for fragment in self._fragments.values() if len(fragment.row_ids)]
        dim = snapshot.layout.space.size
        self.fresh_row_ids = np.concatenate([np.empty(0, np.int64), *(p.row_ids for p in parts)])
        self.fresh = np.concatenate([np.empty((0, dim), np.float32), *(p.vectors for p in parts)])
        self._fresh_ids = np.concatenate([p.ids for p in parts]) if parts else None
        self.n_dead = len(alive) - n_alive
        self.everyone = Mask(
            alive if self.n_dead else _EVERY, np.ones(len(self.fresh), np.bool_), n_alive
        )
        self._filtered: dict[str, Mask] = {}

    @property
    def n_fresh(self) -> int:
        return len(self.fresh)

    def __len__(self) -> int:
        return self.everyone.n_derived + self.n_fresh

    def _resolve(self, keys: Keys) -> _Fragment:
        places, true = self._places(keys)
        fresh = keys.row_ids[~true]
        if not len(fresh):
            none = np.empty((0, self.snapshot.layout.space.size), np.float32)
            return _Fragment(places[true], fresh, none, np.empty(0))
        table = self.snapshot.read(fresh, ["id", "vector"])
        vectors = as_matrix(table["vector"]).astype(np.float32)
        ids = np.array(table["id"].to_pylist())
        return _Fragment(places[true], fresh, vectors, ids)

    def _places(self, keys: Keys) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return where rows are derived, and whether they are true there."""
        derived = self.generation.mirror
        if not len(derived):
            return np.zeros(len(keys.row_ids), np.int64), np.zeros(len(keys.row_ids), np.bool_)
        at = np.searchsorted(derived.row_ids, keys.row_ids, sorter=self._order)
        places = self._order[np.minimum(at, len(derived) - 1)]
        same = derived.row_ids[places] == keys.row_ids
        return places, same & (derived.updated[places] == keys.updated)

    def matching(self, condition: str) -> Mask:
        """Return the rows for which an SQL condition on the payload holds."""
        if condition not in self._filtered:
            rows = self.snapshot.matching(condition)
            derived = np.zeros(len(self.generation), np.bool_)
            places, there = self._places_by_id(rows)
            derived[places[there]] = True
            if self.n_dead:
                derived &= self.everyone.derived
            fresh = np.isin(self.fresh_row_ids, rows)
            while len(self._filtered) >= _FILTERS_KEPT:
                self._filtered.pop(next(iter(self._filtered)))
            self._filtered[condition] = Mask(derived, fresh, int(np.count_nonzero(derived)))
        return self._filtered[condition]

    def _places_by_id(
        self, row_ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        derived = self.generation.mirror.row_ids
        if not len(derived):
            return np.zeros(len(row_ids), np.int64), np.zeros(len(row_ids), np.bool_)
        at = np.searchsorted(derived, row_ids, sorter=self._order)
        places = self._order[np.minimum(at, len(derived) - 1)]
        return places, derived[places] == row_ids

    def search_fresh(
        self, queries: NDArray[np.float32], mask: Mask, k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the ``k`` best fresh rows, numbered as the view does, at the queries' size."""
        rows = np.flatnonzero(mask.fresh)
        if not len(rows):
            return np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
        vectors = normalise(np.ascontiguousarray(self.fresh[rows, : queries.shape[1]]))
        found, scores = top_k(queries, vectors, k)
        return rows[found] + len(self.generation), scores

    def row_ids(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the record's row ids of rows of the view."""
        every = np.concatenate([self.generation.mirror.row_ids, self.fresh_row_ids])
        return every[rows]

    def ids(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return the ids of rows of the view, of any shape; those below 0 get an empty one."""
        n = len(self.generation)
        is_int = self.snapshot.layout.id_type == "int"
        found = np.full(rows.shape, -1) if is_int else np.full(rows.shape, "", object)
        derived = (rows >= 0) & (rows < n)
        found[derived] = self.generation.mirror.ids(rows[derived])
        if self._fresh_ids is not None:
            found[rows >= n] = self._fresh_ids[rows[rows >= n] - n]
        return found if is_int else found.astype(np.str_)
