"""nestvec upgrade plan | start | status | backfill | finish | rollback: on an index in use."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import typer

from nestvec.cli._common import Json, command, describe, fail, note, out, print_json, read_lines
from nestvec.cli._index import Folder, as_ids, id_type_of, open_index
from nestvec.errors import DataError, ModelError, StorageError
from nestvec.space import Embeddings, Space

if TYPE_CHECKING:
    from nestvec.encoders import TextEncoder
    from nestvec.search import Index

_LOGGED = 50_000  # rows that stand for a log of queries, however long it is

PLAN_EPILOG = """
Examples:

  nestvec upgrade plan docs.nest --model NEW --column text

  nestvec upgrade plan docs.nest --model NEW --column text --price-per-million 0.005
"""
START_EPILOG = """
Examples:

  nestvec upgrade start docs.nest --model NEW --column text

  nestvec upgrade start docs.nest --model NEW --column text --bridge bridge/ --queries asks-new.npz

  nestvec upgrade start docs.nest --vectors new.parquet       (vectors by the new model, with ids)
"""
STATUS_EPILOG = """
Examples:

  nestvec upgrade status docs.nest

  watch -n 60 nestvec upgrade status docs.nest
"""
BACKFILL_EPILOG = """
It may be stopped, or killed, at any moment: type it again and it goes on.

Examples:

  nestvec upgrade backfill docs.nest                          (the model and column of start)

  nestvec upgrade backfill docs.nest --traffic returned.txt --rows-per-second 200

  nestvec upgrade backfill docs.nest --queries log.txt        (queries as asked, one a line)

  nestvec upgrade backfill docs.nest --vectors new.parquet    (made elsewhere, with ids)
"""
FINISH_EPILOG = """
Examples:

  nestvec upgrade finish docs.nest
"""
ROLLBACK_EPILOG = """
Examples:

  nestvec upgrade rollback docs.nest
"""

Model = Annotated[
    str | None,
    typer.Option(
        help="The new model: hub id or folder of a sentence-transformers model.",
        show_default=False,
    ),
]
TextColumn = Annotated[
    str | None,
    typer.Option(help="The index's column that is embedded.", show_default=False),
]
Vectors = Annotated[
    Path | None,
    typer.Option(
        help="Vectors by the new model in place of --model: a stamped file, with the ids of the "
        "index.",
        show_default=False,
    ),
]


@command
def plan(
    index: Folder,
    model: Annotated[
        str,
        typer.Option(
            help="The new model: hub id or folder of a sentence-transformers model.",
            show_default=False,
        ),
    ],
    column: Annotated[
        str, typer.Option(help="The index's column that is embedded.", show_default=False)
    ],
    sample_size: Annotated[int, typer.Option(min=1, help="Rows to embed and time.")] = 256,
    price_per_million: Annotated[
        float | None,
        typer.Option(min=0, help="What a million characters cost you.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Say what an upgrade will take: embed a sample, and time it. Changes nothing."""
    from nestvec.upgrade import estimate

    opened = open_index(index)
    found = estimate(
        opened,
        _encoder(model),
        column=column,
        sample_size=sample_size,
        price_per_million=price_per_million,
    )
    if json:
        print_json({"index": str(index), **asdict(found)})
        return
    out.print(found.sentence, markup=False)
    note(f"next: nestvec upgrade start {index} --model {model} --column {column}")


@command
def start(
    index: Folder,
    model: Model = None,
    column: TextColumn = None,
    vectors: Vectors = None,
    bridge: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a bridge from the new model to the old one; by default one is fitted "
            "on the sample.",
            show_default=False,
        ),
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option(
            help="Queries by the new model, a stamped file, to compare scores with; by default a "
            "part of the sample.",
            show_default=False,
        ),
    ] = None,
    sample_size: Annotated[int, typer.Option(min=20, help="Rows to begin with.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample.")] = 0,
    json: Json = False,
) -> None:
    """Begin: from then on the new model's queries are answered, through a bridge."""
    from nestvec.maps import load_map
    from nestvec.upgrade import Upgrade
    from nestvec.upgrade.estimating import sample_texts
    from nestvec.upgrade.live import check_none
    from nestvec.upgrade.sources import check_column

    _check_source(model, vectors)
    opened = open_index(index)
    check_none(opened)
    fitted = None if bridge is None else load_map(bridge)
    asked = None if queries is None else Embeddings.load(queries)
    version = None
    if model is not None:
        check_column(column, opened.schema.names)
        assert column is not None
        encoder = _encoder(model)
        ids, texts, version = sample_texts(opened, column, sample_size, seed=seed)
        sample = encoder.encode(texts, ids=ids)
    else:
        assert vectors is not None
        sample = _some(Embeddings.load(vectors), opened, sample_size, seed)
    upgrade = Upgrade.start(
        opened,
        sample,
        bridge=fitted,
        queries=asked,
        column=column,
        version=version,
    )
    scale = upgrade.calibration
    if json:
        print_json(
            {
                "index": str(index),
                "from": describe(opened.space),
                "to": describe(upgrade.space),
                "calibration": asdict(scale),
                **_as_json(upgrade.status()),
            }
        )
        return
    out.print(
        f"{index}: queries of {upgrade.space.label} are answered from now on, beside those of "
        f"{opened.space.label}.",
        markup=False,
    )
    guard = getattr(upgrade.bridge, "guard_", None)
    if guard is not None:
        note(guard.sentence())
    note(
        f"bridged scores tell the new model's with a correlation of {scale.correlation:.2f}, to "
        f"{scale.error:.3f}"
    )
    note(f"next: nestvec upgrade backfill {index}{_source_typed(None, vectors)}")


