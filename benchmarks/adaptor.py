"""What each size of frozen vectors is worth: every baseline and adaptor, every data set.

    python benchmarks/adaptor.py [--only scifact]

All vectors are all-MiniLM-L6-v2's. Adaptors are fitted on each set's own documents with the
defaults of nestvec; the supervised one also sees SciFact's *train* queries. `scifact_unseen` holds
those test queries none of whose relevant documents any training query names.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import _frame
import _sets
import numpy as np

import nestvec as nv
from nestvec.measurement import RetrievalTask, STSTask
from nestvec.measurement.bootstrap import resample
from nestvec.measurement.metrics import per_query

SEED = 0


def fitted(docs: nv.Embeddings, **more) -> tuple[nv.MatryoshkaAdaptor, float]:
    started = time.perf_counter()
    adaptor = nv.MatryoshkaAdaptor(random_state=SEED).fit(docs, **more)
    seconds = time.perf_counter() - started
    print(f"  fitted on {len(docs):,} in {seconds:.0f} s: {adaptor.guard_.sentence()}", flush=True)
    return adaptor, seconds


def measured(name: str, task, adaptors: dict, texts=None, baselines=True) -> list[dict]:
    curve = nv.measure(
        task=task,
        maps={key: adaptor for key, (adaptor, _) in adaptors.items()},
        texts=texts,
        baselines=baselines,
        dataset=name,
        seed=SEED,
    )
    print(curve.verdict(), flush=True)
    rows = []
    for full in curve.rows:
        row = {key: value for key, value in full.items() if key in _frame.KEYS}
        notes = [full["note"]] if full["note"] else []
        if full["difference"] is not None:
            low, high = full["difference_low"], full["difference_high"]
            notes.insert(
                0, f"difference to full {full['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
            )
        if row["method"] in adaptors:
            adaptor, seconds = adaptors[row["method"]]
            row["build_s"] = round(seconds, 1)
            notes.append(adaptor.guard_.sentence())
        row["note"] = "; ".join(notes)
        rows.append(row)
    return rows


def beside_rotation(found: _sets.Retrieval, adaptor: nv.MatryoshkaAdaptor) -> list[dict]:
    """The adaptor minus the principal rotation at each size, with its paired interval."""
    rotation = nv.PrincipalRotation().fit(found.docs)
    ids = found.queries.ids.tolist()
    values = []
    for fitted in (rotation, adaptor):
        docs, queries = fitted.transform(found.docs), fitted.transform(found.queries)
        for dim in adaptor.dims_:
            ranked = nv.cascade_search(queries, docs, f"{dim}@10").ids.tolist()
            values.append(per_query(ranked, ids, found.qrels, ["nDCG@10"])["nDCG@10"])
    half = len(adaptor.dims_)
    estimate = resample(np.array(values[half:]) - np.array(values[:half]), seed=SEED)
    return [
        {
            "dataset": found.name,
            "method": "adaptor_unsupervised",
            "dim": dim,
            "precision": "float32",
            "metric": "nDCG@10 minus principal_rotation",
            "value": value,
            "low": low,
            "high": high,
            "n": len(ids),
            "seed": SEED,
        }
        for dim, value, low, high in zip(
            adaptor.dims_, estimate.value, *estimate.interval(), strict=True
        )
    ]


def retrieval(name: str) -> list[dict]:
    found = _sets.retrieval(name)
    adaptors = {"adaptor_unsupervised": fitted(found.docs)}
    task = RetrievalTask(found.docs, found.queries, found.qrels, dropped=found.dropped)
    beside = beside_rotation(found, adaptors["adaptor_unsupervised"][0])
    if name != "scifact":
        return measured(name, task, adaptors, texts=found.texts) + beside
    train = _sets.retrieval(name, "train")
    supervised = fitted(found.docs, queries=train.queries, qrels=train.qrels)
    adaptors["adaptor_supervised"] = supervised
    rows = measured(name, task, adaptors, texts=found.texts) + beside
    unseen = _sets.unseen_evidence(found.queries, found.qrels, train.qrels)
    qrels = {query: found.qrels[query] for query in unseen.ids.tolist()}
    return rows + measured(
        "scifact_unseen",
        replace(task, queries=unseen, qrels=qrels),
        adaptors,
        baselines=("truncation", "principal_rotation"),
    )


def sts() -> list[dict]:
    train = _sets.stsb("train")
    first, second, scores = _sets.stsb("test")
    sides = np.concatenate([train[0].array, train[1].array])
    sides = np.unique(sides, axis=0)
    docs = nv.Embeddings(sides, first.space)
    return measured("stsb", STSTask(first, second, scores), {"adaptor_unsupervised": fitted(docs)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="one data set; nothing is written")
    only = parser.parse_args().only
    meta = _frame.meta(seeds=[SEED], data=[*_sets.RETRIEVAL, "stsb"], model=_sets.MODEL)
    rows = []
    for name in (*_sets.RETRIEVAL, "stsb"):
        if only in (None, name):
            print(name, flush=True)
            rows += sts() if name == "stsb" else retrieval(name)
    if only is None:
        _frame.write("adaptor", rows, meta)


if __name__ == "__main__":
    main()
