"""What negatives and teachers bring: STAR, ADORE, pairs without labels, a cross-encoder distilled.

    python benchmarks/train_negatives.py [--seeds 0,1,2] [--only scifact] [--device cuda]

- scifact: all-MiniLM-L6-v2 on SciFact's train queries, with random (in-batch) negatives, with
  static hard ones (STAR), and then the query side alone with dynamic ones (ADORE), beside the
  supervised adaptor on frozen vectors. `scifact_unseen` holds the test queries none of whose
  relevant documents any training query names.
- duqgen: npl, cisi and cranfield without their queries: pairs made of their own documents.
- dse: a MiniLM cross-encoder trained on STS-B teaches vectors through unlabelled pairs.

Settings are chosen on a fifth of SciFact's train queries (duqgen's on all of them, which its
pairs know nothing of) and on STS-B's dev split. ``--train-only`` trains and ranks, which needs
neither faiss nor ir-measures, and writes nothing but the cache; ``--try`` does two steps of each.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import hashlib
import json
import os
import sys
import time
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
from nestvec.corpus import Texts, read_beir, read_beir_titles
from nestvec.corpus.examples import Examples, read_examples
from nestvec.encoders import TextEncoder
from nestvec.encoders.fingerprint import fingerprint
from nestvec.measurement.bootstrap import resample, spearman
from nestvec.search.exact import top_k
from nestvec.train import (
    CrossEncoderTeacher,
    InfoNCE,
    NestedLoss,
    ScoreDistillation,
    Settings,
    StaticAndRandom,
    mine_negatives,
    score_pairs,
    synthesize,
    train_queries,
    train_text,
)

NAME = "train_negatives"
MODELS = _frame.ROOT / ".cache/models" / NAME  # of finished trainings, for those that build on them
DIMS = (32, 64, 128, 256, 384)
DEPTH = 10
STEPS, BATCH, PRECISION = 240, 64, "auto"
TRY: dict[str, Any] = {}  # {"try": True} after --try

Options = dict[str, Any]


# --- what every part does ----------------------------------------------------------------------


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
    """Vectors of documents and queries before any training."""
    return both_sides(_sets.MODEL, asked(name, split))


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


# --- SciFact: random, STAR, ADORE --------------------------------------------------------------

RANDOM_GRID = [{"rate": 5e-5, "keep": 0.0}, {"rate": 1e-4, "keep": 0.0}]
STAR_GRID = [
    {"loss": "softmax", "highest_share": None},
    {"loss": "pairwise", "highest_share": None},
]
ADORE_GRID = [
    {"rate": 1e-5, "keep": 0.0},
    {"rate": 5e-5, "keep": 0.0},
    {"rate": 5e-5, "keep": 10.0},
]
N_NEGATIVES = 4
ADORE_STEPS = 200


def judged_pairs(found: nv.RetrievalSet) -> Examples:
    text = dict(zip(found.doc_ids, found.doc_texts, strict=True))
    rows = [
        (asks, text[doc])
        for query, asks in zip(found.query_ids, found.query_texts, strict=True)
        for doc, grade in found.qrels[query].items()
        if grade > 0
    ]
    first, second = zip(*rows, strict=True)
    return Examples("pairs", (list(first), list(second)))


@cache
def supervised_adaptor(split: str) -> nv.MatryoshkaAdaptor:
    """The adaptor on frozen vectors, as benchmarks/adaptor.py fits it."""
    docs, queries = untuned("scifact", split)
    steps = {"max_steps": 5, "supervised_steps": 5} if TRY else {}
    adaptor = nv.MatryoshkaAdaptor(random_state=0, **steps)
    return adaptor.fit(docs, queries=queries, qrels=asked("scifact", split).qrels)


def start_of(method: str, split: str) -> Any:
    if not method.endswith("mapped"):
        return base()
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(modules=[*base(), *supervised_adaptor(split).as_modules()])


def recipe_of(method: str, split: str, options: Options, seed: int) -> Options:
    return {
        "dataset": "scifact",
        "method": method,
        "seed": seed,
        "split": split,
        "steps": STEPS,
        "batch": BATCH,
        "n_negatives": N_NEGATIVES,
        **options,
    }


def fine_tuned(recipe: Options) -> Path:
    """Train with random or static hard negatives; return the folder, now or again."""
    folder = model_folder(recipe)
    found = asked("scifact", recipe["split"])
    start = start_of(recipe["method"], recipe["split"])
    objective: Any = NestedLoss(InfoNCE(), DIMS)
    if recipe["method"] == "random_negatives":
        examples = judged_pairs(found)
    else:
        docs, queries = untuned("scifact", recipe["split"])
        if recipe["method"] == "star_mapped":
            docs, queries = both_sides(copy.deepcopy(start), found)
        mined = mine_negatives(
            found,
            documents=docs,
            queries=queries,
            n_negatives=recipe["n_negatives"],
            highest_share=recipe["highest_share"],
            seed=recipe["seed"],
        )
        print(f"    {mined.sentence()}", flush=True)
        examples = mined.examples
        if recipe["loss"] == "pairwise":
            objective = NestedLoss(StaticAndRandom(), DIMS)
    train_text(
        start,
        examples,
        folder,
        dims=DIMS,
        holdout=0,
        objective=objective,
        keep=recipe["keep"],
        settings=settings_of(recipe, recipe["seed"]),
    )
    return folder


def judge_split(split: str) -> str:
    return "choose" if split == "fit" else "test"


def ranked_by(recipe: Options) -> dict:
    def make(_: Path) -> _training.Arrays:
        folder = fine_tuned(recipe)
        found = asked("scifact", judge_split(recipe["split"]))
        docs, queries = both_sides(folder, found)
        return rankings(queries.array, docs.array)

    return kept(recipe, make, "pairwise", "keeping")


def adore(recipe: Options, below: Options) -> dict:
    """The query side alone, against the documents of a fine-tuned model."""
    recipe = {**recipe, "documents_of": below}

    def make(_: Path) -> _training.Arrays:
        start = fine_tuned(below)
        found = asked("scifact", recipe["split"])
        encoder = encoder_of(start)
        docs = encoder.encode(found.doc_texts, ids=found.doc_ids, show_progress=False)
        before = docs.array.copy(), fingerprint(encoder.model)
        folder = model_folder(recipe)
        train_queries(
            start,
            docs,
            Texts(found.query_ids, found.query_texts),
            found.qrels,
            folder,
            dims=DIMS,
            holdout=0,
            keep=recipe["keep"],
            settings=settings_of(recipe, recipe["seed"]),
        )
        test = asked("scifact", judge_split(recipe["split"]))
        queries = encoder_of(folder).encode(test.query_texts, role="query", show_progress=False)
        docs.space.check_same(queries.space)
        after = fingerprint(TextEncoder(start).model)  # what would encode them again
        same = np.array_equal(docs.array, before[0]) and after == before[1]
        return {**rankings(queries.array, docs.array), "documents_same": np.array(same)}

    return kept(recipe, make, "dynamic", "keeping")


def scifact_recipes(seed: int) -> dict[str, tuple[Options, Options | None]]:
    """Every method's recipe for the test queries, after choosing its settings (seed 0) once."""
    chosen_on = asked("scifact", "choose")

    def tried(method: str, settings: list[Options], more: Options) -> Options:
        found = [
            (
                one,
                reciprocal_rank(ranked_by(recipe_of(method, "fit", {**more, **one}, 0)), chosen_on),
            )
            for one in settings
        ]
        return {**more, **best(found, method)}

    plain = tried("random_negatives", grid(RANDOM_GRID), {})
    hard = tried("star", grid(STAR_GRID), plain)
    below = recipe_of("star", "fit", hard, 0)
    found = [
        (
            one,
            reciprocal_rank(
                adore(recipe_of("adore", "fit", adore_options(one), 0), below), chosen_on
            ),
        )
        for one in grid(ADORE_GRID)
    ]
    dynamic = adore_options(best(found, "adore"))
    star = recipe_of("star", "train", hard, seed)
    return {
        "random_negatives": (recipe_of("random_negatives", "train", plain, seed), None),
        "star": (star, None),
        "adore": (recipe_of("adore", "train", dynamic, seed), star),
        "star_mapped": (recipe_of("star_mapped", "train", hard, seed), None),
    }


