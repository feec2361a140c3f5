"""Find the cheapest plan that holds a recall on the user's own data, and certify it.

The frontier is measured on some queries. The cheapest plans that seem to hold are then tested, from
the safest to the cheaper, on other queries that took no part in choosing; the certificate is a
lower confidence bound for the mean recall over queries like them (`certificate`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec._progress import progress
from nestvec.errors import DataError
from nestvec.search import certificate, engine
from nestvec.search.cascade import Cascade, Plan, Stage
from nestvec.search.view import View

Queries = NDArray[np.float32]

_GROWTH = 1.3  # between neighbouring widths of a structure: the step a plan can be too dear by
_KEEPS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # shortlists, in multiples of k
_SHORTEST = 32  # dims of a prefix that makes a shortlist
_SCANNABLE = 200_000  # rows above which scanning them all is not tried
_MOST_TESTED = 48
_REPEATS = 3


@dataclass(frozen=True)
class Measured:
    """What one plan does on the choosing queries.

    ``recall`` of exact full-size neighbours, ``ms`` a query on one thread, ``resident_bytes`` a
    vector that stay in memory (full vectors are read from disk).
    """

    plan: Plan
    recall: float
    ms: float
    resident_bytes: float


@dataclass(frozen=True, repr=False)
class Planned:
    """What the planner found; `table` prints it.

    Attributes
    ----------
    plan
        The cheapest certified plan, or None.
    frontier
        Plans that no other beats in both recall and time, cheapest first.
    certificate
        The bounds on the certifying queries, safest plan first; None without a recall target.
    k, n_choosing, n_certifying
    gallery_like
        Whether rows of the gallery stood in for queries.
    sentence
        What was found, in words.
    """

    plan: Plan | None
    frontier: tuple[Measured, ...]
    tested: tuple[Measured, ...] = ()
    certificate: certificate.Certificate | None = None
    k: int = 10
    n_choosing: int = 0
    n_certifying: int = 0
    gallery_like: bool = False
    sentence: str = ""
    budget: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Planned({self.sentence!r})"

    def __str__(self) -> str:
        return self.sentence

    def table(self) -> str:
        """Return the frontier as text: recall, ms and bytes of each plan; ``>`` marks the chosen.

        ``proven`` is the lower confidence bound of a plan that was tested on the certifying
        queries.
        """
        proven = self.proven()
        lines = [f"  {'recall':>7}{'proven':>8}{'ms':>9}{'bytes':>8}  plan"]
        for one in self.frontier:
            mark = ">" if one.plan == self.plan else " "
            low = f"{proven[one.plan]:.4f}" if one.plan in proven else ""
            cost = f"{one.ms:9.3g}{one.resident_bytes:8.0f}"
            lines.append(f"{mark} {one.recall:7.4f}{low:>8}{cost}  {one.plan}")
        return "\n".join(lines)

    def proven(self) -> dict[Plan, float]:
        """Return the lower bound of each plan that was tested for the certificate."""
        bounds = self.certificate.bounds if self.certificate else ()
        tested = zip(self.tested, bounds, strict=False)  # none is tested after one that failed
        return {one.plan: bound.lower for one, bound in tested}


def find(
    view: View,
    queries: Queries | None,
    *,
    k: int,
    recall: float | None,
    ms: float | None,
    resident_bytes: float | None,
    structures: Iterable[str],
    confidence: float,
    n_queries: int,
    seed: int,
    show_progress: bool,
) -> Planned:
    """Plan for a view; `nestvec.Index.plan` says what the parameters are."""
    asked, own, truth = _questions(view, queries, k, n_queries, seed, show_progress)
    half = len(asked) // 2
    if half < 10:
        raise DataError(
            f"{len(asked)} queries are too few to choose by and to certify with: give 200 or more."
        )
    choosing = _Sample(view, asked[:half], own[:half], truth[:half], k)
    certifying = _Sample(view, asked[half:], own[half:], truth[half:], k)
    measured = _measure(choosing, view, k, list(structures), resident_bytes, show_progress)
    frontier = _frontier(measured)
    common: dict[str, Any] = {
        "frontier": tuple(frontier),
        "k": k,
        "n_choosing": half,
        "n_certifying": len(asked) - half,
        "gallery_like": queries is None,
        "budget": {
            name: value
            for name, value in (("recall", recall), ("ms", ms), ("bytes", resident_bytes))
            if value is not None
        },
    }
    affordable = [one for one in frontier if ms is None or one.ms <= ms]
    if not affordable:
        said = (
            f"No plan answers in {ms:g} ms a query; the fastest, {frontier[0].plan}, takes "
            f"{frontier[0].ms:.3g} ms at recall {frontier[0].recall:.3f}."
            if frontier
            else "No structure fits the budget of bytes."
        )
        return Planned(None, sentence=said, **common)
    if recall is None:
        best = affordable[-1]
        tested = [best]
        bound = certificate.lower_bound(certifying.recall(best.plan), confidence=confidence)
        said = (
            f"{best.plan}: {best.ms:.3g} ms a query, {best.resident_bytes:.0f} bytes a vector; "
            f"recall@{k} is at least {bound:.3f} with {confidence:.0%} confidence"
            f"{_of_whom(queries)}."
        )
        return Planned(best.plan, tested=tuple(tested), sentence=said, **common)
    tested = _to_test(affordable, recall)
    proof = certificate.certify(
        (certifying.recall(one.plan) for one in tested), recall, confidence=confidence, seed=seed
    )
    if not proof.n_held:
        said = _cannot(affordable, tested, proof, k, confidence)
        return Planned(None, tested=tuple(tested), certificate=proof, sentence=said, **common)
    held = [one for one, _ in zip(tested, range(proof.n_held), strict=False)]
    best = min(held, key=lambda one: one.ms)
    bound = proof.bounds[held.index(best)]
    said = (
        f"{best.plan}: {best.ms:.3g} ms a query, {best.resident_bytes:.0f} bytes a vector in "
        f"memory; recall@{k} is at least {recall:g} with {confidence:.0%} confidence"
        f"{_of_whom(queries)} (measured {bound.mean:.4f} on {bound.n:,} queries that took no part "
        f"in choosing)."
    )
    return Planned(best.plan, tested=tuple(tested), certificate=proof, sentence=said, **common)


def _of_whom(queries: Queries | None) -> str:
    return ", for queries like the gallery's rows" if queries is None else ""


def _cannot(
    affordable: Sequence[Measured],
    tested: Sequence[Measured],
    proof: certificate.Certificate,
    k: int,
    confidence: float,
) -> str:
    best = affordable[-1]
    if not tested or best.recall < proof.target:
        return (
            f"recall@{k} {proof.target:g} is out of reach within the budget: the best plan, "
            f"{best.plan}, has {best.recall:.4f} at {best.ms:.3g} ms."
        )
    bound = proof.bounds[0]
    spread = bound.mean * (1 - bound.mean) / k
    needed = certificate.n_needed(bound.mean, spread, proof.target, confidence=confidence)
    more = f" About {max(needed, bound.n + 1):,} would do." if needed else ""
    return (
        f"recall@{k} {proof.target:g} cannot be certified with {bound.n:,} queries: "
        f"{tested[0].plan} has {bound.mean:.4f} on them, which proves {bound.lower:.4f}.{more}"
    )


# --- queries and truth ------------------------------------------------------------------------


def _questions(
    view: View, queries: Queries | None, k: int, n: int, seed: int, show_progress: bool
) -> tuple[Queries, NDArray[np.int64], NDArray[np.int64]]:
    """Return queries (m, dim), the row each of them is (-1 for none), and its true rows (m, k)."""
    rng = np.random.default_rng(seed)
    if view.everyone.n_derived <= k + 1:
        raise DataError(
            f"{view.everyone.n_derived} rows are too few to plan for: all of them are an answer "
            f"({view.n_fresh} more were written since; compact() takes them in)."
        )
    if queries is None:
        alive = view.everyone.derived
        rows = np.flatnonzero(alive) if len(alive) else np.arange(len(view.generation))
        own = rng.choice(rows, min(n, len(rows)), replace=False)
        own = np.sort(own)
        asked = view.generation.mirror.unit(own)
        order = rng.permutation(len(own))
        asked, own = asked[order], own[order]
    else:
        chosen = rng.permutation(len(queries))[:n]
        asked, own = queries[chosen], np.full(len(chosen), -1)
    full = view.snapshot.layout.space.size
    exact = Plan(Cascade([Stage(full, k + 1)]))
    found = []
    with progress("true neighbours", len(asked), show=show_progress, unit="queries") as advance:
        for start in range(0, len(asked), 256):
            some = asked[start : start + 256]
            found.append(engine.run(exact, some, view, view.everyone).rows)
            advance(len(some))
    return asked, own, _without(np.concatenate(found), own, k)


def _without(rows: NDArray[Any], own: NDArray[np.int64], k: int) -> NDArray[Any]:
    """Return the first ``k`` rows of each line that are not its own."""
    order = np.argsort(rows == own[:, None], axis=1, kind="stable")[:, :k]
    return np.take_along_axis(rows, order, axis=1)


class _Sample:
    """Some queries whose true neighbours are known."""

    def __init__(
        self,
        view: View,
        asked: Queries,
        own: NDArray[np.int64],
        truth: NDArray[np.int64],
        k: int,
    ) -> None:
        self.view, self.asked, self.own, self.k = view, asked, own, k
        self.spare = int((own >= 0).any())
        # Fresh rows are always found: they are scored beside every structure.
        self.truth = truth
        self.fresh = truth >= len(view.generation)

    def recall(self, plan: Plan) -> NDArray[np.float64]:
        """Return the recall of each query, in [0, 1]: one number a query, as the bound needs it."""
        if self.spare:  # a row of the gallery finds itself, and one more
            *before, last = plan.cascade.stages
            longer = [Stage(s.dim, s.keep + 1, s.precision) for s in before]
            cascade = Cascade([*longer, Stage(last.dim, self.k + 1, last.precision)])
            plan = Plan(cascade, plan.structure, plan.knobs)
        found = engine.run(plan, self.asked, self.view, self.view.everyone).rows
        rows = _without(found, self.own, self.k)
        return np.array([np.isin(a, b).mean() for a, b in zip(self.truth, rows, strict=True)])

    def places(self, shortlists: NDArray[Any]) -> NDArray[np.int64]:
        """Return where each true row stands in its query's shortlist, (m, k); far if not in it."""
        width = shortlists.shape[1]
        lists = _without(shortlists, self.own, width)
        out = np.full(self.truth.shape, np.iinfo(np.int64).max)
        for line, (true, found) in enumerate(zip(self.truth, lists, strict=True)):
            at = {row: place for place, row in enumerate(found.tolist())}
            out[line] = [at.get(row, np.iinfo(np.int64).max) for row in true.tolist()]
        out[self.fresh] = -1
        return out


