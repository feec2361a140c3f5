"""Train a new text model whose prefix is the old model's Space, on pairs of texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestvec.corpus.examples import Examples
from nestvec.encoders.base import Encoder, Role
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


class OldTexts:
    """The old model, as far as a training on pairs of texts asks for it.

    Parameters
    ----------
    compatible_with
        A text model's name or folder, or an encoder.
    kind
        Of the examples, which have to be pairs or triplets.
    objective
        What the user wants in place of the usual loss; there is no place for it here.
    lora
        Nor for an adapter, which would not hold the layer that makes room.
    """

    def __init__(self, compatible_with: Any, kind: str, objective: Any, lora: Any) -> None:
        if kind not in ("pairs", "triplets"):
            raise DataError(f"compatible_with is for pairs and triplets, and these are {kind}.")
        if objective is not None:
            raise DataError(
                "compatible_with brings its own objective, so objective= has no place: hand "
                "CompatiblePairs to SentenceTransformerLoss to make your own of both."
            )
        if lora is not None:
            raise DataError(
                "a LoRA adapts what is there, and a compatible model gets a layer more: train it "
                "without lora=."
            )
        if isinstance(compatible_with, Encoder):
            self.encoder: Encoder = compatible_with
        else:
            from nestvec.encoders import TextEncoder

            self.encoder = TextEncoder(compatible_with)
        self.space = self.encoder.space
        if self.space.metric == "dot" and not self.space.has_unit_rows:
            raise DataError(
                f"{self.space.label} is compared by dot products of unnormalised vectors, whose "
                f"lengths no prefix at length 1 can hold."
            )
        self.dims = tuple(sorted({*self.space.nesting_dims, self.space.size}))

    def encode(self, texts: Sequence[str], role: Role) -> Tensor:
        """Return the old vectors (n, old_dim) of texts; one that recurs is encoded once."""
        distinct = list(dict.fromkeys(texts))
        place = {text: row for row, text in enumerate(distinct)}
        found = torch.from_numpy(self.encoder.encode(distinct, role=role).array)
        return found[[place[text] for text in texts]]

    def vectors(self, examples: Examples, columns: Mapping[str, Role]) -> list[Tensor]:
        """Return the old vectors of each column."""
        both = zip(examples.texts, columns.values(), strict=True)
        return [self.encode(texts, role) for texts, role in both]
