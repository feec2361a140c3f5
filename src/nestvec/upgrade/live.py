"""Upgrade: a new model on an index that is in use, from the first query to the last old vector.

How it works, in a few lines. The record of the old index stays the truth about rows until the end:
which there are, their payload, their versions. Beside it, in ``upgrade/``, an index of the new
Space fills up; each of its vectors is keyed to the row and the version that it was made of, so an
upsert or delete in the old index, by whom and in whatever process, makes it void by itself, and no
write has to be made twice. Queries of the new Space score rows with true new vectors by those, and
all others through the bridge (`nestvec.search.upgrading`). Each step changes one thing in one
moment: `start` lets a whole folder appear, a backfill adds versions to the new index, `finish`
replaces the stamp, `rollback` removes ``upgrade.json``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from nestvec._atomic import sync_folder, written_beside
from nestvec.errors import DataError, FileFormatError, SpaceMismatchError, StorageError
from nestvec.maps.base import FittedMap
from nestvec.search.index import Index
from nestvec.search.store import Keys, Store, durable
from nestvec.search.store.snapshot import as_matrix
from nestvec.search.transition import (
    FOLDER,
    KEYS,
    LOCK,
    NEW,
    STATE,
    Calibration,
    State,
    bridge_names,
    home_name,
    tidy,
)
from nestvec.search.upgrading import Upgrading, keyed
from nestvec.space import Embeddings, Space
from nestvec.upgrade import backfill as filling
from nestvec.upgrade import finish as finishing
from nestvec.upgrade.bridge import fit
from nestvec.upgrade.calibration import calibrate
from nestvec.upgrade.estimating import duration
from nestvec.upgrade.learning import n_learned_from, seen_by
from nestvec.upgrade.order import check_order
from nestvec.upgrade.sources import NewVectors, Source, check_column

_LOOKS = (0.02,) * 25  # seconds: who asks for the status holds the lock for no longer


@dataclass(frozen=True)
class Status:
    """How far an upgrade is.

    Parameters
    ----------
    rows, done, pending
        Rows of the index; those that have new vectors, and those that do not.
    bridged
        Done rows that were written with new vectors during the upgrade: after a rollback their old
        vectors are what the bridge made.
    pairs
        Pairs that the bridge was learned from, or another since that was no better; 0 if the
        bridge does not say.
    running
        Whether a process works on it now.
    rows_per_second, seconds_left
        By the last backfill; None if there was none, or nothing is pending.
    order
        That of the last backfill.
    begun
        When the upgrade was started, UTC.
    """

    rows: int
    done: int
    pending: int
    bridged: int
    pairs: int
    running: bool
    rows_per_second: float | None
    seconds_left: float | None
    order: str | None
    begun: str

    @property
    def may_finish(self) -> bool:
        """Whether no row would be lost by it."""
        return self.pending == 0

    @property
    def sentence(self) -> str:
        """What it comes to."""
        share = 100 * self.done / max(1, self.rows)
        text = f"{self.done:,} of {self.rows:,} rows have new vectors ({share:.0f}%)"
        if self.may_finish:
            return f"{text}: finish drops the old ones, rollback the new ones."
        if self.seconds_left is None:
            return f"{text}, {self.pending:,} are found through the bridge: backfill them."
        pace = f"{self.rows_per_second:,.0f} rows a second"
        left = f"about {duration(self.seconds_left)} at {pace}"
        return f"{text}, {self.pending:,} are found through the bridge: {left}."


class Upgrade:
    """An upgrade of an index to another Space; made by `start`, or found again by `open`.

    While it is under way, queries of both Spaces search the index (`nestvec.Index.search`), and
    rows of both may be written to it.
    """

    def __init__(self, index: Index) -> None:
        self.index = index

    @classmethod
    def open(cls, index: Index | str | os.PathLike[str], *, show_progress: bool = False) -> Upgrade:
        """Open the upgrade that is under way on an index.

        Raises
        ------
        StorageError
            If there is none.
        """
        found = _opened(index, show_progress)
        upgrade = cls(found)
        upgrade._under_way()
        return upgrade

    @classmethod
    def start(
        cls,
        index: Index | str | os.PathLike[str],
        sample: Embeddings,
        *,
        bridge: FittedMap | None = None,
        queries: Embeddings | None = None,
        column: str | None = None,
        version: int | None = None,
        show_progress: bool = False,
    ) -> Upgrade:
        """Begin an upgrade: from now on queries of the new Space are answered.

        Parameters
        ----------
        index
            An `Index`, or the path of one.
        sample : (n, dim_new)
            Rows of the index, by their ids, as the new model has them; 20 or more, best 2,000
            drawn at random. They are the first that are done, and scores are calibrated on them.
        bridge
            From the new Space to that of the index. By default `nestvec.upgrade.fit` makes one of
            the sample, less a fifth of it where no ``queries`` are given.
        queries : (n_queries, dim_new), optional
            Of the new Space, to calibrate with; best real ones that the bridge was not fitted on.
            By default rows of the sample ask: the fifth that was held out, or all.
        column
            The payload column that is embedded, for `backfill`.
        version
            That of the index whose rows the sample was made of; rows that were written since are
            left out of it. By default the newest.

        Raises
        ------
        SpaceMismatchError
            If the bridge does not lead from the sample's Space to that of the index.
        DataError
            If an id of the sample is unknown, or it says too little to calibrate scores.
        StorageError
            If an upgrade is under way.
        """
        found = _opened(index, show_progress)
        check_none(found)
        _check_sample(found, sample, queries, column)
        snapshot = found._home.snapshot()
        row_ids = snapshot.rows_of(sample.ids)
        stored = as_matrix(snapshot.read(row_ids, ["vector"])["vector"]).astype(np.float32)
        old = Embeddings(stored, snapshot.layout.space, sample.ids)
        if bridge is None:
            held_out = np.arange(len(sample)) % 5 == 0
            some = np.flatnonzero(~held_out) if queries is None else np.arange(len(sample))
            bridge = fit(old=old[some], new=sample[some])
            queries = sample[np.flatnonzero(held_out)] if queries is None else queries
        _check_bridge(found, bridge, sample)
        scale, known = calibrate(bridge, sample if queries is None else queries, sample, old)
        known.learned = row_ids[seen_by(bridge, sample.array)]
        keys = snapshot.keys()
        order = np.argsort(keys.row_ids, kind="stable")
        updated = keys.updated[order[np.searchsorted(keys.row_ids, row_ids, sorter=order)]]
        true = np.flatnonzero(updated <= (snapshot.version if version is None else version))
        first = None
        if len(true):
            own = np.zeros(len(true), np.bool_)
            first = keyed(sample[true], Keys(row_ids[true], updated[true]), own)
        with found._home.written() as store, store.locked():
            tidy(store)
            check_none(found)
            begun = datetime.now(UTC).isoformat(timespec="seconds")
            state = State(
                home_name(store), sample.space, scale, begun, column, n_learned_from(bridge)
            )
            bridge_name, known_name = bridge_names(state.fit)
            with written_beside(found.path / FOLDER) as scratch:
                scratch.mkdir()
                Store.create(
                    scratch / NEW,
                    sample.space,
                    id_type=store.layout.id_type,
                    precision=store.layout.precision,
                    payload=KEYS,
                    durability="process",  # all is synced when the folder is put in place
                    rows=first,
                )
                bridge.save(scratch / bridge_name)
                known.save(scratch / known_name)
                (scratch / LOCK).touch()
                state.save(scratch / Path(STATE).name)
        return cls(found)

    def __repr__(self) -> str:
        return f"Upgrade({str(self.index.path)!r} to {self.space.label})"

    @property
    def space(self) -> Space:
        """The new Space."""
        return self._under_way().space

    @property
    def bridge(self) -> FittedMap:
        """The map from the new Space to the old one."""
        return self._under_way().bridge

    @property
    def calibration(self) -> Calibration:
        """How bridged scores are put on the scale of new ones."""
        return self._under_way().state.calibration

    def status(self) -> Status:
        """Count what is done, and say how long the rest will take."""
        upgrading = self._under_way()
        sides = upgrading.sides(*upgrading.views())
        rows, done = len(sides.is_done), int(np.count_nonzero(sides.is_done))
        said = filling.pace(self.index.path)
        rate = said["rows"] / said["seconds"] if said.get("seconds") else None
        return Status(
            rows=rows,
            done=done,
            pending=rows - done,
            bridged=int(np.count_nonzero(sides.bridged)),
            pairs=upgrading.state.pairs,
            running=self._is_running(),
            rows_per_second=rate,
            seconds_left=(rows - done) / rate if rate and rows > done else None,
            order=said.get("order"),
            begun=upgrading.state.begun,
        )

    def backfill(
        self,
        source: Source,
        *,
        column: str | None = None,
        order: str | None = None,
        traffic: Mapping[Any, float | int] | None = None,
        queries: Embeddings | None = None,
        learn: bool = True,
        rows_per_second: float | int | None = None,
        max_rows: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> int:
        """Give pending rows their new vectors, those that pay most first; return how many got one.

        May be killed at any moment, and begun again.

        Parameters
        ----------
        source
            What embeds: an encoder of the new Space, or a function from a list of the column's
            values to vectors of it, one a row. Or `Embeddings`, made before, with the ids of the
            index, of its rows as they are when these vectors are first given; rows that they lack,
            or that are written later, stay pending. So do rows that an encoder finds no text in.
        column
            The payload column that is embedded; by default the one that `start` was told.
        order
            ``"traffic"``: what is asked for most, by ``queries`` or by the counts in ``traffic``,
            then what is like it.
            ``"bridge_error"``: what the bridge is expected to miss most. ``"random"``. By default
            by traffic if one of the two is given, else random.
        traffic
            How often each id was returned or asked for, ``{id: count}``.
        queries : (n_queries, dim_new)
            A log of queries, of the new Space, each as often as it was asked. They are asked again
            after each tenth of the rows, and what stands high in their answers comes first.
        learn
            Learn the bridge again when rows that are done make a bridge of twice as many pairs
            (from 400, up to 3,200), and take it if rows that neither has learned from say so.
        rows_per_second
            At most as many.
        max_rows
            Stop after as many.
        batch_size
            Rows that the source is given at a time: 256, or 8,192 of vectors that are made.

        Raises
        ------
        DataError
            If a setting, or what the source returns, does not fit.
        SpaceMismatchError
            If the source's vectors are of another Space.
        StorageError
            If another process works on this upgrade, or the disk refuses.
        """
        if order is None:
            order = "random" if traffic is None and queries is None else "traffic"
        check_order(order, traffic, queries)
        for name, value in (("rows_per_second", rows_per_second), ("max_rows", max_rows)):
            if value is not None and not value > 0:
                raise DataError(f"{name} is {value}; more than 0, or None for no limit.")
        with self._alone() as upgrading:
            if queries is not None:
                upgrading.space.check_same(queries.space)
            if column is None and not isinstance(source, Embeddings):
                column = upgrading.state.column
            vectors = NewVectors(source, column, upgrading.space, self.index.schema.names)
            if batch_size is None:
                batch_size = 8192 if vectors.is_made else 256
            return filling.backfill(
                self.index,
                upgrading,
                vectors,
                order=order,
                traffic=traffic,
                queries=queries,
                learn=learn,
                seed=seed,
                batch_size=batch_size,
                rows_per_second=rows_per_second,
                max_rows=max_rows,
                show_progress=self.index.show_progress,
            )

    def finish(self, *, drop_pending: bool = False) -> int:
        """Drop the old vectors: the index is one of the new Space from then on.

        Writers wait meanwhile; searches go on, and follow at their next query. Returns the number
        of rows. Killed at any moment, the index is whole, old or new: while it is the old one, do
        it again; `complete` removes what a kill after that moment has left.

        Parameters
        ----------
        drop_pending
            Delete rows that have no new vector.

        Raises
        ------
        DataError
            If rows are pending.
        """
        with self._alone() as upgrading, self.index._home.written() as store, store.locked():
            n_rows = finishing.finish(
                upgrading,
                store,
                drop_pending=drop_pending,
                show_progress=self.index.show_progress,
            )
        with self.index._home.written() as store, store.locked():  # the new one
            tidy(store)
        return n_rows

    @classmethod
    def complete(cls, index: Index | str | os.PathLike[str]) -> bool:
        """Remove what a finish left that was killed after the index was the new one.

        Tells whether there was such; it is waste, and `nestvec.Index.compact` removes it, too.
        """
        found = _opened(index, False)
        with found._home.written() as store, store.locked():
            return tidy(store)

    def rollback(self) -> NDArray[Any]:
        """Drop the new vectors: the index answers as before.

        Returns the ids of rows that were written with new vectors meanwhile, (n,): they stay, and
        their old vectors are what the bridge made. Write them again with the old model.
        """
        with self._alone() as upgrading, self.index._home.written() as store, store.locked():
            try:
                old, new = upgrading.views()
                sides = upgrading.sides(old, new)
            except FileFormatError as error:
                raise FileFormatError(
                    f"{error} Without it nobody knows which rows were written with new vectors. "
                    f"Remove {self.index.path / FOLDER} to take the upgrade back all the same."
                ) from error
            ids = old.ids(old.rows_of(sides.keys.at(np.flatnonzero(sides.bridged))))
            with durable.storage_errors(self.index.path / FOLDER):
                (self.index.path / STATE).unlink()
                sync_folder(self.index.path / FOLDER)
            tidy(store)
        return ids

    # --- inside -----------------------------------------------------------------------------------

    def _under_way(self) -> Upgrading:
        self.index._home.follow()
        found = self.index._upgrading()
        if found is None:
            raise StorageError(
                f"no upgrade of {self.index.path} is under way: its space is "
                f"{self.index.space.label}. nestvec.upgrade.Upgrade.start() begins one."
            )
        return found

    @contextlib.contextmanager
    def _alone(self) -> Iterator[Upgrading]:
        """Hold the lock of the upgrade, which ends with the process; yield what it is then."""
        self._under_way()
        with self._lock_file() as handle:
            for wait in (*_LOOKS, None):
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if wait is None:
                        raise StorageError(
                            f"another process works on the upgrade of {self.index.path} (it "
                            f"backfills, finishes or rolls back). Wait for it, or stop it; a "
                            f"backfill loses nothing."
                        ) from error
                time.sleep(wait)
            yield self._under_way()  # it may have ended, or changed, while the lock was sought

    def _lock_file(self) -> IO[bytes]:
        file = self.index.path / FOLDER / LOCK
        try:
            if not file.exists():
                file.touch()  # it was lost
            return file.open("rb")
        except FileNotFoundError:
            self._under_way()  # says that it is no more
            raise

    def _is_running(self) -> bool:
        with self._lock_file() as handle:
            try:  # shared, so that those who look at the same time do not see each other
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


def _opened(index: Index | str | os.PathLike[str], show_progress: bool) -> Index:
    return index if isinstance(index, Index) else Index.open(index, show_progress=show_progress)


def check_none(index: Index) -> None:
    """Raise `StorageError` if an upgrade of the index is under way."""
    found = index._upgrading()
    if found is not None:
        raise StorageError(
            f"an upgrade of {index.path} to {found.space.label} is under way. Finish it or roll it "
            f"back first."
        )


def _check_sample(
    index: Index, sample: Embeddings, queries: Embeddings | None, column: str | None
) -> None:
    if sample.space.space_id == index.space.space_id:
        raise DataError(
            f"the sample is of {sample.space.label}, as the index is: there is nothing to upgrade."
        )
    if queries is not None:
        sample.space.check_same(queries.space)
    if not sample.has_ids:
        raise DataError("the sample needs ids, which say what rows of the index it is of.")
    if column is not None:
        check_column(column, index.schema.names)


def _check_bridge(index: Index, bridge: FittedMap, sample: Embeddings) -> None:
    leads_to = bridge.transform(sample[:1]).space
    if leads_to.space_id != index.space.space_id:
        raise SpaceMismatchError(
            f"the bridge leads from {sample.space.label} to {leads_to.label}, and the index is of "
            f"{index.space.label}. Fit one on Embeddings: nestvec.upgrade.fit(old=, new=), with "
            f"old ones of the index."
        )
