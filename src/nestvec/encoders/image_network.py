"""Image networks: pixels to rows, small ones to train, and the folder they are kept in."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nestvec._atomic import written_beside
from nestvec._extras import require
from nestvec._pixels import all_pixels, squared, with_channels
from nestvec.encoders._quiet import quiet
from nestvec.errors import DataError, DimensionError, ModelError, StorageError
from nestvec.space import parse_dims
from nestvec.space.nesting import dims_from_config

require("torch", extra="image", why="an image network")

import torch  # noqa: E402  # a missing torch is said first
from torch import Tensor, nn  # noqa: E402  # likewise

from nestvec.encoders.wider import describe_head, head_from  # noqa: E402  # likewise

CONFIG, WEIGHTS, PREPROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
HEAD = "head.safetensors"
_OURS = (CONFIG, WEIGHTS, HEAD, PREPROCESSOR, "README.md")
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_FOREIGN = "foreign_backbone"  # the key of config.json for a network that transformers lacks
_HEAD = "nestvec_head"  # the key of config.json for what follows the backbone


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the network sees it.

    It is stretched to a square, its channels are brought to ``n_channels`` (grey is repeated to
    RGB; RGB is weighed to grey by ITU-R 601; alpha is dropped), and each channel c becomes
    ``(value / 255 - mean[c]) / std[c]``.

    Parameters
    ----------
    size
        Side of the square, in pixels. An image of that size is not touched.
    n_channels
        1 is grey, 3 is RGB; another number has to be that of the images.
    mean, std
        Of each channel, on the scale 0..1; one number stands for all channels.
    resample
        PIL's filter for stretching: nearest, box, bilinear, hamming, bicubic or lanczos.
    """

    size: int
    n_channels: int = 3
    mean: float | int | Sequence[float | int] = 0.5
    std: float | int | Sequence[float | int] = 0.5
    resample: str = "bilinear"

    def __post_init__(self) -> None:
        if self.size < 1 or self.n_channels < 1:
            raise DataError(
                f"images of {self.size} x {self.size} pixels and {self.n_channels} channels do not "
                f"exist: both start at 1."
            )
        if self.resample not in _RESAMPLE.values():
            raise DataError(
                f"resample {self.resample!r} is none of {', '.join(_RESAMPLE.values())}."
            )
        for name in ("mean", "std"):
            values = np.ravel(np.asarray(getattr(self, name), dtype=np.float64))
            if len(values) == 1:
                values = np.repeat(values, self.n_channels)
            if len(values) != self.n_channels or not np.isfinite(values).all():
                raise DataError(
                    f"{name} {getattr(self, name)!r} does not fit {self.n_channels} channels: one "
                    f"finite number each, or one for all."
                )
            object.__setattr__(self, name, tuple(values.tolist()))
        if min(self._tuple("std")) <= 0:
            raise DataError(f"std {self.std!r} does not fit: each has to be above 0.")

    def __call__(self, images: Any) -> Tensor:
        """Return float32 (n, n_channels, size, size).

        ``images`` is an array (n, h, w) or (n, h, w, c), or a sequence of arrays (h, w) or
        (h, w, c), PIL images or paths. Values are uint8, or whole numbers in 0..255. Raises
        `DataError` for values or channels that do not fit, `FileFormatError` for a damaged file.
        """
        pixels = all_pixels(images)
        if not len(pixels):
            raise DataError("images: empty; at least one image is needed.")
        if isinstance(pixels, np.ndarray) and pixels.shape[1:3] == (self.size, self.size):
            batch = with_channels(pixels, self.n_channels, name="images")
        else:
            channels = [
                with_channels(one, self.n_channels, name=f"images: row {row}")
                for row, one in enumerate(pixels)
            ]
            batch = np.stack([squared(one, self.size, self.resample) for one in channels])
        values = torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))).float() / 255
        mean, std = (torch.tensor(self._tuple(n)).view(-1, 1, 1) for n in ("mean", "std"))
        # Grey images come with the strides of channels_last, at which oneDNN's convolution crashes.
        return ((values - mean) / std).clone(memory_format=torch.contiguous_format)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``preprocessor_config.json`` into a folder, with the keys of transformers."""
        config = {
            "image_processor_type": "ViTImageProcessor",  # resize, rescale, normalise: no more
            "do_convert_rgb": self.n_channels == 3,
            "do_resize": True,
            "size": {"height": self.size, "width": self.size},
            "resample": next(k for k, v in _RESAMPLE.items() if v == self.resample),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self._tuple("mean")),
            "image_std": list(self._tuple("std")),
        }
        with written_beside(Path(folder) / PREPROCESSOR) as scratch:
            scratch.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Preprocessing:
        """Read ``preprocessor_config.json``; `ModelError` if it asks for what this cannot do."""
        path = Path(folder) / PREPROCESSOR
        config = _read_json(path)
        size = config.get("size")
        sides = {size} if isinstance(size, int) else set((size or {}).values())
        fixed = isinstance(size, int) or set(size or {}) == {"height", "width"}
        normalised = config.get("do_normalize", True)
        mean: Any = config.get("image_mean")
        std: Any = config.get("image_std")
        wrong = [
            why
            for why, is_so in {
                f"a size of {size}": not fixed or len(sides) != 1,
                "a crop": config.get("do_center_crop") or "crop_pct" in config,
                "no resizing": not config.get("do_resize", True),
                "no rescaling": not config.get("do_rescale", True),
                "a rescale_factor that is not 1/255": (
                    abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6
                ),
                "normalising without a mean": normalised and not (mean and std),
            }.items()
            if is_so
        ]
        if wrong:
            raise ModelError(
                f"{path} asks for {' and '.join(wrong)}, which Preprocessing does not do: it "
                f"stretches to a square and normalises. Pass preprocessing=Preprocessing(size, ...)"
                f", or a model that was trained so."
            )
        n_channels = len(mean or "RGB")
        if not normalised:
            mean, std = 0.0, 1.0
        try:
            resample = _RESAMPLE[config.get("resample", 2)]
            return cls(int(sides.pop()), n_channels, mean, std, resample)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error

    def _tuple(self, name: str) -> tuple[float, ...]:
        return getattr(self, name)  # made a tuple by __post_init__


class ImageNetwork(nn.Module):
    """A backbone whose output is one row an image: ``forward(pixel_values)`` returns (n, dim).

    ``nesting_dims`` are the sizes it was trained at, () if that is not known; `load_image_model`
    sets them.

    Parameters
    ----------
    backbone
        An image model of transformers (the row is its ``pooler_output``, flattened; without a
        pooler its CLS token, or the mean over places of a feature map), or any module that takes
        pixel values (n, channels, height, width) and returns (n, dim).
    dim
        Size of a row. Of a model of transformers it is found out; of your own module say it.
    head
        What the backbone's rows go through last: `nestvec.encoders.wider` has those that are saved.
    """

    def __init__(
        self, backbone: nn.Module, *, dim: int | None = None, head: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        if dim is None and not hasattr(backbone, "config"):
            raise ModelError(
                f"a {type(backbone).__name__} does not say how long its rows are: pass dim=."
            )
        self.dim = dim if dim is not None else self._found_dim()
        self.nesting_dims: tuple[int, ...] = ()

    def forward(self, pixel_values: Tensor) -> Tensor:
        rows = self._encoded(pixel_values)
        if rows.shape[1] != self.dim:
            raise DimensionError(
                f"the backbone returned {rows.shape[1]} dims where dim={self.dim} was said."
            )
        return rows

    def _encoded(self, pixel_values: Tensor) -> Tensor:
        rows = _rows(self.backbone(pixel_values))
        return rows if self.head is None else self.head(rows)

    def _found_dim(self) -> int:
        config: Any = self.backbone.config
        side = getattr(config, "image_size", None) or 64
        height, width = (side, side) if isinstance(side, int) else side
        first = next(self.backbone.parameters())
        blank = first.new_zeros(1, getattr(config, "num_channels", 3), height, width)
        with evaluating(self):
            return self._encoded(blank).shape[1]


def _rows(output: Any) -> Tensor:
    rows = output
    if not isinstance(output, Tensor):
        rows = getattr(output, "pooler_output", None)
        if rows is None:
            rows = getattr(output, "last_hidden_state", None)
            if rows is not None:
                rows = rows[:, 0] if rows.ndim == 3 else rows.mean(dim=(2, 3))
    if not isinstance(rows, Tensor) or rows.ndim < 2:
        raise ModelError(
            f"the backbone returned a {type(output).__name__} where rows (n, dim) are expected."
        )
    return rows.flatten(1)


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Run a network without gradients, dropout or changes of its norms; then leave it as it was."""
    training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was in training.items():
            module.training = was


