"""Nested text encoders beside separately trained ones and sentence-transformers' own loss.

    python benchmarks/train_text.py [--seeds 0,1,2] [--only clinc150]

- clinc150 (in scope) and banking77: all-MiniLM-L6-v2, its lower 4 layers frozen and cached, its
  upper 2 trained with cross-entropy. Each size: logistic regression and 1-NN.
- pairs: all-MiniLM-L6-v2 on 6,400 pairs, one epoch; STS-B and SICK, beside MatryoshkaLoss.
- masked_lm: a small BERT from scratch on 20newsgroups.

The default (seed 0) run does everything once; ``--seeds 0,1,2`` repeats clinc150.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import _classify
import _frame
import _sets
import _training
import numpy as np
import torch
from torch import Tensor, nn

import nestvec as nv
from nestvec.corpus.examples import Examples, read_examples
from nestvec.encoders import TextEncoder
from nestvec.measurement.bootstrap import resample, spearman
from nestvec.train import ClassLabels, NestedClassifier, NestedMaskedLM, Settings, train_text

NAME = "train_text"
DIMS = (8, 16, 32, 64, 128, 256, 384)
BETWEEN = (12, 24, 48, 96, 192)  # sizes that were not trained
SEPARATE = (8, 32)
LONGEST = {"clinc150": 32, "banking77": 64}
# Chosen by the accuracy of FF-384 on clinc150's dev split (rates 1e-4, 2e-4, 3e-4).
EPOCHS, BATCH, RATE, HEAD_RATE = 5, 64, 3e-4, 1e-2
PRECISION = "bfloat16"


# --- classification ---------------------------------------------------------------------------


@cache
def model() -> Any:
    return TextEncoder("all-MiniLM-L6-v2").model


def rows_of(dataset: str, split: str) -> tuple[list[str], np.ndarray]:
    """Texts and class numbers; of clinc150 the 150 classes in scope."""
    path = _frame.data_folder() / dataset / f"{split}.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["label_name"] != "oos"]
    names = sorted({row["label_name"] for row in rows})
    return [row["text"] for row in rows], np.array([names.index(r["label_name"]) for r in rows])


class Hidden:
    """Hidden states after layer 4, one after the other, in half precision."""

    def __init__(self, flat: np.ndarray, ends: np.ndarray) -> None:
        self.flat, self.ends = flat, ends
        self.starts = np.concatenate([[0], ends[:-1]])

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        lengths = (self.ends - self.starts)[rows]
        mask = np.arange(lengths.max()) < lengths[:, None]
        hidden = np.zeros((*mask.shape, self.flat.shape[1]), dtype=np.float32)
        hidden[mask] = np.concatenate([self.flat[self.starts[r] : self.ends[r]] for r in rows])
        return {"hidden": torch.from_numpy(hidden), "mask": torch.from_numpy(mask)}


@cache
def hidden(dataset: str, split: str) -> tuple[Hidden, np.ndarray]:
    texts, labels = rows_of(dataset, split)

    def make(folder: Path) -> _training.Arrays:
        bert = copy.deepcopy(model()[0].auto_model).eval()
        bert.encoder.layer = bert.encoder.layer[:4]
        flat, lengths = [], []
        with torch.no_grad():
            for start in range(0, len(texts), 64):
                tokens = model().tokenizer(
                    texts[start : start + 64],
                    padding=True,
                    truncation=True,
                    max_length=LONGEST[dataset],
                    return_tensors="pt",
                )
                mask = tokens["attention_mask"].bool()
                flat.append(bert(**tokens).last_hidden_state[mask].half().numpy())
                lengths.append(mask.sum(dim=1).numpy())
        return {"flat": np.concatenate(flat), "ends": np.cumsum(np.concatenate(lengths))}

    recipe = {"dataset": dataset, "method": f"hidden-{split}", "longest": LONGEST[dataset]}
    stored = _training.kept(NAME, recipe, make, code="")
    return Hidden(stored["flat"], stored["ends"]), labels


class TopLayers(nn.Module):
    """The layers that are trained, and mean pooling: (n, 384)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = copy.deepcopy(model()[0].auto_model.encoder.layer[4:])

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask[:, None, None, :])
        weight = mask[:, :, None].to(hidden.dtype)
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1)


