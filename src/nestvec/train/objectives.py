"""Nested objectives: tensors in, a loss out. Plain torch modules that patch nothing.

One loss is applied to several prefixes of an embedding and the results are added up (Kusupati et
al., Matryoshka Representation Learning, NeurIPS 2022, arXiv:2205.13147). What others decide in
silence is an argument here: which sizes, what each weighs, whether a prefix is normalised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestvec.errors import DataError, DimensionError
from nestvec.space import parse_dims

Weights = str | Sequence[float | int]

#: Weights by name: every size alike (the paper), or the shortest double (its "8boost" ablation).
PRESETS = ("uniform", "boost_low")


_LARGEST = math.log(100.0)  # of a learned scale, as CLIP has it


def cut(rows: Tensor, dim: int, *, normalise: bool) -> Tensor:
    """Return the first ``dim`` numbers of each row, L2-normalised after the cut if asked."""
    if not 1 <= dim <= rows.shape[-1]:
        raise DimensionError(f"prefix dim {dim} does not fit embeddings of dim {rows.shape[-1]}.")
    prefix = rows[..., :dim]
    return F.normalize(prefix, dim=-1) if normalise else prefix


def dim_weights(weights: Weights, n_dims: int) -> tuple[float, ...]:
    """Return one weight a size, shortest first.

    >>> dim_weights("boost_low", 3)
    (2.0, 1.0, 1.0)
    """
    if isinstance(weights, str):
        if weights not in PRESETS:
            raise DataError(f"weights {weights!r} is not one of {', '.join(PRESETS)}.")
        return (2.0 if weights == "boost_low" else 1.0, *(1.0,) * (n_dims - 1))
    found = tuple(float(w) for w in weights)
    if len(found) != n_dims or min(found) < 0 or not any(found):
        raise DataError(f"weights {weights!r} do not fit {n_dims} sizes: one number >= 0 a size.")
    return found


def rising_dims(dims: Iterable[int] | str, *, beside: str) -> tuple[int, ...]:
    """Return sizes that stand beside something of the same order, refusing to sort them.

    >>> rising_dims("2, 4, 8", beside="weights")
    (2, 4, 8)
    """
    given = dims if isinstance(dims, str) else tuple(dims)
    sizes = parse_dims(given)
    written = given.replace(",", " ").split() if isinstance(given, str) else given
    if sizes != tuple(int(dim) for dim in written):
        raise DimensionError(
            f"sizes {given!r} are not rising, each once, so it is unclear which of the {beside} "
            f"belongs to which. Write them as {sizes}, and the {beside} in that order."
        )
    return sizes


def weighed_dims(
    dims: Iterable[int] | str, weights: Weights
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return sizes rising and unique, with their weights.

    >>> weighed_dims((8, 2), "boost_low")
    ((2, 8), (2.0, 1.0))
    """
    by_name = isinstance(weights, str)
    sizes = parse_dims(dims) if by_name else rising_dims(dims, beside="weights")
    return sizes, dim_weights(weights, len(sizes))


def check_labels(labels: Tensor, n_classes: int, *, ignore: int | None = None) -> None:
    """Raise `DataError` for the first label that is not 0 to ``n_classes - 1`` (or ``ignore``).

    Only labels on the CPU are looked at: to look at an accelerator's is to wait for it at every
    step. Call it once on a data set's labels, before they move.
    """
    if labels.device.type != "cpu":
        return
    wrong = (labels < 0) | (labels >= n_classes)
    if ignore is not None:
        wrong &= labels != ignore
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise DataError(
            f"label {labels[place].item()} of row {', '.join(map(str, place))} does not fit "
            f"{n_classes} classes: 0 to {n_classes - 1}."
        )


