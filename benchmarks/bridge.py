"""What a bridge between two frozen models keeps of full re-embedding.

    python benchmarks/bridge.py [--sets scifact] [--device cuda --vectors-only] [--try]

Queries of the new model search the gallery of the old one, through every bridge, fitted on 250,
1,000 and 4,000 texts that both have encoded: documents of the set itself, then of the other sets,
never its test queries. Beside it: old queries on the old gallery (``old``), new queries without a
bridge (``unchanged``), and the whole gallery embedded again (``full``), of which ``share`` is the
share. ``upgrade.fit`` is the bridge it chooses, ``:new`` and ``:old`` with one model as its teacher
in place of both; ``gallery:`` moves the gallery instead.

Vectors are made where there is a GPU (``--vectors-only --device cuda``: some trainings and 70,000
texts, some minutes) and kept in ``.cache/benchmarks/encoders``; all else needs none.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import _encoders
import _frame
import numpy as np

import nestvec as nv
from nestvec.maps import RelaxedBridge, anchor_maps
from nestvec.measurement import RetrievalTask
from nestvec.measurement.bootstrap import resample
from nestvec.upgrade import BRIDGES

SETS = ("scifact", "npl", "cisi", "20newsgroups")
NEW = ("finetuned", "headed", "cut3", "other", "lsa300")
N_PAIRS = (250, 1000, 4000)
METRICS = ("nDCG@10", "R@10")
NESTED = (64, 128, 256)
CHOICES = ("upgrade.fit", "upgrade.fit:new", "upgrade.fit:old")

memory = _frame.memory("maps", "upgrade")


@memory.cache
def values(old: str, new: str, name: str, method: str, n: int) -> dict[str, Any]:
    """One value a test query and metric for one way to ask; fit seconds and a sentence."""
    before, after = (_encoders.vectors(encoder, name) for encoder in (old, new))
    docs, asks = before["docs"], after["test"]
    kind, _, more = method.partition("+")
    dim, seconds, note = None, 0.0, ""
    if kind == "old":
        asks = before["test"]
    elif kind == "full":
        docs = after["docs"]
    else:
        sample = _encoders.pairs(old, new, name, n, queries=more == "queries")
        started = time.perf_counter()
        if kind == "anchors":
            to_old, to_new = anchor_maps(*sample, n_anchors=384)
            docs, asks = to_old.transform(docs), to_new.transform(asks)
        elif kind.startswith("nested"):
            bridge = RelaxedBridge(dims=NESTED, nested=True).fit(*sample[::-1])
            dim = int(kind.partition("@")[2])
            asks = bridge.transform(asks.prefix(dim) if dim < bridge.n_features_in_ else asks)
        elif kind == "gallery:upgrade.fit":
            bridge = nv.upgrade.fit(old=sample[0], new=sample[1], sample_size=None, moves="gallery")
            docs, note = bridge.transform(docs), bridge.guard_.sentence()
        else:
            chosen, _, teacher = kind.partition(":")
            bridge = nv.upgrade.fit(
                old=sample[0],
                new=sample[1],
                sample_size=None,
                kinds=None if chosen == "upgrade.fit" else [chosen],
                teacher=teacher or "both",
            )
            asks, note = bridge.transform(asks), bridge.guard_.sentence()
        seconds = time.perf_counter() - started
    if dim is not None:
        docs = docs.prefix(dim)
    task = RetrievalTask(docs, asks, _encoders.texts(name).qrels["test"], metrics=METRICS)
    found = task.score(task.asking.normalised().array, docs.normalised().array)
    return {**found, "seconds": seconds, "note": note if "upgrade.fit" in method else ""}


def ways(old: str, new: str, name: str) -> list[tuple[str, int]]:
    """Which (method, pairs) are asked of a pair of encoders on a set."""
    same = _encoders.vectors(old, name)["docs"].dim == _encoders.vectors(new, name)["docs"].dim
    found = [("old", 0), ("full", 0)]
    forward = old == "minilm"
    for n in N_PAIRS if forward else (1000,):
        for kind in BRIDGES:
            if (
                (kind in ("unchanged", "drift") and not same)
                or (kind == "unchanged" and n != 1000)
                or (kind == "residual" and not forward)
            ):
                continue
            found.append((kind, n))
        found.append(("anchors", n))
    found += [(choice, 1000) for choice in CHOICES]
    if forward:
        found += [("gallery:upgrade.fit", 1000)]
    if forward and same:
        found += [(f"nested@{dim}", 1000) for dim in (*NESTED, 384)]
    if name == "scifact" and forward:
        found += [("drift+queries", 1000)] if same else []
        found += [("relaxed+queries", 1000), ("upgrade.fit+queries", 1000)]
    return found


def rows_of(old: str, new: str, name: str) -> list[dict[str, Any]]:
    full = values(old, new, name, "full", 0)
    rows = []
    for method, n in ways(old, new, name):
        found = values(old, new, name, method, n)
        for metric in METRICS:
            estimate = resample(np.stack([found[metric], full[metric]]), seed=0)
            low, high = estimate.interval()
            share = estimate.value[0] / estimate.value[1]
            row = {
                "pair": f"{old} -> {new}",
                "dataset": name,
                "method": method,
                "n_pairs": n or None,
                "metric": metric,
                "value": float(estimate.value[0]),
                "low": float(low[0]),
                "high": float(high[0]),
                "share": float(share),
                "n": len(found[metric]),
                "seed": _encoders.SEED,
                "note": found["note"],
            }
            if found["seconds"]:
                row["build_s"] = round(found["seconds"], 2)
            if "@" in method:
                row["dim"] = int(method.partition("@")[2])
            rows.append({k: v for k, v in row.items() if v not in (None, "")})
        print(f"  {old} -> {new}, {name}, {method}, {n}: {rows[-2]['value']:.4f} "
              f"({rows[-2]['share']:.1%})", flush=True)  # fmt: skip
    return rows


def qualifying() -> list[dict[str, Any]]:
    """Each recipe of the fine-tuned models that was tried, and whether it really moved."""
    return [row for name in _encoders.RECIPES for row in _qualifying(name)]


def _qualifying(name: str) -> list[dict[str, Any]]:
    found = _encoders.recipes(name)
    old = float(found["old"])
    rows = []
    for i, (new, unbridged) in enumerate(found["tried"]):
        rate, epochs, anew = _encoders.RECIPES[name][i]
        chosen = f"; this one is {name}" if i == int(found["chosen"]) else ""
        drawn = "a new last layer" if name == "headed" else f"{anew} layers drawn anew"
        rows.append(
            {
                "pair": f"minilm -> {name}",
                "dataset": "scifact",
                "method": f"rate {rate}, {epochs} epochs, {drawn}",
                "metric": "nDCG@10 gained",
                "value": float(new) - old,
                "ratio": float(unbridged) / old,
                "ratio_to": "old queries on the old gallery (unbridged over it)",
                "held": bool(new >= old + _encoders.GAIN and unbridged < _encoders.MOVED * old),
                "note": f"held: {_encoders.GAIN} gained and ratio below {_encoders.MOVED}{chosen}",
            }
        )
    return rows


def chosen_well(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How near a choice comes to the bridge that is best by the test queries; 1,000 pairs."""
    ndcg = {
        (row["pair"], row["dataset"], row["method"]): row["value"]
        for row in rows
        if row["metric"] == "nDCG@10" and row.get("n_pairs", 1000) == 1000
    }
    asked = list(dict.fromkeys((pair, dataset) for pair, dataset, _ in ndcg))
    better = [one for one in asked if ndcg[*one, "full"] > ndcg[*one, "old"]]
    found = []
    for where, some in (("all", asked), ("where the new model is better", better)):
        for method in ("procrustes", "stiff", "relaxed", *CHOICES):
            shares = [
                ndcg[*one, method]
                / max(ndcg[*one, kind] for kind in BRIDGES if (*one, kind) in ndcg)
                for one in some
            ]
            found.append(
                {
                    "dataset": where,
                    "method": method,
                    "metric": "nDCG@10 over that of the best bridge",
                    "value": float(np.mean(shares)),
                    "low": min(shares),
                    "high": max(shares),
                    "n": len(shares),
                    "note": "mean, least and most over pairs of encoders and sets",
                }
            )
    return found


