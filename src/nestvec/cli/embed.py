"""nestvec embed: raw text to vectors that know their Space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nestvec.cli._common import Column, Json, Role, command, describe, note, out, print_json
from nestvec.space import Embeddings

if TYPE_CHECKING:
    from nestvec.corpus import RetrievalSet, Texts
    from nestvec.encoders import Encoder
    from nestvec.maps.base import FittedMap

EPILOG = """
Examples:

  nestvec embed notes/ -o docs.safetensors                   (a folder of text, split to passages)

  nestvec embed scifact/ --role query -o asks.safetensors    (the queries of a BEIR folder)

  nestvec embed docs.jsonl -o docs.parquet --model nomic-ai/nomic-embed-text-v1.5

  nestvec embed docs.csv -o docs.safetensors --map nest/     (embedded, then mapped)
"""


@command
def embed(
    source: Annotated[
        Path,
        typer.Argument(
            help="Text: a file (.txt, .md, .jsonl, .csv, .parquet, ...), a folder of them, or a "
            "BEIR-layout folder.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help=".safetensors, .npz, .parquet, .arrow or .lance",
            show_default=False,
        ),
    ],
    model: Annotated[
        str, typer.Option(help="Hub id or folder of a sentence-transformers model.")
    ] = "all-MiniLM-L6-v2",
    revision: Annotated[
        str | None, typer.Option(help="Revision of a hub model.", show_default=False)
    ] = None,
    role: Annotated[Role, typer.Option(help="What the texts are.")] = "document",
    column: Column = None,
    document_prompt: Annotated[
        str | None, typer.Option(help="Text put before documents.", show_default=False)
    ] = None,
    query_prompt: Annotated[
        str | None, typer.Option(help="Text put before queries.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts encoded together.")] = 64,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens read of each text; by default the model's.", show_default=False),
    ] = None,
    map: Annotated[
        list[Path] | None,
        typer.Option(help="A fitted map to apply; repeat to apply several.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Embed text. Interrupted, the same command goes on from where it stopped."""
    from nestvec.encoders import TextEncoder
    from nestvec.maps import load_map

    maps = [load_map(folder) for folder in map or []]
    texts = read_source(source, role, column)
    encoder = TextEncoder(
        model,
        revision=revision,
        document_prompt=document_prompt,
        query_prompt=query_prompt,
        batch_size=batch_size,
        max_length=max_length,
    )
    note(f"model: {encoder.source}")
    found = embed_to(encoder, texts.texts, texts.ids, role, output, maps=maps)
    if json:
        print_json(
            {
                "output": str(output),
                "n": len(found),
                "n_cut": encoder.report.n_cut if encoder.report else None,
                "source": encoder.source,
                "space": describe(found.space),
            }
        )
    else:
        out.print(f"{output}: {found!r}", markup=False)


def embed_set(
    encoder: Encoder, found: RetrievalSet, folder: Path, *, queries: str = "queries"
) -> tuple[Embeddings, Embeddings]:
    """Embed documents and queries into a folder, or read again what an earlier run put there."""
    docs = embed_to(
        encoder,
        found.doc_texts,
        found.doc_ids,
        "document",
        folder / "docs.safetensors",
        reuse=True,
    )
    asks = embed_to(
        encoder,
        found.query_texts,
        found.query_ids,
        "query",
        folder / f"{queries}.safetensors",
        reuse=True,
    )
    return docs, asks


def read_source(source: Path, role: Role, column: str | None = None) -> Texts:
    """Read the texts of a file or folder, or the documents or queries of a BEIR-layout folder."""
    from nestvec.corpus import read_beir_texts, read_texts

    if source.is_dir() and any(source.glob("corpus.jsonl*")):
        return read_beir_texts(source, role)
    return read_texts(source, column=column)


def embed_to(
    encoder: Encoder,
    texts: Sequence[str],
    ids: Sequence[str],
    role: Role,
    output: Path,
    *,
    reuse: bool = False,
    maps: Sequence[FittedMap] = (),
) -> Embeddings:
    """Encode to ``output`` with progress and resume, through the maps if there are any."""
    direct = output if not maps else output.with_name(f"{output.name}.unmapped.safetensors")
    try:
        found = encoder.encode_to(
            direct, texts, reuse=reuse or bool(maps), ids=list(ids), role=role, show_progress=True
        )
    except KeyboardInterrupt:
        if direct.with_name(f"{direct.name}.partial").is_dir():
            note("\nwhat was embedded is kept: the same command goes on from it")
        raise
    for one in maps:
        found = one.transform(found)
    if maps:
        found.save(output)
        for made in (direct, direct.with_name(f"{direct.name}.key")):
            made.unlink()
    return found
