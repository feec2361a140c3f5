"""Distil a cross-encoder's scores into vectors, at every size (DSE)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nestvec.errors import DataError
from nestvec.train.objectives import NestedLoss, Weights

LOSSES = ("mse", "margin_mse")
SCALES = ("fit", "none")


class ScoreDistillation(nn.Module):
    """Make the cosine of each pair, at every size, say what a teacher says of the pair.

    Parameters
    ----------
    dims, weights
        Of `NestedLoss`: the errors of all sizes are added up.
    loss
        ``"mse"``: squared error of each pair's score. ``"margin_mse"``: squared error of the
        difference of two pairs' scores: of every two pairs of the batch, or of a query's two
        documents if there are three columns.
    scale
        Cosines and a teacher's scores have scales of their own. ``"fit"``: at each size the line
        (slope, and for ``"mse"`` a shift) that takes the batch's cosines closest to the teacher's
        scores is applied to the cosines first; a slope below 0 counts as 0.01. The line is found in
        closed form and not differentiated, which changes no gradient, as it is the best one.
        ``"none"``: cosines are compared with the teacher's scores as they are.

    ``forward(first, second, scores)``: rows (n, dim) of each pair, and the teacher's scores (n,).
    ``forward(queries, positives, negatives, margins)`` for ``"margin_mse"``: margins (n,) are the
    teacher's score of the positive less that of the negative. Scores are detached.

    Notes
    -----
    A teacher whose scores are cut for some sizes only, or scaled in silence, was a fault of others
    (sentence-transformers' issues 3535 and 3538): here every size sees the very same scores.

    References
    ----------
    Barkan et al., Scalable Attentive Sentence-Pair Modeling via Distilled Sentence Embedding, AAAI
    2020, arXiv:1908.05161: the student's score of a pair regresses the teacher's; the cosine is
    ours, as it can be searched. Hofstätter et al., arXiv:2010.02666: the margin.
    """

    def __init__(
        self,
        dims: Iterable[int] | str,
        *,
        loss: str = "mse",
        scale: str = "fit",
        weights: Weights = "uniform",
    ) -> None:
        super().__init__()
        for name, value, known in (("loss", loss, LOSSES), ("scale", scale, SCALES)):
            if value not in known:
                raise DataError(f"{name} {value!r} is not one of {', '.join(known)}.")
        self.loss, self.scale = loss, scale
        self.pairs = NestedLoss(self._of_pairs, dims, weights=weights, n_embeddings=2)
        self.triplets = NestedLoss(self._of_triplets, dims, weights=weights, n_embeddings=3)

    def __repr__(self) -> str:
        nested = self.pairs.extra_repr()
        return f"ScoreDistillation(loss={self.loss!r}, scale={self.scale!r}, {nested})"

    def forward(self, *columns: Tensor) -> Tensor:
        """Return the error, added up over sizes."""
        *rows, scores = columns
        shapes = {tuple(one.shape) for one in rows}
        if len(rows) not in (2, 3) or len(shapes) != 1 or scores.shape != rows[0].shape[:1]:
            raise DataError(
                f"columns {', '.join(str(tuple(one.shape)) for one in columns)} do not fit: pairs "
                f"are (n, dim), (n, dim) and scores (n,); triplets have three of rows."
            )
        if len(rows) == 2 and len(scores) < 2:
            raise DataError("a batch of one pair fits any score: take 2 pairs or more.")
        if len(rows) == 3 and self.loss != "margin_mse":
            raise DataError("triplets have margins: ScoreDistillation(loss='margin_mse').")
        scores = scores.detach().to(torch.promote_types(rows[0].dtype, torch.float32))
        nested: Any = self.pairs if len(rows) == 2 else self.triplets
        return nested(*rows, scores)

    def _of_pairs(self, first: Tensor, second: Tensor, scores: Tensor) -> Tensor:
        close = (first * second).sum(dim=1)
        if self.loss == "mse":
            return self._error(close, scores, shift=True)
        return self._error(_differences(close), _differences(scores), shift=False)

    def _of_triplets(
        self, queries: Tensor, positives: Tensor, negatives: Tensor, margins: Tensor
    ) -> Tensor:
        return self._error((queries * (positives - negatives)).sum(dim=1), margins, shift=False)

    def _error(self, close: Tensor, scores: Tensor, *, shift: bool) -> Tensor:
        if self.scale == "none":
            return (close - scores).square().mean()
        with torch.no_grad():
            slope, level = _line(close, scores, shift=shift)
        return (slope * close + level - scores).square().mean()


def _line(close: Tensor, scores: Tensor, *, shift: bool) -> tuple[Tensor, Tensor]:
    """Return the least-squares line from cosines to scores: slope and shift."""
    middle = (close.mean(), scores.mean()) if shift else (close.new_zeros(()),) * 2
    away, up = close - middle[0], scores - middle[1]
    slope = ((away * up).sum() / away.square().sum().clamp(min=1e-12)).clamp(min=0.01)
    return slope, middle[1] - slope * middle[0]


def _differences(values: Tensor) -> Tensor:
    """Return the difference of every two, (n (n - 1) / 2,)."""
    above, below = torch.triu_indices(len(values), len(values), 1, device=values.device)
    return values[above] - values[below]
