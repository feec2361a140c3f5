"""What the parts of `train_negatives` share: sets, settings, rankings, runs that are kept."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import _frame
import _sets
import _training
import numpy as np
import torch

import nestvec as nv
from nestvec.corpus import read_beir
from nestvec.encoders import TextEncoder
from nestvec.measurement.bootstrap import resample
from nestvec.search.exact import top_k
from nestvec.train import Settings

NAME = "train_negatives"
MODELS = _frame.ROOT / ".cache/models" / NAME  # of finished trainings, for those that build on them
DIMS = (32, 64, 128, 256, 384)
DEPTH = 10
PRECISION = "auto"
TRY: dict[str, Any] = {}  # {"try": True} after --try
WITHOUT: set[str] = set()  # methods that are left out

Options = dict[str, Any]


def settings_of(options: Options, seed: int) -> Settings:
    steps = 2 if TRY else options["steps"]
    return Settings(
        max_steps=steps,
        batch_size=8 if TRY else options["batch"],
        learning_rate=options["rate"],
        precision=PRECISION,
        seed=seed,
        save_every=steps,
        log_every=max(1, steps // 10),
        workers=4 if torch.cuda.is_available() else 0,  # else the accelerator waits for tokens
    )


def kept(recipe: Options, make: Callable[[Path], _training.Arrays], *modules: str) -> dict:
    code = _training.trained_by("objectives", *modules)
    return _training.kept(
        NAME, {**recipe, **TRY, "dims": DIMS, "precision": PRECISION}, make, code=code
    )


def model_folder(recipe: Options) -> Path:
    text = json.dumps({**recipe, **TRY, "dims": DIMS}, sort_keys=True)
    return MODELS / f"{recipe['method']}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def rankings(queries: np.ndarray, docs: np.ndarray) -> _training.Arrays:
    """Return for every size the rows of the closest documents, best first."""
    return {
        str(dim): top_k(unit(queries[:, :dim]), unit(docs[:, :dim]), DEPTH)[0].astype(np.int32)
        for dim in DIMS
    }


def encoder_of(model: Any) -> TextEncoder:
    return TextEncoder(model, batch_size=256 if torch.cuda.is_available() else 64)


def vectors(model: Any, texts: list[str], role: Any = "document") -> np.ndarray:
    return encoder_of(model).encode(texts, role=role, show_progress=False).array


def both_sides(model: Any, found: nv.RetrievalSet) -> tuple[nv.Embeddings, nv.Embeddings]:
    encoder = encoder_of(model)
    docs = encoder.encode(found.doc_texts, ids=found.doc_ids, show_progress=False)
    return docs, encoder.encode(
        found.query_texts, role="query", ids=found.query_ids, show_progress=False
    )


@cache
def untuned(name: str, split: str) -> tuple[nv.Embeddings, nv.Embeddings]:
    """Vectors of documents and queries before any training, kept as other benchmarks keep them."""
    found = asked(name, split)
    of = f"{name}-try" if TRY else name
    docs = _sets.embed(of, found.doc_texts, found.doc_ids, "document")
    return docs, _sets.embed(f"{of}-{split}", found.query_texts, found.query_ids, "query")


@cache
def corpus(name: str) -> tuple[list[str], list[str]]:
    """Ids and texts of a set's documents; for a try, those that the first queries need and some."""
    found = read_beir(_frame.data_folder() / name, split="test")
    if not TRY:
        return found.doc_ids, found.doc_texts
    sets = [found]
    if name == "scifact":
        sets.append(read_beir(_frame.data_folder() / name, split="train"))
    named = {doc for one in sets for query in one.query_ids[:9] for doc in one.qrels[query]}
    rows = [n for n, one in enumerate(found.doc_ids) if n < 40 or one in named]
    return [found.doc_ids[n] for n in rows], [found.doc_texts[n][:300] for n in rows]


