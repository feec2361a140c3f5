"""nestvec train: encoders whose every prefix is an embedding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestvec.cli._common import Json, command, fail, note, out, print_json

if TYPE_CHECKING:
    from nestvec.train import Settings, Trained

HELP = "Train an encoder so that every prefix of its vectors is an embedding."

TEXT_EPILOG = """
Examples:

  nestvec train text pairs.jsonl -o my-model                     (columns anchor, positive)

  nestvec train text triplets.tsv -o my-model --dims 32,64,128   (anchor, positive, negative)

  nestvec train text stsb/train.tsv -o my-model --validation stsb/dev.tsv    (scored pairs)

  nestvec train text scifact/ -o my-model                        (a BEIR folder: its train qrels)

  nestvec train text intents.jsonl -o my-model --epochs 5        (columns text, label)

  nestvec train text pairs.jsonl -o my-model --layers 2,4,6      (earlier layers, too)

  nestvec train text big.jsonl -o my-model --batch-size 1024 --chunk-size 32

  nestvec train text pairs.jsonl -o my-lora --lora-rank 1,2,4,8,16 --learning-rate 5e-4 --epochs 2

  nestvec train text pairs.jsonl -o new-model --compatible-with old-model/   (keeps its gallery)

  torchrun --nproc-per-node 2 -m nestvec train text pairs.jsonl -o my-model
"""

IMAGE_EPILOG = """
Examples:

  nestvec train image photos/ -o my-model                  (one folder a class)

  nestvec train image cifar10.npz -o my-model --epochs 15  (x_train, y_train, x_test, y_test)

  nestvec train image photos/ -o my-model --network microsoft-resnet/   (a transformers folder)

  nestvec train image photos/ -o new --compatible-with old/ --compatible oca   (keeps its gallery)

  nestvec train image photos/ -o first --objective simplex --capacity 500   (room for 500 classes)

  nestvec train image photos/ -o my-lora --network my-model --lora-rank 16    (see nestvec lora)

  nestvec embed photos/ -o v.safetensors --model my-model
