"""Find the cheapest plan that holds a recall on the user's own data, and certify it.

The frontier is measured on some queries. The plans on it are then tested, from the safest to the
cheaper, on other queries that took no part in choosing; the certificate is a lower confidence bound
for the mean over queries like them (`certificate`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec._progress import progress
from nestvec.errors import DataError
from nestvec.search import certificate, engine
from nestvec.search.cascade import Cascade, Plan, Stage
from nestvec.search.structures.codes import padded
from nestvec.search.structures.graph import NEIGHBOURS
from nestvec.search.structures.lists import usual_n_lists
from nestvec.search.structures.peers import KINDS
from nestvec.search.trials import Trials
from nestvec.search.view import View

_GROWTH = 1.3  # between neighbouring widths of a structure: the step a plan can be too dear by
_FINER = 1 / 1.14, 1 / 1.07, 1.07, 1.14  # times those near the target, too
_KEEPS = (
    1,
    1.2,
    1.5,
    2,
    3,
    4,
    6,
    8,
    12,
    16,
    24,
    32,
    48,
    64,
    96,
    128,
)  # shortlists, in multiples of k
_PEER_KEEPS = (2, 4, 8, 16, 32)  # each is run
_SHORTEST = 32  # dims of a prefix that makes a shortlist
_SCANNABLE = 200_000  # rows above which scanning them all is not tried
_ALL = 0.9999  # recall beyond which nothing is gained
_ABOUT = 1.15  # what a time by few queries may be off by
_HELD_AT_ONCE = 1 << 30  # bytes of structures that stay in memory from one kind to the next
_PLACE = 4  # bytes a vector of where it stands in the lists
_PROVEN_FROM = 0.8  # recall that may be asked of one search; plans down to it are tested
_MOST_TESTED = 48
_LEAST = 10  # queries to choose by, and to certify with


@dataclass(frozen=True)
class Measured:
    """What one plan does on the choosing queries.

    ``recall`` of exact full-size neighbours, ``ms`` a query (one query a call, on one thread),
    ``resident_bytes`` a vector that stay in memory (full vectors are read from disk), ``ndcg``
    where labels are given.
    """

    plan: Plan
    recall: float
    ms: float
    resident_bytes: float
    ndcg: float | None = None


@dataclass(frozen=True)
class Loss:
    """What a plan loses in nDCG against exact full-size search: the mean, and at most how much."""

    n: int
    mean: float
    upper: float


@dataclass(frozen=True, repr=False)
class Planned:
    """What the planner found; `table` prints it.

    Attributes
    ----------
    plan
        The cheapest certified plan; exact full-size search, which needs no certificate, where none
        is; None where the budget forbids that too.
    frontier
        Plans that no other beats in both recall and time, cheapest first. Exact full-size search
        is the last.
    tested
        Those of them that were tested on the certifying queries, safest first.
    certificate
        The bounds of their recall, down to where none would be asked for; ``n_held`` of them hold
        the target. None where nothing was tested.
    losses
        The bounds of what they lose in nDCG, up to the first that fails; ``ndcg_exact`` is what
        exact full-size search has on the choosing queries. Without a budget for it, nothing.
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
    losses: tuple[Loss, ...] = ()
    ndcg_exact: float | None = None
    confidence: float = 0.95
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
        ndcg = f"{'nDCG':>8}" if self.ndcg_exact is not None else ""
        lines = [f"  {'recall':>7}{'proven':>8}{ndcg}{'ms':>9}{'bytes':>8}  plan"]
        for one in self.frontier:
            mark = ">" if one.plan == self.plan else " "
            low = f"{proven[one.plan]:.4f}" if one.plan in proven else ""
            ndcg = "" if one.ndcg is None else f"{one.ndcg:8.4f}"
            cost = f"{one.ms:9.3g}{one.resident_bytes:8.0f}"
            lines.append(f"{mark} {one.recall:7.4f}{low:>8}{ndcg}{cost}  {one.plan}")
        return "\n".join(lines)

    def proven(self) -> dict[Plan, float]:
        """Return the lower bound of each plan that was tested for the certificate."""
        bounds = self.certificate.bounds if self.certificate else ()
        tested = zip(self.tested, bounds, strict=False)  # none is tested after one that failed
        return {one.plan: bound.lower for one, bound in tested}


