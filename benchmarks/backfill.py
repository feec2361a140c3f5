"""How good is a gallery that is partly upgraded, and how much of the gain comes how early?

    python benchmarks/backfill.py [--pairs cut3:minilm,minilm:finetuned] [--sets scifact,npl]
        [--seeds 0,1,2] [--try]

An index of a weaker model's vectors is upgraded to a better one by `nestvec.upgrade.Upgrade`: a
bridge from a tenth of the rows, then rows are re-embedded in steps of 10%, in each order; the
bridge is learned again on the way, but where "first bridge" is said. After each step the new
model's queries search the index as it is. Three figures:

* nDCG@10, all queries of the test split alike;
* nDCG@10 by traffic: queries are asked with a frequency of 1/rank, in an order drawn by seed, and
  count as often as they are asked. A log of 2,000 of them is what the order "queries" goes by, and
  what the index returned for each before the backfill is what "traffic" goes by;
* recall@10: the share of what full re-embedding finds.

The encoders and their vectors are those of `_encoders`, which `benchmarks/bridge.py` fills, best on
a GPU): all-MiniLM-L6-v2 left after layer 3 of its 6, upgraded to all of it; and that, upgraded to
itself trained on SciFact. No step encodes again.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _encoders
import _frame
import numpy as np

import nestvec as nv
from nestvec.measurement.bootstrap import Estimate, resample
from nestvec.measurement.metrics import per_query
from nestvec.upgrade import Upgrade
from nestvec.upgrade.order import ORDERS, count_ids

NAME = "backfill"
QUESTION = "How good is a gallery that is partly upgraded, in each order?"
STEPS = 10
LOGGED = 2000  # queries
FIRST = ", first bridge"  # it stays
WAYS = (
    "queries",
    "traffic",
    *ORDERS[1:],
    *(f"{one}{FIRST}" for one in ("queries", "traffic", "random")),
)
K = 10
METRICS = ("nDCG@10", "nDCG@10 by traffic", "recall@10")


@dataclass(frozen=True)
class Case:
    """One set by two encoders."""

    name: str
    pair: str
    old: dict[str, nv.Embeddings]
    new: dict[str, nv.Embeddings]
    qrels: dict[str, dict[str, int]]

    @classmethod
    def read(cls, name: str, pair: str) -> Case:
        """Read the vectors that were kept."""
        old, new = pair.split(":")
        return cls(
            name,
            f"{old} -> {new}",
            _encoders.vectors(old, name),
            _encoders.vectors(new, name),
            _encoders.texts(name).qrels["test"],
        )


def zipf(n: int, rng: np.random.Generator) -> np.ndarray:
    """Return how often each query is asked, (n,), in all 1."""
    shares = 1 / (1 + rng.permutation(n))
    return shares / shares.sum()


class Upgraded:
    """One set, one seed: an index, its queries, and what is measured on it."""

    def __init__(self, case: Case, seed: int, place: Path) -> None:
        self.case, self.seed, self.place = case, seed, place
        self.rng = np.random.default_rng([seed, 1])
        docs = case.new["docs"]
        asked = [i for i, q in enumerate(case.new["test"].ids.tolist()) if case.qrels.get(q)]
        self.asks = case.new["test"][np.array(asked)]
        self.often = zipf(len(self.asks), self.rng)
        full = self.asks.array @ docs.array.T
        self.best = docs.ids[np.argsort(-full, axis=1, kind="stable")[:, :K]]
        shutil.rmtree(place, ignore_errors=True)
        self.begun = place / "begun.nest"
        nv.Index.create(self.begun, case.old["docs"], durability="process")
        n = len(docs) // STEPS
        self.sample = docs[np.sort(self.rng.permutation(len(docs))[:n])]

    def values(self, index: nv.Index) -> np.ndarray:
        """Return nDCG@10 and the recall of full re-embedding's ten, (2, n_queries)."""
        hits = index.search(self.asks, K)
        names = self.asks.ids.tolist()
        ndcg = per_query(hits.ids.tolist(), names, self.case.qrels, ["nDCG@10"])["nDCG@10"]
        kept = [np.isin(a, b).mean() for a, b in zip(self.best, hits.ids, strict=True)]
        return np.array([ndcg, kept])

    def run(self) -> dict[str, list[np.ndarray]]:
        """Return for each order what the index is worth, step by step."""
        empty = self._copy("empty")
        none = Upgrade.start(empty, self.sample, version=0)  # none of the sample counts as done
        at_0 = self.values(none.index)
        Upgrade.start(self.begun, self.sample)  # the same bridge
        logged = np.random.default_rng([self.seed, 2]).choice(len(self.asks), LOGGED, p=self.often)
        returned = none.index.search(self.asks, K).ids[logged]
        traffic = count_ids(returned.ravel().tolist())
        given: dict[str, dict[str, Any]] = {
            "queries": {
                "order": "traffic",
                "queries": nv.Embeddings(self.asks.array[logged], self.asks.space),
            },
            "traffic": {"order": "traffic", "traffic": traffic},
        }
        found = {}
        for order in WAYS:
            by = order.removesuffix(FIRST)
            upgrade = Upgrade.open(self._copy(order))
            steps = [at_0]
            n = upgrade.status().rows
            for step in range(1, STEPS + 1):
                wanted = round(n * step / STEPS) if step < STEPS else n
                more = wanted - upgrade.status().done
                if more > 0:
                    upgrade.backfill(
                        self.case.new["docs"],
                        **given.get(by, {"order": by}),
                        learn=not order.endswith(FIRST),
                        max_rows=more,
                        seed=self.seed,
                    )
                steps.append(self.values(upgrade.index))
            found[order] = steps
        shutil.rmtree(self.place)
        return found

    def _copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.begun, self.place / f"{name}.nest"))


