"""Rows of a file, read some at a time: vectors, their ids, and the columns beside them."""

from __future__ import annotations

from pathlib import Path

from nestvec.cli._rows.base import Block, RowFile, readable
from nestvec.cli._rows.lines import Lines
from nestvec.cli._rows.matrices import MATRICES, whole
from nestvec.cli._rows.tables import TABLES, Table
from nestvec.errors import DataError, FileFormatError, StorageError
from nestvec.space import _formats

__all__ = ["Block", "RowFile", "open_rows", "readable"]


def open_rows(path: Path, *, vector: str | None = None, id: str | None = None) -> RowFile:
    """Open a file of vectors by its ending; ``vector`` and ``id`` name columns, or keys.

    Raises what `nestvec.load` does. Only a CSV is read into memory whole.
    """
    ending = next((end for end in _formats.READERS if path.name.lower().endswith(end)), None)
    if ending is None:
        raise FileFormatError(
            f"cannot read {path}: {path.suffix or 'no ending'} is not a format for vectors. It "
            f"reads {', '.join(_formats.READERS)}."
        )
    if not path.exists():
        raise StorageError(f"cannot read {path}: there is no such file.")
    with readable(path):
        if path.is_file() and path.stat().st_size == 0:
            raise FileFormatError(f"cannot read {path}: it is empty (0 bytes).")
        if ending in TABLES:
            found: RowFile = Table(path, TABLES[ending](path), vector, id)
        elif ending.startswith(".jsonl"):
            found = Lines(path, vector, id)
        else:
            if vector or id:
                raise DataError(f"{path} has no columns, so --vector and --id mean nothing here.")
            found = MATRICES.get(ending, whole)(path)
    if not found.n:
        raise DataError(f"{path} holds no rows.")
    return found
