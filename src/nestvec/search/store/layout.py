"""What a row of an index is: its Space, its ids, its payload; and the door rows come in by."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nestvec import __version__, _checks
from nestvec._atomic import written_beside
from nestvec._extras import require
from nestvec.errors import DataError, FileFormatError, SpaceError, StorageError
from nestvec.space import Embeddings, Space

pa = require("pyarrow", extra="index", why="an index")

#: One id or many.
Ids = ArrayLike | int | Iterable[Any]
#: The version of the folder's layout; a newer one is refused.
FORMAT = 1
STAMP = "nestvec.json"
_POINTER_FORMAT = 2  # of a stamp that only says which folder inside holds the index

_ID_TYPES = {"int": pa.int64(), "str": pa.string()}
_VECTOR_TYPES = {"float32": pa.float32(), "float16": pa.float16()}
# Lance then knows what identifies a row when another of its writers inserts the same id.
_PRIMARY_KEY = {"lance-schema:unenforced-primary-key": "true"}


@dataclass(frozen=True, eq=False)
class Batch:
    """Some rows on their way into an index.

    Parameters
    ----------
    vectors : (n, dim)
        Converted to float32 and checked; `Embeddings` have to be of the index' Space.
    ids : (n,) int or str, optional
        Unique; a text has at most 1,000 characters. Embeddings bring their own, if they have any.
    payload : mapping of column to n values, or pyarrow.Table, optional
        Exactly the columns the index was created with.
    """

    vectors: ArrayLike | Embeddings
    ids: ArrayLike | None = None
    payload: Any = None


@dataclass(frozen=True, eq=False)
class Layout:
    """What the rows of one index have in common; ``payload`` is a pyarrow.Schema."""

    space: Space
    id_type: str
    precision: str
    payload: Any

    def __post_init__(self) -> None:
        for name, allowed in (("id_type", _ID_TYPES), ("precision", _VECTOR_TYPES)):
            if getattr(self, name) not in allowed:
                raise DataError(
                    f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}."
                )
        if not isinstance(self.payload, pa.Schema):
            raise DataError(
                f"payload is a {type(self.payload).__name__}; pass a pyarrow schema, like "
                f"pyarrow.schema([('title', pyarrow.string())])."
            )
        names = self.payload.names
        for name in names:
            if name in ("id", "vector") or name.startswith("_row") or "." in name or not name:
                raise DataError(
                    f"payload column {name!r}: id, vector and names that begin with _row are the "
                    f"index' own, and a name has no dots. Choose another name."
                )
            if names.count(name) > 1:
                raise DataError(f"payload column {name!r} is named twice.")

    @property
    def schema(self) -> Any:
        """The columns on disk, a pyarrow.Schema: id, vector, then the payload."""
        vector = pa.list_(_VECTOR_TYPES[self.precision], self.space.size)
        columns = [
            pa.field("id", _ID_TYPES[self.id_type], nullable=False, metadata=_PRIMARY_KEY),
            pa.field("vector", vector, nullable=False),
            *(f.remove_metadata() for f in self.payload),  # some would move values to other files
        ]
        return pa.schema(columns)

    # --- nestvec.json -----------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        stamp = {
            "format": FORMAT,
            "written_by": f"nestvec {__version__}",
            "id_type": self.id_type,
            "precision": self.precision,
            "dim": self.space.size,
            "space": self.space.to_dict(),
        }
        (folder / STAMP).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, payload: Any) -> Layout:
        """Read ``nestvec.json``; one of a newer format is refused."""
        path = folder / STAMP
        try:
            stamp = json.loads(path.read_text(encoding="utf-8"))
            found = stamp["format"]
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror or error}.") from error
        except (ValueError, TypeError, KeyError) as error:
            raise FileFormatError(
                f"{path} is damaged ({type(error).__name__}: {error}). Restore it from a backup."
            ) from error
        if not isinstance(found, int) or found > FORMAT:
            raise FileFormatError(
                f"{folder} was written by a newer nestvec ({stamp.get('written_by', 'unknown')}, "
                f"format {found}); this one, {__version__}, reads format {FORMAT}. "
                f"Type: pip install --upgrade nestvec"
            )
        try:
            space = Space.from_dict(stamp["space"])
            return cls(space, stamp["id_type"], stamp["precision"], payload)
        except (SpaceError, DataError, KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(
                f"{path} is damaged ({error}). Restore it from a backup."
            ) from error

    # --- rows -------------------------------------------------------------------------------------

    def table(self, batch: Any) -> Any:
        """Check a batch and return it as a pyarrow.Table of `schema`."""
        if isinstance(batch, Embeddings):
            batch = Batch(batch)
        if not isinstance(batch, Batch):
            raise DataError(
                f"a {type(batch).__name__} was given where rows are expected. Pass Embeddings, a "
                f"nestvec.search.Batch(vectors, ids, payload), or an iterable of either."
            )
        given = batch.vectors
        ids = batch.ids
        if isinstance(given, Embeddings):
            self.space.check_same(given.space)
            ids = given.ids if ids is None and given.has_ids else ids
        if ids is None:
            raise DataError(
                "rows without ids: row numbers would be the ids of other rows. Pass ids=, "
                "Embeddings with ids, or nestvec.search.Batch(vectors, ids)."
            )
        array = given.array if isinstance(given, Embeddings) else given
        checked = Embeddings(array, self.space, ids)
        vectors = pa.FixedSizeListArray.from_arrays(
            pa.array(self._stored(checked.array).ravel()), self.space.size
        )
        columns = self._payload(batch.payload, len(checked))
        return pa.table([self.id_column(checked.ids), vectors, *columns], schema=self.schema)

    def id_column(self, ids: Ids) -> Any:
        """Return ids, or one, as a pyarrow.Array of this index' type; another type is refused."""
        given: Any = ids
        if isinstance(ids, str):
            given = [ids]
        elif isinstance(ids, (int, np.generic, np.ndarray)):
            given = np.atleast_1d(ids)
        elif isinstance(ids, (Set, Iterator)):
            given = list(ids)
        if not len(given):
            return pa.array([], _ID_TYPES[self.id_type])
        ids = _checks.as_ids(given, len(given))
        if (ids.dtype.kind == "i") != (self.id_type == "int"):
            kinds = {"int": "integers", "str": "strings"}
            raise DataError(
                f"ids of this index are {kinds[self.id_type]}, and {ids[0].item()!r} is none."
            )
        return pa.array(ids.tolist() if self.id_type == "str" else ids, _ID_TYPES[self.id_type])

    def _stored(self, matrix: NDArray[np.float32]) -> NDArray[Any]:
        if self.precision == "float32":
            return matrix
        with np.errstate(over="ignore"):  # reported below, with its row
            half = matrix.astype(np.float16)
        for wrong, what in ((~np.isfinite(half).all(1), "Inf"), (~half.any(1), "all zeros")):
            if wrong.any():
                raise DataError(
                    f"row {int(np.argmax(wrong))} is {what} in float16 ({int(wrong.sum())} such "
                    f"rows). Normalise the vectors, or create the index with precision='float32'."
                )
        return half

    def _payload(self, given: Any, n: int) -> list[Any]:
        names = self.payload.names
        if isinstance(given, Mapping):
            columns = dict(given)
        elif given is None:
            columns = {}
        elif isinstance(given, (pa.Table, pa.RecordBatch)):
            columns = dict(zip(given.schema.names, given.columns, strict=True))
        else:
            raise DataError(
                f"payload is a {type(given).__name__}; pass a dict of columns or a pyarrow table."
            )
        if set(columns) != set(names):
            missing = [name for name in names if name not in columns]
            extra = [name for name in columns if name not in names]
            said = [
                f"{w} {', '.join(map(repr, c))}"
                for w, c in (("lacks", missing), ("has, beyond them,", extra))
                if c
            ]
            raise DataError(
                f"this index has {_listed(self.payload)}, and the payload {' and '.join(said)}."
            )
        return [_column(columns[f.name], f, n) for f in self.payload]


