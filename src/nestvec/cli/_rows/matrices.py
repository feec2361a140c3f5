"""Files of one matrix, and maybe ids: npy, npz, safetensors; CSV, which is read whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nestvec import _checks
from nestvec.cli._rows.base import BLOCK, NAMES, Block, RowFile, space_of
from nestvec.space import _formats


class Matrix(RowFile):
    def __init__(
        self,
        path: Path,
        n: int,
        pieces: Callable[[], Iterable[Any]],
        ids: Any = None,
        stamp: str | None = None,
    ) -> None:
        self.path, self.n, self._pieces = path, n, pieces
        self.stamp = space_of(path, stamp)
        self._ids = None if ids is None else _checks.as_ids(ids, n, name=str(path))

    @property
    def id_type(self) -> str | None:
        if self._ids is None:
            return None
        return "int" if self._ids.dtype.kind == "i" else "str"

    def blocks(self, columns: Sequence[str] = ()) -> Iterator[Block]:
        self.schema_of(columns)
        at = 0
        for array in self._pieces():
            ids = None if self._ids is None else self._ids[at : at + len(array)]
            yield Block(at, array, ids, {})
            at += len(array)


def _sliced(array: Any, n: int) -> Callable[[], Iterable[Any]]:
    return lambda: (array[start : min(start + BLOCK, n)] for start in range(0, n, BLOCK))


def _npy(path: Path) -> RowFile:
    array = np.load(path, allow_pickle=False, mmap_mode="r")
    return Matrix(path, len(array), _sliced(array, len(array)))


def _safetensors(path: Path) -> RowFile:
    from safetensors import safe_open

    file: Any = safe_open(path, framework="numpy")
    names = list(file.keys())
    vectors = file.get_slice(_formats._only(names, NAMES["vector"], "tensors"))
    ids = None
    if "ids" in names:
        ids = file.get_tensor("ids")
    elif "ids_ends" in names:
        text, ends = file.get_tensor("ids_utf8").tobytes(), file.get_tensor("ids_ends").tolist()
        ids = [text[a:b].decode() for a, b in zip([0, *ends], ends, strict=False)]
    n = vectors.get_shape()[0]
    stamp = (file.metadata() or {}).get(_formats._STAMP)
    return Matrix(path, n, _sliced(vectors, n), ids, stamp)


def _npz(path: Path) -> RowFile:
    with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
        stamp = str(file[_formats._STAMP]) if _formats._STAMP in file.files else None
        names = [n for n in file.files if n not in (_formats._STAMP, *NAMES["id"])]
        name = _formats._only(names, NAMES["vector"], "arrays")
        ids = next((file[n] for n in NAMES["id"] if n in file.files), None)
        with file.zip.open(f"{name}.npy") as member:
            shape, by_column, dtype = _header(member)
    if by_column or dtype.hasobject or len(shape) != 2:
        return whole(path)

    def pieces() -> Iterator[Any]:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            with file.zip.open(f"{name}.npy") as member:
                _header(member)
                for start in range(0, shape[0], BLOCK):
                    rows = min(BLOCK, shape[0] - start)
                    held = member.read(rows * shape[1] * dtype.itemsize)
                    yield np.frombuffer(held, dtype).reshape(rows, shape[1])

    return Matrix(path, shape[0], pieces, ids, stamp)


def _header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0
    return (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(member)


def whole(path: Path) -> RowFile:
    raw = (_formats.reader_of(path.name) or _formats._read_csv)(path)
    return Matrix(path, len(raw.array), _sliced(raw.array, len(raw.array)), raw.ids, raw.stamp)


MATRICES = {".npy": _npy, ".npz": _npz, ".safetensors": _safetensors}
