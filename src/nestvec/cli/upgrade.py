"""nestvec upgrade: change the model, keep the gallery."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from nestvec.cli import _upgrade_live as live
from nestvec.cli._common import (
    Dims,
    Json,
    LabelColumn,
    ModelName,
    command,
    describe,
    note,
    out,
    print_json,
    read_labels,
)
from nestvec.space import Embeddings

if TYPE_CHECKING:
    from nestvec.upgrade import Judgement

HELP = "Change the model, keep the gallery, know that it is safe."

FIT_EPILOG = """
Examples:

  nestvec upgrade fit --old sample-old.npz --new sample-new.npz -o bridge/

  nestvec upgrade fit --old old.npz --new new.npz -o bridge/ --kind procrustes --kind relaxed

  nestvec upgrade fit --old old.npz --new new.npz -o bridge/ --nested --dims 64,128,384
"""
APPLY_EPILOG = """
Examples:

  nestvec upgrade apply queries-new.npz --bridge bridge/ -o queries-old.npz

  nestvec search docs-old.nest --queries queries-old.npz
"""

JUDGE_EPILOG = """
Exit code: 0 if it is safe (at full size at least), 1 if not, 2 if it cannot be judged as given.

Examples:

  nestvec upgrade judge --old-docs d1.npz --old-queries q1.npz --new-docs d2.npz
  --new-queries q2.npz --bridge bridge/ --qrels qrels.tsv

  nestvec upgrade judge ... --bridge bridge/                   (no labels: is anything changed?)

  nestvec upgrade judge ... --labels docs.txt --query-labels asks.txt    (classes, one a line)

  nestvec upgrade judge ... --qrels qrels.tsv                  (a model trained compatible)
