"""One LoRA that is nested in its rank beside a LoRA trained at each rank, on STS-B.

    python benchmarks/train_lora.py [--seeds 0,1,2] [--device cuda] [--epochs 1] [--try]

all-MiniLM-L6-v2 is adapted to the scored pairs of STS-B's train split (CoSENT), every method with
the same steps, batch and alpha. Each method, and each rank of the separate LoRAs, has the learning
rate that is best on the dev split with seed 0; the table is of the test split. Of a seed, trainings
run one after the other, and their seconds are those of `train_text`, beginning after a short
warm-up: compare them within a seed.

- dylora: one training of rank 16, evaluated at ranks 1, 2, 4, 8, 16; it draws any rank to 16
- dylora_named: the same, but these five are all that is drawn
- lora: five trainings, one a rank
- lora_16_cut: the plain LoRA of rank 16, cut, with the scale it was trained with
- lora_16_cut_rescaled: the same with alpha / rank, as if it were nested

A machine with a GPU needs no more than `nestvec[train,demo]`: ``--train-only --device cuda`` there,
then copy ``.cache/benchmarks/train_lora`` and run without ``--train-only``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import _frame
import _training
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from nestvec.corpus.examples import Examples, read_examples
from nestvec.encoders import TextEncoder
from nestvec.measurement.bootstrap import resample, spearman
from nestvec.train import Lora, Settings, load_lora, train_text

NAME = "train_lora"
MODEL = "all-MiniLM-L6-v2"
RANKS = (1, 2, 4, 8, 16)
LARGEST, ALPHA = 16, 16
RATES = (5e-5, 1e-4, 2e-4, 5e-4)
RECIPE: dict[str, Any] = {"epochs": 2, "batch": 32, "rows": None}
CODE = ("lora", "ranking", "objectives")
PLAIN = "lora-16"
NESTED: dict[str, Any] = {"dylora": LARGEST, "dylora_named": RANKS}  # what is drawn
METHODS = (*NESTED, *(f"lora-{rank}" for rank in RANKS))


@cache
def pairs(split: str) -> Examples:
    found = read_examples(_frame.data_folder() / f"stsb/{split}.tsv")
    return found if RECIPE["rows"] is None else found[np.arange(RECIPE["rows"])]


def gold(split: str) -> np.ndarray:
    targets = pairs(split).targets
    assert targets is not None
    return targets


def trained(method: str, rate: float, seed: int) -> _training.Arrays:
    """Train one LoRA; return its seconds and its cosines of the dev and test pairs, by rank."""
    recipe = {
        "dataset": "stsb",
        "method": method,
        "seed": seed,
        "rate": rate,
        "alpha": ALPHA,
        "device": DEVICE,
        **RECIPE,
    }

    def make(folder: Path) -> _training.Arrays:
        warm_up()
        nested = method in NESTED
        rank = NESTED[method] if nested else int(method.partition("-")[2])
        lora = Lora(rank=rank, alpha=ALPHA, nested=nested)
        seconds = train(folder / "lora", lora, rate, seed)
        found: _training.Arrays = {"seconds": np.float64(seconds), "machine": np.array(machine())}
        for each in ranks_of(method):
            found |= cosines(load_lora(folder / "lora", rank=each), f"{each}")
        if method == PLAIN:
            for each in RANKS[:-1]:
                for name, alpha in (("cut", ALPHA * each // LARGEST), ("rescaled", ALPHA)):
                    by_hand(folder / "lora", folder / "cut", each, alpha)
                    encoder = load_lora(folder / "cut")
                    found |= cosines(encoder, f"{name}-{each}", splits=("test",))
        return found

    return _training.kept(NAME, recipe, make, code=_training.trained_by(*CODE))


def ranks_of(method: str) -> tuple[int, ...]:
    """Return the ranks that a method is evaluated at."""
    return RANKS if method in NESTED else (int(method.partition("-")[2]),)


def train(folder: Path, lora: Lora, rate: float, seed: int, *, steps: int = -1) -> float:
    """Train; return the seconds it took. A training that was killed begins anew."""
    shutil.rmtree(folder, ignore_errors=True)
    settings = Settings(
        epochs=RECIPE["epochs"],
        max_steps=steps,
        batch_size=RECIPE["batch"],
        learning_rate=rate,
        precision="float32",
        seed=seed,
        save_every=10**6,
        validate_every=10**6,
    )
    started = time.perf_counter()
    train_text(MODEL, pairs("train"), folder, dims=(384,), holdout=0, lora=lora, settings=settings)
    return time.perf_counter() - started


@cache
def warm_up() -> None:
    """Import, load and compile what the first training would pay for."""
    folder = _frame.cache_folder(NAME) / f"warm-up-{os.getpid()}"  # seeds may run side by side
    for nested in (True, False):
        train(folder, Lora(rank=2, nested=nested), RATES[0], 0, steps=5)
    shutil.rmtree(folder)


def by_hand(lora: Path, output: Path, rank: int, alpha: int) -> None:
    """Cut a plain LoRA, which nestvec refuses to do."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    config = json.loads((lora / "adapter_config.json").read_text())
    config |= {"r": rank, "lora_alpha": alpha}
    (output / "adapter_config.json").write_text(json.dumps(config))
    state = {
        name: (value[:rank] if ".lora_A." in name else value[:, :rank]).contiguous()
        for name, value in load_file(lora / "adapter_model.safetensors").items()
    }
    save_file(state, output / "adapter_model.safetensors", {"format": "pt"})