def speed() -> list[dict[str, Any]]:
    """Microseconds a query in batches of 1,000, one thread: the median of 30 batches."""
    old, new = _encoders.pairs("minilm", "finetuned", "scifact", 1000)
    batch = new.array[:1000]
    rows = []
    for kind in BRIDGES:
        bridge = nv.upgrade.fit(old=old.array, new=new.array, kinds=[kind])
        took = []
        for _ in range(30):
            started = time.perf_counter()
            bridge.transform(batch)
            took.append(1e6 * (time.perf_counter() - started) / len(batch))
        rows.append(
            {
                "dataset": "scifact",
                "method": kind,
                "dim": 384,
                "metric": "microseconds a query",
                "value": float(np.median(took)),
                "low": float(np.min(took)),
                "high": float(np.max(took)),
                "n": len(took),
                "threads": 1,
                "note": "batches of 1,000; checks and normalisation included; least and most",
            }
        )
        print(f"  {kind}: {rows[-1]['value']:.1f} us a query", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", default=",".join(SETS), help="rows of others stay as they are")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda if there is one")
    parser.add_argument("--vectors-only", "--train-only", action="store_true", dest="fill")
    parser.add_argument("--try", action="store_true", dest="attempt", help="cisi, no GPU, seconds")
    parser.add_argument("--encoders", default=",".join(NEW), help="beside minilm, both ways")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if arguments.attempt:
        for method, n in ways("lsa300", "lsa300", "cisi"):
            found = values("lsa300", "lsa300", "cisi", method, n)
            print(method, n, {m: round(float(found[m].mean()), 3) for m in METRICS}, flush=True)
        return
    if arguments.fill:
        _encoders.fill()
        return
    meta = _frame.meta(
        seeds=[_encoders.SEED],
        data=_encoders.SETS,
        question="What does a bridge keep of full re-embedding?",
        encoders=_encoders.WHAT,
        trained_on=_encoders.MADE_ON,
    )
    rows = []
    beside = arguments.encoders.split(",")
    pairs = [("minilm", new) for new in beside] + [(old, "minilm") for old in beside]
    sets = arguments.sets.split(",")
    for name in sets:
        for old, new in pairs:
            rows += rows_of(old, new, name)
    if "scifact" in sets:
        rows += qualifying() + speed()
    if set(sets) == {*SETS}:
        _frame.write("bridge", rows + chosen_well(rows), meta)
    else:
        _frame.write("bridge", rows, meta, renewed=sets)


if __name__ == "__main__":
    main()
