"""Raw input to a Space: text, images, or whatever a function of yours takes."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any, cast

from nestvec.encoders.base import Encoder, EncodeReport, Role
from nestvec.encoders.function import CallableEncoder
from nestvec.encoders.image import ImageEncoder, is_image_model
from nestvec.encoders.text import TextEncoder
from nestvec.errors import ModelError
from nestvec.space import Embeddings

__all__ = [
    "CallableEncoder",
    "EncodeReport",
    "Encoder",
    "ImageEncoder",
    "TextEncoder",
    "encode",
    "encoder_of",
]


def encode(
    items: Any,
    *,
    model: Any = "all-MiniLM-L6-v2",
    role: Role = "document",
    dim: int | None = None,
    allow_untrained: bool = False,
    ids: Any = None,
    resume: str | os.PathLike[str] | None = None,
    show_progress: bool | None = None,
    **settings: Any,
) -> Embeddings:
    """Encode texts, or images, with a model.

    Parameters
    ----------
    items
        Texts, each with something in it; for an image model what `ImageEncoder` takes.
    model
        A hub id, a local folder (of a text or an image model, or of a LoRA), a
        ``SentenceTransformer``, an ``ImageNetwork``, an `Encoder`, or any callable from a list of
        texts to an array (say ``name=`` then). A model loaded by name stays loaded for the next
        call.
    role, ids, resume, show_progress
        See `Encoder.encode`.
    dim, allow_untrained
        Cut to this prefix, as `Embeddings.prefix` does.
    **settings
        Of `TextEncoder` (``revision``, ``document_prompt``, ``layer``, ``batch_size``, ...), of
        `ImageEncoder` for an image model, or of `CallableEncoder` for a callable.

    Returns
    -------
    Embeddings
        ``array`` (n, dim) float32, in the order of ``items``.

    Raises
    ------
    DataError, ModelError, MissingExtraError
        See `Encoder.encode`, `TextEncoder` and `ImageEncoder`.
    DimensionError
        If ``dim`` does not fit; see `Embeddings.prefix`.
    """
    encoder = encoder_of(model, **settings)
    found = encoder.encode(items, role=role, ids=ids, resume=resume, show_progress=show_progress)
    return found if dim is None else found.prefix(dim, allow_untrained=allow_untrained)


def encoder_of(model: Any, **settings: Any) -> Encoder:
    """Return the encoder for whatever names or is a model; see `encode`."""
    if isinstance(model, Encoder):
        if settings:
            raise ModelError(
                f"{', '.join(settings)}: these settings belong where the encoder is made."
            )
        return model
    if isinstance(model, (str, os.PathLike)):
        given = os.fspath(model)
        return _loaded(given, _changed(Path(given)), **settings)
    if hasattr(model, "encode_document"):  # a SentenceTransformer, which is callable too
        return TextEncoder(model, **settings)
    if hasattr(model, "backbone"):  # an ImageNetwork, likewise
        return ImageEncoder(model, **settings)
    if not callable(model):
        raise ModelError(f"a {type(model).__name__} is no model: give a name, folder or function.")
    if "name" not in settings:
        raise ModelError("a function needs name=: the model whose vectors it returns.")
    return CallableEncoder(cast(Any, model), **settings)


@functools.lru_cache(maxsize=2)
def _loaded(model: str, changed: int, **settings: Any) -> Encoder:
    if is_image_model(model) and settings.get("layer") is not None:
        raise ModelError(f"{model} is an image model, which cannot be left after a layer.")
    if _is_adapter(Path(model)):
        from nestvec.train.lora_files import load_lora

        return load_lora(model, **settings)
    return (
        ImageEncoder(model, **settings) if is_image_model(model) else TextEncoder(model, **settings)
    )


def _is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of peft alone; sentence-transformers loads its own."""
    return (folder / "adapter_config.json").is_file() and not (folder / "modules.json").is_file()


def _changed(folder: Path) -> int:
    """When anything in a model folder was last written, in ns; 0 for what is no folder."""
    return max((p.stat().st_mtime_ns for p in folder.rglob("*")), default=0)
