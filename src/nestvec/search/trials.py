"""Queries whose true neighbours are known, and what structures and plans do on them.

Here is measured, in `planner` decided. What was measured once is kept, and subsets share it: a
benchmark draws many samples from one pool without a second walk over the graph.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec._progress import progress
from nestvec.errors import DataError
from nestvec.search import engine
from nestvec.search.cascade import Cascade, Plan, Stage
from nestvec.search.view import View

Queries = NDArray[np.float32]
Labels = Sequence[Mapping[str, int]]  #: for each query, document id -> grade, > 0 is relevant

_FAR = np.iinfo(np.int32).max  # the place of what is not in a shortlist
_ROWS = 2000  # of the gallery, in place of queries
_BLOCK = 1000  # queries that a thread takes at once
_ROUGHLY = 40, 2  # queries that a plan is timed by, and turns: to tell which plans are worth more
_WELL = 200, 3
_LONG_ENOUGH = 500  # milliseconds a turn: plans so slow are timed by fewer queries


@dataclass(frozen=True, eq=False)
class Walk:
    """What a structure finds before rows are reranked.

    ``places`` (m, k): where each true neighbour stands in the shortlist of ``longest`` rows, from
    0; far beyond if it is not there.
    """

    places: NDArray[np.int32]
    longest: int


class Trials:
    """Queries (m, dim) with their true rows (m, k), nearest first.

    Parameters
    ----------
    own : (m,)
        The row each query is itself, which is not to be found; -1 for none.
    labels
        Relevant documents of each query, where they are known.
    clock
        Seconds, like `time.process_time` where a busy neighbour must not be measured.
    """

    def __init__(
        self,
        view: View,
        queries: Queries,
        own: NDArray[np.int64],
        truth: NDArray[np.int64],
        *,
        labels: Labels | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.view, self.labels = view, labels
        self.k, self.full = truth.shape[1], view.snapshot.layout.space.size
        #: 1 where a row of the gallery finds itself, so that it is asked for one more.
        self.spare = int((own >= 0).any())
        self._queries, self._own, self._truth, self._clock = queries, own, truth, clock
        self._some: NDArray[np.int64] = np.arange(len(queries))
        # shared with subsets
        self._walks: dict[Plan, Walk] = {}
        self._answers: dict[Plan, dict[str, NDArray[np.float64]]] = {}
        self._about: dict[Plan, float] = {}
        self._ms: dict[Plan, float] = {}

    def __len__(self) -> int:
        return len(self._some)

    def halves(self) -> tuple[Trials, Trials]:
        """Return two halves that share nothing: what is measured of one is not run on the other."""
        half = len(self) // 2
        first, second = (self._apart(self._some[part]) for part in (slice(half), slice(half, None)))
        return first, second

    def _apart(self, rows: NDArray[np.int64]) -> Trials:
        return Trials(
            self.view,
            self._queries[rows],
            self._own[rows],
            self._truth[rows],
            labels=None if self.labels is None else [self.labels[row] for row in rows],
            clock=self._clock,
        )

    def subset(self, rows: NDArray[Any]) -> Trials:
        """Return some of the queries; what is measured for them is measured for all, and kept."""
        some = copy.copy(self)
        some._some = self._some[rows]
        return some

    def walk(self, plan: Plan, longest: int) -> Walk:
        """Return what the first pass of a plan does, were it to keep ``longest`` rows."""
        known = _walk_of(plan)
        walk = self._walks.get(known)
        if walk is None or walk.longest < longest:
            walk = self._walks[known] = self._walked(known, longest)
        return Walk(walk.places[self._some], walk.longest)

    def recall(self, plan: Plan) -> NDArray[np.float64]:
        """Return the recall of each query, in [0, 1]: one number a query, as the bound needs it."""
        walk = self._walks.get(_walk_of(plan))
        first, *rest = plan.cascade.stages
        if walk and rest == [Stage(self.full, self.k)] and first.keep <= walk.longest:
            return (walk.places[self._some] < first.keep).mean(axis=1)  # it need not be run
        return self._answered(plan)["recall"][self._some]

    def ndcg(self, plan: Plan) -> NDArray[np.float64]:
        """Return the nDCG@k of each query by its labels."""
        return self._answered(plan)["ndcg"][self._some]

    def ms(self, plan: Plan) -> float:
        """Return about how many milliseconds a plan takes, from few queries: see `times`."""
        if plan not in self._about:
            self._about[plan] = self._timed([plan], *_ROUGHLY)[0]
        return self._about[plan]

    def times(self, plans: Sequence[Plan]) -> list[float]:
        """Return milliseconds a query of each whole plan: one query a call, on one thread.

        The plans take turns, so that what else the machine does meets them all alike.
        """
        new = [plan for plan in dict.fromkeys(plans) if plan not in self._ms]
        self._ms.update(zip(new, self._timed(new, *_WELL), strict=True))
        return [self._ms[plan] for plan in plans]

    def _timed(self, plans: Sequence[Plan], n: int, n_turns: int) -> list[float]:
        """Return the mean over ``n`` queries of the least time that each of them took."""
        asked = [self._queries[row : row + 1] for row in range(min(n, len(self._queries)))]
        view, everyone, clock = self.view, self.view.everyone, self._clock
        least = np.full((len(plans), len(asked)), np.inf)
        for _ in range(n_turns):
            for plan, known in zip(plans, least, strict=True):
                engine.run(plan, asked[-1], view, everyone, threads=1)  # loads, and warms up
                spent = 0.0
                for at, query in enumerate(asked):
                    started = clock()
                    engine.run(plan, query, view, everyone, threads=1)
                    took = 1000 * (clock() - started)
                    known[at] = min(known[at], took)
                    spent += took
                    if spent > _LONG_ENOUGH and at > 0:
                        break
        return [float(known[np.isfinite(known)].mean()) for known in least]

    def _walked(self, plan: Plan, longest: int) -> Walk:
        (stage,) = plan.cascade.stages
        longer = Stage(stage.dim, longest + self.spare, stage.precision)
        run = engine.Runner(
            Plan(Cascade([longer]), plan.structure, plan.knobs), self.view.generation
        )
        everyone = self.view.everyone
        places = [self._places(run(self._queries[:_BLOCK], everyone)[0], 0)]
        starts = range(_BLOCK, len(self._queries), _BLOCK)
        if starts:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                places += pool.map(
                    lambda at: self._places(run(self._queries[at : at + _BLOCK], everyone)[0], at),
                    starts,
                )
        return Walk(np.concatenate(places), longest)

    def _places(self, shortlists: NDArray[Any], start: int) -> NDArray[np.int32]:
        some = slice(start, start + len(shortlists))
        truth = self._truth[some]
        places = np.stack([_place(shortlists, column) for column in truth.T], axis=1)
        if self.spare:  # those behind the query itself move up
            places -= _place(shortlists, self._own[some])[:, None] < places
        # Fresh rows are always found: they are scored beside every structure.
        places[truth >= len(self.view.generation)] = -1
        return places

    def _answered(self, plan: Plan) -> dict[str, NDArray[np.float64]]:
        found = self._answers.get(plan)
        if found is None:
            rows = self._rows(plan)
            hits = [np.isin(a, b).mean() for a, b in zip(self._truth, rows, strict=True)]
            found = {"recall": np.array(hits)}
            if self.labels is not None:
                found["ndcg"] = _ndcg(self.view.ids(rows), self.labels)
            self._answers[plan] = found
        return found

    def _rows(self, plan: Plan) -> NDArray[np.int64]:
        if self.spare:  # a row of the gallery finds itself, and one more
            stages = [Stage(s.dim, s.keep + 1, s.precision) for s in plan.cascade.stages]
            plan = Plan(Cascade(stages), plan.structure, plan.knobs)
        found = engine.run(plan, self._queries, self.view, self.view.everyone).rows
        return _without(found, self._own, self.k)


def draw(
    view: View,
    queries: Queries | None,
    *,
    k: int,
    n: int | None,
    seed: int,
    labels: Labels | None = None,
    show_progress: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Trials:
    """Put ``n`` queries in random order, or rows of the gallery, and find their true neighbours.

    None for all queries, or for as many rows as usually do.

    Raises
    ------
    DataError
        If the gallery has too few rows to plan for.
    """
    rng = np.random.default_rng(seed)
    if view.everyone.n_derived <= k + 1:
        raise DataError(
            f"{view.everyone.n_derived} rows are too few to plan for: all of them are an answer "
            f"({view.n_fresh} more were written since; compact() takes them in)."
        )
    if queries is None:
        alive = view.everyone.derived
        rows = np.flatnonzero(alive) if len(alive) else np.arange(len(view.generation))
        own = np.sort(rng.choice(rows, min(n or _ROWS, len(rows)), replace=False))
        asked = view.generation.mirror.unit(own)
        order = rng.permutation(len(own))
        asked, own = asked[order], own[order]
    else:
        chosen = rng.permutation(len(queries))[:n]
        asked, own = queries[chosen], np.full(len(chosen), -1)
        labels = None if labels is None else [labels[row] for row in chosen]
    exact = Plan(Cascade([Stage(view.snapshot.layout.space.size, k + 1)]))
    found = []
    with progress("true neighbours", len(asked), show=show_progress, unit="queries") as advance:
        for start in range(0, len(asked), 256):
            some = asked[start : start + 256]
            found.append(engine.run(exact, some, view, view.everyone).rows)
            advance(len(some))
    truth = _without(np.concatenate(found), own, k)
    return Trials(view, asked, own, truth, labels=labels, clock=clock)


def _walk_of(plan: Plan) -> Plan:
    """Return the first pass of a plan, by which its walk is known."""
    first = plan.cascade.stages[0]
    return Plan(Cascade([Stage(first.dim, 1, first.precision)]), plan.structure, plan.knobs)


def _place(shortlists: NDArray[Any], rows: NDArray[Any]) -> NDArray[np.int32]:
    """Return where one row stands in each shortlist, (m,)."""
    there = shortlists == rows[:, None]
    return np.where(there.any(axis=1), there.argmax(axis=1), _FAR).astype(np.int32)


def _without(rows: NDArray[Any], own: NDArray[np.int64], k: int) -> NDArray[Any]:
    """Return the first ``k`` rows of each line that are not its own."""
    order = np.argsort(rows == own[:, None], axis=1, kind="stable")[:, :k]
    return np.take_along_axis(rows, order, axis=1)


def _ndcg(ids: NDArray[Any], labels: Labels) -> NDArray[np.float64]:
    from nestvec.measurement.metrics import per_query

    names = [str(row) for row in range(len(ids))]
    name = f"nDCG@{ids.shape[1]}"
    rankings = [[str(one) for one in line] for line in ids.tolist()]
    return per_query(rankings, names, dict(zip(names, labels, strict=True)), [name])[name]
