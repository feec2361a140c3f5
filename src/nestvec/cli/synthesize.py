"""nestvec synthesize: training pairs from a corpus that has no labels."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from nestvec.cli._common import Column, Json, command, note, out, print_json

EPILOG = """
Examples:

  nestvec synthesize notes/ -o pairs.jsonl                       (first sentences ask for the rest)

  nestvec synthesize scifact/ -o pairs.jsonl --queries title     (titles ask for abstracts)

  nestvec synthesize docs.jsonl -o triplets.jsonl --n-negatives 1

  nestvec train text pairs.jsonl -o my-model --keep 1
"""


@command
def synthesize(
    source: Annotated[
        Path,
        typer.Argument(
            help="Text: a file (.txt, .md, .jsonl, .csv, .parquet, ...), a folder of them, or a "
            "BEIR-layout folder, whose queries and judgements are not looked at.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Pairs or triplets: .jsonl.", show_default=False),
    ],
    n: Annotated[int, typer.Option("--n", min=1, help="Documents to draw.")] = 1000,
    queries: Annotated[
        str,
        typer.Option(
            help="What asks for a document: title (of a BEIR folder), summary (its heading or "
            "first sentence) or lead (its first 10 words). A function of yours: in Python."
        ),
    ] = "summary",
    model: Annotated[
        str, typer.Option(help="Hub id or folder of the model that clusters and mines.")
    ] = "all-MiniLM-L6-v2",
    column: Column = None,
    n_clusters: Annotated[
        int | None,
        typer.Option(min=1, help="Clusters to draw from.", show_default="one for ten documents"),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Of the draw in a cluster: lower stays nearer to its centre.")
    ] = 1.0,
    n_negatives: Annotated[
        int, typer.Option(min=0, help="Hard negatives a pair, as `nestvec mine` finds them.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    json: Json = False,
) -> None:
    """Make training pairs of a corpus that has no labels. Interrupted, the same goes on."""
    from nestvec.cli.embed import embed_to, read_source
    from nestvec.corpus import query_rule, read_beir_titles, write_examples
    from nestvec.corpus.written import check_examples_path
    from nestvec.encoders import encoder_of
    from nestvec.train import mine_negatives
    from nestvec.train import synthesize as synthesised

    check_examples_path(output)
    query_rule(queries)  # a name that is none is said before the work
    texts = read_source(source, "document", column)
    titles = None
    if source.is_dir() and any(source.glob("corpus.jsonl*")):
        known = read_beir_titles(source)
        titles = [known[one] for one in texts.ids]
    encoder = encoder_of(model)
    folder = output.with_name(f"{output.name}.vectors")
    place = folder / "docs.safetensors"
    vectors = embed_to(encoder, texts.texts, texts.ids, "document", place, reuse=True)
    made = synthesised(
        texts,
        n,
        queries=queries,
        titles=titles,
        vectors=vectors,
        n_clusters=n_clusters,
        temperature=temperature,
        seed=seed,
    )
    examples, lines = made.examples, [made.sentence()]
    if n_negatives:
        mined = mine_negatives(made.found, model=encoder, n_negatives=n_negatives, seed=seed)
        examples = mined.examples
        lines.append(mined.sentence())
    write_examples(examples, output)
    shutil.rmtree(folder, ignore_errors=True)
    if json:
        counts = {k: v for k, v in vars(made).items() if k not in ("found", "examples")}
        print_json({"output": str(output), "kind": examples.kind, "n": len(examples), **counts})
        return
    for line in lines:
        out.print(f"{output}: {line}", markup=False)
    note(f"next: nestvec train text {output} -o my-model --model {model} --keep 1")
