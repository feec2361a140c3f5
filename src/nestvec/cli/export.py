"""nestvec export: an encoder as one ONNX file, or a shorter one as a folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestvec.cli._common import Json, command, describe, out, print_json

EPILOG = """
Examples:

  nestvec export resnet/ -o resnet.onnx --dim 64

  nestvec export all-MiniLM-L6-v2 -o minilm.onnx

  nestvec export my-model -o small/ --layer 3 --dim 64    (a sentence-transformers folder)

  nestvec export my-model -o small.onnx --layer 3 --dim 64
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
        Path,
        typer.Option(
            "-o",
            "--output",
            help="A name in .onnx, or else a folder for sentence-transformers.",
            show_default=False,
        ),
    ],
    layer: Annotated[
        int | None,
        typer.Option(
            help="End a text model after this transformer layer, counted from 1.",
            show_default=False,
        ),
    ] = None,
    dim: Annotated[
        int | None,
        typer.Option(help="Cut to this prefix, then normalise.", show_default=False),
    ] = None,
    allow_untrained: Annotated[
        bool, typer.Option(help="Accept a size that is not a nesting dim.")
    ] = False,
    json: Json = False,
) -> None:
    """Export an encoder to ONNX, or a text model to a folder, checked to give its vectors."""
    from nestvec.encoders.folder import export_folder
    from nestvec.encoders.onnx import export_onnx

    write = export_onnx if output.suffix.lower() == ".onnx" else export_folder
    space = write(model, output, layer=layer, dim=dim, allow_untrained=allow_untrained)
    if json:
        print_json({"output": str(output), "space": describe(space)})
    else:
        out.print(f"{output}: {space.label}", markup=False)