class Slimmed(nn.Module):
    """The slimmable baseline behind the same ``forward(labels, **inputs)``."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        from _slimmable import SlimmableEncoder

        self.encoder = SlimmableEncoder(list(TopLayers().layers), DIMS, n_classes)

    def forward(self, labels: Tensor, hidden: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"loss": self.encoder.loss(hidden, mask, labels)}


METHODS: dict[str, dict[str, Any]] = {
    "mrl": {"dims": DIMS},
    "mrl_e": {"dims": DIMS, "tied": True},
    "separate-384": {"dims": (384,)},
    **{f"separate-{dim}": {"dims": (dim,)} for dim in SEPARATE},
    "slimmable": {"dims": DIMS},
}


def classified(dataset: str, method: str, seed: int, **more: Any) -> _training.Arrays:
    """Train one model; return its vectors of train, test (and dev), and its own heads' scores."""
    splits = ["train", "test"] + (["dev"] if dataset == "clinc150" else [])
    about = METHODS[method]
    options = {"epochs": EPOCHS, "batch": BATCH, "rate": RATE, "head_rate": HEAD_RATE, **more}
    recipe = {
        "dataset": dataset,
        "method": method,
        "seed": seed,
        "precision": PRECISION,
        "longest": LONGEST[dataset],
        **about,
        **options,
    }

    def make(folder: Path) -> _training.Arrays:
        states, labels = hidden(dataset, "train")
        n_classes = int(labels.max()) + 1
        torch.manual_seed(seed)
        if method == "slimmable":
            head, task = None, Slimmed(n_classes)
        else:
            head = NestedClassifier(about["dims"], n_classes, tied=about.get("tied", False))
            task = _training.Task(TopLayers(), ClassLabels(head))
        settings = Settings(
            epochs=options["epochs"],
            batch_size=options["batch"],
            learning_rate=options["rate"],
            head_learning_rate=options["head_rate"],
            weight_decay=0.01,
            precision=PRECISION,
            seed=seed,
        )
        seconds = _training.train(
            task,
            len(labels),
            lambda rows: {**states.batch(rows), "labels": torch.from_numpy(labels[rows])},
            folder,
            settings,
            head=head,
        )
        found: _training.Arrays = {"seconds": np.float64(seconds)}
        task.eval()
        for split in splits:
            states, labels = hidden(dataset, split)
            parts = [
                states.batch(np.arange(i, min(i + 256, len(labels))))
                for i in range(0, len(labels), 256)
            ]
            with torch.no_grad():
                if method == "slimmable":
                    for dim in DIMS:
                        rows = [task.encoder(p["hidden"], p["mask"], dim) for p in parts]
                        found[f"{split}-{dim}"] = torch.cat(rows).numpy()
                    continue
                rows = torch.cat([task.encoder(**part) for part in parts])
                found[split] = rows.numpy()
                if split != "train":
                    for dim, logits in head(rows).items():
                        found[f"{split}-logits-{dim}"] = logits.numpy()
        return found

    return _training.kept(NAME, recipe, make)


