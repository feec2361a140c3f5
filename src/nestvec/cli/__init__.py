"""The command line: one file a command."""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

import nestvec

app = typer.Typer(
    name="nestvec",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Nested embeddings: vectors you can cut. Embed text, make the vectors nested, measure "
    "every size, search cheap-then-exact.",
    epilog="Start with: nestvec demo",
)


def _version(show: bool) -> bool:
    if show:
        typer.echo(f"nestvec {nestvec.__version__}")
        raise typer.Exit
    return show


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for _name in "demo embed fit transform measure search plan export classify mine synthesize".split():
    _module = importlib.import_module(f"nestvec.cli.{_name}")
    app.command(name=_name, epilog=_module.EPILOG)(getattr(_module, _name))

importlib.import_module("nestvec.cli.train_queries")  # one more command of train
for _name in ("index", "train", "lora", "upgrade"):
    app.add_typer(importlib.import_module(f"nestvec.cli.{_name}").app, name=_name)


def main() -> None:
    """Run the command line."""
    app()
