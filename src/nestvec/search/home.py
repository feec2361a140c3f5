"""Where an index lives: its record, what is derived from it, and the newest view of both.

An upgrade that is finished puts the index into another folder below the same path; whoever has it
open follows. Damaged derived files are made again from the record.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from nestvec.search import engine
from nestvec.search.derived import Derived
from nestvec.search.generation import Generation
from nestvec.search.sealed import Damaged
from nestvec.search.store import Snapshot, Store, Written
from nestvec.search.store.incoming import Incoming, gathered
from nestvec.search.store.store import Moved
from nestvec.search.stored_plan import StoredPlan
from nestvec.search.view import View
from nestvec.space import Space

_log = logging.getLogger(__name__)
_MANY = 10_000  # fresh rows that are still few beside fewer derived ones


class Home:
    """An index as it lies on disk, open for reading and writing by threads of one process."""

    path: Path
    store: Store
    derived: Derived
    kept_plan: StoredPlan
    left: Space | None
    """The Space that the index was of when it was opened, if an upgrade has ended since."""

    def __init__(self, store: Store, *, show_progress: bool = False) -> None:
        self.path = store.root
        self.show_progress = show_progress
        self.lock = threading.RLock()
        self._live_in(store)
        self.left = None
        # Lance refuses to read a dataset object that another thread writes with, so writes have
        # a store of their own.
        self._writing = threading.Lock()
        self._writer: Store | None = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        durability: str = "power",
        show_progress: bool = False,
    ) -> Home:
        """Open what lives at ``path`` at its newest version."""
        home = cls(Store.open(path, durability=durability), show_progress=show_progress)
        if stamps := home.derived.stamps():
            home.store.refresh()  # what others derived meanwhile is of versions that it sees now
            home.derived.drop_lost(stamps, home.store.snapshot)
        return home

    def _live_in(self, store: Store) -> None:
        """Read and write in the folder of a store from now on."""
        self.store = store
        space = store.layout.space
        sizes = sorted({*space.nesting_dims, space.size})
        self.derived = Derived(store.path / "derived", sizes, show_progress=self.show_progress)
        self._view: View | None = None
        self._weighed: View | None = None  # the one whose fresh rows were found to be few, or said
        self.kept_plan = StoredPlan(store.path, self.path)

    # --- the record -------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return the newest version of the record."""
        self.refresh()
        return self.store.snapshot

    def refresh(self) -> None:
        """Look for a newer version of the record."""
        if self.store.is_unchanged():
            return
        self.follow()
        with self.lock:
            if self.store.is_newer():
                self.store.refresh()
            # a writer that rests would keep the version it wrote on disk
            if self._writer is not None and self._writing.acquire(blocking=False):
                if self._writer is not None and self._writer.version < self.store.version:
                    self._writer = None
                self._writing.release()

    def follow(self) -> None:
        """Go to the folder where the index lives now, if an upgrade of it was finished."""
        if not self.store.is_moved():
            return
        with self.lock:
            if self.store.is_moved():
                old = self.store.layout.space
                self._live_in(Store.open(self.path, durability=self.store.durability))
                if self.left is None and old.space_id != self.store.layout.space.space_id:
                    self.left = old

    @contextlib.contextmanager
    def written(self) -> Iterator[Store]:
        """Yield the store to write with, to one thread at a time."""
        self.follow()
        with self._writing:
            if self._writer is None or self._writer.path != self.store.path:
                self._writer = Store.open(self.path, durability=self.store.durability)
            yield self._writer

    def write(self, how: str, rows: Any) -> Written:
        """Write batches of rows in one version: ``how`` is ``"append"`` or ``"upsert"``."""
        with self.writing(rows) as ready:
            if ready is None:
                return Written(self.snapshot().version)
            store, new = ready
            return store.put_locked(how, new)

    @contextlib.contextmanager
    def writing(self, rows: Any) -> Iterator[tuple[Store, Incoming] | None]:
        """Yield a store whose lock is held, and checked rows for it; None if there are no rows."""
        # whatever makes them may take its time, and may write to this index itself
        checked_for = self.store
        with gathered(rows, checked_for.layout, checked_for.path) as new:
            if new is None:
                yield None
                return
            with self.written() as store, store.locked():
                if store.path != checked_for.path:
                    raise Moved(self.path)
                yield store, new

    # --- views ------------------------------------------------------------------------------------

    def view(self) -> View:
        """Return a view of the newest version."""
        view = self.looked()
        assert view is not None
        if view is self._weighed:
            return view
        self._weighed = view
        if view.n_fresh > max(_MANY, view.everyone.n_derived):
            slow = {*engine.KNOWN} & {*view.generation.names()}
            if not slow:
                return self.renewed(view)
            _log.warning(
                "%s: %s rows were written since its structures were built, more than are in them; "
                "each search scores all of those. compact() takes them in.",
                self.path,
                f"{view.n_fresh:,}",
            )
        return view

    def looked(self, *, derive: bool = True) -> View | None:
        """Return a view of the newest version: None if it would have to be derived and may not."""
        self.refresh()
        view = self._view
        if view is not None and view.snapshot is self.store.snapshot:
            return view
        with self.lock:
            view, snapshot = self._view, self.store.snapshot
            if view is None:
                made = self.derived.newest(snapshot)
                if made is None:
                    if not derive:
                        return None
                    made = self.derived.derive(snapshot)
                view = View(snapshot, made)
            elif view.snapshot is not snapshot:
                old = view.generation  # compacted by another process, it may be old indeed
                slow = {*engine.KNOWN} & {*old.names()}
                newer = self.derived.newest(snapshot, after=old.version, having=slow)
                view = View(snapshot, newer or old, view)
            self._view = view
        return view

    def renewed(self, old: View, parts: Iterable[str] = ()) -> View:
        """Derive the version of a view anew; searches go on meanwhile."""
        generation = self.derived.derive(old.snapshot, parts)
        with self.lock:
            self._view, self._weighed = View(old.snapshot, generation), None
        return self.view()

    def healed(self, work: Callable[[View], Any]) -> tuple[View, Any]:
        """Do something with the newest view: once more, if it meets what is damaged."""
        view = self.view()
        try:
            return view, work(view)
        except Damaged as error:
            view = self.mended(view, error)
            return view, work(view)

    def mended(self, view: View, error: Damaged) -> View:
        """Return a new view in place of one that met what is damaged."""
        _log.warning("%s Derived files are made again from the record.", str(error))
        self.discard(view.generation)
        return self.view()

    def discard(self, generation: Generation) -> None:
        """Remove a generation in which vectors are damaged; the next search derives it anew."""
        with self.lock:
            if self._view is not None and self._view.generation is generation:
                self._view = self._weighed = None
                self.derived.discard(generation)
