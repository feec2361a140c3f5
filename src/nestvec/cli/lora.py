"""nestvec lora: a rank-nested LoRA at one of its ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestvec.cli._common import Json, command, describe, note, out, print_json

CUT_EPILOG = """
Examples:

  nestvec train text pairs.jsonl -o my-lora --lora-rank 16 --learning-rate 5e-4

  nestvec lora cut my-lora -o my-lora-4 --rank 4        (for peft, or for nestvec lora merge)
"""

MERGE_EPILOG = """
Examples:

  nestvec lora merge my-lora -o my-model --rank 4       (then: nestvec embed ... --model my-model)

  nestvec lora merge my-lora -o my-model --base all-MiniLM-L6-v2
"""

app = typer.Typer(no_args_is_help=True, help="Take a rank-nested LoRA to one of its ranks.")

Folder = Annotated[
    Path,
    typer.Argument(help="LoRA, as nestvec train --lora-rank or peft left it.", show_default=False),
]


@app.command(epilog=CUT_EPILOG)
@command
def cut(
    folder: Folder,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the cut LoRA.", show_default=False)
    ],
    rank: Annotated[int, typer.Option(help="One that was trained.", show_default=False)],
    json: Json = False,
) -> None:
    """Cut a rank-nested LoRA to a rank: an ordinary LoRA, for peft and all that reads its files."""
    from nestvec.train import cut_lora

    cut_lora(folder, output, rank=rank)
    if json:
        print_json({"output": str(output), "rank": rank})
        return
    out.print(f"{output}: a LoRA of rank {rank}", markup=False)
    note(f"next: nestvec lora merge {output} -o ...")


@app.command(epilog=MERGE_EPILOG)
@command
def merge(
    folder: Folder,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the model.", show_default=False)
    ],
    rank: Annotated[
        int | None,
        typer.Option(help="One that was trained.", show_default="the largest"),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="The model that was adapted.", show_default="as the LoRA says"),
    ] = None,
    json: Json = False,
) -> None:
    """Merge a LoRA at a rank into the model that it adapts: an ordinary model, no slower."""
    from nestvec.train import load_lora, save_merged

    encoder = load_lora(folder, rank=rank, base=base)
    save_merged(encoder, output)
    if json:
        print_json({"output": str(output), "rank": rank, "space": describe(encoder.space)})
        return
    out.print(f"{output}: nesting dims {encoder.space.nesting_dims}", markup=False)
    note(f"next: nestvec embed ... --model {output}")
