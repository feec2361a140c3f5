"""What each size is worth while training goes: embedded once, cut at every size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from nestvec.train.heads import NestedClassifier
from nestvec.train.objectives import cut

Validate = Callable[[], dict[str, float]]  # "accuracy@64" -> value

_ROWS_AT_ONCE = 1024


def rank_correlation(
    first: Tensor, second: Tensor, scores: Any, dims: Sequence[int]
) -> dict[str, float]:
    """Return Spearman's correlation of cosines and scores, by size."""
    found = {}
    for dim in dims:
        cosines = (cut(first, dim, normalise=True) * cut(second, dim, normalise=True)).sum(dim=1)
        correlation, _ = spearmanr(cosines.cpu().numpy(), scores)
        found[f"spearman@{dim}"] = float(np.asarray(correlation))
    return found


def pair_accuracy(
    queries: Tensor,
    documents: Tensor,
    dims: Sequence[int],
    texts: Sequence[Sequence[str]],
    *,
    name: str = "top1",
) -> dict[str, float]:
    """Return how often the closest of all documents is one of a query's own, by size.

    ``texts`` are those of the queries and of the documents: a text that recurs is one query with
    several documents, or one document.
    """
    asked, said = texts[0], texts[1]
    own = set(zip(asked, said, strict=True))
    found = {}
    for dim in dims:
        closest = _closest(queries, documents, dim)
        hits = [(query, said[place]) in own for query, place in zip(asked, closest, strict=True)]
        found[f"{name}@{dim}"] = sum(hits) / len(hits)
    return found


def _closest(rows: Tensor, others: Tensor, dim: int, *, not_self: bool = False) -> list[int]:
    """Return the place of the row of largest cosine, a part of the rows at a time."""
    asked, there = (cut(side, dim, normalise=True) for side in (rows, others))
    found: list[int] = []
    for some in asked.split(_ROWS_AT_ONCE):
        scores = some @ there.T
        if not_self:
            own = torch.arange(len(some), device=scores.device)
            scores[own, own + len(found)] = float("-inf")
        found += scores.argmax(dim=1).tolist()
    return found


def label_accuracy(head: NestedClassifier, rows: Tensor, labels: Any) -> dict[str, float]:
    """Return the share of rows whose class the head of each size gets right."""
    right = torch.as_tensor(labels, device=rows.device)
    return {
        f"accuracy@{dim}": float((logits.argmax(dim=1) == right).float().mean())
        for dim, logits in head(rows).items()
    }


def neighbour_accuracy(
    rows: Tensor,
    labels: Any,
    dims: Sequence[int],
    *,
    others: Tensor | None = None,
    name: str = "1nn",
) -> dict[str, float]:
    """Return how often the closest other row has a row's label, by size.

    ``others`` are the same things as another model sees them, to be searched in place of ``rows``.
    """
    right = np.asarray(labels)
    there = rows if others is None else others
    return {
        f"{name}@{dim}": float((right[_closest(rows, there, dim, not_self=True)] == right).mean())
        for dim in dims
    }
