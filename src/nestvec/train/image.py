"""Train an image network to be nested, on labelled images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestvec.corpus.images import Images, read_images
from nestvec.encoders.compatible_with import declare_compatible
from nestvec.encoders.fingerprint import image_fingerprint
from nestvec.encoders.image_network import (
    ImageNetwork,
    Preprocessing,
    load_image_model,
    save_image_model,
    small_resnet,
    small_vit,
)
from nestvec.errors import DataError, ModelError
from nestvec.train.card import write_card
from nestvec.train.compatible_image import (
    METHODS,
    OldRows,
    compatible_objective,
    compatible_sizes,
    fitting_network,
    old_model,
    options_of,
    served,
    served_head,
    stationary,
)
from nestvec.train.distributed import gathered
from nestvec.train.heads import ClassLabels, NestedClassifier
from nestvec.train.objectives import NestedLoss, SupervisedContrastive
from nestvec.train.pixels import Batch, Numbers, embed_images, image_hash, measured
from nestvec.train.result import Trained, save_classifier
from nestvec.train.run import Run, described
from nestvec.train.settings import Settings
from nestvec.train.simplex import HigherOrderCompatible
from nestvec.train.sizes import sizes_of
from nestvec.train.trainer import ModuleTrainer, carry_out
from nestvec.train.validation import label_accuracy, neighbour_accuracy

if TYPE_CHECKING:
    from nestvec.train.lora import Lora

OBJECTIVES = ("cross_entropy", "supervised_contrastive", "simplex")


class ShiftAndFlip(nn.Module):
    """Shift each image of a batch by up to ``pixels``, and mirror every other one by chance.

    ``forward(pixel_values)``: (n, c, h, w) in, the same out, drawn from torch's generator. What
    leaves on one side is filled with the border's own pixels.
    """

    def __init__(self, pixels: int = 4, *, flip: bool = True) -> None:
        super().__init__()
        self.pixels, self.flip = pixels, flip

    def extra_repr(self) -> str:
        return f"pixels={self.pixels}, flip={self.flip}"

    def forward(self, pixel_values: Tensor) -> Tensor:
        n, _, height, width = pixel_values.shape
        if self.flip:
            mirrored = torch.rand(n, device=pixel_values.device) < 0.5
            pixel_values = torch.where(
                mirrored.view(-1, 1, 1, 1), pixel_values.flip(-1), pixel_values
            )
        if not self.pixels:
            return pixel_values
        wide = F.pad(pixel_values, [self.pixels] * 4, mode="replicate")
        moves = torch.randint(0, 2 * self.pixels + 1, (2, n), device=pixel_values.device)
        rows = moves[0, :, None] + torch.arange(height, device=wide.device)
        columns = moves[1, :, None] + torch.arange(width, device=wide.device)
        number = torch.arange(n, device=wide.device)[:, None, None]
        shifted = wide.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None, :]]
        return shifted.permute(0, 3, 1, 2)


class ImageTask(nn.Module):
    """A network, what is done to its input in training, and what it is asked for.

    ``forward(pixel_values, labels, **more)`` returns ``{"loss": scalar}``; the objective is handed
    rows, labels and what else there is.
    """

    def __init__(
        self, network: nn.Module, objective: nn.Module, *, augment: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.network, self.objective, self.augment = network, objective, augment

    def forward(self, pixel_values: Tensor, labels: Tensor, **more: Tensor) -> dict[str, Tensor]:
        if self.training and self.augment is not None:
            pixel_values = self.augment(pixel_values)  # here, so that a resumed run draws the same
        rows = self.network(pixel_values)
        with torch.autocast(rows.device.type, enabled=False):  # a logit needs its digits
            return {"loss": self.objective(rows.float(), labels, **more)}


class _AllProcesses(nn.Module):
    """An objective over the rows of all processes."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, rows: Tensor, labels: Tensor, **more: Tensor) -> Tensor:
        others = {name: gathered(one) for name, one in more.items()}
        return self.objective(gathered(rows), gathered(labels), **others)


def read_labelled(
    source: str | os.PathLike[str], *, split: str | None = None, validation: str | None = None
) -> tuple[Images, Images | None]:
    """Read images to train on, and those to validate on.

    Parameters
    ----------
    source
        As `read_images` takes it.
    split
        What to train on; None takes ``train`` if there is such a split, else everything.
    validation
        A split of ``source``, or another source; None is none.

    Raises
    ------
    DataError, FileFormatError, StorageError
        As `read_images` raises them.
    """
    images = _split_or(source, split or "train", None if split else source)
    if validation is None:
        return images, None
    return images, _split_or(source, validation, validation)


