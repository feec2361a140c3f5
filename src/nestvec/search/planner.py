"""Find the cheapest plan that holds a recall on the user's own data, and certify it.

The frontier is measured on some queries. The plans on it are then tested, from the safest to the
cheaper, on other queries that took no part in choosing; the certificate is a lower confidence bound
for the mean over queries like them (`certificate`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nestvec._progress import progress
from nestvec.errors import DataError
from nestvec.search import certificate, engine
from nestvec.search.cascade import Cascade, Plan, Stage
from nestvec.search.trials import Trials
from nestvec.search.view import View

_GROWTH = 1.3  # between neighbouring widths of a structure: the step a plan can be too dear by
_KEEPS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # shortlists, in multiples of k
_SHORTEST = 32  # dims of a prefix that makes a shortlist
_SCANNABLE = 200_000  # rows above which scanning them all is not tried
_MOST_TESTED = 48
_LEAST = 10  # queries to choose by, and to certify with


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
    choosing: Trials,
    certifying: Trials,
    *,
    recall: float | None,
    ms: float | None,
    resident_bytes: float | None,
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
    measured = _measure(choosing, list(structures), resident_bytes, show_progress)
    frontier = _frontier(measured)
    budget = {"recall": recall, "ms": ms, "bytes": resident_bytes}
    common: dict[str, Any] = {
        "frontier": tuple(frontier),
        "k": k,
        "n_choosing": len(choosing),
        "n_certifying": len(certifying),
        "gallery_like": gallery_like,
        "budget": {name: value for name, value in budget.items() if value is not None},
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
            f"{_of_whom(gallery_like)}."
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
        f"{_of_whom(gallery_like)} (measured {bound.mean:.4f} on {bound.n:,} queries that took "
        f"no part in choosing)."
    )
    return Planned(best.plan, tested=tuple(tested), certificate=proof, sentence=said, **common)


def _of_whom(gallery_like: bool) -> str:
    return ", for queries like the gallery's rows" if gallery_like else ""


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


# --- the frontier -----------------------------------------------------------------------------


def _measure(
    trials: Trials,
    structures: list[str],
    resident_bytes: float | None,
    show_progress: bool,
) -> list[Measured]:
    n, full = len(trials.view.generation), trials.full
    dims = sorted({d for d in (32, 64, 128, 256, 512, 1024) if _SHORTEST <= d < full} | {full})
    tries: list[tuple[str, str | None, int]] = []  # structure, knob, dim
    for name in structures:
        if name == "exact" and n > _SCANNABLE:
            continue
        knob = next(iter(engine.STRUCTURES[name]), None)
        tries += [(name, knob, dim) for dim in dims if name != "graph" or dim * 4 >= full]
    found = []
    with progress("plans", len(tries), show=show_progress, unit="kinds") as advance:
        for name, knob, dim in tries:
            held = _resident(trials.view, name, dim)
            if resident_bytes is None or held <= resident_bytes:
                found += _widths(trials, name, knob, dim, held)
            advance(1)
    return found


def _widths(trials: Trials, name: str, knob: str | None, dim: int, held: float) -> list[Measured]:
    """Measure one structure on codes of one size, wider and wider until nothing is gained."""
    generation, k = trials.view.generation, trials.k
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

        def plan(keep: int, name: str = name, knobs: dict[str, int] = knobs) -> Plan:
            return Plan(Cascade([Stage(dim, keep, "int8"), Stage(trials.full, k)]), name, knobs)

        walk = trials.walk(plan(longest), longest)
        for keep in keeps:
            recall = float((walk.places < keep).mean())
            ms = walk.ms + keep * trials.ms_per_row
            found.append(Measured(plan(keep), recall, ms, held))
        best = found[-1].recall
        if (
            width >= most
            or best >= 0.9999
            or (best - before < 1e-4 and best > 0.9 and width > 8 * k)
        ):
            return found
        before, width = best, min(most, max(width + 1, round(width * _GROWTH)))


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