def cosines(
    encoder: Any, name: str, *, splits: tuple[str, ...] = ("dev", "test")
) -> _training.Arrays:
    found = {}
    for split in splits:
        first, second = (encoder.encode(texts).array for texts in pairs(split).texts)
        found[f"{split}-{name}"] = (first * second).sum(axis=1)
    return found


def untuned() -> _training.Arrays:
    recipe = {"dataset": "stsb", "method": "untuned", "seed": 0, "rows": RECIPE["rows"]}
    return _training.kept(NAME, recipe, lambda _: cosines(TextEncoder(MODEL), "0"), code="")


def machine() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else _frame.machine()["cpu"]


def on_dev(method: str, rate: float) -> float:
    """Spearman on the dev split, seed 0; of a nested one the mean over its ranks."""
    found = trained(method, rate, 0)
    values = np.array([found[f"dev-{rank}"] for rank in ranks_of(method)])
    dev = gold("dev")
    return float(spearman(dev)(np.ones((1, len(dev))), values).mean())


@cache
def rate_of(method: str) -> float:
    """The learning rate that is best on the dev split."""
    if len(RATES) == 1:
        return RATES[0]
    found = {rate: on_dev(method, rate) for rate in RATES}
    best = max(found, key=lambda rate: found[rate])
    print(f"{method}: rate {best:g} of", {f"{r:g}": round(v, 4) for r, v in found.items()})
    return best


def every_run(seeds: list[int]) -> dict[str, list[_training.Arrays]]:
    """Run, or read, the trainings of all methods and seeds, one after the other."""
    return {m: [trained(m, rate_of(m), seed) for seed in seeds] for m in METHODS}


def rows_of(seeds: list[int]) -> list[dict[str, Any]]:
    runs = every_run(seeds)
    note = f"mean of seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else ""
    statistic = spearman(gold("test"))
    common = {"dataset": "stsb", "n": len(gold("test"))}
    rows = [_row(common, "untuned", None, [untuned()["test-0"]], "")]
    for rank in RANKS:
        by_method = {
            **{name: [run[f"test-{rank}"] for run in runs[name]] for name in NESTED},
            "lora": [run[f"test-{rank}"] for run in runs[f"lora-{rank}"]],
        }
        if rank < LARGEST:
            by_method |= {
                "lora_16_cut": [run[f"test-cut-{rank}"] for run in runs[PLAIN]],
                "lora_16_cut_rescaled": [run[f"test-rescaled-{rank}"] for run in runs[PLAIN]],
            }
        for method, values in by_method.items():
            rows.append(_row(common, method, rank, values, note))
        for method in [name for name in by_method if name != "lora"]:
            found = resample(
                np.array(by_method[method] + by_method["lora"]), statistic=statistic, seed=0
            )
            half = len(seeds)
            draws = 100 * (found.draws[:, :half] - found.draws[:, half:]).mean(axis=1)
            rows.append(
                {
                    **common,
                    "method": method,
                    "rank": rank,
                    "metric": "points above lora (Spearman)",
                    "value": float(100 * (found.value[:half] - found.value[half:]).mean()),
                    "low": float(np.quantile(draws, 0.025)),
                    "high": float(np.quantile(draws, 0.975)),
                    "note": note,
                }
            )
    return rows + seconds(runs, note)


