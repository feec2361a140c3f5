"""What the commands over an index share: which path is one, whose vectors may join, ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestvec import _checks
from nestvec._progress import progress
from nestvec.cli._common import fail, read_lines
from nestvec.errors import DataError, SpaceError
from nestvec.space import Embeddings, Space
from nestvec.space._formats import reader_of

if TYPE_CHECKING:
    from nestvec.cli._rows import RowFile
    from nestvec.search import Index

Folder = Annotated[Path, typer.Argument(metavar="INDEX", help="The index.", show_default=False)]

Ids = Annotated[
    list[str] | None,
    typer.Argument(help="Ids; - reads one a line from stdin.", show_default=False),
]
IdsFile = Annotated[
    Path | None, typer.Option("--ids", help="Ids, one a line; - is stdin.", show_default=False)
]


def is_index(path: Path) -> bool:
    """Tell an index from a file of vectors by what stands there, else by the name."""
    if reader_of(path.name) is not None and not (path / "nestvec.json").is_file():
        return False
    return path.is_dir() or not path.exists()


def open_index(path: Path, **options: Any) -> Index:
    """Open an index with progress on stderr."""
    from nestvec.search import Index

    return Index.open(path, show_progress=True, **options)


def like(space: Space, model_name: str | None) -> Space | None:
    """Return the Space of an unstamped file whose vectors are to join or ask ``space``.

    The name has to be that of the model that was declared; a Space that was not declared is named
    by its id.
    """
    if model_name is None:
        return None
    if model_name != space.space_id:
        said = Space.declared(model_name, dim=space.dim, normalisation=space.normalisation)
        space.check_same(replace(said, cut=space.cut))
    return space


def read_queries(path: Path, space: Space, model_name: str | None) -> Embeddings:
    """Read query vectors for an index of ``space``."""
    return Embeddings.load(path, space=like(space, model_name))


def new_space(rows: RowFile, model_name: str | None) -> Space:
    """Return the Space of a file's vectors: its stamp, or what the user declares."""
    if rows.stamp is not None:
        if model_name not in (None, rows.stamp.model, rows.stamp.fingerprint):
            fail(
                f"{rows.path}: its stamp says {rows.stamp.label}, not {model_name!r}. Leave out "
                f"--model-name to trust the stamp."
            )
        return rows.stamp
    if model_name is None:
        raise SpaceError(no_stamp(rows.path, "NAME"))
    dim, unit = rows.shape
    return Space.declared(model_name, dim=dim, normalisation="l2" if unit else "none")


def no_stamp(path: Path, name: str) -> str:
    return (
        f"{path}: it carries no stamp, so nothing says which model its vectors come from. Say it: "
        f"--model-name {name}."
    )


def batches(
    rows: RowFile,
    space: Space,
    names: Sequence[str],
    given: Sequence[Any] | None,
    *,
    id_type: str | None = None,
    numbered: bool = True,
) -> Iterator[Any]:
    """Yield checked batches of a file; messages name its rows."""
    from nestvec.cli._rows import readable
    from nestvec.search.store import Batch

    path = str(rows.path)
    if given is not None and len(given) != rows.n:
        raise DataError(f"{len(given):,} ids are given for the {rows.n:,} rows of {path}.")
    with readable(rows.path), progress(rows.path.name, rows.n, unit="rows") as advance:
        for block in rows.blocks(names):
            first, n = block.first_row, len(block.array)
            matrix = _checks.as_matrix(block.array, name=path, dim=space.size, first_row=first)
            off = _checks.row_off_unit(matrix) if space.has_unit_rows else None
            if off is not None:
                raise DataError(
                    f"{path}: row {first + off} does not have length 1, as all vectors of "
                    f"{space.label} have. Normalise them."
                )
            ids = block.ids if given is None else given[first : first + n]
            if ids is None and not numbered:
                raise DataError(
                    f"{path} has no ids, and row numbers would be those of other rows. Name their "
                    f"column with --id, or give them with --ids FILE."
                )
            if ids is None:
                ids = range(first, first + n)
            elif id_type == "str":  # a JSONL may have both kinds
                ids = [str(one) for one in ids]
            ids = _checks.as_ids(ids, n, name=path, first_row=first)
            yield Batch(matrix, ids, dict(block.columns))
            advance(n)


def asked_ids(index: Index, ids: Sequence[str] | None, file: Path | None) -> list[Any]:
    if ids and file is not None:
        fail("give ids or --ids FILE, not both.")
    if list(ids or []) == ["-"]:
        file = Path("-")
    found = list(ids or []) if file is None else read_lines(file)
    if not found:
        fail("no ids: write them behind the index, or give a file with --ids.")
    return list(as_ids(found, id_type_of(index)) or [])


def id_type_of(index: Index) -> str:
    return "int" if str(index.schema.field("id").type) == "int64" else "str"


def as_ids(given: Sequence[str] | None, id_type: str) -> Sequence[Any] | None:
    if given is None or id_type == "str":
        return given
    wrong = [one for one in given if not is_whole(one)]
    if wrong:
        raise DataError(f"ids of this index are integers, and {wrong[0]!r} is none.")
    return [int(one) for one in given]


def is_whole(text: str) -> bool:
    try:
        return str(int(text)) == text
    except ValueError:
        return False
