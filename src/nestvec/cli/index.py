"""nestvec index: make an index, write to it, keep it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nestvec.cli import _index_looks
from nestvec.cli._common import (
    Json,
    ModelName,
    command,
    describe,
    fail,
    note,
    out,
    print_json,
    read_lines,
)
from nestvec.cli._index import (
    Folder,
    Ids,
    IdsFile,
    as_ids,
    asked_ids,
    batches,
    id_type_of,
    is_whole,
    like,
    new_space,
    no_stamp,
    open_index,
)
from nestvec.errors import DataError, SpaceError
from nestvec.space import Embeddings

HELP = "Keep vectors on disk, durable and searchable while they change."

CREATE_EPILOG = """
Examples:

  nestvec index create docs.nest docs.safetensors               (as nestvec embed writes it)

  nestvec index create docs.nest docs.parquet --column title --column year

  nestvec index create docs.nest old.jsonl --model-name text-embedding-3-small --vector emb
"""
ADD_EPILOG = """
Examples:

  nestvec index add docs.nest more.parquet

  nestvec index add docs.nest more.npy --ids ids.txt --model-name text-embedding-3-small
"""
UPSERT_EPILOG = """
Examples:

  nestvec index upsert docs.nest changed.parquet
"""
DELETE_EPILOG = """
Examples:

  nestvec index delete docs.nest doc7 doc12

  nestvec index delete docs.nest --ids gone.txt --missing-ok

  comm -23 old.txt new.txt | nestvec index delete docs.nest -
"""
COMPACT_EPILOG = """
Examples:

  nestvec index compact docs.nest
