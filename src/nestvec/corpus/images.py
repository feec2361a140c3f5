"""Images from folders, npz files and Hugging Face datasets, with labels where they have some."""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec import _checks
from nestvec._extras import require
from nestvec._pixels import EncodedImage, as_pixel_batch
from nestvec.errors import DataError, FileFormatError, NestvecError, StorageError

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_SPLITS = ("train", "test", "val", "valid", "validation", "dev")
_IMAGES = ("image", "images", "img", "x")
_LABELS = ("label", "labels", "y")


@dataclass(frozen=True, eq=False)
class Images:
    """Images, their ids, and their classes if they are known.

    Parameters
    ----------
    ids
        One an image, unique.
    images
        In order: an array (n, h, w) or (n, h, w, c) uint8, or a sequence of paths, arrays or PIL
        images. `ImageEncoder` and ``Preprocessing`` take them as they are, and files stay closed
        until then.
    labels : (n,) int64, optional
        Class numbers from 0.
    label_names
        Name of each class number.

    Raises
    ------
    DataError
        If ids repeat, counts differ, there are no images, or a label is below 0 or has no name.
    """

    ids: list[str]
    images: Any
    labels: Any = None
    label_names: list[str] | None = None

    def __post_init__(self) -> None:
        if not len(self.images):
            raise DataError("images: empty; at least one image is needed.")
        _checks.as_ids(self.ids, len(self.images))
        if self.labels is not None:
            labels = _class_numbers(self.labels, self.label_names)
            if len(labels) != len(self.images):
                raise DataError(f"{len(labels)} labels for {len(self.images)} images.")
            object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        known = "no labels" if self.labels is None else f"{len(np.unique(self.labels))} classes"
        return f"Images({len(self):,} images, {known})"


def read_images(path: str | os.PathLike[str], *, split: str | None = None) -> Images:
    """Read images of one's own; files among them are opened only when they are used.

    Parameters
    ----------
    path
        * a folder with one folder a class, whose files (png, jpeg, webp, bmp, gif, tiff, ppm; at
          any depth, not the hidden ones) are its images. These folders may lie in ``train``,
          ``test``, ``val``, ...; class numbers are then the same in every split;
        * a folder of such files: no labels. It, too, may lie in splits;
        * an ``.npz`` with ``x_<split>`` and maybe ``y_<split>``, or ``x`` and ``y``, or ``images``
          and ``labels``; other arrays in it are ignored. Labels that are text are numbered in
          sorted order, over all splits;
        * a folder that Hugging Face ``datasets`` saved, with a column ``image`` (or ``img``) and
          maybe ``label``, a ``ClassLabel`` or whole numbers (-1 throughout is no labels);
        * one image file.
    split
        Which split, like ``"train"``. It has to be said where there are several.

    Returns
    -------
    Images
        Ids are paths inside the folder, or ``<split>-<row>`` (``<row>`` where there is no split).

    Raises
    ------
    StorageError
        If there is nothing at ``path``, or it may not be read.
    FileFormatError
        If a file is damaged, or holds no images.
    DataError
        If no image is found, there is no such split, the arrays are no images, or labels do not fit
        them. An image file that is damaged is an error where it is used.
    """
    path = Path(path)
    try:
        if path.is_dir():
            is_dataset = any((path / n).is_file() for n in ("dataset_dict.json", "state.json"))
            return (_dataset if is_dataset else _folder)(path, split)
        if not path.exists():
            raise StorageError(f"cannot read {path}: there is no such file or folder.")
        if path.suffix.lower() == ".npz":
            return _npz(path, split)
        if _is_image(path):
            _chosen(path, [], split)
            return Images([path.name], [path])
    except OSError as error:
        if isinstance(error, NestvecError):
            raise
        raise StorageError(
            f"cannot read {error.filename or path}: {error.strerror or error}."
        ) from error
    raise FileFormatError(
        f"{path} holds no images: give a folder of them, an .npz, a folder that datasets saved, or "
        f"one file that ends in {', '.join(_ENDINGS)}."
    )


