"""JSONL: an object a line, or a bare vector."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nestvec._extras import require
from nestvec.cli._rows.base import BLOCK, NAMES, Block, RowFile, chosen
from nestvec.errors import DataError, FileFormatError
from nestvec.space import _formats

pa = require("pyarrow", extra="index", why="an index")


class Lines(RowFile):
    def __init__(self, path: Path, vector: str | None, id: str | None) -> None:
        self.path, self._said = path, {"vector": vector, "id": id}
        with self._open() as file:
            self.n = sum(1 for line in file if line.strip())
        self._keys: dict[str, str | None] = {}
        for _, row in self._rows():
            for what, usual in NAMES.items():
                said = self._said[what]
                self._keys[what] = chosen(path, what, said, [], [*row])
                if self._keys[what] is None and what == "vector":
                    raise FileFormatError(
                        f"{path}: line 1 has none of {', '.join(map(repr, usual))}, only "
                        f"{', '.join(map(repr, row))}. Name the key with --vector."
                    )
            break

    @cached_property
    def _survey(self) -> tuple[str | None, Any]:
        """Type of the ids and the other keys with their types: all rows are looked at."""
        whole, found = True, pa.schema([])
        keys = set(self._keys.values())
        for rows in self._in_blocks():
            whole = whole and all(type(self._id_of(n, row)) is int for n, row in rows)
            names = dict.fromkeys(name for _, row in rows for name in row if name not in keys)
            for name in names:
                try:
                    kind = pa.array([row.get(name) for _, row in rows]).type
                    found = pa.unify_schemas(
                        [found, pa.schema([(name, kind)])], promote_options="permissive"
                    )
                except pa.ArrowException as error:
                    reason = str(error).strip().split("\n")[0].rstrip(".")
                    raise DataError(
                        f"{self.path}: the values of {name!r} up to line {rows[-1][0]} are of no "
                        f"one type ({reason}). Choose other columns with --column."
                    ) from error
        empty = [pa.field(f.name, pa.string()) if f.type == pa.null() else f for f in found]
        return None if self._keys["id"] is None else "int" if whole else "str", pa.schema(empty)

    @property
    def id_type(self) -> str | None:
        return self._survey[0]

    @property
    def columns(self) -> Any:
        return self._survey[1]

    def blocks(self, columns: Sequence[str] = ()) -> Iterator[Block]:
        at, first, unseen = 0, [], dict.fromkeys(columns)
        for rows in self._in_blocks():
            vectors = []
            for number, row in rows:
                vector = self._value(number, row, "vector")
                if not isinstance(vector, list):
                    raise DataError(
                        f"line {number} has no list of numbers for a vector, but a "
                        f"{type(vector).__name__}."
                    )
                vectors.append(_formats._numbers(vector, number, first or vectors))
                unseen = {name: None for name in unseen if name not in row}
            first = first or vectors[:1]
            ids = None
            if self._keys["id"] is not None:
                ids = [self._id_of(number, row) for number, row in rows]
            named = {name: [row.get(name) for _, row in rows] for name in columns}
            yield Block(at, np.stack(vectors), ids, named)
            at += len(rows)
        if unseen:
            raise DataError(f"no line of {self.path} has {next(iter(unseen))!r}.")

    def _open(self) -> Any:
        return (gzip.open if self.path.suffix.lower() == ".gz" else open)(self.path, "rb")

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with self._open() as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except ValueError as error:
                    raise FileFormatError(
                        f"{self.path}: line {number} is not JSON ({error})."
                    ) from error
                yield number, row if isinstance(row, dict) else {"vector": row}

    def _in_blocks(self) -> Iterator[list[tuple[int, dict[str, Any]]]]:
        rows = []
        for numbered in self._rows():
            rows.append(numbered)
            if len(rows) == BLOCK // 8:  # a number takes 24 bytes here
                yield rows
                rows = []
        if rows:
            yield rows

    def _value(self, number: int, row: dict[str, Any], what: str) -> Any:
        name = self._keys[what]
        if row.get(name or "") is None:
            raise DataError(f"{self.path}: line {number} has no {name!r}.")
        return row[name or ""]

    def _id_of(self, number: int, row: dict[str, Any]) -> Any:
        return None if self._keys["id"] is None else self._value(number, row, "id")
