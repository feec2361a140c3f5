"""nestvec search: run a plan over an index or a file of vectors, for query vectors or for words."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from nestvec.cli._common import Json, ModelName, command, fail, prompted, read_lines
from nestvec.cli._galleries import Filed, Indexed
from nestvec.cli._index import is_index
from nestvec.cli.embed import read_source
from nestvec.errors import ModelError
from nestvec.space import Embeddings, Space

EPILOG = """
Examples:

  nestvec search docs.nest "how do I cut a vector" --column title --filter "year >= 2020"

  nestvec search docs.nest --queries asks.safetensors -k 3 --json    (by the plan that was stored)

  nestvec search docs.safetensors "how do I cut a vector" --texts docs/

  nestvec search docs.safetensors --queries asks.safetensors --plan "64:int8@400 > 384@10" --json

  cat questions.txt | nestvec search docs.nest - -k 3
"""


@command
def search(
    gallery: Annotated[
        Path, typer.Argument(help="An index, or a file of vectors.", show_default=False)
    ],
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
            help='Stages dim[:precision]@keep, like "64@100 > 384@10", and for an index maybe a '
            "structure before them, like graph(ef=80). By default the plan that nestvec plan "
            "stored, else one exact pass.",
            show_default=False,
        ),
    ] = None,
    cascade: Annotated[
        str | None,
        typer.Option(
            help='Scan every row by these stages, like "64@100 > 384@10", instead of --plan.',
            show_default=False,
        ),
    ] = None,
    dims: Annotated[
        int | None,
        typer.Option(help="Score every row at this size, instead of --plan.", show_default=False),
    ] = None,
    recall: Annotated[
        float | None,
        typer.Option(
            help="Index: the cheapest plan that nestvec plan certified for this recall.",
            show_default=False,
        ),
    ] = None,
    k: Annotated[
        int | None,
        typer.Option("-k", min=1, help="Answers a query.", show_default="the plan's, or 10"),
    ] = None,
    filter: Annotated[
        str | None,
        typer.Option(
            help="Index: a condition on id and columns, like \"year >= 2020 AND lang = 'de'\".",
            show_default=False,
        ),
    ] = None,
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
        typer.Option(
            help="File: what it was embedded from, to print that beside the answers.",
            show_default=False,
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            help="Index: a column to print; repeat for more. File: the column of --texts that "
            "holds the text.",
            show_default=False,
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens read of each text, if the gallery's was set.", show_default=False
        ),
    ] = None,
    allow_untrained: Annotated[
        bool, typer.Option(help="Accept sizes that are not nesting dims.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say where each answer stood after each stage.")
    ] = False,
    model_name: ModelName = None,
    json: Json = False,
) -> None:
    """Search an index or a file of vectors: cheap first, then exact."""
    if recall is not None and (plan, cascade, dims) != (None, None, None):
        fail("--recall finds the plan itself: leave out --plan, --cascade and --dims.")
    ways = {"--plan": plan, "--cascade": cascade, "--dims": dims}
    given = [option for option, value in ways.items() if value is not None]
    if len(given) > 1:
        fail(f"{' and '.join(given)} say the same thing twice: leave out one.")
    if cascade is not None:
        from nestvec.search import Cascade

        plan = f"exact {Cascade.parse(cascade)}"
    if queries is not None and query is not None:
        fail("give words or --queries, not both.")
    if is_index(gallery):
        if texts is not None:
            fail("--texts is for files; of an index, name columns to print with --column.")
        found = Indexed(gallery, plan, dims, recall, k, filter, column, explain)
    else:
        if filter is not None:
            fail(f"--filter is for an index, and {gallery} is a file.")
        if recall is not None:
            fail(f"--recall is for an index, whose plans are certified, and {gallery} is a file.")
        if column and (texts is None or len(column) > 1):
            fail("--column is for a file the one column of --texts that holds the text.")
        bodies = _texts_of(texts, column[0] if column else None)
        found = Filed(gallery, plan, dims, k, bodies, allow_untrained, explain, model_name)
    if queries is not None:
        asked = found.read(queries, model_name)
        found.show([str(i) for i in asked.ids.tolist()], asked, json)
        return
    # another model than the gallery's is the one that it is upgraded to
    space = found.space if model is None or found.new_space is None else found.new_space
    ask = _encoder_like(space, model, max_length, map or [], allow_untrained)
    if query is None and sys.stdin.isatty():
        for words in prompted("search (an empty line ends)"):
            found.show([words], ask([words]), json)
        return
    asked_words = [query] if query not in (None, "-") else read_lines(Path("-"))
    if not asked_words:
        fail("no query: write one behind the gallery, or one a line on stdin.")
    found.show(asked_words, ask(asked_words), json)


def _encoder_like(
    space: Space,
    model: str | None,
    max_length: int | None,
    maps: list[Path],
    allow_untrained: bool,
) -> Callable[[list[str]], Embeddings]:
    """Return words -> Embeddings in the gallery's Space, or say what is missing."""
    from nestvec.encoders import TextEncoder
    from nestvec.maps import load_map

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
            layer=space.layer,
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