def small_resnet(
    *,
    n_channels: int = 3,
    hidden_sizes: Sequence[int] = (32, 64, 128, 256),
    depths: Sequence[int] = (1, 1, 1, 1),
    embedding_size: int = 32,
) -> ImageNetwork:
    """Return a small ResNet of transformers with fresh weights; its dim is the last hidden size.

    Basic blocks, one stage a hidden size, average pooling. It takes images of any size from 32. Its
    activation is GELU: a ReLU before the pooling makes half of a small image's numbers 0, and with
    them whole short prefixes, which then have no direction.
    """
    transformers = require("transformers", extra="image", why="a small ResNet")
    config = transformers.ResNetConfig(
        num_channels=n_channels,
        embedding_size=embedding_size,
        hidden_sizes=list(hidden_sizes),
        depths=list(depths),
        layer_type="basic",
        hidden_act="gelu",
    )
    return ImageNetwork(transformers.ResNetModel(config), dim=hidden_sizes[-1])


def small_vit(
    *,
    n_channels: int = 3,
    size: int = 32,
    patch_size: int = 4,
    dim: int = 128,
    layers: int = 4,
    heads: int = 4,
) -> ImageNetwork:
    """Return a small vision transformer of transformers with fresh weights.

    The row is its pooler's output, here a linear map of the CLS token without the usual tanh.
    ``size`` is the side of its images, a multiple of ``patch_size``; ``dim`` one of ``heads``.
    """
    if size % patch_size or dim % heads:
        raise DimensionError(
            f"size {size} is not a multiple of patch_size {patch_size}, or dim {dim} not of heads "
            f"{heads}; choose them so."
        )
    transformers = require("transformers", extra="image", why="a small ViT")
    config = transformers.ViTConfig(
        num_channels=n_channels,
        image_size=size,
        patch_size=patch_size,
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * dim,
        pooler_act="linear",
    )
    return ImageNetwork(transformers.ViTModel(config), dim=dim)


