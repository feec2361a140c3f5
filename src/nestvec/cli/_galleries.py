"""What nestvec search runs over: a file of vectors, or an index."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from nestvec.cli._common import describe, note, out, print_json
from nestvec.cli._index import open_index, read_queries
from nestvec.space import Embeddings, Space

if TYPE_CHECKING:
    from nestvec.search import Hits


class Filed:
    """A file of vectors: every row is scored in the first stage."""

    def __init__(
        self,
        path: Path,
        plan: str | None,
        dims: int | None,
        k: int | None,
        bodies: dict[str, str],
        allow_untrained: bool,
        explain: bool,
        model_name: str | None,
    ) -> None:
        from nestvec.search import as_plan

        self._docs = Embeddings.load(path, space=model_name)
        self.space = self._docs.space
        self.new_space = None
        k = k or 10
        at_size = f"{dims}@{k}" if dims else None
        self._plan = as_plan(plan or at_size, dim=self._docs.dim, k=k)
        self._bodies, self._allow_untrained, self._explain = bodies, allow_untrained, explain

    def read(self, queries: Path, model_name: str | None) -> Embeddings:
        """Read query vectors."""
        return Embeddings.load(queries, space=model_name)

    def show(self, asked: list[str], queries: Embeddings, json: bool) -> None:
        """Search for the queries and print what was found."""
        from nestvec.search import cascade_search

        docs = self._docs
        found = cascade_search(queries, docs, self._plan, allow_untrained=self._allow_untrained)
        answers = [found.explain(row) for row in range(len(asked))]
        if json:
            print_json(
                {
                    "space": describe(docs.space),
                    "plan": str(found.plan),
                    "n_gallery": len(docs),
                    "macs_per_query": found.macs_per_query,
                    "bytes_per_query": found.bytes_per_query,
                    "queries": [
                        {"query": words, "hits": hits}
                        for words, hits in zip(asked, answers, strict=True)
                    ],
                }
            )
            return
        for words, hits in zip(asked, answers, strict=True):
            texts = {"text": [self._bodies.get(str(hit["id"]), "") for hit in hits]}
            _print_hits(words, hits, texts if self._bodies else {}, self._explain)
        exact = len(docs) * docs.dim
        note(
            f"{found.plan}: {found.macs_per_query:,} multiply-adds a query, "
            f"{found.macs_per_query / exact:.1%} of one exact full pass over {len(docs):,} vectors."
        )


class Indexed:
    """An index: it is searched by its stored plan, or by the one that is given."""

    def __init__(
        self,
        path: Path,
        plan: str | None,
        dims: int | None,
        recall: float | None,
        k: int | None,
        filter: str | None,
        columns: list[str] | None,
        explain: bool,
    ) -> None:
        self._index = open_index(path)
        self.space = self._index.space
        self._how: dict[str, Any] = {
            "k": k,
            "plan": plan,
            "dims": dims,
            "recall": recall,
            "filter": filter,
        }
        self._columns, self._explain = columns or None, explain

    @property
    def new_space(self) -> Space | None:
        """The Space that it is upgraded to."""
        return self._index.upgrading_to

    def read(self, queries: Path, model_name: str | None) -> Embeddings:
        """Read query vectors."""
        return read_queries(queries, self.space, model_name)

    def show(self, asked: list[str], queries: Embeddings, json: bool) -> None:
        """Search for the queries and print what was found."""
        hits = self._index.search(queries, **self._how, columns=self._columns)
        said = [hits.explain(row) for row in range(len(hits))]
        stages = said[0]["stages"]
        if json:
            print_json(
                {
                    "space": describe(queries.space),
                    "plan": str(hits.plan),
                    "version": hits.version,
                    "n_gallery": len(self._index),
                    "stages": stages,
                    "queries": [
                        {"query": words, "hits": _with_columns(hits, row, said[row]["answers"])}
                        for row, words in enumerate(asked)
                    ],
                }
            )
            return
        for row, words in enumerate(asked):
            held = {} if hits.payload is None else hits.payload[row].to_pydict()
            _print_hits(words, said[row]["answers"], held, self._explain)
        if self._explain:
            for stage in stages:
                note(f"{stage['stage']}: {stage['rows_scored']:,} rows scored a query")
        note(f"{hits.plan}: {len(self._index):,} rows, version {hits.version}.")


def _with_columns(hits: Hits, row: int, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if hits.payload is None:
        return answers
    held = hits.payload[row].to_pylist()
    return [{**one, "columns": more} for one, more in zip(answers, held, strict=True)]


def _print_hits(
    words: str, hits: list[dict[str, Any]], columns: dict[str, list[Any]], explain: bool
) -> None:
    """Print the answers to one query; ``columns`` hold a value a hit."""
    table = Table(title=escape(words), title_justify="left", title_style="bold", box=None)
    table.add_column("score", justify="right")
    table.add_column("id", overflow="fold")
    stages = list(hits[0]["place"]) if explain and hits else []
    for stage in stages:
        table.add_column(stage, justify="right")
    for name in columns:
        table.add_column(escape(name))
    for row, hit in enumerate(hits):
        places = [str(hit["place"][stage]) for stage in stages]
        shown = [" ".join(str(values[row]).split())[:200] for values in columns.values()]
        table.add_row(f"{hit['score']:.4f}", *map(escape, (str(hit["id"]), *places, *shown)))
    out.print(table)
