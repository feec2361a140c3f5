"""Adaptive classification: each row is named by the first size that is sure enough.

The estimator needs scikit-learn and is imported when first used; thresholds need numpy only.
"""

import importlib
from typing import TYPE_CHECKING, Any

from nestvec._extras import require

if TYPE_CHECKING:
    from nestvec.classify.adaptive import AdaptiveClassifier
    from nestvec.classify.report import AdaptiveReport
    from nestvec.classify.thresholds import apply_cascade, choose_thresholds, score_cascade

_HOME = {
    "AdaptiveClassifier": "nestvec.classify.adaptive",
    "AdaptiveReport": "nestvec.classify.report",
    "apply_cascade": "nestvec.classify.thresholds",
    "choose_thresholds": "nestvec.classify.thresholds",
    "score_cascade": "nestvec.classify.thresholds",
}

__all__ = [
    "AdaptiveClassifier",
    "AdaptiveReport",
    "apply_cascade",
    "choose_thresholds",
    "score_cascade",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nestvec.classify' has no attribute {name!r}")
    if name == "AdaptiveClassifier":
        require("sklearn", extra="fit", why="AdaptiveClassifier")
    found = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
