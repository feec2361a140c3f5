"""nestvec embed: raw text or images to vectors that know their Space."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestvec._atomic import written_beside
from nestvec.cli._common import Column, Json, Role, command, describe, fail, note, out, print_json
from nestvec.space import Embeddings

if TYPE_CHECKING:
    from nestvec.corpus import Images, RetrievalSet, Texts
    from nestvec.encoders import Encoder
    from nestvec.maps.base import FittedMap

EPILOG = """
Examples:

  nestvec embed notes/ -o docs.safetensors                   (a folder of text, split to passages)

  nestvec embed scifact/ --role query -o asks.safetensors    (the queries of a BEIR folder)

  nestvec embed docs.jsonl -o docs.parquet --model nomic-ai/nomic-embed-text-v1.5

  nestvec embed docs.csv -o docs.safetensors --map nest/     (embedded, then mapped)

  nestvec embed docs.jsonl -o docs.safetensors --model my-model --layer 3   (half the encoder)

  nestvec embed cifar.npz --split test -o test.safetensors --model resnet/ --labels test.txt
"""


@command
def embed(
    source: Annotated[
        Path,
        typer.Argument(
            help="Text: a file (.txt, .md, .jsonl, .csv, .parquet, ...), a folder of them, or a "
            "BEIR-layout folder. Images, for an image model: a folder of files or of one folder a "
            "class, an .npz, or a Hugging Face datasets folder.",
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
        str,
        typer.Option(
            help="Hub id or folder of a sentence-transformers model, or folder of an image model."
        ),
    ] = "all-MiniLM-L6-v2",
    revision: Annotated[
        str | None, typer.Option(help="Revision of a hub model.", show_default=False)
    ] = None,
    role: Annotated[Role, typer.Option(help="What the texts or images are.")] = "document",
    column: Column = None,
    document_prompt: Annotated[
        str | None, typer.Option(help="Text put before documents.", show_default=False)
    ] = None,
    query_prompt: Annotated[
        str | None, typer.Option(help="Text put before queries.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts or images encoded together.")] = 64,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens read of each text; by default the model's.", show_default=False),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            help="Leave the model after this transformer layer, counted from 1.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the images, like train.", show_default=False)
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Write the images' classes here, one a line, as `nestvec measure` reads them.",
            show_default=False,
        ),
    ] = None,
    map: Annotated[
        list[Path] | None,
        typer.Option(help="A fitted map to apply; repeat to apply several.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Embed text or images. Interrupted, the same command goes on from where it stopped."""
    from nestvec.encoders import encoder_of
    from nestvec.encoders.image import is_image_model
    from nestvec.maps import load_map

    maps = [load_map(folder) for folder in map or []]
    of_text = {
        "revision": revision,
        "document_prompt": document_prompt,
        "query_prompt": query_prompt,
        "max_length": max_length,
        "layer": layer,
    }
    if is_image_model(model):
        _refuse({**of_text, "column": column}, f"{model} is an image model")
        found = _read_images(source, split, labels)
        ids, items, settings = found.ids, found.images, {}
    else:
        _refuse({"split": split, "labels": labels}, f"{model} is no folder of an image model")
        texts = read_source(source, role, column)
        ids, items, settings = texts.ids, texts.texts, of_text
    encoder = encoder_of(model, batch_size=batch_size, **settings)
    note(f"model: {encoder.source}")
    vectors = embed_to(encoder, items, ids, role, output, maps=maps)
    if json:
        print_json(
            {
                "output": str(output),
                "n": len(vectors),
                "n_cut": encoder.report.n_cut,
                "source": encoder.source,
                "space": describe(vectors.space),
            }
        )
    else:
        out.print(f"{output}: {vectors!r}", markup=False)


def _refuse(options: dict[str, Any], why: str) -> None:
    """Fail if an option was given that this kind of model has no use for."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        fail(f"{why}, so --{given[0].replace('_', '-')} has no meaning here. Leave it out.")


def _read_images(source: Path, split: str | None, labels: Path | None) -> Images:
    from nestvec.corpus import read_images

    found = read_images(source, split=split)
    if labels is not None:
        if found.labels is None:
            fail(f"{source} has no labels to write to {labels}. Leave --labels out.")
        names = found.label_names
        lines = [str(i) if names is None else names[i] for i in found.labels]
        with written_beside(labels) as scratch:
            scratch.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return found


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
    items: Iterable[Any],
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
            direct, items, reuse=reuse or bool(maps), ids=list(ids), role=role, show_progress=True
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
