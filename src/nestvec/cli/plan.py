"""nestvec plan: find the cheapest plan of an index that keeps a budget, and certify it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from nestvec._atomic import make_way, written_beside
from nestvec._extras import require
from nestvec.cli._common import Json, ModelName, as_typed, command, fail, log, note, out, print_json
from nestvec.cli._index import Folder, open_index, read_queries

if TYPE_CHECKING:
    from nestvec.search import Planned

EPILOG = """
Examples:

  nestvec plan docs.nest --recall 0.99 --queries asks.safetensors

  nestvec plan docs.nest --ms 0.5 --plot plans.svg          (gallery rows stand in for queries)

  nestvec plan docs.nest --recall 0.95 --bytes 200 --structures exact,lists

  nestvec plan docs.nest --queries asks.safetensors --qrels qrels.tsv --ndcg-loss 0.005
"""

_PLOTS = (".png", ".svg", ".pdf")
_MARKERS = {"exact": "s", "graph": "o", "lists": "D"}


@command
def plan(
    index: Folder,
    recall: Annotated[
        float | None,
        typer.Option(
            help="Share of the exact neighbours to find; the cheapest plan that does is taken. "
            "0.99 if no budget is given.",
            show_default=False,
        ),
    ] = None,
    ms: Annotated[
        float | None,
        typer.Option(
            help="Milliseconds a query may take, asked alone, on one thread.", show_default=False
        ),
    ] = None,
    bytes: Annotated[
        float | None,
        typer.Option(help="Bytes a vector may take in memory.", show_default=False),
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option(
            help="Query vectors like those to come; by default rows of the gallery stand in.",
            show_default=False,
        ),
    ] = None,
    qrels: Annotated[
        Path | None,
        typer.Option(
            help="Relevant documents of the queries (TREC or BEIR .tsv); nDCG is measured then.",
            show_default=False,
        ),
    ] = None,
    ndcg_loss: Annotated[
        float | None,
        typer.Option(
            help="In place of --recall: how far nDCG may fall below exact full-size search.",
            show_default=False,
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Answers a query.")] = 10,
    confidence: Annotated[float, typer.Option(help="Of the certificate.")] = 0.95,
    structures: Annotated[
        str | None,
        typer.Option(
            help="Those to try, like graph,lists,faiss_hnsw; by default all of our own.",
            show_default=False,
        ),
    ] = None,
    n_queries: Annotated[
        int | None,
        typer.Option(
            min=20,
            help="At most so many queries; by default all, or 2000 rows of the gallery.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help=f"Draw recall against time ({', '.join(_PLOTS)}).", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do not store the plan in the index.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the queries that are drawn.")] = 0,
    model_name: ModelName = None,
    json: Json = False,
) -> None:
    """Find the cheapest plan for a budget, certify and store it; exit code 1 if there is none."""
    if plot is not None:
        _check_plot(plot)
    if qrels is not None and queries is None:
        fail("--qrels says what --queries look for: give both.")
    if ndcg_loss is not None and (qrels is None or recall is not None):
        fail("--ndcg-loss needs --qrels, and stands in place of --recall.")
    opened = open_index(index)
    asked = None if queries is None else read_queries(queries, opened.space, model_name)
    some: dict[str, Any] = {}
    if structures is not None:
        some["structures"] = structures.replace(",", " ").split()
    if qrels is not None:
        from nestvec.corpus import read_qrels

        some["qrels"] = read_qrels(qrels)
    found = opened.plan(
        asked,
        recall=recall,
        ndcg_loss=ndcg_loss,
        ms=ms,
        resident_bytes=bytes,
        k=k,
        confidence=confidence,
        n_queries=n_queries,
        seed=seed,
        keep=not dry_run,
        **some,
    )
    if plot is not None:
        _draw(found, plot)
    if json:
        from nestvec.search.planner import as_json

        chosen = None if found.plan is None else str(found.plan)
        print_json({"index": str(index), "plan": chosen, **as_json(found)})
    else:
        out.print(_table(found))
        said = as_typed(found.sentence)
        (log if found.plan is None else out).print(said, markup=False, highlight=False)
    if found.plan is None:
        raise typer.Exit(1)
    if not dry_run:
        note(f"stored: nestvec search {index} follows it")


def _table(found: Planned) -> Table:
    proven = found.proven()
    table = Table(box=None)
    quality = [f"recall@{found.k}", "proven"]
    if any(one.ndcg is not None for one in found.frontier):
        quality.append(f"nDCG@{found.k}")
    for name in (*quality, "ms", "bytes"):
        table.add_column(name, justify="right")
    table.add_column("plan", overflow="fold")
    for one in found.frontier:
        is_chosen = one.plan == found.plan
        table.add_row(
            f"{one.recall:.4f}",
            f"{proven[one.plan]:.4f}" if one.plan in proven else "",
            *([] if one.ndcg is None else [f"{one.ndcg:.4f}"]),
            f"{one.ms:.3g}",
            f"{one.resident_bytes:,.0f}",
            f"{one.plan}{'  <-' if is_chosen else ''}",
            style="bold" if is_chosen else None,
        )
    return table


def _check_plot(path: Path) -> None:
    if path.suffix.lower() not in _PLOTS:
        fail(f"--plot {path}: choose one of {', '.join(_PLOTS)}.")
    require("matplotlib", extra="measure", why="a plot")
    make_way(path)


def _draw(found: Planned, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#808080", alpha=0.2, linewidth=0.6)
    for name in dict.fromkeys(one.plan.structure for one in found.frontier):
        some = [(one.ms, one.recall) for one in found.frontier if one.plan.structure == name]
        if some:
            axes.plot(*zip(*some, strict=True), _MARKERS.get(name, "^"), label=name)
    for one in found.frontier:
        if one.plan == found.plan:
            axes.plot(one.ms, one.recall, "o", ms=14, mfc="none", mec="#009e73", mew=2)
            axes.set_title(str(one.plan), fontsize=10)
    for name, line in (("recall", axes.axhline), ("ms", axes.axvline)):
        if name in found.budget:
            line(found.budget[name], color="#808080", linewidth=1, linestyle=":")
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds a query, one thread")
    axes.set_ylabel(f"recall@{found.k}")
    if found.frontier:
        axes.legend(frameon=False, loc="lower right")
    with written_beside(path) as scratch:
        figure.savefig(scratch, format=path.suffix.lower()[1:], dpi=150)
