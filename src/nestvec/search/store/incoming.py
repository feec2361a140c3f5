"""Rows on their way in: all are checked before any is written, and few are in memory."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestvec._extras import require
from nestvec.errors import DataError
from nestvec.search.store.durable import storage_errors
from nestvec.search.store.layout import Batch, Layout
from nestvec.space import Embeddings

pa = require("pyarrow", extra="index", why="an index")
pc = require("pyarrow.compute", extra="index", why="an index")


@dataclass(frozen=True, eq=False)
class Incoming:
    """Checked rows: a pyarrow.Table or a pyarrow.RecordBatchReader, and their ids."""

    rows: Any
    ids: Any


def batches_of(rows: Any) -> Iterable[Any]:
    """Return what is one batch, or many, as many; what cannot be iterated is one, too."""
    if isinstance(rows, Iterable) and not isinstance(rows, (Batch, Embeddings)):
        return rows
    return [rows]


@contextlib.contextmanager
def gathered(rows: Any, layout: Layout, folder: Path) -> Iterator[Incoming | None]:
    """Yield the rows checked, or None if there are none; those that are checked as they are.

    An iterable is read to its end into a nameless file in ``folder`` first, so that nobody waits
    for a lock while a slow encoder makes the next batch, and only ids and one batch are in memory.
    """
    if isinstance(rows, Incoming):
        yield rows
        return
    if isinstance(rows, (Batch, Embeddings)):
        table = layout.table(rows)
        yield Incoming(table, table["id"])
        return
    ids = []
    with storage_errors(folder):
        spool = tempfile.TemporaryFile(dir=folder)
    with spool:
        writer = pa.ipc.new_stream(spool, layout.schema)
        for number, batch in enumerate(batches_of(rows)):  # the layout says what is none
            try:
                table = layout.table(batch)
            except DataError as error:
                raise type(error)(f"batch {number}: {error}") from error
            ids.extend(table["id"].chunks)
            with storage_errors(folder):
                writer.write_table(table)
        if not ids:
            yield None
            return
        with storage_errors(folder):
            writer.close()
            spool.seek(0)
        every = pa.chunked_array(ids)
        _check_unique(every)
        yield Incoming(pa.ipc.open_stream(spool), every)


def _check_unique(ids: Any) -> None:
    unique = pc.count_distinct(ids).as_py()
    if unique != len(ids):
        counts = pc.value_counts(ids)
        twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0].as_py()
        raise DataError(
            f"ids: {len(ids) - unique} duplicate ids; {twice!r} stands in two batches. "
            f"Ids must be unique."
        )
