"""nestvec search: run a plan over a gallery, for query vectors or for words."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from nestvec.cli._common import (
    Column,
    Json,
    ModelName,
    command,
    describe,
    fail,
    note,
    out,
    print_json,
    prompted,
    read_lines,
)
from nestvec.cli.embed import read_source
from nestvec.errors import ModelError
from nestvec.search import SearchResult, as_plan, cascade_search
from nestvec.space import Embeddings

EPILOG = """
Examples:

  nestvec search docs.safetensors "how do I cut a vector" --texts docs/

  nestvec search docs.safetensors --queries asks.safetensors --plan "64:int8@400 > 384@10" --json

  cat questions.txt | nestvec search docs.safetensors - -k 3
"""


@command
def search(
    gallery: Annotated[Path, typer.Argument(help="Vectors to search.", show_default=False)],
    query: Annotated[
        str | None,
        typer.Argument(
            help="Words to look for; - reads one query a line from stdin. Left out on a terminal, "
            "you are asked.",
            show_default=False,
        ),
    ] = None,
    queries: Annotated[
        Path | None, typer.Option(help="Query vectors, instead of words.", show_default=False)
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            help='Stages dim[:precision]@keep, like "64@100 > 384@10". By default one exact pass.',
            show_default=False,
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Answers a query, without --plan.")] = 10,
    model: Annotated[
        str | None,
        typer.Option(help="Encoder for the words; by default the gallery's.", show_default=False),
    ] = None,
    map: Annotated[
        list[Path] | None,
        typer.Option(
            help="Map the gallery went through; the words follow it. Repeat in order.",
            show_default=False,
        ),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="What the gallery was embedded from, to print it.", show_default=False),
    ] = None,
    column: Column = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens read of each text, if the gallery's was set.", show_default=False
        ),
    ] = None,
    allow_untrained: Annotated[
        bool, typer.Option(help="Accept sizes that are not nesting dims.")
    ] = False,
    model_name: ModelName = None,
    json: Json = False,
) -> None:
    """Search a gallery: cheap first, then exact."""
    docs = Embeddings.load(gallery, space=model_name)
    chosen = as_plan(plan, dim=docs.dim, k=k)
    bodies = _texts_of(texts, column)
    if queries is not None:
        if query is not None:
            fail("give words or --queries, not both.")
        asked = Embeddings.load(queries, space=model_name)
        found = cascade_search(asked, docs, chosen, allow_untrained=allow_untrained)
        _show([str(i) for i in asked.ids.tolist()], found, bodies, docs, json)
        return
    ask = _encoder_like(docs, model, max_length, map or [], allow_untrained)
    if query is None and sys.stdin.isatty():
        for words in prompted("search (an empty line ends)"):
            found = cascade_search(ask([words]), docs, chosen, allow_untrained=allow_untrained)
            _show([words], found, bodies, docs, json)
        return
    asked_words = [query] if query not in (None, "-") else read_lines(Path("-"))
    if not asked_words:
        fail("no query: write one behind the gallery, or one a line on stdin.")
    found = cascade_search(ask(asked_words), docs, chosen, allow_untrained=allow_untrained)
    _show(asked_words, found, bodies, docs, json)


def _encoder_like(
    docs: Embeddings,
    model: str | None,
    max_length: int | None,
    maps: list[Path],
    allow_untrained: bool,
) -> Callable[[list[str]], Embeddings]:
    """Return words -> Embeddings in the gallery's Space, or say what is missing."""
    from nestvec.encoders import TextEncoder
    from nestvec.maps import load_map

    space = docs.space
    if space.fingerprint.startswith("declared:") and model is None:
        fail(
            f"{space.label} was stamped by name, so its encoder is not known. "
            f"Give query vectors with --queries, or the encoder with --model."
        )
    fitted = [load_map(folder) for folder in maps]
    commit = re.fullmatch("[0-9a-f]{40}", space.revision)
    try:
        encoder = TextEncoder(
            model or space.model,
            revision=space.revision if commit and model is None else None,
            document_prompt=space.document_prompt,
            query_prompt=space.query_prompt,
            max_length=max_length,
        )
    except ModelError as error:
        if model is not None:
            raise
        fail(f"{space.label}: {error} Say where the gallery's encoder is with --model.")

    def ask(words: list[str]) -> Embeddings:
        vectors = encoder.encode(words, role="query", show_progress=False)
        for one in fitted:
            vectors = one.transform(vectors)
        if space.cut is not None:
            vectors = vectors.prefix(space.cut, allow_untrained=allow_untrained)
        return vectors

    return ask


def _texts_of(path: Path | None, column: str | None) -> dict[str, str]:
    if path is None:
        return {}
    texts = read_source(path, "document", column)
    return dict(zip(texts.ids, texts.texts, strict=True))


def _show(
    asked: list[str], found: SearchResult, bodies: dict[str, str], docs: Embeddings, json: bool
) -> None:
    if json:
        print_json(
            {
                "space": describe(docs.space),
                "plan": str(found.plan),
                "n_gallery": len(docs),
                "macs_per_query": found.macs_per_query,
                "bytes_per_query": found.bytes_per_query,
                "queries": [
                    {"query": words, "hits": found.explain(row)} for row, words in enumerate(asked)
                ],
            }
        )
        return
    for row, words in enumerate(asked):
        table = Table(title=words, title_justify="left", title_style="bold", box=None)
        table.add_column("score", justify="right")
        table.add_column("id", overflow="fold")
        if bodies:
            table.add_column("text")
        for id_, score in zip(found.ids[row].tolist(), found.scores[row].tolist(), strict=True):
            text = [" ".join(bodies.get(str(id_), "").split())[:200]] if bodies else []
            table.add_row(f"{score:.4f}", str(id_), *text)
        out.print(table)
    exact = len(docs) * docs.dim
    note(
        f"{found.plan}: {found.macs_per_query:,} multiply-adds a query, "
        f"{found.macs_per_query / exact:.1%} of one exact full pass over {len(docs):,} vectors."
    )
