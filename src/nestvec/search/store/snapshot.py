"""One version of the record, as a reader sees it: it never changes, whatever is written."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nestvec._extras import require
from nestvec.errors import DataError, FileFormatError, NestvecError, StorageError
from nestvec.search.store.durable import Lease, manifest_path, reason
from nestvec.search.store.layout import Ids, Layout

pa = require("pyarrow", extra="index", why="an index")
pc = require("pyarrow.compute", extra="index", why="an index")

_KEYS = ["_rowid", "_row_last_updated_at_version"]
_KEYS_AT_ONCE = 1 << 18
_FEW = 10_000  # ids that are looked for by a filter; more are joined in memory
_ROWS_AT_ONCE = 8192
_READ_AHEAD = {"batch_readahead": 2, "fragment_readahead": 1, "io_buffer_size": 1 << 26}


class Keys(NamedTuple):
    """Which rows live. A derived row is valid if and only if both numbers match."""

    row_ids: NDArray[np.int64]
    """(n,) Stable: an upsert keeps it."""
    updated: NDArray[np.int64]
    """(n,) The version of the last update."""

    def at(self, places: NDArray[Any]) -> Keys:
        """Return those at some places."""
        return Keys(self.row_ids[places], self.updated[places])


class Rows(NamedTuple):
    """Some rows of a scan: their keys, and a pyarrow.RecordBatch of the columns asked for."""

    keys: Keys
    columns: Any


class Snapshot:
    """One version of the record; made by `Store`, and safe to share between threads.

    As long as it lives its version stays on disk, through compactions in any process.
    """

    def __init__(
        self,
        folder: Path,
        dataset: Any,
        layout: Layout,
        lease: Lease,
    ) -> None:
        self.dataset = dataset
        self.layout = layout
        self.lease = lease
        self.version: int = dataset.version
        #: Where the version after this one would appear.
        self.next_manifest = str(manifest_path(folder / "record", self.version + 1))
        self._folder = folder

    def __repr__(self) -> str:
        return f"Snapshot({self._folder}, version {self.version}, {self.count} rows)"

    @property
    def count(self) -> int:
        """Number of rows that live."""
        return self.dataset.count_rows()

    @property
    def fingerprint(self) -> str:
        """The version and its transaction.

        A power cut can take a version that somebody saw before it was acknowledged, and another
        one then gets its number; what is derived from a version is stamped with this.
        """
        return self._fingerprint_of(self.version)

    def fingerprint_of(self, version: int) -> str | None:
        """Return the fingerprint of an older version: None if a compaction removed it.

        One that cannot be read has the fingerprint "", which fits nothing.
        """
        if not manifest_path(self._folder / "record", version).exists():
            return None
        try:
            return self._fingerprint_of(version)
        except NestvecError:
            if manifest_path(self._folder / "record", version).exists():
                return ""
            return None  # a compaction removed it meanwhile

    def _fingerprint_of(self, version: int) -> str:
        with self._errors():
            # a dataset of its own: this call alone fails while another thread reads through one
            own = self.dataset.checkout_version(self.version)
            return f"{version}-{own.read_transaction(version).uuid}"

    def keys(self) -> Keys:
        """Return row ids and versions of all rows that live, in the order of `scan`."""
        none = Keys(np.empty(0, np.int64), np.empty(0, np.int64))
        columns = zip(none, *(keys for _, keys in self.keys_by_fragment() if keys), strict=True)
        return Keys(*map(np.concatenate, columns))

    def keys_by_fragment(self, known: Container[Any] = ()) -> Iterator[tuple[Any, Keys | None]]:
        """Yield for each fragment, in order, a mark that changes when its live rows do, and keys.

        Those whose mark is ``known`` are not read: their keys are None.
        """
        marked = [(_mark(f.metadata), f) for f in self.dataset.get_fragments()]
        fresh = [fragment for mark, fragment in marked if mark not in known]
        read = self._keys_of_each(fresh)
        for mark, _ in marked:
            yield mark, None if mark in known else next(read)

    def columns_by_fragment(
        self, columns: Sequence[str], known: Mapping[Any, tuple[NDArray[Any], ...]]
    ) -> dict[Any, tuple[NDArray[Any], ...]]:
        """Return for the mark of each fragment row ids, versions and columns, each (n,).

        Those whose mark is ``known`` are not read again.
        """
        self._check_columns(columns)
        found = {}
        for fragment in self.dataset.get_fragments():
            mark = _mark(fragment.metadata)
            if mark in known:
                found[mark] = known[mark]
                continue
            with self._errors():
                table = self.dataset.scanner(
                    columns=[*columns, *_KEYS], fragments=[fragment], scan_in_order=True
                ).to_table()
            others = (table[name].to_numpy() for name in columns)
            found[mark] = (*_keys_of(table), *others)
        return found

    def _keys_of_each(self, fragments: list[Any]) -> Iterator[Keys]:
        ends = np.cumsum([fragment.metadata.num_rows for fragment in fragments])
        groups = ends // _KEYS_AT_ONCE if len(ends) else ends
        for group in np.unique(groups):  # a scan takes a millisecond, a million keys 16 MB
            some = np.flatnonzero(groups == group)
            with self._errors():
                table = self.dataset.scanner(
                    columns=_KEYS, fragments=[fragments[i] for i in some], scan_in_order=True
                ).to_table()
            cuts = ends[some[:-1]] - (ends[some[0] - 1] if some[0] else 0)
            for part in zip(*(np.split(c, cuts) for c in _keys_of(table)), strict=True):
                yield Keys(*part)

    def scan(self, columns: Sequence[str] = ("vector",)) -> Iterator[Rows]:
        """Yield all rows in blocks; ``columns`` are among id, vector and the payload's."""
        self._check_columns(columns)
        for batch in self.batches([*columns, *_KEYS]):
            if len(batch):
                yield Rows(_keys_of(batch), batch.select(list(columns)))

    def batches(self, columns: list[str], fragments: list[Any] | None = None) -> Iterator[Any]:
        """Yield pyarrow.RecordBatches of Lance's columns, in order, from some fragments or all.

        Lance reads ahead by gigabytes if nothing is said; here it is about 0.3 GB.
        """
        with self._errors():
            yield from self.dataset.scanner(
                columns=columns,
                fragments=fragments,
                batch_size=_ROWS_AT_ONCE,
                scan_in_order=True,
                **_READ_AHEAD,
            ).to_batches()

    def read(self, row_ids: ArrayLike, columns: Sequence[str]) -> Any:
        """Return some rows as a pyarrow.Table, in the order asked for.

        Raises
        ------
        DataError
            If a row does not live in this version, or there is no such column.
        """
        self._check_columns(columns)
        wanted = np.asarray(row_ids, np.int64)
        if not len(wanted):
            return pa.table(
                {name: [] for name in columns},
                schema=pa.schema(
                    [self.layout.schema.field(name).remove_metadata() for name in columns]
                ),
            )
        with self._errors():
            # Lance's public take counts places, not row ids
            table = self.dataset._take_rows(wanted.tolist(), columns=[*columns, "_rowid"])
        if len(table) != len(wanted):
            dead = wanted[~np.isin(wanted, _int64(table["_rowid"]))]
            raise DataError(
                f"row {dead[0]} does not live in version {self.version} ({len(dead)} such rows)."
            )
        return table.select(list(columns))

    def rows_of(self, ids: Ids) -> NDArray[np.int64]:
        """Return the row ids (n,) of some ids; an unknown id is a `DataError`.

        Reads the column of ids (about 5 ms a million integers, 15 ms a million strings).
        """
        column = self.layout.id_column(ids)
        rows = self.look_up(column)
        if (rows < 0).any():
            first = column[int(np.argmax(rows < 0))].as_py()
            raise DataError(f"unknown id {first!r} ({int((rows < 0).sum())} in all).")
        return rows

    def look_up(self, ids: Any) -> NDArray[np.int64]:
        """Return the row ids (n,) of a pyarrow array of ids, -1 where there is none."""
        among = pc.field("id").isin(ids) if len(ids) <= _FEW else None
        with self._errors():
            table = self.dataset.to_table(columns=["id", "_rowid"], filter=among)
        if among is None:
            table = table.filter(pc.is_in(table["id"], value_set=_one_chunk(ids)))
        at = pc.index_in(ids, value_set=_one_chunk(table["id"]))
        found = pc.take(table["_rowid"].cast(pa.int64()), at)
        return np.asarray(pc.fill_null(found, -1).to_numpy(), np.int64)

    def matching(self, condition: str) -> NDArray[np.int64]:
        """Return the row ids of all rows for which a condition holds.

        Parameters
        ----------
        condition
            SQL over id and payload columns, like ``year >= 2020 AND lang = 'de'``
            (https://lance.org, "Filtering"). Null is neither true nor false.

        Raises
        ------
        DataError
            If it cannot be read or names a column that is not there.
        """
        try:
            with self._errors(ValueError):
                scanner = self.dataset.scanner(columns=[], filter=condition, with_row_id=True)
                return _int64(scanner.to_table()["_rowid"])
        except ValueError as error:
            if isinstance(error, NestvecError):
                raise
            columns = ", ".join(
                f"{f.name} ({f.type})" for f in self.layout.schema if f.name != "vector"
            )
            raise DataError(
                f"filter {condition!r}: {reason(error)}. Its columns are {columns}; write it "
                f"like SQL: id = 3, title LIKE 'a%'."
            ) from error

    def _check_columns(self, columns: Sequence[str]) -> None:
        names = self.layout.schema.names
        wrong = [name for name in columns if name not in names]
        if isinstance(columns, str) or wrong:
            raise DataError(
                f"column {columns if isinstance(columns, str) else wrong[0]!r} is not among "
                f"{', '.join(names)}; name some of those."
            )

    @contextlib.contextmanager
    def _errors(self, *spared: type[BaseException]) -> Iterator[None]:
        """Turn Lance's complaints about files into one of ours."""
        try:
            yield
        except (NestvecError, GeneratorExit, KeyboardInterrupt, SystemExit, MemoryError, *spared):
            raise
        except BaseException as error:  # a damaged file can make Lance panic
            if not manifest_path(self._folder / "record", self.version).exists():
                raise StorageError(
                    f"version {self.version} of {self._folder} was removed by a compaction: this "
                    f"process may not write to readers/ there, so nobody knew that it reads. "
                    f"Do it again: the newest version is there."
                ) from error
            raise FileFormatError(
                f"cannot read version {self.version} of {self._folder}: {reason(error)}. "
                f"`nestvec index check {self._folder}` names the file."
            ) from error


def as_matrix(column: Any) -> NDArray[Any]:
    """Return a column of vectors as an array (n, dim), without a copy if it is one chunk."""
    column = _one_chunk(column)
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)


def _one_chunk(column: Any) -> Any:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _int64(column: Any) -> NDArray[np.int64]:
    return column.to_numpy().astype(np.int64)


def _keys_of(table: Any) -> Keys:
    return Keys(*(_int64(table.column(name)) for name in _KEYS))


def _mark(info: Any) -> Any:
    """Return what tells the live rows of a fragment from others': its files."""
    return (
        info.id,
        *(file.path for file in info.files),
        info.deletion_file and info.deletion_file.path(info.id),
    )
