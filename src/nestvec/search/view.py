"""One version of an index as a search sees it: derived rows that are still true, and fresh ones.

A derived row is true while the record has its row id with the same version of last update; an
upsert keeps the id, so the id alone would pass off an old vector as the new one. All other rows of
the record are fresh: they are few, in memory, and scored exactly.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nestvec.search.exact import top_k
from nestvec.search.generation import Generation
from nestvec.search.store import Keys, Snapshot
from nestvec.search.store.snapshot import as_matrix
from nestvec.search.structures.codes import unit_prefixes
from nestvec.space import Space

_EVERY = np.empty(0, np.bool_)  # what the kernels take for "all rows"
_FILTERS_KEPT = 16


class _Fragment:
    """A piece of the record: where its true rows are derived, and its fresh ones."""

    def __init__(self, places: NDArray[np.int64], row_ids: NDArray[np.int64]) -> None:
        in_one = len(places) > 0 and bool((np.diff(places) == 1).all())  # it needs no room then
        self.places = slice(places[0], places[-1] + 1) if in_one else places.astype(np.int32)
        self.row_ids = row_ids
        self._read: tuple[NDArray[np.float32], NDArray[Any]] | None = None

    @property
    def nbytes(self) -> int:
        held = [self.row_ids, *(self._read or ())]
        if not isinstance(self.places, slice):
            held.append(self.places)
        return sum(array.nbytes for array in held)

    def read(self, snapshot: Snapshot) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Return the vectors and the ids of the fresh rows; read once."""
        if self._read is None:
            table = snapshot.read(self.row_ids, ["id", "vector"])
            vectors = as_matrix(table["vector"]).astype(np.float32)
            self._read = vectors, np.array(table["id"].to_pylist())
        return self._read


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
            row_ids = generation.mirror.row_ids
            in_order = bool((row_ids[1:] > row_ids[:-1]).all())  # it needs no room then
            self._order = None if in_order else np.argsort(row_ids, kind="stable")
        self._fragments = {
            mark: known[mark] if keys is None else self._resolve(keys)
            for mark, keys in snapshot.keys_by_fragment(known)
        }
        alive = np.zeros(len(generation), np.bool_)
        for fragment in self._fragments.values():
            alive[fragment.places] = True
        n_alive = int(np.count_nonzero(alive))
        self._parts = [part for part in self._fragments.values() if len(part.row_ids)]
        self.fresh_row_ids = np.concatenate(
            [np.empty(0, np.int64), *(part.row_ids for part in self._parts)]
        )
        self.n_fresh = len(self.fresh_row_ids)
        self.n_dead = len(alive) - n_alive
        self.everyone = Mask(
            alive if self.n_dead else _EVERY, np.ones(self.n_fresh, np.bool_), n_alive
        )
        #: What the engine made of plans, for it to keep here.
        self.prepared: dict[Any, Any] = {}
        self._fresh: tuple[NDArray[np.float32], NDArray[Any]] | None = None
        self._unit: dict[int, NDArray[np.float32]] = {}
        self._filtered: dict[str, Mask] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.everyone.n_derived + self.n_fresh

    @property
    def space(self) -> Space:
        """The Space of the rows."""
        return self.snapshot.layout.space

    @property
    def resident_bytes(self) -> int:
        """Bytes of fresh rows, of the join and of filters, in memory."""
        masks = [self.everyone, *self._filtered.copy().values()]
        held = [self.fresh_row_ids, *(array for mask in masks for array in mask[:2])]
        held += [] if self._order is None else [self._order]
        held += [] if self._fresh is None else self._fresh
        held += self._unit.copy().values()
        return sum(array.nbytes for array in held) + sum(
            fragment.nbytes for fragment in self._fragments.values()
        )

    def release(self) -> None:
        """Let go of structures that can be loaded from disk again."""
        self.prepared.clear()
        self.generation.release()

    def _resolve(self, keys: Keys) -> _Fragment:
        places, found = self._places(keys.row_ids)
        true = found.copy()
        true[found] = self.generation.mirror.updated[places[found]] == keys.updated[found]
        return _Fragment(places[true], keys.row_ids[~true])

    def _places(self, row_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return where rows were derived, whatever became of them since, and whether they were."""
        derived = self.generation.mirror.row_ids
        if not len(derived):
            return np.zeros(len(row_ids), np.int64), np.zeros(len(row_ids), np.bool_)
        places = np.searchsorted(derived, row_ids, sorter=self._order)
        np.minimum(places, len(derived) - 1, out=places)
        if self._order is not None:
            places = self._order[places]
        return places, derived[places] == row_ids

    def rows_of(self, keys: Keys) -> NDArray[np.int64]:
        """Return the numbers that live rows of this version have here, (n,), by their keys."""
        rows, found = self._places(keys.row_ids)
        found[found] = self.generation.mirror.updated[rows[found]] == keys.updated[found]
        order = np.argsort(self.fresh_row_ids, kind="stable")
        places = np.searchsorted(self.fresh_row_ids, keys.row_ids[~found], sorter=order)
        rows[~found] = len(self.generation) + order[places]
        return rows

    def _read_fresh(self) -> tuple[NDArray[np.float32], NDArray[Any]]:
        if self._fresh is None:
            read = [part.read(self.snapshot) for part in self._parts]
            self._fresh = tuple(map(np.concatenate, zip(*read, strict=True)))  # type: ignore[assignment]
        return self._fresh  # type: ignore[return-value]

    def matching(self, condition: str) -> Mask:
        """Return the rows for which an SQL condition on the payload holds."""
        mask = self._filtered.get(condition)
        if mask is None:
            rows = self.snapshot.matching(condition)
            derived = np.zeros(len(self.generation), np.bool_)
            places, there = self._places(rows)
            derived[places[there]] = True
            if self.n_dead:
                derived &= self.everyone.derived
            fresh = np.isin(self.fresh_row_ids, rows)
            mask = Mask(derived, fresh, int(np.count_nonzero(derived)))
            with self._lock:
                while len(self._filtered) >= _FILTERS_KEPT:
                    self._filtered.pop(next(iter(self._filtered)))
                self._filtered[condition] = mask
        return mask

    def search_fresh(
        self, queries: NDArray[np.float32], mask: Mask, k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the ``k`` best fresh rows, numbered as the view does, at the queries' size."""
        rows = np.flatnonzero(mask.fresh)
        if not len(rows):
            return np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
        dim = queries.shape[1]
        vectors = self._unit.get(dim)
        if vectors is None:
            vectors = self._unit[dim] = unit_prefixes(self._read_fresh()[0], dim)
        found, scores = top_k(queries, vectors[rows] if len(rows) < len(vectors) else vectors, k)
        return rows[found] + len(self.generation), scores

    def row_ids(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the record's row ids of some rows of the view, (n,)."""
        n = len(self.generation)
        found = np.empty(rows.shape, np.int64)
        found[rows < n] = self.generation.mirror.row_ids[rows[rows < n]]
        found[rows >= n] = self.fresh_row_ids[rows[rows >= n] - n]
        return found

    def ids(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return the ids of rows of the view, of any shape; those below 0 get an empty one."""
        n = len(self.generation)
        # (counting is the fastest question that numpy answers)
        if not self.n_fresh and not np.count_nonzero(rows < 0):
            return self.generation.mirror.ids(rows)
        is_int = self.snapshot.layout.id_type == "int"
        found = np.full(rows.shape, -1) if is_int else np.full(rows.shape, "", object)
        derived = (rows >= 0) & (rows < n)
        found[derived] = self.generation.mirror.ids(rows[derived])
        fresh = rows >= n
        if fresh.any():
            found[fresh] = self._read_fresh()[1][rows[fresh] - n]
        return found if is_int else found.astype(np.str_)