def _row(
    common: dict[str, Any], method: str, rank: int | None, values: list[np.ndarray], note: str
) -> dict[str, Any]:
    found = resample(np.array(values), statistic=spearman(gold("test")), seed=0)
    draws = found.draws.mean(axis=1)
    return {
        **common,
        "method": method,
        **({} if rank is None else {"rank": rank}),
        "metric": "Spearman",
        "value": float(found.value.mean()),
        "low": float(np.quantile(draws, 0.025)),
        "high": float(np.quantile(draws, 0.975)),
        "note": note,
    }


def seconds(runs: dict[str, list[_training.Arrays]], note: str) -> list[dict[str, Any]]:
    """One training of a nested one over the sum of the five; where it ran is said."""
    places = {str(run["machine"]) for by_seed in runs.values() for run in by_seed}
    if len(places) > 1:
        sys.exit(f"trained on {sorted(places)}: seconds do not compare; remove the older runs")
    five = np.array([[float(run["seconds"]) for run in runs[f"lora-{r}"]] for r in RANKS]).sum(0)
    where = "; ".join(filter(None, [note, places.pop()]))
    common = {"dataset": "stsb", "n": len(five), "note": where}
    rows: list[dict[str, Any]] = [
        {**common, "method": "lora", "metric": "training seconds", "value": float(five.mean())}
    ]
    for name in NESTED:
        one = np.array([float(run["seconds"]) for run in runs[name]])
        rows += [
            {**common, "method": name, "metric": "training seconds", "value": float(one.mean())},
            {
                **common,
                "method": name,
                "metric": "training time",
                "ratio": float(one.sum() / five.sum()),
                "low": float((one / five).min()),
                "high": float((one / five).max()),
                "ratio_to": "lora, five ranks",
            },
        ]
    return rows


DEVICE = "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0", help="e.g. 0,1,2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of trainings")
    parser.add_argument("--train-only", action="store_true", help="train and keep; no result file")
    parser.add_argument("--rates", help="learning rates to choose from, e.g. 1e-4")
    parser.add_argument("--epochs", type=int, help="of each training")
    parser.add_argument("--try", dest="tiny", action="store_true", help="few rows; nothing written")
    chosen = parser.parse_args()
    global DEVICE, RATES
    DEVICE = chosen.device
    if DEVICE == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if chosen.rates:
        RATES = tuple(float(rate) for rate in chosen.rates.split(","))
    if chosen.epochs:
        RECIPE.update(epochs=chosen.epochs)
    if chosen.tiny:
        RATES = RATES[:1]
        RECIPE.update(epochs=1, rows=128)
    seeds = [int(seed) for seed in chosen.seeds.split(",")]
    meta = _frame.meta(
        seeds=seeds,
        data=["stsb"],
        model=MODEL,
        recipe={**RECIPE, "alpha": ALPHA, "rates": RATES, "precision": "float32"},
        device=DEVICE,
    )
    if chosen.train_only:
        every_run(seeds)
        return
    rows = rows_of(seeds)
    if not chosen.tiny:
        _frame.write(NAME, rows, meta | {"rates": {m: rate_of(m) for m in METHODS}})
        return
    for row in rows:
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    main()
