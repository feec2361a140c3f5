"""npl, cisi and cranfield without their queries: pairs made of their own documents (DUQGen)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _frame
import _sets
import _training
from _negatives import (
    DIMS,
    TRY,
    Options,
    asked,
    base,
    best,
    both_sides,
    corpus,
    grid,
    kept,
    ndcg,
    rankings,
    reciprocal_rank,
    settings_of,
    table,
    untuned,
)

from nestvec.corpus import Texts, read_beir_titles
from nestvec.train import mine_negatives, synthesize, train_text

SETS = ("npl", "cisi", "cranfield")
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
    for name in SETS:
        found = asked(name, "test")
        values = {m: ndcg(many, found) for m, many in duqgen_stored(name, seeds).items()}
        rows += table(name, values, (("duqgen", "truncation"), ("duqgen", "duqgen_uniform")), seeds)
    return rows
