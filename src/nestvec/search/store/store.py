"""The store of record: create and open, write whole versions, compact."""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nestvec._atomic import written_beside
from nestvec._extras import require
from nestvec.errors import DataError, FileFormatError, NestvecError, StorageError
from nestvec.search.store import checkup, durable
from nestvec.search.store.incoming import Incoming, gathered
from nestvec.search.store.layout import STAMP, Batch, Ids, Layout, home_of
from nestvec.search.store.snapshot import Snapshot
from nestvec.space import Embeddings, Space

pa = require("pyarrow", extra="index", why="an index")
lance = require("lance", extra="index", why="an index")
optimize = require("lance.optimize", extra="index", why="an index")

_DURABILITY = ("power", "process")
_TICK_NS = 3_000_000_000  # of the coarsest clocks of file systems
_CACHE_BYTES = 1 << 26  # Lance's own limits are gigabytes
_FRAGMENT_ROWS = 1 << 18  # an upsert makes the keys of the fragments it touches be read again

Batches = Batch | Embeddings | Incoming | Iterable[Any]


class Moved(StorageError):
    """The index lives in another folder now: an upgrade to another Space was finished."""

    def __init__(self, root: Path) -> None:
        super().__init__(
            f"the index at {root} was upgraded to another space meanwhile, so nothing was written. "
            f"Write vectors of its new space."
        )


class Written(NamedTuple):
    """What a write did; ``version`` is the one that holds it."""

    version: int
    inserted: int = 0
    updated: int = 0
    deleted: int = 0


@dataclass(frozen=True)
class Stats:
    """Figures of a store.

    ``deleted_rows`` still take room, in one of ``fragments`` (pieces that a scan opens), until
    `Store.compact`; ``record_bytes`` is all that stands on disk, older ``versions`` included.
    """

    version: int
    rows: int
    deleted_rows: int
    fragments: int
    versions: int
    record_bytes: int
    durability: str


