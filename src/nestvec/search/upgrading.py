"""An index under upgrade, as queries of its new Space see it: old rows and new ones, one gallery.

Rows that have new vectors are scored by those, all others through the bridge by their old vectors
and the plan of the old index. The second kind of score is put on the scale of the first, query by
query (`Yardstick`), and the two lists become one; a row that is in the first list's gallery is
masked in the second's.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nestvec._atomic import written_beside
from nestvec._extras import require
from nestvec.errors import FileFormatError, NestvecError, StorageError
from nestvec.maps.base import FittedMap, load_map
from nestvec.search import engine
from nestvec.search.cascade import Cascade, Plan, Stage
from nestvec.search.home import Home
from nestvec.search.sealed import Damaged
from nestvec.search.store import Batch, Keys, Snapshot, Store, Written, durable
from nestvec.search.store.incoming import Incoming, batches_of
from nestvec.search.store.layout import STAMP
from nestvec.search.transition import (
    FOLDER,
    KEYS,
    NEW,
    STATE,
    State,
    Yardstick,
    bridge_names,
    half_written,
    home_name,
)
from nestvec.search.view import Mask, View
from nestvec.space import Embeddings, Space

pa = require("pyarrow", extra="index", why="an index")


class Sides(NamedTuple):
    """How two views of one moment share the rows of the old index."""

    pending: Mask
    """Rows of the old view that have no true new vector."""
    done: Mask
    """Rows of the new view that are true."""
    place: NDArray[np.int64]
    """(rows of the new view + 1,) Their number in the old view; -1 where they are not true, and at
    the end, so that a row that is missing, which is -1, stays so."""
    keys: Keys
    """Of all live rows of the old index, in the order of its record."""
    is_done: NDArray[np.bool_]
    """Which of those are done, (n,)."""
    new_row: NDArray[np.int64]
    """Row id in the new index of each that is done, (n_done,), in the same order."""
    bridged: NDArray[np.bool_]
    """Which of all have an old vector that the bridge made, (n,)."""


class Upgrading:
    """An upgrade that is under way; made by `Index`, which hands it what is of the new Space."""

    def __init__(
        self,
        home: Home,
        state: State,
        bridge: FittedMap,
        known: Yardstick,
        new: Home,
        stamp: Any,
    ) -> None:
        self.home = home
        self.state = state
        self.bridge = bridge
        self.known = known
        self.new = new
        self.stamp = stamp  # of the folder of the new index, which is another in each upgrade
        self._lock = threading.Lock()
        self._sides: tuple[View, View, Sides] | None = None
        self._old_keys: tuple[Snapshot, Keys] | None = None
        self._new_keys: dict[Any, tuple[NDArray[np.int64], ...]] = {}

    @classmethod
    def open(cls, home: Home, before: Upgrading | None = None) -> Upgrading | None:
        """Open what ``upgrade.json`` stands for; None if it has just gone.

        What ``before`` has of the same upgrade, all but its bridge, need not be read again.
        """
        folder = home.path / FOLDER
        state = None
        while True:
            earlier = state
            try:
                state = State.load(home.path / STATE)
            except FileNotFoundError:
                return None
            bridge_name, known_name = (folder / name for name in bridge_names(state.fit))
            try:
                bridge, known = load_map(bridge_name), Yardstick.load(known_name)
            except NestvecError as error:
                if earlier != state:
                    continue  # a better bridge may have taken its place meanwhile
                raise FileFormatError(
                    f"the bridge of the upgrade cannot be read ({error}). Restore {bridge_name} "
                    f"and {known_name} from a backup, or remove {folder}, which takes the upgrade "
                    f"back; the index is whole."
                ) from error
            break
        stamp = durable.signature(folder / NEW / STAMP)
        if before is not None and before.stamp == stamp:
            found = cls(home, state, bridge, known, before.new, stamp)
            found._sides, found._old_keys = before._sides, before._old_keys
            found._new_keys = before._new_keys
            return found
        try:
            new = Home.open(
                folder / NEW, durability=home.store.durability, show_progress=home.show_progress
            )
        except NestvecError as error:
            raise FileFormatError(
                f"the new vectors of the upgrade cannot be read ({error}). Restore {folder / NEW} "
                f"from a backup, or remove {folder}, which takes the upgrade back; the index is "
                f"whole."
            ) from error
        return cls(home, state, bridge, known, new, stamp)

    @property
    def space(self) -> Space:
        """The new Space."""
        return self.state.space

    def is_of(self, store: Store) -> bool:
        """Tell whether the index is still in the folder that this upgrade is to leave."""
        return home_name(store) == self.state.home

    # --- reading ----------------------------------------------------------------------------------

    def search(
        self, plan: Plan, queries: NDArray[np.float32], filter: str | None, threads: int | None
    ) -> tuple[View, engine.Found]:
        """Return the nearest rows of queries of the new Space, as rows of the old view.

        ``plan`` is for rows with old vectors; all that have new ones are scored.
        """
        for _ in range(2):
            old, new = self.views()
            try:
                return old, self._found(plan, queries, filter, threads, old, new)
            except Damaged as error:  # of which side it is, is not said; both can be made again
                self.home.mended(old, error)
                self.new.mended(new, error)
        old, new = self.views()
        return old, self._found(plan, queries, filter, threads, old, new)

    def _found(
        self,
        plan: Plan,
        queries: NDArray[np.float32],
        filter: str | None,
        threads: int | None,
        old: View,
        new: View,
    ) -> engine.Found:
        sides = self.sides(old, new)
        pending, done = sides.pending, sides.done
        if filter is not None:
            passing = old.matching(filter)
            pending = _both(pending, passing)
            done = _at_places(sides.place, passing, len(new.generation))
        k = plan.cascade.stages[-1].keep
        every = Plan(Cascade([Stage(self.space.size, k)]))
        here = engine.run(every, queries, new, done, threads=threads)
        bridged = self.bridged(queries)
        there = engine.run(plan, bridged, old, pending, threads=threads)
        dim = plan.cascade.stages[-1].dim  # that the scores of old rows are cosines of
        slope = self.state.calibration.slope_at(dim)
        offsets = self.known.offsets(queries, bridged, slope, dim)
        calibrated = np.float32(slope) * there.scores + offsets
        placed = sides.place[here.rows]
        rows = np.concatenate([placed, there.rows], axis=1)
        scores = np.concatenate([here.scores, calibrated], axis=1)
        order = np.lexsort((rows, -np.where(rows < 0, -np.inf, scores)), axis=1)[:, :k]
        said = {**here.stages[-1], "stage": f"new {here.stages[-1]['stage']}"}
        return engine.Found(
            np.take_along_axis(rows, order, axis=1),
            np.take_along_axis(scores, order, axis=1),
            (*there.shortlists, placed),
            (*there.stages, said),
        )

    def bridged(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return what the bridge makes of vectors of the new Space."""
        return self.bridge.transform(Embeddings(vectors, self.space)).array

    def views(self) -> tuple[View, View]:
        """Return both sides as they are now."""
        return self.home.view(), self.new.view()

    def sides(self, old: View, new: View) -> Sides:
        """Join two views: whose vectors count for which row."""
        with self._lock:
            if self._sides is not None and self._sides[:2] == (old, new):
                return self._sides[2]
            if self._old_keys is None or self._old_keys[0] is not old.snapshot:
                self._old_keys = old.snapshot, old.snapshot.keys()
            keys = self._old_keys[1]
            row_ids, updated, of_row, of_version, bridged = self._keys_of_new(new.snapshot)
            found = _joined(old, new, keys, Keys(row_ids, updated), of_row, of_version, bridged)
            self._add_half_written(found, old.snapshot)
            self._sides = old, new, found
            return found

    def _keys_of_new(self, snapshot: Snapshot) -> tuple[NDArray[Any], ...]:
        """Return row ids, versions, and the columns of `KEYS`; pieces that stay are read once."""
        self._new_keys = snapshot.columns_by_fragment(KEYS.names, self._new_keys)
        none = *(np.empty(0, np.int64),) * 4, np.empty(0, np.bool_)
        parts = zip(none, *self._new_keys.values(), strict=True)
        return tuple(np.concatenate(part) for part in parts)

    def _add_half_written(self, sides: Sides, snapshot: Snapshot) -> None:
        """Mark pending rows whose new vectors a `put` was to write and did not, as bridged."""
        for file in (self.home.path / FOLDER).glob(half_written("*")):
            with contextlib.suppress(FileNotFoundError), np.load(file) as ids:  # it is whole now
                rows = snapshot.look_up(snapshot.layout.id_column(ids["ids"]))
                of_it = sides.keys.updated == int(file.stem.partition("-")[2])
                sides.bridged[of_it & np.isin(sides.keys.row_ids, rows)] = True

    # --- writing ----------------------------------------------------------------------------------

    def put(self, how: str, rows: Any) -> Written:
        """Write rows of either Space to the index.

        The record of the old index stays the truth: rows of the new Space get, as old vectors,
        what the bridge makes of them, and their own are added here, keyed to that write. Between
        the two a file names those rows, or nobody would know what a kill there left.
        """
        kept: list[tuple[Any, int]] = []
        with (
            tempfile.TemporaryFile(dir=self.new.store.path) as spool,
            self.home.writing(self._old_rows(rows, kept, spool)) as ready,
        ):
            if ready is None:
                return Written(self.home.snapshot().version)
            store, old_rows = ready
            if not kept:
                return store.put_locked(how, old_rows)
            if durable.signature(self.new.path / STAMP) != self.stamp:
                raise StorageError(
                    f"the upgrade of {self.home.path} to {self.space.label} was ended while rows "
                    f"of that space were on their way. Nothing was written."
                )
            note = self.home.path / FOLDER / half_written(store.version + 1)
            with written_beside(note) as scratch, scratch.open("wb") as file:
                np.savez(file, ids=np.concatenate([np.asarray(ids) for ids, _ in kept]))
            try:
                written = store.put_locked(how, old_rows)
            except Exception:
                with contextlib.suppress(Exception):
                    store.refresh()
                    if store.version < int(note.stem.partition("-")[2]):
                        note.unlink()
                raise
            try:
                self.new.write("upsert", self._new_rows(kept, spool, written.version))
            except Exception as error:
                raise StorageError(
                    f"{sum(n for _, n in kept):,} rows were written to {self.home.path}, but their "
                    f"new vectors were not ({durable.reason(error.__cause__ or error)}). Until "
                    f"you upsert the rows again, or a backfill makes the vectors, they are found "
                    f"by what the bridge made of them."
                ) from error
            note.unlink()
        return written

    def fill(self, pieces: Iterable[Batch]) -> None:
        """Write new vectors of pending rows (`keyed`), but for those that have newer ones."""
        table = pa.concat_tables([self.new.store.layout.table(piece) for piece in pieces])
        with self.new.written() as store, store.locked():
            snapshot = store.snapshot
            rows = snapshot.look_up(table["id"].combine_chunks())
            there = rows >= 0
            newest = np.full(len(rows), -1)
            newest[there] = snapshot.read(rows[there], ["of_version"])["of_version"].to_numpy()
            table = table.filter(pa.array(newest < table["of_version"].to_numpy()))
            if len(table):
                store.put_locked("upsert", Incoming(table, table["id"]))

    def _old_rows(self, rows: Any, kept: list[Any], spool: Any) -> Iterator[Any]:
        for batch in batches_of(rows):
            vectors = getattr(batch, "vectors", batch)
            if not isinstance(vectors, Embeddings) or vectors.space.space_id != self.space.space_id:
                yield batch
                continue
            batch = batch if isinstance(batch, Batch) else Batch(batch)
            ids = batch.ids if batch.ids is not None or not vectors.has_ids else vectors.ids
            old = self.bridge.transform(Embeddings(vectors.array, vectors.space))
            yield Batch(old, ids, batch.payload)
            kept.append((ids, len(vectors)))
            spool.write(np.ascontiguousarray(vectors.array, np.float32).data)

    def _new_rows(self, kept: list[Any], spool: Any, version: int) -> Iterator[Batch]:
        spool.seek(0)
        snapshot = self.home.snapshot()
        for ids, n in kept:
            array = np.frombuffer(spool.read(4 * n * self.space.size), np.float32)
            rows = snapshot.look_up(snapshot.layout.id_column(ids))
            yield Batch(
                Embeddings(array.reshape(n, -1), self.space),
                ids,
                {"of_row": rows, "of_version": [version] * n, "bridged": [True] * n},
            )


