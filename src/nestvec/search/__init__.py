"""Search: cascades over arrays in memory, and `Index`, which keeps a gallery on disk.

`Index`, `Batch`, `Hits` and `Planned` need ``nestvec[index]`` and are imported when they are first
used.
"""

from typing import TYPE_CHECKING, Any

from nestvec.search.cascade import Cascade, Plan, Stage
from nestvec.search.certificate import Bound, Certificate, certify, lower_bound, n_needed
from nestvec.search.run import (
    SearchResult,
    adaptive_retrieval,
    as_plan,
    cascade_search,
    funnel_retrieval,
)

if TYPE_CHECKING:
    from nestvec.search.hits import Hits
    from nestvec.search.index import Index
    from nestvec.search.planner import Planned
    from nestvec.search.store import Batch

__all__ = [
    "Batch",
    "Bound",
    "Cascade",
    "Certificate",
    "Hits",
    "Index",
    "Plan",
    "Planned",
    "SearchResult",
    "Stage",
    "adaptive_retrieval",
    "as_plan",
    "cascade_search",
    "certify",
    "funnel_retrieval",
    "lower_bound",
    "n_needed",
]


def __getattr__(name: str) -> Any:
    if name not in ("Batch", "Hits", "Index", "Planned"):
        raise AttributeError(f"module 'nestvec.search' has no attribute {name!r}")
    from nestvec.search import index

    found = getattr(index, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
