"""Does a certified plan hold on fresh queries, and what does the certificate cost?

    python benchmarks/planner.py [--galleries docs,captions,...] [--seeds 20]
    python benchmarks/planner.py --try      (a small gallery and few queries; nothing is written)

Of each gallery structures are built once, and a pool of queries is walked once. Each seed draws
from the pool queries to choose by, others to certify with, and fresh ones; `planner.find` is the
real one. A case is good if the plan holds on the fresh queries and costs at most 1.3 times the
cheapest plan on the frontier that holds on them; none at all is never good, as exact search holds.
Beside each stands what the cheapest plan costs that some bound can certify in half of all draws.
Costs are compared by times of their own, taken when all is planned, by other queries than the
planner's times; all are processor time. A gallery's cases are kept, so that a run that was
interrupted goes on.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _frame
import _galleries
import _sets
import numpy as np

import nestvec as nv
from nestvec.search import planner, trials
from nestvec.search.engine import STRUCTURES
from nestvec.search.exact import top_k

NAME = "planner"
K = 10
CONFIDENCE = 0.95
TARGETS = (0.95, 0.99)
CHOOSING, CERTIFYING, FRESH = 1000, (1000, 4000), 5000  # the second where the pool has as many
POOL = 10_000
BARS = {"share": 0.95, "ratio": 1.3}

Rows = np.ndarray  # (n, dim) float32, L2-normalised


def docs() -> tuple[Rows, Rows]:
    """Passages of the set of that name; more of them ask."""
    found = _galleries.docs()
    more = POOL - len(found.queries)
    return found.vectors[more:], np.concatenate([found.queries, found.vectors[:more]])


def captions() -> tuple[Rows, Rows]:
    """Short texts: captions of photos, asked for by captions of other photos."""
    path = _frame.data_folder() / "multi30k_captions/train.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        photos = [json.loads(line)["captions"] for line in file]
    asked = list(dict.fromkeys(photo[0] for photo in photos[:9000]))
    texts = dict.fromkeys(text for photo in photos[9000:] for text in photo[:2])
    texts = [text for text in texts if text not in {*asked}][:30_000]
    rows = _sets.embed(
        "planner-captions", [*asked, *texts], [str(i) for i in range(len(asked) + len(texts))],
        "document",
    ).array  # fmt: skip
    return rows[len(asked) :], rows[: len(asked)]


def between(n: int = 300_000, dim: int = 256) -> tuple[Rows, Rows]:
    """Points between neighbours as in `_galleries.real1m`, fewer; passages ask."""
    vectors, queries = (_unit(rows[:, :dim]) for rows in docs())
    rng = np.random.default_rng(1)
    near = top_k(vectors, vectors, K + 1)[0][:, 1:]
    spread, parts = vectors.std(axis=0), []
    for start in range(0, n, 50_000):
        m = min(50_000, n - start)
        first = rng.integers(len(vectors), size=m)
        second = near[first, rng.integers(K, size=m)]
        share = rng.random((m, 1), dtype=np.float32)
        noise = rng.standard_normal((m, dim), dtype=np.float32) * spread
        parts.append(_unit((1 - share) * vectors[first] + share * vectors[second] + 0.35 * noise))
    return np.concatenate(parts), queries


def clusters(n: int = 300_000, dim: int = 256, n_queries: int = POOL) -> tuple[Rows, Rows]:
    """Clusters as in `_galleries.clusters`, fewer; points beside them ask, more."""
    found = _galleries.clusters(n, dim, name="planner-clusters")
    rng = np.random.default_rng(3)
    spread = (np.arange(1, dim + 1) ** -0.5).astype(np.float32)
    chosen = found.vectors[rng.choice(n, n_queries, replace=False)]
    noise = rng.standard_normal(chosen.shape, dtype=np.float32) * spread / np.linalg.norm(spread)
    return found.vectors, _unit(chosen + 0.3 * noise)


def _unit(rows: Rows) -> Rows:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


GALLERIES: dict[str, Callable[[], tuple[Rows, Rows]]] = {
    "docs": docs,
    "captions": captions,
    "real300k": between,
    "syn300k": clusters,
    "try": lambda: clusters(20_000, 64, 4000),
}


def pool_of(name: str) -> trials.Trials:
    """Return the pool of a gallery's queries, over an index that is made once."""
    place = _frame.cache_folder(NAME) / f"{name}.nest"
    vectors, queries = GALLERIES[name]()
    if not (place / "done").is_file():
        shutil.rmtree(place, ignore_errors=True)
        space = nv.Space.declared(name, dim=vectors.shape[1], nesting_dims=(vectors.shape[1],))
        rows = nv.Embeddings(np.ascontiguousarray(vectors), space)
        index = nv.Index.create(place, rows, durability="process", show_progress=True)
        index.build("graph", "lists")
        (place / "done").touch()
    index = nv.Index.open(place)
    return trials.draw(
        index._home.view(),
        np.ascontiguousarray(queries),
        k=K,
        n=len(queries),
        seed=0,
        show_progress=True,
        clock=time.process_time,
    )