def _split_or(source: Any, split: str, otherwise: Any) -> Images:
    """Read a split of a source; if it has no such split, something else (None: nothing)."""
    try:
        return read_images(source, split=split)
    except DataError as error:
        if otherwise is None or "no split" not in str(error):
            raise
        if otherwise is not source and not Path(otherwise).exists():
            raise
    return read_images(otherwise)


def train_image(
    network: Any,
    images: Images,
    output: str | os.PathLike[str],
    *,
    dims: Iterable[int] | str | None = None,
    preprocessing: Preprocessing | None = None,
    size: int | None = None,
    validation: Images | None = None,
    holdout: float | int = 0.1,
    objective: str = "cross_entropy",
    tied: bool = False,
    weights: Any = "uniform",
    label_smoothing: float | int = 0.0,
    augment: nn.Module | None = None,
    lora: Lora | None = None,
    compatible_with: Any = None,
    compatible: str = "oca",
    extra_dims: int = 32,
    compatible_options: Mapping[str, Any] | None = None,
    capacity: int | None = None,
    settings: Settings | None = None,
    fresh: bool = False,
) -> Trained:
    """Train an image network so that every prefix of its vectors is an embedding.

    Parameters
    ----------
    network
        ``"resnet"`` or ``"vit"`` (small, fresh weights), a folder of a transformers image model, an
        `ImageNetwork`, or any module that returns (n, dim) as ``ImageNetwork(module, dim=dim)``.
    images
        Labelled images; see `nestvec.corpus.read_images`.
    output
        A folder, new or left by the same training, which then goes on from its last checkpoint.
    dims
        Sizes; by default the full size halved down to 8. The full size is always trained.
    preprocessing
        What happens to an image first; by default the folder's own, or else the size and channels
        (at most 224 pixels) of the first image, with the mean and deviation of the training images.
    size
        Side of the square in pixels, in place of the first image's.
    validation
        Labelled images that are scored at every size as training goes; by default a share
        ``holdout`` of the rows is drawn by seed and not trained on.
    objective
        ``"cross_entropy"`` (MRL: one classifier a size; with ``tied`` MRL-E: one that is cut),
        ``"supervised_contrastive"``, nested, or ``"simplex"``: a classifier that never changes
        (`StationaryClassifier`), for the first of a series of models that are to be compatible.
    weights, label_smoothing
        Of `NestedCrossEntropy`.
    augment
        A module from (n, c, h, w) to the same, applied in training only, e.g. `ShiftAndFlip`.
    lora
        Train a low-rank adaptation of a trained network in place of the network: by default one
        that can be cut to any rank afterwards. The network, its batch norms too, stays as it was.
    compatible_with
        The model whose gallery is to be kept: its folder, an `ImageEncoder`, or its vectors of the
        images (Embeddings with their ids). The prefix of the new vectors is then trained to live in
        its Space, at every size it may be cut to; `nestvec.upgrade.compatible_prefix` makes queries
        for the old gallery of them. The network gets a linear layer behind it that makes room.
    compatible
        How: ``"oca"`` (`OrthogonalCompatible`), ``"bt2"`` (`BasisTransformation`, without an
        independently trained model), ``"bct"`` (`BackwardCompatible`, at the old size) or
        ``"simplex"`` (`HigherOrderCompatible`, if the old model was trained with that objective).
    extra_dims
        What OCA and BT2 add to the old size, for what is new.
    compatible_options
        Further keyword arguments of the objective: ``{"lambdas": (1, 10, 5)}``; of OCA also
        ``"balance"``, the length of what is new beside the prefix (`nestvec.encoders.wider`, None
        for a plain linear layer). `nestvec.train.OCA_PUBLISHED` is OCA as it was published.
    capacity
        Of ``objective="simplex"``: classes there will ever be. The model's size is one less.
    settings
        How to train.
    fresh
        Forget an earlier training in ``output``.

    Returns
    -------
    Trained
        The folder holds the model as transformers saves it (``config.json`` with
        ``matryoshka_dimensions``, ``model.safetensors``, ``preprocessor_config.json``), a model
        card, the log, and ``classifier.safetensors``. With ``lora`` it holds the adapter in place
        of the weights: `load_lora` and `cut_lora` take it to a rank.

    Raises
    ------
    TrainingError
        If the loss or a gradient stops being a number (the last checkpoint is kept), or ``output``
        holds another training.
    DataError, DimensionError, ModelError, StorageError
        If the images, labels, sizes, network or folder do not fit.
    """
    settings = settings or Settings(learning_rate=1e-3, epochs=20)
    settings.check(chunks=False)
    if objective not in OBJECTIVES:
        raise DataError(f"objective {objective!r} is not one of {', '.join(OBJECTIVES)}.")
    if compatible not in METHODS:
        raise DataError(f"compatible {compatible!r} is not one of {', '.join(METHODS)}.")
    stretched = compatible_with is not None or objective == "simplex"
    if lora is not None and stretched:
        raise ModelError(
            "a LoRA adapts what is there, and a compatible model gets a layer more: train it "
            "without lora=."
        )
    if lora is not None and network in ("resnet", "vit"):
        raise ModelError(
            f"a LoRA adapts a network that was trained, and {network!r} starts from nothing: give "
            f"the folder of one."
        )
    labels, names = _labels(images)
    train_rows, held_out = _split(images, labels, names, validation, holdout, settings.seed)
    torch.manual_seed(settings.seed)  # of networks and heads that are made here
    given = network
    network, preprocessing, base = usable_network(network, preprocessing, size, images, train_rows)
    old = None if compatible_with is None else old_model(compatible_with, images)
    corners = stationary(objective, capacity, old, compatible, settings.seed)
    method = "" if old is None or corners is not None else compatible
    options, balance = options_of(method, compatible_options, extra_dims)
    if stretched:
        network = fitting_network(network, compatible, old, extra_dims, corners, balance)
    before = image_fingerprint(network, preprocessing)
    if old is not None:
        dims = compatible_sizes(network.dim, dims, old)
    sizes = sizes_of(network.dim, dims, lowest=8, weights=weights)
    head = None
    if stretched:
        chosen: nn.Module = compatible_objective(
            compatible,
            network,
            sizes,
            len(names),
            old=old,
            rows=train_rows,
            labels=labels,
            corners=corners,
            weights=weights,
            options=options,
        )
    elif objective == "cross_entropy":
        head = NestedClassifier(sizes, len(names), tied=tied)
        chosen = ClassLabels(head, weights=weights, label_smoothing=label_smoothing)
    else:
        loss = NestedLoss(SupervisedContrastive(), sizes, weights=weights, n_embeddings=1)
        chosen = _AllProcesses(loss)
    run = Run(
        Path(output),
        {
            "model": before,
            "images": image_hash(images, train_rows),
            "validation": None if held_out is None else image_hash(held_out[0], held_out[1]),
            "dims": sizes,
            "objective": [objective, tied, float(label_smoothing)],
            "weights": weights,
            "augment": None if augment is None else described(augment),
            "lora": None if lora is None else lora.to_dict(),
            "compatible": None if old is None else [old.space.space_id, old.digest()],
            "compatible_by": described(chosen) if stretched else None,
            "settings": settings.to_dict(),
        },
        fresh=fresh,
    )
    if run.finished:
        return Trained.of(run, sizes)

    held_old = old
    if old is not None and held_out is not None and held_out[0] is not images:
        held_old = old_model(compatible_with, held_out[0])

    def validate() -> dict[str, float]:
        assert held_out is not None
        others, held_rows, held_labels = held_out
        rows = embed_images(network, preprocessing, others, held_rows, settings.batch_size)
        if head is not None:
            return label_accuracy(head, rows, held_labels)
        found = neighbour_accuracy(rows, held_labels, sizes)
        if held_old is None:
            return found
        beside = torch.from_numpy(held_old.vectors[held_rows]).to(rows)
        met = neighbour_accuracy(rows, held_labels, held_old.dims, others=beside, name="1nn_old")
        return found | met

    batch: Any = Batch(images, preprocessing, train_rows, labels)
    if old is not None:
        batch = OldRows(batch, old.vectors, train_rows)
    alone = not isinstance(chosen, HigherOrderCompatible)  # the others look at one row at a time
    adapter = None
    if lora is not None:
        from nestvec.train.lora import attach, reference

        named = reference(given, base)
        adapter = attach(network.backbone, lora, seed=settings.seed, base=named)
    try:
        trainer = ModuleTrainer(
            ImageTask(network, chosen if alone else _AllProcesses(chosen), augment=augment),
            Numbers(len(train_rows)),
            run,
            settings=settings,
            collate=batch,
            validate=None if held_out is None else validate,
            head=head,
        )

        if adapter is not None:
            adapter.join(trainer)

        def save(metrics: dict[str, float]) -> None:
            if adapter is None:
                made = served(network)
                usage = _save_model(run.folder, made, preprocessing, sizes)
                if corners is not None:
                    corners.save(run.folder)
                if old is not None:
                    declare_compatible(
                        run.folder, image_fingerprint(made, preprocessing), old.space
                    )
            else:
                from nestvec.train.lora_files import save_adapter

                score = None if held_out is None else validate
                usage = save_adapter(run.folder, adapter, score, base=before, dims=sizes)
                preprocessing.save(run.folder)
            classifier = head or served_head(chosen)
            if classifier is not None:
                save_classifier(run.folder, classifier, names)
            write_card(
                run.folder,
                library="transformers" if adapter is None else "peft",
                base=base,
                dims=sizes,
                metrics=metrics,
                measured_on="images that were not trained on",
                trained_on=f"{len(train_rows):,} images of {len(names)} classes",
                settings=settings.to_dict() | ({} if lora is None else {"lora": lora.to_dict()}),
                usage=usage,
                compatible_with=None if old is None else old.space,
            )

        return carry_out(trainer, run, sizes, save)
    finally:
        if adapter is not None:
            adapter.remove()