class NestedLoss(nn.Module):
    """Add up a base loss over prefixes of its first ``n_embeddings`` arguments.

    Parameters
    ----------
    loss
        Any callable from tensors to a scalar: ``loss(first, second, ..., **more)``.
    dims
        Sizes, in any order; the largest may be the full size or not.
    weights
        ``"uniform"``, ``"boost_low"`` or one number a size; the sizes are then to be written
        rising. The paper adds up with weight 1; a mean would change the learning rate with the
        number of sizes.
    normalise
        L2-normalise each prefix. True for cosine losses; False leaves a dot product a dot product
        (sentence-transformers' MatryoshkaLoss always normalises, even at full size).
    n_embeddings
        How many leading positional arguments are embeddings to be cut; None is all of them. Labels
        come as keywords or behind them.
    n_dims_per_step
        Sizes drawn anew at each call, -1 for all. The largest is always among them, so that it is
        never left out. If others are drawn, their weights are scaled up so that the expected loss
        is that of all sizes.
    generator
        Where the draws come from; None is torch's global one.

    Notes
    -----
    The arguments are never changed and the encoder runs once, outside.

    NaN in an embedding is NaN in the loss, here and in every objective: whoever trains looks at the
    loss, which it reads anyway; a look at every embedding would wait for the accelerator.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        dims: Iterable[int] | str,
        *,
        weights: Weights = "uniform",
        normalise: bool = True,
        n_embeddings: int | None = None,
        n_dims_per_step: int = -1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.dims, self.weights = weighed_dims(dims, weights)
        self.normalise = normalise
        self.n_embeddings = n_embeddings
        if n_dims_per_step != -1 and not 1 <= n_dims_per_step <= len(self.dims):
            raise DataError(
                f"n_dims_per_step {n_dims_per_step} does not fit {len(self.dims)} sizes: 1 to "
                f"{len(self.dims)}, or -1 for all."
            )
        self.n_dims_per_step = n_dims_per_step
        self.generator = generator

    def extra_repr(self) -> str:
        return (
            f"dims={self.dims}, weights={self.weights}, normalise={self.normalise}, "
            f"n_dims_per_step={self.n_dims_per_step}"
        )

    def forward(self, *embeddings: Tensor, **more: Any) -> Tensor:
        """Return the weighted sum over sizes."""
        n = len(embeddings) if self.n_embeddings is None else self.n_embeddings
        rows, rest = embeddings[:n], embeddings[n:]
        total = None
        for dim, weight in self._drawn():
            prefixes = [cut(one, dim, normalise=self.normalise) for one in rows]
            term = weight * self.loss(*prefixes, *rest, **more)
            total = term if total is None else total + term
        assert total is not None
        return total

    def _drawn(self) -> list[tuple[int, float]]:
        every = list(zip(self.dims, self.weights, strict=True))
        if self.n_dims_per_step in (-1, len(every)):
            return every
        *shorter, last = every
        n = self.n_dims_per_step - 1
        if n == 0:
            return [last]
        picked = torch.randperm(len(shorter), generator=self.generator)[:n].tolist()
        share = len(shorter) / n
        return [*((shorter[i][0], shorter[i][1] * share) for i in sorted(picked)), last]


class InfoNCE(nn.Module):
    """Contrastive loss of (query, document) rows: row i of one belongs to row i of the other.

    Parameters
    ----------
    scale
        Inverse temperature.
    symmetric
        Add the documents' side and halve, as dual encoders do (ALIGN, arXiv:2102.05918).
    learned
        Let ``scale`` be trained (as its logarithm, at most 100).

    ``forward(queries, documents, hard=None, *, offset=0)``: query i belongs to document
    ``offset + i``; all other documents are wrong for it, and so is ``hard`` (n_hard, dim). There
    may be more documents than queries, where other processes ask for the rest
    (`nestvec.train.distributed`). Score is the inner product, so hand in normalised rows for
    cosine; `NestedLoss` does. One candidate alone is a `DataError`: with nothing to tell it from,
    the loss is 0 whatever the model does.
    """

    def __init__(
        self, *, scale: float | int = 20.0, symmetric: bool = False, learned: bool = False
    ) -> None:
        super().__init__()
        log_scale = torch.tensor(float(scale)).log()
        self.log_scale = nn.Parameter(log_scale, requires_grad=learned)
        self.start = float(scale)
        self.symmetric = symmetric

    def extra_repr(self) -> str:
        learned = self.log_scale.requires_grad
        return f"scale={self.start:g}, symmetric={self.symmetric}, learned={learned}"

    def forward(
        self, queries: Tensor, documents: Tensor, hard: Tensor | None = None, *, offset: int = 0
    ) -> Tensor:
        self._check(len(queries), len(documents), 0 if hard is None else len(hard), offset)
        if self.log_scale.requires_grad:
            with torch.no_grad():  # not in the graph: beyond a limit there its gradient would be 0
                self.log_scale.clamp_(max=_LARGEST)
        scale = self.log_scale.exp()
        candidates = documents if hard is None else torch.cat([documents, hard])
        right = torch.arange(offset, offset + len(queries), device=queries.device)
        loss = F.cross_entropy(scale * queries @ candidates.T, right)
        if not self.symmetric:
            return loss
        return (loss + F.cross_entropy(scale * documents @ queries.T, right)) / 2

    def _check(self, n_queries: int, n_documents: int, n_hard: int, offset: int) -> None:
        if n_queries == 0 or not 0 <= offset <= n_documents - n_queries:
            raise DataError(
                f"{n_queries} queries, the first of document {offset}, do not fit {n_documents} "
                f"documents: each query needs its own."
            )
        if self.symmetric and n_queries != n_documents:
            raise DataError(
                f"a symmetric loss needs each of the {n_documents} documents' query, and met "
                f"{n_queries}: gather the queries too and leave offset out."
            )
        if n_documents + n_hard == 1:
            raise DataError(
                "the batch is one pair without a negative: its loss is 0 and nothing is learned. "
                "Use batches of at least 2 (drop_last=True for the last), or hand in `hard`."
            )


class SupervisedContrastive(nn.Module):
    """Pull rows of one label together (Khosla et al., arXiv:2004.11362, L_out).

    ``forward(rows, labels)``: (n, dim) and (n,) class numbers, at least two rows. Rows without a
    partner in the batch do not count; a batch without any pair has loss 0.
    """

    def __init__(self, *, temperature: float | int = 0.1) -> None:
        super().__init__()
        self.temperature = temperature

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}"

    def forward(self, rows: Tensor, labels: Tensor) -> Tensor:
        if len(rows) < 2 or labels.shape != rows.shape[:1] or labels.is_floating_point():
            raise DataError(
                f"rows {tuple(rows.shape)} with labels {tuple(labels.shape)} of {labels.dtype} do "
                f"not fit: at least two rows, and a whole number for each, (n,)."
            )
        itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        scores = (rows @ rows.T / self.temperature).masked_fill(itself, float("-inf"))
        log_share = scores.log_softmax(dim=1).masked_fill(itself, 0.0)
        partner = (labels[:, None] == labels[None, :]) & ~itself
        n_partners = partner.sum(dim=1)
        loss = -(log_share * partner).sum(dim=1) / n_partners.clamp(min=1)
        return loss.sum() / (n_partners > 0).sum().clamp(min=1)


class NestedDistillation(nn.Module):
    """Match a teacher's embedding at every size, both cut and normalised alike.

    ``forward(student, teacher)``: (n, dim) each; the teacher is detached. sentence-transformers cut
    the student only, or cut the teacher without normalising it (its issues 3535 and 3538).
    """

    def __init__(
        self,
        dims: Iterable[int] | str,
        *,
        weights: Weights = "uniform",
        normalise: bool = True,
    ) -> None:
        super().__init__()
        self.nested = NestedLoss(_row_error, dims, weights=weights, normalise=normalise)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.nested(student, teacher.detach())


def _row_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over rows of the squared distance: at unit length 2 - 2 cos, at any size alike."""
    return (student - teacher).square().sum(dim=-1).mean()


