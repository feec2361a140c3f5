"""Run a plan over a view: a structure makes the first shortlist, later stages order and cut it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nestvec._checks import normalise
from nestvec.errors import PlanError
from nestvec.search import kernels
from nestvec.search.cascade import Cascade, Plan, Stage
from nestvec.search.exact import top_k
from nestvec.search.fused import Fused
from nestvec.search.generation import Generation
from nestvec.search.structures import peers
from nestvec.search.structures.codes import Codes
from nestvec.search.view import Mask, View

Rows = NDArray[Any]
Queries = NDArray[np.float32]

#: Our structures and their knobs, with what they are where a plan does not say.
STRUCTURES: dict[str, dict[str, int]] = {
    "exact": {},
    "graph": {"ef": 80},
    "lists": {"probes": 32},
}
#: Those of faiss beside them, which the planner tries only if it is told to.
PEERS: dict[str, dict[str, int]] = {
    name: {kind.knob: kind.default} for name, kind in peers.KINDS.items()
}
KNOWN = {**STRUCTURES, **PEERS}
_LEAST_PER_THREAD = 32  # queries; fewer are not worth a thread
_PLANS_KEPT = 32  # ready to run
_MET = 32  # rows that a walk meets for each it keeps
_AT_SIGHT = 4  # queries that cost less to score as rows go by than to put rows in order first
_SPARE = 4  # rows found by rounded queries for each answer that codes give
_CODED = "int8", "int10"  # precisions of codes
_FEW = 4096  # rows that a filter leaves: each is scored, whatever the plan says


class Found(NamedTuple):
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
    if plan.structure not in KNOWN:
        raise PlanError(
            f"plan {plan}: there is no structure {plan.structure!r}; there are {', '.join(KNOWN)}."
        )
    known = KNOWN[plan.structure]
    for knob, value in plan.knobs.items():
        if knob not in known or value < 1 or value != int(value):
            fits = ", ".join(f"{name} (1 or more)" for name in known) or "none"
            raise PlanError(
                f"plan {plan}: {knob}={value} does not fit; {plan.structure} has the knobs {fits}."
            )
    first, last = plan.cascade.stages[0], plan.cascade.stages[-1]
    sizes = generation.mirror.sizes
    if plan.structure in PEERS:
        _check_peer(plan, sizes[-1])
    elif plan.structure != "exact" and not (
        first.precision == "int8" or (first is last and first.precision == "int10")
    ):
        raise PlanError(
            f"plan {plan}: {plan.structure} begins on int8 codes. "
            f"Write {Stage(first.dim, first.keep, 'int8')} > ... in place of {first}."
        )
    for stage in plan.cascade.stages:
        if stage is first and plan.structure in PEERS:
            continue
        if stage.precision not in (*_CODED, "float32"):
            raise PlanError(
                f"plan {plan}: an index has int8, int10 and float32, not {stage.precision}."
            )
        if stage.precision == "int10" and stage is not last:
            raise PlanError(
                f"plan {plan}: int10 is for the last stage, where full vectors are not to be read. "
                f"Write {Stage(stage.dim, stage.keep, 'int8')} in place of {stage}."
            )
        # Codes of any prefix may make a shortlist: what it loses is measured. Answers may not.
        if stage.dim > sizes[-1] or (
            stage.dim not in sizes and (stage is last or stage.precision == "float32")
        ):
            raise PlanError(
                f"plan {plan}: size {stage.dim} is not one of this index's "
                f"({', '.join(map(str, sizes))}). Codes (:int8) of any size up to {sizes[-1]} may "
                f"come before the last stage."
            )


def parts(plan: Plan) -> set[str]:
    """Return the names of what a plan reads beside full vectors, as a generation has them."""
    first, *rest = plan.cascade.stages
    found = set() if plan.structure == "exact" else {plan.structure}
    if plan.structure == "lists":
        found.add(f"listed-{first.dim}")
        rest = [stage for stage in rest if stage.dim > first.dim]
    elif plan.structure not in PEERS:
        rest = [first, *rest]
    found |= {f"codes-{stage.dim}" for stage in rest if stage.precision in _CODED}
    last = plan.cascade.stages[-1]
    return found | ({f"rests-{last.dim}"} if last.precision == "int10" else set())


def _check_peer(plan: Plan, full: int) -> None:
    """Raise `PlanError` unless the first stage is what an index of faiss does."""
    first, *rest = plan.cascade.stages
    own = peers.KINDS[plan.structure].precision
    last = plan.cascade.stages[-1]
    if (first.dim, first.precision) != (full, own) or (own != "float32" and not rest):
        fits = [Stage(full, first.keep, own)]
        if own != "float32":
            fits.append(Stage(full, last.keep))
        raise PlanError(
            f"plan {plan}: {plan.structure} searches vectors of {full} numbers, {own}"
            f"{', and full vectors order what it finds' if own != 'float32' else ''}. "
            f"Write {Plan(Cascade(fits), plan.structure, plan.knobs)}."
        )


def run(
    plan: Plan, queries: Queries, view: View, mask: Mask, *, threads: int | None = None
) -> Found:
    """Run ``plan`` for queries (m, full dim) over the rows of ``mask``; raises `PlanError`."""
    last = plan.cascade.stages[-1]
    for stage in plan.cascade.stages:
        if stage.dim < queries.shape[1] and (stage is last or stage.precision == "float32"):
            # or say which of them has no direction
            normalise(np.ascontiguousarray(queries[:, : stage.dim]), name="queries")
    if mask.n_derived == 0:
        check(plan, view.generation)
        rows, scores = (
            np.empty((len(queries), 0), np.int64),
            np.empty((len(queries), 0), np.float32),
        )
        said = [{"stage": str(one), "rows_scored": 0, "ms": 0.0} for one in plan.cascade.stages]
        shortlists, stages = (rows,) * len(said), said
    else:
        work = _prepared(plan, view, mask)
        if len(queries) < 2 * _LEAST_PER_THREAD:
            rows, scores, shortlists, stages = work(queries, mask)
        else:
            parts = _in_threads(lambda some: work(some, mask), queries, threads)
            rows, scores, shortlists, stages = parts[0] if len(parts) == 1 else _joined(parts)
    if view.n_fresh:
        said = stages[-1]
        n_scored = said["rows_scored"] + int(np.count_nonzero(mask.fresh))
        stages = (*stages[:-1], {**said, "rows_scored": n_scored})
    if view.n_fresh or rows.shape[1] < last.keep:
        rows, scores = _with_fresh(rows, scores, queries, view, mask, last)
    elif rows.dtype != np.int64:
        rows = rows.astype(np.int64)
    # Missing ones come last; one query asks in a tenth of the time.
    if len(rows) and rows.shape[1] and (rows[-1, -1] < 0 or (len(rows) > 1 and rows.min() < 0)):
        scores[rows < 0] = np.nan
    return Found(rows, scores, tuple(shortlists), tuple(stages))


def _prepared(plan: Plan, view: View, mask: Mask) -> Callable[..., Any]:
    """Return what runs a plan; it is kept, because a query takes less time than to make it."""
    generation = view.generation
    if mask is not view.everyone and mask.n_derived <= _FEW:
        check(plan, generation)
        return _Few(plan, generation, mask)
    found = view.prepared.get(plan)
    if found is None:
        check(plan, generation)
        if len(view.prepared) >= _PLANS_KEPT:
            view.prepared.clear()
        made = _Decoded if plan.cascade.stages[-1].precision in _CODED else Runner
        found = view.prepared[plan] = made(plan, generation)
    return found


def _in_threads(work: Callable[[Queries], Any], queries: Queries, threads: int | None) -> list[Any]:
    n_threads = len(queries) // _LEAST_PER_THREAD
    if n_threads > 1:
        n_threads = min(n_threads, _n_cores() if threads is None else threads)
    if n_threads <= 1:
        return [work(queries)]
    with ThreadPoolExecutor(n_threads) as pool:
        return list(pool.map(work, np.array_split(queries, n_threads)))


def _n_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _joined(parts: list[Any]) -> tuple[Any, ...]:
    rows, scores = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    shortlists = [np.concatenate(lists) for lists in zip(*(p[2] for p in parts), strict=True)]
    stages = [
        {**said[0], "ms": sum(one["ms"] for one in said)}
        for said in zip(*(p[3] for p in parts), strict=True)
    ]
    return rows, scores, shortlists, stages


def _with_fresh(
    rows: Rows,
    scores: NDArray[np.float32],
    queries: Queries,
    view: View,
    mask: Mask,
    last: Stage,
) -> tuple[Rows, NDArray[np.float32]]:
    """Put fresh rows in their places, and `NOTHING` where rows are missing."""
    fresh, fresh_scores = view.search_fresh(normalise(queries[:, : last.dim]), mask, last.keep)
    missing = max(0, last.keep - rows.shape[1] - fresh.shape[1])
    filler = np.full((len(rows), missing), kernels.NOTHING)
    rows = np.concatenate([rows.astype(np.int64), fresh, filler], axis=1)
    unscored = np.full(filler.shape, -np.inf, np.float32)
    scores = np.concatenate([scores, fresh_scores, unscored], axis=1)
    scores[rows < 0] = -np.inf
    order = np.lexsort((rows, -scores), axis=1)[:, : last.keep]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)


class Runner:
    """A plan as a function of queries and a mask; threads may call it together."""

    def __init__(self, plan: Plan, generation: Generation) -> None:
        self.plan, self.generation = plan, generation
        self.first, *self.rest = plan.cascade.stages
        knobs = {**KNOWN[plan.structure], **plan.knobs}
        self.knobs = {name: int(value) for name, value in knobs.items()}
        for stage in self.rest:  # loaded, or made, before threads start
            if stage.precision == "int8":
                generation.codes(stage.dim)
        self.fused = Fused(plan, self.knobs, generation) if Fused.fits(plan, generation) else None
        if plan.structure == "graph":
            self.graph, self.codes = generation.graph(), generation.codes(self.first.dim)
        elif plan.structure == "lists":
            self.lists, self.codes = generation.lists(), generation.listed(self.first.dim)
        elif plan.structure in PEERS:
            self.peer = generation.peer(plan.structure)
        elif self.first.precision == "int8":
            self.codes = generation.codes(self.first.dim)

    def __call__(self, queries: Queries, mask: Mask) -> Any:
        """Return rows (m, keep), their scores, each stage's shortlists, and what each did."""
        if self.fused is not None and not len(mask.derived):
            return self.fused(queries)
        started = time.perf_counter()
        rows, scores, n_scored = self._first(queries, mask)
        said = [_said(self.first, n_scored, started)]
        shortlists = [rows]
        for stage in self.rest:
            started = time.perf_counter()
            n_scored = rows.shape[1]
            rows, scores = rescored(self.generation, stage, queries, rows)
            shortlists.append(rows)
            said.append(_said(stage, n_scored, started))
        return rows, scores, shortlists, said

    def _first(self, queries: Queries, mask: Mask) -> tuple[Rows, NDArray[np.float32], int]:
        n, alive = len(self.generation), mask.derived
        keep = min(self.first.keep, mask.n_derived)
        share = mask.n_derived / n
        if self.plan.structure == "graph":
            # Rows that may not be found still lead the way, so the list is as much longer.
            ef = min(n, math.ceil(max(self.knobs["ef"], keep) / share))
            if share == 1 or mask.n_derived > _MET * ef:
                rows = self.graph.search(self.codes, self.codes.queries(queries), ef)
                return _only(rows, alive, keep), _NO_SCORES, ef
        elif self.plan.structure == "lists":
            # Those that may be found lie farther away.
            probes = min(self.lists.n_lists, math.ceil(self.knobs["probes"] / share))
            rows = self.lists.search(self.codes, queries, keep, probes, alive)
            return rows, _NO_SCORES, round(n * probes / self.lists.n_lists)
        elif self.plan.structure in PEERS:
            knob = math.ceil(next(iter(self.knobs.values())) / share)
            rows = self.peer.search(normalise(queries), keep, knob, alive)
            if self.first.precision == "float32":  # it answers: as every answer, by checked rows
                rows, scores = self.generation.mirror.rerank(queries, rows, keep)
                return rows, scores, self.peer.n_scored(knob)
            return rows, _NO_SCORES, self.peer.n_scored(knob)
        elif self.first.precision == "float32":
            return *_brute_force(self.generation, self.first, queries, mask), mask.n_derived
        return _scanned(self.codes, queries, alive, keep), _NO_SCORES, mask.n_derived