@cache
def asked(name: str, split: str) -> nv.RetrievalSet:
    """A split's queries over the documents; "fit" and "choose" part SciFact's train queries."""
    source = "train" if split in ("fit", "choose") else split
    found = read_beir(_frame.data_folder() / name, split=source)
    ids = list(found.query_ids)
    if split in ("fit", "choose"):
        order = np.random.default_rng(0).permutation(len(ids))
        cut = len(ids) // 5
        ids = [ids[n] for n in sorted(order[:cut] if split == "choose" else order[cut:])]
    doc_ids, doc_texts = corpus(name)
    known = set(doc_ids)
    graded = {q: {d: g for d, g in found.qrels[q].items() if d in known} for q in ids}
    ids = [q for q in ids if any(g > 0 for g in graded[q].values())]
    text = dict(zip(found.query_ids, found.query_texts, strict=True))
    return nv.RetrievalSet(
        name, doc_ids, doc_texts, ids, [text[q] for q in ids], {q: graded[q] for q in ids}
    )


def reciprocal_rank(stored: Mapping[str, np.ndarray], found: nv.RetrievalSet) -> float:
    """What settings are chosen by: 1 / place of the first relevant document, mean over sizes."""
    values = []
    for dim in DIMS:
        for query, ranked in zip(found.query_ids, stored[str(dim)], strict=True):
            right = [found.qrels[query].get(found.doc_ids[row], 0) > 0 for row in ranked]
            values.append(1 / (1 + right.index(True)) if any(right) else 0.0)
    return float(np.mean(values))


def best(tried: list[tuple[Options, float]], label: str) -> Options:
    for options, value in tried:  # the first of equals
        print(f"    {label} {options}: {value:.4f}", flush=True)
    return max(tried, key=lambda one: one[1])[0]


def grid(options: list[Options]) -> list[Options]:
    return options[:1] if TRY else options


def base() -> Any:
    return copy.deepcopy(TextEncoder(_sets.MODEL).model)


def ndcg(stored: list[dict], found: nv.RetrievalSet) -> np.ndarray:
    """Return nDCG@10 (n_dims, n_queries), the mean over seeds."""
    from nestvec.measurement.metrics import per_query

    values = []
    for one in stored:
        for dim in DIMS:
            ranked = [[found.doc_ids[row] for row in rows] for rows in one[str(dim)]]
            scores = per_query(ranked, found.query_ids, found.qrels, ["nDCG@10"])
            values.append(scores["nDCG@10"])
    return np.mean(np.array(values).reshape(len(stored), len(DIMS), -1), axis=0)


def table(
    dataset: str,
    values: Mapping[str, np.ndarray],
    compared: tuple[tuple[str, str], ...],
    seeds: list[int],
) -> list[dict[str, Any]]:
    """Rows of every method and size, and paired differences at each size and over all sizes."""
    note = f"mean of seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else ""
    trained = {method for method in values if method not in ("truncation", "adaptor_supervised")}
    rows = []
    for method, by_dim in values.items():
        estimate = resample(by_dim, seed=0)
        for dim, value, low, high in zip(DIMS, estimate.value, *estimate.interval(), strict=True):
            rows.append(
                {
                    "dataset": dataset,
                    "method": method,
                    "dim": dim,
                    "metric": "nDCG@10",
                    "value": float(value),
                    "low": float(low),
                    "high": float(high),
                    "n": by_dim.shape[1],
                    "bytes_per_vector": 4 * dim,
                    "note": note if method in trained else "",
                }
            )
    for ours, other in compared:
        gain = values[ours] - values[other]
        estimate = resample(np.vstack([gain, gain.mean(axis=0)]), seed=0)
        for dim, value, low, high in zip(
            (*DIMS, None), estimate.value, *estimate.interval(), strict=True
        ):
            words = [] if dim is not None else [f"mean of {list(DIMS)} dims"]
            rows.append(
                {
                    "dataset": dataset,
                    "method": ours,
                    "dim": dim,
                    "metric": f"nDCG@10 minus {other}",
                    "value": float(value),
                    "low": float(low),
                    "high": float(high),
                    "n": gain.shape[1],
                    "note": "; ".join([*words, *([note] if note else [])]),
                }
            )
    return rows
