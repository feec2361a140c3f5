"""A model whose prefix is an older model's Space says so in its folder.

``compatible_with.json`` holds the stamp of the old Space and the model's own fingerprint. As with
``shared_space.json`` it counts only while the weights are those it was written for: a model that
was trained further may have left the old Space, and config.json would still carry the claim along.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nestvec._atomic import written_beside
from nestvec.space import Space

_FILE = "compatible_with.json"


def declare_compatible(folder: Path, own: str, old: Space) -> None:
    """Say that the first ``old.size`` numbers of this model's vectors live in the Space ``old``."""
    about = {"space_id": old.space_id, "dim": old.size, "own": own, "space": old.to_dict()}
    with written_beside(folder / _FILE) as scratch:
        scratch.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def compatible_with(folder: Path | None, own: str) -> dict[str, Any] | None:
    """Return the stamp of the Space that a folder's model is compatible with, or None."""
    if folder is None:
        return None
    try:
        about = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        return about["space"] if about["own"] == own else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
