"""Run a plan exactly over embeddings in memory, and count what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nestvec._checks import as_matrix
from nestvec._progress import progress
from nestvec.errors import DimensionError, PlanError
from nestvec.search.cascade import Cascade, Plan, Stage
from nestvec.search.exact import rerank, stage_gallery, stage_queries, top_k
from nestvec.space import Embeddings, Space


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found and what it cost.

    Attributes
    ----------
    rows : (n_queries, k) int64
        Gallery rows, best first, equal scores by the lower row.
    ids : (n_queries, k)
        The gallery's ids of those rows.
    scores : (n_queries, k) float32
        Score at the last stage's size and precision; cosine in [-1, 1] for normalised vectors.
    plan
        What was run.
    macs_per_query, bytes_per_query
        Multiply-adds, and bytes of gallery vectors read, per query; `Cascade.macs` defines them.
    shortlists : tuple of (n_queries, keep_i) int64
        Rows that each stage passed on, the last one being ``rows``.
    """

    rows: NDArray[np.int64]
    ids: NDArray[Any]
    scores: NDArray[np.float32]
    plan: Plan
    macs_per_query: int
    bytes_per_query: int
    shortlists: tuple[NDArray[np.int64], ...]

    def explain(self, query: int = 0) -> list[dict[str, Any]]:
        """Say for one query where each answer stood (1 = first) after every stage."""
        found = []
        for row, id_, score in zip(
            self.rows[query], self.ids[query], self.scores[query], strict=True
        ):
            places = {
                str(stage): int(np.flatnonzero(short[query] == row)[0]) + 1
                for stage, short in zip(self.plan.cascade.stages, self.shortlists, strict=True)
            }
            found.append({"id": id_.item(), "score": float(score), "place": places})
        return found


def cascade_search(
    queries: Embeddings | ArrayLike,
    gallery: Embeddings | ArrayLike,
    plan: Plan | Cascade | str | None = None,
    *,
    k: int = 10,
    allow_untrained: bool = False,
    show_progress: bool = False,
) -> SearchResult:
    """Run a plan exactly: every row is scored in the first stage, no structure is built.

    Parameters
    ----------
    queries, gallery : (n_queries, dim), (n_gallery, dim)
        Embeddings of one Space, or plain arrays, which are compared by cosine.
    plan
        A `Plan`, a `Cascade` or its text, like ``"64:int8@400 > 384@10"``; None is one exact pass
        over full vectors.
    k
        Number of rows to return when no plan is given; a plan's last stage says it itself.
    allow_untrained
        Accept stages at sizes that are not nesting dims of the Space; plain arrays have none.

    Returns
    -------
    SearchResult
        A stage that keeps more rows than the gallery has keeps them all.

    Raises
    ------
    SpaceMismatchError
        If queries and gallery live in two spaces.
    DimensionError
        If a stage asks for a size that does not exist here.
    PlanError
        If the plan's structure is not ``exact``.

    Notes
    -----
    Exact within each stage, so a row lost from a shortlist is lost for good: compare with one
    exact full pass to see how often. Prefixes are L2-normalised after the cut. Int8 codes have a
    scale per dimension, taken from the gallery.

    References
    ----------
    Kusupati et al., Matryoshka Representation Learning, NeurIPS 2022, arXiv:2205.13147 (adaptive
    and funnel retrieval).

    Examples
    --------
    >>> gallery = np.array([[1, 0, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1.0]])
    >>> found = cascade_search(gallery[1:2], gallery, "2@2 > 4@1")
    >>> found.rows, found.macs_per_query  # 3 rows * 2 dims + 2 rows * 4 dims
    (array([[1]]), 14)
    """
    if not isinstance(gallery, Embeddings):
        allow_untrained = True  # a plain array says nothing about nesting; its owner decides
    gallery = _embeddings(gallery, "gallery")
    queries = _embeddings(queries, "queries", like=gallery.space)
    gallery.space.check_same(queries.space)
    plan = as_plan(plan, dim=gallery.dim, k=k)
    if plan.structure != "exact":
        raise PlanError(
            f"plan {plan!s}: arrays in memory are searched by structure 'exact' only. "
            f"Write 'exact {plan.cascade!s}'."
        )
    if plan.knobs:
        raise PlanError(f"plan {plan!s}: structure 'exact' has no knobs. Leave them out.")
    for stage in plan.cascade.stages:
        gallery.space.check_prefix(stage.dim, allow_untrained=allow_untrained)
    unit = gallery.space.metric == "cosine" or gallery.space.has_unit_rows
    if not unit and any(stage.dim < gallery.dim for stage in plan.cascade.stages):
        raise DimensionError(
            f"{gallery.space.label} is compared by dot product of unnormalised vectors, whose "
            f"prefixes are not comparable. Call normalised() on both sides first."
        )
    shortlists = _run(queries.array, gallery.array, plan.cascade, unit, show_progress)
    rows, scores = shortlists[-1]
    return SearchResult(
        rows=rows,
        ids=gallery.ids[rows],
        scores=scores,
        plan=plan,
        macs_per_query=plan.cascade.macs(len(gallery)),
        bytes_per_query=plan.cascade.bytes_read(len(gallery)),
        shortlists=tuple(rows for rows, _ in shortlists),
    )


