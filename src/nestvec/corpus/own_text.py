"""The user's own text: files and folders to passages with ids that say where each came from."""

from __future__ import annotations

import ast
import csv
import html.parser
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nestvec.corpus._tables import TABLES, Row, dataset_rows, is_dataset, rows_of
from nestvec.corpus.passages import passages
from nestvec.corpus.retrieval_set import Texts
from nestvec.errors import DataError, FileFormatError, NestvecError, StorageError

_TEXT = ("text", "content", "body", "passage", "document", "sentence")
_IDS = ("id", "_id")
_PROSE = (".txt", ".md", ".rst", ".html", ".htm", ".py")
_HALVES = re.compile(r"[\ud800-\udfff]")  # of characters: JSON can hold one, UTF-8 cannot


class _Document(NamedTuple):
    id: str
    text: str
    is_row: bool  # a row of a table, which keeps its id if it is one passage


def read_texts(path: str | os.PathLike[str], *, column: str | None = None) -> Texts:
    """Read text of one's own, split it to passages, and leave out what recurs.

    Parameters
    ----------
    path
        A file: ``.txt``, ``.md``, ``.rst``, ``.html``, ``.py`` (its docstrings), ``.jsonl``,
        ``.jsonl.gz``, ``.csv``, ``.tsv``, ``.parquet``, or any other file of text; a folder that
        Hugging Face ``datasets`` saved; or a folder of such files, read recursively (hidden files,
        binary files and other endings are left out). Bytes that are not UTF-8, and halves of
        characters that JSON may hold (lone surrogates), are replaced by U+FFFD.
    column
        The column or key that holds the text; None takes ``text``, ``content``, ``body``,
        ``passage``, ``document`` or ``sentence``. A ``title`` is put before it.

    Returns
    -------
    Texts
        Passages (see `nestvec.corpus.passages`) in a fixed order. Ids are ``file.md#3``, of a
        folder ``sub/file.md#3`` with the path inside it; a row of a table has its own ``id`` (or
        ``file.csv#7``, its number), with ``#1``, ``#2`` behind it only if it gave several passages.

    Raises
    ------
    StorageError
        If there is no such file, or one may not be read.
    FileFormatError
        If a file is damaged or has no column of text.
    DataError
        If no text is found, a single file is binary, or rows share an id.
    """
    path = Path(path)
    found: dict[str, str] = {}  # passage -> id, so that the first of its kind stays
    for document in _documents(path, column):
        parts = passages(_whole(document.text))
        own = _whole(document.id)
        for number, part in enumerate(parts, 1):
            alone = document.is_row and len(parts) == 1
            found.setdefault(part, own if alone else f"{own}#{number}")
    if not found:
        raise DataError(
            f"no text found in {path}. It reads files with content, ending in "
            f"{', '.join(_PROSE + TABLES)}, and folders of them."
        )
    return Texts(list(found.values()), list(found))


def _whole(text: str) -> str:
    return _HALVES.sub("\ufffd", text)


def _documents(path: Path, column: str | None) -> Iterator[_Document]:
    try:
        if not path.exists():
            raise StorageError(f"cannot read {path}: there is no such file or folder.")
        if path.is_file():
            yield from _file(path, path.name, column)
        elif is_dataset(path):
            yield from _dataset(path, column)
        else:
            for file in sorted(p for p in path.rglob("*") if p.is_file()):
                inside = file.relative_to(path)
                hidden = any(part.startswith(".") for part in inside.parts)
                if not hidden and _ending(file):
                    yield from _file(file, inside.as_posix(), column, skip_binary=True)
    except StorageError:
        raise
    except OSError as error:  # a folder that may be listed but not entered
        raise StorageError(
            f"cannot read {error.filename or path}: {error.strerror or error}."
        ) from error


def _file(
    path: Path, name: str, column: str | None, *, skip_binary: bool = False
) -> Iterator[_Document]:
    """Yield the documents of one file; a complaint of any reader names it."""
    try:
        if _ending(path) in TABLES:
            for number, row in enumerate(rows_of(path), 1):
                yield _from_row(row, f"{name}#{number}", column)
            return
        if _binary(path):
            if skip_binary:
                return
            raise DataError(f"{path} is a binary file, not text.")
        text = path.read_bytes().decode("utf-8-sig", errors="replace")
        yield _Document(name, _prose(path, text), is_row=False)
    except NestvecError as error:
        raise error if str(path) in str(error) else type(error)(f"{path}: {error}") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, csv.Error) as error:  # pyarrow's ArrowInvalid is a ValueError
        reason = str(error).split("\n")[0].rstrip(".")
        raise FileFormatError(f"cannot read {path}: {reason}; it is damaged.") from error


def _ending(path: Path) -> str | None:
    return next((e for e in _PROSE + TABLES if path.name.lower().endswith(e)), None)


def _binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(8192)


# --- tables ---------------------------------------------------------------------------------------


def _from_row(row: Row, fallback: str, column: str | None) -> _Document:
    name = column or next((c for c in _TEXT if c in row), None)
    if name is None or name not in row:
        wanted = repr(column) if column else f"column of text ({', '.join(_TEXT)})"
        raise FileFormatError(
            f"there is no {wanted}, only {', '.join(map(repr, row))}; name the column: column= in "
            f"Python, --column on the command line."
        )
    text = f"{row.get('title') or ''} {row[name] or ''}".strip()
    own = next((row[i] for i in _IDS if row.get(i) not in (None, "")), None)
    return _Document(fallback if own is None else str(own), text, is_row=True)


def _dataset(folder: Path, column: str | None) -> Iterator[_Document]:
    try:
        for name, row in dataset_rows(folder):
            yield _from_row(row, name, column)
    except NestvecError as error:
        raise type(error)(f"{folder}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"cannot read the datasets folder {folder}: {str(error).split(chr(10))[0]}."
        ) from error


# --- prose ----------------------------------------------------------------------------------------


def _prose(path: Path, text: str) -> str:
    match _ending(path):
        case ".html" | ".htm":
            page = _Page()
            page.feed(text)
            page.close()
            return "".join(page.parts)
        case ".py":
            return "\n\n".join(_docstrings_of(text, path))
        case _:
            return text


class _Page(html.parser.HTMLParser):
    """The words of a page, a blank line between its blocks."""

    _hidden = ("script", "style", "template", "noscript")
    _inline = ("a", "abbr", "b", "code", "em", "i", "kbd", "mark", "q", "small", "span", "strong")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.depth = 0  # of hidden elements

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.depth += tag in self._hidden
        if tag not in self._inline:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag in self._hidden and self.depth > 0
        if tag not in self._inline:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.depth:
            self.parts.append(data)


def _docstrings_of(source: str, path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():  # invalid escapes in the user's file are not ours to mind
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, RecursionError) as error:
        raise FileFormatError(f"cannot read {path}: it is not Python ({error}).") from error
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text