def adore_options(one: Options) -> Options:
    return {**one, "steps": ADORE_STEPS}


def frozen(method: str) -> dict:
    """Rankings of frozen vectors: cut, or through the supervised adaptor."""

    def make(_: Path) -> _training.Arrays:
        docs, queries = (side.array for side in untuned("scifact", "test"))
        if method == "adaptor_supervised":
            adaptor = supervised_adaptor("train")
            docs, queries = adaptor.transform(docs), adaptor.transform(queries)
        return rankings(queries, docs)

    return kept({"dataset": "scifact", "method": method, "seed": 0}, make)


def scifact_stored(seeds: list[int]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for method in ("truncation", "adaptor_supervised"):
        found[method] = [frozen(method)]
    for seed in seeds:
        for method, (recipe, below) in scifact_recipes(seed).items():
            stored = ranked_by(recipe) if below is None else adore(recipe, below)
            found.setdefault(method, []).append(stored)
    return found


COMPARED = (
    ("star", "random_negatives"),
    ("adore", "random_negatives"),
    ("adore", "star"),
    ("random_negatives", "adaptor_supervised"),
    ("star", "adaptor_supervised"),
    ("adore", "adaptor_supervised"),
    ("star_mapped", "adaptor_supervised"),
)


def scifact(seeds: list[int]) -> list[dict[str, Any]]:
    stored = scifact_stored(seeds)
    test, train = asked("scifact", "test"), asked("scifact", "train")
    named = {d for graded in train.qrels.values() for d, grade in graded.items() if grade > 0}
    unseen = [
        row
        for row, query in enumerate(test.query_ids)
        if not any(doc in named for doc, grade in test.qrels[query].items() if grade > 0)
    ]
    rows = []
    for name, keep in (("scifact", range(len(test.query_ids))), ("scifact_unseen", unseen)):
        values = {method: ndcg(many, test)[:, list(keep)] for method, many in stored.items()}
        rows += table(name, values, COMPARED, seeds)
    identical = all(bool(one["documents_same"]) for one in stored["adore"])
    rows.append(
        {
            "dataset": "scifact",
            "method": "adore",
            "metric": "document vectors bit-identical after training",
            "identical": identical,
            "n": len(test.doc_ids),
        }
    )
    return rows


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


# --- DUQGen: pairs of a corpus without labels --------------------------------------------------

RULES = {"npl": "lead", "cisi": "title", "cranfield": "title", "scifact": "title"}
N_SYNTHETIC = 1200
DUQGEN_GRID = [{"rate": 2e-5, "hard": True}, {"rate": 2e-5, "hard": False}]
DUQGEN_STEPS = 60


def synthetic(name: str, sampling: str, seed: int) -> Any:
    ids, texts = corpus(name)
    titles = read_beir_titles(_frame.data_folder() / name)
    n = 30 if TRY else N_SYNTHETIC
    made = synthesize(
        Texts(ids, texts),
        n,
        queries=RULES[name],
        titles=[titles[one] for one in ids],
        vectors=untuned(name, "train" if name == "scifact" else "test")[0],
        n_clusters=1 if sampling == "uniform" else None,
        temperature=1e6 if sampling == "uniform" else 1.0,
        seed=seed,
    )
    print(f"    {name}: {made.sentence()}", flush=True)
    return made


def adapted(name: str, options: Options, seed: int, sampling: str = "clustered") -> dict:
    recipe = {
        "dataset": name,
        "method": "duqgen" if sampling == "clustered" else "duqgen_uniform",
        "seed": seed,
        "rule": RULES[name],
        "n": N_SYNTHETIC,
        "steps": DUQGEN_STEPS,
        "batch": 32,
        **options,
    }

    def make(folder: Path) -> _training.Arrays:
        made = synthetic(name, sampling, seed)
        examples = made.examples
        if options["hard"]:
            docs, queries = both_sides(_sets.MODEL, made.found)
            mined = mine_negatives(made.found, documents=docs, queries=queries, seed=seed)
            print(f"    {mined.sentence()}", flush=True)
            examples = mined.examples
        train_text(
            base(),
            examples,
            folder,
            dims=DIMS,
            holdout=0,
            settings=settings_of(recipe, seed),
        )
        return ranked_at(folder, name)

    return kept(recipe, make, "keeping")


def ranked_at(model: Any, name: str) -> _training.Arrays:
    docs, queries = both_sides(model, asked(name, "train" if name == "scifact" else "test"))
    return rankings(queries.array, docs.array)


def duqgen_stored(name: str, seeds: list[int]) -> dict[str, list[dict]]:
    chosen_on = asked("scifact", "train")
    tried = [
        (one, reciprocal_rank(adapted("scifact", one, 0), chosen_on)) for one in grid(DUQGEN_GRID)
    ]
    options = best(tried, "duqgen")
    recipe = {"dataset": name, "method": "truncation", "seed": 0, "of": "duqgen"}
    return {
        "truncation": [kept(recipe, lambda _: ranked_at(_sets.MODEL, name))],
        "duqgen": [adapted(name, options, seed) for seed in seeds],
        "duqgen_uniform": [adapted(name, options, seed, "uniform") for seed in seeds],
    }


def duqgen(seeds: list[int]) -> list[dict[str, Any]]:
    rows = []
    for name in ("npl", "cisi", "cranfield"):
        found = asked(name, "test")
        values = {m: ndcg(many, found) for m, many in duqgen_stored(name, seeds).items()}
        rows += table(name, values, (("duqgen", "truncation"), ("duqgen", "duqgen_uniform")), seeds)
    return rows


# --- DSE: a cross-encoder distilled ------------------------------------------------------------

TEACHER: Options = {"epochs": 4, "batch": 32, "rate": 5e-5}
DSE_GRID = [{"loss": "mse", "rate": 5e-5}, {"loss": "margin_mse", "rate": 5e-5}]
DSE_STEPS, GOLD_STEPS = 800, 360
N_NEAR = 3  # neighbours of each STS-B train sentence that it is paired with


def sts(split: str) -> Examples:
    return read_examples(_frame.data_folder() / "stsb" / f"{split}.tsv")


def train_texts() -> list[str]:
    gold = sts("train")
    return list(dict.fromkeys([*gold.texts[0], *gold.texts[1]]))[: 200 if TRY else None]


def paired_anew() -> np.ndarray:
    """Each STS-B train text with some near ones and one far one: rows (n, 2)."""

    def make(_: Path) -> _training.Arrays:
        rng = np.random.default_rng(0)
        rows = unit(vectors(_sets.MODEL, train_texts()))
        near, _ = top_k(rows, rows, 1 + 10)
        pairs = []
        for row, found in enumerate(near):
            others = found[found != row]
            picked = [*rng.choice(others, N_NEAR, replace=False), rng.integers(len(rows))]
            pairs += [(row, int(one)) for one in picked]
        return {"pairs": np.array(pairs, np.int32)}

    return kept({"dataset": "stsb", "method": "paired_anew", "seed": 0, "near": N_NEAR}, make)[
        "pairs"
    ]


@cache
def unlabelled() -> tuple[list[str], list[str]]:
    """Pairs without their labels: STS-B's train texts paired anew, SICK, SNLI, captions."""
    rng = np.random.default_rng(0)
    texts = train_texts()
    pairs = [(texts[one], texts[other]) for one, other in paired_anew().tolist()]
    sick = read_examples(_frame.data_folder() / "sick/train.tsv")
    pairs += list(zip(*sick.texts, strict=True))
    for split in ("dev", "test"):
        with gzip.open(_frame.data_folder() / f"snli_devtest/{split}.jsonl.gz", "rt") as file:
            lines = [json.loads(line) for line in file]
        pairs += [(row["premise"], row["hypothesis"]) for row in lines[:5000]]
    with gzip.open(_frame.data_folder() / "multi30k_captions/train.jsonl.gz", "rt") as file:
        photos = [json.loads(line)["captions"] for line in file]
    for photo in rng.permutation(len(photos))[:5000]:
        one, other = rng.permutation(5)[:2]
        pairs.append((photos[photo][one], photos[photo][other]))
    pairs = list(dict.fromkeys(pairs))[: 100 if TRY else None]
    first, second = zip(*pairs, strict=True)
    return list(first), list(second)


def teacher(seed: int) -> dict:
    """Train the cross-encoder on STS-B's train pairs; return its scores of everything."""
    recipe = {"dataset": "stsb", "method": "cross_encoder", "seed": seed, **TEACHER}

    def make(folder: Path) -> _training.Arrays:
        from datasets import Dataset
        from sentence_transformers import CrossEncoder
        from sentence_transformers.cross_encoder import (
            CrossEncoderTrainer,
            CrossEncoderTrainingArguments,
            losses,
        )
        from transformers import PrinterCallback

        bert = folder / "bert"
        model = TextEncoder(_sets.MODEL).model
        model[0].auto_model.save_pretrained(bert)
        model.tokenizer.save_pretrained(bert)
        torch.manual_seed(seed)  # of the head
        cross = CrossEncoder(str(bert), num_labels=1, max_length=128)
        gold = sts("train")
        assert gold.targets is not None
        labels = (gold.targets / 5).tolist()
        both = {  # a pair and its mirror image have one score
            "sentence1": [*gold.texts[0], *gold.texts[1]],
            "sentence2": [*gold.texts[1], *gold.texts[0]],
            "label": [*labels, *labels],
        }
        options = {
            **TEACHER,
            "steps": len(both["label"]) // 2 * TEACHER["epochs"] // TEACHER["batch"],
        }
        trainer = CrossEncoderTrainer(
            model=cross,
            args=settings_of(options, seed).arguments(
                folder / "checkpoints",
                n_rows=len(both["label"]),
                kind=CrossEncoderTrainingArguments,
            ),
            train_dataset=Dataset.from_dict(both),
            loss=losses.BinaryCrossEntropyLoss(cross),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        found: _training.Arrays = {}
        asks = CrossEncoderTeacher(cross, batch_size=256)
        for name, (first, second) in {
            "dev": sts("dev").texts[:2],
            "test": sts("test").texts[:2],
            "unlabelled": unlabelled(),
        }.items():
            started = time.perf_counter()
            scores = score_pairs(asks, first, second, cache=folder / name).targets
            assert scores is not None
            found[name] = scores
            found[f"{name}-seconds"] = np.array(time.perf_counter() - started)
        return found

    return kept(recipe, make)


def student(method: str, options: Options, seed: int) -> dict:
    """Train vectors on the teacher's scores, or on gold alone; return cosines of dev and test."""
    gold = method == "gold"
    recipe = {
        "dataset": "stsb",
        "method": method,
        "seed": seed,
        "steps": GOLD_STEPS if gold else DSE_STEPS,
        "batch": 64,
        "pairs": "gold" if gold else "unlabelled",
        **options,
    }
    scores = np.empty(0, np.float32)
    if method == "dse":
        scores = teacher(seed)["unlabelled"]
        recipe["scores"] = hashlib.sha256(scores.tobytes()).hexdigest()[:10]

    def make(folder: Path) -> _training.Arrays:
        model: Any = _sets.MODEL
        if method != "untuned":
            examples = sts("train") if gold else Examples("scored", unlabelled(), scores)
            train_text(
                base(),
                examples,
                folder,
                dims=DIMS,
                holdout=0,
                objective=None if gold else ScoreDistillation(DIMS, loss=options["loss"]),
                settings=settings_of(recipe, seed),
            )
            model = folder
        found = {}
        for split in ("dev", "test"):
            sides = [vectors(model, texts) for texts in sts(split).texts[:2]]
            for dim in DIMS:
                a, b = (unit(side[:, :dim]) for side in sides)
                found[f"{split}-{dim}"] = (a * b).sum(axis=1)
        return found

    return kept(recipe, make, "distillation", "ranking")


def dse_stored(seeds: list[int]) -> dict[str, list[dict]]:
    from scipy.stats import spearmanr

    dev = sts("dev").targets

    def on_dev(stored: dict) -> float:
        found: list[Any] = [spearmanr(stored[f"dev-{dim}"], dev) for dim in DIMS]
        return float(np.mean([one.statistic for one in found]))

    options = best([(one, on_dev(student("dse", one, 0))) for one in grid(DSE_GRID)], "dse")
    return {
        "cross_encoder": [teacher(seed) for seed in seeds],
        "truncation": [student("untuned", {}, 0)],
        "gold": [student("gold", {"rate": 5e-5}, seed) for seed in seeds],
        "dse": [student("dse", options, seed) for seed in seeds],
    }


def dse(seeds: list[int]) -> list[dict[str, Any]]:
    stored = dse_stored(seeds)
    gold = sts("test").targets
    assert gold is not None
    note = f"mean of seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else ""
    common = {"dataset": "stsb", "n": len(gold)}
    columns: dict[tuple[str, int | None], list[np.ndarray]] = {
        ("cross_encoder", None): [one["test"] for one in stored["cross_encoder"]]
    }
    for method in ("truncation", "gold", "dse"):
        for dim in DIMS:
            columns[method, dim] = [one[f"test-{dim}"] for one in stored[method]]
    estimate = resample(
        np.array([one for many in columns.values() for one in many], dtype=np.float64),
        statistic=spearman(gold),
        seed=0,
    )
    ends = np.cumsum([len(many) for many in columns.values()])
    place = dict(
        zip(columns, zip(ends - [len(m) for m in columns.values()], ends, strict=True), strict=True)
    )

    def mean_of(key: tuple[str, int | None]) -> tuple[float, np.ndarray]:
        start, end = place[key]
        return float(estimate.value[start:end].mean()), estimate.draws[:, start:end].mean(axis=1)

    teacher_value, teacher_draws = mean_of(("cross_encoder", None))
    rows = []
    for method, dim in columns:
        value, draws = mean_of((method, dim))
        low, high = np.percentile(draws, [2.5, 97.5])
        row = {**common, "method": method, "dim": dim, "metric": "Spearman", "note": note}
        row |= {"value": value, "low": float(low), "high": float(high)}
        if dim is not None:
            row |= {
                "bytes_per_vector": 4 * dim,
                "ratio": value / teacher_value,
                "ratio_to": "cross_encoder",
            }
        rows.append(row)
    for dim in DIMS:
        value, draws = mean_of(("dse", dim))
        for other, (other_value, other_draws) in {
            "gold": mean_of(("gold", dim)),
            "93% of cross_encoder": (0.93 * teacher_value, 0.93 * teacher_draws),
        }.items():
            low, high = np.percentile(draws - other_draws, [2.5, 97.5])
            rows.append(
                {
                    **common,
                    "method": "dse",
                    "dim": dim,
                    "metric": f"Spearman minus {other}",
                    "value": value - other_value,
                    "low": float(low),
                    "high": float(high),
                    "note": note,
                }
            )
    return rows


# --- the run -----------------------------------------------------------------------------------

STORED: dict[str, Callable[[list[int]], Any]] = {
    "scifact": scifact_stored,
    "duqgen": lambda seeds: [duqgen_stored(name, seeds) for name in ("npl", "cisi", "cranfield")],
    "dse": dse_stored,
}
ROWS = {"scifact": scifact, "duqgen": duqgen, "dse": dse}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0", help="e.g. 0,1,2")
    parser.add_argument("--only", choices=tuple(ROWS), help="one part; nothing is written")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda if there is one")
    parser.add_argument("--train-only", action="store_true", help="fill the cache, write nothing")
    parser.add_argument("--try", action="store_true", dest="tried", help="two steps of everything")
    chosen = parser.parse_args()
    if chosen.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if chosen.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees none here")
    if chosen.tried:
        TRY["try"] = True
    seeds = [int(seed) for seed in chosen.seeds.split(",")]
    if chosen.train_only:
        for part, run in STORED.items():
            if chosen.only in (None, part):
                started = time.perf_counter()
                print(part, flush=True)
                run(seeds)
                print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)
        return
    meta = _frame.meta(
        seeds=seeds,
        data=["scifact", "npl", "cisi", "cranfield", "stsb", "sick"],
        model=_sets.MODEL,
        recipe={
            "scifact": dict(steps=STEPS, batch=BATCH, n_negatives=N_NEGATIVES),
            "adore": dict(steps=ADORE_STEPS),
            "duqgen": dict(n=N_SYNTHETIC, steps=DUQGEN_STEPS, rules=RULES),
            "dse": dict(teacher=TEACHER, steps=DSE_STEPS, gold_steps=GOLD_STEPS),
        },
    )
    parts = {part: (lambda run=run: run(seeds)) for part, run in ROWS.items()}
    only = chosen.only or ("scifact" if chosen.tried else None)
    _training.run_parts(NAME, parts, meta, only=only)


if __name__ == "__main__":
    main()
