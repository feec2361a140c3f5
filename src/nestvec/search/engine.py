"""Run a plan over a view: a structure makes the first shortlist, later stages order and cut it."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec._checks import normalise
from nestvec.errors import PlanError
from nestvec.search import kernels
from nestvec.search.cascade import Plan, Stage
from nestvec.search.exact import top_k
from nestvec.search.generation import Generation
from nestvec.search.structures.codes import Codes
from nestvec.search.view import Mask, View

Rows = NDArray[Any]
Queries = NDArray[np.float32]

#: Structures and their knobs, with what they are where a plan does not say.
STRUCTURES: dict[str, dict[str, int]] = {
    "exact": {},
    "graph": {"ef": 80},
    "lists": {"probes": 32},
}
_LEAST_PER_THREAD = 32  # queries; fewer are not worth a thread
_FEW = 4096  # rows that a filter leaves: each is scored, whatever the plan says


@dataclass(frozen=True, eq=False)
class Found:
    """Rows of the view (m, k) int64, best first, -1 where fewer were found; and scores.

    ``stages`` says what each stage did: its text, rows scored a query, milliseconds; ``shortlists``
    what it passed on (m, keep).
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    shortlists: tuple[Rows, ...]
    stages: tuple[dict[str, Any], ...]


def check(plan: Plan, generation: Generation) -> None:
    """Raise `PlanError` for a plan that cannot be run here."""
    if plan.structure not in STRUCTURES:
        raise PlanError(
            f"plan {plan}: there is no structure {plan.structure!r}; there are "
            f"{', '.join(STRUCTURES)}."
        )
    known = STRUCTURES[plan.structure]
    for knob, value in plan.knobs.items():
        if knob not in known or value < 1 or value != int(value):
            fits = ", ".join(f"{name} (1 or more)" for name in known) or "none"
            raise PlanError(
                f"plan {plan}: {knob}={value} does not fit; {plan.structure} has the knobs {fits}."
            )
    first, sizes = plan.cascade.stages[0], generation.mirror.sizes
    if plan.structure != "exact" and first.precision != "int8":
        raise PlanError(
            f"plan {plan}: {plan.structure} begins on int8 codes. "
            f"Write {Stage(first.dim, first.keep, 'int8')} > ... in place of {first}."
        )
    for stage in plan.cascade.stages:
        if stage.precision not in ("int8", "float32"):
            raise PlanError(f"plan {plan}: an index has int8 and float32, not {stage.precision}.")
        # Codes of any prefix may make a shortlist: what it loses is measured. Answers may not.
        is_last = stage is plan.cascade.stages[-1]
        if stage.dim > sizes[-1] or (
            stage.dim not in sizes and (is_last or stage.precision == "float32")
        ):
            raise PlanError(
                f"plan {plan}: size {stage.dim} is not one of this index's "
                f"({', '.join(map(str, sizes))}). Codes (:int8) of any size up to {sizes[-1]} may "
                f"come before the last stage."
            )


def run(
    plan: Plan, queries: Queries, view: View, mask: Mask, *, threads: int | None = None
) -> Found:
    """Run ``plan`` for queries (m, full dim) over the rows of ``mask``."""
    k = plan.cascade.stages[-1].keep
    fresh = view.search_fresh(normalise(queries[:, : plan.cascade.stages[-1].dim]), mask, k)
    if mask.n_derived == 0:
        empty = np.empty((len(queries), 0), np.int64)
        return _merged(empty, np.empty(empty.shape, np.float32), fresh, k, (), ())
    generation = view.generation
    if mask is not view.everyone and mask.n_derived <= _FEW:
        few = np.flatnonzero(mask.derived).astype(np.int32)
        work: Callable[[Queries], Any] = _Few(plan, generation, few)
    else:
        work = Planned(plan, generation, mask)
    parts = _in_threads(work, queries, threads)
    rows, scores = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    shortlists = tuple(np.concatenate(lists) for lists in zip(*(p[2] for p in parts), strict=True))
    stages = tuple(
        {**said[0], "ms": sum(one["ms"] for one in said)}
        for said in zip(*(p[3] for p in parts), strict=True)
    )
    return _merged(rows, scores, fresh, k, shortlists, stages)