@cache
def scored(dataset: str, method: str, seed: int) -> dict[tuple[int, str], np.ndarray]:
    """(size, kind) -> which test rows are right."""
    _, train_labels = hidden(dataset, "train")
    _, labels = hidden(dataset, "test")
    base = "separate-384" if method in ("principal_rotation", "random_features", "csr") else method
    sizes = {"mrl": sorted({*DIMS, *BETWEEN}), "csr": (8, 32)}.get(method, DIMS)
    if base != method or method.startswith("separate"):
        sizes = tuple(d for d in sizes if d < 384) if base != method else METHODS[method]["dims"]

    def make(_: Path) -> _training.Arrays:
        stored = classified(dataset, base, seed)
        found = {}
        for dim in sizes:
            if method == "slimmable":
                sides = stored[f"train-{dim}"], stored[f"test-{dim}"]
            elif method in ("principal_rotation", "random_features"):
                sides = _classify.rotations(stored["train"], stored["test"], seed=seed)[method]
            else:
                sides = stored["train"], stored["test"]
            if method == "csr":
                right = _classify.csr_correct(
                    sides[0], train_labels, sides[1], labels, dim, seed=seed
                )
            else:
                right = _classify.score(sides[0], train_labels, sides[1], labels, dim)
            found |= {f"{dim}/{kind}": rows for kind, rows in right.items()}
        return found

    recipe = {"dataset": dataset, "method": f"scored-{method}", "seed": seed, "sizes": list(sizes)}
    code = _training.code_hash(Path(_classify.__file__)) + trained_as(dataset, base, seed)
    stored = _training.kept(NAME, recipe, make, code=code)
    stored.pop("seconds")
    return {(int(k.split("/")[0]), k.split("/")[1]): v for k, v in stored.items()}


def trained_as(dataset: str, method: str, seed: int) -> str:
    """A hash of the vectors that are scored."""
    stored = classified(dataset, method, seed)
    names = sorted(name for name in stored if name.startswith("test"))
    return str([float(stored[name].sum()) for name in names])


SCORED = (
    "mrl",
    "mrl_e",
    *(f"separate-{dim}" for dim in (*SEPARATE, 384)),
    "principal_rotation",
    "random_features",
    "csr",
    "slimmable",
)


def classification(dataset: str, seeds: list[int]) -> list[dict[str, Any]]:
    hidden(dataset, "train"), hidden(dataset, "test")
    if dataset == "clinc150":
        hidden(dataset, "dev")
    methods = METHODS if dataset == "clinc150" else [m for m in METHODS if m != "slimmable"]
    table = [method for method in SCORED if method in methods or method not in METHODS]
    _training.side_by_side([partial(classified, dataset, m, s) for s in seeds for m in methods])
    _training.side_by_side([partial(scored, dataset, m, s) for s in seeds for m in table])
    rows = _training.table(
        dataset, seeds, table, scored, kinds=KIND, trained_dims=DIMS, separate=SEPARATE
    )
    if dataset == "clinc150":
        _, held_labels = hidden(dataset, "dev")
        _, labels = hidden(dataset, "test")
        for name in ("mrl", "mrl_e"):
            stored = classified(dataset, name, seeds[0])
            held, fresh = (
                {d: _training.softmax(stored[f"{split}-logits-{d}"]) for d in DIMS}
                for split in ("dev", "test")
            )
            for row in _training.adaptive_rows(dataset, held, held_labels, fresh, labels, seeds[0]):
                rows.append({**row, "method": f"{name}:{row['method']}"})
    return rows


KIND = {"linear_head": "linear head", "1nn": "1-NN"}


def overhead() -> list[dict[str, Any]]:
    """Processor seconds of MRL's steps over those of FF-384's: one thread, in turns."""
    torch.set_num_threads(1)  # by the clock, or with two threads, other processes are measured
    states, labels = hidden("clinc150", "train")
    tasks = {}
    for name in ("separate-384", "mrl", "mrl_e"):
        head = NestedClassifier(METHODS[name]["dims"], 150, tied=METHODS[name].get("tied", False))
        task = _training.Task(TopLayers(), ClassLabels(head))
        tasks[name] = (task, torch.optim.AdamW(task.parameters(), lr=1e-5))
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(12):
        chosen = [rng.choice(len(labels), BATCH, replace=False) for _ in range(10)]
        batches = [{**states.batch(r), "labels": torch.from_numpy(labels[r])} for r in chosen]
        for name, (task, optimizer) in tasks.items():
            started = time.process_time()
            for batch in batches:
                with torch.autocast("cpu", torch.bfloat16, enabled=PRECISION == "bfloat16"):
                    loss = task(**batch)["loss"]
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            if turn > 1:
                seconds[name].append(time.process_time() - started)
    rows = []
    for name in ("mrl", "mrl_e"):
        ratios = np.array(seconds[name]) / np.array(seconds["separate-384"])
        rows.append(
            {
                "dataset": "clinc150",
                "method": name,
                "dim": 384,
                "metric": "training time",
                "ratio": float(np.median(ratios)),
                "low": float(ratios.min()),
                "high": float(ratios.max()),
                "ratio_to": "separate",
                "n": len(ratios),
                "note": "processor seconds; median, least and most of turns of 10 steps",
                "threads": 1,
            }
        )
    return rows


