"""What `train_image` does when a new network is to hold an older model's Space."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nestvec.corpus.images import Images
from nestvec.encoders.image_network import ImageNetwork
from nestvec.encoders.wider import BalancedLinear, ChangedBasis, wider_linear
from nestvec.errors import DataError, DimensionError
from nestvec.space import Embeddings, Space, halving, parse_dims
from nestvec.train.compatible import (
    OCA_USUAL,
    BackwardCompatible,
    BasisTransformation,
    OldClasses,
    OrthogonalCompatible,
)
from nestvec.train.heads import NestedClassifier
from nestvec.train.pixels import pick
from nestvec.train.simplex import HigherOrderCompatible, StationaryClassifier, StationaryLabels

METHODS = ("oca", "bt2", "bct", "simplex")


@dataclass(frozen=True)
class OldModel:
    """The old model's Space, its vectors of all images (n, size), and its folder if it has one."""

    space: Space
    vectors: np.ndarray
    folder: Path | None

    @property
    def dims(self) -> tuple[int, ...]:
        """Sizes that old galleries may have."""
        return tuple(sorted({*self.space.nesting_dims, self.space.size}))

    def digest(self) -> str:
        """Return a hash of the vectors."""
        return hashlib.sha256(np.ascontiguousarray(self.vectors).data).hexdigest()[:16]


def old_model(compatible_with: Any, images: Images) -> OldModel:
    """Return the old model's vectors of some images.

    ``compatible_with`` is a model folder, an `ImageEncoder`, or the vectors themselves, as
    Embeddings whose ids are those of the images.
    """
    folder = None
    if isinstance(compatible_with, Embeddings):
        found = compatible_with[compatible_with.rows_of(np.asarray(images.ids))]
    else:
        from nestvec.encoders import ImageEncoder

        encoder = compatible_with
        if isinstance(encoder, (str, os.PathLike)):
            folder = Path(encoder)
            encoder = ImageEncoder(folder)
        found = encoder.encode(pick(images, np.arange(len(images.ids))))
    if found.space.metric == "dot" and not found.space.has_unit_rows:
        raise DataError(
            f"{found.space.label} is compared by dot products of unnormalised vectors, whose "
            f"lengths no prefix at length 1 can hold. Normalise the old gallery first."
        )
    return OldModel(found.space, found.array, folder)


def stationary(
    objective: str, capacity: int | None, old: OldModel | None, method: str, seed: int
) -> StationaryClassifier | None:
    """Return the corners to train to: the old model's, or new ones, or None for other methods."""
    if old is not None and method == "simplex":
        if old.folder is None:
            raise DataError("the old model's corners lie in its folder: compatible_with=FOLDER.")
        return StationaryClassifier.load(old.folder)
    if objective != "simplex":
        return None
    if capacity is None:
        raise DataError(
            "objective 'simplex' needs capacity=: the number of classes there will ever be, those "
            "to come among them. The model's size is the capacity less 1."
        )
    return StationaryClassifier(capacity, seed=seed)


def compatible_sizes(full: int, dims: Iterable[int] | str | None, old: OldModel) -> tuple[int, ...]:
    """Return the sizes to train: those asked for (halved by default), and all of the old model."""
    asked = halving(full, lowest=8) if dims is None else parse_dims(dims)
    return tuple(sorted({*asked, *old.dims, full}))


def options_of(
    method: str, given: Mapping[str, Any] | None, extra: int
) -> tuple[dict[str, Any], float | int | None]:
    """Return a method's options, those that were not given the usual ones, and OCA's balance."""
    options = dict(given or {})
    if method != "oca":
        return options, None
    options = OCA_USUAL | options
    balance = options.pop("balance")
    return options, balance if extra else None  # with no room for what is new there is no balance


def fitting_network(
    network: ImageNetwork,
    method: str,
    old: OldModel | None,
    extra: int,
    corners: StationaryClassifier | None,
    balance: float | int | None = None,
) -> ImageNetwork:
    """Return the network with a last layer that makes rows of the size that the method asks for."""
    if network.head is not None:
        raise DimensionError(
            "the network has a last layer already, from an earlier compatible training. Start from "
            "ImageNetwork(network.backbone), or from fresh weights."
        )
    head: nn.Module
    if corners is not None:
        head = wider_linear(network.dim, corners.capacity - 1)
    else:
        assert old is not None
        size = old.space.size
        if method == "bt2":
            head = ChangedBasis(network.dim, size, size, extra=extra)
        elif balance is not None:
            head = BalancedLinear(network.dim, size, size + extra, balance=balance)
        else:
            head = wider_linear(network.dim, size if method == "bct" else size + extra)
    return ImageNetwork(network.backbone, dim=_rows_of(head), head=head)


def _rows_of(head: nn.Module) -> int:
    size = head.out_features
    assert isinstance(size, int)
    return size


def compatible_objective(
    method: str,
    network: ImageNetwork,
    sizes: tuple[int, ...],
    n_classes: int,
    *,
    old: OldModel | None,
    rows: np.ndarray,
    labels: np.ndarray,
    corners: StationaryClassifier | None,
    weights: Any,
    options: dict[str, Any],
) -> nn.Module:
    """Return the objective of (rows, labels, old), where images ``rows`` are to train on."""
    if corners is not None:
        corners.check_classes(n_classes)
        corners.dims = sizes
        if old is None:
            return StationaryLabels(corners, weights=weights, **options)
        return HigherOrderCompatible(StationaryLabels(corners, weights=weights), **options)
    assert old is not None
    options = {"weights": weights, **options}
    vectors = torch.from_numpy(old.vectors[rows])
    classes = OldClasses(vectors, torch.from_numpy(labels[rows]), n_classes, dims=old.dims)
    if method == "bt2":
        basis = network.head
        assert isinstance(basis, ChangedBasis)
        options.pop("weights")  # its classifier has one size: the rows before the change of basis
        return BasisTransformation(
            basis, NestedClassifier((basis.dim,), n_classes), classes, **options
        )
    if method == "bct":
        return BackwardCompatible(NestedClassifier(sizes, n_classes), classes, **options)
    head = NestedClassifier(sizes, n_classes, normalise=True)
    return OrthogonalCompatible(head, classes, **options)


def served(network: ImageNetwork) -> ImageNetwork:
    """Return the network with plain weights, as it is saved."""
    if not isinstance(network.head, ChangedBasis):
        return network
    return ImageNetwork(network.backbone, dim=network.dim, head=network.head.fixed())


def served_head(objective: nn.Module) -> NestedClassifier | None:
    """Return classifiers of the rows as they are served, if the objective has any."""
    if isinstance(objective, OrthogonalCompatible):
        return objective.plain_head()
    return objective.head if isinstance(objective, BackwardCompatible) else None


class OldRows:
    """Batches of another collator, with the old model's vectors of the same rows."""

    def __init__(self, batch: Any, vectors: np.ndarray, rows: np.ndarray) -> None:
        self.batch, self.vectors, self.rows = batch, vectors, rows

    def __call__(self, places: list[int]) -> dict[str, Tensor]:
        return self.batch(places) | {"old": torch.from_numpy(self.vectors[self.rows[places]])}
