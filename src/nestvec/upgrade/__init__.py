"""Change the model, keep the gallery: bridge two spaces, judge it, and do it live.

Bridges need scikit-learn and are imported when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestvec.upgrade.bridge import BRIDGES, fit
    from nestvec.upgrade.compatibility import CompatibilityMatrix, compatibility_matrix
    from nestvec.upgrade.estimating import Estimate, estimate
    from nestvec.upgrade.judgement import AtSize, Judgement, judge
    from nestvec.upgrade.live import Status, Upgrade
    from nestvec.upgrade.prefix import compatible_prefix

_HOME = {
    "AtSize": "nestvec.upgrade.judgement",
    "BRIDGES": "nestvec.upgrade.bridge",
    "CompatibilityMatrix": "nestvec.upgrade.compatibility",
    "Estimate": "nestvec.upgrade.estimating",
    "Judgement": "nestvec.upgrade.judgement",
    "Status": "nestvec.upgrade.live",
    "Upgrade": "nestvec.upgrade.live",
    "compatibility_matrix": "nestvec.upgrade.compatibility",
    "compatible_prefix": "nestvec.upgrade.prefix",
    "estimate": "nestvec.upgrade.estimating",
    "fit": "nestvec.upgrade.bridge",
    "judge": "nestvec.upgrade.judgement",
}

__all__ = [
    "BRIDGES",
    "AtSize",
    "CompatibilityMatrix",
    "Estimate",
    "Judgement",
    "Status",
    "Upgrade",
    "compatibility_matrix",
    "compatible_prefix",
    "estimate",
    "fit",
    "judge",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nestvec.upgrade' has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
