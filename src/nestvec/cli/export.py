"""nestvec export: an encoder as one ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestvec.cli._common import Json, command, describe, out, print_json

EPILOG = """
Examples:

  nestvec export resnet/ -o resnet.onnx --dim 64

  nestvec export all-MiniLM-L6-v2 -o minilm.onnx
"""


@command
def export(
    model: Annotated[
        str,
        typer.Argument(
            help="Hub id or folder of a sentence-transformers model, or folder of an image model.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="A name in .onnx.", show_default=False)
    ],
    dim: Annotated[
        int | None,
        typer.Option(help="Cut to this prefix, then normalise.", show_default=False),
    ] = None,
    allow_untrained: Annotated[
        bool, typer.Option(help="Accept a size that is not a nesting dim.")
    ] = False,
    json: Json = False,
) -> None:
    """Export an encoder to ONNX, checked to return the encoder's vectors."""
    from nestvec.encoders.onnx import export_onnx

    space = export_onnx(model, output, dim=dim, allow_untrained=allow_untrained)
    if json:
        print_json({"output": str(output), "space": describe(space)})
    else:
        out.print(f"{output}: {space.label}", markup=False)