def check(
    recall: float | int | None,
    ndcg_loss: float | int | None,
    confidence: float | int,
    k: int,
    n_queries: int | None,
) -> None:
    """Raise `DataError` for settings that do not fit, before anything is measured or built."""
    if recall is not None and not 0 < recall <= 1:
        raise DataError(f"recall {recall} is a share: above 0, at most 1. Write 0.99 for 99%.")
    for name, value, fits in (
        ("ndcg_loss", ndcg_loss, "0.005"),
        ("confidence", confidence, "0.95 for 95%"),
    ):
        if value is not None and not 0 < value < 1:
            raise DataError(f"{name} {value} is a share: above 0, below 1. Write {fits}.")
    if k < 1:
        raise DataError(f"k={k}: there is no recall of no neighbours. Give 1 or more.")
    if n_queries is not None and n_queries < 2 * _LEAST:
        raise DataError(
            f"n_queries={n_queries}: half of them choose and half certify. Give {2 * _LEAST} or "
            f"more (200 say something), or leave it out for all."
        )


def find(
    choosing: Trials,
    certifying: Trials,
    *,
    recall: float | None,
    ms: float | None,
    resident_bytes: float | None,
    ndcg_loss: float | None = None,
    structures: Iterable[str],
    confidence: float,
    seed: int,
    gallery_like: bool = False,
    show_progress: bool = False,
) -> Planned:
    """Plan by some trials and certify with others; `nestvec.Index.plan` says what is what."""
    k = choosing.k
    if min(len(choosing), len(certifying)) < _LEAST:
        raise DataError(
            f"{len(choosing) + len(certifying)} queries are too few to choose by and to certify "
            f"with: give 200 or more."
        )
    measured, skipped = _measure(choosing, list(structures), resident_bytes, show_progress)
    if recall is not None:
        measured += _finer(choosing, _near_frontier(measured), recall)
    frontier = _frontier(_timed(choosing, _near_frontier(measured)))
    if choosing.labels is not None:
        some = [one.plan for one in frontier]
        found = [float(choosing.ndcg(plan).mean()) for plan in _one_by_one(choosing.view, some)]
        frontier = [replace(one, ndcg=value) for one, value in zip(frontier, found, strict=True)]
    budget = {"recall": recall, "ndcg_loss": ndcg_loss, "ms": ms, "bytes": resident_bytes}
    common: dict[str, Any] = {
        "frontier": tuple(frontier),
        "k": k,
        "n_choosing": len(choosing),
        "n_certifying": len(certifying),
        "gallery_like": gallery_like,
        "confidence": confidence,
        "budget": {name: value for name, value in budget.items() if value is not None},
    }
    affordable = [one for one in frontier if ms is None or one.ms <= ms]
    if not affordable:
        said = (
            f"No plan answers in {ms:g} ms a query; the fastest, {frontier[0].plan}, takes "
            f"{frontier[0].ms:.3g} ms at recall {frontier[0].recall:.3f}.{skipped}"
            if frontier
            else f"No plan fits {resident_bytes:g} bytes a vector: exact search, which holds no "
            f"more than checksums, takes {_sums(choosing.view):.3g}."
        )
        return Planned(None, sentence=said, **common)
    exact = next((one for one in affordable if one.plan == _exact(choosing)), None)
    affordable = [one for one in affordable if one is not exact]

    def otherwise(why: str) -> Planned:
        """Take exact search, or nothing."""
        if exact is None:
            return Planned(None, sentence=why + skipped, **common)
        said = (
            f"{_costs(exact)}; it is exact search, which scores every row and needs no "
            f"certificate. {why}{skipped}"
        )
        return Planned(exact.plan, sentence=said.rstrip(), **common)

    if not affordable:
        return otherwise("No other plan within the budget is faster.")
    if ndcg_loss is not None:
        common["ndcg_exact"] = float(choosing.ndcg(_exact(choosing)).mean())
        tested = _hopeful(affordable, common["ndcg_exact"] - ndcg_loss)
    else:
        tested = _to_test(affordable, recall)
    proof = _proof(certifying, tested, recall, confidence, seed)
    common |= {"tested": tuple(tested), "certificate": proof}
    if ndcg_loss is not None:
        found = _by_ndcg(certifying, affordable, tested, ndcg_loss, confidence, seed, common)
        common["losses"] = found.losses
        return otherwise(found.sentence) if found.plan is None else found
    if recall is None and exact is not None and ms is not None:
        return otherwise("No plan within the budget finds more.")
    if recall is None:
        best = affordable[-1]
        lower = certificate.lower_bound(
            certifying.recall(best.plan), confidence=confidence, seed=seed
        )
        said = (
            f"{_costs(best)}; recall@{k} is at least {lower:.3f} with {_percent(confidence)} "
            f"confidence{_of_whom(gallery_like)}."
        )
        return Planned(best.plan, sentence=said, **common)
    if proof is None or not proof.n_held:
        values = certifying.recall(tested[0].plan) if tested else None
        return otherwise(_cannot(affordable, tested, proof, values, recall, common))
    best, bound = tested[proof.n_held - 1], proof.bounds[proof.n_held - 1]
    said = (
        f"{_costs(best)}; recall@{k} is at least {recall:g} with {_percent(confidence)} confidence"
        f"{_of_whom(gallery_like)} (measured {bound.mean:.4f} on {bound.n:,} queries that took "
        f"no part in choosing)."
    )
    return Planned(best.plan, sentence=said, **common)


