"""The commonest plans in one call of a kernel: codes make the shortlist, full vectors order it.

What these find is what the stages find one by one (`engine`), bit by bit. A query takes some tens
of microseconds, of which the way in and out of each kernel would be a good part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec.search import kernels
from nestvec.search.cascade import Plan
from nestvec.search.generation import Generation


class Fused:
    """A plan over rows that are all alive, as a function of queries; threads may share it."""

    def __init__(self, plan: Plan, knobs: Mapping[str, int], generation: Generation) -> None:
        first, last = plan.cascade.stages
        n, self.mirror = len(generation), generation.mirror
        self.kept, self.answers = min(first.keep, n), min(last.keep, first.keep, n)
        self.stages = str(first), str(last)
        if plan.structure == "graph":
            self.graph, codes = generation.graph(), generation.codes(first.dim)
            self.width = n_scored = min(n, max(knobs["ef"], self.kept))
            structure = self.graph.arrays
        else:
            self.graph, codes = None, generation.listed(first.dim)
            found = generation.lists()
            self.probes, self.width = min(found.n_lists, knobs["probes"]), self.kept
            n_scored = round(n * self.probes / found.n_lists)
            structure = (found.means.values, found.means.scale, found.starts, found.numbers)
        self.n_scored = n_scored, self.kept
        self.read = (*structure, codes.values, codes.scale, *self.mirror.words(last.dim))

    @staticmethod
    def fits(plan: Plan, generation: Generation) -> bool:
        """Tell whether a plan is of that kind."""
        last = plan.cascade.stages[-1]
        return (
            plan.structure in ("graph", "lists")
            and len(plan.cascade.stages) == 2
            and (last.dim, last.precision) == (generation.mirror.sizes[-1], "float32")
        )

    def __call__(self, queries: NDArray[np.float32]) -> Any:
        """Return what `engine.Runner` does."""
        m = len(queries)
        short = np.empty((m, self.width), np.int32)
        scores = np.empty((m, self.answers), np.float32)
        rows = np.empty((m, self.answers), np.int64)
        times = np.empty(3, np.int64)
        if self.graph is not None:
            scratch = self.graph.borrow()
            wrong = kernels.walk_and_rerank(
                *self.read, *scratch, queries, short, scores, rows, self.kept, times
            )
            self.graph.give_back(scratch)
            short = short[:, : self.kept]
        else:
            wrong = kernels.scan_lists_and_rerank(
                *self.read, queries, short, scores, rows, self.probes, times
            )
        if wrong != kernels.NOTHING:
            raise self.mirror.damaged(int(wrong))
        started, between, ended = times.tolist()
        (first, last), (met, kept) = self.stages, self.n_scored
        said = (
            {"stage": first, "rows_scored": met, "ms": (between - started) / 1e6},
            {"stage": last, "rows_scored": kept, "ms": (ended - between) / 1e6},
        )
        return rows, scores, (short, rows), said