def measured(name: str, pair: str, seeds: list[int]) -> list[dict[str, Any]]:
    """Return the rows of one set and pair: steps of each order, over all seeds."""
    case = Case.read(name, pair)
    runs = []
    for seed in seeds:
        place = _frame.cache_folder(f"{NAME}-{name}-{pair.replace(':', '-')}-{seed}")
        one = Upgraded(case, seed, place)
        runs.append((one, one.run()))
        print(f"{name} {pair} seed {seed}", flush=True)
    asked = runs[0][0].asks.ids.tolist()
    old_asks, docs = case.old["test"], case.old["docs"]
    scores = old_asks.array[old_asks.rows_of(asked)] @ docs.array.T
    ranked = docs.ids[np.argsort(-scores, axis=1, kind="stable")[:, :K]]
    old_old = per_query(ranked.tolist(), asked, case.qrels, ["nDCG@10"])["nDCG@10"]
    rows = [
        {
            "dataset": name,
            "pair": case.pair,
            "method": "old queries on the old gallery",
            "metric": "nDCG@10",
            "value": float(old_old.mean()),
            "n": len(asked),
        }
    ]
    for order in WAYS:
        rows += steps_of(order, [(one, by_order[order]) for one, by_order in runs])
    return rows


def steps_of(order: str, runs: list[tuple[Upgraded, list[Any]]]) -> list[dict[str, Any]]:
    """Return the rows of one order: each step's figures, and what they come to."""
    first = runs[0][0]
    n_asks = len(first.asks)
    head = {
        "dataset": first.case.name,
        "pair": first.case.pair,
        "order": order,
        "n": n_asks * len(runs),
        "n_pairs": len(first.sample),
    }
    rows = []
    for metric in METRICS:
        # (steps, seeds * queries): a value a query, as often as it counts
        weights = np.concatenate(
            [
                one.often * n_asks if metric == "nDCG@10 by traffic" else np.ones(n_asks)
                for one, _ in runs
            ]
        )
        values = np.array(
            [
                np.concatenate([steps[step][int(metric == "recall@10")] for _, steps in runs])
                for step in range(STEPS + 1)
            ]
        )
        found = resample(values * weights, seed=0)
        low, high = found.interval()
        for step in range(STEPS + 1):
            rows.append(
                {
                    **head,
                    "method": "partial backfill",
                    "metric": metric,
                    "share_backfilled": step / STEPS,
                    "value": float(found.value[step]),
                    "low": float(low[step]),
                    "high": float(high[step]),
                }
            )
        rows += come_to(head, metric, found)
    return rows


def come_to(head: dict[str, Any], metric: str, found: Estimate) -> list[dict[str, Any]]:
    """Return where 90% of the gain is reached, and how far any step falls below the one before."""
    value = found.value
    gain = value[-1] - value[0]
    reached = np.flatnonzero(value - value[0] >= 0.9 * gain) / STEPS
    falls = value[1:] - value[:-1]
    worst = int(falls.argmin())
    draws = found.draws[:, worst + 1] - found.draws[:, worst]
    low, high = np.percentile(draws, [2.5, 97.5])
    return [
        {
            **head,
            "method": "first step with 90% of the gain",
            "metric": metric,
            "value": float(reached[0]),
            "share": float((value[STEPS // 2] - value[0]) / gain) if gain else 0.0,
            "note": f"gain {gain:.4f} from 0 to 100%; share: of the gain, with half of the rows",
        },
        {
            **head,
            "method": "smallest change in a step",
            "metric": metric,
            "value": float(falls[worst]),
            "low": float(low),
            "high": float(high),
            "note": f"from {10 * worst}% to {10 * worst + 10}%; monotone within noise if high >= 0",
        },
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--pairs", default="cut3:minilm,minilm:finetuned")
    parser.add_argument("--sets", default="scifact,npl")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--try", dest="trial", action="store_true", help="one seed, no result file")
    asked = parser.parse_args()
    sets = asked.sets.split(",")
    seeds = [0] if asked.trial else [int(seed) for seed in asked.seeds.split(",")]
    meta = _frame.meta(seeds=seeds, data=sets, question=QUESTION, trained_on=_encoders.MADE_ON)
    pairs = asked.pairs.split(",")
    rows = [row for name in sets for pair in pairs for row in measured(name, pair, seeds)]
    for row in rows:
        said = [row.get(key, "") for key in ("dataset", "pair", "order", "method", "metric")]
        print(*said, row.get("share_backfilled", ""), f"{row['value']:.4f}", row.get("share", ""))
    if not asked.trial:
        _frame.write(NAME, rows, meta)


if __name__ == "__main__":
    main()