class NestedDropout(nn.Module):
    """Order features by how often they are kept (Rippel, Gelbart and Adams, arXiv:1402.0915).

    In training each row (..., dim) keeps its first ``b`` numbers, b geometric with rate ``rate``
    and at most the full size; the others are zero, and nothing is scaled up. In evaluation nothing
    changes: cut, and let `best_size` choose where on validation. The paper's unit sweeping (freeze
    early units once they have converged, because late ones are rarely kept) is not done; a rate
    near 1 / dim keeps the last units in use.
    """

    def __init__(
        self, *, rate: float | int = 0.01, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if not 0 < rate < 1:
            raise DataError(f"rate {rate!r} must lie between 0 and 1.")
        self.rate = rate
        self.generator = generator

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"

    def forward(self, rows: Tensor) -> Tensor:
        if not self.training:
            return rows
        draw = torch.rand(rows.shape[:-1], generator=self.generator).to(rows.device)
        draw = draw.clamp(min=torch.finfo(draw.dtype).tiny)
        kept = 1 + (draw.log() / math.log1p(-self.rate)).floor()
        return rows * (torch.arange(rows.shape[-1], device=rows.device) < kept[..., None])


def best_size(scores: Mapping[int, float], *, tolerance: float | int = 0.0) -> int:
    """Return the smallest size whose validation score is within ``tolerance`` of the best.

    Parameters
    ----------
    scores
        Validation score of each size, higher for better: an accuracy, for instance.
    tolerance
        What a smaller size may lose, in units of the score.

    >>> best_size({8: 0.71, 16: 0.80, 32: 0.79})
    16
    >>> best_size({8: 0.71, 16: 0.80, 32: 0.81}, tolerance=0.02)
    16
    """
    bad = [dim for dim, score in scores.items() if not math.isfinite(score)]
    if not scores or bad or not tolerance >= 0:
        raise DataError(
            f"no size can be chosen from scores {dict(scores)} with tolerance {tolerance!r}: at "
            f"least one score, all of them finite, and a tolerance of 0 or more."
        )
    wanted = max(scores.values()) - tolerance
    return min(dim for dim, score in scores.items() if score >= wanted)
