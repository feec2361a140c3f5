"""Heads that are nested: classifiers, a masked-LM head, and layers whose slices are models.

Kusupati et al., arXiv:2205.13147 (MRL, MRL-E); Wang et al., fMRLRec, arXiv:2409.16627 (weights).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestvec.errors import DataError, DimensionError
from nestvec.space import parse_dims
from nestvec.train.objectives import Weights, check_labels, cut, dim_weights, rising_dims


class NestedClassifier(nn.Module):
    """Class logits from every prefix: one head a size (MRL), or one head cut (MRL-E).

    Parameters
    ----------
    dims
        Sizes; the largest is the embedding's full size.
    n_classes
        Number of classes, at least 2.
    tied
        MRL-E: one weight matrix, of which size m uses the first m columns; one bias for all.
    normalise
        L2-normalise each prefix first.

    ``forward(rows)`` returns ``{dim: logits (n, n_classes)}``.
    """

    def __init__(
        self,
        dims: Iterable[int] | str,
        n_classes: int,
        *,
        tied: bool = False,
        normalise: bool = False,
    ) -> None:
        super().__init__()
        if n_classes < 2:
            raise DataError(
                f"{n_classes} classes leave nothing to classify: at least 2 are needed. Look at "
                f"which labels the training data holds."
            )
        self.dims = parse_dims(dims)
        self.n_classes = n_classes
        self.normalise = normalise
        self.tied = tied
        sizes = self.dims[-1:] if tied else self.dims
        self.heads = nn.ModuleList(nn.Linear(dim, n_classes) for dim in sizes)

    def forward(self, rows: Tensor) -> dict[int, Tensor]:
        return {dim: self.logits(rows, dim) for dim in self.dims}

    def logits(self, rows: Tensor, dim: int) -> Tensor:
        """Return the logits of one size; a tied head takes any size up to the full one."""
        prefix = cut(rows, dim, normalise=self.normalise)
        if not self.tied and dim not in self.dims:
            raise DimensionError(f"there is no head of size {dim}; the sizes are {self.dims}.")
        if dim > self.dims[-1]:
            raise DimensionError(f"size {dim} is beyond the head's sizes {self.dims}.")
        head = self.heads[0 if self.tied else self.dims.index(dim)]
        assert isinstance(head, nn.Linear)
        return F.linear(prefix, head.weight[:, :dim], head.bias)


class NestedCrossEntropy(nn.Module):
    """Sum over sizes of the cross-entropy of `NestedClassifier`'s logits: the MRL loss.

    ``forward(logits, labels)``: class numbers (n,), or floating-point shares of each class
    (n, n_classes). A label out of range is a `DataError` that names it where labels are on the
    CPU; `check_labels` looks at a whole data set's before training.
    """

    def __init__(self, *, weights: Weights = "uniform", label_smoothing: float | int = 0.0) -> None:
        super().__init__()
        self.weights = weights
        self.label_smoothing = label_smoothing

    def extra_repr(self) -> str:
        return f"weights={self.weights!r}, label_smoothing={self.label_smoothing:g}"

    def forward(self, logits: dict[int, Tensor], labels: Tensor) -> Tensor:
        weights = dim_weights(self.weights, len(logits))
        one = logits[min(logits)]
        if labels.shape != (one.shape if labels.is_floating_point() else one.shape[:1]):
            raise DataError(
                f"labels {tuple(labels.shape)} of {labels.dtype} do not fit logits "
                f"{tuple(one.shape)}: whole numbers (n,) or shares {tuple(one.shape)} do."
            )
        if not labels.is_floating_point():
            check_labels(labels, one.shape[-1])
        terms = [
            weight * F.cross_entropy(logits[dim], labels, label_smoothing=self.label_smoothing)
            for dim, weight in zip(sorted(logits), weights, strict=True)
        ]
        return torch.stack(terms).sum()


class ClassLabels(nn.Module):
    """Cross-entropy at every size: `NestedClassifier` and its loss, as an objective."""

    def __init__(
        self, head: NestedClassifier, *, weights: Any = "uniform", label_smoothing: float | int = 0
    ) -> None:
        super().__init__()
        self.head = head
        self.loss = NestedCrossEntropy(weights=weights, label_smoothing=float(label_smoothing))

    def forward(self, rows: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.head(rows), labels)


class BlockTriangularLinear(nn.Linear):
    """A linear layer whose output prefix needs only the input prefix it is paired with.

    Output block i (between two sizes) sees the inputs of sizes up to i: ``slice(m)`` is then an
    ordinary ``nn.Linear`` that equals this layer on prefixes, exactly.

    Parameters
    ----------
    in_dims, out_dims
        Sizes of the input and output, rising, paired in order.
    """

    def __init__(
        self, in_dims: Iterable[int] | str, out_dims: Iterable[int] | str, *, bias: bool = True
    ) -> None:
        ins = rising_dims(in_dims, beside="output sizes")
        outs = rising_dims(out_dims, beside="input sizes")
        if len(ins) != len(outs):
            raise DimensionError(f"{len(ins)} input sizes do not pair with {len(outs)} outputs.")
        super().__init__(ins[-1], outs[-1], bias=bias)
        self.in_dims, self.out_dims = ins, outs
        seen = torch.zeros(outs[-1], ins[-1])
        for start, out, width in zip((0, *outs), outs, ins, strict=False):
            seen[start:out, :width] = 1
        self.seen: Tensor
        self.register_buffer("seen", seen, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.seen, self.bias)

    def slice(self, place: int) -> nn.Linear:
        """Return the standalone layer of the ``place``-th pair of sizes."""
        width, out = self.in_dims[place], self.out_dims[place]
        small = nn.Linear(width, out, bias=self.bias is not None)
        with torch.no_grad():
            small.weight.copy_((self.weight * self.seen)[:out, :width])
            if self.bias is not None:
                small.bias.copy_(self.bias[:out])
        return small


class BlockLayerNorm(nn.Module):
    """LayerNorm of each block between two sizes, so that a prefix never sees what follows it."""

    def __init__(self, dims: Iterable[int] | str, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.dims = parse_dims(dims)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(self.dims[-1]))
        self.bias = nn.Parameter(torch.zeros(self.dims[-1]))

    def forward(self, rows: Tensor) -> Tensor:
        width = rows.shape[-1]
        if width not in self.dims:
            raise DimensionError(f"{width} dims do not end at one of the sizes {self.dims}.")
        ends = [dim for dim in self.dims if dim <= width]
        blocks = [
            F.layer_norm(rows[..., a:b], (b - a,), self.weight[a:b], self.bias[a:b], self.eps)
            for a, b in zip([0, *ends], ends, strict=False)
        ]
        return torch.cat(blocks, dim=-1)

    def slice(self, place: int) -> BlockLayerNorm:
        """Return the standalone layer of the first ``place + 1`` blocks."""
        small = BlockLayerNorm(self.dims[: place + 1], eps=self.eps)
        with torch.no_grad():
            small.weight.copy_(self.weight[: small.dims[-1]])
            small.bias.copy_(self.bias[: small.dims[-1]])
        return small