def keyed(vectors: Embeddings, keys: Keys, bridged: NDArray[np.bool_]) -> Batch:
    """Return rows as the new index takes them: each keyed to what its vector was made of."""
    of = {"of_row": keys.row_ids, "of_version": keys.updated}
    return Batch(vectors, payload={**of, "bridged": bridged})


def _joined(
    old: View,
    new: View,
    keys: Keys,
    new_keys: Keys,
    of_row: NDArray[np.int64],
    of_version: NDArray[np.int64],
    bridged: NDArray[np.bool_],
) -> Sides:
    order = np.argsort(keys.row_ids, kind="stable")
    at = np.searchsorted(keys.row_ids, of_row, sorter=order)
    true = at < len(order)
    at = order[at[true]]
    still = (keys.row_ids[at] == of_row[true]) & (keys.updated[at] == of_version[true])
    true[true], at = still, at[still]
    is_done, by_bridge = np.zeros((2, len(order)), np.bool_)
    is_done[at], by_bridge[at] = True, bridged[true]
    by_place = np.argsort(at, kind="stable")
    numbers = old.rows_of(keys)
    new_numbers = new.rows_of(Keys(new_keys.row_ids[true], new_keys.updated[true]))
    place = np.full(len(new.generation) + new.n_fresh + 1, -1)
    place[new_numbers] = numbers[at]
    return Sides(
        pending=_only(old, numbers[~is_done]),
        done=_only(new, new_numbers),
        place=place,
        keys=keys,
        is_done=is_done,
        new_row=new_keys.row_ids[true][by_place],
        bridged=by_bridge,
    )


def _only(view: View, rows: NDArray[np.int64]) -> Mask:
    """Return the mask of some rows of a view."""
    if len(rows) == len(view):
        return view.everyone
    n = len(view.generation)
    which = np.zeros(n + view.n_fresh, np.bool_)
    which[rows] = True
    return Mask(which[:n], which[n:], int(np.count_nonzero(which[:n])))


def _both(pending: Mask, passing: Mask) -> Mask:
    derived = passing.derived & pending.derived if len(pending.derived) else passing.derived
    return Mask(derived, passing.fresh & pending.fresh, int(np.count_nonzero(derived)))


def _at_places(place: NDArray[np.int64], passing: Mask, n_derived: int) -> Mask:
    """Return the mask of the rows whose places in the other view pass."""
    passes = np.concatenate([passing.derived, passing.fresh, [False]])  # the last is place -1
    found = passes[place[:-1]]
    derived = found[:n_derived]
    return Mask(derived, found[n_derived:], int(np.count_nonzero(derived)))
