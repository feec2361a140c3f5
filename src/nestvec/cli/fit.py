"""nestvec fit: make frozen vectors nested."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nestvec.cli._common import (
    Dims,
    Json,
    ModelName,
    command,
    describe,
    fail,
    note,
    out,
    print_json,
)
from nestvec.space import Embeddings

EPILOG = """
Examples:

  nestvec fit docs.safetensors -o nest/

  nestvec fit docs.safetensors -o nest/ --queries train.safetensors --qrels qrels/train.tsv

  nestvec fit big.npy --model-name my-model -o rotation/ --method principal    (streams from disk)
"""


@command
def fit(
    vectors: Annotated[
        Path, typer.Argument(help="Document vectors to fit on.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the map.", show_default=False)
    ],
    method: Annotated[
        str,
        typer.Option(help="adaptor (guarded: unchanged, rotation or learned), principal, random"),
    ] = "adaptor",
    dims: Dims = None,
    queries: Annotated[
        Path | None,
        typer.Option(help="Supervised: vectors of training queries.", show_default=False),
    ] = None,
    qrels: Annotated[
        Path | None, typer.Option(help="Supervised: their relevance labels.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling and training.")] = 0,
    model_name: ModelName = None,
    json: Json = False,
) -> None:
    """Fit a map that makes vectors nested, and say on held-out data what it gains."""
    from nestvec.space.nesting import parse_dims

    if (queries is None) != (qrels is None):
        fail("supervised fitting needs both --queries and --qrels.")
    if queries is not None and method != "adaptor":
        fail(f"--method {method} takes no queries; leave out --queries and --qrels.")
    from nestvec.maps.base import check_folder

    check_folder(output)
    docs = Embeddings.load(vectors, space=model_name)
    sizes = parse_dims(dims, full=docs.dim) if dims else None
    fitted = _fit(method, docs, sizes, queries, qrels, seed, model_name)
    fitted.save(output)
    guard = getattr(fitted, "guard_", None)
    if json:
        print_json(
            {
                "output": str(output),
                "content_hash": fitted.content_hash,
                "dims": list(fitted.dims_),
                "guard": guard.to_dict() if guard is not None else None,
                "space": describe(fitted.transform(docs[:1]).space),
            }
        )
        return
    if guard is not None:
        out.print(guard.sentence(), markup=False)
    out.print(f"{output}: map {fitted.content_hash}, nesting dims {fitted.dims_}", markup=False)
    note(f"next: nestvec measure {vectors} --map {output}")


def _fit(
    method: str,
    docs: Embeddings,
    dims: tuple[int, ...] | None,
    queries: Path | None,
    qrels: Path | None,
    seed: int,
    model_name: str | None,
) -> Any:
    from nestvec.maps import MatryoshkaAdaptor, PrincipalRotation, RandomRotation

    if method == "principal":
        return PrincipalRotation(dims=dims).fit(docs)
    if method == "random":
        return RandomRotation(dims=dims, random_state=seed).fit(docs)
    if method != "adaptor":
        fail(f"--method {method!r} is not one of adaptor, principal, random.")
    adaptor = MatryoshkaAdaptor(dims=dims, random_state=seed, verbose=True)
    if queries is None or qrels is None:
        return adaptor.fit(docs)
    from nestvec.corpus import read_qrels

    asked = Embeddings.load(queries, space=model_name)
    return adaptor.fit(docs, queries=asked, qrels=read_qrels(qrels))
