"""nestvec upgrade: change the model, keep the gallery."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestvec.cli._common import (
    Dims,
    Json,
    ModelName,
    command,
    describe,
    note,
    out,
    print_json,
)
from nestvec.space import Embeddings

HELP = "Change the model, keep the gallery, know that it is safe."

FIT_EPILOG = """
Examples:

  nestvec upgrade fit --old sample-old.npz --new sample-new.npz -o bridge/

  nestvec upgrade fit --old old.npz --new new.npz -o bridge/ --kind procrustes --kind relaxed

  nestvec upgrade fit --old old.npz --new new.npz -o bridge/ --nested --dims 64,128,384
"""
APPLY_EPILOG = """
Examples:

  nestvec upgrade apply queries-new.npz --bridge bridge/ -o queries-old.npz

  nestvec search docs-old.nest --queries queries-old.npz
"""

app = typer.Typer(no_args_is_help=True, help=HELP)

Bridge = Annotated[
    Path,
    typer.Option(help="Folder of a bridge, as nestvec upgrade fit writes it.", show_default=False),
]


@app.command(epilog=FIT_EPILOG)
@command
def fit(
    old: Annotated[
        Path, typer.Option(help="Vectors of some texts by the old model.", show_default=False)
    ],
    new: Annotated[
        Path,
        typer.Option(
            help="Vectors of the same texts by the new model; rows are paired by id.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the bridge.", show_default=False)
    ],
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="A kind of bridge to try: unchanged, procrustes, relaxed, ridge, score, low_rank. "
            "Repeat for more; by default all that fit.",
            show_default=False,
        ),
    ] = None,
    moves: Annotated[
        str,
        typer.Option(
            help="What the bridge will move: queries (new queries search the old gallery) or "
            "gallery (old vectors go to the new space)."
        ),
    ] = "queries",
    nested: Annotated[
        bool,
        typer.Option("--nested", help="A prefix of the input gives that prefix of the output."),
    ] = False,
    dims: Dims = None,
    sample_size: Annotated[int, typer.Option(help="Pairs to learn from, at most.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of sampling and splitting.")] = 0,
    model_name: ModelName = None,
    json: Json = False,
) -> None:
    """Fit the best bridge between two models from a sample that both have encoded."""
    from nestvec import upgrade
    from nestvec.maps.base import check_folder
    from nestvec.space.nesting import parse_dims

    check_folder(output)
    bridge = upgrade.fit(
        old=Embeddings.load(old, space=model_name),
        new=Embeddings.load(new, space=model_name),
        kinds=kind,
        moves=moves,
        dims=parse_dims(dims) if dims else None,
        nested=nested,
        sample_size=sample_size,
        random_state=seed,
    )
    bridge.save(output)
    assert bridge.guard_ is not None
    if json:
        print_json(
            {
                "output": str(output),
                "kind": bridge.guard_.winner,
                "content_hash": bridge.content_hash,
                "dims": list(bridge.dims_),
                "guard": bridge.guard_.to_dict(),
                "from": describe(bridge.space_) if bridge.space_ else None,
                "to": describe(bridge.target_) if bridge.target_ else None,
            }
        )
        return
    out.print(bridge.guard_.sentence(), markup=False)
    out.print(f"{output}: bridge {bridge.content_hash}", markup=False)
    note(f"next: nestvec upgrade judge --bridge {output} ..., or nestvec upgrade apply")


@app.command(epilog=APPLY_EPILOG)
@command
def apply(
    vectors: Annotated[
        Path, typer.Argument(help="Vectors of the side the bridge moves.", show_default=False)
    ],
    bridge: Bridge,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Where they go.", show_default=False)
    ],
    model_name: ModelName = None,
    json: Json = False,
) -> None:
    """Take vectors through a bridge: then they compare with the gallery on the other side."""
    from nestvec.maps import load_map

    moved = load_map(bridge).transform(Embeddings.load(vectors, space=model_name))
    moved.save(output)
    if json:
        print_json({"output": str(output), "n": len(moved), "space": describe(moved.space)})
    else:
        out.print(f"{output}: {moved!r}", markup=False)