# --- the frontier -----------------------------------------------------------------------------


def _measure(
    sample: _Sample,
    view: View,
    k: int,
    structures: list[str],
    resident_bytes: float | None,
    show_progress: bool,
) -> list[Measured]:
    n, full = len(view.generation), view.snapshot.layout.space.size
    dims = sorted({d for d in (32, 64, 128, 256, 512, 1024) if _SHORTEST <= d < full} | {full})
    tries: list[tuple[str, str | None, int]] = []  # structure, knob, dim
    for name in structures:
        if name == "exact" and n > _SCANNABLE:
            continue
        knob = next(iter(engine.STRUCTURES[name]), None)
        tries += [(name, knob, dim) for dim in dims if name != "graph" or dim * 4 >= full]
    ms_per_row = _rerank_ms(sample, view, full)
    found = []
    with progress("plans", len(tries), show=show_progress, unit="kinds") as advance:
        for name, knob, dim in tries:
            held = _resident(view, name, dim)
            if resident_bytes is None or held <= resident_bytes:
                found += _widths(sample, view, name, knob, dim, k, ms_per_row, held)
            advance(1)
    return found


def _widths(
    sample: _Sample,
    view: View,
    name: str,
    knob: str | None,
    dim: int,
    k: int,
    ms_per_row: float,
    held: float,
) -> list[Measured]:
    """Measure one structure on codes of one size, wider and wider until nothing is gained."""
    generation, full = view.generation, view.snapshot.layout.space.size
    n = len(generation)
    most = {"graph": min(n, 2000), "lists": 0, "exact": 1}[name]
    if name == "lists":
        most = generation.lists().n_lists
    width = {"graph": k, "lists": 1, "exact": 1}[name]
    found: list[Measured] = []
    before = -1.0
    while True:
        keeps = sorted({min(n, round(k * keep)) for keep in _KEEPS})
        if name == "graph":
            keeps = [keep for keep in keeps if keep <= width]
        longest = max(keeps)
        knobs = {} if knob is None else {knob: width}
        plan = Plan(Cascade([Stage(dim, longest + sample.spare, "int8")]), name, knobs)
        ms, shortlists = _timed(plan, sample, view)
        places = sample.places(shortlists)
        recalls = {keep: float((places < keep).mean()) for keep in keeps}
        for keep in keeps:
            stages = [Stage(dim, keep, "int8"), Stage(full, k)]
            found.append(
                Measured(
                    Plan(Cascade(stages), name, knobs), recalls[keep], ms + keep * ms_per_row, held
                )
            )
        best = recalls[longest]
        if (
            width >= most
            or best >= 0.9999
            or (best - before < 1e-4 and best > 0.9 and width > 8 * k)
        ):
            return found
        before, width = best, min(most, max(width + 1, round(width * _GROWTH)))


