"""nestvec measure: what every size is worth, with intervals, beside the baselines."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestvec.cli._common import (
    Dims,
    Json,
    LabelColumn,
    ModelName,
    Role,
    command,
    fail,
    note,
    out,
    print_json,
    read_labels,
    read_lines,
)
from nestvec.space import Embeddings

if TYPE_CHECKING:
    from nestvec.corpus import RetrievalSet

EPILOG = """
Examples:

  nestvec measure docs.safetensors                                   (no labels at all)

  nestvec measure docs.npz --queries asks.npz --qrels qrels.tsv --html report.html

  nestvec measure scifact/ --map adaptor=nest/ -o curve.json    (a BEIR folder, embedded first)

  nestvec measure scifact/ --model my-model --layers all -o grid.json    (every layer and size)

  nestvec measure train.npz --labels train.txt --test test.npz --test-labels test.txt

  nestvec measure first.npz --second second.npz --scores scores.txt    (STS)
"""


@command
def measure(
    vectors: Annotated[
        Path,
        typer.Argument(
            help="Vectors of the documents, or a BEIR-layout folder, which is embedded first.",
            show_default=False,
        ),
    ],
    queries: Annotated[
        Path | None, typer.Option(help="Retrieval: query vectors.", show_default=False)
    ] = None,
    qrels: Annotated[
        Path | None,
        typer.Option(help="Retrieval: relevance labels, TSV or TREC.", show_default=False),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Classification: labels of VECTORS, one a line or a table (.jsonl, .csv, ...).",
            show_default=False,
        ),
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="Classification: test vectors.", show_default=False)
    ] = None,
    test_labels: Annotated[
        Path | None,
        typer.Option(help="Classification: labels of the test vectors.", show_default=False),
    ] = None,
    label_column: LabelColumn = None,
    second: Annotated[
        Path | None, typer.Option(help="STS: the other side of each pair.", show_default=False)
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="STS: a score a line.", show_default=False)
    ] = None,
    map: Annotated[
        list[str] | None,
        typer.Option(
            help="A fitted map to measure beside the vectors as they are: FOLDER or NAME=FOLDER. "
            "Repeat for more.",
            show_default=False,
        ),
    ] = None,
    dims: Dims = None,
    baselines: Annotated[
        str,
        typer.Option(
            help="all, none, or names joined by commas, like truncation,principal_rotation,int8."
        ),
    ] = "all",
    model: Annotated[
        str | None,
        typer.Option(
            help="Encoder for a BEIR folder; by default all-MiniLM-L6-v2.", show_default=False
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Of a BEIR folder: layers of the encoder to measure too, like 2,4,6, or all; in "
            "one pass.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Split of a BEIR folder; by default test.", show_default=False),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Where a BEIR folder's vectors are kept; by default NAME.nestvec here.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Write the rows as .json or .csv.", show_default=False),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write a report that opens offline.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of resamples and fitted baselines.")] = 0,
    model_name: ModelName = None,
    json: Json = False,
) -> None:
    """Measure every size: quality with an interval, bytes, multiply-adds, beside the baselines."""
    from nestvec.space.nesting import parse_dims

    if output is not None and output.suffix not in (".json", ".csv"):
        fail(f"cannot write rows to {output}: choose a name that ends in .json or .csv.")
    task, texts, name, of_layers = _task(
        vectors, queries, qrels, labels, test, test_labels, label_column, second, scores, model,
        layers, split, work, model_name,
    )  # fmt: skip
    from nestvec.measurement import measure as run

    curve = run(
        task=task,
        layers=of_layers,
        maps=_maps(map or []),
        dims=parse_dims(dims) if dims else None,
        baselines=_baselines(baselines),
        texts=texts,
        dataset=name,
        seed=seed,
        show_progress=True,
    )
    if output is not None:
        (curve.to_json if output.suffix == ".json" else curve.to_csv)(output)
    if html is not None:
        curve.report(html)
    if json:
        print_json({"verdict": curve.verdict(), "rows": curve.rows})
        return
    out.print(curve.table())
    if of_layers:
        out.print(curve.layer_table())
    out.print(curve.verdict(), markup=False)
    for missing in curve.notes:
        note(missing)
    for written in (output, html):
        if written is not None:
            note(f"written: {written}")


def _task(
    vectors: Path,
    queries: Path | None,
    qrels: Path | None,
    labels: Path | None,
    test: Path | None,
    test_labels: Path | None,
    label_column: str | None,
    second: Path | None,
    scores: Path | None,
    model: str | None,
    layers: str | None,
    split: str | None,
    work: Path | None,
    model_name: str | None,
) -> tuple[Any, tuple[list[str], list[str]] | None, str, dict[int, Any] | None]:
    """Return what to measure on, the texts if any, a name for the table, and sides by layer."""
    from nestvec import measurement as m

    _all_or_none("retrieval", queries=queries, qrels=qrels)
    _all_or_none("classification", labels=labels, test=test, test_labels=test_labels)
    _all_or_none("STS", second=second, scores=scores)
    if sum(x is not None for x in (queries, labels, second)) > 1:
        fail("measure one thing at a time: --queries, --labels or --second.")
    if vectors.is_dir() and any(vectors.glob("corpus.jsonl*")):
        for_vectors = {
            "--queries": queries,
            "--labels": labels,
            "--second": second,
            "--model-name": model_name,
        }
        if given := [name for name, value in for_vectors.items() if value is not None]:
            fail(f"{vectors} is a BEIR folder, which brings its own; leave out {given[0]}.")
        return _beir(vectors, model or "all-MiniLM-L6-v2", layers, split or "test", work)
    for_folders = {"--model": model, "--layers": layers, "--split": split, "--work": work}
    if given := [name for name, value in for_folders.items() if value is not None]:
        fail(f"{given[0]} is for BEIR folders, and {vectors} is none; leave it out.")

    def load(path: Path | None) -> Embeddings:
        assert path is not None
        return Embeddings.load(path, space=model_name)

    docs = load(vectors)
    name = vectors.stem
    if queries is not None and qrels is not None:
        from nestvec.corpus import read_qrels

        return m.RetrievalTask(docs, load(queries), read_qrels(qrels)), None, name, None
    if labels is not None and test_labels is not None:
        train, truth = (read_labels(path, label_column) for path in (labels, test_labels))
        return m.ClassificationTask(docs, train, load(test), truth), None, name, None
    if second is not None and scores is not None:
        return m.STSTask(docs, load(second), _numbers(scores)), None, name, None
    return m.LabelFreeTask(docs), None, name, None


def _beir(
    folder: Path, model: str, layers: str | None, split: str, work: Path | None
) -> tuple[Any, tuple[list[str], list[str]], str, dict[int, Any] | None]:
    from nestvec.cli.embed import embed_set
    from nestvec.corpus import read_beir
    from nestvec.encoders import encoder_of
    from nestvec.measurement import RetrievalTask

    found = read_beir(folder, split=split)
    work = work or Path(f"{folder.resolve().name}.nestvec")
    encoder = encoder_of(model)
    of_layers = None
    if layers is None:
        docs, asks = embed_set(encoder, found, work, queries=f"queries-{split}")
    else:
        of_layers = _of_layers(encoder, found, layers, work)
        docs, asks = of_layers[max(of_layers)]
    texts = (list(found.doc_texts), list(found.query_texts))
    task = RetrievalTask(docs, asks, found.qrels, dropped=found.dropped)
    return task, texts, found.name, of_layers


def _of_layers(
    encoder: Any, found: RetrievalSet, layers: str, work: Path
) -> dict[int, tuple[Embeddings, Embeddings]]:
    """Embed documents and queries once for all layers; what is done is kept and read again."""
    from nestvec.encoders import TextEncoder
    from nestvec.encoders.layers import Layers, parse_layers

    if not isinstance(encoder, TextEncoder):
        fail(f"--layers is for text models, and {encoder.source} is none; leave it out.")
    n = Layers(encoder.model).n
    chosen = sorted({*parse_layers(layers, n), n})  # the whole encoder is what others are beside

    def side(role: Role, texts: Sequence[str], ids: Sequence[str]) -> dict[int, Embeddings]:
        key = hashlib.sha256(f"{encoder.space.space_id} {chosen} {ids}".encode()).hexdigest()[:8]
        kept = work / f"layers-{role}-{key}"
        return encoder.encode_layers(
            list(texts), layers=chosen, role=role, ids=list(ids), resume=kept, show_progress=True
        )

    docs = side("document", found.doc_texts, found.doc_ids)
    asks = side("query", found.query_texts, found.query_ids)
    return {layer: (docs[layer], asks[layer]) for layer in chosen}


def _all_or_none(task: str, **given: Path | None) -> None:
    missing = [f"--{name.replace('_', '-')}" for name, path in given.items() if path is None]
    if missing and len(missing) < len(given):
        fail(f"{task} also needs {' and '.join(missing)}.")


def _numbers(path: Path) -> list[float]:
    lines = read_lines(path)
    for row, line in enumerate(lines):
        try:
            float(line)
        except ValueError:
            fail(f"{path}: line {row + 1} is {line!r}, not a number.")
    return [float(line) for line in lines]


def _maps(given: list[str]) -> dict[str, Any]:
    from nestvec.maps import load_map

    maps: dict[str, Any] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        path = Path(folder if equals else text)
        name = name if equals else path.name
        if name in maps:
            fail(f"two maps are called {name!r}; tell them apart with --map NAME=FOLDER.")
        maps[name] = load_map(path)
    return maps


def _baselines(text: str) -> bool | tuple[str, ...]:
    if text in ("all", "none"):
        return text == "all"
    return tuple(name.strip() for name in text.split(",") if name.strip())
