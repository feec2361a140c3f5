"""The judge: whether the new model's queries may be served from the old gallery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec._checks import normalise
from nestvec.errors import DataError
from nestvec.maps.alignment import Bridge, row_hashes
from nestvec.measurement.bootstrap import Estimate, resample
from nestvec.measurement.nearest import nearest
from nestvec.measurement.tasks import unit
from nestvec.search.certificate import lower_bound, n_needed
from nestvec.space import Embeddings
from nestvec.upgrade import truth as truths
from nestvec.upgrade.bridge import paired
from nestvec.upgrade.crossing import crossed

Matrix = NDArray[np.float32]
Values = NDArray[np.float64]

MARGIN = 0.01  #: what new queries may lose on the old gallery and still be called safe
_QUERIES_AT_ONCE = 256
_ROUNDING = 1e-6  # of cosines of float32 vectors


@dataclass(frozen=True)
class Score:
    """A mean over queries and its 95% interval (percentile bootstrap)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class AtSize:
    """What the upgrade does at one size of the gallery.

    Attributes
    ----------
    dim
        Size the gallery and the queries are cut to.
    old_old, new_old, new_new
        Old queries on the old gallery; new queries on it; new queries on the re-embedded gallery
        (at this size, or its full size where this is the old one's).
    difference
        new_old - old_old, paired over queries.
    at_least
        What the difference is above with 95% confidence at any number of queries: the smaller
        of the bootstrap's low end and a betting bound. Safe is above -0.01, better is above 0.
    update_gain
        Share of what full re-embedding would gain that is had without it; None if it does not
        gain with 95% confidence.
    negative_flips, positive_flips
        Shares of the queries that got worse and better.
    violations_relevant, violations_other
        Shares of the (query, document) pairs for which the compatibility criterion fails: a
        relevant document that is farther from the new query than from the old one, another one
        that is nearer (by more than a millionth, which is rounding).
    """

    dim: int
    old_old: Score
    new_old: Score
    new_new: Score
    difference: Score
    at_least: float
    update_gain: Score | None
    negative_flips: float
    positive_flips: float
    violations_relevant: float
    violations_other: float

    @property
    def safe(self) -> bool:
        """Whether the loss is below the margin, with confidence."""
        return self.at_least > -MARGIN

    @property
    def better(self) -> bool:
        """Whether there is a gain, with confidence."""
        return self.at_least > 0