def save_image_model(
    folder: str | os.PathLike[str],
    network: ImageNetwork,
    preprocessing: Preprocessing,
    dims: Iterable[int] | str,
) -> None:
    """Write a model folder as transformers lays it out; one of ours that stands there is replaced.

    ``config.json`` (with ``is_matryoshka`` and ``matryoshka_dimensions``, the full size always
    among them), ``model.safetensors`` (of the backbone), ``head.safetensors`` if there is a head,
    and ``preprocessor_config.json``. A
    backbone of transformers loads with ``AutoModel.from_pretrained(folder)``; of any other the
    config names the class, and `load_image_model` needs an instance of it.
    """
    sizes = sorted({*parse_dims(dims, full=network.dim), network.dim})
    backbone: Any = network.backbone
    with written_beside(folder, ours=_OURS) as scratch:
        scratch.mkdir()
        config = scratch / CONFIG
        if hasattr(backbone, "save_pretrained"):
            with quiet():
                backbone.save_pretrained(scratch)
            about = _read_json(config)
        else:
            save = require("safetensors.torch", extra="image", why="saving weights")
            save.save_model(backbone, str(scratch / WEIGHTS))
            kind = type(backbone)
            about = {_FOREIGN: f"{kind.__module__}.{kind.__qualname__}", "dim": network.dim}
        about |= {"is_matryoshka": True, "matryoshka_dimensions": sizes}
        about.pop(_HEAD, None)  # of the folder that the backbone came from
        if network.head is not None:
            about[_HEAD] = describe_head(network.head)
            save = require("safetensors.torch", extra="image", why="saving weights")
            save.save_model(network.head, str(scratch / HEAD))
        config.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        preprocessing.save(scratch)


