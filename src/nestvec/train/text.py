"""Train a sentence-transformers model to be nested, on pairs, triplets, scores, labels or qrels."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nestvec._extras import require
from nestvec.corpus.examples import Examples, Kind
from nestvec.encoders._quiet import quiet
from nestvec.encoders.fingerprint import fingerprint
from nestvec.errors import DataError, DimensionError, ModelError
from nestvec.space import halving, parse_dims
from nestvec.train.card import declare_dims, write_card
from nestvec.train.heads import ClassLabels, NestedClassifier
from nestvec.train.keeping import KeepNeighbours
from nestvec.train.objectives import InfoNCE, NestedLoss
from nestvec.train.ranking import CoSENT
from nestvec.train.result import Trained, last_metrics, save_classifier
from nestvec.train.run import Run
from nestvec.train.sentence_transformer import SentenceTransformerLoss
from nestvec.train.settings import Settings, is_first_process
from nestvec.train.trainer import Careful
from nestvec.train.validation import Validate, label_accuracy, pair_accuracy, rank_correlation

for _module in ("sentence_transformers", "accelerate", "datasets"):
    require(_module, extra="train", why="training text models")

from datasets import Dataset  # noqa: E402  # behind the checks above
from sentence_transformers import (  # noqa: E402  # likewise
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import BatchSamplers  # noqa: E402  # likewise

COLUMNS: dict[Kind, tuple[str, ...]] = {
    "pairs": ("anchor", "positive"),
    "triplets": ("anchor", "positive", "negative"),
    "scored": ("sentence1", "sentence2"),
    "labelled": ("text",),
}
HOLDOUT_SHARE, HOLDOUT_MOST = 0.05, 1000
HEAD_RATE = 1e-2


class TextTrainer(Careful, SentenceTransformerTrainer):
    """sentence-transformers' Trainer, made careful."""

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Add none: the card is ours, with a row a size."""


def train_text(
    model: Any,
    examples: Examples,
    output: str | os.PathLike[str],
    *,
    dims: Iterable[int] | str | None = None,
    validation: Examples | None = None,
    holdout: float | int | None = None,
    objective: Callable[..., Tensor] | None = None,
    keep: float | int = 0.0,
    weights: Any = "uniform",
    n_dims_per_step: int = -1,
    freeze_layers: int = 0,
    settings: Settings | None = None,
    fresh: bool = False,
) -> Trained:
    """Train a text model so that every prefix of its vectors is an embedding.

    Parameters
    ----------
    model
        A ``SentenceTransformer``, a hub id or a folder; ``"all-MiniLM-L6-v2"`` as in `TextEncoder`.
        A model that is handed over is trained in place.
    examples
        What to train on; see `nestvec.corpus.read_examples`.
    output
        A folder, new or left by the same training, which then goes on from its last checkpoint.
    dims
        Sizes; by default the full size halved down to 16. The full size is always trained.
    validation
        Examples of the same kind that are scored at every size as training goes. By default 5% of
        the rows (at most 1,000, drawn by seed) are held out and not trained on.
    holdout
        Share of rows to hold out instead; 0 trains on all and measures nothing.
    objective
        A loss of (column, column, ..., [scores or class numbers]) tensors, nested or not, in place
        of the usual one: nested InfoNCE for pairs and triplets, nested CoSENT for scored pairs,
        nested cross-entropy of one head a size for labelled texts.
    keep
        Weight of an added `KeepNeighbours`: every size holds on to the neighbours that the full
        size had before training, for a model that is good already and examples that are few. 0
        leaves it out. It costs a forward pass of the model as it was.
    weights, n_dims_per_step
        Of `NestedLoss`.
    freeze_layers
        Transformer layers, from the bottom, that are not trained; the token embeddings with them.
    settings
        How to train; a learning rate of 5e-5 and one epoch if not given.
    fresh
        Forget an earlier training in ``output``.

    Returns
    -------
    Trained
        The folder holds the model as sentence-transformers saves it (safetensors; the sizes in
        config.json as ``matryoshka_dimensions``; a model card with the table of sizes), the log,
        and for labelled texts ``classifier.safetensors``.

    Raises
    ------
    TrainingError
        If the loss or a gradient stops being a number (the last checkpoint is kept), or ``output``
        holds another training.
    DataError, DimensionError, ModelError, StorageError
        If the examples, sizes, model or folder do not fit.
    """
    settings = settings or Settings()
    settings.check()
    model, base = loaded_text_model(model)
    full = model.get_embedding_dimension()
    sizes = _sizes(dims, full)
    train, held_out = _split(examples, validation, holdout, settings.seed)
    if len(train) < 2:
        raise DataError(f"{len(train)} rows to train on; at least 2 are needed.")
    trainable = {p: p.requires_grad for p in model.parameters()}
    _freeze(model, freeze_layers)
    run = Run(
        Path(output),
        {
            "model": fingerprint(model),
            "examples": train.fingerprint(),
            "dims": list(sizes),
            "objective": repr(objective) if objective is not None else "usual",
            "keep": float(keep),
            "weights": weights if isinstance(weights, str) else list(weights),
            "n_dims_per_step": n_dims_per_step,
            "freeze_layers": freeze_layers,
            "settings": settings.to_dict(),
        },
        fresh=fresh,
    )
    if run.finished:
        sys.stderr.write(f"{output}: trained already\n")
        return Trained(run.folder, sizes, last_metrics(run), run.records())
    _freeze_unused(model, examples.texts[0][0])
    torch.manual_seed(settings.seed)  # of heads that are made here
    made, head = _objective(examples, sizes, weights, n_dims_per_step, settings.seed)
    chosen = made if objective is None else objective
    head = head if objective is None else None
    validate = None if held_out is None else _validation(model, held_out, sizes, head)
    kept = KeepNeighbours(sizes, weights=weights) if keep else None
    fresh_parts = {r"^objective\.head": head, r"^keep\.": kept}  # they start from nothing
    rates = {name: settings.head_rate(HEAD_RATE) for name, part in fresh_parts.items() if part}
    arguments = settings.arguments(
        run.checkpoints,
        n_rows=len(train),
        kind=SentenceTransformerTrainingArguments,
        learning_rate_mapping=rates,
        batch_sampler=BatchSamplers.NO_DUPLICATES
        if examples.kind in ("pairs", "triplets")
        else BatchSamplers.BATCH_SAMPLER,
    )
    trainer = TextTrainer(
        model=model,
        args=arguments,
        train_dataset=_dataset(train),
        loss=SentenceTransformerLoss(
            model, chosen, chunk_size=settings.chunk_size, keep=kept, keep_weight=keep
        ),
    )
    trainer.beside = tuple(m for m in (chosen, kept) if isinstance(m, nn.Module))
    trainer.be_careful(run, settings=settings, validate=validate)
    trainer.go()
    for parameter, was in trainable.items():
        parameter.requires_grad_(was)
    if is_first_process():
        metrics = trainer.final_metrics()
        _save(model, run, sizes, base, metrics, examples, head, settings)
        run.finish(metrics=metrics)
    trainer.wait()
    return Trained(run.folder, sizes, last_metrics(run), run.records())


def loaded_text_model(model: Any) -> tuple[SentenceTransformer, str]:
    """Return a model to train, and a name for it."""
    if isinstance(model, SentenceTransformer):
        return model, getattr(model.model_card_data, "base_model", None) or "a model of one's own"
    from nestvec.encoders import TextEncoder

    encoder = TextEncoder(model)
    if not isinstance(encoder.model, SentenceTransformer):
        raise ModelError(f"{model!r} is no sentence-transformers model, so it cannot be trained.")
    return encoder.model, encoder.space.model or str(model)


def _sizes(dims: Iterable[int] | str | None, full: int | None) -> tuple[int, ...]:
    if full is None:
        raise ModelError("the model does not say how long its vectors are.")
    sizes = halving(full) if dims is None else parse_dims(dims)
    if max(sizes) > full:
        raise DimensionError(
            f"size {max(sizes)} does not fit a model of dim {full}; choose sizes up to {full}."
        )
    return tuple(sorted({*sizes, full}))


def _split(
    examples: Examples, validation: Examples | None, holdout: float | int | None, seed: int
) -> tuple[Examples, Examples | None]:
    if validation is not None:
        if validation.kind != examples.kind:
            raise DataError(
                f"validation holds {validation.kind}, training {examples.kind}; give the same kind."
            )
        return examples, validation
    if holdout is not None and not 0 <= holdout < 1:
        raise DataError(f"holdout {holdout!r} is not a share: 0 to below 1.")
    n = len(examples)
    size = min(int(HOLDOUT_SHARE * n), HOLDOUT_MOST) if holdout is None else int(holdout * n)
    if size < 2:  # nothing can be ranked
        return examples, None
    order = np.random.default_rng(seed).permutation(n)
    return examples[np.sort(order[size:])], examples[np.sort(order[:size])]


def _freeze(model: Any, n_layers: int) -> None:
    if n_layers == 0:
        return
    transformer = getattr(model[0], "auto_model", None)
    layers = getattr(getattr(transformer, "encoder", transformer), "layer", None)
    if layers is None or not 0 < n_layers <= len(layers):
        there = "no layers that are known here" if layers is None else f"{len(layers)} layers"
        raise ModelError(f"freeze_layers {n_layers} does not fit: the model has {there}.")
    for module in [getattr(transformer, "embeddings", None), *layers[:n_layers]]:
        if module is not None:
            module.requires_grad_(False)


def _freeze_unused(model: Any, text: str) -> None:
    """Freeze what no vector depends on, like BERT's pooler; several processes would wait for it."""
    features = {
        k: v.to(model.device) if isinstance(v, Tensor) else v
        for k, v in model.preprocess([text]).items()
    }
    with torch.enable_grad():
        model(features)["sentence_embedding"].sum().backward()
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.requires_grad_(False)
    model.zero_grad(set_to_none=True)