def _in_threads(work: Callable[[Queries], Any], queries: Queries, threads: int | None) -> list[Any]:
    most = len(os.sched_getaffinity(0)) if threads is None else threads
    n_threads = min(most, max(1, len(queries) // _LEAST_PER_THREAD))
    if n_threads <= 1:
        return [work(queries)]
    with ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(work, np.array_split(queries, n_threads)))


def _merged(
    rows: Rows,
    scores: NDArray[np.float32],
    fresh: tuple[NDArray[np.int64], NDArray[np.float32]],
    k: int,
    shortlists: tuple[Rows, ...],
    stages: tuple[dict[str, Any], ...],
) -> Found:
    rows = rows.astype(np.int64)
    if fresh[0].shape[1] or rows.shape[1] < k:
        missing = max(0, k - rows.shape[1] - fresh[0].shape[1])
        filler = np.full((len(rows), missing), kernels.NOTHING)
        rows = np.concatenate([rows, fresh[0], filler], axis=1)
        unscored = np.full(filler.shape, -np.inf, np.float32)
        scores = np.concatenate([scores, fresh[1], unscored], axis=1)
        scores = np.where(rows < 0, -np.inf, scores).astype(np.float32)
        order = np.lexsort((rows, -scores), axis=1)[:, :k]
        rows = np.take_along_axis(rows, order, axis=1)
        scores = np.take_along_axis(scores, order, axis=1)
    scores[rows < 0] = np.nan
    return Found(rows, scores, shortlists, stages)


class Planned:
    """A plan as a function of queries; threads may call it together."""

    def __init__(self, plan: Plan, generation: Generation, mask: Mask) -> None:
        self.plan, self.generation, self.mask = plan, generation, mask
        self.first = plan.cascade.stages[0]
        self.knobs = {**STRUCTURES[plan.structure], **plan.knobs}
        for stage in plan.cascade.stages[1:]:  # loaded, or made, before threads start
            if stage.precision == "int8":
                generation.codes(stage.dim)
        if plan.structure == "graph":
            self.graph, self.codes = generation.graph(), generation.codes(self.first.dim)
        elif plan.structure == "lists":
            self.lists, self.codes = generation.lists(), generation.listed(self.first.dim)
        elif self.first.precision == "int8":
            self.codes = generation.codes(self.first.dim)

    def __call__(self, queries: Queries) -> Any:
        started = time.perf_counter()
        rows, scores, n_scored = self._first(queries)
        said = [_said(self.first, n_scored, started)]
        shortlists = [rows]
        for stage in self.plan.cascade.stages[1:]:
            started = time.perf_counter()
            n_scored = rows.shape[1]
            rows, scores = rescored(self.generation, stage, queries, rows)
            shortlists.append(rows)
            said.append(_said(stage, n_scored, started))
        return rows, scores, shortlists, said

    def _first(self, queries: Queries) -> tuple[Rows, NDArray[np.float32], int]:
        keep = min(self.first.keep, self.mask.n_derived)
        if self.plan.structure == "graph":
            # Rows that may not be found still lead the way, so the list is as much longer.
            share = self.mask.n_derived / len(self.generation)
            ef = min(len(self.generation), math.ceil(max(self.knobs["ef"], keep) / share))
            rows = self.graph.search(
                self.codes, self.codes.queries(queries), ef, _scratch(self.graph)
            )
            return _only(rows, self.mask.derived, keep), _NO_SCORES, ef
        if self.plan.structure == "lists":
            probes = self.knobs["probes"]
            rows = self.lists.search(self.codes, queries, keep, probes, self.mask.derived)
            share = min(1.0, probes / self.lists.n_lists)
            return rows, _NO_SCORES, round(share * len(self.generation))
        if self.first.precision == "int8":
            rows = _scanned(self.codes, queries, self.mask.derived, keep)
            return rows, _NO_SCORES, len(self.generation)
        rows, scores = _brute_force(self.generation, self.first, queries, self.mask)
        return rows, scores, len(self.generation)


class _Few:
    """Few rows may be found: each is scored at the last stage's size."""

    def __init__(self, plan: Plan, generation: Generation, rows: NDArray[np.int32]) -> None:
        self.last, self.generation, self.rows = plan.cascade.stages[-1], generation, rows

    def __call__(self, queries: Queries) -> Any:
        started = time.perf_counter()
        shortlists = np.ascontiguousarray(
            np.broadcast_to(self.rows, (len(queries), len(self.rows)))
        )
        rows, scores = rescored(self.generation, self.last, queries, shortlists)
        return rows, scores, [rows], [_said(self.last, len(self.rows), started)]


_NO_SCORES = np.empty(0, np.float32)
_local = threading.local()


def _scratch(graph: Any) -> Any:
    """Return this thread's memory of a walk over ``graph``."""
    held = getattr(_local, "scratch", None)
    if held is None or held[0] is not graph:
        _local.scratch = held = (graph, graph.scratch())
    return held[1]


def _said(stage: Stage, n_scored: int, started: float) -> dict[str, Any]:
    ms = 1000 * (time.perf_counter() - started)
    return {"stage": str(stage), "rows_scored": n_scored, "ms": ms}


def _only(rows: Rows, alive: NDArray[np.bool_], keep: int) -> Rows:
    """Return the first ``keep`` rows of each shortlist that are alive."""
    if not len(alive):
        return rows[:, :keep]
    good = (rows >= 0) & alive[rows]
    order = np.argsort(~good, axis=1, kind="stable")[:, :keep]
    return np.where(
        np.take_along_axis(good, order, axis=1), np.take_along_axis(rows, order, axis=1), -1
    ).astype(np.int32)


def _scanned(codes: Codes, queries: Queries, alive: NDArray[np.bool_], keep: int) -> Rows:
    scores = np.empty((len(queries), keep), np.int32)
    rows = np.empty((len(queries), keep), np.int32)
    kernels.scan(codes.values, codes.queries(queries), alive, scores, rows)
    return rows


def rescored(
    generation: Generation, stage: Stage, queries: Queries, shortlists: Rows
) -> tuple[Rows, NDArray[np.float32]]:
    keep = min(stage.keep, shortlists.shape[1])
    if stage.precision == "float32":
        asked = normalise(np.ascontiguousarray(queries[:, : stage.dim]))
        return generation.mirror.rerank(asked, shortlists, keep)
    codes = generation.codes(stage.dim)
    scores = np.empty((len(queries), keep), np.int32)
    rows = np.empty((len(queries), keep), np.int32)
    kernels.rescore(codes.values, codes.queries(queries), shortlists, scores, rows)
    return rows, scores.astype(np.float32)


def _brute_force(
    generation: Generation, stage: Stage, queries: Queries, mask: Mask
) -> tuple[Rows, NDArray[np.float32]]:
    """Score every row at float32, some rows of the file at a time."""
    asked = normalise(np.ascontiguousarray(queries[:, : stage.dim]))
    best: list[tuple[NDArray[Any], NDArray[np.float32]]] = []
    for start, block in generation.mirror.blocks():
        some = np.arange(len(block))
        if len(mask.derived):
            some = np.flatnonzero(mask.derived[start : start + len(block)])
            if not len(some):
                continue
        rows, scores = top_k(asked, normalise(block[some, : stage.dim]), stage.keep)
        best.append((some[rows] + start, scores))
        if len(best) > 1:
            rows, scores = (np.concatenate(part, axis=1) for part in zip(*best, strict=True))
            order = np.lexsort((rows, -scores), axis=1)[:, : stage.keep]
            best = [tuple(np.take_along_axis(part, order, axis=1) for part in (rows, scores))]  # type: ignore[list-item]
    return best[0][0].astype(np.int32), best[0][1]
