"""What a cascade loses and saves against exact full-size search, per data set and per map.

    python benchmarks/cascade.py

``recall`` is the share of the exact full-size top 10 that the cascade returns, ``ratio`` its
multiply-adds over those of the exact search, ``low`` and ``high`` the 95% interval of nDCG@10; the
note holds the paired difference to exact full-size search with its interval.
"""

from __future__ import annotations

import _frame
import _sets
import numpy as np

import nestvec as nv
from nestvec.measurement.bootstrap import resample
from nestvec.measurement.metrics import per_query

SEED = 0
METRIC = "nDCG@10"
FULL = "384@10"
CASCADES = (
    "32@200 > 384@10",
    "64@100 > 384@10",
    "128@50 > 384@10",
    "64:int8@100 > 384@10",
    "384:binary@100 > 384@10",
    str(nv.Cascade.funnel((32, 64, 128, 256, 384), shortlist=200, k=10)),
)


def rows_of(found: _sets.Retrieval, vectors: str, docs, queries) -> list[dict]:
    plans = (FULL, *CASCADES)
    results = [nv.cascade_search(queries, docs, plan, allow_untrained=True) for plan in plans]
    query_ids = queries.ids.tolist()
    values = np.array(
        [per_query(r.ids.tolist(), query_ids, found.qrels, [METRIC])[METRIC] for r in results]
    )
    estimate = resample(values, seed=SEED)
    low, high = estimate.interval()
    difference, diff_low, diff_high = estimate.difference(to=0)
    rows = []
    for at, (plan, result) in enumerate(zip(plans, results, strict=True)):
        kept = [np.isin(a, b).mean() for a, b in zip(results[0].rows, result.rows, strict=True)]
        macs = result.macs_per_query
        rows.append(
            {
                "dataset": found.name,
                "method": "full" if plan == FULL else f"cascade:{plan}",
                "metric": METRIC,
                "value": estimate.value[at],
                "low": low[at],
                "high": high[at],
                "n": len(query_ids),
                "seed": SEED,
                "macs_per_query": macs,
                "recall": float(np.mean(kept)),
                "ratio": macs / results[0].macs_per_query,
                "ratio_to": "full",
                "note": f"{vectors}; difference to full {difference[at]:+.4f} "
                f"[{diff_low[at]:+.4f}, {diff_high[at]:+.4f}]",
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    meta = _frame.meta(seeds=[SEED], data=_sets.RETRIEVAL, model=_sets.MODEL)
    rows = []
    for name in _sets.RETRIEVAL:
        found = _sets.retrieval(name)
        maps = {
            "truncation": None,
            "principal_rotation": nv.PrincipalRotation().fit(found.docs),
            "adaptor_unsupervised": nv.MatryoshkaAdaptor(random_state=SEED).fit(found.docs),
        }
        for vectors, fitted in maps.items():
            docs, queries = found.docs, found.queries
            if fitted is not None:
                docs, queries = fitted.transform(docs), fitted.transform(queries)
            rows += rows_of(found, vectors, docs, queries)
    _frame.write("cascade", rows, meta)


if __name__ == "__main__":
    main()
