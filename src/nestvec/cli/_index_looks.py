"""nestvec index get, check, stats: commands that look into an index and write no row."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from nestvec.cli._common import Json, command, describe, out, print_json
from nestvec.cli._index import Folder, Ids, IdsFile, asked_ids, open_index

GET_EPILOG = """
Examples:

  nestvec index get docs.nest doc7 --column title --column vector

  nestvec index get docs.nest - --json < ids.txt
"""
CHECK_EPILOG = """
Examples:

  nestvec index check docs.nest || echo damaged
"""
STATS_EPILOG = """
Examples:

  nestvec index stats docs.nest --json
"""


@command
def get(
    index: Folder,
    ids: Ids = None,
    ids_file: IdsFile = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="Column to show; repeat for more.", show_default="all but vector"),
    ] = None,
    json: Json = False,
) -> None:
    """Show rows by their ids."""
    opened = open_index(index)
    names = [name for name in opened.schema.names if name not in ("id", "vector")]
    columns = ["id", *(name for name in column or names if name != "id")]
    rows = opened.get(asked_ids(opened, ids, ids_file), columns=columns).to_pylist()
    if json:
        print_json({"version": opened.version, "rows": rows})
        return
    table = Table(*map(escape, columns), box=None)
    for row in rows:
        table.add_row(*(escape(_short(row[name])) for name in columns))
    out.print(table)


@command
def check(index: Folder, json: Json = False) -> None:
    """Read every file and say what is damaged; the exit code is 1 if anything is.

    Damaged derived files are removed: a search that needs them makes them again.
    """
    found = open_index(index).check()
    record, new = found["record"], found["new"]
    if json:
        print_json(
            {
                "index": str(index),
                "ok": found["ok"],
                "version": record.version,
                "rows": record.rows,
                "files": record.files,
                "bytes": record.bytes,
                "damage": [*record.damage, *(() if new is None else new.damage)],
                "waste": [str(path) for path in record.waste],
                "unverified": [str(path) for path in record.unverified],
                "derived": found["derived"],
            }
        )
    else:
        out.print(str(record), markup=False)
        if new is not None:
            out.print(f"the new vectors of its upgrade: {new}", markup=False)
        for name in found["derived"]:
            out.print(f"{name} is damaged; it is made again when it is needed", markup=False)
    if not found["ok"]:
        raise typer.Exit(1)


@command
def stats(index: Folder, json: Json = False) -> None:
    """Say how many rows there are, and what they take on disk and in memory."""
    opened = open_index(index)
    figures = opened.stats()
    plan = opened.plan_stored
    derived = figures["structures"]
    if derived and plan is not None and plan.structure in ("exact", *derived):
        # what a search holds is known when one has been made
        opened.search([1.0] * opened.space.size)
        figures = opened.stats()
    if json:
        print_json({"index": str(index), "space": describe(opened.space), **figures})
        return
    rows = max(1, figures["rows"])
    parts = ", ".join(f"{name} {size:,}" for name, size in figures["structures"].items())
    parts = parts or "none yet: the first search derives them"
    table = Table(box=None, show_header=False)
    for name, value in (
        ("rows", f"{figures['rows']:,} of {figures['dim']} {figures['precision']} numbers"),
        ("space", opened.space.label),
        ("columns", ", ".join(opened.schema.names)),
        ("version", f"{figures['version']}; {figures['versions']} kept"),
        ("durability", f"{figures['durability']}: {_DURABLE[figures['durability']]}"),
        ("record", f"{figures['record_bytes']:,} bytes on disk"),
        ("derived", f"{figures['derived_bytes']:,} bytes on disk ({parts})"),
        (
            "resident",
            f"{figures['resident_bytes']:,} bytes in memory, "
            f"{figures['resident_bytes'] / rows:,.0f} a row",
        ),
        (
            "since built",
            f"{figures['fresh_rows']:,} rows written, {figures['dead_rows']:,} replaced or deleted",
        ),
        ("plan", figures["plan"] or "none: every row is scored (nestvec plan finds one)"),
    ):
        table.add_row(name, escape(value))
    out.print(table)


_DURABLE = {
    "power": "a finished write survives a power cut",
    "process": "a finished write survives the end of the process",
}


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 4:
        return (
            f"[{', '.join(f'{v:.4g}' if isinstance(v, float) else str(v) for v in value[:3])}, "
            f"... {len(value)}]"
        )
    return " ".join(str(value).split())[:200]
