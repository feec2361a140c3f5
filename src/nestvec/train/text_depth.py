"""What `train_text` does where earlier layers are trained, too: their objective and validation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from nestvec.corpus.examples import Examples
from nestvec.encoders.layers import Layers, parse_layers, reading
from nestvec.errors import DataError
from nestvec.train.depth import ESE, DepthLoss, FixedPairs, KeepInDepth, TwoDMSE
from nestvec.train.objectives import InfoNCE
from nestvec.train.ranking import CoSENT
from nestvec.train.sentence_transformer import checked_layers
from nestvec.train.validation import Validate, pair_accuracy, rank_correlation

#: How layers are trained, by name.
DEPTHS = ("fixed", "2dmse", "ese")


def layers_of(model: Any, layers: Iterable[int] | str | None, objective: Any) -> tuple[int, ...]:
    """Return the layers to train, the last among them, or () if it is the last alone."""
    if isinstance(objective, DepthLoss):
        n = checked_layers(model, objective).n
        own = tuple(layer for layer in objective.layers if layer)
        if layers is not None and parse_layers(layers, n) != own:
            raise DataError(f"the objective has layers {own}, and layers={layers!r} are others.")
        return own
    if layers is None:
        return ()
    if objective is not None:
        raise DataError(
            "layers are trained by an objective over layers, and the one given takes the last "
            "alone: wrap its loss, like FixedPairs(loss, layers, dims), or leave layers out."
        )
    n = Layers(model).n
    return tuple(sorted({*parse_layers(layers, n), n}))


def usual_objective(
    examples: Examples, dims: Sequence[int], layers: tuple[int, ...], depth: str, seed: int
) -> DepthLoss:
    """Return the objective that ``depth`` names, for examples of this kind."""
    if depth not in DEPTHS:
        raise DataError(f"depth {depth!r} is not one of {', '.join(DEPTHS)}.")
    if examples.kind == "labelled":
        raise DataError(
            "layers are trained on pairs, triplets or scored pairs: on labelled texts, each layer "
            "would need classifiers of its own."
        )
    scored = examples.kind == "scored"
    base, n = (CoSENT(), 2) if scored else (InfoNCE(), None)
    if depth == "2dmse":
        generator = torch.Generator().manual_seed(seed)
        return TwoDMSE(base, layers, dims, n_embeddings=n, generator=generator)
    if depth == "ese":
        size = max([dim for dim in dims if dim <= 128], default=dims[0])
        return ESE(base, layers, dims, n_embeddings=n, compression_size=size)
    return FixedPairs(base, layers, dims, n_embeddings=n)


def keeping(objective: Any, layers: tuple[int, ...], dims: Sequence[int]) -> nn.Module:
    """Return what holds on to the start's neighbours at every pair that is trained."""
    cells = objective.pairs if isinstance(objective, FixedPairs) else product(layers, dims)
    return KeepInDepth(layers, cells)


def validation(
    model: Any,
    prompts: Sequence[str | None],
    examples: Examples,
    dims: tuple[int, ...],
    layers: tuple[int, ...],
) -> Validate:
    """Return what scores every layer at every size; ``prompts`` are those of the columns."""
    deep = Layers(model)
    reader = reading(deep, layers)

    def encode(column: int) -> Tensor:
        with deep.kept():
            rows = reader.encode(
                examples.texts[column],
                prompt=prompts[column] or None,
                convert_to_tensor=True,
                show_progress_bar=False,
            )
        return rows.float().unflatten(1, (len(layers), -1))

    def validate() -> dict[str, float]:
        first, second = encode(0), encode(1)
        found = {}
        for place, layer in enumerate(layers):
            sides = first[:, place], second[:, place]
            scores = (
                rank_correlation(*sides, examples.targets, dims)
                if examples.kind == "scored"
                else pair_accuracy(*sides, dims, examples.texts)
            )
            for name, value in scores.items():
                metric, _, dim = name.partition("@")
                found[name if layer == layers[-1] else f"{metric}@{layer}x{dim}"] = value
        return found

    return validate
