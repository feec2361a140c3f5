"""Texts to train on: pairs, triplets, scored pairs, labelled texts, or a BEIR folder's judgements.

What a file holds is read from the names of its columns.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np

from nestvec.corpus._tables import TABLES, Row, dataset_rows, is_dataset, is_table, rows_of
from nestvec.corpus.beir import read_beir
from nestvec.errors import DataError, FileFormatError, NestvecError, StorageError

Kind = Literal["pairs", "triplets", "scored", "labelled"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: Kind -> names of its columns, as they are met in the wild; the longest that fits is taken.
COLUMNS: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "triplets": (
        ("anchor", "positive", "negative"),
        ("query", "positive", "negative"),
        ("query", "document", "negative"),
        ("sentence1", "sentence2", "hard_neg"),
    ),
    "scored": (
        ("sentence1", "sentence2", "score"),
        ("sent1", "sent2", "score"),
        ("text1", "text2", "score"),
        ("first", "second", "score"),
    ),
    "pairs": (
        ("anchor", "positive"),
        ("query", "positive"),
        ("query", "document"),
        ("question", "answer"),
        ("sentence1", "sentence2"),
        ("sent1", "sent2"),
        ("text1", "text2"),
        ("first", "second"),
    ),
    "labelled": (("text", "label"), ("sentence", "label"), ("text", "label_name")),
}
_SIZE = {"pairs": 2, "triplets": 3, "scored": 3, "labelled": 2}


@dataclass(frozen=True)
class Examples:
    """Texts to train on.

    Attributes
    ----------
    kind
        ``"pairs"``, ``"triplets"``, ``"scored"`` or ``"labelled"``.
    texts
        One list a column of text, all of one length: anchors, positives, negatives.
    targets
        Scores (n,) float32 of scored pairs, class numbers (n,) int64 of labelled texts, else None.
    label_names
        What the class numbers stand for.
    """

    kind: Kind
    texts: tuple[list[str], ...]
    targets: np.ndarray | None = None
    label_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts[0])

    def __getitem__(self, rows: np.ndarray) -> Examples:
        """Return some rows."""
        texts = tuple([column[row] for row in rows] for column in self.texts)
        targets = None if self.targets is None else self.targets[rows]
        return Examples(self.kind, texts, targets, self.label_names)

    def fingerprint(self) -> str:
        """Return a hash of every row."""
        digest = hashlib.sha256(f"{self.kind} {self.label_names}".encode())
        for column in self.texts:
            for text in column:
                encoded = text.encode("utf-8", "replace")
                digest.update(b"%d:" % len(encoded))
                digest.update(encoded)
        if self.targets is not None:
            digest.update(np.ascontiguousarray(self.targets).tobytes())
        return digest.hexdigest()[:16]


def read_examples(
    path: str | os.PathLike[str],
    *,
    columns: Sequence[str] | None = None,
    kind: str | None = None,
    split: str = "train",
    label_names: Sequence[str] | None = None,
) -> Examples:
    """Read texts to train on.

    Parameters
    ----------
    path
        A table (``.jsonl``, ``.csv``, ``.tsv``, ``.parquet``; text maybe ``.gz``), a folder of
        Hugging Face ``datasets``, or a BEIR-layout folder, whose ``qrels/<split>.tsv`` become pairs
        of a query and a relevant document.
    columns
        Names of the columns in order, e.g. ``("question", "answer")``; None looks for the usual
        ones (`COLUMNS`).
    kind
        What the columns are; None concludes it from them: three texts are triplets, two are pairs.
        Needed with ``columns`` for ``"scored"`` and ``"labelled"``.
    split
        Of a BEIR folder, or of a datasets folder that has splits.
    label_names
        Classes in order, for a further file of the same labels; None takes those found, sorted.

    Raises
    ------
    FileFormatError
        If the columns are not there, or the file is damaged.
    DataError
        If a text is empty, a score is no number, there is one class only, or a label is not among
        ``label_names``; the message names the row.
    StorageError
        If there is no such file.
    """
    path = Path(path)
    if path.is_dir() and any(path.glob("corpus.jsonl*")):
        return _judged(path, split)
    asked = next((known for known in KINDS if known == kind), None)
    if kind != asked:
        raise DataError(f"kind {kind!r} is not one of {', '.join(KINDS)}.")
    rows = list(_rows(path, split))
    if not rows:
        raise DataError(f"{path}: no rows in it.")
    found, names = _columns(rows[0], columns, cast(Kind | None, asked), path)
    n_texts = {"triplets": 3, "labelled": 1}.get(found, 2)
    texts = tuple(
        [_text(row, n, name, path) for n, row in _numbered(rows)] for name in names[:n_texts]
    )
    if found == "scored":
        scores = [_score(row, n, names[2], path) for n, row in _numbered(rows)]
        return Examples(found, texts, np.array(scores, dtype=np.float32))
    if found == "labelled":
        return _labelled(texts, [row.get(names[1]) for row in rows], label_names, path)
    return Examples(found, texts)


def _rows(path: Path, split: str) -> Iterator[Row]:
    try:
        if not path.exists():
            raise StorageError(f"cannot read {path}: there is no such file or folder.")
        if is_dataset(path):
            yield from (row for _, row in dataset_rows(path, split))
        elif is_table(path):
            yield from rows_of(path)
        else:
            raise FileFormatError(
                f"cannot read {path} to train on: give a table ({', '.join(TABLES)}), a datasets "
                f"folder or a BEIR folder."
            )
    except NestvecError as error:
        raise error if str(path) in str(error) else type(error)(f"{path}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise FileFormatError(f"cannot read {path}: {str(error).split(chr(10))[0]}.") from error


def _numbered(rows: list[Row]) -> Iterator[tuple[int, Row]]:
    return enumerate(rows, 1)


def _columns(
    first: Row, columns: Sequence[str] | None, kind: Kind | None, path: Path
) -> tuple[Kind, tuple[str, ...]]:
    there = list(first)
    if columns is not None:
        names = tuple(columns)
        kind = kind or ("triplets" if len(names) == 3 else "pairs")
        if len(names) != _SIZE[kind] or not set(names) <= set(there):
            raise FileFormatError(
                f"{path}: columns {', '.join(names)} do not fit {kind}, which needs "
                f"{_SIZE[kind]} of {', '.join(map(repr, there))}."
            )
        return kind, names
    for one, choices in COLUMNS.items():
        for names in choices:
            if kind in (None, one) and set(names) <= set(there):
                mark = next((c for c in ("label", "labels", "gold_label") if c in there), None)
                if one == "pairs" and kind is None and mark:
                    # positives and negatives in one file: not what in-batch negatives are made from
                    raise FileFormatError(
                        f"{path} has the columns {', '.join(names)} and {mark!r}, which says what "
                        f"a pair is worth. If it is a score: kind 'scored' and the three columns "
                        f"(--kind scored --columns {','.join(names)},{mark}). If all are right "
                        f"pairs: kind 'pairs' (--kind pairs)."
                    )
                return one, names
    wanted = "; ".join(f"{k}: {', '.join(c[0])}" for k, c in COLUMNS.items() if kind in (None, k))
    raise FileFormatError(
        f"{path} has the columns {', '.join(map(repr, there))}, and none of the usual ones "
        f"({wanted}). Name them: columns= in Python, --columns question,answer on the command line."
    )


def _text(row: Row, number: int, name: str, path: Path) -> str:
    text = row.get(name)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{path}: row {number} has no text in {name!r} ({text!r}). Drop the row.")
    return text.strip().encode("utf-8", "replace").decode()  # half a character: a question mark


def _score(row: Row, number: int, name: str, path: Path) -> float:
    try:
        score = float(row[name])
    except (TypeError, ValueError, KeyError):
        score = math.nan
    if not math.isfinite(score):
        raise DataError(f"{path}: row {number}: score {row.get(name)!r} is not a number.")
    return score


def _labelled(
    texts: tuple[list[str], ...], labels: list[Any], names: Sequence[str] | None, path: Path
) -> Examples:
    wrong = (n for n, x in enumerate(labels, 1) if not isinstance(x, (str, int, float)) or x == "")
    if missing := next(wrong, None):
        raise DataError(f"{path}: row {missing} has no label ({labels[missing - 1]!r}).")
    found = sorted(set(labels), key=lambda label: (isinstance(label, str), label))
    known = list(names) if names is not None else list(dict.fromkeys(map(str, found)))
    place = {name: number for number, name in enumerate(known)}
    strange = next((n for n, label in enumerate(labels, 1) if str(label) not in place), None)
    if strange is not None:
        raise DataError(
            f"{path}: row {strange} has the label {labels[strange - 1]!r}, which training did not "
            f"have ({len(known)} classes)."
        )
    if len(known) < 2:
        raise DataError(f"{path}: every row has the label {known[0]!r}; two classes are needed.")
    return Examples(
        "labelled", texts, np.array([place[str(label)] for label in labels]), tuple(known)
    )


def _judged(folder: Path, split: str) -> Examples:
    found = read_beir(folder, split=split)
    documents = dict(zip(found.doc_ids, found.doc_texts, strict=True))
    pairs = [
        (text, documents[doc])
        for query, text in zip(found.query_ids, found.query_texts, strict=True)
        for doc, grade in found.qrels[query].items()
        if grade > 0 and doc in documents
    ]
    if not pairs:
        raise DataError(f"{folder}: no query of the split {split!r} has a relevant document.")
    queries, documents_ = zip(*pairs, strict=True)
    return Examples("pairs", (list(queries), list(documents_)))
