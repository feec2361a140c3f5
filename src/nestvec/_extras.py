"""Optional dependencies: imported where they are used, named when they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from nestvec.errors import MissingExtraError


def require(module: str, *, extra: str, why: str) -> Any:
    """Import ``module``, or say which ``pip install`` brings it.

    Parameters
    ----------
    module
        Dotted import name, e.g. ``"faiss"``.
    extra
        The nestvec extra that installs it.
    why
        What it is needed for; the message begins with it.
    """
    try:
        found: ModuleType = importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{why} needs {module.partition('.')[0]}, which is not installed ({error}). "
            f"Type: pip install 'nestvec[{extra}]'"
        ) from error
    return found
