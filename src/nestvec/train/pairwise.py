"""A loss for triplets: the right document above a hard negative, and above the batch's others."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestvec.errors import DataError


class StaticAndRandom(nn.Module):
    """Pairwise loss over static hard and in-batch random negatives (STAR).

    Each pair of the right document and a wrong one costs log(1 + exp(scale (wrong - right))). A
    query's own negative is the hard one; all other documents of the batch, other queries'
    negatives among them, are the random ones, which keep the whole from drifting while the hard
    ones order the top. The loss is the mean over the hard pairs plus ``random_weight`` times the
    mean over the random ones.

    Parameters
    ----------
    scale
        Inverse temperature; the paper has 1, for inner products that are not bounded as cosines.
    random_weight
        What the random negatives count; 0 leaves the static ones alone, which the paper shows to
        be unstable.

    ``forward(queries, positives, negatives)``: row i of each belongs together, (n, dim). Score is
    the inner product, so hand in normalised rows for cosine; `NestedLoss` does, at every size.

    References
    ----------
    Zhan et al., Optimizing Dense Retrieval Model Training with Hard Negatives, SIGIR 2021,
    arXiv:2104.08051 (STAR).
    """

    def __init__(self, *, scale: float | int = 20.0, random_weight: float | int = 1.0) -> None:
        super().__init__()
        if not scale > 0 or not random_weight >= 0:
            raise DataError(
                f"scale {scale!r} must be above 0 and random_weight {random_weight!r} 0 or more."
            )
        self.scale, self.random_weight = float(scale), float(random_weight)

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}, random_weight={self.random_weight:g}"

    def forward(self, queries: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        if not queries.shape == positives.shape == negatives.shape:
            raise DataError(
                f"rows {tuple(queries.shape)}, {tuple(positives.shape)} and "
                f"{tuple(negatives.shape)} do not fit: one positive and one negative a query."
            )
        right = (queries * positives).sum(dim=1)
        hard = F.softplus(self.scale * ((queries * negatives).sum(dim=1) - right)).mean()
        if self.random_weight == 0:
            return hard
        if len(queries) < 2:
            raise DataError("a batch of one query has no random negatives: take 2 or more.")
        others = ~torch.eye(len(queries), dtype=torch.bool, device=queries.device).repeat(1, 2)
        scores = queries @ torch.cat([positives, negatives]).T
        pairs = F.softplus(self.scale * (scores - right[:, None]))
        return hard + self.random_weight * pairs[others].mean()