class Store:
    """The rows of an index on disk: ids, vectors, payload.

    Every write makes one version, whole or not at all, and returns when that is durable: with
    ``durability="power"`` its files and folders are synced and survive a power cut, with
    ``"process"`` they survive the end of the process. Writers in any process or thread take
    turns; readers wait for nobody. `snapshot` is the version that this store sees; `refresh`
    moves it to the newest, and so does every write. It stays with the folder that it was opened
    in; once an upgrade has left that one, writes raise `Moved`.
    """

    snapshot: Snapshot

    def __init__(self, root: Path, path: Path, snapshot: Snapshot, durability: str) -> None:
        self.root = root
        self.path = path
        self.durability = durability
        self.snapshot = snapshot
        self._versions = str(path / "record" / "_versions")
        self._stamp: Any = None  # as it was when it said that this is the folder
        self._seen = -1, False  # when it changed last, and whether that tells enough by itself
        self._handle = os.open(self._versions, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._handle)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        space: Space,
        *,
        id_type: str,
        precision: str = "float32",
        payload: Any = None,
        durability: str = "power",
        rows: Batches | None = None,
    ) -> Store:
        """Make a store at ``path``; it appears whole, with its first rows, or not at all.

        Parameters
        ----------
        path
            Nothing may stand there, except an empty folder.
        space
            Where all its vectors live; others are refused.
        id_type
            ``"int"`` (int64) or ``"str"``.
        precision
            ``"float32"`` or ``"float16"``, of the vectors on disk.
        payload
            pyarrow.Schema of the columns beside id and vector; None for none.
        durability
            ``"power"`` or ``"process"``, for this object; not kept.
        rows
            As for `append`; none by default.

        Raises
        ------
        StorageError
            If anything stands there, or the disk refuses.
        DataError
            If a column's name is taken, an option does not exist, or rows do not fit.
        """
        path = Path(path)
        layout = Layout(space, id_type, precision, pa.schema([]) if payload is None else payload)
        _check_durability(durability)
        with written_beside(path) as scratch:
            record = scratch / "record"
            empty = layout.schema.empty_table()
            lance.write_dataset(empty, str(record), enable_stable_row_ids=True)
            for name in ("record/data", "record/_deletions", "checksums", "readers"):
                (scratch / name).mkdir()
            (scratch / "lock").touch()
            # of use on object stores only, where it would mislead: our commits do not renew it
            (record / "_versions" / "latest_version_hint.json").unlink(missing_ok=True)
            layout.save(scratch)
            files = (*(record / "_versions").iterdir(), *(record / "_transactions").iterdir())
            durable.write_checksums(scratch, 1, {file: durable.checksum(file) for file in files})
            if rows is not None:
                try:
                    cls.open(scratch, durability="process").append(rows)  # all is synced below
                except StorageError as error:
                    raise StorageError(str(error).replace(str(scratch), str(path))) from error
        return cls.open(path, durability=durability)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, durability: str = "power") -> Store:
        """Open the newest version.

        Raises
        ------
        StorageError
            If there is no index at ``path``.
        FileFormatError
            If it is damaged, or was written by a newer nestvec.
        """
        _check_durability(durability)
        root = Path(path)
        while True:
            home = home_of(root)
            try:
                return cls._opened(root, home, durability)
            except NestvecError:
                if home_of(root) == home:  # else an upgrade was finished at this moment
                    raise

    @classmethod
    def _opened(cls, root: Path, path: Path, durability: str) -> Store:
        _check_is_index(path)
        try:
            dataset = lance.dataset(
                str(path / "record"),
                metadata_cache_size_bytes=_CACHE_BYTES,
                index_cache_size_bytes=_CACHE_BYTES,
            )
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # Lance can panic
            raise FileFormatError(_unreadable(path, durable.reason(error))) from error
        checkup.check_manifest(path, dataset.version)
        layout = Layout.load(path, pa.schema(list(dataset.schema)[2:]))
        if not dataset.schema.equals(layout.schema):
            raise FileFormatError(
                f"{path / 'record'} does not have the columns that {path / STAMP} says "
                f"({', '.join(f'{f.name} {f.type}' for f in layout.schema)}): one of them is of "
                f"another index. Restore both from one backup."
            )
        lease = durable.Lease(path, dataset.version)
        store = cls(root, path, Snapshot(path, dataset, layout, lease), durability)
        store.refresh()  # a version that was removed before it was leased
        return store

    def __repr__(self) -> str:
        return f"Store({self.path}, version {self.version}, {self.count} rows)"

    @property
    def version(self) -> int:
        """Number of the version seen; it rises by every write."""
        return self.snapshot.version

    @property
    def count(self) -> int:
        """Number of rows in the version seen."""
        return self.snapshot.count

    @property
    def layout(self) -> Layout:
        """Space, id type, precision and payload columns."""
        return self.snapshot.layout

    # --- reading ----------------------------------------------------------------------------------

    def is_unchanged(self) -> bool:
        """Tell that there is no newer version, as far as one system call can; False if unsure.

        It takes a microsecond, and any thread may ask.
        """
        seen_ns, settled = self._seen
        if not settled:
            return False
        now = os.fstat(self._handle)
        return now.st_mtime_ns == seen_ns and now.st_nlink > 0

    def is_moved(self) -> bool:
        """Tell whether an upgrade was finished: the index at `root` is in another folder now."""
        stamp = durable.signature(self.root / STAMP)
        if stamp == self._stamp:
            return False
        if home_of(self.root) != self.path:
            return True
        self._stamp = stamp
        return False

    def is_newer(self) -> bool:
        """Tell whether there is a newer version than the one seen; takes microseconds."""
        seen, now_ns = self.version, time.time_ns()
        changed_ns = os.stat(self._versions).st_mtime_ns  # noqa: PTH116
        # Two commits within a tick of the clock leave the folder's time the same, so it is an
        # answer by itself only if it was old when nothing was found.
        settled = now_ns - changed_ns > _TICK_NS
        seen_ns, was_settled = self._seen
        if changed_ns == seen_ns:
            if was_settled:
                return False
            if os.path.exists(self.snapshot.next_manifest):  # noqa: PTH110
                return True
            if not settled:
                return False
        # The next may be there no more, while one after it is.
        newer = self.snapshot.dataset.latest_version > seen
        if not newer:
            self._seen = changed_ns, settled
        return newer

    def refresh(self) -> bool:
        """See the newest version from now on; tell whether that is another one."""
        old = self.snapshot
        while (newest := old.dataset.latest_version) != self.snapshot.version:
            lease = durable.Lease(self.path, newest)
            if old.dataset.latest_version == newest:  # so the lease was there before it was old
                self.snapshot = Snapshot(
                    self.path, old.dataset.checkout_version(newest), old.layout, lease
                )
        return self.snapshot is not old

    def stats(self) -> Stats:
        """Count rows, pieces and bytes."""
        fragments = [fragment.metadata for fragment in self.snapshot.dataset.get_fragments()]
        files = (p for p in (self.path / "record").rglob("*") if p.is_file())
        return Stats(
            version=self.version,
            rows=self.count,
            deleted_rows=sum(fragment.num_deletions for fragment in fragments),
            fragments=len(fragments),
            versions=len(self.snapshot.dataset.version_refs()),
            record_bytes=sum(checkup.size(file) for file in files),
            durability=self.durability,
        )

    def check(self) -> checkup.Report:
        """Read all files of the newest version and look for damage; see `Report`."""
        self.refresh()
        return checkup.check(self.path, self.snapshot)

    # --- writing ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the writer lock, and see the newest version.

        Raises
        ------
        Moved
            If an upgrade has left this folder: what is written here would be lost.
        """
        with durable.storage_errors(self.path), contextlib.ExitStack() as held:
            try:
                held.enter_context(durable.writer_lock(self.path))
            except FileNotFoundError:
                self._check_not_moved()
                raise
            self._check_not_moved()
            self.refresh()
            yield

    def _check_not_moved(self) -> None:
        if self.is_moved():
            raise Moved(self.root)

    def append(self, rows: Batches) -> Written:
        """Add rows with new ids, all of them in one version.

        Parameters
        ----------
        rows
            A `Batch`, `Embeddings`, or an iterable of either, which is read to its end into a
            nameless file beside the record before anything is locked: only the ids and one batch
            are in memory.

        Raises
        ------
        DataError
            If an id exists or comes twice, or vectors or payload do not fit; nothing is written.
        SpaceMismatchError
            If they are vectors of another Space.
        StorageError
            If the disk refuses; nothing is written.
        """
        return self._put("append", rows)

    def upsert(self, rows: Batches) -> Written:
        """Add rows, or replace those whose ids exist; all in one version.

        A row that is replaced keeps its row id and gets a new version of last update, also if the
        values are the same. Parameters and errors are those of `append`.
        """
        return self._put("upsert", rows)

    def _put(self, how: str, rows: Batches) -> Written:
        with gathered(rows, self.layout, self.path) as new:
            if new is None:
                return Written(self.version)
            with self.locked():
                return self.put_locked(how, new)

    def put_locked(self, how: str, new: Incoming) -> Written:
        """Do what `append` or `upsert` does, for one who holds the lock already."""
        if how == "upsert":
            merge = self.snapshot.dataset.merge_insert("id")
            merge.when_matched_update_all().when_not_matched_insert_all()
            return self._merge(merge, new.rows)
        there = self.snapshot.look_up(_array(new.ids)) >= 0
        if there.any():
            first = new.ids[int(there.argmax())].as_py()
            raise DataError(
                f"id {first!r} exists ({int(there.sum())} of {len(there)} ids do). "
                f"upsert() replaces rows, add() only adds them."
            )
        fragments = self._undone_if_it_fails(
            lambda: lance.fragment.write_fragments(
                new.rows, self.snapshot.dataset, max_rows_per_file=_FRAGMENT_ROWS
            )
        )
        self._commit(lance.LanceOperation.Append(fragments), fragments)
        return Written(self.version, inserted=len(there))

    def delete(self, ids: Ids, *, missing_ok: bool = False) -> Written:
        """Remove rows by their ids, all in one version.

        Raises
        ------
        DataError
            If an id does not exist and ``missing_ok`` is False; nothing is removed then.
        StorageError
            If the disk refuses; nothing is removed.
        """
        column = self.layout.id_column(ids)
        with self.locked():
            there = self.snapshot.look_up(column) >= 0
            if not there.all() and not missing_ok:
                first = column[int(there.argmin())].as_py()
                raise DataError(
                    f"unknown id {first!r} ({int((~there).sum())} of {len(there)}). Nothing was "
                    f"deleted; missing_ok=True deletes the others."
                )
            if not there.any():
                return Written(self.version)
            merge = self.snapshot.dataset.merge_insert("id").when_matched_delete()
            return self._merge(merge, pa.table({"id": column}))

    def _merge(self, merge: Any, rows: Any) -> Written:
        # Uncommitted, so that its files are synced before any manifest names them. Such a
        # transaction has lost Lance's note of the keys it inserted: without our lock two stale
        # writers would insert one id twice.
        transaction, counts = self._undone_if_it_fails(lambda: merge.execute_uncommitted(rows))
        operation = transaction.operation
        self._commit(transaction, [*operation.new_fragments, *operation.updated_fragments])
        return Written(self.version, *(counts[f"num_{did}_rows"] for did in Written._fields[1:]))

    def _commit(self, operation: Any, fragments: Iterable[Any]) -> None:
        known = self._files(self.snapshot.dataset)
        version = self.snapshot.version
        written = [file for file in checkup.files_of(self.path, fragments) if file not in known]

        def commit(desk: Any) -> None:
            lance.LanceDataset.commit(desk, operation, read_version=version)

        self._publish(commit, written)

    def _files(self, dataset: Any) -> set[Path]:
        infos = (fragment.metadata for fragment in dataset.get_fragments())
        return set(checkup.files_of(self.path, infos))

    def _publish(self, commit: Callable[[Any], object], written: list[Path]) -> None:
        power = self.durability == "power"
        self._undone_if_it_fails(
            lambda: durable.publish(self.path, self.version, commit, written, power=power)
        )
        self.refresh()

    def _undone_if_it_fails(self, write: Callable[[], Any]) -> Any:
        """Remove what a write leaves behind that did not get as far as a version."""
        try:
            return write()
        except BaseException:
            with contextlib.suppress(Exception):  # the next compaction removes it
                checkup.remove_waste(self.path, self.snapshot)
            raise

    def compact(self, *, keep_versions: int = 1) -> int:
        """Join small fragments, rewrite those that lost a tenth, remove old versions and waste.

        Row ids and versions of last update stay. A version that anybody still reads (a `Snapshot`
        lives, in whatever process on this machine) is kept until a later compaction; so a reader
        is never disturbed, and one that forgets to refresh costs disk. A process that ends, by
        whatever means, reads no more.

        Parameters
        ----------
        keep_versions
            How many of the newest versions stay in any case.

        Returns
        -------
        int
            Bytes that became free; negative where old versions are still read.
        """
        if keep_versions < 1:
            raise DataError(f"keep_versions={keep_versions}: at least the newest stays, 1.")
        with self.locked():
            before = self.stats().record_bytes
            dataset = self.snapshot.dataset
            options = {"target_rows_per_fragment": _FRAGMENT_ROWS, "num_threads": 1}
            plan = optimize.Compaction.plan(dataset, options)
            done = self._undone_if_it_fails(lambda: [task.execute(dataset) for task in plan.tasks])
            if done:
                fragments = [fragment for one in done for fragment in one.new_fragments]
                known = self._files(dataset)
                files = checkup.files_of(self.path, fragments)
                self._publish(
                    lambda desk: optimize.Compaction.commit(desk, done),
                    [file for file in files if file not in known],
                )
            self._remove_versions(keep_versions)
            checkup.remove_waste(self.path, self.snapshot)
            power = self.durability == "power"
            durable.fold_checksums(self.path, self.version, power=power)
            return before - self.stats().record_bytes

    def _remove_versions(self, keep: int) -> None:
        dataset = self.snapshot.dataset
        versions = sorted(ref["version"] for ref in dataset.version_refs())
        old = [v for v in versions[:-keep] if not durable.is_read(self.path, v)]
        if old:
            dataset.cleanup_old_versions(versions=old, error_if_tagged_old_versions=False)


def _array(ids: Any) -> Any:
    return ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids


def _check_durability(durability: str) -> None:
    if durability not in _DURABILITY:
        raise DataError(f"durability {durability!r} is not one of {', '.join(_DURABILITY)}.")


def _check_is_index(path: Path) -> None:
    if (path / STAMP).is_file() and (path / "record").is_dir():
        return
    create = "nestvec.Index.create() makes one"
    if not path.exists():
        raise StorageError(f"there is no index at {path}; {create}.")
    if not path.is_dir():
        raise FileFormatError(f"{path} is a file, and an index is a folder; {create}.")
    for name, other in ((STAMP, "record"), ("record", STAMP)):
        if (path / other).exists():
            raise FileFormatError(
                f"{path} has {other} but no {name}, which an index never lacks: it was removed "
                f"or not copied. Restore the whole folder."
            )
    what = "holds no index" if any(path.iterdir()) else "is an empty folder"
    raise StorageError(f"{path} {what}; {create}.")


def _unreadable(path: Path, why: str) -> str:
    newest = min((path / "record" / "_versions").glob("*.manifest"), default=None)
    return (
        f"cannot open {path}: {newest or 'record/_versions has no manifest'} ({why}). It is "
        f"damaged. Restore it from a backup."
    )