# --- pairs ------------------------------------------------------------------------------------

PAIR_DIMS = (16, 32, 64, 128, 256, 384)
PAIR_RATE, PAIR_BATCH = 5e-5, 64


@cache
def pairs() -> tuple[list[str], list[str]]:
    """6,400 pairs: 3,200 entailments of SNLI's dev and test, two captions of 3,200 photos."""
    rng = np.random.default_rng(0)
    found: list[tuple[str, str]] = []
    for split in ("dev", "test"):
        with gzip.open(_frame.data_folder() / f"snli_devtest/{split}.jsonl.gz", "rt") as file:
            rows = map(json.loads, file)
            found += [(r["premise"], r["hypothesis"]) for r in rows if r["label"] == "entailment"]
    found = [found[i] for i in rng.permutation(len(found))[:3200]]
    with gzip.open(_frame.data_folder() / "multi30k_captions/train.jsonl.gz", "rt") as file:
        photos = [json.loads(line)["captions"] for line in file]
    for i in rng.permutation(len(photos))[:3200]:
        a, b = rng.permutation(5)[:2]
        found.append((photos[i][a], photos[i][b]))
    first, second = zip(*found, strict=True)
    return list(first), list(second)


def sts(name: str, split: str) -> tuple[list[str], list[str], np.ndarray]:
    found = read_examples(_frame.data_folder() / name / f"{split}.tsv")
    assert found.targets is not None, name
    return found.texts[0], found.texts[1], found.targets


def vectors_of(encoder: Any) -> _training.Arrays:
    found = {}
    for name, split in (("stsb", "dev"), ("stsb", "test"), ("sick", "test")):
        first, second, _ = sts(name, split)
        for side, texts in enumerate((first, second)):
            found[f"{name}-{split}-{side}"] = encoder.encode(texts, show_progress_bar=False)
    return found


PAIR_METHODS = (
    "ours",
    "ours_cached",
    "ours_mapped",  # begins at a map that was fitted to the pairs' texts, and keeps neighbours
    "matryoshka_loss",
    "matryoshka_loss_cached",
    "untuned",
)
# Chosen on STS-B's dev split, as PAIR_RATE is.
MAPPED: dict[str, Any] = {"rate": 5e-5, "keep": 1.0}


def mapped(encoder: Any, texts: list[str]) -> Any:
    """Return the encoder with a map behind it, fitted to its vectors of the texts, no labels."""
    from sentence_transformers import SentenceTransformer

    rows = encoder.encode(texts, show_progress_bar=False)
    adaptor = nv.MatryoshkaAdaptor(dims=PAIR_DIMS, random_state=0).fit(rows)
    return SentenceTransformer(modules=[*encoder, *adaptor.as_modules()])


def fine_tuned(method: str, seed: int, **more: Any) -> _training.Arrays:
    options = {"rate": PAIR_RATE, "batch": PAIR_BATCH, "weights": "uniform", **more}
    if method == "ours_mapped":
        options |= MAPPED
    recipe = {
        "dataset": "pairs",
        "method": method,
        "seed": seed,
        "dims": PAIR_DIMS,
        "precision": PRECISION,
        **(options if method != "untuned" else {}),
    }

    def make(folder: Path) -> _training.Arrays:
        encoder = TextEncoder("all-MiniLM-L6-v2").model
        if method == "untuned":
            return vectors_of(encoder)
        settings = Settings(
            epochs=1,
            batch_size=options["batch"],
            chunk_size=32 if method == "ours_cached" else None,
            learning_rate=options["rate"],
            precision=PRECISION,
            seed=seed,
        )
        first, second = pairs()
        started = time.perf_counter()
        if method == "ours_mapped":
            encoder = mapped(encoder, list(dict.fromkeys([*first, *second])))
        if method.startswith("ours"):
            train_text(
                encoder,
                Examples("pairs", (first, second)),
                folder,
                dims=PAIR_DIMS,
                holdout=0,
                weights=options["weights"],
                keep=options.get("keep", 0),
                settings=settings,
            )
            encoder = TextEncoder(folder).model  # an earlier go may have trained it
        else:
            theirs(encoder, first, second, folder, settings, cached=method.endswith("cached"))
        return {**vectors_of(encoder), "seconds": np.float64(time.perf_counter() - started)}

    ours = ("objectives", "chunked", "sentence_transformer", "keeping", "batches")
    modules = ours if "ours" in method else ()
    return _training.kept(NAME, recipe, make, code=_training.trained_by(*modules))