@dataclass(frozen=True)
class Judgement:
    """The verdict on an upgrade and what it rests on.

    Attributes
    ----------
    sizes
        One `AtSize` for each size, falling; the first is the full one.
    metric, truth
        What was measured, and by what: ``"qrels"``, ``"labels"`` or ``"neighbours"``.
    n_queries, n_docs
        How many were judged.
    chance
        The metric of documents drawn at random.
    doubt
        Why no size may be called safe whatever its numbers say; None if there is no reason.
    notes
        What else a reader should know.
    """

    sizes: tuple[AtSize, ...]
    metric: str
    truth: str
    n_queries: int
    n_docs: int
    chance: float
    doubt: str | None
    notes: tuple[str, ...]

    @property
    def safe_from(self) -> int | None:
        """The smallest size down to which every size is safe, or None if the full one is not.

        Sizes are tested from the full one down and the first that fails ends it, so the confidence
        is that of one test.
        """
        found = None
        for size in () if self.doubt else self.sizes:
            if not size.safe:
                break
            found = size.dim
        return found

    @property
    def safe(self) -> bool:
        """Whether new queries may be served from the old gallery at full size."""
        return self.safe_from is not None

    @property
    def better(self) -> bool:
        """Whether they may, and are answered better than the old ones."""
        return self.safe and self.sizes[0].better

    @property
    def verdict(self) -> str:
        """``"safe"``, ``"safe at >= 128 dims"`` or ``"not safe"``."""
        if self.safe_from is None:
            return "not safe"
        if self.safe_from == self.sizes[-1].dim:
            return "safe"
        return f"safe at >= {self.safe_from} dims"

    def sentence(self) -> str:
        """Say the verdict, why, and, if it is "not safe", what would make it so."""
        full = self.sizes[0]
        why = (
            f"{self.metric} of new queries on the old gallery is {full.new_old.value:.3f} against "
            f"{full.old_old.value:.3f} of old queries, at least {full.at_least:+.3f} with 95% "
            f"confidence over {self.n_queries:,} queries; full re-embedding gives "
            f"{full.new_new.value:.3f}"
        )
        if self.doubt:
            return f"not safe: {self.doubt}."
        if self.safe:
            more = " (better)" if self.better else ""
            return f"{self.verdict}{more}: {why}."
        return f"not safe: {why}. {self._remedy()}"

    def _remedy(self) -> str:
        full = self.sizes[0]
        gap = full.difference.value
        wanted = n_needed((1 + gap) / 2, self._variance(), (1 - MARGIN) / 2)
        if wanted is not None:
            more = max(wanted, round(1.5 * self.n_queries))
            return (
                f"Too few queries: if the difference stays {gap:+.3f}, about {more:,} would show "
                f"that it is safe."
            )
        if self.truth == "neighbours":
            return (
                "Without labels only unchanged answers can be called safe: judge with relevance "
                "labels, or fit the bridge on more pairs."
            )
        if full.new_new.value <= full.old_old.value:
            return (
                "The new model is no better itself, even with everything re-embedded: keep the old."
            )
        return (
            "Fit a bridge on more pairs, of texts like these queries and documents, train the new "
            "model compatible with the old, or re-embed the gallery."
        )

    def _variance(self) -> float:
        """Variance of (1 + difference) / 2 over queries, from the width of the interval."""
        error = (self.sizes[0].difference.high - self.sizes[0].difference.low) / (2 * 1.96)
        return min(error**2 * self.n_queries / 4, 0.25)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        sizes = [{**asdict(s), "safe": s.safe, "better": s.better} for s in self.sizes]
        return {
            **asdict(self),
            "sizes": sizes,
            "verdict": self.verdict,
            "safe": self.safe,
            "better": self.better,
            "safe_from": self.safe_from,
            "sentence": self.sentence(),
        }


