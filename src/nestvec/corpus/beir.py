"""Retrieval sets as BEIR lays them out, and relevance judgements as TSV or TREC files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nestvec.corpus._lines import lines_of
from nestvec.corpus.retrieval_set import Qrels, RetrievalSet, Texts
from nestvec.errors import DataError, FileFormatError, StorageError


def read_beir(folder: str | os.PathLike[str], split: str = "test") -> RetrievalSet:
    """Read ``corpus.jsonl``, ``queries.jsonl`` (each maybe ``.gz``) and ``qrels/<split>.tsv``.

    A document is its title, a space, its text, as BEIR has it. Queries without judgements in the
    split are left out. Documents without any text cannot be embedded: they are left out and named
    in ``dropped``, and their judgements stay.

    Raises
    ------
    StorageError
        If a file is missing.
    FileFormatError
        If a line cannot be read; the message names file and line.
    DataError
        If ids repeat, the qrels name unknown ids, or a judged query has no text.

    References
    ----------
    Thakur et al., BEIR, NeurIPS 2021, arXiv:2104.08663.
    """
    folder = Path(folder)
    corpus, queries = _find(folder, "corpus.jsonl"), _find(folder, "queries.jsonl")
    qrels = read_qrels(_split(folder, split))
    doc_ids, doc_texts, dropped = [], [], []
    for one, row in _rows(corpus):
        text = _document(row)
        if text:
            doc_ids.append(one)
            doc_texts.append(text)
        else:
            dropped.append(one)
    query_ids, query_texts = [], []
    for one, row in _rows(queries):
        if one in qrels:
            text = str(row.get("text") or "").strip()
            if not text:
                raise DataError(f"{queries}: query {one!r} is judged but has no text.")
            query_ids.append(one)
            query_texts.append(text)
    return RetrievalSet(
        folder.resolve().name, doc_ids, doc_texts, query_ids, query_texts, qrels, tuple(dropped)
    )


def read_beir_texts(folder: str | os.PathLike[str], role: str = "document") -> Texts:
    """Read the documents of a BEIR folder, or with ``role="query"`` its queries, of every split.

    Texts are as `read_beir` has them; those without any content are left out. Raises its errors,
    and `DataError` if nothing is left.
    """
    folder = Path(folder)
    path = _find(folder, "queries.jsonl" if role == "query" else "corpus.jsonl")
    ids, texts = [], []
    for one, row in _rows(path):
        text = str(row.get("text") or "") if role == "query" else _document(row)
        if text.strip():
            ids.append(one)
            texts.append(text.strip())
    if not ids:
        raise DataError(f"{path}: no text in it.")
    return Texts(ids, texts)


def read_beir_titles(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Return the title of every document of a BEIR folder by its id, "" where it has none."""
    path = _find(Path(folder), "corpus.jsonl")
    return {one: str(row.get("title") or "").strip() for one, row in _rows(path)}


def read_qrels(path: str | os.PathLike[str]) -> Qrels:
    """Read judgements: ``query document grade`` with tabs, or TREC's ``query 0 document grade``.

    A header line is recognised by a last column that is no number. Raises `FileFormatError` with
    the line that cannot be read, `DataError` if one pair has two grades or the file is empty.
    """
    path = Path(path)
    qrels: Qrels = {}
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        cells = line.rstrip("\n").split("\t")
        cells = cells if len(cells) > 1 else line.split()
        cells = [c.strip() for c in cells]
        if len(cells) not in (3, 4) or not _is_whole(cells[-1]):
            if number == 1 and len(cells) in (3, 4):
                continue
            raise FileFormatError(
                f"{path}: line {number} is not 'query document grade' (or TREC's 'query 0 document "
                f"grade') with a whole number as grade: {line.strip()[:60]!r}."
            )
        query, document, grade = cells[0], cells[-2], int(cells[-1])
        if qrels.setdefault(query, {}).setdefault(document, grade) != grade:
            raise DataError(
                f"{path}: line {number} gives query {query!r} and document {document!r} a second "
                f"grade, {grade}."
            )
    if not qrels:
        raise DataError(f"{path}: no judgements in it.")
    return qrels


def _document(row: dict[str, Any]) -> str:
    return f"{row.get('title') or ''} {row.get('text') or ''}".strip()


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise StorageError(f"{folder} has no {name} or {name}.gz, so it is no BEIR folder.")


def _split(folder: Path, split: str) -> Path:
    path = folder / "qrels" / f"{split}.tsv"
    if not path.is_file():
        there = sorted(p.stem for p in (folder / "qrels").glob("*.tsv"))
        raise StorageError(
            f"{folder} has no qrels/{split}.tsv; its splits are: {', '.join(there) or 'none'}."
        )
    return path


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise FileFormatError(f"{path}: line {number} is not JSON ({error}).") from error
        if not isinstance(row, dict) or "_id" not in row:
            raise FileFormatError(f"{path}: line {number} has no '_id'.")
        yield str(row["_id"]), row


def _is_whole(cell: str) -> bool:
    try:
        int(cell)
    except ValueError:
        return False
    return True
