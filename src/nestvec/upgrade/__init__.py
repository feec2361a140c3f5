"""Change the model, keep the gallery: bridge two spaces, and judge whether it is safe to serve.

Bridges need scikit-learn and are imported when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestvec.upgrade.bridge import BRIDGES, fit
    from nestvec.upgrade.prefix import compatible_prefix

_HOME = {
    "BRIDGES": "nestvec.upgrade.bridge",
    "compatible_prefix": "nestvec.upgrade.prefix",
    "fit": "nestvec.upgrade.bridge",
}

__all__ = ["BRIDGES", "compatible_prefix", "fit"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nestvec.upgrade' has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
