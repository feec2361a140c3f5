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
    queries: Tensor, documents: Tensor, dims: Sequence[int], texts: Sequence[str]
) -> dict[str, float]:
    """Return how often a query's own document is the closest of all, by size.

    Documents of one text are one document: any of them will do.
    """
    same = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    own = torch.tensor([same[text] for text in texts], device=documents.device)
    found = {}
    for dim in dims:
        asked, there = (cut(rows, dim, normalise=True) for rows in (queries, documents))
        right = torch.cat(
            [
                own[(some @ there.T).argmax(dim=1)] == mine
                for some, mine in zip(
                    asked.split(_ROWS_AT_ONCE), own.split(_ROWS_AT_ONCE), strict=True
                )
            ]
        )
        found[f"top1@{dim}"] = float(right.float().mean())
    return found


def label_accuracy(head: NestedClassifier, rows: Tensor, labels: Any) -> dict[str, float]:
    """Return the share of rows whose class the head of each size gets right."""
    right = torch.as_tensor(labels, device=rows.device)
    return {
        f"accuracy@{dim}": float((logits.argmax(dim=1) == right).float().mean())
        for dim, logits in head(rows).items()
    }


def neighbour_accuracy(rows: Tensor, labels: Any, dims: Sequence[int]) -> dict[str, float]:
    """Return how often the closest other row has a row's label, by size."""
    right = torch.as_tensor(labels, device=rows.device)
    found = {}
    for dim in dims:
        unit = cut(rows, dim, normalise=True)
        scores = (unit @ unit.T).fill_diagonal_(float("-inf"))
        found[f"1nn@{dim}"] = float((right[scores.argmax(dim=1)] == right).float().mean())
    return found
