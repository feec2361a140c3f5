"""Objectives in two dimensions: several layers of one encoder, each at several sizes.

They take rows (n, n_layers, dim), one vector a layer, as `nestvec.encoders.layers` reads them in
one forward pass; the last along the middle axis is the encoder's last layer. Layers are counted
from 1, the first transformer layer, as everywhere in nestvec.

`FixedPairs` is what `train_text` takes if nobody says otherwise. `TwoDMSE` and `ESE` are the
published objectives. An independent reproduction (Wang et al. 2024, arXiv:2411.17299) found that
the random pairs of 2DMSE lose to separately trained small models; fixed pairs that are trained at
every step, with the last layer as a detached teacher, are what Starbucks (arXiv:2410.13230) answers
with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestvec.errors import DataError, DimensionError
from nestvec.space import parse_dims
from nestvec.train.keeping import KeepNeighbours
from nestvec.train.objectives import cut

Pairs = str | Iterable[tuple[int, int]]

#: Schedules of pairs by name; see `pairs_of`.
SCHEDULES = ("ladder", "edges", "grid")
_ANGLE_QUIRK = "angle"


def pairs_of(
    schedule: Pairs, layers: Sequence[int], dims: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Return (layer, dim) pairs, the last layer's at every size always among them.

    Parameters
    ----------
    schedule
        ``"ladder"``: dims rise with the layers, as in Starbucks; a layer has one size.
        ``"edges"``: the ladder, and every layer at its full size. ``"grid"``: every layer at every
        size. Or pairs of your own, like ``[(2, 32), (4, 64)]``.
    layers, dims
        Rising; what may be named.

    Raises
    ------
    DataError
        If a pair names a layer or a size that is not among them.

    Examples
    --------
    >>> pairs_of("ladder", (1, 2, 3), (8, 16, 32))
    ((1, 8), (2, 16), (3, 8), (3, 16), (3, 32))
    >>> pairs_of([(1, 16)], (1, 3), (8, 16))
    ((1, 16), (3, 8), (3, 16))
    """
    last = {(layers[-1], dim) for dim in dims}
    if not isinstance(schedule, str):
        own = [(int(layer), int(dim)) for layer, dim in schedule]
        for layer, dim in own:
            if layer not in layers or dim not in dims:
                raise DataError(
                    f"the pair (layer {layer}, dim {dim}) does not fit: layers {tuple(layers)} and "
                    f"sizes {tuple(dims)} are trained."
                )
        return tuple(sorted({*own, *last}))
    if schedule not in SCHEDULES:
        raise DataError(f"the schedule of pairs {schedule!r} is not one of {', '.join(SCHEDULES)}.")
    if schedule == "grid":
        return tuple((layer, dim) for layer in layers for dim in dims)
    steps = max(1, len(layers) - 1)
    places = [round(at * (len(dims) - 1) / steps) for at in range(len(layers))]
    found = {(layer, dims[place]) for layer, place in zip(layers, places, strict=True)}
    if schedule == "edges":
        found |= {(layer, dims[-1]) for layer in layers}
    return tuple(sorted({*found, *last}))