class _Decoded:
    """A plan whose last stage is codes: full vectors are not read, nor kept in memory.

    Answers are scored by the query as it is with what the codes stand for. A plan of that stage
    alone chooses from a few times as many, found by rounded queries.
    """

    def __init__(self, plan: Plan, generation: Generation) -> None:
        *before, self.last = plan.cascade.stages
        stages = before or [Stage(self.last.dim, _SPARE * self.last.keep, "int8")]
        self.alone = not before
        self.shortlist = Runner(Plan(Cascade(stages), plan.structure, plan.knobs), generation)
        self.score = _scorer(plan, generation)

    def __call__(self, queries: Queries, mask: Mask) -> Any:
        _, _, shortlists, said = self.shortlist(queries, mask)
        started = time.perf_counter()
        n_scored = shortlists[-1].shape[1]
        rows, scores = self.score(queries, shortlists[-1], min(self.last.keep, n_scored))
        own = _said(self.last, n_scored, started)
        if self.alone:
            own = {**own, "rows_scored": said[0]["rows_scored"], "ms": said[0]["ms"] + own["ms"]}
            shortlists, said = [], []
        return rows, scores, [*shortlists, rows], [*said, own]


def _scorer(plan: Plan, generation: Generation) -> Callable[..., Any]:
    """Return what scores shortlists as the last stage of a plan does."""
    first, last = plan.cascade.stages[0], plan.cascade.stages[-1]
    if last.precision == "float32":
        return lambda queries, short, keep: generation.mirror.rerank(
            np.ascontiguousarray(queries[:, : last.dim]), short, keep
        )
    if plan.structure == "lists" and first.dim == last.dim:  # held already, in another order
        codes, places = generation.listed(last.dim), generation.lists().places
    else:
        codes, places = generation.codes(last.dim), None
    rests = generation.rests(last.dim) if last.precision == "int10" else None
    return lambda queries, short, keep: codes.rescored(queries, short, keep, places, rests)


