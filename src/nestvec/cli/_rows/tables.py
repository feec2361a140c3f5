"""Tables: Parquet, Arrow, Lance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nestvec._extras import require
from nestvec.cli._rows.base import BLOCK, Block, RowFile, chosen, space_of
from nestvec.errors import DataError, FileFormatError
from nestvec.space import _formats

pa = require("pyarrow", extra="index", why="an index")
pc = require("pyarrow.compute", extra="index", why="an index")


class Opened(NamedTuple):
    n: int
    schema: Any
    batches: Callable[[list[str]], Iterable[Any]]


def _parquet(path: Path) -> Opened:
    parquet = require("pyarrow.parquet", extra="index", why="reading Parquet files")
    # As it comes a whole row group is read ahead, which may be the whole file.
    file = parquet.ParquetFile(
        path, page_checksum_verification=True, pre_buffer=False, buffer_size=1 << 20
    )

    def batches(names: list[str]) -> Iterable[Any]:
        return file.iter_batches(BLOCK, columns=names, use_threads=False)

    return Opened(file.metadata.num_rows, file.schema_arrow, batches)


def _arrow(path: Path) -> Opened:
    with path.open("rb") as file:
        is_file = file.read(6) == b"ARROW1"  # datasets writes the stream layout under this ending

    def every() -> Iterator[Any]:
        with pa.memory_map(str(path)) as source:
            if is_file:
                reader = pa.ipc.open_file(source)
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                yield from pa.ipc.open_stream(source)

    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        schema = reader.schema
    n = sum(map(len, every()))
    return Opened(n, schema, lambda names: (batch.select(names) for batch in every()))


def _lance(path: Path) -> Opened:
    dataset = require("lance", extra="index", why="reading Lance datasets").dataset(str(path))

    def batches(names: list[str]) -> Iterable[Any]:
        return dataset.scanner(
            columns=names,
            batch_size=BLOCK,
            scan_in_order=True,
            batch_readahead=2,
            fragment_readahead=1,
            io_buffer_size=1 << 26,
        ).to_batches()

    return Opened(dataset.count_rows(), dataset.schema, batches)


TABLES = {".parquet": _parquet, ".arrow": _arrow, ".feather": _arrow, ".lance": _lance}


class Table(RowFile):
    def __init__(self, path: Path, opened: Opened, vector: str | None, id: str | None) -> None:
        self.path, (self.n, self._schema, self._batches) = path, opened
        stamp = (self._schema.metadata or {}).get(_formats._STAMP.encode())
        self.stamp = space_of(path, stamp.decode() if stamp else None)
        names = self._schema.names
        vectors = [f.name for f in self._schema if _holds_vectors(f.type)]
        self._vector = chosen(path, "vector", vector, vectors, names)
        if self._vector is None:
            raise FileFormatError(
                f"none of the columns of {path} ({', '.join(names)}) is clearly the vectors; name "
                f"it with --vector."
            )
        if self._vector not in vectors:
            kind = self._schema.field(self._vector).type
            raise DataError(f"column {self._vector!r} of {path} is {kind}, not lists of numbers.")
        self._id = chosen(path, "id", id, [], names)

    @property
    def id_type(self) -> str | None:
        if self._id is None:
            return None
        return "int" if pa.types.is_integer(self._schema.field(self._id).type) else "str"

    @property
    def columns(self) -> Any:
        return pa.schema([f for f in self._schema if f.name not in (self._vector, self._id)])

    def blocks(self, columns: Sequence[str] = ()) -> Iterator[Block]:
        self.schema_of(columns)
        names = [name for name in (self._vector, self._id) if name is not None]
        at = 0
        for batch in self._batches([*names, *columns]):
            for start in range(0, len(batch), BLOCK):
                part = batch.slice(start, BLOCK)
                array = self._matrix(part.column(self._vector), at)
                ids = None if self._id is None else self._ids(part.column(self._id), at)
                yield Block(at, array, ids, {name: part.column(name) for name in columns})
                at += len(part)

    def _matrix(self, column: Any, at: int) -> Any:
        self._no_nulls(column, self._vector, at)
        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        if (lengths != lengths[0]).any():
            row = int(np.argmax(lengths != lengths[0]))
            raise DataError(
                f"{self.path}: the rows have different lengths: row {at} has {lengths[0]} numbers, "
                f"row {at + row} has {lengths[row]}."
            )
        return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)

    def _ids(self, column: Any, at: int) -> Any:
        self._no_nulls(column, self._id, at)
        return column.to_numpy() if self.id_type == "int" else column.to_pylist()

    def _no_nulls(self, column: Any, name: str | None, at: int) -> None:
        if column.null_count:
            row = at + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
            raise DataError(f"{self.path}: row {row} of column {name!r} is null.")


def _holds_vectors(kind: Any) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_list(kind) for is_list in lists):
        return False
    return pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)
