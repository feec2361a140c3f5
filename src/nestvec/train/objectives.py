"""Nested objectives: tensors in, a loss out. Plain torch modules that patch nothing.

One loss is applied to several prefixes of an embedding and the results are added up (Kusupati et
al., Matryoshka Representation Learning, NeurIPS 2022, arXiv:2205.13147). What others decide in
silence is an argument here: which sizes, what each weighs, whether a prefix is normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestvec.errors import DataError, DimensionError
from nestvec.space import parse_dims

#: Weights by name: every size alike (the paper), or the shortest double (its "8boost" ablation).
PRESETS = ("uniform", "boost_low")


def cut(rows: Tensor, dim: int, *, normalise: bool) -> Tensor:
    """Return the first ``dim`` numbers of each row, L2-normalised after the cut if asked."""
    if not 1 <= dim <= rows.shape[-1]:
        raise DimensionError(f"prefix dim {dim} does not fit embeddings of dim {rows.shape[-1]}.")
    prefix = rows[..., :dim]
    return F.normalize(prefix, dim=-1) if normalise else prefix


def dim_weights(weights: str | Sequence[float], n_dims: int) -> tuple[float, ...]:
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


class NestedLoss(nn.Module):
    """Add up a base loss over prefixes of its first ``n_embeddings`` arguments.

    Parameters
    ----------
    loss
        Any callable from tensors to a scalar: ``loss(first, second, ..., **more)``.
    dims
        Sizes, in any order; the largest may be the full size or not.
    weights
        ``"uniform"``, ``"boost_low"`` or one number a size, shortest first. The paper adds up with
        weight 1; a mean would change the learning rate with the number of sizes.
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
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        dims: Iterable[int] | str,
        *,
        weights: str | Sequence[float] = "uniform",
        normalise: bool = True,
        n_embeddings: int | None = None,
        n_dims_per_step: int = -1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.dims = parse_dims(dims)
        self.weights = dim_weights(weights, len(self.dims))
        self.normalise = normalise
        self.n_embeddings = n_embeddings
        if n_dims_per_step != -1 and not 1 <= n_dims_per_step <= len(self.dims):
            raise DataError(
                f"n_dims_per_step {n_dims_per_step} does not fit {len(self.dims)} sizes: 1 to "
                f"{len(self.dims)}, or -1 for all."
            )
        self.n_dims_per_step = n_dims_per_step
        self.generator = generator

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
        self.symmetric = symmetric

    def forward(
        self, queries: Tensor, documents: Tensor, hard: Tensor | None = None, *, offset: int = 0
    ) -> Tensor:
        self._check(len(queries), len(documents), 0 if hard is None else len(hard), offset)
        scale = self.log_scale.exp().clamp(max=100.0)
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

    ``forward(rows, labels)``: rows without a partner in the batch do not count; a batch without any
    pair has loss 0.
    """

    def __init__(self, *, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, rows: Tensor, labels: Tensor) -> Tensor:
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
        weights: str | Sequence[float] = "uniform",
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

    In training each row keeps its first ``b`` numbers, b geometric with rate ``rate`` and at most
    the full size; the others are zero. In evaluation nothing changes.
    """

    def __init__(self, *, rate: float = 0.01, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not 0 < rate < 1:
            raise DataError(f"rate {rate!r} must lie between 0 and 1.")
        self.rate = rate
        self.generator = generator

    def forward(self, rows: Tensor) -> Tensor:
        if not self.training:
            return rows
        draw = torch.rand(len(rows), generator=self.generator).to(rows.device)
        draw = draw.clamp(min=torch.finfo(draw.dtype).tiny)
        kept = 1 + (draw.log() / torch.log1p(torch.tensor(-self.rate))).floor()
        return rows * (torch.arange(rows.shape[-1], device=rows.device) < kept[:, None])