def theirs(
    encoder: Any,
    first: list[str],
    second: list[str],
    folder: Path,
    settings: Any,
    *,
    cached: bool,
    dims: tuple[int, ...] = PAIR_DIMS,
    deep: bool = False,
) -> None:
    """sentence-transformers' own loss and trainer, with our settings."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )
    from sentence_transformers.base.sampler import BatchSamplers
    from transformers import PrinterCallback

    inner = (
        losses.CachedMultipleNegativesRankingLoss(encoder, mini_batch_size=32)
        if cached
        else losses.MultipleNegativesRankingLoss(encoder)
    )
    nested = losses.Matryoshka2dLoss if deep else losses.MatryoshkaLoss
    trainer = SentenceTransformerTrainer(
        model=encoder,
        args=settings.arguments(
            folder,
            n_rows=len(first),
            kind=SentenceTransformerTrainingArguments,
            batch_sampler=BatchSamplers.NO_DUPLICATES,
        ),
        train_dataset=Dataset.from_dict({"anchor": first, "positive": second}),
        loss=nested(encoder, inner, matryoshka_dims=list(dims)),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def correlations(method: str, seeds: list[int], name: str, split: str) -> dict[int, Any]:
    """Size -> (cosines of each pair by seed, gold scores)."""
    *_, gold = sts(name, split)
    found = {}
    for dim in PAIR_DIMS:
        cosines = []
        for seed in seeds:
            stored = fine_tuned(method, seed)
            a, b = (_classify.unit_prefix(stored[f"{name}-{split}-{side}"], dim) for side in (0, 1))
            cosines.append((a * b).sum(axis=1))
        found[dim] = (cosines, gold)
    return found


def peers(seeds: list[int]) -> list[dict[str, Any]]:
    pairs()
    trained = [m for m in PAIR_METHODS if m != "untuned"]
    fine_tuned("untuned", 0)
    _training.side_by_side([partial(fine_tuned, m, s) for s in seeds for m in trained])
    rows = []
    note = f"mean of seeds {seeds}" if len(seeds) > 1 else ""
    for name in ("stsb", "sick"):
        *_, gold = sts(name, "test")
        cosines = {}
        for method in PAIR_METHODS:
            one = [0] if method == "untuned" else seeds
            cosines[method] = {d: v[0] for d, v in correlations(method, one, name, "test").items()}
        cosines["untuned_rotation"] = rotated(name)
        statistic = spearman(gold)
        for method, by_dim in cosines.items():
            for dim, by_seed in by_dim.items():
                found = resample(np.array(by_seed), statistic=statistic, seed=0)
                rows.append(
                    {
                        "dataset": name,
                        "method": method,
                        "dim": dim,
                        "metric": "Spearman",
                        **_over_seeds(found),
                        "n": len(gold),
                        "bytes_per_vector": 4 * dim,
                        "note": note if method in trained else "",
                    }
                )
        for ours, peer in (("ours", "matryoshka_loss"), ("ours_cached", "matryoshka_loss_cached")):
            values = np.array(
                [
                    cosines[m][d][s]
                    for m in (ours, peer)
                    for d in PAIR_DIMS
                    for s in range(len(seeds))
                ]
            )
            found = resample(values, statistic=statistic, seed=0)
            half = len(values) // 2
            draws = found.draws
            gain = draws[:, :half].mean(axis=1) - draws[:, half:].mean(axis=1)
            rows.append(
                {
                    "dataset": name,
                    "method": ours,
                    "dim": None,
                    "metric": f"Spearman minus {peer}",
                    "value": float(found.value[:half].mean() - found.value[half:].mean()),
                    "low": float(np.quantile(gain, 0.025)),
                    "high": float(np.quantile(gain, 0.975)),
                    "n": len(gold),
                    "note": "; ".join(filter(None, ["mean of all sizes", note])),
                }
            )
    return rows


def _over_seeds(found: Any) -> dict[str, float]:
    draws = found.draws.mean(axis=1)
    return {
        "value": float(found.value.mean()),
        "low": float(np.quantile(draws, 0.025)),
        "high": float(np.quantile(draws, 0.975)),
    }


def rotated(name: str) -> dict[int, list[np.ndarray]]:
    """The untuned model through the principal rotation of the set's training sentences."""
    first, second, _ = sts(name, "train")
    texts = list(dict.fromkeys([*first, *second]))
    ids = [str(i) for i in range(len(texts))]
    docs = _sets.embed(f"{name}-train-sentences", texts, ids, "document")
    axes = nv.PrincipalRotation().fit(docs.array).components_
    stored = fine_tuned("untuned", 0)
    sides = [stored[f"{name}-test-{side}"] @ axes.T for side in (0, 1)]
    found = {}
    for dim in PAIR_DIMS:
        a, b = (_classify.unit_prefix(side, dim) for side in sides)
        found[dim] = [(a * b).sum(axis=1)]
    return found


