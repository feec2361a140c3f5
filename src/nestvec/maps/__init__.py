"""Maps from one Space to another: rotations, the Matryoshka adaptor, and small codes.

The estimators need scikit-learn and are imported when first used; `nestvec.maps.codes` is numpy
only.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestvec.maps.adaptor import MatryoshkaAdaptor
    from nestvec.maps.base import load_map
    from nestvec.maps.rotation import PrincipalRotation, RandomRotation

_HOME = {
    "MatryoshkaAdaptor": "nestvec.maps.adaptor",
    "PrincipalRotation": "nestvec.maps.rotation",
    "RandomRotation": "nestvec.maps.rotation",
    "load_map": "nestvec.maps.base",
}

__all__ = ["MatryoshkaAdaptor", "PrincipalRotation", "RandomRotation", "load_map"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nestvec.maps' has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