def load_image_model(
    folder: str | os.PathLike[str],
    *,
    backbone: nn.Module | None = None,
    preprocessing: Preprocessing | None = None,
) -> tuple[ImageNetwork, Preprocessing, tuple[int, ...]]:
    """Read a model folder: the network (on the CPU, for use, not training), preprocessing, sizes.

    Parameters
    ----------
    folder
        As `save_image_model` or ``save_pretrained`` of transformers wrote it.
    backbone
        Takes the weights, if they are of a module that transformers does not have.
    preprocessing
        Instead of the folder's own, which is then not read.

    Returns
    -------
    network, preprocessing, dims
        ``dims`` are the nesting dims with the full size, or () if the folder names none.

    Raises
    ------
    ModelError
        If it is no image model folder, if it is damaged or lacks weights, or needs ``backbone``.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"there is no model folder {folder}.")
    about = _read_json(folder / CONFIG)
    foreign = about.get(_FOREIGN)
    if foreign and backbone is None:
        raise ModelError(
            f"{folder} holds the weights of a {foreign}, which transformers does not have: make "
            f"one as it was trained and pass it, load_image_model(folder, backbone=...)."
        )
    if backbone is not None:
        load = require("safetensors.torch", extra="image", why="loading weights").load_model
        with _damage_told(folder):
            load(backbone, str(folder / WEIGHTS), strict=True)
        network = ImageNetwork(backbone, dim=about.get("dim"), head=_head(folder, about))
    else:
        network = ImageNetwork(_pretrained(folder), head=_head(folder, about))
    preprocessing = preprocessing or Preprocessing.load(folder)
    network.nesting_dims = dims_from_config(folder, full=network.dim) or ()
    return network.eval(), preprocessing, network.nesting_dims


def _head(folder: Path, about: dict[str, Any]) -> nn.Module | None:
    if _HEAD not in about:
        return None
    load = require("safetensors.torch", extra="image", why="loading weights").load_model
    with _damage_told(folder):
        head = head_from(about[_HEAD])
        load(head, str(folder / HEAD), strict=True)
    return head


def _pretrained(folder: Path) -> nn.Module:
    auto = require("transformers", extra="image", why="loading an image model").AutoModel
    with _damage_told(folder), quiet():
        model, info = auto.from_pretrained(
            str(folder), output_loading_info=True, local_files_only=True
        )
        missing = sorted(info["missing_keys"])
        if missing and all("pooler." in key for key in missing):
            # else transformers makes up a random pooler, and its output would be taken
            return auto.from_pretrained(str(folder), add_pooling_layer=False, local_files_only=True)
        if missing:
            raise ModelError(f"{len(missing)} weights are missing, e.g. {missing[0]}")
    return model


@contextlib.contextmanager
def _damage_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")
        raise ModelError(
            f"cannot load the image model in {folder}: {reason}. The folder is incomplete or "
            f"damaged, or it is no image model; save or download it again."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{path.parent} is no image model folder: it has no {path.name}."
        ) from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}); the model folder is damaged.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} is not a JSON object; the model folder is damaged.")
    return found