# --- masked language model --------------------------------------------------------------------

MLM_DIMS = (16, 32, 64, 128)
MLM = {"vocab": 8000, "length": 64, "layers": 4, "epochs": 3, "batch": 64, "rate": 1e-3}


@cache
def sequences(split: str) -> np.ndarray:
    """20newsgroups as sequences of 64 tokens of a WordPiece vocabulary learned on train."""

    def make(folder: Path) -> _training.Arrays:
        from tokenizers import BertWordPieceTokenizer

        found = {}
        for part in ("train", "test"):
            path = _frame.data_folder() / f"20newsgroups/{part}.jsonl.gz"
            with gzip.open(path, "rt", encoding="utf-8") as file:
                found[part] = [json.loads(line)["text"] for line in file]
        words = BertWordPieceTokenizer()
        words.train_from_iterator(found["train"], vocab_size=MLM["vocab"], show_progress=False)
        arrays = {}
        for part, texts in found.items():
            flat = np.concatenate(
                [np.array(e.ids[1:-1], dtype=np.int64) for e in words.encode_batch(texts)]
            )
            n = len(flat) // MLM["length"]
            arrays[part] = flat[: n * MLM["length"]].reshape(n, MLM["length"]).astype(np.int32)
        arrays["mask_id"] = np.int64(words.token_to_id("[MASK]"))
        return arrays

    recipe = {"dataset": "20newsgroups", "method": "sequences", **MLM}
    stored = _training.kept(NAME, recipe, make, code="")
    return stored[split]