class _Few:
    """Few rows may be found: each is scored as the last stage does."""

    def __init__(self, plan: Plan, generation: Generation, mask: Mask) -> None:
        self.last, self.score = plan.cascade.stages[-1], _scorer(plan, generation)
        self.rows = np.flatnonzero(mask.derived).astype(np.int32)

    def __call__(self, queries: Queries, mask: Mask) -> Any:
        started = time.perf_counter()
        shortlists = np.tile(self.rows, (len(queries), 1))
        rows, scores = self.score(queries, shortlists, min(self.last.keep, len(self.rows)))
        return rows, scores, [rows], [_said(self.last, len(self.rows), started)]


_NO_SCORES = np.empty(0, np.float32)


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
        asked = np.ascontiguousarray(queries[:, : stage.dim])
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
    if len(queries) <= _AT_SIGHT:
        alive = np.flatnonzero(mask.derived) if len(mask.derived) else np.arange(len(generation))
        every = np.tile(alive.astype(np.int32), (len(queries), 1))
        return rescored(generation, stage, queries, every)
    asked = normalise(np.ascontiguousarray(queries[:, : stage.dim]))
    best: list[tuple[NDArray[Any], NDArray[np.float32]]] = []
    for start, block in generation.mirror.blocks(stage.dim):
        end = start + len(block)
        found = np.flatnonzero(mask.derived[start:end]) if len(mask.derived) else None
        if found is not None:
            block = block[found]
        if not len(block):
            continue
        rows, scores = top_k(asked, block, stage.keep)
        best.append(((rows if found is None else found[rows]) + start, scores))
        if len(best) > 1:
            rows, scores = (np.concatenate(part, axis=1) for part in zip(*best, strict=True))
            order = np.lexsort((rows, -scores), axis=1)[:, : stage.keep]
            best = [tuple(np.take_along_axis(part, order, axis=1) for part in (rows, scores))]  # type: ignore[list-item]
    return best[0][0].astype(np.int32), best[0][1]