class DepthLoss(nn.Module):
    """What objectives over layers share: which layers they read, and how one cell is scored.

    Parameters
    ----------
    loss
        Any callable from tensors to a scalar, as for `NestedLoss`.
    layers
        Numbers of the layers, rising, along the middle axis of the rows; the last is the teacher.
    dims
        Sizes, rising; the largest is the full one.
    n_embeddings
        How many leading arguments are embeddings; None is all. One that is (n, dim) rather than
        (n, n_layers, dim), like a teacher's, is cut as it is.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        layers: Iterable[int],
        dims: Iterable[int] | str,
        *,
        n_embeddings: int | None = None,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.layers = tuple(layers)
        if list(self.layers) != sorted(set(self.layers)) or not self.layers:
            raise DataError(f"layers {self.layers} are not rising, each once.")
        self.dims = parse_dims(dims)
        self.n_embeddings = n_embeddings

    def extra_repr(self) -> str:
        return f"layers={self.layers}, dims={self.dims}"

    def _split(self, given: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
        """Return the embeddings and the rest, or raise for what does not fit."""
        n = len(given) if self.n_embeddings is None else self.n_embeddings
        rows, rest = list(given[:n]), given[n:]
        widths = {one.shape[-1] for one in rows}
        if len(widths) > 1:
            raise DimensionError(
                f"embeddings of {' and '.join(map(str, sorted(widths)))} dims cannot be compared "
                f"at every size: teacher and student are to be of one size."
            )
        counts = {one.shape[1] for one in rows if one.ndim == 3}
        if counts != {len(self.layers)}:
            raise DataError(
                f"rows {[tuple(one.shape) for one in rows]} do not fit the {len(self.layers)} "
                f"layers {self.layers}: (n, {len(self.layers)}, dim) is needed."
            )
        return rows, rest

    def _at(self, rows: Sequence[Tensor], layer: int) -> list[Tensor]:
        place = self.layers.index(layer)
        return [one[:, place] if one.ndim == 3 else one for one in rows]

    def _cell(self, rows: Sequence[Tensor], rest: Sequence[Tensor], layer: int, dim: int) -> Tensor:
        """Return the base loss of one layer at one size, L2-normalised after the cut."""
        return self.loss(*(cut(one, dim, normalise=True) for one in self._at(rows, layer)), *rest)


class FixedPairs(DepthLoss):
    """The same (layer, dim) pairs at every step, and the last layer as a detached teacher.

    ``sum over pairs of weight * loss(layer, dim)``, in which the last layer stands at every size
    (that is `NestedLoss`), plus ``kl_div_weight * sum over earlier pairs`` of the cross-entropy of
    the batch's neighbour distribution at that pair with the last layer's at full size
    (`KeepNeighbours`). No gradient reaches the teacher, so the last layer is not made worse to be
    easier to follow.

    Parameters
    ----------
    loss, layers, dims, n_embeddings
        See `DepthLoss`.
    pairs
        ``"ladder"``, ``"edges"``, ``"grid"`` or pairs; see `pairs_of`. Losses are cheap beside
        the encoder's pass, which all pairs share.
    last_layer_weight, prior_layers_weight
        Of the pairs of the last layer, and of earlier ones.
    kl_div_weight
        Of the teacher; 0 leaves it out.
    temperature
        Of the teacher's distribution; that of each pair is learned from there.

    Notes
    -----
    Starbucks trains its ladder only (``pairs="ladder"``, without the last layer's other sizes) and
    compares numbers of the embeddings by a softmax for STS, score distributions for retrieval; here
    it is the latter for all, which needs no shared axes and is the same for texts of any kind.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        layers: Iterable[int],
        dims: Iterable[int] | str,
        *,
        pairs: Pairs = "grid",
        last_layer_weight: float | int = 1.0,
        prior_layers_weight: float | int = 1.0,
        kl_div_weight: float | int = 1.0,
        temperature: float | int = 0.05,
        n_embeddings: int | None = None,
    ) -> None:
        super().__init__(loss, layers, dims, n_embeddings=n_embeddings)
        self.pairs = pairs_of(pairs, self.layers, self.dims)
        self.last_layer_weight = float(last_layer_weight)
        self.prior_layers_weight = float(prior_layers_weight)
        self.kl_div_weight = float(kl_div_weight)
        earlier = [pair for pair in self.pairs if pair[0] != self.layers[-1]]
        self.follow = (
            KeepInDepth(self.layers, earlier, temperature=temperature)
            if kl_div_weight and earlier
            else None
        )

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, pairs={self.pairs}, "
            f"last_layer_weight={self.last_layer_weight:g}, "
            f"prior_layers_weight={self.prior_layers_weight:g}, "
            f"kl_div_weight={self.kl_div_weight:g}"
        )

    def forward(self, *given: Tensor) -> Tensor:
        rows, rest = self._split(given)
        last = self.layers[-1]
        terms = []
        for layer, dim in self.pairs:
            weight = self.last_layer_weight if layer == last else self.prior_layers_weight
            if weight:
                terms.append(weight * self._cell(rows, rest, layer, dim))
        if self.follow is not None:
            texts = torch.cat([one for one in rows if one.ndim == 3])
            terms.append(self.kl_div_weight * self.follow(texts, texts[:, -1]))
        return torch.stack(terms).sum()


