"""nestvec mine: hard negatives for pairs of queries and relevant documents."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from nestvec.cli._common import Json, command, fail, note, out, print_json

EPILOG = """
Examples:

  nestvec mine scifact/ -o hard.jsonl                      (a BEIR folder: its train qrels)

  nestvec mine pairs.jsonl -o hard.jsonl --model my-model  (columns anchor, positive)

  nestvec mine scifact/ -o hard.jsonl --ranks 10-200 --n-negatives 4 --highest-share 0.9

  nestvec mine scifact/ -o hard.jsonl --index scifact.nest

  nestvec train text hard.jsonl -o my-model
"""


@command
def mine(
    source: Annotated[
        Path,
        typer.Argument(
            help="Pairs (.jsonl, .csv, .tsv, .parquet, a datasets folder) or a BEIR-layout folder.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Triplets: a .jsonl file.", show_default=False),
    ],
    model: Annotated[
        str, typer.Option(help="Hub id or folder of the model whose mistakes are wanted.")
    ] = "all-MiniLM-L6-v2",
    index: Annotated[
        Path | None,
        typer.Option(
            help="An index of the documents, made with this model, to search by its stored plan; "
            "by default their vectors are made and searched exactly.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str,
        typer.Option(help="Of a BEIR folder: whose judgements; of a datasets folder: its rows."),
    ] = "train",
    ranks: Annotated[
        str, typer.Option(help="Places of each query's ranking that negatives are drawn from.")
    ] = "1-100",
    n_negatives: Annotated[int, typer.Option(min=1, help="Negatives a pair.")] = 1,
    highest_share: Annotated[
        float,
        typer.Option(
            help="Leave out what scores above this share of the relevant document; 0 keeps it."
        ),
    ] = 0.95,
    near_duplicate: Annotated[
        float,
        typer.Option(
            help="Leave out what has this cosine or more with the relevant document; 0 keeps it."
        ),
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    json: Json = False,
) -> None:
    """Mine hard negatives: triplets for `nestvec train text`. Interrupted, the same goes on."""
    from nestvec.cli.embed import embed_set, embed_to
    from nestvec.corpus import read_beir, read_examples, write_examples
    from nestvec.corpus.written import check_examples_path
    from nestvec.encoders import encoder_of
    from nestvec.train.mining import as_retrieval_set, mine_negatives

    check_examples_path(output)
    first, _, last = ranks.partition("-")
    if not (first.isdigit() and last.isdigit()):
        fail(f"--ranks {ranks!r}: give two places, like 1-100.")
    judged = source.is_dir() and any(source.glob("corpus.jsonl*"))
    found = (
        read_beir(source, split=split)
        if judged
        else as_retrieval_set(read_examples(source, split=split, kind="pairs"))
    )
    encoder = encoder_of(model)
    vectors = output.with_name(f"{output.name}.vectors")
    if index is None:
        documents, queries = embed_set(encoder, found, vectors)
    else:
        from nestvec.search import Index

        documents = Index.open(index)
        place = vectors / "queries.safetensors"
        texts, ids = found.query_texts, found.query_ids
        queries = embed_to(encoder, texts, ids, "query", place, reuse=True)
    mined = mine_negatives(
        found,
        documents=documents,
        queries=queries,
        ranks=(int(first), int(last)),
        n_negatives=n_negatives,
        highest_share=highest_share or None,
        near_duplicate=near_duplicate or None,
        seed=seed,
    )
    write_examples(mined.examples, output)
    shutil.rmtree(vectors, ignore_errors=True)
    if json:
        counts = {k: v for k, v in vars(mined).items() if k != "examples"}
        print_json({"output": str(output), "n": len(mined.examples), **counts})
        return
    out.print(f"{output}: {mined.sentence()}", markup=False)
    note(f"next: nestvec train text {output} -o my-model --model {model}")
