"""Rows of tables: JSONL, CSV, TSV, Parquet, and folders of Hugging Face datasets."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nestvec._extras import require
from nestvec.corpus._lines import lines_of
from nestvec.errors import DataError, FileFormatError

TABLES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")

Row = Mapping[str, Any]


def is_table(path: Path) -> bool:
    """Return whether a file's name says that it is a table."""
    return path.name.lower().endswith(TABLES)


def rows_of(path: Path) -> Iterable[Row]:
    """Yield the rows of a file; of a JSONL line that is no object, ``{"text": it}``."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        parquet = require("pyarrow.parquet", extra="index", why="reading Parquet files")
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    elif name.endswith(".tsv"):  # the format knows no quotes: one in a text is a character
        yield from csv.DictReader(lines_of(path), delimiter="\t", quoting=csv.QUOTE_NONE)
    elif name.endswith(".csv"):
        yield from csv.DictReader(lines_of(path))
    else:
        for number, line in enumerate(lines_of(path), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise FileFormatError(f"line {number} is not JSON ({error})") from error
                yield row if isinstance(row, dict) else {"text": row}


def is_dataset(folder: Path) -> bool:
    """Return whether Hugging Face ``datasets.save_to_disk`` wrote a folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def dataset_rows(folder: Path, split: str | None = None) -> Iterator[tuple[str, Row]]:
    """Yield (``split#number``, row) of such a folder: Arrow streams, listed in ``state.json``.

    None reads every split; a folder without splits has only its own rows.
    """
    pa = require("pyarrow", extra="index", why="reading Hugging Face datasets folders")
    splits = [folder]
    if (folder / "dataset_dict.json").is_file():
        names = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
        if split is not None and split not in names:
            raise DataError(f"{folder} has no split {split!r}; its splits are: {', '.join(names)}.")
        splits = [folder / name for name in names if split in (None, name)]
    for part in splits:
        number = 0
        for file in json.loads((part / "state.json").read_bytes())["_data_files"]:
            with pa.memory_map(str(part / file["filename"])) as source:
                for batch in pa.ipc.open_stream(source):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{part.name}#{number}", row