def proven(stored: Mapping[str, Any], recall: float) -> Plan | None:
    """Return the cheapest plan that was certified for a recall, of what `as_json` told.

    The plans were put in order by other queries than those that tested them, so testing them for
    any one recall, from the safest to the first that fails, is a certificate of that recall.
    """
    held = itertools.takewhile(lambda one: one["lower"] >= recall, stored.get("tested", ()))
    texts = [one["plan"] for one in held]
    return Plan.parse(texts[-1]) if texts else None


def _one_by_one(view: View, plans: Iterable[Plan]) -> Iterator[Plan]:
    """Go through plans, and let go of what those of one structure and size held, if it is much."""
    before = None
    for plan in plans:
        kind = plan.structure, plan.cascade.stages[0].dim
        if before not in (None, kind) and view.generation.resident_bytes() > _HELD_AT_ONCE:
            view.release()
        before = kind
        yield plan


def _exact(trials: Trials) -> Plan:
    return Plan(Cascade([Stage(trials.full, trials.k)]))


def _proof(
    certifying: Trials,
    tested: Sequence[Measured],
    recall: float | None,
    confidence: float,
    seed: int,
) -> certificate.Certificate | None:
    """Return the bounds of all that are tested, and how many of them hold."""
    if not tested:
        return None
    floor = min(recall or 1, _PROVEN_FROM)
    plans = _one_by_one(certifying.view, [one.plan for one in tested])
    values = (certifying.recall(plan) for plan in plans)
    proof = certificate.certify(values, floor, confidence=confidence, seed=seed)
    if recall is None:
        return proof
    held = itertools.takewhile(lambda bound: bound.lower >= recall, proof.bounds)
    return replace(proof, target=recall, n_held=len([*held]))


