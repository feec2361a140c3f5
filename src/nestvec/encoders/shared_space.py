"""Two encoders, one Space: models that were trained together say so in their folders.

An image model and a text model of a dual encoder have weights of their own, so fingerprints of
their own, and yet their vectors may be compared. Each folder then holds ``shared_space.json`` with
its own fingerprint and the one of both. It counts only while the weights are those it was written
for: a model that was trained further lives in a Space of its own again.

A query encoder that was trained against frozen documents says the same, and that it encodes queries
alone: its folder names the documents' Space, whose model encodes the documents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from nestvec._atomic import written_beside

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


def is_query_side(folder: Path | None, space: str) -> bool:
    """Return whether the model of a folder encodes queries alone into the Space it names."""
    if folder is None:
        return False
    try:
        about = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        return about.get("role") == "query" and about["shared"] == space
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def shared(folder: Path | None, own: str) -> str:
    """Return the fingerprint of the Space that a model folder shares, or its own."""
    if folder is None:
        return own
    try:
        about = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        return about["shared"] if about["own"] == own else own
    except (OSError, ValueError, KeyError, TypeError):
        return own
