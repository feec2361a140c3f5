"""Hits: what a search of an index found, and how each stage came to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec.search import engine
from nestvec.search.cascade import Plan
from nestvec.search.view import View


@dataclass(frozen=True, eq=False)
class Hits:
    """What a search found.

    Attributes
    ----------
    ids : (n_queries, k)
        Best first, equal scores by the row that was stored first. Scores are right to the rounding
        of float32: which of two rows that are closer than that (some 1e-7) comes first may depend
        on the size of the batch, and on whether one was written since. Where fewer than k rows
        could be found the rest is -1, or an empty text, with a NaN score.
    scores : (n_queries, k) float32
        Cosine at the last stage's size; if that stage is of codes (``:int8``), with what they
        stand for, which is off by some thousandths. Rows written since are always scored by their
        full vectors.
    plan
        What was run.
    version
        The version of the index that was searched.
    payload : list of pyarrow.Table, or None
        For each query the columns asked for, in the order of the ids.
    """

    ids: NDArray[Any]
    scores: NDArray[np.float32]
    plan: Plan
    version: int
    payload: list[Any] | None
    _found: engine.Found

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        n, k = self.ids.shape
        return f"Hits({n} x {k}, {self.plan}, version {self.version})"

    def __iter__(self) -> Iterator[list[tuple[Any, float]]]:
        """Yield for each query its (id, score) pairs."""
        for ids, scores in zip(self.ids, self.scores, strict=True):
            real = ~np.isnan(scores)
            yield list(zip(ids[real].tolist(), scores[real].tolist(), strict=True))

    def explain(self, query: int = 0) -> dict[str, Any]:
        """Say what each stage did, and for one query where each answer stood after it.

        ``stages``: the stage, rows scored a query, milliseconds of the whole batch. ``answers``:
        id, score, and its place (1 is first) after each stage; a row written since structures were
        built has the place ``"fresh"``: it is scored exactly, beside them. During an upgrade a row
        has places on its side only, that of old vectors or of new ones.
        """
        stages = [dict(stage) for stage in self._found.stages]
        one_side = not stages or not stages[-1]["stage"].startswith("new ")
        answers = []
        for row, id_, score in zip(
            self._found.rows[query], self.ids[query], self.scores[query], strict=True
        ):
            if row < 0:
                continue
            place: dict[str, int | str] = {}
            for stage, short in zip(stages, self._found.shortlists, strict=True):
                at = np.flatnonzero(short[query] == row)
                if len(at):
                    place[stage["stage"]] = int(at[0]) + 1
                elif one_side:
                    place[stage["stage"]] = "fresh"
            answers.append({"id": id_.item(), "score": float(score), "place": place})
        return {"plan": str(self.plan), "stages": stages, "answers": answers}


def with_payload(hits: Hits, view: View, columns: list[str]) -> Hits:
    """Return the hits with columns of the payload, one table a query."""
    rows = hits._found.rows
    flat = view.row_ids(rows[rows >= 0])
    unique, back = np.unique(flat, return_inverse=True)
    table = view.snapshot.read(unique, columns).take(back)
    ends = np.cumsum((rows >= 0).sum(axis=1))
    tables = [table.slice(end - n, n) for end, n in zip(ends, (rows >= 0).sum(axis=1), strict=True)]
    return replace(hits, payload=tables)
