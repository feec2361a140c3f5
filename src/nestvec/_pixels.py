"""The door for images: a file, a PIL image or an array becomes 8-bit pixels, channels last."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec._extras import require
from nestvec.errors import DataError, FileFormatError, NestvecError, StorageError

_DEEP = ("I", "F")  # PIL's modes of more than 8 bits begin so
_GREY = ("1", "L", "LA", "La")
_CONVERTED = {(1, 3), (3, 1), (4, 1), (4, 3)}
_LUMA = np.array([19595, 38470, 7471], dtype=np.uint32)  # ITU-R 601 in 1/65536, as PIL has it


@dataclass(frozen=True)
class EncodedImage:
    """The bytes of an image file that is kept inside another file, and what messages call it."""

    data: bytes
    name: str


def as_pixels(image: Any, *, name: str = "image") -> NDArray[np.uint8]:
    """Return one image as uint8 ``(height, width, channels)``, or say what is wrong with it.

    Parameters
    ----------
    image
        A path, an `EncodedImage`, a PIL image, or an array (h, w) or (h, w, c) of whole
        numbers in 0..255. Of a file the EXIF orientation is applied. Palettes and CMYK become RGB;
        the alpha of a PIL image or a file is dropped.
    name
        What messages call it; what has a name of its own is called by that.

    Raises
    ------
    StorageError
        If there is no such file.
    FileFormatError
        If a file is no image, or truncated.
    DataError
        If the values are not 8-bit, or the shape is none of an image.
    """
    if isinstance(image, (str, os.PathLike, EncodedImage)):
        with opened(image, name=name) as found:
            ops = require("PIL.ImageOps", extra="image", why="reading images")
            return _of_pil(ops.exif_transpose(found), name_of(image, name))
    if hasattr(image, "getbands"):  # a PIL image, whose file may not have been decoded yet
        with _damage_told(name):
            return _of_pil(image, name)
    array = _eight_bit(image, name)
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise DataError(
            f"{name}: shape {array.shape} is no image; (height, width) or (height, width, "
            f"channels) is expected, none of them 0."
        )
    return array if array.ndim == 3 else array[:, :, None]


def as_pixel_batch(images: NDArray[Any], *, name: str = "images") -> NDArray[np.uint8]:
    """Return an array of n images, (n, h, w) or (n, h, w, c), as uint8 ``(n, h, w, c)``."""
    array = _eight_bit(images, name)
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise DataError(
            f"{name}: shape {array.shape} does not hold images; (n, height, width) or (n, height, "
            f"width, channels) is expected, none of them 0."
        )
    if array.ndim == 3 and array.shape[2] in (3, 4) and array.shape[1] != array.shape[2]:
        raise DataError(
            f"{name}: shape {array.shape} looks like one image where (n, height, width[, "
            f"channels]) is expected; pass images[None] for a single one."
        )
    return array if array.ndim == 4 else array[..., None]


def with_channels(
    pixels: NDArray[np.uint8], n_channels: int, *, name: str = "image"
) -> NDArray[np.uint8]:
    """Return pixels ``(..., c)`` as ``(..., n_channels)``.

    Grey is repeated to RGB, RGB is weighed to grey (ITU-R 601), and the fourth channel of RGBA is
    dropped. Any other change is a `DataError`.
    """
    given = pixels.shape[-1]
    check_channels(given, n_channels, name=name)
    if given == n_channels:
        return pixels
    if given == 1:
        return np.repeat(pixels, 3, axis=-1)
    rgb = pixels[..., :3]
    if n_channels == 3:
        return rgb
    return ((rgb @ _LUMA + 0x8000) >> 16).astype(np.uint8)[..., None]


def check_channels(given: int, n_channels: int, *, name: str = "image") -> None:
    """Raise `DataError` unless `with_channels` can make one number of channels of the other."""
    if given != n_channels and (given, n_channels) not in _CONVERTED:
        raise DataError(
            f"{name}: {given} channels cannot become the {n_channels} that are expected; only "
            f"grey, RGB and RGBA are converted. Channels come last: (height, width, channels)."
        )


def squared(pixels: NDArray[np.uint8], side: int, resample: str) -> NDArray[np.uint8]:
    """Return pixels (h, w, c) stretched to (side, side, c) by PIL; as given if they fit."""
    if pixels.shape[:2] == (side, side):
        return pixels
    pil = _pil("resizing images")
    how = pil.Resampling[resample.upper()]
    parts = [pixels] if pixels.shape[2] == 3 else np.moveaxis(pixels, 2, 0)
    done = [np.asarray(pil.fromarray(part).resize((side, side), how)) for part in parts]
    return done[0] if pixels.shape[2] == 3 else np.stack(done, axis=2)


def all_pixels(images: Any, *, name: str = "images") -> NDArray[np.uint8] | list[NDArray[np.uint8]]:
    """Return many images as uint8 (h, w, c) each: an array, or a sequence of what one can be."""
    if isinstance(images, np.ndarray) and images.dtype != object:
        return as_pixel_batch(images, name=name)
    return [as_pixels(image, name=f"{name}: row {row}") for row, image in enumerate(images)]


def name_of(image: Any, name: str) -> str:
    """Return what messages call an image: its own name or path, else ``name``."""
    if isinstance(image, EncodedImage):
        return image.name
    return str(image) if isinstance(image, (str, os.PathLike)) else name


@contextlib.contextmanager
def opened(image: Any, *, name: str = "image") -> Iterator[Any]:
    """Open a path or an `EncodedImage` with PIL; only its header is read so far.

    Raises the errors of `as_pixels`, for what happens inside the ``with``, too.
    """
    pil = _pil("reading images")
    file = io.BytesIO(image.data) if isinstance(image, EncodedImage) else image
    with _damage_told(name_of(image, name)), pil.open(file) as found:
        yield found


@contextlib.contextmanager
def _damage_told(name: str) -> Iterator[None]:
    pil = _pil("reading images")
    try:
        yield
    except NestvecError:
        raise
    except pil.UnidentifiedImageError as error:
        raise FileFormatError(f"{name} is not an image that Pillow reads.") from error
    except Exception as error:  # of a damaged file each decoder raises what it likes
        if isinstance(error, OSError) and error.errno is not None:  # the file system
            raise StorageError(f"cannot read {name}: {error.strerror}.") from error
        reason = (str(error).split("\n")[0] or type(error).__name__).rstrip(".")
        raise FileFormatError(
            f"cannot read the image {name}: {reason}; it is truncated or damaged."
        ) from error


def _eight_bit(values: Any, name: str) -> NDArray[np.uint8]:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise DataError(f"{name}: the rows have different lengths ({error}).") from error
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "iu" or (array.size and (array.min() < 0 or array.max() > 255)):
        span = ""
        if array.dtype.kind in "iuf" and array.size:
            span = f" from {array.min():g} to {array.max():g}"
        raise DataError(
            f"{name}: {array.dtype} values{span} given where uint8 pixels in 0..255 are expected. "
            f"Of floats in 0..1 make them with (255 * x).round().astype(np.uint8)."
        )
    return array.astype(np.uint8)


def _of_pil(image: Any, name: str) -> NDArray[np.uint8]:
    if image.mode.startswith(_DEEP):
        raise DataError(
            f"{name}: a PIL image of mode {image.mode!r} holds more than 8 bits a pixel where "
            f"uint8 is expected. Scale it to 0..255 and convert it to mode 'L'."
        )
    if 0 in image.size:
        raise DataError(f"{name}: an image of size {image.size} has no pixels.")
    if image.mode in _GREY:
        return np.asarray(image.convert("L"))[:, :, None]
    if "transparency" in image.info:  # PIL warns of a palette that has it
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def _pil(why: str) -> Any:
    return require("PIL.Image", extra="image", why=why)
