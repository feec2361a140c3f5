"""A loss for queries alone: at each step, what is found and should not be (ADORE)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestvec.errors import DataError
from nestvec.train.objectives import Weights, cut, weighed_dims

_ROWS_AT_ONCE = 1 << 17  # documents scored at a time


class DynamicNegatives(nn.Module):
    """Move queries towards their documents and away from what an exact search finds for them now.

    The documents are frozen. For each query and size all of them are scored; the first ``k`` that
    are not relevant are its negatives. A pair of a relevant document and a negative costs
    log(1 + exp(scale (wrong - right))), weighed by how much nDCG would change if the two changed
    places in the ranking as it is (LambdaLoss). A query's loss is the sum over its pairs; of a
    batch, the mean over queries; over sizes, the weighted sum.

    Parameters
    ----------
    documents
        Rows (n, dim), compared by cosine. They are copied, cut and normalised here.
    relevant
        For each query number the rows of its relevant documents, with their grades: a mapping
        ``{row: grade}``. The gain is the grade.
    dims, weights
        Sizes, and what each weighs.
    k
        Negatives a query.
    scale
        Inverse temperature.

    ``forward(queries, numbers)``: rows (n, dim), and which query each is (n,).

    References
    ----------
    Zhan et al., Optimizing Dense Retrieval Model Training with Hard Negatives, SIGIR 2021,
    arXiv:2104.08051 (ADORE). Wang et al., The LambdaLoss Framework, CIKM 2018,
    doi:10.1145/3269206.3271784. What is ours: every size has its own ranking.
    """

    def __init__(
        self,
        documents: Tensor,
        relevant: Sequence[dict[int, float]],
        dims: Iterable[int] | str,
        *,
        k: int = 200,
        scale: float | int = 20.0,
        weights: Weights = "uniform",
    ) -> None:
        super().__init__()
        if k < 1 or not scale > 0:
            raise DataError(f"k {k!r} must be 1 or more, and scale {scale!r} above 0.")
        self.dims, self.weights = weighed_dims(dims, weights)
        self.k, self.scale = k, float(scale)
        for number, found in enumerate(relevant):
            if not found or min(found) < 0 or max(found) >= len(documents):
                raise DataError(
                    f"query {number} has the relevant rows {sorted(found)}, and there are "
                    f"{len(documents)} documents: 1 row or more, below that number."
                )
            if len(found) == len(documents):
                raise DataError(f"query {number} has no negative: every document is relevant.")
        most = max(map(len, relevant), default=0)
        rows = torch.zeros(len(relevant), most, dtype=torch.long)
        gains = torch.zeros(len(relevant), most)
        for number, found in enumerate(relevant):
            rows[number, : len(found)] = torch.tensor(list(found))
            gains[number, : len(found)] = torch.tensor([float(grade) for grade in found.values()])
        # Not persistent: they are the index's, and no checkpoint has to hold them again.
        self.register_buffer("relevant", rows, persistent=False)
        self.register_buffer("gains", gains, persistent=False)
        for dim in self.dims:
            prefix = cut(documents.detach().float(), dim, normalise=True)
            self.register_buffer(f"documents_{dim}", prefix, persistent=False)

    def extra_repr(self) -> str:
        return f"dims={self.dims}, weights={self.weights}, k={self.k}, scale={self.scale:g}"

    def forward(self, queries: Tensor, numbers: Tensor) -> Tensor:
        """Return the loss, added up over sizes."""
        relevant, gains = self.get_buffer("relevant")[numbers], self.get_buffer("gains")[numbers]
        total = queries.new_zeros((), dtype=torch.float32)
        for dim, weight in zip(self.dims, self.weights, strict=True):
            documents = self.get_buffer(f"documents_{dim}")
            prefix = cut(queries.float(), dim, normalise=True)
            total = total + weight * self._of_one_size(prefix, documents, relevant, gains)
        return total

    def _of_one_size(
        self, queries: Tensor, documents: Tensor, relevant: Tensor, gains: Tensor
    ) -> Tensor:
        with torch.no_grad():
            found, ranks = ranked(queries, documents, relevant, self.k + relevant.shape[1])
            own = (found[:, :, None] == relevant[:, None, :]) & (gains > 0)[:, None, :]
            wrong = ~own.any(dim=2)
            wrong &= wrong.cumsum(dim=1) <= self.k
            places = torch.arange(1, found.shape[1] + 1, device=found.device)
            weights = lambda_weights(gains, ranks, places) * wrong[:, None, :]
        right = torch.einsum("qd,qrd->qr", queries, documents[relevant])
        others = torch.einsum("qd,qkd->qk", queries, documents[found])
        costs = F.softplus(self.scale * (others[:, None, :] - right[:, :, None]))
        return (weights * costs).sum(dim=(1, 2)).mean()


def ranked(queries: Tensor, documents: Tensor, relevant: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return each query's ``k`` closest rows (n, k), and the places of its relevant ones (n, r).

    The search is exact, and the first place is 1.
    """
    k = min(k, len(documents))
    own = torch.einsum("qd,qrd->qr", queries, documents[relevant])
    places = torch.ones_like(relevant)
    best = queries.new_full((len(queries), 0), 0.0)
    found = relevant.new_zeros((len(queries), 0))
    for start in range(0, len(documents), _ROWS_AT_ONCE):
        block = documents[start : start + _ROWS_AT_ONCE]
        scores = queries @ block.T  # (n, block)
        for column in range(relevant.shape[1]):
            above = scores > own[:, column, None]
            # not above itself, whatever the rounding of two ways to its score
            inside = relevant[:, column] - start
            here = (inside >= 0) & (inside < len(block))
            above[here.nonzero()[:, 0], inside[here]] = False
            places[:, column] += above.sum(dim=1)
        top = scores.topk(min(k, len(block)), dim=1)
        best = torch.cat([best, top.values], dim=1)
        found = torch.cat([found, top.indices + start], dim=1)
        order = best.topk(min(k, best.shape[1]), dim=1)
        best, found = order.values, found.gather(1, order.indices)
    return found, places


def lambda_weights(gains: Tensor, ranks: Tensor, places: Tensor) -> Tensor:
    """Return how much nDCG changes if a relevant and a wrong document change places.

    Parameters
    ----------
    gains : (n, r)
        Of each query's relevant documents; 0 where there is none.
    ranks : (n, r)
        Their places in the ranking, the first is 1.
    places : (k,)
        Those of the wrong documents, whose gain is 0.

    Returns
    -------
    Tensor
        (n, r, k): gain |1 / log2(1 + rank) - 1 / log2(1 + place)| / ideal DCG.
    """
    best = gains.sort(dim=1, descending=True).values
    discounts = 1 / torch.log2(torch.arange(2, gains.shape[1] + 2, device=gains.device).float())
    ideal = (best * discounts).sum(dim=1)
    swapped = 1 / torch.log2(1 + ranks.float())[:, :, None]
    swapped = (swapped - 1 / torch.log2(1 + places.float())).abs()
    return gains[:, :, None] * swapped / ideal[:, None, None]