def masked(rows: np.ndarray, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """15% of the tokens are asked for; of these 80% are hidden, 10% replaced, 10% left (BERT)."""
    tokens = torch.from_numpy(rows.astype(np.int64))
    draw = torch.rand(tokens.shape, generator=generator)
    labels = torch.where(draw < 0.15, tokens, -100)
    shown = torch.where(draw < 0.12, int(sequences("mask_id")), tokens)
    other = torch.randint(5, MLM["vocab"], tokens.shape, generator=generator)
    return torch.where((draw >= 0.12) & (draw < 0.135), other, shown), labels


class MaskedModel(nn.Module):
    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=MLM["vocab"],
            hidden_size=MLM_DIMS[-1],
            num_hidden_layers=MLM["layers"],
            num_attention_heads=4,
            intermediate_size=4 * MLM_DIMS[-1],
            max_position_embeddings=MLM["length"],
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        words = self.bert.get_input_embeddings()
        self.head = NestedMaskedLM(dims, MLM["vocab"], embedding=words)

    def forward(self, labels: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        states = self.bert(input_ids).last_hidden_state
        with torch.autocast("cpu", enabled=False):
            return {"loss": self.head(states.float(), labels)}


def language_model(dims: tuple[int, ...], seed: int) -> _training.Arrays:
    method = "mrl" if len(dims) > 1 else f"separate-{dims[0]}"
    recipe = {"dataset": "20newsgroups", "method": method, "seed": seed, "dims": dims, **MLM}

    def make(folder: Path) -> _training.Arrays:
        train, test = sequences("train"), sequences("test")
        torch.manual_seed(seed)
        task = MaskedModel(dims)
        generator = torch.Generator().manual_seed(seed)

        def batch(rows: np.ndarray) -> dict[str, Tensor]:
            shown, labels = masked(train[rows], generator)
            return {"input_ids": shown, "labels": labels}

        settings = Settings(
            epochs=MLM["epochs"],
            batch_size=MLM["batch"],
            learning_rate=MLM["rate"],
            weight_decay=0.01,
            precision=PRECISION,
            seed=seed,
        )
        seconds = _training.train(task, 12800, batch, folder, settings)
        task.eval()
        fixed = torch.Generator().manual_seed(1)
        right: dict[int, list[np.ndarray]] = {d: [] for d in dims}
        with torch.no_grad():
            for start in range(0, 3200, 200):
                shown, labels = masked(test[start : start + 200], fixed)
                asked = labels != -100
                states = task.bert(shown).last_hidden_state[asked]
                for dim in dims:
                    guess = task.head.logits(states, dim).argmax(dim=1)
                    right[dim].append((guess == labels[asked]).numpy())
        return {
            "seconds": np.float64(seconds),
            **{str(d): np.concatenate(parts) for d, parts in right.items()},
        }

    code = _training.trained_by("objectives", "masked_lm")
    return _training.kept(NAME, recipe, make, code=code)


def masked_lm(seed: int) -> list[dict[str, Any]]:
    sequences("train")
    runs = [MLM_DIMS, *((dim,) for dim in MLM_DIMS)]
    _training.side_by_side([partial(language_model, dims, seed) for dims in runs])
    rows = []
    nested = language_model(MLM_DIMS, seed)
    for dim in MLM_DIMS:
        own = language_model((dim,), seed)
        for method, stored in (("mrl", nested), ("separate", own)):
            rows.append(
                _training.accuracy_row(
                    "20newsgroups", method, dim, "masked token", [stored[str(dim)]], seed=seed
                )
            )
        rows.append(
            _training.difference_row(
                "20newsgroups",
                ("mrl", "separate"),
                dim,
                "masked token",
                ([nested[str(dim)]], [own[str(dim)]]),
                seed=seed,
            )
        )
    return rows


PARTS = ("clinc150", "banking77", "pairs", "masked_lm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0", help="of clinc150, e.g. 0,1,2")
    parser.add_argument("--only", choices=PARTS, help="one part; nothing is written")
    chosen = parser.parse_args()
    seeds = [int(seed) for seed in chosen.seeds.split(",")]
    data = ["clinc150", "banking77", "snli_devtest", "multi30k_captions", "stsb", "sick"]
    meta = _frame.meta(
        seeds=seeds,
        data=[*data, "20newsgroups"],
        model="all-MiniLM-L6-v2",
        precision=PRECISION,
        recipe={
            "classification": dict(epochs=EPOCHS, batch=BATCH, rate=RATE, head_rate=HEAD_RATE),
            "pairs": dict(rate=PAIR_RATE, batch=PAIR_BATCH),
            "masked_lm": MLM,
        },
    )
    parts = {
        "clinc150": lambda: classification("clinc150", seeds) + overhead(),
        "banking77": lambda: classification("banking77", seeds[:1]),
        "pairs": lambda: peers(seeds[:1]),
        "masked_lm": lambda: masked_lm(seeds[0]),
    }
    _training.run_parts(NAME, parts, meta, only=chosen.only)


if __name__ == "__main__":
    main()
