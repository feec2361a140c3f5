"""Cascades: search cheap first, then exact; run over arrays in memory."""

from nestvec.search.cascade import Cascade, Plan, Stage
from nestvec.search.run import (
    SearchResult,
    adaptive_retrieval,
    as_plan,
    cascade_search,
    funnel_retrieval,
)

__all__ = [
    "Cascade",
    "Plan",
    "SearchResult",
    "Stage",
    "adaptive_retrieval",
    "as_plan",
    "cascade_search",
    "funnel_retrieval",
]
