"""Nested (Matryoshka) embeddings: learn, measure, upgrade, search and serve vectors you can cut.

Public names are imported when they are first used, so ``import nestvec`` loads no extra.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nestvec import maps as maps
    from nestvec import upgrade as upgrade
    from nestvec.classify import AdaptiveClassifier
    from nestvec.corpus import Images, RetrievalSet, read_beir, read_images, read_texts
    from nestvec.encoders import CallableEncoder, ImageEncoder, TextEncoder, encode
    from nestvec.maps import MatryoshkaAdaptor, PrincipalRotation, RandomRotation, load_map
    from nestvec.measurement import Curve, measure
    from nestvec.search import (
        Cascade,
        Index,
        Plan,
        SearchResult,
        Stage,
        adaptive_retrieval,
        cascade_search,
        funnel_retrieval,
    )
    from nestvec.space import Embeddings, Space
    from nestvec.space.files import load

_HOME = {
    "AdaptiveClassifier": "nestvec.classify",
    "CallableEncoder": "nestvec.encoders",
    "Cascade": "nestvec.search",
    "Curve": "nestvec.measurement",
    "Embeddings": "nestvec.space",
    "ImageEncoder": "nestvec.encoders",
    "Images": "nestvec.corpus",
    "Index": "nestvec.search",
    "MatryoshkaAdaptor": "nestvec.maps",
    "Plan": "nestvec.search",
    "PrincipalRotation": "nestvec.maps",
    "RandomRotation": "nestvec.maps",
    "RetrievalSet": "nestvec.corpus",
    "SearchResult": "nestvec.search",
    "Space": "nestvec.space",
    "Stage": "nestvec.search",
    "TextEncoder": "nestvec.encoders",
    "adaptive_retrieval": "nestvec.search",
    "cascade_search": "nestvec.search",
    "encode": "nestvec.encoders",
    "funnel_retrieval": "nestvec.search",
    "load": "nestvec.space.files",
    "load_map": "nestvec.maps",
    "measure": "nestvec.measurement",
    "read_beir": "nestvec.corpus",
    "read_images": "nestvec.corpus",
    "read_texts": "nestvec.corpus",
}

_ROOMS = ("maps", "upgrade")  # packages whose functions are used as nestvec.upgrade.fit

__all__ = [
    "AdaptiveClassifier",
    "CallableEncoder",
    "Cascade",
    "Curve",
    "Embeddings",
    "ImageEncoder",
    "Images",
    "Index",
    "MatryoshkaAdaptor",
    "Plan",
    "PrincipalRotation",
    "RandomRotation",
    "RetrievalSet",
    "SearchResult",
    "Space",
    "Stage",
    "TextEncoder",
    "adaptive_retrieval",
    "cascade_search",
    "encode",
    "funnel_retrieval",
    "load",
    "load_map",
    "measure",
    "read_beir",
    "read_images",
    "read_texts",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"nestvec.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'nestvec' has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
