"""Train a sentence-transformers model to be nested, on pairs, triplets, scores, labels or qrels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nestvec._extras import require
from nestvec.corpus.examples import Examples, Kind
from nestvec.encoders._quiet import quiet
from nestvec.encoders.base import Role
from nestvec.encoders.compatible_with import declare_compatible
from nestvec.encoders.fingerprint import fingerprint
from nestvec.encoders.text import TextEncoder
from nestvec.errors import DataError, ModelError
from nestvec.space import halving, parse_dims
from nestvec.train.batches import BatchesApart
from nestvec.train.card import declare_dims, write_card
from nestvec.train.compatible_pairs import CompatiblePairs, OldTexts, WithOld
from nestvec.train.depth import FixedPairs
from nestvec.train.heads import ClassLabels, NestedClassifier
from nestvec.train.keeping import KeepNeighbours
from nestvec.train.objectives import InfoNCE, NestedLoss
from nestvec.train.ranking import CoSENT
from nestvec.train.result import Trained, save_classifier
from nestvec.train.run import Run, described
from nestvec.train.sentence_transformer import SentenceTransformerLoss
from nestvec.train.settings import Settings
from nestvec.train.sizes import sizes_of
from nestvec.train.text_depth import keeping, layers_of, usual_objective
from nestvec.train.text_depth import validation as validation_in_depth
from nestvec.train.trainer import AdapterAlone, Careful, carry_out
from nestvec.train.validation import Validate, label_accuracy, pair_accuracy, rank_correlation
from nestvec.train.wider_text import widened

for _module in ("sentence_transformers", "accelerate", "datasets"):
    require(_module, extra="train", why="training text models")

from datasets import Dataset  # noqa: E402  # behind the checks above
from sentence_transformers import (  # noqa: E402  # likewise
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

if TYPE_CHECKING:
    from nestvec.train.lora import Lora

#: Kind -> the columns of its dataset, and what the text in each is
COLUMNS: dict[Kind, dict[str, Role]] = {
    "pairs": {"anchor": "query", "positive": "document"},
    "triplets": {"anchor": "query", "positive": "document", "negative": "document"},
    "scored": {"sentence1": "document", "sentence2": "document"},
    "labelled": {"text": "document"},
}
HOLDOUT_SHARE, HOLDOUT_MOST = 0.05, 1000
HEAD_RATE = 1e-2


class TextTrainer(Careful, AdapterAlone, SentenceTransformerTrainer):
    """sentence-transformers' Trainer, made careful."""

    #: Columns of text of which a batch holds none twice.
    apart: tuple[list[str], ...] = ()

    def get_batch_sampler(self, dataset: Any, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        if not self.apart or dataset is not self.train_dataset:
            return super().get_batch_sampler(dataset, batch_size, *args, **kwargs)
        return BatchesApart(self.apart, batch_size=batch_size, seed=self.args.seed)

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
    lora: Lora | None = None,
    layers: Iterable[int] | str | None = None,
    depth: str = "fixed",
    compatible_with: Any = None,
    extra_dims: int = 32,
    compatible_options: Mapping[str, Any] | None = None,
    settings: Settings | None = None,
    fresh: bool = False,
) -> Trained:
    """Train a text model so that every prefix of its vectors is an embedding, at every layer too.

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
        nested cross-entropy of one head a size for labelled texts. One over layers
        (`FixedPairs`, `TwoDMSE`, `ESE` or a `DepthLoss` of your own) brings its layers.
    keep
        Weight of an added `KeepNeighbours`: every size holds on to the neighbours that the full
        size had before training, for a model that is good already and examples that are few. 0
        leaves it out. It costs a forward pass of the model as it was.
    weights, n_dims_per_step
        Of `NestedLoss`.
    freeze_layers
        Transformer layers, from the bottom, that are not trained; the token embeddings with them.
    lora
        Train a low-rank adaptation in place of the model: by default one that can be cut to any
        rank afterwards. The model stays as it was. It wants a higher learning rate, like 1e-4.
    layers
        Transformer layers whose vectors are to be embeddings too, each at every size, like
        ``(2, 4, 6)`` or ``"all"``; the last always is. None trains the last layer alone. Of pairs,
        triplets and scored pairs.
    depth
        How layers are trained: ``"fixed"`` (`FixedPairs` over the whole grid), ``"2dmse"``
        (`TwoDMSE`) or ``"ese"`` (`ESE`, at the largest size up to 128), each with its defaults.
    compatible_with
        The model whose gallery is to be kept: a name or folder, or an encoder of any kind. The
        prefix of the new vectors is then trained to live in its Space (`CompatiblePairs`), at every
        size it may be cut to; `nestvec.upgrade.compatible_prefix` makes queries for the old gallery
        of them. It embeds the training texts once, before the first step. For pairs and triplets.
    extra_dims
        What is added to the old size, for what is new: the model is widened so far (`widened`).
    compatible_options
        Further keyword arguments of `CompatiblePairs`: ``{"near": 10}``.
    settings
        How to train; a learning rate of 5e-5 and one epoch if not given.
    fresh
        Forget an earlier training in ``output``.

    Returns
    -------
    Trained
        The folder holds the model as sentence-transformers saves it (safetensors; the sizes in
        config.json as ``matryoshka_dimensions``, layers as ``matryoshka_layers``; a model card with
        the table of sizes), the log, and for labelled texts ``classifier.safetensors``. In its
        metrics ``"spearman@64"`` is the last layer's, ``"spearman@3x64"`` layer 3's. With ``lora``
        it holds the adapter in place of the model: `load_lora` and `cut_lora` take it to a rank.

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
    given = model
    model, base, prompts = loaded_text_model(model)
    torch.manual_seed(settings.seed)  # of layers and heads that are made here
    old = None
    if compatible_with is not None:
        old = OldTexts(compatible_with, examples.kind, objective, lora)
        full = old.dims[-1] + extra_dims
        model = widened(model, full)
        dims = {*(halving(full) if dims is None else parse_dims(dims)), *old.dims}
    sizes = sizes_of(model.get_embedding_dimension(), dims, lowest=16, weights=weights)
    train, held_out = _split(examples, validation, holdout, settings.seed)
    if len(train) < 2:
        raise DataError(f"{len(train)} rows to train on; at least 2 are needed.")
    numbers = layers_of(model, layers, objective)
    _check_depth(numbers, lora, compatible_with, weights, n_dims_per_step)
    if numbers and objective is None:
        made, head = usual_objective(examples, sizes, numbers, depth, settings.seed), None
    else:
        made, head = _objective(examples, sizes, weights, n_dims_per_step, settings.seed)
    if old is not None:
        made = CompatiblePairs(sizes, old.dims, weights=weights, **(compatible_options or {}))
    chosen = made if objective is None else objective
    in_depth = {"layers": numbers, "depth": described(chosen)} if numbers else {}
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    _freeze(model, freeze_layers)
    adapter = None
    before = fingerprint(model)
    try:
        run = Run(
            Path(output),
            {
                "model": before,
                "examples": train.fingerprint(),
                "validation": None if held_out is None else held_out.fingerprint(),
                "dims": sizes,
                "objective": "usual" if objective is None else described(objective),
                "keep": float(keep),
                "weights": weights,
                "n_dims_per_step": n_dims_per_step,
                "freeze_layers": freeze_layers,
                "lora": None if lora is None else lora.to_dict(),
                "compatible": None if old is None else [old.space.space_id, described(made)],
                **in_depth,
                "settings": settings.to_dict(),
            },
            fresh=fresh,
        )
        if run.finished:
            return Trained.of(run, sizes, numbers)
        head = head if objective is None else None
        validate = None
        if held_out is not None and numbers:
            said = [prompts[role] for role in COLUMNS[examples.kind].values()]
            validate = validation_in_depth(model, said, held_out, sizes, numbers)
        elif held_out is not None:
            validate = _validation(model, prompts, held_out, sizes, head, old)
        _freeze_unused(model, examples.texts[0][0])
        if lora is not None:
            from nestvec.train.lora import attach, reference

            transformer = getattr(model[0], "auto_model", None)
            if transformer is None:
                raise ModelError(f"a {type(model[0]).__name__} has no layers for a LoRA.")
            named = reference(given, base)
            adapter = attach(transformer, lora, seed=settings.seed, base=named)
            for module in list(model)[1:]:
                module.requires_grad_(False)  # a map behind it is no part of the LoRA
        kept: nn.Module | None = None
        if keep and numbers:
            kept = keeping(chosen, numbers, sizes)
        elif keep:
            kept = KeepNeighbours(sizes, weights=weights)
        follow = chosen.follow if isinstance(chosen, FixedPairs) else None
        # they start from nothing
        fresh_parts = {r"^objective\.head": head, r"^objective\.follow": follow, r"^keep\.": kept}
        rates = {name: settings.head_rate(HEAD_RATE) for name, part in fresh_parts.items() if part}
        columns = COLUMNS[examples.kind]
        if old is not None:
            chosen = WithOld(made, old.vectors(train, columns))
        trainer = TextTrainer(
            model=model,
            args=settings.arguments(
                run.checkpoints,
                n_rows=len(train),
                kind=SentenceTransformerTrainingArguments,
                learning_rate_mapping=rates,
                prompts={name: prompts[role] for name, role in columns.items() if prompts[role]},
            ),
            train_dataset=_dataset(train, numbered=old is not None),
            loss=SentenceTransformerLoss(
                model, chosen, chunk_size=settings.chunk_size, keep=kept, keep_weight=keep
            ),
        )
        if examples.kind in ("pairs", "triplets"):
            trainer.apart = train.texts
        trainer.beside = tuple(m for m in (chosen, kept) if isinstance(m, nn.Module))
        trainer.be_careful(run, settings=settings, validate=validate)
        if adapter is not None:
            trainer.adapted = model
            adapter.join(trainer)

        def save(metrics: dict[str, float]) -> None:
            if adapter is None:
                usage = _save_model(model, run.folder, sizes, numbers)
                if old is not None:
                    own = fingerprint(TextEncoder(run.folder).model)
                    declare_compatible(run.folder, own, old.space)
            else:
                from nestvec.train.lora_files import save_adapter

                usage = save_adapter(run.folder, adapter, validate, base=before, dims=sizes)
            if head is not None:
                save_classifier(run.folder, head, examples.label_names)
            write_card(
                run.folder,
                library="sentence-transformers" if adapter is None else "peft",
                base=base,
                dims=sizes,
                layers=numbers,
                metrics=metrics,
                measured_on="rows that were held out"
                if validation is None
                else "validation data given with it",
                trained_on=f"{len(train):,} rows ({examples.kind})",
                settings=settings.to_dict() | ({} if lora is None else {"lora": lora.to_dict()}),
                usage=usage,
                compatible_with=None if old is None else old.space,
            )

        return carry_out(trainer, run, sizes, save, numbers)
    finally:
        if adapter is not None:
            adapter.remove()
        for parameter, was in trainable.items():
            parameter.requires_grad_(was)
        model.eval()


def loaded_text_model(model: Any) -> tuple[SentenceTransformer, str, dict[Role, str]]:
    """Return a model to train, a name for it, and its prompts."""
    encoder = TextEncoder(model)
    if not isinstance(encoder.model, SentenceTransformer):
        raise ModelError(f"{model!r} is no sentence-transformers model, so it cannot be trained.")
    return encoder.model, encoder.space.model or encoder.source, encoder.prompts


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
    if size < 2:
        if holdout:
            raise DataError(f"holdout {holdout!r} of {n} rows is {size}; at least 2 are needed.")
        return examples, None
    # All rows of a first text (a query) go to one side: what is held out was not trained on.
    number: dict[str, int] = {}
    group = np.array([number.setdefault(text, len(number)) for text in examples.texts[0]])
    rank = np.random.default_rng(seed).permutation(len(number))[group]
    order = np.argsort(rank, kind="stable")
    cut = size
    while cut < n and rank[order[cut]] == rank[order[cut - 1]]:
        cut += 1
    if n - cut < 2:  # one query has nearly all rows
        return examples, None
    return examples[np.sort(order[cut:])], examples[np.sort(order[:cut])]


def _check_depth(
    layers: tuple[int, ...], lora: Any, compatible_with: Any, weights: Any, n_dims_per_step: int
) -> None:
    if not layers:
        return
    if lora is not None or compatible_with is not None:
        name = "compatible_with" if lora is None else "lora"
        raise DataError(f"{name} is for the last layer's vectors alone: leave layers out, or it.")
    if weights != "uniform" or n_dims_per_step != -1:
        raise DataError(
            "weights and n_dims_per_step are for training the last layer alone: every pair of a "
            "layer and a size counts alike. Pass an objective over layers of your own instead."
        )


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
        name: value.to(model.device) if isinstance(value, Tensor) else value
        for name, value in model.preprocess([text]).items()
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
    model: Any,
    prompts: dict[Role, str],
    examples: Examples,
    dims: tuple[int, ...],
    head: NestedClassifier | None,
    old: OldTexts | None,
) -> Validate | None:
    roles = list(COLUMNS[examples.kind].values())

    def encode(column: int) -> Tensor:
        return model.encode(
            examples.texts[column],
            prompt=prompts[roles[column]] or None,
            convert_to_tensor=True,
            show_progress_bar=False,
            truncate_dim=None,
        ).float()

    texts, targets = examples.texts, examples.targets
    if examples.kind == "labelled":
        if head is None:  # an objective of the user's own: nothing says what the labels are for
            return None
        return lambda: label_accuracy(head, encode(0), targets)
    if examples.kind == "scored":
        return lambda: rank_correlation(encode(0), encode(1), targets, dims)
    if old is None:
        return lambda: pair_accuracy(encode(0), encode(1), dims, texts)
    gallery = old.encode(texts[1], "document")

    def both() -> dict[str, float]:
        queries = encode(0)
        there = gallery.to(queries)
        met = pair_accuracy(queries, there, old.dims, texts, name="top1_old")
        return pair_accuracy(queries, encode(1), dims, texts) | met

    return both


def _dataset(examples: Examples, *, numbered: bool = False) -> Dataset:
    columns: dict[str, Any] = dict(zip(COLUMNS[examples.kind], examples.texts, strict=True))
    if examples.targets is not None:
        columns["label"] = examples.targets
    if numbered:  # so that an objective finds what it knows of each row
        columns["label"] = np.arange(len(examples))
    return Dataset.from_dict(columns)


def _save_model(model: Any, folder: Path, dims: tuple[int, ...], layers: tuple[int, ...]) -> str:
    """Write the model; return how to use it, for its card."""
    with quiet():
        model.save_pretrained(str(folder), create_model_card=False)
    declare_dims(folder, dims, layers)
    short, name = dims[min(1, len(dims) - 1)], folder.resolve().name
    plain = f"""```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}", truncate_dim={short})
vectors = model.encode(texts, normalize_embeddings=True)   # cut, then normalised
```"""
    if not layers:
        return plain
    return f"""{plain}

A model that ends after an earlier layer is smaller and faster:

```
nestvec export {name} -o shorter --layer {layers[0]} --dim {short}
```"""
