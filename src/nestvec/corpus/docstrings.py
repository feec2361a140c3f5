"""Text that every machine with Python has: docstrings, whose first lines ask for their bodies."""

from __future__ import annotations

import ast
import itertools
import random
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nestvec.corpus.passages import passages
from nestvec.corpus.retrieval_set import RetrievalSet
from nestvec.errors import DataError

_QUERY_WORDS = range(4, 41)
_BODY_WORDS = 25
_MOST_BYTES = 1_000_000  # larger files are tables, not documentation
_NAMED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "testing", "_vendor", "vendor"}


class _Entry(NamedTuple):
    name: str
    summary: str
    body: list[str]


def docstrings(
    *, limit: int = 4000, seed: int = 0, roots: Iterable[Path] | None = None
) -> RetrievalSet:
    """Make a retrieval set of the docstrings of the standard library and installed packages.

    The summary line of a docstring (4 to 40 words) is a query; the passages of its body (25 words
    or more), without that line, are the documents that answer it. Files are parsed, never imported
    or run. Summaries and bodies that recur are left out, since they could not be told apart. The
    labels are honest but few: another docstring that would do counts as wrong.

    Parameters
    ----------
    limit
        The most passages.
    seed
        Packages take turns, and which of their files come first is drawn with this seed; the result
        is the same for the same files.
    roots
        Folders to read in place of the standard library and the installed packages.

    Returns
    -------
    RetrievalSet
        Query ids are dotted names (``asyncio.tasks.wait``), document ids ``<name>#<passage>``.

    Raises
    ------
    DataError
        If no docstring is found (a Python stripped of its sources).
    """
    if roots is None:
        paths = sysconfig.get_paths()
        roots = dict.fromkeys(Path(paths[k]) for k in ("stdlib", "purelib", "platlib"))
    entries: dict[str, _Entry] = {}  # by name, in the order found
    summaries: dict[str, list[int]] = {}  # how many passages each entry with it has
    bodies: set[str] = set()
    n_usable = 0  # passages of entries whose summary is theirs alone
    for module, path in _files(list(roots), random.Random(seed)):
        if n_usable >= limit:
            break
        for entry in _entries(path, module):
            key, body = entry.summary.casefold(), "\n".join(entry.body)
            if body in bodies or entry.name in entries:
                continue
            bodies.add(body)
            entries[entry.name] = entry
            sizes = summaries.setdefault(key, [])
            sizes.append(len(entry.body))
            n_usable += {1: sizes[0], 2: -sizes[0]}.get(len(sizes), 0)
    alone = [e for e in entries.values() if len(summaries[e.summary.casefold()]) == 1]
    total = itertools.accumulate(len(e.body) for e in alone)
    kept = [e for e, n in zip(alone, total, strict=True) if n <= limit]
    if not kept:
        raise DataError(
            "no docstrings found: this Python has no sources. Give a folder of your own text."
        )
    doc_ids, doc_texts, qrels = [], [], {}
    for entry in kept:
        ids = [f"{entry.name}#{i}" for i in range(1, len(entry.body) + 1)]
        doc_ids += ids
        doc_texts += entry.body
        qrels[entry.name] = dict.fromkeys(ids, 1)
    names, queries = [e.name for e in kept], [e.summary for e in kept]
    return RetrievalSet("docstrings", doc_ids, doc_texts, names, queries, qrels)


def _files(roots: list[Path], draw: random.Random) -> Iterator[tuple[str, Path]]:
    """Yield (module name, file), packages taking turns, so that a large one does not fill it."""
    packages: dict[str, list[tuple[str, Path]]] = {}
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            inside = path.relative_to(root)
            if _SKIPPED.isdisjoint(inside.parts[:-1]):
                parts = [*inside.parts[:-1], *([] if inside.stem == "__init__" else [inside.stem])]
                packages.setdefault(inside.parts[0], []).append((".".join(parts), path))
    for files in packages.values():
        draw.shuffle(files)
    for turn in itertools.zip_longest(*packages.values()):
        yield from (file for file in turn if file is not None)


def _entries(path: Path, module: str) -> Iterator[_Entry]:
    """Yield the docstrings of a file that have a summary and a body."""
    try:
        source = path.read_bytes()
        if len(source) > _MOST_BYTES or not (b'"""' in source or b"'''" in source):
            return
        with warnings.catch_warnings():  # other people's invalid escapes
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return  # unreadable, or of another Python: there are thousands more
    nodes: list[tuple[str, Any]] = [(module, tree)]
    while nodes:
        name, node = nodes.pop(0)
        entry = _entry(name, ast.get_docstring(node) or "")
        if entry:
            yield entry
        if isinstance(node, (ast.Module, ast.ClassDef)):
            nodes += [(f"{name}.{n.name}", n) for n in node.body if isinstance(n, _NAMED)]


def _entry(name: str, docstring: str) -> _Entry | None:
    summary, _, body = docstring.strip().partition("\n\n")
    summary = _clean(" ".join(summary.split()))
    if len(summary.split()) not in _QUERY_WORDS:
        return None
    body = _clean(body).replace(summary, "")
    if len(body.split()) < _BODY_WORDS:
        return None
    return _Entry(name, summary, passages(body))


def _clean(text: str) -> str:
    """Replace lone surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()
