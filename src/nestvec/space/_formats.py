"""How each file format holds a matrix, its ids and a stamp; `files` is the door to these."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nestvec._extras import require
from nestvec.errors import DataError, FileFormatError

_STAMP = "nestvec"  # the key of the stamp, in every format
_VECTORS = ("vector", "vectors", "embedding", "embeddings")
_IDS = ("id", "_id", "ids")


class Raw(NamedTuple):
    """What a file holds, not yet checked."""

    array: Any
    ids: Any
    stamp: str | None


# --- safetensors ----------------------------------------------------------------------------------


def _write_safetensors(
    path: Path, array: NDArray[np.float32], ids: NDArray | None, stamp: str
) -> None:
    from safetensors.numpy import save_file

    tensors: dict[str, NDArray] = {"vectors": np.ascontiguousarray(array)}
    if ids is None:
        pass
    elif ids.dtype.kind == "i":
        tensors["ids"] = ids
    else:  # safetensors has no text: the bytes of all ids, and where each one ends
        encoded = [str(i).encode() for i in ids]
        tensors["ids_utf8"] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        tensors["ids_ends"] = np.cumsum([len(e) for e in encoded], dtype=np.int64)
    save_file(tensors, path, metadata={_STAMP: stamp})


def _read_safetensors(path: Path) -> Raw:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        names = list(file.keys())
        stamp = (file.metadata() or {}).get(_STAMP)
        array = file.get_tensor(_only(names, _VECTORS, "tensors"))
        ids = None
        if "ids" in names:
            ids = file.get_tensor("ids")
        elif "ids_ends" in names:
            text = file.get_tensor("ids_utf8").tobytes()
            ends = [0, *file.get_tensor("ids_ends").tolist()]
            ids = [text[a:b].decode() for a, b in itertools.pairwise(ends)]
    return Raw(array, ids, stamp)


# --- numpy ----------------------------------------------------------------------------------------


def _write_npz(path: Path, array: NDArray[np.float32], ids: NDArray | None, stamp: str) -> None:
    with path.open("wb") as file:  # a handle, or numpy would add its own ending
        named: dict[str, Any] = {} if ids is None else {"ids": ids}
        np.savez(file, vectors=array, **named, nestvec=np.array(stamp))


def _read_npz(path: Path) -> Raw:
    # opened here, because numpy leaves a damaged file open
    with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
        stamp = str(file[_STAMP]) if _STAMP in file.files else None
        names = [n for n in file.files if n not in (_STAMP, *_IDS)]
        array = file[_only(names, _VECTORS, "arrays")]
        ids = next((file[n] for n in _IDS if n in file.files), None)
    return Raw(array, ids, stamp)


def _read_npy(path: Path) -> Raw:
    # mapped, not read: a matrix larger than memory can still be fitted, searched in blocks, cut
    return Raw(np.load(path, allow_pickle=False, mmap_mode="r"), None, None)


# --- Arrow: Parquet, IPC, Lance -------------------------------------------------------------------


# Vectors of floats do not compress; checksums show a damaged page.
_PARQUET = {"use_dictionary": False, "write_page_checksum": True}


def _arrow() -> Any:
    return require("pyarrow", extra="index", why="reading and writing Arrow and Parquet files")


def _lance() -> Any:
    return require("lance", extra="index", why="reading and writing Lance datasets")


def _to_table(array: NDArray[np.float32], ids: NDArray | None, stamp: str) -> Any:
    pa = _arrow()
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), array.shape[1])
    columns = {"vector": vectors}
    if ids is not None:
        columns = {"id": pa.array(ids if ids.dtype.kind == "i" else ids.tolist()), **columns}
    table = pa.table(columns)
    return table.replace_schema_metadata({_STAMP: stamp})


def _from_table(table: Any) -> Raw:
    pa = _arrow()
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    names = [f.name for f in table.schema if any(is_list(f.type) for is_list in lists)]
    name = _only(names, _VECTORS, "list columns")
    column = table[name].combine_chunks()
    if len(column) == 0:
        raise DataError(f"column {name!r} has no rows.")
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise DataError(f"row {row} of column {name!r} is null ({column.null_count} such rows).")
    compute = require("pyarrow.compute", extra="index", why="reading Arrow files")
    lengths = compute.list_value_length(column).to_numpy(zero_copy_only=False)
    if (lengths != lengths[0]).any():
        row = int(np.argmax(lengths != lengths[0]))
        raise DataError(
            f"the rows have different lengths: row 0 has {lengths[0]} numbers, row {row} has "
            f"{lengths[row]}."
        )
    array = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
    ids = next((_id_array(table[n], pa) for n in _IDS if n in table.column_names), None)
    stamp = (table.schema.metadata or {}).get(_STAMP.encode())
    return Raw(array, ids, stamp.decode() if stamp else None)


def _id_array(column: Any, pa: Any) -> Any:
    if column.null_count:
        raise DataError(f"{column.null_count} ids are null; every row needs one.")
    return column.to_numpy() if pa.types.is_integer(column.type) else column.to_pylist()


def _write_parquet(path: Path, array: NDArray[np.float32], ids: NDArray | None, stamp: str) -> None:
    table = _to_table(array, ids, stamp)
    parquet = require("pyarrow.parquet", extra="index", why="writing Parquet files")
    parquet.write_table(table, path, compression="none", **_PARQUET)


def _read_parquet(path: Path) -> Raw:
    parquet = require("pyarrow.parquet", extra="index", why="reading Parquet files")
    return _from_table(parquet.ParquetFile(path, page_checksum_verification=True).read())


def _write_ipc(path: Path, array: NDArray[np.float32], ids: NDArray | None, stamp: str) -> None:
    pa = _arrow()
    table = _to_table(array, ids, stamp)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _read_ipc(path: Path) -> Raw:
    pa = _arrow()
    with pa.OSFile(str(path), "rb") as source:
        if source.read(6) == b"ARROW1":
            table = pa.ipc.open_file(source).read_all()
        else:  # Hugging Face datasets writes the stream layout under this ending
            source.seek(0)
            table = pa.ipc.open_stream(source).read_all()
    return _from_table(table)


def _write_lance(path: Path, array: NDArray[np.float32], ids: NDArray | None, stamp: str) -> None:
    _lance().write_dataset(_to_table(array, ids, stamp), str(path))


def _read_lance(path: Path) -> Raw:
    return _from_table(_lance().dataset(str(path)).to_table())


# --- text: JSONL and CSV, read only ---------------------------------------------------------------


def _read_jsonl(path: Path) -> Raw:
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    rows: list[NDArray[np.float32]] = []
    ids: list[Any] = []
    with opened(path, "rt", encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict):
                row = {_VECTORS[0]: row}
            vector = next((row[k] for k in _VECTORS if k in row), None)
            if vector is None:
                raise FileFormatError(
                    f"line {number} has no {' or '.join(map(repr, _VECTORS))}, only "
                    f"{', '.join(map(repr, row))}"
                )
            if not isinstance(vector, list):
                raise FileFormatError(
                    f"line {number} is not a list of numbers (it is a {type(vector).__name__})"
                )
            rows.append(_numbers(vector, number, rows))
            ids.extend(row[k] for k in _IDS[:2] if k in row)
    return Raw(_stack(rows), _ids_of_all(ids, len(rows)), None)


def _read_csv(path: Path) -> Raw:
    rows: list[NDArray[np.float32]] = []
    ids: list[str] = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = _numbered(csv.reader(file))
        number, first = next(lines, (0, []))
        id_at, beside = _id_columns(first)
        if not _is_header(first):
            id_at, beside = None, set()
            lines = itertools.chain([(number, first)], lines)
        for at, cells in lines:
            if id_at is not None and id_at < len(cells):
                ids.append(cells[id_at])
            rows.append(_numbers([c for i, c in enumerate(cells) if i not in beside], at, rows))
    return Raw(_stack(rows), ids or None, None)


def _numbered(rows: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
    return ((number, row) for number, row in enumerate(rows, 1) if row)


def _id_columns(header: Sequence[str]) -> tuple[int | None, set[int]]:
    """Return which column holds the ids, and all columns that are no part of the vector.

    What is called an id comes before the unnamed index that pandas writes in front.
    """
    names = [name.strip().lower() for name in header]
    named = [i for i, name in enumerate(names) if name in _IDS][:1]
    index = [i for i, n in enumerate(names) if (n, i) == ("", 0) or n.startswith("unnamed: ")]
    return next(iter(named + index), None), {*named, *index}


def _is_header(first: Sequence[str]) -> bool:
    """Tell a line of names from a row of the vectors in which some number is missing."""
    names = [name.strip().lower() for name in first]
    if any(name in _IDS for name in names):
        return True
    _, beside = _id_columns(first)
    rest = [name for i, name in enumerate(names) if i not in beside]
    # pandas numbers its columns from 0, so a header may look like data
    numbered = rest == [str(i) for i in range(len(rest))]
    return numbered or not any(name == "" or _is_number(name) for name in rest)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _numbers(values: Any, number: int, before: Sequence[NDArray]) -> NDArray[np.float32]:
    try:
        row = np.array([float(v) for v in values], dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"line {number} is not a list of numbers ({error})") from error
    if before and len(row) != len(before[0]):
        raise DataError(
            f"the rows have different lengths: line {number} has {len(row)} numbers, the first "
            f"row has {len(before[0])}."
        )
    return row


def _stack(rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    if not rows:
        raise DataError("it holds no rows.")
    return np.stack(rows)


def _ids_of_all(ids: Sequence[Any], n: int) -> Any:
    if ids and len(ids) != n:
        raise DataError(f"{len(ids)} of {n} rows have an id; give one to every row or to none.")
    whole = all(isinstance(i, int) for i in ids)
    return (ids if whole else [str(i) for i in ids]) if ids else None


# --- which is which -------------------------------------------------------------------------------


def _only(names: Sequence[str], preferred: Sequence[str], what: str) -> str:
    """Return the one name that holds the vectors."""
    named = [n for n in preferred if n in names]
    if named:
        return named[0]
    if len(names) == 1:
        return names[0]
    raise FileFormatError(
        f"none of its {what} ({', '.join(map(repr, names)) or 'there are none'}) is clearly the "
        f"vectors; call the one that is 'vector'"
    )


Write = Callable[[Path, NDArray[np.float32], NDArray | None, str], None]
Read = Callable[[Path], Raw]

WRITERS: Mapping[str, Write] = {
    ".safetensors": _write_safetensors,
    ".npz": _write_npz,
    ".parquet": _write_parquet,
    ".arrow": _write_ipc,
    ".feather": _write_ipc,
    ".lance": _write_lance,
}
# The formats that are folders, and what Lance keeps in one. A name that a later Lance adds is
# refused when the dataset is to be replaced, not lost.
FOLDERS: Mapping[str, tuple[str, ...]] = {
    ".lance": tuple(
        "data tree _versions _transactions _indices _deletions _refs _latest.manifest".split()
    ),
}
READERS: Mapping[str, Read] = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".npy": _read_npy,
    ".parquet": _read_parquet,
    ".arrow": _read_ipc,
    ".feather": _read_ipc,
    ".lance": _read_lance,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".csv": _read_csv,
}


def reader_of(name: str) -> Read | None:
    """Return what reads a file of this name, or None."""
    return next((read for end, read in READERS.items() if name.lower().endswith(end)), None)