# --- an index that was upgraded lives in a folder inside ------------------------------------------


def home_of(root: Path) -> Path:
    """Return the folder that holds the index at ``root``: that itself, or one inside of it.

    An upgrade leaves the index of the new Space in a folder of its own, and the stamp points to it.
    """
    try:
        home = json.loads((root / STAMP).read_text(encoding="utf-8")).get("home")
    except (OSError, ValueError, AttributeError):
        return root  # whoever opens it says what is wrong
    return root / home if isinstance(home, str) else root


def point_to(root: Path, home: Path) -> None:
    """Let the stamp of ``root`` say that the index is in ``home`` now: at once, and durably."""
    stamp = {
        "format": _POINTER_FORMAT,
        "written_by": f"nestvec {__version__}",
        "home": home.name,
    }
    with written_beside(root / STAMP) as scratch:
        scratch.write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")


def _column(values: Any, field: Any, n: int) -> Any:
    """Return one payload column as its type, or say which fits."""
    try:
        if isinstance(values, (pa.Array, pa.ChunkedArray)):
            if not _same_family(values.type, field.type):
                raise pa.ArrowInvalid(f"it is {values.type}")
            column = values.cast(field.type)
        else:
            column = pa.array(values, type=field.type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise DataError(
            f"payload column {field.name!r} does not fit {field.type} ({reason})."
        ) from error
    if len(column) != n:
        raise DataError(f"payload column {field.name!r} has {len(column)} values for {n} rows.")
    if column.null_count and not field.nullable:
        raise DataError(
            f"payload column {field.name!r} has {column.null_count} nulls and may have none."
        )
    return column


def _same_family(given: Any, wanted: Any) -> bool:
    """Tell whether a cast keeps the meaning: no text that is read as a number."""
    families = (
        (pa.types.is_integer,),
        (pa.types.is_floating,),
        (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
        (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view),
        (pa.types.is_timestamp,),
    )
    return (
        given == wanted
        or pa.types.is_null(given)
        or any(
            any(is_one(given) for is_one in family) and any(is_one(wanted) for is_one in family)
            for family in families
        )
    )


def _listed(payload: Any) -> str:
    if not len(payload):
        return "no payload columns"
    return "the payload columns " + ", ".join(f"{f.name} ({f.type})" for f in payload)
