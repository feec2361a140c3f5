"""Maps from one Space to another: rotations, the Matryoshka adaptor, bridges, and small codes.

The estimators need scikit-learn and are imported when first used; `nestvec.maps.codes` is numpy
only.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestvec.maps.adaptor import MatryoshkaAdaptor
    from nestvec.maps.alignment import (
        DriftBridge,
        LowRankBridge,
        ProcrustesBridge,
        RelaxedBridge,
        RidgeBridge,
        StiffBridge,
        UnchangedBridge,
    )
    from nestvec.maps.anchors import AnchorMap, anchor_maps
    from nestvec.maps.base import load_map
    from nestvec.maps.residual import ResidualBridge
    from nestvec.maps.rotation import PrincipalRotation, RandomRotation

_HOME = {
    "AnchorMap": "nestvec.maps.anchors",
    "DriftBridge": "nestvec.maps.alignment",
    "LowRankBridge": "nestvec.maps.alignment",
    "MatryoshkaAdaptor": "nestvec.maps.adaptor",
    "PrincipalRotation": "nestvec.maps.rotation",
    "ProcrustesBridge": "nestvec.maps.alignment",
    "RandomRotation": "nestvec.maps.rotation",
    "RelaxedBridge": "nestvec.maps.alignment",
    "ResidualBridge": "nestvec.maps.residual",
    "RidgeBridge": "nestvec.maps.alignment",
    "StiffBridge": "nestvec.maps.alignment",
    "UnchangedBridge": "nestvec.maps.alignment",
    "anchor_maps": "nestvec.maps.anchors",
    "load_map": "nestvec.maps.base",
}

__all__ = [
    "AnchorMap",
    "DriftBridge",
    "LowRankBridge",
    "MatryoshkaAdaptor",
    "PrincipalRotation",
    "ProcrustesBridge",
    "RandomRotation",
    "RelaxedBridge",
    "ResidualBridge",
    "RidgeBridge",
    "StiffBridge",
    "UnchangedBridge",
    "anchor_maps",
    "load_map",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nestvec.maps' has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
