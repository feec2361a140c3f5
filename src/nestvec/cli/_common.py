"""What every command shares: how it prints, how it reads vectors, how it says no."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from nestvec.errors import NestvecError, StorageError
from nestvec.space import Space

out = Console(soft_wrap=True)  # results: stdout
log = Console(stderr=True, soft_wrap=True, highlight=False)  # the way there: stderr

Role = Literal["document", "query"]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for programs.")]
ModelName = Annotated[
    str | None,
    typer.Option(
        help="Which model made vectors that carry no stamp (.npy, .csv, ...), like "
        "text-embedding-3-small.",
        show_default=False,
    ),
]
Column = Annotated[
    str | None,
    typer.Option(
        help="Column (CSV, Parquet) or key (JSONL) that holds the text.", show_default=False
    ),
]
LabelColumn = Annotated[
    str | None,
    typer.Option(
        help="Column or key of the labels, where they are in a table; by default label.",
        show_default=False,
    ),
]
Dims = Annotated[
    str | None,
    typer.Option(
        help="Nesting dims, like 16,32,64,128. By default the ones the vectors carry, else halving."
    ),
]


# what errors tell people to write in Python, as they would type it here
_TYPED = {
    "pass allow_untrained=True": "add --allow-untrained",
    "with fresh=True": "with --fresh",
    "nestvec.Index.create() makes one": "nestvec index create makes one",
    "upsert() replaces rows, add() only adds them": "nestvec index upsert replaces rows, add "
    "only adds them",
    "drop_pending=True deletes them": "--drop-pending deletes them",
    "leave that out with learn=False": "leave that out with --no-learn",
    "nestvec.upgrade.Upgrade.start() begins one": "nestvec upgrade start begins one",
    "missing_ok=True deletes the others": "--missing-ok deletes the others",
    "set n_queries to": "add --n-queries",
    "with precision='float32'": "with --precision float32",
    "nestvec.upgrade.fit(old=..., new=...)": "nestvec upgrade fit --old OLD --new NEW",
}


def as_typed(message: str) -> str:
    """Return a sentence of the library in the words of the command line."""
    for python, typed in _TYPED.items():
        message = message.replace(python, typed)
    return message


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Turn our errors into one sentence and exit code 2, and Ctrl-C into exit code 130."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except NestvecError as error:
            fail(as_typed(str(error)))
        except KeyboardInterrupt:
            log.print("\ninterrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # the reader (head, less) has left; keep Python from complaining at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except OSError as error:
            fail(f"{error.filename or 'the file system'}: {error.strerror or error}.")

    return run


def prompted(question: str) -> Iterator[str]:
    """Yield what the user types, line by line; an empty line, Ctrl-D or Ctrl-C ends it."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while words := out.input(f"\n[bold]{question}>[/] ").strip():
            yield words


def fail(message: str) -> NoReturn:
    """Say what is wrong on stderr and exit with 2."""
    log.print(f"[bold red]error:[/] {escape(message)}")
    raise typer.Exit(2)


def note(message: str) -> None:
    """Say on stderr how the work goes."""
    log.print(escape(message))


def print_json(values: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(json.dumps(values, ensure_ascii=False, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def read_lines(path: Path) -> list[str]:
    """Read a text file line by line; ``-`` is stdin."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot read {path}: {error}.") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_labels(path: Path, column: str | None = None) -> list[str]:
    """Read a label a line or, of a table (.jsonl, .csv, .parquet, ...), those of one column."""
    from nestvec.corpus._tables import is_table, rows_of

    if not is_table(path):
        if column is not None:
            fail(f"--label-column {column} is for tables, and {path} is read line by line.")
        return read_lines(path)
    name, labels = column or "label", []
    try:
        for number, row in enumerate(rows_of(path), 1):
            if name not in row:
                fail(
                    f"{path}: row {number} has no {name!r}, only {', '.join(map(repr, row))}. Name "
                    f"the column with --label-column."
                )
            if row[name] in (None, ""):
                fail(f"{path}: row {number} has no label in {name!r}.")
            labels.append(str(row[name]))
    except NestvecError as error:
        raise error if str(path) in str(error) else type(error)(f"{path}: {error}") from error
    except (ValueError, csv.Error) as error:  # pyarrow's ArrowInvalid is a ValueError
        fail(f"cannot read {path}: {str(error).splitlines()[0]}")
    return labels


def describe(space: Space) -> dict[str, Any]:
    """Return what a person asks first about a Space."""
    return {
        "space_id": space.space_id,
        "model": space.model,
        "revision": space.revision,
        "dim": space.size,
        "nesting_dims": list(space.nesting_dims),
        "maps": list(space.maps),
    }
