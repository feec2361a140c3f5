"""Stay what the model was: every size keeps the neighbours that the untrained full size had.

Contrastive training on a few thousand pairs moves a good model away from what it knew. This
objective holds it: the batch's texts attend to each other at every size as they did at full size
before training (self-distillation across sizes, as in Starbucks, arXiv:2410.13230; the neighbour
distribution of `nestvec.MatryoshkaAdaptor`, for encoders).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from nestvec.errors import DataError
from nestvec.space import parse_dims
from nestvec.train.objectives import cut, dim_weights


class KeepNeighbours(nn.Module):
    """Cross-entropy of each prefix's neighbour distribution with that of the start's full size.

    Parameters
    ----------
    dims
        Sizes.
    temperature
        Of the start's distribution over the batch. That of each prefix is learned from there:
        short prefixes have larger cosines, and what counts is their order.
    weights
        ``"uniform"``, ``"boost_low"`` or one number a size, shortest first; added up.

    ``forward(rows, start)``: the rows (n, dim) of a batch of texts, now and before training. The
    latter is detached. At least 3 rows are needed for anyone to have a choice.
    """

    def __init__(
        self,
        dims: Iterable[int] | str,
        *,
        temperature: float | int = 0.05,
        weights: str | Sequence[float] = "uniform",
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise DataError(f"temperature {temperature!r} must be above 0.")
        self.dims = parse_dims(dims)
        self.temperature = float(temperature)
        self.weights = dim_weights(weights, len(self.dims))
        self.log_scales = nn.Parameter(torch.full((len(self.dims),), -math.log(self.temperature)))

    def extra_repr(self) -> str:
        return f"dims={self.dims}, temperature={self.temperature:g}, weights={self.weights}"

    def forward(self, rows: Tensor, start: Tensor) -> Tensor:
        if rows.shape[0] != start.shape[0] or len(rows) < 3:
            raise DataError(
                f"{len(rows)} rows now and {len(start)} before do not fit: the same texts, 3 or "
                f"more, are needed."
            )
        itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        before = cut(start.detach(), start.shape[-1], normalise=True)
        target = (before @ before.T / self.temperature).masked_fill(itself, -math.inf).softmax(1)
        terms = []
        for place, (dim, weight) in enumerate(zip(self.dims, self.weights, strict=True)):
            now = cut(rows, dim, normalise=True)
            logits = (now @ now.T * self.log_scales[place].exp()).masked_fill(itself, -math.inf)
            share = logits.log_softmax(dim=1).masked_fill(itself, 0.0)
            terms.append(-weight * (target * share).sum(dim=1).mean())
        return torch.stack(terms).sum()
