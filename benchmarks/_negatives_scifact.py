"""SciFact: random negatives, static hard ones (STAR), dynamic ones (ADORE), the adaptor beside."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import _training
import numpy as np
from _negatives import (
    DIMS,
    TRY,
    WITHOUT,
    Options,
    asked,
    base,
    best,
    both_sides,
    encoder_of,
    grid,
    kept,
    model_folder,
    ndcg,
    rankings,
    reciprocal_rank,
    settings_of,
    table,
    unit,
    untuned,
    vectors,
)

import nestvec as nv
from nestvec.corpus import Texts
from nestvec.corpus.examples import Examples
from nestvec.encoders import TextEncoder
from nestvec.train import (
    InfoNCE,
    NestedLoss,
    StaticAndRandom,
    mine_negatives,
    train_queries,
    train_text,
)

STEPS, BATCH = 240, 64
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
MAPPED_GRID = [{"rate": 2e-5, "keep": 0.0}, {"rate": 5e-5, "keep": 0.0}]
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
    objective: Any = NestedLoss(InfoNCE(), DIMS)
    if recipe["method"] == "random_negatives":
        examples = judged_pairs(found)
    else:
        docs, queries = untuned("scifact", recipe["split"])
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
        base(),
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


def adore(recipe: Options, below: Options | None) -> dict:
    """The query side alone, against the documents of a fine-tuned model, or of the adaptor."""
    recipe = {**recipe, "documents_of": below or "adaptor_supervised"}

    def make(_: Path) -> _training.Arrays:
        found = asked("scifact", recipe["split"])
        if below is None:
            start, docs = mapped(recipe["split"])
        else:
            start = encoder_of(fine_tuned(below)).model
            docs = encoder_of(start).encode(found.doc_texts, ids=found.doc_ids, show_progress=False)
        before = docs.array.copy()
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
        same = np.array_equal(docs.array, before)
        return {**rankings(queries.array, docs.array), "documents_same": np.array(same)}

    return kept(recipe, make, "dynamic", "keeping")


def mapped(split: str) -> tuple[Any, nv.Embeddings]:
    """The model with the adaptor at its end, and the documents' vectors through both."""
    from sentence_transformers import SentenceTransformer

    adaptor = supervised_adaptor(split)
    model = SentenceTransformer(modules=[*base(), *adaptor.as_modules()])
    docs, _ = untuned("scifact", split)
    array = unit(adaptor.transform(docs.array))
    some = asked("scifact", split).doc_texts[:8]  # the model's own are the same, at a great price
    np.testing.assert_allclose(vectors(model, some), array[:8], atol=1e-4)
    return model, nv.Embeddings(array, TextEncoder(model).space, docs.ids)


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
    star = recipe_of("star", "train", hard, seed)
    recipes: dict[str, tuple[Options, Options | None]] = {
        "random_negatives": (recipe_of("random_negatives", "train", plain, seed), None),
        "star": (star, None),
    }
    if "adore" not in WITHOUT:
        dynamic = adore_tried("adore", grid(ADORE_GRID), recipe_of("star", "fit", hard, 0))
        recipes["adore"] = recipe_of("adore", "train", dynamic, seed), star
    if "adore_mapped" not in WITHOUT:
        dynamic = adore_tried("adore_mapped", grid(MAPPED_GRID), None)
        recipes["adore_mapped"] = recipe_of("adore_mapped", "train", dynamic, seed), None
    return recipes


def adore_tried(method: str, settings: list[Options], below: Options | None) -> Options:
    """Return the settings of the query side that do best on the queries that are held out."""
    chosen_on = asked("scifact", "choose")
    found = [
        (one, reciprocal_rank(adore(recipe_of(method, "fit", one, 0), below), chosen_on))
        for one in map(adore_options, settings)
    ]
    return best(found, method)


def held_out() -> list[dict[str, Any]]:
    """Rows of the train queries that are held out while settings are chosen, at what was chosen."""
    recipes = {name: one for name, (one, _) in scifact_recipes(0).items()}
    random, hard = ({**recipes[name], "split": "fit"} for name in ("random_negatives", "star"))
    dynamic = recipe_of("adore", "fit", adore_tried("adore", grid(ADORE_GRID), hard), 0)
    stored = {
        "random_negatives": [ranked_by(random)],
        "star": [ranked_by(hard)],
        "adore": [adore(dynamic, hard)],
    }
    found = asked("scifact", "choose")
    values = {method: ndcg(many, found) for method, many in stored.items()}
    compared = tuple(pair for pair in COMPARED if set(pair) <= set(values))
    rows = table("scifact_held_out", values, compared, [0])
    about = "queries that settings were chosen by"
    return [{**row, "note": "; ".join(filter(None, [row["note"], about]))} for row in rows]


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
            dynamic = method.startswith("adore")
            stored = adore(recipe, below) if dynamic else ranked_by(recipe)
            found.setdefault(method, []).append(stored)
    return found


COMPARED = (
    ("star", "random_negatives"),
    ("adore", "random_negatives"),
    ("adore", "star"),
    ("random_negatives", "adaptor_supervised"),
    ("star", "adaptor_supervised"),
    ("adore", "adaptor_supervised"),
    ("adore_mapped", "random_negatives"),
    ("adore_mapped", "star"),
    ("adore_mapped", "adaptor_supervised"),
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
        compared = tuple(pair for pair in COMPARED if set(pair) <= set(values))
        rows += table(name, values, compared, seeds)
    for method in stored:
        if method.startswith("adore"):
            rows.append(
                {
                    "dataset": "scifact",
                    "method": method,
                    "metric": "document vectors bit-identical after training",
                    "identical": all(bool(one["documents_same"]) for one in stored[method]),
                    "n": len(test.doc_ids),
                }
            )
    return rows + held_out()