def _timed(plan: Plan, sample: _Sample, view: View) -> tuple[float, NDArray[Any]]:
    """Return milliseconds a query on one thread (the least of some runs) and the shortlists."""
    took, rows = [], np.empty(0)
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        planned = engine.Planned(plan, view.generation)
        rows = planned(sample.asked, view.everyone)[0]
        took.append(1000 * (time.perf_counter() - started) / len(sample.asked))
    return min(took[1:]), rows


def _rerank_ms(sample: _Sample, view: View, full: int) -> float:
    """Return milliseconds that reranking one row takes."""
    n, width = len(view.generation), min(100, len(view.generation))
    rng = np.random.default_rng(0)
    shortlists = rng.integers(0, n, (len(sample.asked), width)).astype(np.int32)
    took = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        engine.rescored(view.generation, Stage(full, sample.k), sample.asked, shortlists)
        took.append(1000 * (time.perf_counter() - started) / shortlists.size)
    return min(took[1:])


def _resident(view: View, name: str, dim: int) -> float:
    """Return the bytes a vector takes in memory under a structure on codes of a size."""
    generation = view.generation
    held = generation.mirror.resident_bytes
    if name == "graph":
        held += generation.graph().nbytes + generation.codes(dim).nbytes
    elif name == "lists":
        held += generation.lists().nbytes + generation.listed(dim).nbytes
    else:
        held += generation.codes(dim).nbytes
    return held / max(1, len(generation))