"""

app = typer.Typer(no_args_is_help=True, help=HELP)

Output = Annotated[
    Path,
    typer.Option(
        "-o",
        "--output",
        help="Folder for the model, new or left by the same training, which then goes on.",
        show_default=False,
    ),
]
Validation = Annotated[
    Path | None,
    typer.Option(
        help="Scored at every size as training goes; by default some rows are held out.",
        show_default=False,
    ),
]
Holdout = Annotated[
    float | None,
    typer.Option(help="Share of rows to hold out; 0 trains on all.", show_default=False),
]
Weights = Annotated[
    str, typer.Option(help="Weight of each size: uniform, boost_low, or numbers like 2,1,1.")
]
Dims = Annotated[
    str | None,
    typer.Option(
        help="Sizes to train, like 16,32,64,128; the full size always is.", show_default="halving"
    ),
]
Epochs = Annotated[float, typer.Option(help="Passes over the data.")]
MaxSteps = Annotated[int, typer.Option(help="Steps instead of epochs; -1 for none.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows a step, over all processes.")]
Precision = Annotated[
    str,
    typer.Option(help="auto (bfloat16 where an accelerator has it), float32, bfloat16, float16"),
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that prepare batches.")]
SaveEvery = Annotated[
    float, typer.Option(help="Steps between checkpoints; below 1 a share of all steps.")
]
LogTo = Annotated[
    list[str] | None,
    typer.Option(help="tensorboard, wandb, mlflow, ...; repeat for several.", show_default=False),
]
LoraRank = Annotated[
    str | None,
    typer.Option(
        help="Train a LoRA in place of the model, nested up to this rank; of several, like "
        "1,2,4,8,16, at these alone. nestvec lora cuts it.",
        show_default=False,
    ),
]
CompatibleWith = Annotated[
    Path | None,
    typer.Option(
        help="Folder of an older model whose gallery is to be kept: the prefix of the new vectors "
        "is trained to live in its space.",
        show_default=False,
    ),
]
ExtraDims = Annotated[
    int, typer.Option(min=0, help="Dims behind those of the older model, for what is new.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Forget an earlier training in OUTPUT.")]


@app.command(epilog=TEXT_EPILOG)
@command
def text(
    source: Annotated[
        Path,
        typer.Argument(
            help="Pairs, triplets, scored pairs or labelled texts (.jsonl, .csv, .tsv, .parquet, a "
            "datasets folder), or a BEIR-layout folder.",
            show_default=False,
        ),
    ],
    output: Output,
    model: Annotated[
        str, typer.Option(help="Hub id or folder of a sentence-transformers model.")
    ] = "all-MiniLM-L6-v2",
    dims: Dims = None,
    columns: Annotated[
        str | None,
        typer.Option(
            help="Names of the columns in order, like question,answer.", show_default=False
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="pairs, triplets, scored or labelled; by default what the columns say."),
    ] = None,
    split: Annotated[
        str,
        typer.Option(help="Of a BEIR folder: whose judgements; of a datasets folder: its rows."),
    ] = "train",
    validation: Validation = None,
    validation_split: Annotated[
        str, typer.Option(help="Which split of VALIDATION, if it has splits.")
    ] = "validation",
    holdout: Holdout = None,
    keep: Annotated[
        float,
        typer.Option(
            min=0,
            help="Hold on to the neighbours that the untrained model's full size had: a weight, "
            "like 1. For a good model and few examples.",
        ),
    ] = 0.0,
    compatible_with: CompatibleWith = None,
    extra_dims: ExtraDims = 32,
    weights: Weights = "uniform",
    freeze_layers: Annotated[
        int, typer.Option(min=0, help="Transformer layers, from the bottom, left as they are.")
    ] = 0,
    lora_rank: LoraRank = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers whose vectors are to be embeddings too, like 2,4,6, or all; the last "
            "always is.",
            show_default=False,
        ),
    ] = None,
    depth: Annotated[
        str, typer.Option(help="How --layers are trained: fixed, 2dmse or ese.")
    ] = "fixed",
    epochs: Epochs = 1,
    max_steps: MaxSteps = -1,
    batch_size: BatchSize = 64,
    chunk_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Rows in memory together: a large batch, slower.", show_default=False
        ),
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-5,
    head_learning_rate: Annotated[
        float | None,
        typer.Option(help="Learning rate of classifiers (labelled texts).", show_default="0.01"),
    ] = None,
    precision: Precision = "auto",
    workers: Workers = 0,
    save_every: SaveEvery = 0.1,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    log_to: LogTo = None,
    fresh: Fresh = False,
    json: Json = False,
) -> None:
    """Train a text model to be nested. Interrupted, the same command goes on."""
    from nestvec.corpus.examples import read_examples
    from nestvec.train import Settings, train_text

    named = {"columns": columns.split(",") if columns else None, "kind": kind}
    examples = read_examples(source, split=split, **named)
    held_out = None
    if validation is not None:
        held_out = read_examples(
            validation, label_names=examples.label_names or None, split=validation_split, **named
        )
    words = {"scored": "scored pairs", "labelled": "labelled texts"}
    note(f"{source}: {len(examples):,} {words.get(examples.kind, examples.kind)}")
    settings = Settings(
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        chunk_size=chunk_size,
        learning_rate=learning_rate,
        head_learning_rate=head_learning_rate,
        precision=precision,
        workers=workers,
        save_every=save_every,
        seed=seed,
        log_to=tuple(log_to or ()),
    )
    _run(
        lambda: train_text(
            model,
            examples,
            output,
            dims=dims,
            validation=held_out,
            holdout=holdout,
            keep=keep,
            compatible_with=_folder(compatible_with),
            extra_dims=extra_dims,
            weights=_weights(weights),
            freeze_layers=freeze_layers,
            lora=_lora(lora_rank),
            layers=layers,
            depth=depth,
            settings=settings,
            fresh=fresh,
        ),
        output,
        settings,
        json,
    )


@app.command(epilog=IMAGE_EPILOG)
@command
def image(
    source: Annotated[
        Path,
        typer.Argument(
            help="Labelled images: one folder a class (maybe below train/ and test/), .npz, or a "
            "datasets folder.",
            show_default=False,
        ),
    ],
    output: Output,
    network: Annotated[
        str, typer.Option(help="resnet, vit (small, fresh weights) or a transformers model folder.")
    ] = "resnet",
    dims: Dims = None,
    size: Annotated[
        int | None,
        typer.Option(min=8, help="Side of the square in pixels.", show_default="the first image's"),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Which split to train on.", show_default="train")
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            help="A split of SOURCE, or another source, scored at every size as training goes; by "
            "default a tenth is held out.",
            show_default=False,
        ),
    ] = None,
    holdout: Holdout = None,
    objective: Annotated[
        str,
        typer.Option(
            help="cross_entropy, supervised_contrastive, or simplex: later models can put each "
            "class where it was."
        ),
    ] = "cross_entropy",
    tied: Annotated[
        bool, typer.Option("--tied", help="MRL-E: one classifier, cut to every size.")
    ] = False,
    compatible_with: CompatibleWith = None,
    compatible: Annotated[
        str, typer.Option(help="How, with --compatible-with: oca, bt2, bct or simplex.")
    ] = "oca",
    extra_dims: ExtraDims = 32,
    capacity: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Of the objective simplex: classes there will ever be.",
            show_default=False,
        ),
    ] = None,
    weights: Weights = "uniform",
    shift: Annotated[
        int, typer.Option(min=0, help="Augmentation: shift by up to so many pixels.")
    ] = 0,
    flip: Annotated[
        bool, typer.Option("--flip", help="Augmentation: mirror half of the images.")
    ] = False,
    lora_rank: LoraRank = None,
    epochs: Epochs = 20,
    max_steps: MaxSteps = -1,
    batch_size: BatchSize = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    head_learning_rate: Annotated[
        float | None,
        typer.Option(help="Learning rate of the classifiers.", show_default="--learning-rate"),
    ] = None,
    precision: Precision = "auto",
    workers: Workers = 0,
    save_every: SaveEvery = 0.1,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    log_to: LogTo = None,
    fresh: Fresh = False,
    json: Json = False,
) -> None:
    """Train an image model to be nested. Interrupted, the same command goes on."""
    from nestvec.train import Settings, ShiftAndFlip, train_image
    from nestvec.train.image import read_labelled

    images, held_out = read_labelled(source, split=split, validation=validation)
    note(f"{source}: {len(images):,} images")
    settings = Settings(
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        head_learning_rate=head_learning_rate,
        precision=precision,
        workers=workers,
        save_every=save_every,
        seed=seed,
        log_to=tuple(log_to or ()),
    )
    _run(
        lambda: train_image(
            network,
            images,
            output,
            dims=dims,
            size=size,
            validation=held_out,
            holdout=0.1 if holdout is None else holdout,
            objective=objective,
            tied=tied,
            compatible_with=_folder(compatible_with),
            compatible=compatible,
            extra_dims=extra_dims,
            capacity=capacity,
            weights=_weights(weights),
            augment=ShiftAndFlip(shift, flip=flip) if shift or flip else None,
            lora=_lora(lora_rank),
            settings=settings,
            fresh=fresh,
        ),
        output,
        settings,
        json,
    )


def _lora(rank: str | None) -> Any:
    if rank is None:
        return None
    from nestvec.train import Lora

    try:
        ranks = [int(one) for one in rank.split(",")]
    except ValueError:
        fail(f"--lora-rank {rank!r}: give the largest, like 16, or several, like 1,2,4,8,16.")
    return Lora(rank=ranks[0] if len(ranks) == 1 else ranks)


def _folder(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _weights(given: str) -> Any:
    from nestvec.train.objectives import PRESETS

    if given in PRESETS:
        return given
    try:
        return tuple(float(weight) for weight in given.split(","))
    except ValueError:
        fail(f"--weights {given!r}: give uniform, boost_low, or numbers like 2,1,1.")


def _run(train: Callable[[], Trained], output: Path, settings: Settings, json: bool) -> None:
    import torch.distributed as dist

    from nestvec.train.card import layer_tables, size_table
    from nestvec.train.settings import is_first_process

    try:
        trained = train()
    except KeyboardInterrupt:
        if is_first_process():
            note("\nthe last checkpoint is kept: the same command goes on from it")
        raise
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    if not is_first_process():
        return
    if json:
        print_json(
            {
                "output": str(output),
                "dims": list(trained.dims),
                **({"layers": list(trained.layers)} if trained.layers else {}),
                "metrics": trained.metrics,
                "settings": settings.to_dict(),
            }
        )
        return
    if trained.metrics:
        out.print(size_table(trained.metrics, trained.dims), markup=False)
        if trained.layers:
            out.print(layer_tables(trained.metrics, trained.dims, trained.layers), markup=False)
    out.print(f"{output}: nesting dims {trained.dims}", markup=False)
    note(f"next: nestvec embed ... --model {output}")