@command
def status(index: Folder, json: Json = False) -> None:
    """Say how far an upgrade is, how long the rest will take, and whether it may be finished."""
    from nestvec.upgrade import Upgrade

    upgrade = Upgrade.open(open_index(index))
    found = upgrade.status()
    if json:
        print_json({"index": str(index), "to": describe(upgrade.space), **_as_json(found)})
        return
    out.print(f"{index} -> {upgrade.space.label}, since {found.begun}", markup=False)
    out.print(found.sentence, markup=False)
    if found.bridged:
        note(f"{found.bridged:,} rows were written with new vectors since")
    note("a process works on it now" if found.running else "nobody works on it now")


@command
def backfill(
    index: Folder,
    model: Model = None,
    column: TextColumn = None,
    vectors: Vectors = None,
    order: Annotated[
        Literal["traffic", "bridge_error", "random"] | None,
        typer.Option(
            help="What comes first: what is asked for most, what the bridge misses most, or "
            "anything.",
            show_default="traffic with --queries or --traffic, else random",
        ),
    ] = None,
    traffic: Annotated[
        Path | None,
        typer.Option(
            help="Ids as they were returned or asked for, one a line, or id<TAB>count.",
            show_default=False,
        ),
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option(
            help="Queries as they were asked, one a line of a .txt file, or their vectors by the "
            "new model (a stamped file): what stands high in their answers comes first.",
            show_default=False,
        ),
    ] = None,
    learn: Annotated[
        bool,
        typer.Option(help="Learn the bridge again as rows get done, and take the better one."),
    ] = True,
    rows_per_second: Annotated[
        float | None, typer.Option(help="At most as many.", show_default="no limit")
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option(min=1, help="Stop after as many.", show_default="all")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Rows embedded together.", show_default="256"),
    ] = None,
    json: Json = False,
) -> None:
    """Give rows their new vectors, those that pay most first."""
    from nestvec.upgrade import Upgrade

    if model is not None:
        _check_source(model, vectors)
    opened = open_index(index)
    upgrade = Upgrade.open(opened)
    source = _encoder(model, upgrade.space) if vectors is None else Embeddings.load(vectors)
    counts = None if traffic is None else _counts(traffic, opened)
    asked = None
    if queries is not None:
        of_texts = queries.suffix == ".txt"
        reader = _encoder(model, upgrade.space) if of_texts and vectors is not None else source
        asked = _log_of(queries, reader) if of_texts else Embeddings.load(queries)
    try:
        n = upgrade.backfill(
            source,
            column=column,
            order=order,
            traffic=counts,
            queries=asked,
            learn=learn,
            rows_per_second=rows_per_second,
            max_rows=max_rows,
            batch_size=batch_size,
        )
    except KeyboardInterrupt:
        again = f"nestvec upgrade backfill {index}{_source_typed(model, vectors)}"
        note(f"\nwhat is made is kept: {again} goes on from there")
        raise
    found = upgrade.status()
    if json:
        print_json({"index": str(index), "embedded": n, **_as_json(found)})
        return
    out.print(f"{n:,} rows embedded. {found.sentence}", markup=False)
    if vectors is not None and found.pending and (max_rows is None or n < max_rows):
        note(
            f"{vectors} has no vectors of the {found.pending:,} rows that are pending: they are "
            f"not in it, or were written since it was first given. Make theirs, and give them too."
        )
    if found.may_finish:
        note(f"next: nestvec upgrade finish {index}")


