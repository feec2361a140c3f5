"""Train an image network and a text model towards each other: a nested dual encoder.

Symmetric InfoNCE with a learned temperature over noisy pairs, as ALIGN has it (Jia et al. 2021,
arXiv:2102.05918), at every size.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nestvec._extras import require
from nestvec.corpus.examples import Examples
from nestvec.corpus.images import Images
from nestvec.encoders._quiet import quiet
from nestvec.encoders.fingerprint import fingerprint, image_fingerprint
from nestvec.encoders.image_network import Preprocessing, save_image_model
from nestvec.encoders.shared_space import share
from nestvec.errors import DataError
from nestvec.train.card import declare_dims, write_card
from nestvec.train.distributed import gathered
from nestvec.train.image import usable_network
from nestvec.train.objectives import InfoNCE, NestedLoss
from nestvec.train.pixels import Numbers, embed_images, image_hash, pick
from nestvec.train.result import Trained
from nestvec.train.run import Run, described
from nestvec.train.settings import Settings
from nestvec.train.sizes import sizes_of
from nestvec.train.text import loaded_text_model
from nestvec.train.trainer import ModuleTrainer, carry_out
from nestvec.train.validation import pair_accuracy

require("sentence_transformers", extra="train", why="training a dual encoder")

from sentence_transformers import SentenceTransformer  # noqa: E402  # behind the check above
from sentence_transformers.sentence_transformer import modules  # noqa: E402  # likewise


class ImageTextTask(nn.Module):
    """Both towers and the loss: ``forward(pixel_values, place, **tokens)`` gives ``{"loss": ...}``.

    ``tokens`` are those of each caption once, ``place`` (n,) is the caption of each image.
    """

    def __init__(
        self,
        network: nn.Module,
        text: Any,
        objective: nn.Module,
        *,
        augment: nn.Module | None,
        freeze_text: bool,
    ) -> None:
        super().__init__()
        self.network, self.text, self.objective = network, text, objective
        self.augment, self.freeze_text = augment, freeze_text
        if freeze_text:
            for module in list(text)[:-2]:  # all but the projection and its normalisation
                module.requires_grad_(False)

    def train(self, mode: bool = True) -> ImageTextTask:
        super().train(mode)
        if self.freeze_text:
            self.text.eval()
        return self

    def forward(self, pixel_values: Tensor, place: Tensor, **tokens: Tensor) -> dict[str, Tensor]:
        if self.training and self.augment is not None:
            pixel_values = self.augment(pixel_values)
        pictures = self.network(pixel_values)
        captions = self.text(dict(tokens))["sentence_embedding"][place]
        with torch.autocast(pictures.device.type, enabled=False):
            return {"loss": self.objective(gathered(pictures.float()), gathered(captions.float()))}


@dataclass
class _Batch:
    """Images preprocessed, and each of their captions tokenised once."""

    images: Images
    preprocessing: Preprocessing
    captions: list[str]
    text: Any

    def __call__(self, rows: list[int]) -> dict[str, Tensor]:
        unique, place = np.unique([self.captions[row] for row in rows], return_inverse=True)
        tokens = self.text.preprocess(unique.tolist())
        return {
            "pixel_values": self.preprocessing(pick(self.images, np.array(rows))),
            "place": torch.from_numpy(place),
            **{name: value for name, value in tokens.items() if isinstance(value, Tensor)},
        }


def train_image_text(
    network: Any,
    text_model: Any,
    images: Images,
    captions: Sequence[str],
    output: str | os.PathLike[str],
    *,
    dims: Iterable[int] | str | None = None,
    preprocessing: Preprocessing | None = None,
    size: int | None = None,
    validation: tuple[Images, Sequence[str]] | None = None,
    freeze_text: bool = True,
    weights: Any = "uniform",
    augment: nn.Module | None = None,
    settings: Settings | None = None,
    fresh: bool = False,
) -> Trained:
    """Train a dual encoder whose every prefix compares images and texts.

    Parameters
    ----------
    network
        As in `train_image`; its dim is the dim of both.
    text_model
        As in `train_text`; a linear map to the network's dim is put at its end.
    images, captions
        Image i shows what caption i says, at least mostly: the loss bears noisy pairs.
    output
        A folder, new or left by the same training, which then goes on from its last checkpoint.
    dims
        Sizes; by default the full size halved down to 8. The full size is always trained.
    preprocessing, size, augment
        As in `train_image`.
    validation
        Images and their captions: how often the closest caption is an image's own, at every size.
    freeze_text
        Train only the map at the end of the text model.
    weights
        Of `NestedLoss`.
    settings
        How to train.
    fresh
        Forget an earlier training in ``output``.

    Returns
    -------
    Trained
        ``<folder>/image`` is an image model, ``<folder>/text`` a text model, each an encoder of
        nestvec; their vectors live in one Space.

    Raises
    ------
    TrainingError, DataError, DimensionError, ModelError, StorageError
        As `train_image` raises them.
    """
    settings = settings or Settings(learning_rate=1e-3, epochs=10, batch_size=128)
    settings.check(chunks=False)
    if settings.head_learning_rate is not None:
        raise DataError("head_learning_rate is for classifiers, and there are none here.")
    captions = _captions(images, captions)
    held = None if validation is None else (validation[0], _captions(*validation))
    if len(set(captions)) < 2:
        raise DataError("all captions are the same text, so there is nothing to tell apart.")
    torch.manual_seed(settings.seed)
    rows = np.arange(len(images))
    network, preprocessing, base = usable_network(network, preprocessing, size, images, rows)
    sizes = sizes_of(network.dim, dims, lowest=8, weights=weights)
    below, below_name, _ = loaded_text_model(text_model)
    run = Run(
        Path(output),
        {
            "image_model": image_fingerprint(network, preprocessing),
            "text_model": fingerprint(below),
            "images": image_hash(images, rows),
            "captions": Examples("labelled", (captions,)).fingerprint(),
            "validation": None if held is None else image_hash(held[0], np.arange(len(held[0]))),
            "dims": sizes,
            "freeze_text": freeze_text,
            "weights": weights,
            "augment": None if augment is None else described(augment),
            "settings": settings.to_dict(),
        },
        fresh=fresh,
    )
    if run.finished:
        return Trained.of(run, sizes)
    width = below.get_embedding_dimension() or 0
    projection = modules.Dense(width, network.dim, bias=False, activation_function=nn.Identity())
    text = SentenceTransformer(modules=[*below, projection, modules.Normalize()], device="cpu")
    loss = NestedLoss(InfoNCE(scale=14.3, symmetric=True, learned=True), sizes, weights=weights)

    def validate() -> dict[str, float]:
        assert held is not None
        pictures, said = held
        every = np.arange(len(pictures))
        rows = embed_images(network, preprocessing, pictures, every, settings.batch_size)
        unique, place = np.unique(said, return_inverse=True)
        texts = text.encode(unique.tolist(), convert_to_tensor=True, show_progress_bar=False)
        return pair_accuracy(
            rows, texts.float()[torch.from_numpy(place)], sizes, (pictures.ids, said)
        )

    trainer = ModuleTrainer(
        ImageTextTask(network, text, loss, augment=augment, freeze_text=freeze_text),
        Numbers(len(images)),
        run,
        settings=settings,
        collate=_Batch(images, preprocessing, captions, text),
        validate=None if held is None else validate,
    )

    def save(metrics: dict[str, float]) -> None:
        image_folder, text_folder = run.folder / "image", run.folder / "text"
        save_image_model(image_folder, network, preprocessing, sizes)
        with quiet():
            text.save_pretrained(str(text_folder), create_model_card=False)
        declare_dims(text_folder, sizes)
        prints = [image_fingerprint(network, preprocessing), fingerprint(text)]
        share([image_folder, text_folder], prints)
        write_card(
            run.folder,
            library="nestvec",
            base=f"{base} and {below_name}",
            dims=sizes,
            metrics=metrics,
            measured_on="images and captions that were not trained on",
            trained_on=f"{len(images):,} images with captions",
            settings=settings.to_dict(),
            usage=f"""```python
import nestvec as nv

pictures = nv.ImageEncoder("{run.folder.name}/image").encode(images)
asks = nv.encode(texts, model="{run.folder.name}/text", role="query")   # of the same Space
```""",
        )

    return carry_out(trainer, run, sizes, save)


def _captions(images: Images, captions: Sequence[str]) -> list[str]:
    found = [str(caption).strip() for caption in captions]
    if len(found) != len(images):
        raise DataError(f"{len(found)} captions for {len(images)} images; one each is needed.")
    if empty := [row for row, caption in enumerate(found) if not caption]:
        raise DataError(f"caption {empty[0]} has no text; drop the pair.")
    return found