def provable_from(target: float, n: int) -> float:
    """Return the mean recall below which no bound certifies a target in half of all draws.

    A law for every bound that assumes nothing of how recall is distributed. Replace each recall by
    0 with probability ``q = 1 - target / mean``: the mean is the target, so the bound may certify
    that in alpha of all draws at most; but ``n`` draws show no such 0 with probability
    ``(1 - q)**n``, and are certified then as often as before.
    """
    return target * (0.5 / (1 - CONFIDENCE)) ** (1 / n)


def case(pool: trials.Trials, seed: int, target: float, drawn: tuple[int, ...]) -> dict[str, Any]:
    """Plan with the queries of one seed; judge by its fresh ones."""
    order = np.random.default_rng(seed).permutation(len(pool))[: sum(drawn)]
    choosing, certifying, fresh = map(pool.subset, np.split(order, np.cumsum(drawn)[:-1]))
    found = planner.find(
        choosing,
        certifying,
        recall=target,
        ms=None,
        resident_bytes=None,
        structures=STRUCTURES,
        confidence=CONFIDENCE,
        seed=seed,
    )
    recall = {one.plan: float(fresh.recall(one.plan).mean()) for one in found.frontier}
    reached = None if found.plan is None else recall[found.plan]
    least = provable_from(target, drawn[1])
    return {
        "seed": seed,
        "target": target,
        "n_certifying": drawn[1],
        "said": found.sentence,
        "plan": found.plan,
        "recall": reached,
        "held": reached is not None and reached >= target,
        "holding": [plan for plan, mean in recall.items() if mean >= target],
        "provable": [plan for plan, mean in recall.items() if mean >= least],
    }