def _objective(
    examples: Examples, dims: tuple[int, ...], weights: Any, n_dims_per_step: int, seed: int
) -> tuple[nn.Module, NestedClassifier | None]:
    if examples.kind == "labelled":
        head = NestedClassifier(dims, len(examples.label_names), normalise=True)
        return ClassLabels(head, weights=weights), head
    options = {
        "weights": weights,
        "n_dims_per_step": n_dims_per_step,
        "generator": torch.Generator().manual_seed(seed),
    }
    if examples.kind == "scored":
        return NestedLoss(CoSENT(), dims, n_embeddings=2, **options), None
    return NestedLoss(InfoNCE(), dims, **options), None


def _validation(
    model: Any, examples: Examples, dims: tuple[int, ...], head: NestedClassifier | None
) -> Validate | None:
    def encode(texts: list[str]) -> Tensor:
        return model.encode(
            texts, convert_to_tensor=True, show_progress_bar=False, truncate_dim=None
        ).float()

    texts, targets = examples.texts, examples.targets
    if examples.kind == "labelled":
        if head is None:  # an objective of the user's own: nothing says what the labels are for
            return None
        return lambda: label_accuracy(head, encode(texts[0]), targets)
    if examples.kind == "scored":
        return lambda: rank_correlation(encode(texts[0]), encode(texts[1]), targets, dims)
    return lambda: pair_accuracy(encode(texts[0]), encode(texts[1]), dims, texts[1])


def _dataset(examples: Examples) -> Dataset:
    columns: dict[str, Any] = dict(zip(COLUMNS[examples.kind], examples.texts, strict=True))
    if examples.targets is not None:
        columns["label"] = examples.targets
    return Dataset.from_dict(columns)


def _save(
    model: Any,
    run: Run,
    dims: tuple[int, ...],
    base: str,
    metrics: Mapping[str, float],
    examples: Examples,
    head: NestedClassifier | None,
    settings: Settings,
) -> None:
    folder = run.folder
    with quiet():
        model.save_pretrained(str(folder), create_model_card=False)
    declare_dims(folder, dims)
    if head is not None:
        save_classifier(folder, head, examples.label_names)
    short = dims[min(1, len(dims) - 1)]
    write_card(
        folder,
        library="sentence-transformers",
        base=base,
        dims=dims,
        metrics=metrics,
        measured_on="rows that were held out",
        trained_on=f"{len(examples):,} rows ({examples.kind})",
        settings=settings.to_dict(),
        usage=f"""```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{folder.resolve().name}", truncate_dim={short})
vectors = model.encode(texts, normalize_embeddings=True)   # cut, then normalised
```""",
    )
