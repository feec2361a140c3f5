"""Two encoders, one Space: models that were trained together say so in their folders.

An image model and a text model of a dual encoder have weights of their own, so fingerprints of
their own, and yet their vectors may be compared. Each folder then holds ``shared_space.json`` with
its own fingerprint and the one of both. It counts only while the weights are those it was written
for: a model that was trained further lives in a Space of its own again.

A query encoder that was trained against frozen documents says the same, and that it encodes queries
alone: its folder names the documents' Space, whose model encodes the documents.

A model that `nestvec export` cut out of a larger one names the larger one's fingerprint, the layer
it ends after and the full size, so that its vectors live in the Space of the larger model's at that
layer and prefix.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nestvec._atomic import written_beside
from nestvec.space import Space

_FILE = "shared_space.json"


def share(folders: Sequence[Path], fingerprints: Sequence[str]) -> None:
    """Say in each model folder that these models, with these fingerprints, share a Space."""
    both = hashlib.sha256(" ".join(sorted(fingerprints)).encode()).hexdigest()
    for folder, own in zip(folders, fingerprints, strict=True):
        with written_beside(folder / _FILE) as scratch:
            scratch.write_text(json.dumps({"own": own, "shared": f"sha256:{both}"}) + "\n")


def join_queries(folder: Path, own: str, space: str) -> None:
    """Say in a model folder that the model encodes queries into the Space of this fingerprint."""
    with written_beside(folder / _FILE) as scratch:
        about = {"own": own, "shared": space, "role": "query"}
        scratch.write_text(json.dumps(about) + "\n")


def stand_for(folder: Path, own: str, space: Space, files: Sequence[str]) -> None:
    """Say in a model folder that the model is a larger one cut in depth, or to a shorter prefix.

    ``space`` is that of the larger model at this layer and prefix; ``files`` are the names in the
    folder, so that a later export knows what it may replace.
    """
    about = {"own": own, "shared": space.fingerprint, "layer": space.layer, "dim": space.dim}
    with written_beside(folder / _FILE) as scratch:
        scratch.write_text(json.dumps(about | {"files": sorted([*files, _FILE])}) + "\n")


def stands_for(folder: Path | None, own: str) -> tuple[int | None, int] | None:
    """Return the layer and the full size that a cut model's folder names, or None for others."""
    about = _read(folder)
    if about.get("own") != own or "files" not in about:
        return None
    return about["layer"], about["dim"]


def files_of_export(folder: Path) -> tuple[str, ...]:
    """Return the names that an export wrote into a folder; () for a folder that is none."""
    return tuple(_read(folder).get("files", ()))


def is_query_side(folder: Path | None, space: str) -> bool:
    """Return whether the model of a folder encodes queries alone into the Space it names."""
    about = _read(folder)
    return about.get("role") == "query" and about.get("shared") == space


def shared(folder: Path | None, own: str) -> str:
    """Return the fingerprint of the Space that a model folder shares, or its own."""
    about = _read(folder)
    return about.get("shared", own) if about.get("own") == own else own


def _read(folder: Path | None) -> dict[str, Any]:
    """Return what a folder says; {} where it says nothing, or nothing that can be read."""
    try:
        about = {} if folder is None else json.loads((folder / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}