def priced(pool: trials.Trials, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the cases with their cost ratios, by times that no planner saw."""
    again = pool._apart(np.arange(len(pool))[::-1])  # what was measured of the pool is not known
    asked = {plan for row in rows for of in ("holding", "provable") for plan in row[of]}
    plans = sorted(asked | {row["plan"] for row in rows if row["plan"] is not None}, key=str)
    ms = dict(zip(plans, again.times(plans), strict=True))
    found = []
    for row in rows:
        plan = row.pop("plan")
        least, provable = (
            min((ms[one] for one in row.pop(of)), default=None) for of in ("holding", "provable")
        )
        ratio = None if plan is None or least is None else ms[plan] / least
        best = None if provable is None or least is None else provable / least
        good = row["held"] and ratio is not None and ratio <= BARS["ratio"]
        found.append(
            {**row, "plan": plan and str(plan), "ratio": ratio, "best": best, "good": good}
        )
    return found


def cases(name: str, n_seeds: int, draws: list[tuple[int, ...]]) -> list[dict[str, Any]]:
    """All cases of a gallery, in this process; more queries than the pool has are not drawn."""
    started = time.perf_counter()
    pool, rows = pool_of(name), []
    for drawn in [one for one in draws if sum(one) <= len(pool)]:
        for seed in range(n_seeds):
            for target in TARGETS:
                row = case(pool, seed, target, drawn)
                rows.append(row)
                said = f"{row['recall']:.4f} {row['plan']}" if row["plan"] else row["said"]
                word = "held" if row["held"] else "MISS"
                print(
                    f"  {name} {drawn[1]} {seed} {target} {word} {said} "
                    f"({time.perf_counter() - started:.0f} s)",
                    file=sys.stderr,
                    flush=True,
                )
    return priced(pool, rows)


def kept(name: str, n_seeds: int) -> list[dict[str, Any]]:
    """The cases of a gallery, from the cache or from a process of its own."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for file in sorted((_frame.ROOT / "src/nestvec/search").rglob("*.py")):
        digest.update(file.read_bytes())
    file = _frame.cache_folder(NAME) / f"{name}-{n_seeds}-{digest.hexdigest()[:10]}.json"
    if not file.is_file():
        command = [sys.executable, __file__, "--gallery", name, "--seeds", str(n_seeds)]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # or processor time counts waiting ones
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=one_thread)
        if done.returncode:
            sys.exit(f"{name} failed: {done.returncode}")
        file.write_text(done.stdout.splitlines()[-1])
    return json.loads(file.read_text())


def summary(
    name: str, target: float | None, n_certifying: int, found: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return one row of the result file."""
    ratios = [one["ratio"] for one in found if one["held"]]
    best = np.array([one["best"] for one in found if one["best"] is not None])
    spread = f"cost ratio {min(ratios):.2f} to {max(ratios):.2f} of those; " if ratios else ""
    none = sum(one["plan"] is None for one in found)
    within = (best <= BARS["ratio"]).sum()
    able = f"some bound proves in half of all draws: median {np.median(best):.2f}, {within} within"
    return {
        "dataset": name,
        "method": "certified_plan",
        "metric": f"share of cases in which recall@{K} holds at {BARS['ratio']}x the cost or less",
        "value": float(np.mean([one["good"] for one in found])),
        "n": len(found),
        "n_certifying": n_certifying,
        "held": sum(one["held"] for one in found),
        **({} if target is None else {"target_recall": target}),
        **({"ratio": float(np.median(ratios))} if ratios else {}),
        "ratio_to": "cheapest_plan_that_holds",
        "note": f"held {sum(one['held'] for one in found)}; {spread}no plan {none}; {able}",
    }


def summaries(name: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a gallery's rows: one a number of certifying queries and target."""
    rows = []
    for n in CERTIFYING:
        for target in TARGETS:
            some = [one for one in found if (one["n_certifying"], one["target"]) == (n, target)]
            rows += [summary(name, target, n, some)] if some else []
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--galleries", default="docs,captions,real300k,syn300k")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--try", dest="small", action="store_true")
    parser.add_argument("--gallery", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.gallery:
        draws = [(CHOOSING, n, FRESH) for n in CERTIFYING]
        print(json.dumps(cases(asked.gallery, asked.seeds, draws)))
        return
    if asked.small:
        found = cases("try", 3, [(500, 1000, 2000)])
        for row in summaries("try", found):
            print(row)
        return
    meta = _frame.meta(
        seeds=list(range(asked.seeds)),
        data=["20newsgroups/train.jsonl.gz", "multi30k_captions/train.jsonl.gz"],
        question=__doc__.splitlines()[0],
        bars=BARS,
        confidence=CONFIDENCE,
        queries={"choosing": CHOOSING, "certifying": CERTIFYING, "fresh": FRESH},
    )
    rows, everything = [], []
    for name in asked.galleries.split(","):
        found = kept(name, asked.seeds)
        everything += found
        rows += summaries(name, found)
    rows += summaries("all", everything)
    first = [one for one in everything if one["n_certifying"] == CERTIFYING[0]]
    rows.append(summary("all", None, CERTIFYING[0], first))
    _frame.write(NAME, rows, meta)


if __name__ == "__main__":
    main()