"""

app = typer.Typer(no_args_is_help=True, help=HELP)

_FORMATS = ".parquet, .arrow, .feather, .lance, .jsonl, .safetensors, .npz, .npy, .csv"
Source = Annotated[
    Path,
    typer.Argument(
        help=f"Vectors, ids and the index's columns (others are left out): {_FORMATS}.",
        show_default=False,
    ),
]
VectorColumn = Annotated[
    str | None,
    typer.Option(
        "--vector", help="Column (JSONL: key) of the vectors.", show_default="vector, embedding"
    ),
]
IdColumn = Annotated[
    str | None,
    typer.Option("--id", help="Column (JSONL: key) of the ids.", show_default="id, _id"),
]
IdFile = Annotated[
    Path | None,
    typer.Option(
        help="Ids, one a line, in place of those in the file; - is stdin.", show_default=False
    ),
]
Durability = Annotated[
    Literal["power", "process"],
    typer.Option(help="What a finished write survives: a power cut, or the end of the process."),
]


@app.command(epilog=CREATE_EPILOG)
@command
def create(
    index: Annotated[
        Path, typer.Argument(metavar="INDEX", help="Folder to make.", show_default=False)
    ],
    source: Annotated[
        Path,
        typer.Argument(
            help=f"Vectors, with ids and columns if they have any: {_FORMATS}. All but the last "
            "are read some rows at a time.",
            show_default=False,
        ),
    ],
    column: Annotated[
        list[str] | None,
        typer.Option(
            help="Column to keep beside id and vector; repeat for more.", show_default="all"
        ),
    ] = None,
    no_columns: Annotated[bool, typer.Option("--no-columns", help="Keep none.")] = False,
    vector: VectorColumn = None,
    id: IdColumn = None,
    ids: IdFile = None,
    precision: Annotated[
        Literal["float32", "float16"], typer.Option(help="Of the vectors on disk.")
    ] = "float32",
    durability: Durability = "power",
    model_name: ModelName = None,
    json: Json = False,
) -> None:
    """Make an index of the vectors in a file."""
    if (index / "nestvec.json").is_file():
        fail(
            f"there is an index at {index}. nestvec index add adds rows to it, upsert replaces "
            f"them."
        )
    if column and no_columns:
        fail("--column and --no-columns contradict each other: leave out one.")
    from nestvec.cli._rows import open_rows
    from nestvec.search.store import Store

    rows = open_rows(source, vector=vector, id=id)
    space = new_space(rows, model_name)
    given = None if ids is None else read_lines(ids)
    names = [] if no_columns else column or rows.columns.names
    id_type = rows.id_type or "int"
    if given is not None:
        id_type = "int" if all(map(is_whole, given)) else "str"
    Store.create(
        index,
        space,
        payload=rows.schema_of(names),
        id_type=id_type,
        precision=precision,
        durability=durability,
        rows=batches(rows, space, names, as_ids(given, id_type), id_type=id_type),
    )
    made = open_index(index)
    if json:
        print_json(
            {
                "index": str(index),
                "rows": len(made),
                "version": made.version,
                "columns": made.schema.names,
                "id_type": id_type,
                "space": describe(space),
            }
        )
        return
    out.print(f"{index}: {len(made):,} rows, {space.label}", markup=False)
    if rows.id_type is None and given is None:
        note(f"{source} has no ids: its rows are numbered from 0")
    if names:
        note(f"columns: {', '.join(names)}")
    note(f"next: nestvec plan {index} --recall 0.99")


@app.command(epilog=ADD_EPILOG)
@command
def add(
    index: Folder,
    source: Source,
    vector: VectorColumn = None,
    id: IdColumn = None,
    ids: IdFile = None,
    durability: Durability = "power",
    model_name: ModelName = None,
    json: Json = False,
) -> None:
    """Add rows with new ids: all of them, or none."""
    _write(index, source, "add", vector, id, ids, durability, model_name, json)


@app.command(epilog=UPSERT_EPILOG)
@command
def upsert(
    index: Folder,
    source: Source,
    vector: VectorColumn = None,
    id: IdColumn = None,
    ids: IdFile = None,
    durability: Durability = "power",
    model_name: ModelName = None,
    json: Json = False,
) -> None:
    """Add rows, or replace those whose ids exist: all of them, or none."""
    _write(index, source, "upsert", vector, id, ids, durability, model_name, json)


@app.command(epilog=DELETE_EPILOG)
@command
def delete(
    index: Folder,
    ids: Ids = None,
    ids_file: IdsFile = None,
    missing_ok: Annotated[
        bool, typer.Option("--missing-ok", help="Pass over ids that do not exist.")
    ] = False,
    durability: Durability = "power",
    json: Json = False,
) -> None:
    """Remove rows by their ids: all of them, or none."""
    opened = open_index(index, durability=durability)
    asked = asked_ids(opened, ids, ids_file)
    done = opened.delete(asked, missing_ok=missing_ok)
    _say(index, done, json)


@app.command(epilog=COMPACT_EPILOG)
@command
def compact(
    index: Folder,
    keep_versions: Annotated[
        int, typer.Option(min=1, help="How many of the newest versions stay.")
    ] = 1,
    durability: Durability = "power",
    json: Json = False,
) -> None:
    """Free what deleted and replaced rows take, and build the structures anew over all rows."""
    opened = open_index(index, durability=durability)
    freed = opened.compact(keep_versions=keep_versions)
    if json:
        print_json({"index": str(index), "version": opened.version, "bytes_freed": freed})
    else:
        out.print(f"{index}: version {opened.version}, {freed:,} bytes freed", markup=False)


app.command(epilog=_index_looks.GET_EPILOG)(_index_looks.get)
app.command(epilog=_index_looks.CHECK_EPILOG)(_index_looks.check)
app.command(epilog=_index_looks.STATS_EPILOG)(_index_looks.stats)


def _write(
    index: Path,
    source: Path,
    how: Literal["add", "upsert"],
    vector: str | None,
    id: str | None,
    ids: Path | None,
    durability: str,
    model_name: str | None,
    json: bool,
) -> None:
    from nestvec.cli._rows import open_rows

    opened = open_index(index, durability=durability)
    rows = open_rows(source, vector=vector, id=id)
    space = opened.space
    if rows.stamp is not None:
        new = opened.upgrading_to
        space = new if new is not None and new.space_id == rows.stamp.space_id else space
        space.check_same(rows.stamp)
    if like(opened.space, model_name) is None and rows.stamp is None:
        raise SpaceError(no_stamp(source, opened.space.model or opened.space.space_id))
    names = [name for name in opened.schema.names if name not in ("id", "vector")]
    id_type = id_type_of(opened)
    given = None if ids is None else as_ids(read_lines(ids), id_type)
    new = batches(rows, space, names, given, numbered=False)
    if space is not opened.space:
        new = (replace(one, vectors=Embeddings(one.vectors, space)) for one in new)
    try:
        done = getattr(opened, how)(new)
    except DataError as error:
        raise error if str(source) in str(error) else type(error)(f"{source}: {error}") from error
    _say(index, done, json)


def _say(index: Path, done: Any, json: bool) -> None:
    if json:
        print_json({"index": str(index), **done._asdict()})
        return
    did = ", ".join(
        f"{getattr(done, what):,} {what}"
        for what in ("inserted", "updated", "deleted")
        if getattr(done, what)
    )
    out.print(f"{index}: {did or 'nothing to do'}, version {done.version}", markup=False)