def _labels(images: Images) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return class numbers from 0 (n,) int64 and what they stand for."""
    if images.labels is None:
        raise DataError(
            "the images have no labels, and training needs them: one folder a class, or a .npz "
            "with labels."
        )
    found = np.asarray(images.labels)
    if images.label_names is not None:
        names = tuple(map(str, images.label_names))
        numbers = found.astype(np.int64)
    else:
        values, numbers = np.unique(found, return_inverse=True)
        names = tuple(map(str, values.tolist()))
    wrong = np.flatnonzero((numbers < 0) | (numbers >= len(names)))
    if len(wrong):
        raise DataError(
            f"image {wrong[0]} has the label {found[wrong[0]]!r}; there are {len(names)} classes, "
            f"0 to {len(names) - 1}."
        )
    if len(np.unique(numbers)) < 2:
        raise DataError("every image has the same label; two classes are needed.")
    return numbers, names


def _split(
    images: Images,
    labels: np.ndarray,
    names: tuple[str, ...],
    validation: Images | None,
    holdout: float | int,
    seed: int,
) -> tuple[np.ndarray, tuple[Images, np.ndarray, np.ndarray] | None]:
    """Return the rows to train on, and (images, rows, labels) to validate on."""
    every = np.arange(len(labels))
    if validation is not None:
        own, own_names = _labels(validation)
        strange = [name for name in own_names if name not in names]
        if strange:
            raise DataError(f"validation has the class {strange[0]!r}, which training has not.")
        place = np.array([names.index(name) for name in own_names])
        return every, (validation, np.arange(len(own)), place[own])
    if not 0 <= holdout < 1:
        raise DataError(f"holdout {holdout!r} is not a share: 0 to below 1.")
    n_held = int(holdout * len(labels))
    if not n_held:
        return every, None
    order = np.random.default_rng(seed).permutation(every)
    held = np.sort(order[:n_held])
    return np.sort(order[n_held:]), (images, held, labels[held])


def usable_network(
    network: Any,
    preprocessing: Preprocessing | None,
    size: int | None,
    images: Images,
    rows: np.ndarray,
) -> tuple[ImageNetwork, Preprocessing, str]:
    """Return the network in training mode, what goes before it, and a name for it."""
    if isinstance(network, (str, os.PathLike)) and str(network) not in ("resnet", "vit"):
        loaded, own, _ = load_image_model(network, preprocessing=preprocessing)
        if size is not None:
            own = replace(own, size=size)
        return loaded.train(), own, Path(network).resolve().name
    if preprocessing is None:
        preprocessing = measured(images, rows, size)
    if isinstance(network, ImageNetwork):
        return network, preprocessing, type(network.backbone).__name__
    channels = preprocessing.n_channels
    if network == "resnet":
        return small_resnet(n_channels=channels), preprocessing, "a small ResNet, fresh weights"
    if network == "vit":
        made = small_vit(n_channels=channels, size=preprocessing.size)
        return made, preprocessing, "a small ViT, fresh weights"
    raise DataError(
        f"network {network!r}: give 'resnet', 'vit', a model folder or an ImageNetwork."
    )


def _save_model(
    folder: Path, network: ImageNetwork, preprocessing: Preprocessing, dims: tuple[int, ...]
) -> str:
    """Write the network; return how to use it, for its card."""
    made = folder / "model"
    save_image_model(made, network, preprocessing, dims)
    for file in made.iterdir():
        file.replace(folder / file.name)
    made.rmdir()
    return f"""```python
import nestvec as nv

vectors = nv.ImageEncoder("{folder.resolve().name}").encode(images)
short = vectors.prefix({dims[0]})   # cut, then normalised
```"""