def judge(
    *,
    old_docs: Any,
    old_queries: Any,
    new_docs: Any,
    new_queries: Any,
    bridge: Any = None,
    qrels: Mapping[Any, Mapping[Any, int]] | None = None,
    doc_labels: Sequence[Any] | NDArray[Any] | None = None,
    query_labels: Sequence[Any] | NDArray[Any] | None = None,
    dims: Sequence[int] | None = None,
    k: int = 10,
    seed: int = 0,
) -> Judgement:
    """Say whether new queries may be served from the old gallery, at every size.

    Parameters
    ----------
    old_docs, old_queries, new_docs, new_queries : Embeddings
        A sample of the gallery and of the queries, each by both models, paired by ids (or row by
        row where they have none). Queries should be fresh: those a bridge was fitted on are left
        out.
    bridge
        What joins the two Spaces, from `fit`. Without one the new model must have been trained
        compatible (`nestvec.train`), so that its prefix lives in the old Space.
    qrels
        Query id -> document id -> grade: judged by nDCG@k.
    doc_labels, query_labels
        Classes of ``old_docs`` and ``old_queries``, in their order: judged by the share of the k
        found that are of the query's class.
    dims
        Sizes; by default the nesting dims of the Space in which both sides meet.
    k
        Depth of the metric.
    seed
        Of the resamples and of what is drawn at random.

    Returns
    -------
    Judgement
        ``sentence()`` is the verdict; ``safe``, ``safe_from``, ``sizes`` are what it says.

    Raises
    ------
    SpaceMismatchError
        If two spaces would be compared: sides that were mixed up, no bridge, or the wrong one.
    DataError
        If the sides do not pair up, or there are fewer than two queries to judge by.

    Notes
    -----
    Without labels the truth is the old model's own neighbours, so the judge can find that nothing
    changes, but not that anything is better. The criterion M(new, old) > M(old, old) is that of
    backward-compatible training; we add a margin of 0.01, and confidence: as the range of a
    difference of nDCG is [-1, 1], 299 queries are the least that can show it.

    References
    ----------
    Shen et al., Towards Backward-Compatible Representation Learning, CVPR 2020, arXiv:2003.11942.
    """
    for name, side in _sides(old_docs, old_queries, new_docs, new_queries).items():
        if not isinstance(side, Embeddings):
            raise DataError(
                f"{name} is a {type(side).__name__}, and who judges an upgrade has to know which "
                f"model made what: pass Embeddings (nestvec.load, nestvec.encode)."
            )
    old_docs.space.check_same(old_queries.space)
    new_docs.space.check_same(new_queries.space)
    if bridge is None and new_docs.space.space_id == old_docs.space.space_id:
        raise DataError(
            f"both sides are of {old_docs.space.label}: there is no upgrade to judge. Give the new "
            f"model's vectors as new_docs and new_queries."
        )
    new_docs = like(old_docs, new_docs, "docs")
    new_queries = like(old_queries, new_queries, "queries")
    gallery, asks = crossed(old_docs, new_queries, bridge)
    truth = truths.choose(old_docs, old_queries, qrels, doc_labels, query_labels, k)
    moves_gallery = bridge is not None and bridge.space_ == old_docs.space
    fresh, notes = _fresh(bridge, old_queries if moves_gallery else new_queries, truth)
    if fresh.sum() < 2:
        raise DataError(
            f"{int(fresh.sum())} fresh queries with an answer are left of {len(old_queries)}; at "
            f"least 2 are needed, and 299 to call anything safe."
            + "".join(f" {note}" for note in notes)
        )
    return _judged(
        [old_docs, gallery, new_docs],
        [side[truth.asked] for side in (old_queries, asks, new_queries)],
        truth,
        fresh,
        notes,
        _sizes(dims, gallery),
        k,
        seed,
    )


def _judged(
    galleries: list[Embeddings],
    asking: list[Embeddings],
    truth: truths.Truth,
    fresh: NDArray[np.bool_],
    notes: list[str],
    sizes: list[int],
    k: int,
    seed: int,
) -> Judgement:
    """Score the three pairs of sides (old/old, new/old, new/new) at every size."""
    at_sizes = []
    for dim in sizes:
        full = dim == galleries[1].dim
        both = [
            (cut(asks, None if full else dim), cut(docs, None if full else dim))
            for asks, docs in zip(asking, galleries, strict=True)
        ]
        found = [truth.score(nearest(asks, docs, k))[fresh] for asks, docs in both]
        violations = _violations(both[0], both[1], truth, fresh)
        at_sizes.append(_at_size(dim, np.stack(found), violations, seed))
    n_docs, n = len(galleries[0]), int(fresh.sum())
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(n_docs, min(k, n_docs), replace=False) for _ in fresh]
    chance = truth.score(np.stack(drawn))[fresh]
    old_old = truth.score(nearest(unit(asking[0]), unit(galleries[0]), k))[fresh]
    doubt = None
    if lower_bound((1 + old_old - chance) / 2, seed=seed) <= 0.5:
        doubt = (
            f"by {n:,} queries, old ones find no more in the old gallery of {n_docs:,} documents "
            f"than chance does ({truth.metric} {old_old.mean():.3f} against {chance.mean():.3f}), "
            f"so there is nothing to compare with. Check that ids, labels and vectors belong "
            f"together, and give more documents and queries if those are few"
        )
    return Judgement(
        tuple(at_sizes),
        truth.metric,
        truth.source,
        n,
        n_docs,
        float(chance.mean()),
        doubt,
        tuple(notes),
    )


