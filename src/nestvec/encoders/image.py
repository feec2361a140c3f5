"""Images to vectors through an image network: a model folder, or a network in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nestvec._pixels import EncodedImage, as_pixel_batch, as_pixels, check_channels, opened
from nestvec.encoders.base import Encoder, Items, Role, id_of
from nestvec.encoders.compatible_with import compatible_with
from nestvec.encoders.fingerprint import image_fingerprint
from nestvec.encoders.shared_space import shared
from nestvec.errors import DataError, ModelError
from nestvec.space import Space

if TYPE_CHECKING:
    from nestvec.encoders.image_network import ImageNetwork, Preprocessing

_OF_TEXT = ("modules.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


class ImageEncoder(Encoder):
    """Encode images with an image network.

    `encode` takes a sequence of arrays (h, w) or (h, w, c), PIL images or paths, one array
    (n, h, w) or (n, h, w, c), or ``read_images(...).images``. Values are uint8, or whole numbers in
    0..255.
    Files are decoded when their batch comes, so a long list of paths costs no memory. Images are
    stretched to the square that ``preprocessing`` names; grey is repeated to RGB, RGB weighed to
    grey (ITU-R 601) and alpha dropped, as its ``n_channels`` asks.

    Parameters
    ----------
    model
        A folder as `save_image_model` or transformers wrote it, or an ``ImageNetwork``.
    preprocessing
        What happens to an image before the network sees it. None takes the folder's own; a network
        in memory needs it.
    normalise
        L2-normalise each row.
    device
        As torch names it. None takes an accelerator for a folder if there is one, and leaves a
        network in memory where it is.
    batch_size
        Images in a forward pass.

    Raises
    ------
    ModelError
        If the model cannot be loaded, or a network in memory comes without preprocessing.
    MissingExtraError
        If torch, transformers or Pillow is not installed.
    """

    _unit = "images"

    def __init__(
        self,
        model: str | os.PathLike[str] | ImageNetwork,
        *,
        preprocessing: Preprocessing | None = None,
        normalise: bool = True,
        device: str | None = None,
        batch_size: int = 64,
    ) -> None:
        from nestvec.encoders.image_network import load_image_model

        self._borrowed = not isinstance(model, (str, os.PathLike))
        if isinstance(model, (str, os.PathLike)):
            network, own, _ = load_image_model(model, preprocessing=preprocessing)
            self._name, self.source = Path(model).resolve().name, f"folder {model}"
            device = device or _accelerator()
        else:
            network, own = model, None
            self._name, self.source = "", f"a {type(model.backbone).__name__} in memory"
        if preprocessing is None and own is None:
            raise ModelError(
                "an image network in memory needs preprocessing=: what it was trained with, like "
                "Preprocessing(32, n_channels=3)."
            )
        self.network: ImageNetwork = network if device is None else network.to(device)
        self.preprocessing: Any = preprocessing or own
        self._folder = None if self._borrowed else Path(os.fspath(cast(str, model)))
        self.normalise = normalise
        self.batch_size = batch_size
        self._space = self._describe()

    @property
    def space(self) -> Space:
        """Where the vectors live; of a network in memory, as it was when it last encoded."""
        return self._space

    def _look_again(self) -> None:
        if self._borrowed:  # its owner may have trained it since
            self._space = self._describe()

    def _describe(self) -> Space:
        own = image_fingerprint(self.network, self.preprocessing)
        return Space(
            fingerprint=shared(self._folder, own),
            dim=self.network.dim,
            normalisation="l2" if self.normalise else "none",
            model=self._name,
            nesting_dims=self.network.nesting_dims,
            compatible_with=compatible_with(self._folder, own),
        )

    def _checked(self, images: Any, ids: Any) -> Items:
        if isinstance(images, (str, os.PathLike)) or hasattr(images, "getbands"):
            raise DataError(
                "images: one image given where a sequence of them is expected; pass [image]. "
                "nestvec.read_images(path).images reads a folder or a file of many."
            )
        if isinstance(images, np.ndarray) and images.dtype != object:
            images = as_pixel_batch(images)
            check_channels(images.shape[-1], self.preprocessing.n_channels, name="images")
            return images
        found = images if isinstance(images, Sequence) else list(images)
        if not len(found):
            raise DataError("images: empty; at least one image is needed.")
        for row, image in enumerate(found):
            name = f"images: row {row}{id_of(ids, row)}"
            if isinstance(image, (str, os.PathLike, EncodedImage)):
                with opened(image, name=name):  # no pixels yet
                    continue
            n_channels = as_pixels(image, name=name).shape[-1]
            check_channels(n_channels, self.preprocessing.n_channels, name=name)
        return found

    def _content(self, image: Any) -> bytes:
        if isinstance(image, EncodedImage):
            return hashlib.sha256(image.data).digest()
        if isinstance(image, (str, os.PathLike)):
            with Path(image).open("rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        pixels = np.ascontiguousarray(as_pixels(image))
        return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()

    def _vectors(self, images: list[Any], role: Role) -> ArrayLike:
        from nestvec.encoders.image_network import evaluating

        pixel_values = self.preprocessing(images)
        place = next(self.network.parameters(), pixel_values)  # of the weights
        with evaluating(self.network):
            return self.network(pixel_values.to(place.device, place.dtype)).float().cpu().numpy()

    def _lengths(self, images: Items, role: Role) -> tuple[NDArray[np.int64], int | None]:
        return np.zeros(len(images), np.int64), None


def is_image_model(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder holds an image model: a preprocessor and no tokenizer."""
    folder = Path(folder)
    has = [(folder / name).is_file() for name in ("config.json", "preprocessor_config.json")]
    return all(has) and not any((folder / name).is_file() for name in _OF_TEXT)


def _accelerator() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
