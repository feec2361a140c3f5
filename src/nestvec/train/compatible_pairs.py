"""Train a new text model whose prefix is the old model's Space, on pairs of texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestvec.errors import DataError, DimensionError
from nestvec.space import parse_dims
from nestvec.train.objectives import InfoNCE, NestedLoss, cut


class CompatiblePairs(nn.Module):
    """Contrast the whole rows; have their prefix lie at the old vectors and find old documents.

    The dims behind the prefix are free for what the old model could not tell apart. The loss is
    ``InfoNCE(rows) + near * (1 - cos(prefix, old)) + across * InfoNCE(prefix of queries, old
    documents)``; the last is the very search that is done while the gallery is old.

    ``forward(queries, documents, hard=None, *, old)``: rows (n, dim), the other documents being
    wrong for a query, and wrong answers (n, dim) if there are any; ``old`` holds the old model's
    vectors of the same columns, (n, old_dim) each.

    Parameters
    ----------
    dims
        Sizes of the new model.
    old_dims
        Sizes of the old one, the full one among them: at each the prefix lies at the old vector's.
    near, across
        Weights.
    scale
        Inverse temperature of both contrasts.
    weights
        Of the new sizes in the first term, as in `NestedLoss`.

    Notes
    -----
    The form is OCA's (arXiv:2408.08793) with texts for classes: what a class's old mean is there,
    an old vector is here.
    """

    def __init__(
        self,
        dims: Iterable[int] | str,
        old_dims: Iterable[int] | str,
        *,
        near: float | int = 5.0,
        across: float | int = 1.0,
        scale: float | int = 20.0,
        weights: str | Sequence[float | int] = "uniform",
    ) -> None:
        super().__init__()
        self.old_dims = parse_dims(old_dims)
        self.own = NestedLoss(InfoNCE(scale=scale), dims, weights=weights)
        if self.own.dims[-1] < self.old_dims[-1]:
            raise DimensionError(
                f"rows of {self.own.dims[-1]} dims cannot hold an old model of "
                f"{self.old_dims[-1]}: make the new model at least as long (nestvec.train.widened)."
            )
        if min(near, across) < 0:
            raise DataError(f"near {near!r} and across {across!r} are weights: 0 or more.")
        self.near, self.across = float(near), float(across)
        self.contrast = InfoNCE(scale=scale)

    def extra_repr(self) -> str:
        return f"old_dims={self.old_dims}, near={self.near:g}, across={self.across:g}"

    def forward(self, *columns: Tensor, old: Sequence[Tensor]) -> Tensor:
        if [len(rows) for rows in columns] != [len(rows) for rows in old]:
            raise DataError(
                f"{[len(rows) for rows in columns]} rows and {[len(rows) for rows in old]} old "
                f"vectors, by column, do not fit: every text needs its old vector."
            )
        found = [rows.shape[1] for rows in old]
        if set(found) != {self.old_dims[-1]}:
            raise DimensionError(
                f"old vectors of {found} dims, by column, do not fit an old model of "
                f"{self.old_dims[-1]}."
            )
        before = [rows.detach() for rows in old]
        loss = self.own(*columns)
        rows, targets = torch.cat(columns), torch.cat(before)
        for dim in self.old_dims:
            cosines = F.cosine_similarity(rows[:, :dim], targets[:, :dim], dim=-1)
            loss = loss + self.near * (1 - cosines).mean()
            if self.across:
                asked = cut(columns[0], dim, normalise=True)
                there = [cut(one, dim, normalise=True) for one in before[1:]]
                loss = loss + self.across * self.contrast(asked, *there)
        return loss


class WithOld(nn.Module):
    """An objective of (columns, old columns) as one of (columns, row numbers).

    ``forward(*columns, rows)``: the numbers (n,) of the batch's rows in ``old``, a list of (n_rows,
    old_dim), one a column. They stay out of checkpoints: they are made again from the old model.
    """

    def __init__(self, objective: nn.Module, old: Sequence[Tensor]) -> None:
        super().__init__()
        self.objective, self.old = objective, list(old)

    def forward(self, *given: Tensor) -> Tensor:
        *columns, rows = given
        place = rows.long().to(self.old[0].device)
        old = [column[place].to(rows.device, torch.float32) for column in self.old]
        return self.objective(*columns, old=old)