def _at_size(dim: int, values: Values, violations: tuple[float, float], seed: int) -> AtSize:
    estimate = resample(values, seed=seed)
    low, high = estimate.interval()
    old_old, new_old, new_new = (
        Score(*map(float, three)) for three in zip(estimate.value, low, high, strict=True)
    )
    difference = Score(*(float(side[1]) for side in estimate.difference(to=0)))
    changes = values[1] - values[0]
    betting = 2 * lower_bound((1 + changes) / 2, seed=seed) - 1
    return AtSize(
        dim,
        old_old,
        new_old,
        new_new,
        difference,
        at_least=min(betting, difference.low),
        update_gain=_share_of_gain(estimate),
        negative_flips=float((changes < -1e-9).mean()),
        positive_flips=float((changes > 1e-9).mean()),
        violations_relevant=violations[0],
        violations_other=violations[1],
    )


def _share_of_gain(estimate: Estimate) -> Score | None:
    """Return (new/old - old/old) / (new/new - old/old); None unless the latter is surely a gain."""
    gains = estimate.draws - estimate.draws[:, [0]]
    if np.percentile(gains[:, 2], 2.5) <= 0:
        return None
    real = gains[:, 2] > 0
    low, high = np.percentile(gains[real, 1] / gains[real, 2], [2.5, 97.5])
    value = (estimate.value[1] - estimate.value[0]) / (estimate.value[2] - estimate.value[0])
    return Score(float(value), float(low), float(high))


def _violations(
    old: tuple[Matrix, Matrix],
    new: tuple[Matrix, Matrix],
    truth: truths.Truth,
    fresh: NDArray[np.bool_],
) -> tuple[float, float]:
    """Return the shares of violating (query, relevant) and (query, other document) pairs."""
    rows = np.flatnonzero(fresh)
    wrong = np.zeros(2)
    total = np.zeros(2)
    for start in range(0, len(rows), _QUERIES_AT_ONCE):
        block = rows[start : start + _QUERIES_AT_ONCE]
        change = new[0][block] @ new[1].T - old[0][block] @ old[1].T
        relevant = np.zeros(change.shape, dtype=bool)
        for at, row in enumerate(block.tolist()):
            relevant[at, truth.relevant(row)] = True
        wrong += (change[relevant] < -_ROUNDING).sum(), (change[~relevant] > _ROUNDING).sum()
        total += relevant.sum(), (~relevant).sum()
    found = np.divide(wrong, total, out=np.zeros(2), where=total > 0)
    return float(found[0]), float(found[1])


def _sides(*sides: Any) -> dict[str, Any]:
    return dict(zip(("old_docs", "old_queries", "new_docs", "new_queries"), sides, strict=True))


def like(old: Embeddings, new: Embeddings, name: str) -> Embeddings:
    """Return the new side in the order of the old one; it must have all of it."""
    _, found = paired(old, new)
    if len(found) < len(old):
        raise DataError(
            f"{len(old) - len(found)} of the old {name} have no vector by the new model; encode "
            f"the same {name} with both."
        )
    return found


def _fresh(
    bridge: Any, queries: Embeddings, truth: truths.Truth
) -> tuple[NDArray[np.bool_], list[str]]:
    """Tell which asked queries the bridge was not fitted on."""
    fresh = np.ones(len(truth.asked), dtype=bool)
    notes = []
    if isinstance(bridge, Bridge):
        fresh = ~np.isin(row_hashes(queries.array[truth.asked]), bridge.seen_)
        if not fresh.all():
            notes.append(
                f"{int((~fresh).sum())} queries are among the pairs the bridge was fitted on and "
                f"were left out: of those it knows the answer."
            )
    return fresh, notes


def _sizes(dims: Sequence[int] | None, gallery: Embeddings) -> list[int]:
    sizes = {*(gallery.space.nesting_dims if dims is None else dims), gallery.dim}
    if wrong := [d for d in sizes if not 1 <= d <= gallery.dim]:
        raise DataError(f"dims {sorted(wrong)} do not fit a gallery of {gallery.dim} dims.")
    return sorted(map(int, sizes), reverse=True)


def cut(side: Embeddings, dim: int | None) -> Matrix:
    """Return unit rows of at most ``dim`` numbers."""
    if dim is None or dim >= side.dim:
        return unit(side)
    return normalise(side.array[:, :dim], name="prefix")