def _by_ndcg(
    certifying: Trials,
    affordable: Sequence[Measured],
    tested: Sequence[Measured],
    most: float,
    confidence: float,
    seed: int,
    common: dict[str, Any],
) -> Planned:
    """Certify by the mean difference of nDCG, query by query, to exact full-size search."""
    name, wanted = f"nDCG@{certifying.k}", certifying.ndcg(_exact(certifying))
    if not tested:
        best = max(affordable, key=lambda one: one.ndcg or 0)
        said = (
            f"a loss of {most:g} in {name} is out of reach within the budget: the best plan, "
            f"{best.plan}, has {best.ndcg:.4f}, and exact search {common['ndcg_exact']:.4f}."
        )
        return Planned(None, sentence=said, **common)
    # A difference is in [-1, 1]; the bound is for values in [0, 1].
    values = ((1 + certifying.ndcg(one.plan) - wanted) / 2 for one in tested)
    proof = certificate.certify(values, (1 - most) / 2, confidence=confidence, seed=seed)
    losses = tuple(Loss(b.n, 1 - 2 * b.mean, 1 - 2 * b.lower) for b in proof.bounds)
    if not proof.n_held:
        said = (
            f"a loss of {most:g} in {name} cannot be certified with {losses[0].n:,} queries: "
            f"{tested[0].plan} loses {losses[0].mean:.4f} on them, which proves "
            f"{losses[0].upper:.4f}. Give more queries, or allow more."
        )
        return Planned(None, sentence=said, losses=losses, **common)
    best, loss = tested[proof.n_held - 1], losses[proof.n_held - 1]
    said = (
        f"{_costs(best)}; {name} is at most {most:g} below that of exact full-size search with "
        f"{_percent(confidence)} confidence (measured {loss.mean:+.4f} on {loss.n:,} queries that "
        f"took no part in choosing)."
    )
    return Planned(best.plan, sentence=said, losses=losses, **common)


def _percent(share: float) -> str:
    return f"{100 * share:g}%"


def _costs(one: Measured) -> str:
    return f"{one.plan}: {one.ms:.3g} ms a query, {one.resident_bytes:.0f} bytes a vector in memory"


def _of_whom(gallery_like: bool) -> str:
    return ", for queries like the gallery's rows" if gallery_like else ""


def _cannot(
    affordable: Sequence[Measured],
    tested: Sequence[Measured],
    proof: certificate.Certificate | None,
    values: NDArray[np.float64] | None,
    recall: float,
    common: Mapping[str, Any],
) -> str:
    best, k = affordable[-1], common["k"]
    if proof is None or values is None or best.recall < recall:
        return (
            f"recall@{k} {recall:g} is out of reach within the budget of plans that do not score "
            f"every row: the best, {best.plan}, has {best.recall:.4f} at {best.ms:.3g} ms."
        )
    bound = proof.bounds[0]
    needed = certificate.n_needed(
        bound.mean, float(values.var()), recall, confidence=common["confidence"]
    )
    more = ""
    if needed:
        wanted = _rounded_up(2 * max(needed, bound.n + 1))
        how = f"set n_queries to {wanted:,}" if common["gallery_like"] else f"give {wanted:,}"
        more = f" About twice {wanted // 2:,} would do, as half of them choose: {how}."
    return (
        f"recall@{k} {recall:g} cannot be certified with {bound.n:,} queries: "
        f"{tested[0].plan} has {bound.mean:.4f} on them, which proves {bound.lower:.4f}.{more}"
    )