def _chosen(path: Path, splits: Sequence[str], split: str | None) -> str | None:
    """Return the split to read, None where there are none, or say which there are."""
    if split in splits or (split is None and not splits):
        return split
    there = ", ".join(splits)
    if not splits:
        raise DataError(f"{path} has no splits, so there is no {split!r}: leave the split out.")
    if split is not None:
        raise DataError(f"{path} has no split {split!r}; its splits are: {there}.")
    if len(splits) > 1:
        raise DataError(
            f"{path} has the splits {there}: say which, split={splits[0]!r} in Python, --split "
            f"{splits[0]} on the command line."
        )
    return splits[0]


def _row_ids(split: str | None, n: int) -> list[str]:
    return [f"{split}-{row}" if split else str(row) for row in range(n)]


def _class_numbers(labels: Any, names: Sequence[str] | None) -> NDArray[np.int64]:
    array = np.asarray(labels)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"labels: one whole number an image is expected, got dtype {array.dtype} and shape "
            f"{array.shape}."
        )
    n_classes = len(names) if names is not None else np.iinfo(np.int64).max
    bad = np.flatnonzero((array < 0) | (array >= n_classes))
    if len(bad):
        fit = "from 0" if names is None else f"0..{n_classes - 1}, which have names"
        raise DataError(f"labels: row {bad[0]} has label {array[bad[0]]}; class numbers are {fit}.")
    return array.astype(np.int64)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Put the path before the message of a `DataError`."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"{path}: {error}") from error


# --- folders --------------------------------------------------------------------------------------


def _folder(root: Path, split: str | None) -> Images:
    splits = [p.name for p in _folders(root) if p.name in _SPLITS]
    beside = [p.name for p in _folders(root) if p.name not in splits and any(_files(p))]
    if splits and beside:
        raise DataError(
            f"{root} holds {splits[0]}/ beside {beside[0]}/, so it is not clear whether these are "
            f"splits or classes. Move one."
        )
    chosen = _chosen(root, splits, split)
    parts = [root / name for name in splits] or [root]
    top = root / chosen if chosen else root
    names = sorted({p.name for part in parts for p in _folders(part)})
    flat = [p for p in sorted(top.iterdir()) if _is_image(p)]
    classes = {name: [*_files(top / name)] for name in names if (top / name).is_dir()}
    classes = {name: files for name, files in classes.items() if files}
    if flat and classes:
        raise DataError(
            f"{top} holds images ({flat[0].name}) beside folders of images "
            f"({next(iter(classes))}/), so it is not clear what the classes are. Move them."
        )
    paths = flat or [p for files in classes.values() for p in files]
    if not paths:
        raise DataError(
            f"no images found in {top}: it reads files that end in {', '.join(_ENDINGS)}."
        )
    ids = [p.relative_to(root).as_posix() for p in paths]
    if flat:
        return Images(ids, paths)
    labels = np.repeat([names.index(name) for name in classes], [*map(len, classes.values())])
    return Images(ids, paths, labels, names)


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if not hidden and _is_image(file):
            yield file


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _ENDINGS and not path.name.startswith(".") and path.is_file()


# --- npz ------------------------------------------------------------------------------------------