def adaptive_retrieval(
    queries: Embeddings | ArrayLike,
    gallery: Embeddings | ArrayLike,
    *,
    shortlist_dim: int,
    rerank_dim: int | None = None,
    shortlist: int = 200,
    k: int = 10,
    allow_untrained: bool = False,
) -> SearchResult:
    """Shortlist on a short prefix, rerank the survivors on a longer one (arXiv 2205.13147)."""
    full = _width(gallery)
    cascade = Cascade.adaptive(
        shortlist_dim=shortlist_dim,
        rerank_dim=full if rerank_dim is None else rerank_dim,
        shortlist=shortlist,
        k=k,
    )
    return cascade_search(queries, gallery, cascade, allow_untrained=allow_untrained)


def funnel_retrieval(
    queries: Embeddings | ArrayLike,
    gallery: Embeddings | ArrayLike,
    *,
    lowest_dim: int,
    shortlist: int = 200,
    k: int = 10,
    allow_untrained: bool = False,
) -> SearchResult:
    """Raise the size and halve the shortlist until the full size (arXiv 2205.13147).

    The sizes are the Space's nesting dims from ``lowest_dim`` on; where it has none they double.
    """
    full = _width(gallery)
    known = gallery.space.nesting_dims if isinstance(gallery, Embeddings) else ()
    if not 1 <= lowest_dim <= full:
        raise DimensionError(f"lowest_dim {lowest_dim} does not fit embeddings of dim {full}.")
    doubling = [lowest_dim << power for power in range(full.bit_length())]
    dims = [d for d in sorted({lowest_dim, *(known or doubling)}) if lowest_dim <= d < full]
    cascade = Cascade.funnel([*dims, full], shortlist=shortlist, k=k)
    return cascade_search(queries, gallery, cascade, allow_untrained=allow_untrained)


def as_plan(plan: Plan | Cascade | str | None, *, dim: int, k: int = 10) -> Plan:
    """Return a plan from what a user may say; None is one exact pass at ``dim``."""
    if plan is None:
        return Plan(Cascade([Stage(dim, k)]))
    if isinstance(plan, str):
        return Plan.parse(plan)
    return Plan(plan) if isinstance(plan, Cascade) else plan


def _run(
    queries: NDArray[np.float32],
    gallery: NDArray[np.float32],
    cascade: Cascade,
    unit: bool,
    show_progress: bool,
) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    first, *rest = cascade.stages

    def sides(stage: Stage) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return stage_queries(queries, stage, unit=unit), stage_gallery(gallery, stage, unit=unit)

    with progress("search", len(cascade.stages), show=show_progress, unit="stages") as advance:
        found = [top_k(*sides(first), first.keep)]
        advance(1)
        for stage in rest:
            found.append(rerank(*sides(stage), found[-1][0], stage.keep))
            advance(1)
    return found


def _width(gallery: Embeddings | ArrayLike) -> int:
    return gallery.dim if isinstance(gallery, Embeddings) else int(np.shape(gallery)[1])


def _embeddings(
    values: Embeddings | ArrayLike, name: str, *, like: Space | None = None
) -> Embeddings:
    if isinstance(values, Embeddings):
        return values
    matrix = as_matrix(values, name=name)
    if like is not None and like.fingerprint == "declared:array":
        as_matrix(matrix, name=name, dim=like.size)
    return Embeddings(matrix, Space.declared("array", dim=matrix.shape[1], normalisation="none"))