def _rounded_up(n: int) -> int:
    """Return a number of two digits and zeros."""
    unit = 10 ** max(0, len(str(n)) - 2)
    return -(-n // unit) * unit


# --- the frontier -----------------------------------------------------------------------------


def _measure(
    trials: Trials,
    structures: list[str],
    resident_bytes: float | None,
    show_progress: bool,
) -> tuple[list[Measured], str]:
    """Measure what fits the budget of bytes; say what is the least that does not.

    Times are those of few queries, or between two such.
    """
    n, full = len(trials.view.generation), trials.full
    most = np.inf if resident_bytes is None else resident_bytes
    dims = sorted({d for d in (32, 64, 128, 256, 512, 1024) if _SHORTEST <= d < full} | {full})
    kinds = []
    for name in structures:
        if name == "exact" and n > _SCANNABLE:
            continue
        least = {"graph": full // 4}.get(name, full if name in engine.PEERS else 0)
        kinds += [(name, dim) for dim in dims if dim >= least]
    # The quick and sure ones first: they tell when others need not be wider.
    kinds.sort(key=lambda kind: (kind[0] == "lists", -kind[1]))
    found: list[Measured] = []
    if _sums(trials.view) <= most:
        exact = _exact(trials)
        found.append(Measured(exact, 1.0, trials.ms(exact), _sums(trials.view)))
    too_large: list[tuple[float, str]] = []
    with progress("plans", len(kinds), show=show_progress, unit="kinds") as advance:
        for name, dim in kinds:
            # Before it is built what it holds is known well enough, except for faiss's.
            held = _about_resident(trials.view, name, dim)
            if held <= most:
                held = _resident(trials.view, name, dim)
            if held <= most:
                enough = min((one.ms for one in found if one.recall >= _ALL), default=np.inf)
                some = _widths(trials, name, dim, held, enough)
                more = _PLACE if name == "lists" else 0
                if np.isfinite(most) and dim == full and name not in engine.PEERS:
                    some += _codes_only(trials, some, held + more, most)
                found += some
            else:
                too_large.append((held, f"{name} on {dim} dims"))
            if trials.view.generation.resident_bytes() > _HELD_AT_ONCE:
                trials.view.release()
            advance(1)
    if not too_large:
        return found, ""
    least, what = min(too_large)
    return found, f" Not tried, as over the budget of bytes: {what} ({least:.0f}) and what is more."


def _codes_only(
    trials: Trials, measured: Sequence[Measured], held: float, most: float
) -> list[Measured]:
    """Measure plans whose answers are scored by codes: they leave the pages of vectors alone."""
    found = []
    for precision, more in (("int8", 0.0), ("int10", padded(trials.full) / 4)):
        if held + more > most:
            continue
        last = Cascade([Stage(trials.full, trials.k, precision)])
        for plan in dict.fromkeys(
            Plan(last, one.plan.structure, one.plan.knobs) for one in measured
        ):
            recall = float(trials.recall(plan).mean())
            found.append(Measured(plan, recall, trials.ms(plan), held + more))
    return found


def _widths(trials: Trials, name: str, dim: int, held: float, enough: float) -> list[Measured]:
    """Measure one structure on codes of one size, wider and wider until nothing is gained."""
    k, most = trials.k, _widest(trials, name)
    width = k if name == "graph" else 1
    found: list[Measured] = []
    before = -1.0
    while True:
        some = _at_width(trials, name, dim, width, held)
        found += some
        best = some[-1]
        if (
            width >= most
            or best.recall >= _ALL
            or min(one.ms for one in some) > enough  # another finds all by then
            or (best.recall - before < 1e-4 and best.recall > 0.9 and width > 8 * k)
        ):
            return found
        before, width = best.recall, min(most, max(width + 1, round(width * _GROWTH)))


def _at_width(trials: Trials, name: str, dim: int, width: int, held: float) -> list[Measured]:
    """Measure all shortlists that one walk can make."""
    n, k = len(trials.view.generation), trials.k
    keeps = sorted({min(n, round(k * keep)) for keep in _KEEPS})
    if name == "graph":
        keeps = [keep for keep in keeps if keep <= width]
    knobs = {knob: width for knob in [*engine.KNOWN[name]][:1]}
    if name in engine.PEERS:
        return [
            Measured(plan, float(trials.recall(plan).mean()), trials.ms(plan), held)
            for plan in _peer_plans(name, knobs, trials)
        ]
    plans = [
        Plan(Cascade([Stage(dim, keep, "int8"), Stage(trials.full, k)]), name, knobs)
        for keep in keeps
    ]
    places = trials.walk(plans[-1], keeps[-1]).places
    run = sorted({0, len(plans) // 2, len(plans) - 1})  # those between take times between
    times = np.interp(keeps, [keeps[at] for at in run], [trials.ms(plans[at]) for at in run])
    return [
        Measured(plan, float((places < keep).mean()), float(ms), held)
        for plan, keep, ms in zip(plans, keeps, times, strict=True)
    ]


def _peer_plans(name: str, knobs: dict[str, int], trials: Trials) -> list[Plan]:
    """Return plans over one of faiss's indexes: those of codes make shortlists."""
    k, full, precision = trials.k, trials.full, KINDS[name].precision
    if precision == "float32":
        return [Plan(Cascade([Stage(full, k)]), name, knobs)]
    n = len(trials.view.generation)
    keeps = sorted({min(n, round(k * keep)) for keep in _PEER_KEEPS})
    cascades = [Cascade([Stage(full, keep, precision), Stage(full, k)]) for keep in keeps]
    return [Plan(cascade, name, knobs) for cascade in cascades]


def _finer(trials: Trials, near: Sequence[Measured], recall: float) -> list[Measured]:
    """Measure between the widths of those plans that may be the cheapest to hold a recall.

    A certificate takes a plan somewhat above the recall, and the next that was tried may be dear.
    """
    most = 1 - (1 - recall) / 5
    below = sorted((one for one in near if one.recall < recall), key=_found)[-1:]
    above = [one for one in near if recall <= one.recall <= most]
    found: list[Measured] = []
    seen = {_kind(one) for one in near}
    for one in [*below, *above]:
        name, dim, width = _kind(one)
        for finer in (round(width * factor) for factor in _FINER):
            kind = name, dim, finer
            least = trials.k if name == "graph" else 1
            if one.plan.knobs and kind not in seen and least <= finer <= _widest(trials, name):
                seen.add(kind)
                found += _at_width(trials, name, dim, finer, one.resident_bytes)
    return found


def _kind(one: Measured) -> tuple[str, int, int]:
    width = next(iter(one.plan.knobs.values()), 1)
    return one.plan.structure, one.plan.cascade.stages[0].dim, int(width)


def _widest(trials: Trials, name: str) -> int:
    n = len(trials.view.generation)
    if name == "lists":
        return trials.view.generation.lists().n_lists
    if "probes" in engine.KNOWN[name]:
        return min(n, usual_n_lists(n))
    return min(n, 2000) if engine.KNOWN[name] else 1


def _sums(view: View) -> float:
    """Return the bytes a vector takes in memory under any plan."""
    return view.generation.mirror.resident_bytes / max(1, len(view.generation))


def _about_resident(view: View, name: str, dim: int) -> float:
    """Return about what `_resident` does, with nothing built; for faiss's indexes the least."""
    n, full = len(view.generation), view.snapshot.layout.space.size
    if name == "graph":
        # A row in 32 is on the level above as well, with half the links and two numbers more.
        held = 4 * (2 * NEIGHBOURS + (NEIGHBOURS + 2) / (NEIGHBOURS - 1)) + padded(dim)
    elif name == "lists":
        held = 4 + padded(dim) + min(n, usual_n_lists(n)) * (padded(full) + 8) / max(1, n)
    elif name in engine.PEERS:
        held = full * {"float32": 4, "int8": 1}.get(KINDS[name].precision, 1 / 8)
    else:
        held = padded(dim)
    return _sums(view) + held


def _resident(view: View, name: str, dim: int) -> float:
    """Return the bytes a vector takes in memory under a structure on codes of a size."""
    generation = view.generation
    held = generation.mirror.resident_bytes
    if name == "graph":
        held += generation.graph().nbytes + generation.codes(dim).nbytes
    elif name == "lists":
        lists = generation.lists()
        held += lists.starts.nbytes + lists.numbers.nbytes + lists.means.nbytes
        held += generation.listed(dim).nbytes
    elif name in engine.PEERS:
        held += generation.peer(name).nbytes
    else:
        held += generation.codes(dim).nbytes
    return held / max(1, len(generation))


def _found(one: Measured) -> tuple[float, bool]:
    """Return by what plans are better: exact search finds all, others did so on some queries."""
    return one.recall, _scores_all(one.plan)


def _frontier(measured: Iterable[Measured]) -> list[Measured]:
    """Return what nothing beats in both recall and time, cheapest first."""
    kept: list[Measured] = []
    for one in sorted(measured, key=lambda one: (one.ms, -one.recall)):
        if not kept or _found(one) > _found(kept[-1]):
            kept.append(one)
    return kept


def _near_frontier(measured: Sequence[Measured]) -> list[Measured]:
    """Return what may be on the frontier: times are right to about so much."""
    found: list[Measured] = []
    least = np.inf
    for one in sorted(sorted(measured, key=lambda one: one.ms), key=_found, reverse=True):
        if one.ms <= least * _ABOUT:
            found.append(one)
        least = min(least, one.ms)
    return found


def _timed(trials: Trials, measured: Sequence[Measured]) -> list[Measured]:
    """Return them with the time that each whole plan takes, one query a call."""
    plans = [one.plan for one in measured]
    kinds = {(one.plan.structure, one.plan.cascade.stages[0].dim): one for one in measured}
    held = sum(one.resident_bytes for one in kinds.values()) * len(trials.view.generation)
    if held <= _HELD_AT_ONCE:
        trials.times(plans)
    else:  # one kind after the other
        plans.sort(key=lambda plan: (plan.structure, plan.cascade.stages[0].dim))
        for plan in _one_by_one(trials.view, plans):
            trials.times([plan])
    return [replace(one, ms=trials.times([one.plan])[0]) for one in measured]


def _to_test(frontier: Sequence[Measured], recall: float | None) -> list[Measured]:
    """Return the plans to test, safest first: from the best there is down to the target, and on.

    Those that miss the target are for searches that ask for less.
    """
    target = _PROVEN_FROM if recall is None else recall
    hopeful = [one for one in frontier if one.recall >= target]
    lesser = [one for one in frontier if _PROVEN_FROM <= one.recall < target]
    return _thinned(hopeful, _MOST_TESTED) + _thinned(lesser, _MOST_TESTED // 3)


def _hopeful(frontier: Sequence[Measured], ndcg: float) -> list[Measured]:
    """Return the plans to test for an nDCG, safest first."""
    some = [one for one in frontier if one.ndcg is not None and one.ndcg >= ndcg]
    return _thinned(some, _MOST_TESTED)


def _thinned(rising: Sequence[Measured], most: int) -> list[Measured]:
    """Return at most so many, safest first; the cheap half all, they are what is wanted."""
    if len(rising) <= most:
        return [*rising][::-1]
    near, far = rising[: most // 2], rising[most // 2 :]
    some = np.unique(np.linspace(0, len(far) - 1, most - most // 2).round().astype(int))
    return [*near, *(far[i] for i in some)][::-1]


def _scores_all(plan: Plan) -> bool:
    (first, *rest), name = plan.cascade.stages, plan.structure
    return name == "exact" and not rest and first.precision == "float32"


def as_json(found: Planned) -> dict[str, Any]:
    """Return what is stored beside the plan, and printed by ``--json``."""
    bounds = found.certificate.bounds if found.certificate else ()
    tested: list[dict[str, Any]] = [
        {"plan": str(one.plan), "mean": bound.mean, "lower": bound.lower, "n": bound.n}
        for one, bound in zip(found.tested, bounds, strict=False)
    ]
    for one, loss in zip(tested, found.losses, strict=False):
        one["ndcg_loss"] = {"mean": loss.mean, "upper": loss.upper}
    if found.plan is not None and _scores_all(found.plan):  # it finds all, whatever is asked for
        tested.insert(0, {"plan": str(found.plan), "mean": 1.0, "lower": 1.0, "n": 0})
    return {
        "sentence": found.sentence,
        "budget": found.budget,
        "k": found.k,
        "confidence": found.confidence,
        "n_choosing": found.n_choosing,
        "n_certifying": found.n_certifying,
        "gallery_like": found.gallery_like,
        **({} if found.ndcg_exact is None else {"ndcg_exact": found.ndcg_exact}),
        "frontier": [
            {
                "plan": str(one.plan),
                "recall": one.recall,
                **({} if one.ndcg is None else {"ndcg": one.ndcg}),
                "ms": one.ms,
                "resident_bytes": one.resident_bytes,
            }
            for one in found.frontier
        ],
        "tested": tested,
    }