class KeepInDepth(nn.Module):
    """`KeepNeighbours` of several layers: every pair follows one full-size, full-depth teacher.

    Parameters
    ----------
    layers
        As in `DepthLoss`.
    pairs
        (layer, dim) pairs that follow.
    temperature
        Of the teacher's distribution.

    ``forward(rows, teacher)``: (n, n_layers, dim), and (n, any), which is detached.
    """

    def __init__(
        self,
        layers: Sequence[int],
        pairs: Iterable[tuple[int, int]],
        *,
        temperature: float | int = 0.05,
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        sizes: dict[int, list[int]] = {}
        for layer, dim in pairs:
            sizes.setdefault(layer, []).append(dim)
        self.of_layer = nn.ModuleDict(
            {str(at): KeepNeighbours(dims, temperature=temperature) for at, dims in sizes.items()}
        )

    def forward(self, rows: Tensor, teacher: Tensor) -> Tensor:
        found = [
            keep(rows[:, self.layers.index(int(layer))], teacher)
            for layer, keep in self.of_layer.items()
        ]
        return torch.stack(found).sum()


class TwoDMSE(DepthLoss):
    """2D Matryoshka sentence embeddings: a random layer and a random size at each step.

    Li et al. 2024, arXiv:2402.14776v1. At each step a layer n below the last, N, and a size d below
    the full one, D, are drawn: ``L(N, D) + L(N, d) + L(n, D) + L(n, d) + kl_div_weight * T *
    KL(softmax(e_N / T) || softmax(e_n / T))``, the embeddings at full size, mean over rows. All
    weights are 1.

    Parameters
    ----------
    loss, layers, dims, n_embeddings
        See `DepthLoss`.
    kl_div_weight, kl_temperature
        Of the alignment (the temperature is sentence-transformers'; the paper names none).
    detach_teacher
        Keep the gradient of the alignment from the last layer. False lets it through, as
        sentence-transformers' AdaptiveLayerLoss did until August 2026.
    generator
        Where the draws come from; None is torch's global one.

    Notes
    -----
    sentence-transformers' Matryoshka2dLoss is another objective: it draws one size for the last
    layer and one for the earlier layer, the full size among them, so that the full size is trained
    in one call of ``len(dims)`` only; and it draws layers from 0, which is what goes into the first
    layer. Neither is done here.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        layers: Iterable[int],
        dims: Iterable[int] | str,
        *,
        kl_div_weight: float | int = 1.0,
        kl_temperature: float | int = 0.3,
        detach_teacher: bool = True,
        n_embeddings: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(loss, layers, dims, n_embeddings=n_embeddings)
        if len(self.layers) < 2 or len(self.dims) < 2:
            raise DataError(
                f"2dmse draws an earlier layer and a shorter size, and layers {self.layers} with "
                f"sizes {self.dims} leave nothing to draw: give at least two of each."
            )
        if not kl_temperature > 0:
            raise DataError(f"kl_temperature {kl_temperature!r} must be above 0.")
        self.kl_div_weight, self.kl_temperature = float(kl_div_weight), float(kl_temperature)
        self.detach_teacher = detach_teacher
        self.generator = generator

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, kl_div_weight={self.kl_div_weight:g}, "
            f"kl_temperature={self.kl_temperature:g}, detach_teacher={self.detach_teacher}"
        )

    def forward(self, *given: Tensor) -> Tensor:
        rows, rest = self._split(given)
        layer, dim = self._drawn(self.layers[:-1]), self._drawn(self.dims[:-1])
        last, full = self.layers[-1], self.dims[-1]
        pairs = ((last, full), (last, dim), (layer, full), (layer, dim))
        terms = [self._cell(rows, rest, *pair) for pair in pairs]
        for one in rows:
            if one.ndim == 3:
                terms.append(self.kl_div_weight * self._alignment(one, layer))
        return torch.stack(terms).sum()

    def _drawn(self, choices: Sequence[int]) -> int:
        return choices[int(torch.randint(len(choices), (), generator=self.generator))]

    def _alignment(self, rows: Tensor, layer: int) -> Tensor:
        teacher = rows[:, -1].detach() if self.detach_teacher else rows[:, -1]
        return _divergence(rows[:, self.layers.index(layer)], teacher, self.kl_temperature)


class ESE(DepthLoss):
    """Espresso sentence embeddings: every layer at one short size, led by its own PCA.

    Li et al., ICLR 2025, arXiv:2402.14776v2. With k = ``compression_size``, e_i the embedding of
    layer i and N the last layer: ``L(e_N) + L(e_N[:k]) + D(e_N[:k], PCA_k(e_N)) + mean over the
    earlier layers i of (L(e_i[:k]) + D(e_i[:k], PCA_k(e_i))) / (1 + ln(1 + i))``. ``D`` is the mean
    squared error plus ``T * KL``, the rows of ``PCA_k(m) = m U S`` of the k largest singular
    values of ``softmax(m' m / sqrt(dim))`` are targets without a gradient.

    Parameters
    ----------
    loss, layers, dims, n_embeddings
        See `DepthLoss`; of ``dims`` only the full size and k are trained.
    compression_size
        k. It is one size, so the vectors are not made to be cut elsewhere.
    kl_temperature
        T.
    variant
        ``"paper"`` supervises every layer below the last. ``"angle"`` does what the published code
        does: of the N + 1 states that transformers returns it takes the first N - 1, so what goes
        into the first layer is supervised, as i = 0, and layer N - 1 never is. ``layers`` are then
        all of a model's and `layers` of the objective begins with 0.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        layers: Iterable[int],
        dims: Iterable[int] | str,
        *,
        compression_size: int = 128,
        kl_temperature: float | int = 1.0,
        variant: str = "paper",
        n_embeddings: int | None = None,
    ) -> None:
        layers = tuple(layers)
        if variant not in ("paper", _ANGLE_QUIRK):
            raise DataError(f"variant {variant!r} of ESE is not one of paper, {_ANGLE_QUIRK}.")
        if variant == _ANGLE_QUIRK:
            if layers != tuple(range(1, len(layers) + 1)):
                raise DataError(
                    f"ESE as the published code has it takes all layers from 1, not {layers}."
                )
            layers = (*range(len(layers) - 1), layers[-1])
        super().__init__(loss, layers, dims, n_embeddings=n_embeddings)
        if not 1 <= compression_size <= self.dims[-1]:
            raise DimensionError(
                f"compression_size {compression_size} does not fit embeddings of dim "
                f"{self.dims[-1]}."
            )
        if not kl_temperature > 0:
            raise DataError(f"kl_temperature {kl_temperature!r} must be above 0.")
        self.compression_size = compression_size
        self.kl_temperature = float(kl_temperature)
        self.variant = variant

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, compression_size={self.compression_size}, "
            f"kl_temperature={self.kl_temperature:g}, variant={self.variant!r}"
        )

    def forward(self, *given: Tensor) -> Tensor:
        rows, rest = self._split(given)
        *earlier, last = self.layers
        total = self._cell(rows, rest, last, self.dims[-1]) + self._compressed(rows, rest, last)
        for layer in earlier:
            weight = 1 / (1 + math.log(1 + layer)) / len(earlier)
            total = total + weight * self._compressed(rows, rest, layer)
        return total

    def _compressed(self, rows: Sequence[Tensor], rest: Sequence[Tensor], layer: int) -> Tensor:
        k = self.compression_size
        found = self._cell(rows, rest, layer, k)
        for one, whole in zip(rows, self._at(rows, layer), strict=True):
            if one.ndim == 3:
                short, target = whole[:, :k], principal_target(whole, k)
                found = found + F.mse_loss(short, target)
                found = found + _divergence(short, target, self.kl_temperature)
        return found


@torch.no_grad()
def principal_target(rows: Tensor, k: int) -> Tensor:
    """Return ESE's PCA_k of a batch: ``rows @ U_k @ diag(S_k)``, (n, k), without a gradient."""
    gram = (rows.T @ rows / math.sqrt(rows.shape[1])).softmax(dim=-1)
    left, values, _ = torch.svd_lowrank(gram, q=k)
    return rows @ left * values


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T * KL(teacher || student) of softmaxes over the numbers of a row, mean over rows."""
    return temperature * F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.softmax(teacher / temperature, dim=-1),
        reduction="batchmean",
    )