@command
def finish(
    index: Folder,
    drop_pending: Annotated[
        bool, typer.Option("--drop-pending", help="Delete rows that have no new vector.")
    ] = False,
    json: Json = False,
) -> None:
    """Drop the old vectors: the index is one of the new model from then on."""
    from nestvec.upgrade import Upgrade

    opened = open_index(index)
    try:
        upgrade = Upgrade.open(opened)
    except StorageError:
        if not Upgrade.complete(opened):
            raise
    else:
        upgrade.finish(drop_pending=drop_pending)
    if json:
        print_json({"index": str(index), "rows": len(opened), "space": describe(opened.space)})
        return
    out.print(f"{index}: {len(opened):,} rows, {opened.space.label}", markup=False)
    note(f"next: nestvec plan {index} --recall 0.99")


@command
def rollback(index: Folder, json: Json = False) -> None:
    """Drop the new vectors: the index answers as before."""
    from nestvec.upgrade import Upgrade

    opened = open_index(index)
    bridged = Upgrade.open(opened).rollback()
    if json:
        print_json({"index": str(index), "space": describe(opened.space), "bridged": bridged})
        return
    out.print(f"{index}: {len(opened):,} rows, {opened.space.label}, as before", markup=False)
    if len(bridged):
        note(
            f"{len(bridged):,} rows were written with new vectors, and have what the bridge made "
            f"of them; embed them with the old model again: {', '.join(map(str, bridged[:10]))}"
            f"{', ...' if len(bridged) > 10 else ''} (all with --json)"
        )


def _as_json(status: Any) -> dict[str, Any]:
    return {**asdict(status), "may_finish": status.may_finish}


def _check_source(model: str | None, vectors: Path | None) -> None:
    if (model is None) == (vectors is None):
        fail("say what makes the new vectors: --model and --column, or --vectors FILE; not both.")


def _source_typed(model: str | None, vectors: Path | None) -> str:
    """Return the option that says what makes vectors, as it was given."""
    return f" --vectors {vectors}" if vectors else f" --model {model}" if model else ""


def _log_of(file: Path, encoder: Any) -> Embeddings:
    """Embed queries as they were asked, one a line: the most frequent ones, by how often."""
    from nestvec.upgrade.order import MOST_QUERIES

    counts = Counter(read_lines(file)).most_common(MOST_QUERIES)
    if not counts:
        fail(f"{file} holds no query: write one a line.")
    times = np.array([count for _, count in counts])
    vectors = encoder.encode([text for text, _ in counts], role="query")
    shares = np.ceil(times * min(1, _LOGGED / times.sum())).astype(int)
    return Embeddings(np.repeat(vectors.array, shares, axis=0), vectors.space)


def _encoder(model: str | None, space: Space | None = None) -> TextEncoder:
    """Return the encoder of a model, or that of a Space."""
    from nestvec.encoders import TextEncoder

    if space is None:
        assert model is not None
        return TextEncoder(model)
    if model is None and space.fingerprint.startswith("declared:"):
        fail(
            f"{space.label} was stamped by name, so its encoder is not known: give --model, or "
            f"--vectors FILE."
        )
    try:
        return TextEncoder(
            model or space.model,
            document_prompt=space.document_prompt,
            query_prompt=space.query_prompt,
        )
    except ModelError as error:
        if model is not None:
            raise
        fail(f"{space.label}: {error} Say where the new model is with --model.")


def _some(vectors: Embeddings, index: Index, n: int, seed: int) -> Embeddings:
    """Return some vectors whose ids the index has."""
    snapshot = index._home.snapshot()
    there = snapshot.look_up(snapshot.layout.id_column(vectors.ids)) >= 0
    if not there.any():
        raise DataError(
            f"none of the {len(vectors):,} ids of the vectors is one of {index.path}; theirs begin "
            f"with {vectors.ids[0].item()!r}."
        )
    return vectors[np.random.default_rng(seed).permutation(np.flatnonzero(there))[:n]]


def _counts(path: Path, index: Index) -> dict[Any, float]:
    """Read how often ids were returned or asked for."""
    from nestvec.upgrade.order import count_ids

    parts = [line.split("\t") for line in read_lines(path)]
    ids = as_ids([part[0] for part in parts], id_type_of(index)) or []
    if all(len(part) == 1 for part in parts):
        return count_ids(ids)
    try:
        return {one: float(count) for one, (_, count) in zip(ids, parts, strict=True)}
    except ValueError:
        raise DataError(
            f"{path}: each line is an id, or each is an id, a tab and a count."
        ) from None
