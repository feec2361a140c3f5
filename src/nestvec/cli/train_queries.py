"""nestvec train queries: a query encoder for documents that stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestvec.cli._common import Json, command, note
from nestvec.cli.train import (
    BatchSize,
    Dims,
    Epochs,
    Fresh,
    Holdout,
    LogTo,
    MaxSteps,
    Output,
    Precision,
    SaveEvery,
    Weights,
    _run,
    _weights,
    app,
)

EPILOG = """
Examples:

  nestvec train queries scifact/ --documents docs.nest -o asks         (an index, as it is)

  nestvec train queries scifact/ --documents docs.safetensors -o asks --model my-model

  nestvec search docs.nest "does zinc help?" --model asks
"""


@app.command(epilog=EPILOG)
@command
def queries(
    source: Annotated[
        Path,
        typer.Argument(
            help="A BEIR-layout folder: its queries, and the judgements of SPLIT.",
            show_default=False,
        ),
    ],
    documents: Annotated[
        Path,
        typer.Option(
            help="The documents' vectors, by the folder's ids: an index or a file. Only read.",
            show_default=False,
        ),
    ],
    output: Output,
    model: Annotated[
        str, typer.Option(help="The model that encoded the documents, to begin from.")
    ] = "all-MiniLM-L6-v2",
    split: Annotated[str, typer.Option(help="Whose judgements.")] = "train",
    dims: Dims = None,
    k: Annotated[
        int, typer.Option(min=1, help="Documents found now that are each query's negatives.")
    ] = 200,
    holdout: Holdout = None,
    keep: Annotated[
        float,
        typer.Option(min=0, help="Hold on to the neighbours among queries before: a weight."),
    ] = 0.0,
    weights: Weights = "uniform",
    freeze_layers: Annotated[
        int, typer.Option(min=0, help="Transformer layers, from the bottom, left as they are.")
    ] = 0,
    epochs: Epochs = 10,
    max_steps: MaxSteps = -1,
    batch_size: BatchSize = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-5,
    precision: Precision = "auto",
    save_every: SaveEvery = 0.1,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    log_to: LogTo = None,
    fresh: Fresh = False,
    json: Json = False,
) -> None:
    """Train the query side alone: documents and indexes stay. Interrupted, the same goes on."""
    from nestvec.corpus import Texts, read_beir
    from nestvec.space.files import load
    from nestvec.train import Settings, train_queries

    found = read_beir(source, split=split)
    if documents.is_dir() and documents.suffix != ".lance":
        from nestvec.search import Index

        vectors = Index.open(documents).embeddings()
    else:
        vectors = load(documents)
    note(f"{documents}: {len(vectors):,} documents, frozen")
    settings = Settings(
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        precision=precision,
        save_every=save_every,
        seed=seed,
        log_to=tuple(log_to or ()),
    )
    _run(
        lambda: train_queries(
            model,
            vectors,
            Texts(found.query_ids, found.query_texts),
            found.qrels,
            output,
            dims=dims,
            k=k,
            holdout=holdout,
            keep=keep,
            weights=_weights(weights),
            freeze_layers=freeze_layers,
            settings=settings,
            fresh=fresh,
        ),
        output,
        settings,
        json,
    )
