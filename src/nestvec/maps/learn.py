"""The adaptor's training loop: all nesting dims together. Imported by ``fit`` only: needs torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from nestvec.maps import objectives

Matrix = NDArray[np.float32]
_WARM_UP = 20  # steps of rising learning rate
_CHECKS = 10  # looks at the held-out part in a whole run
_HARD = 32  # nearest documents of a labelled query from which wrong ones are drawn
_HARD_PER_QUERY = 4


@dataclass(frozen=True)
class Recipe:
    """What to train for and how long; the settings of `MatryoshkaAdaptor` under their names."""

    dims: tuple[int, ...]
    dim_weights: tuple[float, ...]
    temperature: float
    neighbour_weight: float
    topk_weight: float
    pair_weight: float
    reconstruction_weight: float
    k: int
    learning_rate: float
    batch_size: int
    gallery_size: int
    max_steps: int
    patience: int


@dataclass(frozen=True)
class Labelled:
    """Queries with, for each, the rows of its relevant documents."""

    queries: Matrix
    relevant: Sequence[NDArray[np.int64]]
    share: float  # of a batch; the rest stays unlabelled and holds the map in place
    label_weight: float  # of the label in a query's target; the rest is full size's own opinion


def learn(
    rows: Matrix,
    start: Matrix,
    recipe: Recipe,
    *,
    hidden_units: int,
    rng: np.random.Generator,
    held_out: Callable[[dict[str, Matrix]], float],
    unlabelled: Matrix | None = None,
    labelled: Labelled | None = None,
    begin: dict[str, Matrix] | None = None,
    stop_at: int | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[dict[str, Matrix], int]:
    """Train and return the best arrays by ``held_out`` (higher is better), and their step.

    Parameters
    ----------
    rows : (n, dim) float32, unit length
        The documents: gallery and, unlabelled, also queries.
    start : (dim, dim) float32
        The map to begin with, ``rows @ start``; its full-size cosines are the teacher.
    hidden_units
        0 for a linear map, else the width of the residual network.
    unlabelled : (m, dim) float32, unit length, optional
        Queries without labels; a quarter of each batch comes from them.
    begin
        Arrays of an earlier stage to go on from, instead of ``start`` alone.
    stop_at
        Take exactly so many steps of the schedule and judge nothing: to train again, on all data,
        for as long as was found to be best.
    """
    module = _Map(start, hidden_units, rng, begin)
    gallery_of = torch.from_numpy(rows)
    scales = torch.full((len(recipe.dims),), -np.log(recipe.temperature)).requires_grad_()
    optimiser = torch.optim.Adam(
        [
            {"params": module.parameters, "lr": recipe.learning_rate},
            {"params": [scales], "lr": 0.02},
        ],
        betas=(0.9, 0.98),
    )

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + np.cos(np.pi * step / recipe.max_steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    hard = None if labelled is None else _nearest(labelled.queries, rows)
    best, best_step = module.arrays(), 0
    best_score = held_out(best) if stop_at is None else 0.0
    every = max(1, recipe.max_steps // _CHECKS)
    for step in range(1, (recipe.max_steps if stop_at is None else stop_at) + 1):
        batch = _draw(len(rows), recipe, rng, unlabelled, labelled, hard)
        loss = _loss(module, scales, gallery_of, batch, recipe, unlabelled, labelled)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        advance(1)
        if stop_at is None and (step % every == 0 or step == recipe.max_steps):
            arrays = module.arrays()
            score = held_out(arrays)
            if score > best_score:
                best, best_score, best_step = arrays, score, step
            elif step - best_step >= recipe.patience:
                break
    return (best, best_step) if stop_at is None else (module.arrays(), stop_at)


class _Map:
    """The map as torch parameters, in the coordinates it starts in."""

    def __init__(
        self,
        start: Matrix,
        hidden_units: int,
        rng: np.random.Generator,
        begin: dict[str, Matrix] | None,
    ) -> None:
        dim = len(start)
        self.start = torch.from_numpy(start)
        # Everything is learned relative to ``start``: one learning rate then fits all axes.
        self.skip = torch.eye(dim)
        self.hidden: list[torch.Tensor] = []
        if begin is not None:
            self.skip = torch.from_numpy(np.linalg.solve(start, begin["linear"]).astype("f4"))
        if hidden_units and begin is not None and "inner" in begin:
            inner = np.linalg.solve(start, begin["inner"]).astype(np.float32)
            self.hidden = [
                torch.from_numpy(a.copy()) for a in (inner, begin["bias"], begin["outer"])
            ]
        elif hidden_units:
            inner = rng.normal(size=(dim, hidden_units)).astype(np.float32)
            self.hidden = [
                torch.from_numpy(inner),
                torch.zeros(hidden_units),
                torch.zeros(hidden_units, dim),  # zero, so that training begins at ``start``
            ]
        self.parameters = [p.requires_grad_() for p in (self.skip, *self.hidden)]

    def __call__(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        began = rows @ self.start
        mapped = began @ self.skip
        if self.hidden:
            inner, bias, outer = self.hidden
            mapped = mapped + F.gelu(began @ inner + bias) @ outer
        return mapped, began

    def arrays(self) -> dict[str, Matrix]:
        """Return the arrays that apply to rows as they are, ``start`` folded in."""
        with torch.no_grad():
            found = {"linear": (self.start @ self.skip).numpy().copy()}
            if self.hidden:
                inner, bias, outer = self.hidden
                found["inner"] = (self.start @ inner).numpy().copy()
                found["bias"] = bias.numpy().copy()
                found["outer"] = outer.numpy().copy()
        return found


@dataclass(frozen=True)
class _Batch:
    gallery: NDArray[np.int64]  # rows that are looked at in this step
    documents: NDArray[np.int64]  # rows that ask
    unlabelled: NDArray[np.int64]  # queries that ask
    labelled: NDArray[np.int64]  # queries with labels that ask


def _draw(
    n: int,
    recipe: Recipe,
    rng: np.random.Generator,
    unlabelled: Matrix | None,
    labelled: Labelled | None,
    hard: NDArray[np.int64] | None,
) -> _Batch:
    size = min(recipe.batch_size, n)
    n_free = n_labelled = 0
    chosen = free = np.zeros(0, dtype=np.int64)
    if labelled is not None:
        n_labelled = min(int(size * labelled.share), len(labelled.queries))
        chosen = rng.choice(len(labelled.queries), n_labelled, replace=False)
    elif unlabelled is not None:
        n_free = min(size // 4, len(unlabelled))
        free = rng.choice(len(unlabelled), n_free, replace=False)
    documents = rng.choice(n, size - n_free - n_labelled, replace=False)
    gallery = rng.choice(n, min(recipe.gallery_size, n), replace=False)
    if labelled is not None and hard is not None:
        wrong = rng.permuted(hard[chosen], axis=1)[:, :_HARD_PER_QUERY].ravel()
        right = [labelled.relevant[i] for i in chosen.tolist()]
        gallery = np.unique(np.concatenate([gallery, wrong, *right]))
    return _Batch(gallery, documents, free, chosen)


def _loss(
    module: _Map,
    scales: torch.Tensor,
    rows: torch.Tensor,
    batch: _Batch,
    recipe: Recipe,
    unlabelled: Matrix | None,
    labelled: Labelled | None,
) -> torch.Tensor:
    gallery = rows[batch.gallery]
    asking = [rows[batch.documents]]
    if unlabelled is not None and len(batch.unlabelled):
        asking.append(torch.from_numpy(unlabelled[batch.unlabelled]))
    if labelled is not None:
        asking.append(torch.from_numpy(labelled.queries[batch.labelled]))
    asks = torch.cat(asking)
    own = np.full(len(asks), -1)
    own[: len(batch.documents)] = batch.documents
    hidden = torch.from_numpy(own[:, None] == batch.gallery[None])
    mapped, began = module(asks)
    mapped_gallery, began_gallery = module(gallery)
    teacher = objectives.prefix_cosines(began, began_gallery, began.shape[1])
    target = objectives.neighbour_distribution(teacher, hidden, recipe.temperature)
    if labelled is not None:
        first = len(asks) - len(batch.labelled)
        label = torch.from_numpy(_label_target(batch, labelled))
        target[first:] += labelled.label_weight * (label - target[first:])

    total = torch.zeros(())
    for size, weight, log_scale in zip(recipe.dims, recipe.dim_weights, scales, strict=True):
        if not weight:
            continue
        student = objectives.prefix_cosines(mapped, mapped_gallery, size)
        part = torch.zeros(())
        if recipe.neighbour_weight:
            part = part + recipe.neighbour_weight * objectives.neighbour_loss(
                student, log_scale.exp(), target, hidden
            )
        if recipe.topk_weight:
            part = part + recipe.topk_weight * objectives.topk_loss(
                student, teacher, hidden, recipe.k
            )
        if recipe.pair_weight:
            part = part + recipe.pair_weight * objectives.pair_loss(student, teacher, hidden)
        total = total + weight * part
    if recipe.reconstruction_weight:
        total = total + recipe.reconstruction_weight * objectives.reconstruction_loss(mapped, began)
    return total


def _label_target(batch: _Batch, labelled: Labelled) -> Matrix:
    """Return (queries, gallery): each query's relevant documents share its weight equally."""
    target = np.zeros((len(batch.labelled), len(batch.gallery)), dtype=np.float32)
    for row, query in enumerate(batch.labelled.tolist()):
        right = np.searchsorted(batch.gallery, labelled.relevant[query])  # gallery is sorted here
        target[row, right] = 1.0 / len(right)
    return target


def _nearest(queries: Matrix, rows: Matrix) -> NDArray[np.int64]:
    k = min(_HARD, len(rows))
    found = [
        np.argpartition(-(queries[i : i + 256] @ rows.T), k - 1, axis=1)[:, :k]
        for i in range(0, len(queries), 256)
    ]
    return np.concatenate(found)
