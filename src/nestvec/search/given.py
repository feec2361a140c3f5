"""What a user hands to an index, read once: rows, payload, ids, judgements, plans."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nestvec._extras import require
from nestvec.errors import DataError, PlanError, SpaceMismatchError
from nestvec.search.cascade import Cascade, Plan, Stage
from nestvec.search.planner import Planned
from nestvec.search.store import Batch, durable
from nestvec.search.store.incoming import batches_of
from nestvec.space import Embeddings, Space

pa = require("pyarrow", extra="index", why="an index")


def opening(rows: Any, payload: Any) -> tuple[Space, Batch | None, Any]:
    """Return the Space, the first rows if any, and the schema of the payload."""
    if isinstance(rows, Space):
        return rows, None, _schema(payload)
    batch = rows if isinstance(rows, Batch) else Batch(rows)
    vectors = batch.vectors
    if not isinstance(vectors, Embeddings):
        raise DataError(
            "an index begins with Embeddings or a Space, so that vectors of another model are "
            "refused later: nestvec.Embeddings(array, space), or nestvec.encode(texts, model=...)."
        )
    ids = batch.ids if batch.ids is not None else vectors.ids
    if ids is None:
        ids = np.arange(len(vectors.array))
    table = batch.payload if payload is None else payload
    schema = _schema(table)
    columns = table if schema is not table else batch.payload
    bare = Embeddings(vectors.array, vectors.space)
    return vectors.space, Batch(bare, ids, columns), schema


def _schema(payload: Any) -> Any:
    if isinstance(payload, Mapping):
        try:
            payload = pa.table(dict(payload))
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise DataError(
                f"payload: {durable.reason(error)}. Give one value a row in each column, all of "
                f"one type."
            ) from error
    return payload.schema if hasattr(payload, "schema") else payload


def names_of(columns: str | Iterable[str]) -> list[str]:
    """Return names of columns as a list, one alone too."""
    return [columns] if isinstance(columns, str) else list(columns)


def only_stamped(rows: Any, path: Path, left: Space) -> Iterator[Batch | Embeddings]:
    """Yield rows, and refuse vectors that do not say of which Space they are."""
    for batch in batches_of(rows):
        if not isinstance(getattr(batch, "vectors", batch), Embeddings):
            raise SpaceMismatchError(
                f"{path} was upgraded while it was open here, and these vectors carry no stamp, so "
                f"they may be of {left.label}. Give Embeddings, or open the index again."
            )
        yield batch


def check_space(space: Space, given: Space, path: Path) -> None:
    """Raise `SpaceMismatchError` for another Space; of another model it names the way out."""
    try:
        space.check_same(given)
    except SpaceMismatchError as error:
        if space.fingerprint == given.fingerprint:
            raise
        raise SpaceMismatchError(
            f"{error} Or let the new model's queries search this index, as it is, through a "
            f"bridge: nestvec upgrade start {path}."
        ) from None


def is_whole(ids: Any) -> bool:
    """Tell whether ids are whole numbers."""
    return np.asarray(ids).dtype.kind in "iu"


def batches_given(rows: Any, ids: Any, payload: Any) -> Any:
    """Return rows with the ids and the payload that were given beside them."""
    if ids is None and payload is None and not isinstance(rows, np.ndarray):
        return rows
    if isinstance(rows, Batch):
        return replace(
            rows,
            ids=rows.ids if ids is None else ids,
            payload=rows.payload if payload is None else payload,
        )
    return Batch(rows, ids, payload)


def judged(queries: Any, qrels: Mapping[str, Mapping[str, int]]) -> tuple[Embeddings, list[Any]]:
    """Return the queries that have a relevant document, and the grades of each."""
    if not isinstance(queries, Embeddings) or queries.ids is None:
        raise DataError("qrels name queries by their ids: give the queries as Embeddings with ids.")
    labels = [qrels.get(str(one), {}) for one in queries.ids.tolist()]
    rows = [row for row, grades in enumerate(labels) if any(g > 0 for g in grades.values())]
    if not rows:
        raise DataError(
            f"qrels name no relevant document for any of the {len(queries):,} queries. Their ids "
            f"begin with {str(queries.ids[0])!r}, those of the qrels with "
            f"{next(iter(qrels), None)!r}."
        )
    return queries[np.array(rows)], [labels[row] for row in rows]


def plan_given(plan: Plan | Cascade | Planned | str) -> Plan:
    """Return a plan from whatever says one."""
    if isinstance(plan, str):
        return _parsed(plan)
    if isinstance(plan, Planned):
        if plan.plan is None:
            raise PlanError(f"nothing was planned: {plan.sentence}")
        return plan.plan
    return plan if isinstance(plan, Plan) else Plan(plan)


_parsed = functools.lru_cache(64)(Plan.parse)


def known_structures(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return names of structures, or raise `PlanError` for one that is not known."""
    names = list(names)
    for name in names:
        if name not in known:
            raise PlanError(f"there is no structure {name!r}; there are {', '.join(known)}.")
    return names


@functools.lru_cache(64, typed=True)
def returning(plan: Plan, k: int) -> Plan:
    """Return the plan with ``k`` rows at its end; a shortlist is never shorter than that."""
    *before, last = plan.cascade.stages
    stages = [Stage(s.dim, max(s.keep, k), s.precision) for s in before]
    return Plan(Cascade([*stages, Stage(last.dim, k, last.precision)]), plan.structure, plan.knobs)
