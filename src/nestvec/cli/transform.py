"""nestvec transform: apply a fitted map to vectors, and cut them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestvec.cli._common import Json, ModelName, command, describe, fail, out, print_json
from nestvec.space import Embeddings

EPILOG = """
Examples:

  nestvec transform docs.safetensors --map nest/ -o nested.safetensors

  nestvec transform nested.safetensors --dim 128 -o docs128.parquet

  nestvec transform old.npy --model-name text-embedding-3-small -o old.safetensors    (stamp)
"""


@command
def transform(
    vectors: Annotated[Path, typer.Argument(help="Vectors to change.", show_default=False)],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Where they go.", show_default=False)
    ],
    map: Annotated[
        list[Path] | None,
        typer.Option(help="A fitted map; repeat to apply several in order.", show_default=False),
    ] = None,
    dim: Annotated[
        int | None,
        typer.Option(help="Then cut to this size and re-normalise.", show_default=False),
    ] = None,
    allow_untrained: Annotated[
        bool, typer.Option(help="Accept a size that is not a nesting dim.")
    ] = False,
    model_name: ModelName = None,
    json: Json = False,
) -> None:
    """Apply fitted maps to vectors, cut them, or change their file format."""
    found = Embeddings.load(vectors, space=model_name)
    if map:
        from nestvec.maps import load_map

        for folder in map:
            found = load_map(folder).transform(found)
    elif dim is None and model_name is None and output.suffix == vectors.suffix:
        fail("nothing to do: give --map, --dim, or an output of another format.")
    if dim is not None:
        found = found.prefix(dim, allow_untrained=allow_untrained)
    found.save(output)
    if json:
        print_json({"output": str(output), "n": len(found), "space": describe(found.space)})
    else:
        out.print(f"{output}: {found!r}", markup=False)
