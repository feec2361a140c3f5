"""Two stages against exact full-size search, where labels say what a good answer is.

    python benchmarks/passages.py

50,000 passages (`_galleries.docs`), summary lines of docstrings as queries. Half of the queries
choose a plan whose nDCG@10 is within 0.005 of exact search, certified (`Index.plan`); the other
half is scored. One query a call, one thread: faiss' flat index and our exact plan beside it, in
turns. ``note`` has the bytes of vectors, codes and links that a query reads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import _frame
import _galleries
import faiss
import numpy as np

import nestvec as nv
from nestvec.measurement.bootstrap import resample
from nestvec.measurement.metrics import per_query
from nestvec.search import kernels

NAME = "passages"
METRIC = "nDCG@10"
LOSS = 0.005
TURNS = 5


def seconds(search: Callable[[Any], Any], queries: np.ndarray, most: int) -> float:
    """Processor seconds a query."""
    started = time.process_time()
    for row in range(min(most, len(queries))):
        search(queries[row : row + 1])
    return (time.process_time() - started) / min(most, len(queries))


def bytes_read(index: nv.Index, plan: Any, queries: np.ndarray) -> float:
    """Bytes of rows that a query reads under a graph or lists, on average."""
    generation = index._home.view().generation
    first, *rest = plan.cascade.stages
    n = len(generation)
    reranked = sum(4 * stage.dim for stage in rest) * first.keep
    if plan.structure == "lists":
        lists = generation.lists()
        width = generation.listed(first.dim).values.shape[1]
        probes = np.empty((200, int(plan.knobs["probes"])), np.int32)
        asked, scores = lists.means.queries(queries[:200]), np.empty_like(probes)
        kernels.scan(lists.means.values, asked, np.empty(0, np.bool_), scores, probes)
        met = np.diff(lists.starts)[probes].sum(axis=1).mean()
        return lists.means.values.nbytes + met * (width + 4) + reranked
    if plan.structure == "exact":
        return n * generation.codes(first.dim).values.shape[1] + reranked
    graph, codes = generation.graph(), generation.codes(first.dim)
    read = []
    for row in range(200):
        graph.search(codes, codes.queries(queries[row : row + 1]), int(plan.knobs["ef"]))
        marks, clock = graph._scratches[-1][:2]
        met = marks == clock[0]
        # A row whose links were read has met all its neighbours; some that were not read have too.
        expanded = np.where(graph.links >= 0, met[graph.links], True).all(axis=1) & met
        read.append(met.sum() * codes.values.shape[1] + expanded.sum() * graph.links.itemsize * 64)
    return float(np.mean(read)) + reranked


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    meta = _frame.meta(seeds=[0], data=("20newsgroups",))
    gallery = _galleries.docs()
    asked, answers = _galleries.docs_asked()
    half = len(asked) // 2
    n, dim = gallery.vectors.shape
    place = _frame.cache_folder(NAME) / "docs.nest"
    space = nv.Space.declared("docs", dim=dim)
    if place.is_dir():
        index = nv.Index.open(place)
    else:
        index = nv.Index.create(place, nv.Embeddings(gallery.vectors, space))
    names = [str(line) for line in range(len(asked))]
    qrels = dict(zip(names, answers, strict=True))
    choosing = nv.Embeddings(asked[:half], space, ids=np.array(names[:half]))
    planned = index.plan(choosing, qrels=qrels, ndcg_loss=LOSS, n_queries=half)
    print(planned.table(), planned, sep="\n", flush=True)
    assert planned.plan is not None, planned.sentence
    plan = planned.plan

    faiss.omp_set_num_threads(1)
    flat = faiss.IndexFlatIP(dim)
    flat.add(gallery.vectors)
    scored = asked[half:]
    full = nv.Plan.parse(f"exact {dim}@10")
    contenders: dict[str, Callable[[Any], Any]] = {
        "faiss_flat": lambda some: flat.search(some, 10)[1],
        f"cascade:{plan}": lambda some: index.search(some, plan=plan, threads=1).ids,
        "full": lambda some: index.search(some, plan=full, threads=1).ids,
    }
    rankings = [search(scored).astype(str).tolist() for search in contenders.values()]
    values = np.array([per_query(r, names[half:], qrels, [METRIC])[METRIC] for r in rankings])
    estimate = resample(values, seed=0)
    low, high = estimate.interval()
    difference, diff_low, diff_high = estimate.difference(to=0)
    took: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(TURNS + 1):
        for name, search in contenders.items():
            found = seconds(search, scored, 2000 if name.startswith("cascade") else 200)
            if turn:
                took[name].append(found)
    rows = []
    for at, name in enumerate(contenders):
        read = bytes_read(index, plan, scored) if name.startswith("cascade") else 4.0 * n * dim
        base, ours = (np.array(took[one]) for one in ("faiss_flat", name))
        kept = [np.isin(a, b).mean() for a, b in zip(rankings[0], rankings[at], strict=True)]
        rows.append(
            {
                "dataset": "docs",
                "method": name,
                "metric": METRIC,
                "value": estimate.value[at],
                "low": low[at],
                "high": high[at],
                "n": len(scored),
                "seed": 0,
                "threads": 1,
                "recall": float(np.mean(kept)),
                "qps": round(1 / float(np.median(ours)), 1),
                "ratio": float(np.median(base / ours)),
                "ratio_to": "faiss_flat",
                "note": f"{read:,.0f} bytes read a query, {4 * n * dim / read:.1f}x fewer than "
                f"all vectors; difference {difference[at]:+.4f} "
                f"[{diff_low[at]:+.4f}, {diff_high[at]:+.4f}]",
            }
        )
        print(rows[-1], flush=True)
    _frame.write(NAME, rows, meta)


if __name__ == "__main__":
    main()
