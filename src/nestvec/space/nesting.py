"""Which sizes a model may be cut to: nesting dims, the presets of known models, and configs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nestvec.errors import DimensionError, ModelError

#: Models published as nested, with the sizes their authors name (full size last). The key is the
#: end of the model's name, lower case, without the organisation.
KNOWN_NESTED: Mapping[str, tuple[int, ...]] = {
    "text-embedding-3-small": (512, 1536),
    "text-embedding-3-large": (256, 1024, 3072),
    "nomic-embed-text-v1.5": (64, 128, 256, 512, 768),
    "nomic-embed-text-v2-moe": (256, 768),
    "modernbert-embed-base": (256, 768),
    "mxbai-embed-large-v1": (64, 128, 256, 512, 1024),
    "snowflake-arctic-embed-m-v1.5": (256, 768),
    "snowflake-arctic-embed-m-v2.0": (256, 768),
    "snowflake-arctic-embed-l-v2.0": (256, 1024),
    "jina-embeddings-v3": (32, 64, 128, 256, 512, 768, 1024),
    "jina-embeddings-v4": (128, 256, 512, 1024, 2048),
    "qwen3-embedding-0.6b": (32, 64, 128, 256, 512, 768, 1024),
    "qwen3-embedding-4b": (32, 64, 128, 256, 512, 768, 1024, 2560),
    "qwen3-embedding-8b": (32, 64, 128, 256, 512, 768, 1024, 2560, 4096),
    "embeddinggemma-300m": (128, 256, 512, 768),
    "gemini-embedding-001": (768, 1536, 3072),
    "gte-multilingual-base": (128, 256, 512, 768),
    "potion-base-8m": (32, 64, 128, 256),
}


def parse_dims(dims: Iterable[int] | str, *, full: int | None = None) -> tuple[int, ...]:
    """Return nesting dims rising and unique; ``"16,32,64"`` is read too.

    >>> parse_dims("64, 16,32", full=384)
    (16, 32, 64)
    """
    try:
        given: list[Any] = dims.replace(",", " ").split() if isinstance(dims, str) else list(dims)
        sizes = sorted({int(d) for d in given})
        whole = all(int(d) == float(d) for d in given)
    except (TypeError, ValueError) as error:
        raise DimensionError(
            f"nesting dims {dims!r} are not whole numbers. Write them like 16,32,64,128."
        ) from error
    if not sizes or not whole or sizes[0] < 1:
        raise DimensionError(
            f"nesting dims {dims!r} do not fit: at least one, whole and >= 1, like 16,32,64,128."
        )
    if full is not None and sizes[-1] > full:
        raise DimensionError(
            f"nesting dim {sizes[-1]} does not fit embeddings of dim {full}: "
            f"choose sizes from 1 to {full}."
        )
    return tuple(sizes)


def halving(full: int, *, lowest: int = 16) -> tuple[int, ...]:
    """Return ``full`` and the powers of two below it down to ``lowest`` (arXiv 2205.13147).

    >>> halving(384)
    (16, 32, 64, 128, 256, 384)
    >>> halving(8)
    (8,)
    """
    sizes = [full]
    power = 1 << (full - 1).bit_length() - 1 if full > 1 else 0
    while power >= lowest:
        sizes.append(power)
        power //= 2
    return tuple(sorted(set(sizes)))


def known_dims(model: str) -> tuple[int, ...] | None:
    """Return the published nesting dims of a model by its name, or None if it is not known.

    >>> known_dims("nomic-ai/nomic-embed-text-v1.5")
    (64, 128, 256, 512, 768)
    """
    return KNOWN_NESTED.get(model.rstrip("/").rpartition("/")[2].lower())


def dims_from_config(folder: Path, *, full: int) -> tuple[int, ...] | None:
    """Read ``matryoshka_dimensions`` from a model folder's configs, or None where it is silent.

    The key is the one that vLLM reads (``config.json``: ``is_matryoshka``,
    ``matryoshka_dimensions``); ``config_sentence_transformers.json`` is looked at too. ``full`` is
    always among the sizes.
    """
    for name in ("config.json", "config_sentence_transformers.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(
                f"{path} is not JSON ({error}); the model folder is damaged."
            ) from error
        dims = config.get("matryoshka_dimensions") if isinstance(config, dict) else None
        if dims:
            try:
                return tuple(sorted({*parse_dims(dims, full=full), full}))
            except DimensionError as error:
                raise ModelError(f"matryoshka_dimensions in {path}: {error}") from error
    return None