def _npz(path: Path, split: str | None) -> Images:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            splits = [name[2:] for name in arrays.files if name.startswith("x_")]
            if splits:
                chosen = _chosen(path, splits, split)
                x, y = f"x_{chosen}", f"y_{chosen}"
            else:
                chosen = _chosen(path, [], split)
                x = next((n for n in _IMAGES if n in arrays.files), "")
                y = next((n for n in _LABELS if n in arrays.files), "")
            if not x:
                raise FileFormatError(
                    f"{path} has no array of images, only {', '.join(arrays.files) or 'nothing'}. "
                    f"Call it x (and y for labels), or x_train, y_train, x_test, y_test."
                )
            images = _member(arrays, x, path)
            labels = _member(arrays, y, path) if y in arrays.files else None
            names = None
            if labels is not None and labels.dtype.kind == "U":
                beside = [f"y_{name}" for name in splits if f"y_{name}" in arrays.files] or [y]
                names = np.unique(np.concatenate([_member(arrays, n, path) for n in beside]))
                labels, names = np.searchsorted(names, labels), names.tolist()
    except (EOFError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, NestvecError):
            raise
        reason = str(error).split("\n")[0].rstrip(".")
        raise FileFormatError(f"cannot read {path}: {reason}; it is damaged.") from error
    pixels = as_pixel_batch(images, name=f"{path}: {x}")
    with _named(path):
        return Images(_row_ids(chosen, len(pixels)), pixels, labels, names)


def _member(arrays: Any, name: str, path: Path) -> NDArray[Any]:
    try:
        return arrays[name]
    except ValueError as error:
        if "pickle" not in str(error):
            raise
        raise DataError(
            f"{path}: {name} is an array of Python objects (images of mixed shapes?), which is not "
            f"read. Save the images as files in a folder, or resize them to one shape."
        ) from error


# --- Hugging Face datasets ------------------------------------------------------------------------


class _Stored(Sequence[EncodedImage]):
    """The images of a datasets folder, read from its memory map one by one."""

    def __init__(self, column: Any, names: list[str]) -> None:
        self.column = column
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = range(len(self))[row]
        cell = self.column[row].as_py() or {}
        data, path = cell.get("bytes"), cell.get("path")
        if data is None and path is None:
            raise DataError(f"{self.names[row]} is empty. Drop that row.")
        return EncodedImage(data, self.names[row]) if data is not None else Path(str(path))


def _dataset(folder: Path, split: str | None) -> Images:
    """Read what ``datasets.save_to_disk`` wrote: Arrow streams, listed in ``state.json``."""
    pa = require("pyarrow", extra="index", why="reading Hugging Face datasets folders")
    try:
        chosen, top = None, folder
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
            chosen = _chosen(folder, splits, split)
            top = folder / str(chosen)
        else:
            _chosen(folder, [], split)
        files = json.loads((top / "state.json").read_bytes())["_data_files"]
        streams = [pa.memory_map(str(top / file["filename"])) for file in files]
        table = pa.concat_tables([pa.ipc.open_stream(stream).read_all() for stream in streams])
        about = json.loads((top / "dataset_info.json").read_bytes()).get("features") or {}
    except NestvecError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise FileFormatError(
            f"cannot read the datasets folder {folder}: {reason}; it is damaged."
        ) from error
    x = next((name for name in _IMAGES if name in table.column_names), None)
    y = next((name for name in _LABELS if name in table.column_names), None)
    kind = None if x is None else table.schema.field(x).type
    if kind is None or not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise FileFormatError(
            f"{folder} has no column of images: 'image' is expected, with the feature "
            f"datasets.Image(); there is {', '.join(f'{f.name} ({f.type})' for f in table.schema)}."
        )
    ids = _row_ids(chosen, len(table))
    images = _Stored(table.column(x), [f"{folder}: image {one}" for one in ids])
    with _named(folder):
        labels = None if y is None else table.column(y)
        if labels is None or set(labels.unique().to_pylist()) == {-1}:  # as the hub has test splits
            return Images(ids, images)
        if labels.null_count:
            raise DataError(f"{labels.null_count} rows have no {y}. Drop them.")
        if not pa.types.is_integer(labels.type):
            raise DataError(
                f"the column {y!r} holds {labels.type} where whole numbers are expected. Number it "
                f"with dataset.class_encode_column({y!r}) and save it again."
            )
        return Images(ids, images, labels.to_numpy(), about.get(y, {}).get("names"))
