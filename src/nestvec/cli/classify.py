"""nestvec classify: heads over nested vectors that spend few dims on easy rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from nestvec.cli._common import (
    Dims,
    Json,
    LabelColumn,
    ModelName,
    command,
    note,
    out,
    print_json,
    read_labels,
)
from nestvec.space import Embeddings

EPILOG = """
Examples:

  nestvec classify train.npz --labels train.txt --test test.npz --test-labels test.txt

  nestvec classify train.safetensors --labels train.jsonl --label-column intent
  --test test.safetensors --test-labels test.jsonl --tolerance 0.005   (may lose half a point)
"""


@command
def classify(
    vectors: Annotated[Path, typer.Argument(help="Vectors to learn from.", show_default=False)],
    labels: Annotated[
        Path,
        typer.Option(
            help="Their classes: a label a line, or a table (.jsonl, .csv, .parquet, ...).",
            show_default=False,
        ),
    ],
    test: Annotated[Path, typer.Option(help="Vectors to measure on.", show_default=False)],
    test_labels: Annotated[Path, typer.Option(help="Their classes.", show_default=False)],
    label_column: LabelColumn = None,
    dims: Dims = None,
    tolerance: Annotated[
        float, typer.Option(help="Accuracy that may be lost; 0.005 is half a point.")
    ] = 0.0,
    margin: Annotated[
        float, typer.Option(help="Standard errors to keep clear of that, against luck.")
    ] = 0.5,
    rule: Annotated[
        Literal["sparing", "paper"], typer.Option(help="How thresholds are chosen.")
    ] = "sparing",
    cost: Annotated[
        Literal["stop", "accumulated"],
        typer.Option(help="What is made small: the size a row stops at, or all sizes until then."),
    ] = "stop",
    folds: Annotated[
        int, typer.Option(min=2, help="Folds whose held-out rows set the thresholds.")
    ] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the folds and resamples.")] = 0,
    model_name: ModelName = None,
    json: Json = False,
) -> None:
    """Classify at the smallest size that is sure enough, and say what that saves and costs."""
    from nestvec.classify import AdaptiveClassifier
    from nestvec.space import parse_dims

    train, asked = (Embeddings.load(path, space=model_name) for path in (vectors, test))
    train.space.check_same(asked.space)
    classes = read_labels(labels, label_column)
    truth = read_labels(test_labels, label_column)
    estimator = AdaptiveClassifier(
        dims=parse_dims(dims) if dims else None,
        cv=folds,
        tolerance=tolerance,
        margin=margin,
        rule=rule,
        cost=cost,
        random_state=seed,
    )
    note(f"fitting {len(train):,} rows, {folds} folds")
    fitted = estimator.fit(train, classes)
    found = fitted.report(asked, truth, seed=seed)
    if json:
        print_json({**found.to_dict(), "held_out": fitted.held_out_.to_dict()})
        return
    out.print(str(found), markup=False, highlight=False)
    note(f"held out: {fitted.held_out_.sentence()}")