def _frontier(measured: Iterable[Measured]) -> list[Measured]:
    """Return what nothing beats in both recall and time, cheapest first."""
    kept: list[Measured] = []
    for one in sorted(measured, key=lambda one: (one.ms, -one.recall)):
        if not kept or one.recall > kept[-1].recall:
            kept.append(one)
    return kept


def _to_test(frontier: Sequence[Measured], recall: float) -> list[Measured]:
    """Return the plans to test, safest first: from the best there is down to the target."""
    hopeful = [one for one in frontier if one.recall >= recall]
    if len(hopeful) > _MOST_TESTED:  # the cheap ones all: they are what is wanted
        far = np.linspace(_MOST_TESTED // 2, len(hopeful) - 1, _MOST_TESTED // 2).round()
        hopeful = hopeful[: _MOST_TESTED // 2] + [hopeful[i] for i in np.unique(far.astype(int))]
    return hopeful[::-1]


def as_json(found: Planned) -> dict[str, Any]:
    """Return what is stored beside the plan, and printed by ``--json``."""
    return {
        "sentence": found.sentence,
        "budget": found.budget,
        "k": found.k,
        "n_choosing": found.n_choosing,
        "n_certifying": found.n_certifying,
        "gallery_like": found.gallery_like,
        "frontier": [
            {
                "plan": str(one.plan),
                "recall": one.recall,
                "ms": one.ms,
                "resident_bytes": one.resident_bytes,
            }
            for one in found.frontier
        ],
        "tested": [
            {"plan": str(one.plan), "mean": bound.mean, "lower": bound.lower, "n": bound.n}
            for one, bound in zip(
                found.tested, found.certificate.bounds if found.certificate else (), strict=False
            )
        ],
    }
