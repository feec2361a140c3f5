"""A file of rows: what every format has in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from nestvec import _checks
from nestvec._extras import require
from nestvec.errors import DataError, FileFormatError, NestvecError, SpaceError, StorageError
from nestvec.space import Space, _formats, files

pa = require("pyarrow", extra="index", why="an index")

BLOCK = 8192  # rows read together
NAMES = {"vector": _formats._VECTORS, "id": _formats._IDS}


class Block(NamedTuple):
    """Some rows: vectors (n, dim) not yet checked, ids (None if the file has none), columns."""

    first_row: int
    array: Any
    ids: Any
    columns: Mapping[str, Any]


class RowFile:
    """A file of vectors with ``n`` rows; what it holds is read each time that it is asked for.

    ``stamp`` is the Space that stands in the file, or None.
    """

    path: Path
    n: int
    stamp: Space | None = None

    @property
    def id_type(self) -> str | None:
        """``"int"``, ``"str"``, or None if there are no ids."""
        raise NotImplementedError  # each kind of file has its own

    @property
    def columns(self) -> Any:
        """The columns beside id and vector, a pyarrow.Schema."""
        return pa.schema([])

    def blocks(self, columns: Sequence[str] = ()) -> Iterator[Block]:
        """Yield all rows in order, with some of the columns; one that is missing is an error."""
        raise NotImplementedError  # each kind of file has its own

    @cached_property
    def shape(self) -> tuple[int, bool]:
        """Numbers in a vector, and whether every vector has length 1; one reading at most."""
        dim, unit = 0, True
        with readable(self.path):
            for block in self.blocks():
                matrix = _checks.as_matrix(
                    block.array, name=str(self.path), first_row=block.first_row
                )
                dim = matrix.shape[1]
                unit = _checks.row_off_unit(matrix) is None
                if not unit:
                    break
        return dim, unit

    def schema_of(self, names: Sequence[str]) -> Any:
        """Return some of the columns, a pyarrow.Schema; one that is not there is a `DataError`."""
        missing = [name for name in names if name not in self.columns.names]
        if missing:
            there = ", ".join(self.columns.names) or "no columns beside id and vector"
            raise DataError(f"{self.path} has no column {missing[0]!r}; it has {there}.")
        return pa.schema([self.columns.field(name).remove_metadata() for name in names])


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn every complaint of a library about a file into one of ours, which names the file."""
    try:
        yield
    except (ImportError, AttributeError, NameError):  # ours, not the file's
        raise
    except NestvecError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error
    except PermissionError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}.") from error
    except Exception as error:  # each library has errors of its own
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise FileFormatError(
            f"cannot read {path}: {reason}. It is truncated, damaged, or not a {path.suffix} file; "
            f"write it again from its source."
        ) from error


def space_of(path: Path, stamp: str | None) -> Space | None:
    if stamp is None:
        return None
    try:
        return files._stamped(stamp)
    except (FileFormatError, SpaceError) as error:
        raise type(error)(f"{path}: {error}") from error


def chosen(
    path: Path, what: str, said: str | None, fitting: Sequence[str], names: Sequence[str]
) -> str | None:
    """Return the name of a column: what was said, what is usual, or the only one that fits."""
    if said is not None and said not in names:
        raise DataError(f"{path} has no column {said!r} for --{what}; it has {', '.join(names)}.")
    usual = [name for name in NAMES[what] if name in (fitting or names)]
    only = [fitting[0]] if len(fitting) == 1 else []
    return next(iter([said] if said is not None else [*usual, *only]), None)
