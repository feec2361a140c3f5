"""Train a new model whose prefix is the old model's Space: BCT, OCA and BT2, on class labels.

What is old stays in the gallery; queries of the new model, cut to the old size, are searched in it.
The old model is known by its vectors of the new training data alone, so it may be any model.

Losses are added up over sizes, as the Matryoshka loss is: the compatible terms over the sizes of
the old model that are asked for, so that an old gallery that was cut is met, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestvec.encoders.wider import ChangedBasis, orthogonal_linear
from nestvec.errors import DataError, DimensionError
from nestvec.space import parse_dims
from nestvec.train.heads import NestedClassifier, NestedCrossEntropy
from nestvec.train.objectives import check_labels, cut

Lambdas = tuple[float | int, ...]

#: Weights of OCA's three terms as its configuration has them; its code uses 5, 10 and 5.
OCA_CONFIGURED = (1.0, 10.0, 5.0)

#: OCA as it was published, for ``compatible_options``: `train_image` has larger logits, aims at old
#: vectors, too, and holds both parts of a row at a length.
OCA_PUBLISHED: dict[str, Any] = {"scale": 1.0, "vectors": 0.0, "balance": None}
OCA_USUAL: dict[str, Any] = {"scale": 16.0, "vectors": 5.0, "balance": 1.4}


class OldClasses(nn.Module):
    """Where the old model puts each class: the mean of its unit rows, at every size.

    Parameters
    ----------
    old
        The old model's vectors (n, old_dim) of the *new* training data, so that classes which the
        old model never saw have a place, too.
    labels
        Class numbers (n,); every class needs a row.
    n_classes
        Number of classes.
    dims
        Sizes of the old model; by default its full size alone, as published.
    scale
        Of the cosines in the softmax. 1 as published, where a large weight makes up for it.

    Raises
    ------
    DataError
        If labels do not fit the rows, or a class has none.
    DimensionError
        If a size is beyond the old model's.
    """

    def __init__(
        self,
        old: Tensor,
        labels: Tensor,
        n_classes: int,
        *,
        dims: Iterable[int] | str | None = None,
        scale: float | int = 1.0,
    ) -> None:
        super().__init__()
        if labels.shape != old.shape[:1]:
            raise DataError(f"{len(old)} old vectors and {tuple(labels.shape)} labels do not fit.")
        check_labels(labels, n_classes)
        counts = torch.bincount(labels, minlength=n_classes)
        if not counts.all():
            missing = (counts == 0).nonzero()[0].item()
            raise DataError(
                f"class {missing} has no old vector, so nothing says where it is to lie. Embed "
                f"some of its rows with the old model, or leave the class out."
            )
        self.dim = old.shape[1]
        self.dims = parse_dims([self.dim] if dims is None else dims, full=self.dim)
        self.scale = float(scale)
        for dim in self.dims:
            rows = cut(old.detach().float(), dim, normalise=True)
            sums = torch.zeros(n_classes, dim, device=rows.device).index_add_(0, labels, rows)
            # made again from the data at every start, so no checkpoint needs them
            self.register_buffer(f"means_{dim}", sums / counts[:, None], persistent=False)

    def extra_repr(self) -> str:
        return f"dims={self.dims}, scale={self.scale:g}"

    def means(self, dim: int) -> Tensor:
        """Return the mean of each class at a size: (n_classes, dim), shorter than 1."""
        return getattr(self, f"means_{dim}")

    def cross_entropy(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of telling the classes apart by their old means, summed over sizes."""
        terms = [
            F.cross_entropy(self.scale * cut(rows, dim, normalise=True) @ self.means(dim).T, labels)
            for dim in self.dims
        ]
        return torch.stack(terms).sum()

    def distance(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Return the mean of 1 - cos(row, old mean of its class), summed over sizes."""
        terms = [_away(cut(rows, d, normalise=True), self.means(d)[labels]) for d in self.dims]
        return torch.stack(terms).sum()


class BackwardCompatible(nn.Module):
    """BCT: the old model's classifier has to work on the new rows, too. The baseline.

    ``forward(rows, labels, old=None)``: rows (n, dim) and class numbers; ``old`` is not looked at.
    The loss is ``CE(head(rows)) + weight * CE(old classes)``. The rows may be longer than the old
    ones, whose place is then the prefix; published is one size for both.

    Parameters
    ----------
    head
        Classifiers of the new rows.
    classes
        Where the old model puts each class.
    weight
        Of the old classes: alpha, 10 in the published configuration for CIFAR.

    References
    ----------
    Shen et al., Towards Backward-Compatible Representation Learning, CVPR 2020, arXiv:2003.11942.
    """

    def __init__(
        self,
        head: NestedClassifier,
        classes: OldClasses,
        *,
        weight: float | int = 10.0,
        weights: str | Iterable[float | int] = "uniform",
        label_smoothing: float | int = 0.0,
    ) -> None:
        super().__init__()
        _check_room(head.dims[-1], classes)
        self.head, self.classes, self.weight = head, classes, float(weight)
        self.loss = _cross_entropy(weights, label_smoothing)

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}"

    def forward(self, rows: Tensor, labels: Tensor, old: Tensor | None = None) -> Tensor:
        own = self.loss(self.head(rows), labels)
        return own + self.weight * self.classes.cross_entropy(rows, labels)


class OrthogonalCompatible(nn.Module):
    """OCA: the prefix is the old space, the dims behind it hold what is new.

    ``forward(rows, labels, old=None)``: rows (n, old_dim + extra). The classifiers see the unit
    rows through an orthogonal map that is trained along and thrown away: it has every dim speak for
    every class without leaving the old space, since it changes no length and no angle. The loss is
    ``own * CE(head(Q row)) + old_classes * CE(old classes) + near * (1 - cos(prefix, old mean))``.

    Parameters
    ----------
    head
        Classifiers of the new rows; with several sizes Q is orthogonal block by block, so that each
        size sees its own prefix alone (the published Q is one block).
    classes
        Where the old model puts each class.
    lambdas
        Weights (own, old_classes, near). The published code has 5, 10, 5, and never reads the 1,
        10, 5 of its configuration (`OCA_CONFIGURED`).
    vectors
        Weight of ``1 - cos(prefix, the old vector of the same thing)``, which needs ``old``
        (n, old_dim). Not in the paper, which knows the old model by its classes alone: 0 leaves it
        out.
    scale
        Of the classifiers' logits. 1 as published, for long trainings: the rows have length 1, so
        logits are small until the weights have grown. A larger one, like 16, learns sooner.

    References
    ----------
    Ricci et al., Backward-Compatible Aligned Representations via an Orthogonal Transformation
    Layer, arXiv:2408.08793.
    """

    def __init__(
        self,
        head: NestedClassifier,
        classes: OldClasses,
        *,
        lambdas: Lambdas = (5.0, 10.0, 5.0),
        vectors: float | int = 0.0,
        scale: float | int = 1.0,
        weights: str | Iterable[float | int] = "uniform",
        label_smoothing: float | int = 0.1,
    ) -> None:
        super().__init__()
        _check_room(head.dims[-1], classes)
        self.head, self.classes = head, classes
        self.lambdas, self.vectors = _three(lambdas), float(vectors)
        self.scale = float(scale)
        self.loss = _cross_entropy(weights, label_smoothing)
        self.rotation = BlockOrthogonal(head.dims)

    def extra_repr(self) -> str:
        return f"lambdas={self.lambdas}, vectors={self.vectors:g}, scale={self.scale:g}"

    def forward(self, rows: Tensor, labels: Tensor, old: Tensor | None = None) -> Tensor:
        own, told, near = self.lambdas
        rows = F.normalize(rows, dim=-1)
        logits = self.head(self.rotation(rows))
        loss = own * self.loss({dim: self.scale * one for dim, one in logits.items()}, labels)
        loss = loss + told * self.classes.cross_entropy(rows, labels)
        loss = loss + near * self.classes.distance(rows, labels)
        if not self.vectors:
            return loss
        return loss + self.vectors * _apart(rows, _given(old), self.classes.dims)

    def plain_head(self) -> NestedClassifier:
        """Return classifiers of the rows as they are served, with Q and the scale in them."""
        head = self.head
        made = NestedClassifier(head.dims, head.n_classes, tied=head.tied, normalise=head.normalise)
        made.load_state_dict(head.state_dict())
        turn = self.rotation.matrix().detach()
        made.to(turn.device)
        with torch.no_grad():
            for layer in made.heads:
                assert isinstance(layer, nn.Linear)
                size = layer.in_features
                layer.weight.copy_(self.scale * layer.weight @ turn[:size, :size])
                layer.bias.mul_(self.scale)
        return made


class BasisTransformation(nn.Module):
    """BT2: a change of basis that loses nothing finds the old model's numbers in the new ones.

    ``forward(rows, labels, old, independent=None)``: rows (n, dim + extra) of a `ChangedBasis`, the
    old model's vectors (n, old_dim), and, if there is one, the vectors (n, dim) of a model that was
    trained on the same data without a thought of the old one. The loss is ``CE(head(p)) +
    lambdas[0] * (1 - cos(p, independent)) + lambdas[1] * CE(old classes) + lambdas[2] * (1 -
    cos(prefix, old))``, where p (n, dim) is what the backbone said before the change.

    Parameters
    ----------
    basis
        The layer that made the rows: the network's last, whose weights are trained with it.
    head
        Classifiers of ``p``.
    classes
        Where the old model puts each class. The last two terms are means over its sizes, beside one
        classifier of one size.
    lambdas
        Weights, published: 1, 10, 5. Without ``independent`` the first is without use.

    References
    ----------
    Zhou et al., BT^2: Backward-compatible Training with Basis Transformation, arXiv:2211.03989.
    There the old part is compared by raw dot products; here, as everywhere in nestvec, a prefix is
    L2-normalised after the cut.
    """

    def __init__(
        self,
        basis: ChangedBasis,
        head: NestedClassifier,
        classes: OldClasses,
        *,
        lambdas: Lambdas = (1.0, 10.0, 5.0),
        weights: str | Iterable[float | int] = "uniform",
        label_smoothing: float | int = 0.0,
    ) -> None:
        super().__init__()
        if (head.dims[-1], classes.dim) != (basis.dim, basis.old_dim):
            raise DimensionError(
                f"a change of basis to {basis.dim} dims, {basis.old_dim} of them old, does not fit "
                f"classifiers of {head.dims[-1]} dims and old vectors of {classes.dim}."
            )
        self._basis = (basis,)  # a part of the network, not of this: nothing is saved twice
        self.head, self.classes = head, classes
        self.lambdas = _three(lambdas)
        self.loss = _cross_entropy(weights, label_smoothing)

    def extra_repr(self) -> str:
        return f"basis=({self.basis.extra_repr()}), lambdas={self.lambdas}"

    @property
    def basis(self) -> ChangedBasis:
        """The network's last layer."""
        return self._basis[0]

    def forward(
        self,
        rows: Tensor,
        labels: Tensor,
        old: Tensor | None = None,
        independent: Tensor | None = None,
    ) -> Tensor:
        like_new, told, like_old = self.lambdas
        new = self.basis.new_part(rows)
        loss = self.loss(self.head(new), labels)
        compatible = told * self.classes.cross_entropy(rows, labels)
        compatible = compatible + like_old * _apart(rows, _given(old), self.classes.dims)
        loss = loss + compatible / len(self.classes.dims)
        if independent is None:
            return loss
        return loss + like_new * _apart(new, independent, (self.basis.dim,))


class BlockOrthogonal(nn.Module):
    """An orthogonal map that keeps prefixes: one orthogonal matrix a block between two sizes.

    A prefix that ends at one of the sizes is mapped as it is mapped in the whole row. With one size
    it is an orthogonal matrix like any other. It starts as no change.
    """

    def __init__(self, dims: Iterable[int] | str) -> None:
        super().__init__()
        self.dims = parse_dims(dims)
        widths = [b - a for a, b in zip((0, *self.dims), self.dims, strict=False)]
        self.blocks = nn.ModuleList(orthogonal_linear(width) for width in widths)

    def extra_repr(self) -> str:
        return f"dims={self.dims}"

    def forward(self, rows: Tensor) -> Tensor:
        if rows.shape[-1] != self.dims[-1]:
            raise DimensionError(f"{rows.shape[-1]} dims do not fit a map of {self.dims[-1]}.")
        starts = (0, *self.dims)
        parts = [
            block(rows[..., a:b])
            for block, a, b in zip(self.blocks, starts, self.dims, strict=False)
        ]
        return torch.cat(parts, dim=-1)

    def matrix(self) -> Tensor:
        """Return it as one matrix (dim, dim), zero outside its blocks; rows map to ``Q row``."""
        return torch.block_diag(*(block.weight for block in self.blocks))  # pyright: ignore[reportArgumentType]


def _away(rows: Tensor, others: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(rows, others, dim=-1)).mean()


def _apart(rows: Tensor, others: Tensor, dims: Iterable[int]) -> Tensor:
    """Return the mean of 1 - cos between the rows of two models, summed over sizes."""
    return torch.stack([_away(rows[:, :dim], others.detach()[:, :dim]) for dim in dims]).sum()


def _given(old: Tensor | None) -> Tensor:
    if old is None:
        raise DataError("this objective compares with the old vectors: hand them in as `old`.")
    return old


def _check_room(dim: int, classes: OldClasses) -> None:
    if dim < classes.dim:
        raise DimensionError(
            f"rows of {dim} dims cannot hold an old model of {classes.dim}: make the new model at "
            f"least as long, or cut the old one with dims."
        )


def _three(lambdas: Lambdas) -> tuple[float, float, float]:
    found = tuple(float(value) for value in lambdas)
    if len(found) != 3 or min(found) < 0:
        raise DataError(f"lambdas {lambdas!r} do not fit: three weights of 0 or more.")
    return found[0], found[1], found[2]


def _cross_entropy(
    weights: str | Iterable[float | int], label_smoothing: float | int
) -> NestedCrossEntropy:
    named = weights if isinstance(weights, str) else tuple(weights)
    return NestedCrossEntropy(weights=named, label_smoothing=float(label_smoothing))
