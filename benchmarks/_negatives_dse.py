"""A MiniLM cross-encoder, trained on STS-B, distilled through unlabelled pairs (DSE)."""

from __future__ import annotations

import gzip
import hashlib
import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import _frame
import _sets
import _training
import numpy as np
import torch
from _negatives import DIMS, TRY, Options, base, best, grid, kept, settings_of, unit, vectors

from nestvec.corpus.examples import Examples, read_examples
from nestvec.encoders import TextEncoder
from nestvec.measurement.bootstrap import resample, spearman
from nestvec.search.exact import top_k
from nestvec.train import CrossEncoderTeacher, ScoreDistillation, score_pairs, train_text

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
        near = top_k(rows, rows, 1 + 10)[0]
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