"""

app = typer.Typer(no_args_is_help=True, help=HELP)

Bridge = Annotated[
    Path,
    typer.Option(help="Folder of a bridge, as nestvec upgrade fit writes it.", show_default=False),
]


@app.command(epilog=FIT_EPILOG)
@command
def fit(
    old: Annotated[
        Path, typer.Option(help="Vectors of some texts by the old model.", show_default=False)
    ],
    new: Annotated[
        Path,
        typer.Option(
            help="Vectors of the same texts by the new model; rows are paired by id.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the bridge.", show_default=False)
    ],
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="A kind of bridge to try: unchanged, procrustes, drift, stiff, relaxed, ridge, "
            "low_rank, residual. "
            "Repeat for more; by default all that fit.",
            show_default=False,
        ),
    ] = None,
    moves: Annotated[
        str,
        typer.Option(
            help="What the bridge will move: queries (new queries search the old gallery) or "
            "gallery (old vectors go to the new space)."
        ),
    ] = "queries",
    teacher: Annotated[
        str,
        typer.Option(
            help="Whose neighbours the bridge should find: old, new (what re-embedding would "
            "give), or both if you do not know which model is better."
        ),
    ] = "both",
    nested: Annotated[
        bool,
        typer.Option("--nested", help="A prefix of the input gives that prefix of the output."),
    ] = False,
    dims: Dims = None,
    sample_size: Annotated[int, typer.Option(min=1, help="Pairs to learn from, at most.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling and splitting.")] = 0,
    model_name: ModelName = None,
    json: Json = False,
) -> None:
    """Fit the best bridge between two models from a sample that both have encoded."""
    from nestvec import upgrade
    from nestvec.maps.base import check_folder
    from nestvec.space.nesting import parse_dims

    check_folder(output)
    bridge = upgrade.fit(
        old=Embeddings.load(old, space=model_name),
        new=Embeddings.load(new, space=model_name),
        kinds=kind,
        moves=moves,
        teacher=teacher,
        dims=parse_dims(dims) if dims else None,
        nested=nested,
        sample_size=sample_size,
        random_state=seed,
    )
    bridge.save(output)
    assert bridge.guard_ is not None
    if json:
        print_json(
            {
                "output": str(output),
                "kind": bridge.guard_.winner,
                "content_hash": bridge.content_hash,
                "dims": list(bridge.dims_),
                "guard": bridge.guard_.to_dict(),
                "from": describe(bridge.space_) if bridge.space_ else None,
                "to": describe(bridge.target_) if bridge.target_ else None,
            }
        )
        return
    out.print(bridge.guard_.sentence(), markup=False)
    out.print(f"{output}: bridge {bridge.content_hash}", markup=False)
    note(f"next: nestvec upgrade judge --bridge {output} ..., or nestvec upgrade apply")


@app.command(epilog=JUDGE_EPILOG)
@command
def judge(
    old_docs: Annotated[
        Path, typer.Option(help="A sample of the gallery, by the old model.", show_default=False)
    ],
    old_queries: Annotated[
        Path, typer.Option(help="Queries, by the old model.", show_default=False)
    ],
    new_docs: Annotated[
        Path, typer.Option(help="The same documents, by the new model.", show_default=False)
    ],
    new_queries: Annotated[
        Path, typer.Option(help="The same queries, by the new model.", show_default=False)
    ],
    bridge: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the bridge; none for a model that was trained compatible.",
            show_default=False,
        ),
    ] = None,
    qrels: Annotated[
        Path | None, typer.Option(help="Relevance labels, TSV or TREC.", show_default=False)
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Classes of the documents, one a line or a table (.jsonl, .csv, ...).",
            show_default=False,
        ),
    ] = None,
    query_labels: Annotated[
        Path | None, typer.Option(help="Classes of the queries.", show_default=False)
    ] = None,
    label_column: LabelColumn = None,
    dims: Dims = None,
    k: Annotated[int, typer.Option(help="Depth of the metric.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the resamples.")] = 0,
    model_name: ModelName = None,
    json: Json = False,
) -> None:
    """Say whether new queries may be served from the old gallery, at every size."""
    from nestvec import upgrade
    from nestvec.corpus import read_qrels
    from nestvec.maps import load_map
    from nestvec.space.nesting import parse_dims

    def load(path: Path) -> Embeddings:
        return Embeddings.load(path, space=model_name)

    found = upgrade.judge(
        old_docs=load(old_docs),
        old_queries=load(old_queries),
        new_docs=load(new_docs),
        new_queries=load(new_queries),
        bridge=load_map(bridge) if bridge else None,
        qrels=read_qrels(qrels) if qrels else None,
        doc_labels=read_labels(labels, label_column) if labels else None,
        query_labels=read_labels(query_labels, label_column) if query_labels else None,
        dims=parse_dims(dims) if dims else None,
        k=k,
        seed=seed,
    )
    if json:
        print_json(found.to_dict())
    else:
        out.print(_table(found))
        out.print(_beside(found))
        out.print(found.sentence(), markup=False)
        for one in found.notes:
            note(one)
    if not found.safe:
        raise typer.Exit(1)


def _table(found: Judgement) -> Table:
    title = f"{found.metric}, {found.n_queries:,} queries, {found.n_docs:,} documents"
    table = _sized(title, "old/old", "new/old", "new/new", "new/old - old/old", "at least", "")
    for size in found.sizes:
        change = size.difference
        if found.safe_from is not None and size.dim >= found.safe_from:
            verdict = "safe"
        else:  # below the first that is not, nothing is called safe
            verdict = "not safe" if found.doubt or not size.safe else "-"
        table.add_row(
            str(size.dim),
            *(f"{s.value:.3f}" for s in (size.old_old, size.new_old, size.new_new)),
            f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]",
            f"{size.at_least:+.3f}",
            verdict,
        )
    return table


def _beside(found: Judgement) -> Table:
    table = _sized(None, "worse", "better", "violations", "update gain")
    for size in found.sizes:
        gain = size.update_gain
        table.add_row(
            str(size.dim),
            f"{size.negative_flips:.0%}",
            f"{size.positive_flips:.0%}",
            f"{size.violations_relevant:.0%} / {size.violations_other:.0%}",
            "-" if gain is None else f"{gain.value:.2f} [{gain.low:.2f}, {gain.high:.2f}]",
        )
    return table


def _sized(title: str | None, *columns: str) -> Table:
    table = Table(title=title, box=None, title_justify="left")
    for name in ("dim", *columns):
        table.add_column(name, justify="right", no_wrap=True)
    return table


@app.command(epilog=APPLY_EPILOG)
@command
def apply(
    vectors: Annotated[
        Path, typer.Argument(help="Vectors of the side the bridge moves.", show_default=False)
    ],
    bridge: Bridge,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Where they go.", show_default=False)
    ],
    model_name: ModelName = None,
    json: Json = False,
) -> None:
    """Take vectors through a bridge: then they compare with the gallery on the other side."""
    from nestvec.maps import load_map

    moved = load_map(bridge).transform(Embeddings.load(vectors, space=model_name))
    moved.save(output)
    if json:
        print_json({"output": str(output), "n": len(moved), "space": describe(moved.space)})
    else:
        out.print(f"{output}: {moved!r}", markup=False)


app.command(epilog=live.PLAN_EPILOG)(live.plan)
app.command(epilog=live.START_EPILOG)(live.start)
app.command(epilog=live.STATUS_EPILOG)(live.status)
app.command(epilog=live.BACKFILL_EPILOG)(live.backfill)
app.command(epilog=live.FINISH_EPILOG)(live.finish)
app.command(epilog=live.ROLLBACK_EPILOG)(live.rollback)
