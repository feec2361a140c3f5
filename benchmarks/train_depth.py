"""Training in depth: the (layer x dim) grid of one model beside 1-D, separate models and peers.

    python benchmarks/train_depth.py [--seeds 0,1,2] [--part grid|latency]
    python benchmarks/train_depth.py --train-only --device cuda     (the trainings alone)
    python benchmarks/train_depth.py --candidates     (settings of ours, on dev splits)

all-MiniLM-L6-v2 on the 6,400 pairs of `train_text`, one epoch, the same trainer, settings and seeds
for all; Spearman on STS-B and SICK at every layer and size. Then what an encoder of l layers costs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import _classify
import _frame
import _training
import numpy as np
import torch
from train_text import PAIR_BATCH, PAIR_RATE, PRECISION, pairs, sts, theirs

import nestvec as nv
from nestvec.corpus.examples import Examples
from nestvec.encoders import TextEncoder
from nestvec.encoders.layers import Layers, reading
from nestvec.measurement.bootstrap import resample, spearman
from nestvec.train import FixedPairs, InfoNCE, NestedLoss, Settings, train_text

NAME = "train_depth"
DIMS = (32, 64, 128, 256, 384)
N = 6  # layers of the model
LAYERS = tuple(range(1, N + 1))
SPLITS = (("stsb", "dev"), ("stsb", "test"), ("sick", "dev"), ("sick", "test"))
N_RESAMPLES = 1000
#: Stands for how layers are read in the names of runs: change it with `Layers.rows`.
READING = "f2e41b1df9be"

#: Settings of ours that were compared on the dev splits. `OURS`, which is reported, was the best on
#: SICK's, and on STS-B's as good as any: that one alone did not show what the last layer loses.
CANDIDATES: dict[str, dict[str, Any]] = {
    "grid": {"pairs": "grid", "kl": 1.0, "keep": 0.0},
    "ladder": {"pairs": "ladder", "kl": 1.0, "keep": 0.0},
    "grid_keep": {"pairs": "grid", "kl": 0.0, "keep": 1.0},
    "grid_both": {"pairs": "grid", "kl": 1.0, "keep": 1.0},
    "grid_hold": {"pairs": "grid", "kl": 0.0, "keep": 10.0},
    "grid_hold_fast": {"pairs": "grid", "kl": 0.0, "keep": 10.0, "rate": 2e-4},
    "edges_hold_fast": {"pairs": "edges", "kl": 0.0, "keep": 10.0, "rate": 2e-4},
    # nearly the teacher alone: ``task`` weighs the contrastive losses
    "grid_distil": {"pairs": "grid", "kl": 0.0, "keep": 10.0, "rate": 2e-4, "task": 0.1},
    "edges_distil": {"pairs": "edges", "kl": 0.0, "keep": 10.0, "rate": 2e-4, "task": 0.1},
    "edges_distil_slower": {"pairs": "edges", "kl": 0.0, "keep": 10.0, "rate": 1e-4, "task": 0.1},
}
OURS = "edges_distil"
SEPARATE = ((3, 32), (3, 384), (6, 32), (6, 384))
PEERS = ("matryoshka_loss", "matryoshka_2d_loss")
UNTRAINED = ("untuned", "untuned_rotation")
TRAINED = (
    "fixed",
    "mrl",
    "2dmse",
    "ese",
    *PEERS,
    *(f"separate-{layer}x{dim}" for layer, dim in SEPARATE),
    # trained apart, with what ours has beside the pairs: is it the depth or the teacher?
    *(f"separate_kept-{layer}x{dim}" for layer, dim in SEPARATE),
)
ONCE: set[str] = set()  # methods that are trained with the first seed alone; set by --once
TRY = False  # a run of seconds, to see that everything works; set by --try


def model() -> Any:
    return TextEncoder("all-MiniLM-L6-v2").model


def data() -> tuple[list[str], list[str]]:
    first, second = pairs()
    return (first[:64], second[:64]) if TRY else (first, second)


def scored_pairs(name: str, split: str) -> tuple[list[str], list[str], np.ndarray]:
    first, second, gold = sts(name, split)
    most = 50 if TRY else len(first)
    return first[:most], second[:most], gold[:most]


# --- training -----------------------------------------------------------------------------------


def cosines(encoder: Any) -> _training.Arrays:
    """``stsb-test-3x32`` -> the cosine of every pair at layer 3, 32 dims; one pass a text."""
    layers = Layers(encoder)
    chosen = range(1, layers.n + 1)
    reader = reading(layers, chosen)
    found = {}
    for name, split in SPLITS:
        first, second, _ = scored_pairs(name, split)
        with layers.kept():
            sides = [
                reader.encode(texts, batch_size=64, show_progress_bar=False)
                for texts in (first, second)
            ]
        a, b = (side.reshape(len(first), layers.n, -1) for side in sides)
        for layer in chosen:
            for dim in DIMS:
                found[f"{name}-{split}-{layer}x{dim}"] = _cosine(
                    a[:, layer - 1], b[:, layer - 1], dim
                )
    return found


def _cosine(a: np.ndarray, b: np.ndarray, dim: int) -> np.ndarray:
    return (_classify.unit_prefix(a, dim) * _classify.unit_prefix(b, dim)).sum(axis=1)


def rotated() -> _training.Arrays:
    """The untuned model through the principal rotation of each set's training sentences."""
    encoder = model()
    axes = {}
    for name in ("stsb", "sick"):
        first, second, _ = scored_pairs(name, "train")
        rows = encoder.encode(list(dict.fromkeys([*first, *second])), show_progress_bar=False)
        axes[name] = nv.PrincipalRotation().fit(rows).components_
    found = {}
    for name, split in SPLITS:
        first, second, _ = scored_pairs(name, split)
        a, b = (encoder.encode(t, show_progress_bar=False) @ axes[name].T for t in (first, second))
        found |= {f"{name}-{split}-{N}x{dim}": _cosine(a, b, dim) for dim in DIMS}
    return found


def fine_tuned(method: str, seed: int, candidate: str = OURS) -> _training.Arrays:
    """Return the cosines of every pair at every cell of one trained model."""
    about = CANDIDATES[candidate] if method in ("fixed",) or "kept" in method else {}
    options = {"rate": PAIR_RATE, "batch": PAIR_BATCH, **about}
    recipe = {
        "dataset": "pairs",
        "method": method if method != "fixed" else f"fixed_{candidate}",
        "seed": seed,
        "dims": DIMS,
        "precision": PRECISION,
        **(options if method not in UNTRAINED else {}),
        **({"try": True} if TRY else {}),
    }

    def make(folder: Path) -> _training.Arrays:
        if method == "untuned":
            return cosines(model())
        if method == "untuned_rotation":
            return rotated()
        encoder, settings = model(), _settings(options, seed)
        started = time.perf_counter()
        if method in PEERS:
            deep = method == "matryoshka_2d_loss"
            theirs(encoder, *data(), folder, settings, cached=False, dims=DIMS, deep=deep)
        else:
            encoder = _ours(encoder, method, options, folder, settings)
        seconds = np.float64(time.perf_counter() - started)
        return {**cosines(encoder), "seconds": seconds, "machine": np.str_(_where())}

    return _training.kept(NAME, recipe, make, code=_code(method))


def _ours(encoder: Any, method: str, options: dict[str, Any], folder: Path, settings: Any) -> Any:
    """Train with `train_text` and return the model, which is a shorter one for ``separate``."""
    more: dict[str, Any] = {"dims": DIMS}
    if method.startswith("separate"):
        layer, dim = map(int, method.partition("-")[2].split("x"))
        encoder = Layers(encoder).cut(layer)
        task = options.get("task", 1.0)
        more = {"dims": (dim,), "objective": NestedLoss(InfoNCE(), (dim,), weights=(task,))}
        more["keep"] = options.get("keep", 0.0)
    elif method == "fixed":
        task = options.get("task", 1.0)
        objective = FixedPairs(
            InfoNCE(),
            LAYERS,
            DIMS,
            pairs=options["pairs"],
            last_layer_weight=task,
            prior_layers_weight=task,
            kl_div_weight=options["kl"],
        )
        more |= {"objective": objective, "keep": options["keep"]}
    elif method != "mrl":
        more |= {"layers": "all", "depth": method}
    train_text(encoder, Examples("pairs", data()), folder, holdout=0, settings=settings, **more)
    return TextEncoder(folder).model  # of the folder: what was trained in an earlier go is there


def _settings(options: dict[str, Any], seed: int) -> Settings:
    return Settings(
        epochs=1,
        batch_size=32 if TRY else options["batch"],
        learning_rate=options["rate"],
        precision=PRECISION,
        seed=seed,
    )


def _code(method: str) -> str:
    if method in (*PEERS, *UNTRAINED):
        return _training.trained_by()
    modules = ("objectives", "chunked", "sentence_transformer", "keeping", "batches", "depth")
    return _training.trained_by(*modules) + READING


def _where() -> str:
    on = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    names = ("torch", "transformers", "sentence-transformers")
    return ", ".join([on, *(f"{name} {importlib.metadata.version(name)}" for name in names)])


def trained_on(seeds: list[int]) -> dict[str, list[str]]:
    """Return which methods were trained where: what is kept need not be of one machine."""
    found: dict[str, list[str]] = {}
    for method in TRAINED:
        places = {str(fine_tuned(method, seed)["machine"]) for seed in seeds_of(method, seeds)}
        found.setdefault("; ".join(sorted(places)), []).append(method)
    return found


def train_all(seeds: list[int]) -> None:
    pairs()
    for method in UNTRAINED:
        fine_tuned(method, 0)
    jobs = [
        partial(fine_tuned, method, seed) for method in TRAINED for seed in seeds_of(method, seeds)
    ]
    if TRY or torch.cuda.is_available():
        for job in jobs:
            job()
    else:
        _training.side_by_side(jobs)


def compare_candidates(seeds: list[int], some: list[str]) -> None:
    """Print what candidates are worth on both dev splits, beside 1-D and separate models."""
    asked = [(3, 32), (3, 384), (6, 32), (6, 64), (6, 384)]
    others = ("mrl", "matryoshka_2d_loss", *(m for m in TRAINED if "separate-" in m))
    lines = [(method, [fine_tuned(method, 0)]) for method in UNTRAINED]
    lines += [(method, [fine_tuned(method, seed) for seed in seeds]) for method in others]
    for candidate in some:
        runs = [fine_tuned("fixed", seed, candidate) for seed in seeds]
        lines.append((f"fixed: {candidate}", runs))
    head = "  ".join(f"{layer}x{dim:<4}" for layer, dim in asked)
    for dataset in ("stsb", "sick"):
        print(f"{dataset + ' dev, Spearman':>28}  {head}  grid")
        for name, runs in lines:
            cells = [_on_dev(dataset, runs, *cell) for cell in asked]
            every = [_on_dev(dataset, runs, layer, dim) for layer in LAYERS for dim in DIMS]
            words = [f"{value:6.4f}" for value in [*cells, np.mean(every)]]
            print(f"{name:>28}  " + "  ".join(words), flush=True)


def _on_dev(dataset: str, runs: list[_training.Arrays], layer: int, dim: int) -> float:
    """Mean Spearman of runs; NaN if a model lacks the cell or was kept without this split."""
    rows = [run.get(f"{dataset}-dev-{layer}x{dim}") for run in runs]
    if any(row is None for row in rows):
        return np.nan
    *_, gold = scored_pairs(dataset, "dev")
    once = np.ones((1, len(gold)))
    return float(np.mean(spearman(gold)(once, np.array(rows, dtype=np.float64))))


# --- the grid -----------------------------------------------------------------------------------

Cell = tuple[str, int, int]  # method, layer, dim


@cache
def estimated(dataset: str, method: str, seed: int) -> dict[tuple[int, int], tuple[float, Any]]:
    """(layer, dim) -> Spearman and its resampled draws, on the same pairs for every method."""
    stored = fine_tuned(method, seed)
    *_, gold = scored_pairs(dataset, "test")
    start = f"{dataset}-test-"
    names = sorted(name for name in stored if name.startswith(start))
    values = np.array([stored[name] for name in names], dtype=np.float64)

    def make(_: Path) -> _training.Arrays:
        found = resample(values, spearman(gold), n_resamples=N_RESAMPLES, seed=0)
        return {"value": found.value, "draws": found.draws}

    recipe = {"dataset": dataset, "method": f"draws-{method}", "seed": seed, "n": N_RESAMPLES}
    kept = _training.kept(NAME, {**recipe, "sum": float(values.sum())}, make, code="")
    cells = [tuple(map(int, name.removeprefix(start).split("x"))) for name in names]
    return {
        (layer, dim): (float(kept["value"][at]), kept["draws"][:, at])
        for at, (layer, dim) in enumerate(cells)
    }


def seeds_of(method: str, seeds: list[int]) -> list[int]:
    return [0] if method in UNTRAINED else seeds[:1] if method in ONCE else seeds


def mean_of(dataset: str, cells: list[Cell], seeds: list[int]) -> tuple[float, np.ndarray]:
    """Mean over cells and seeds: its value and its draws."""
    found = [
        estimated(dataset, method, seed)[layer, dim]
        for method, layer, dim in cells
        for seed in seeds_of(method, seeds)
    ]
    return float(np.mean([v for v, _ in found])), np.mean([d for _, d in found], axis=0)


def row(
    dataset: str, method: str, layer: int | None, dim: int | None, metric: str,
    value: float, draws: np.ndarray, note: str,
) -> dict[str, Any]:  # fmt: skip
    *_, gold = scored_pairs(dataset, "test")
    low, high = np.quantile(draws, (0.025, 0.975))
    about = {"dataset": dataset, "method": method, "dim": dim, "layer": layer, "metric": metric}
    return {**about, "value": value, "low": float(low), "high": float(high), "n": len(gold),
            **({} if dim is None else {"bytes_per_vector": 4 * dim}), "note": note}  # fmt: skip


def differences() -> list[tuple[int | None, int | None, str, list[Cell], list[Cell], str]]:
    """What ours is compared with: layer, dim, the other's name, both sides' cells, a word."""
    found: list[tuple[int | None, int | None, str, list[Cell], list[Cell], str]] = []

    def add(layer: Any, dim: Any, other: str, ours: list[tuple[int, int]],
            others: list[Cell] | None = None, note: str = "") -> None:  # fmt: skip
        sides = [("fixed", *cell) for cell in ours], others or [(other, *cell) for cell in ours]
        found.append((layer, dim, other, *sides, note))

    for layer in (3, N):
        for dim in DIMS:
            add(layer, dim, "mrl", [(layer, dim)])
        add(layer, None, "mrl", [(layer, dim) for dim in DIMS], note="mean of all sizes")
    for kind in ("separate", "separate_kept"):
        for layer in (3, N):
            own = [cell for cell in SEPARATE if cell[0] == layer]
            cells = [(f"{kind}-{a}x{b}", a, b) for a, b in own]
            for cell, other in zip(own, cells, strict=True):
                add(layer, cell[1], kind, [cell], [other])
            add(layer, None, kind, own, cells, "mean of 32 and 384 dims")
    for other in UNTRAINED:
        add(N, 32, other, [(N, 32)])
    every = [(layer, dim) for layer in LAYERS for dim in DIMS]
    for other in ("mrl", "2dmse", "ese", *PEERS):
        add(None, None, other, every, note="mean of the grid")
    for other in ("2dmse", "ese", *PEERS):
        add(3, None, other, [(3, dim) for dim in DIMS], note="mean of all sizes")
        add(N, None, other, [(N, dim) for dim in DIMS], note="mean of all sizes")
    return found


def grid(seeds: list[int]) -> list[dict[str, Any]]:
    train_all(seeds)
    rows = []
    over = f"mean of seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else ""
    for dataset in ("stsb", "sick"):
        for method in (*UNTRAINED, *TRAINED):
            name, _, own = method.partition("-")
            for layer, dim in estimated(dataset, method, seeds[0] if own else 0):
                if own and own != f"{layer}x{dim}":
                    continue  # a separate model was trained for one cell
                found = mean_of(dataset, [(method, layer, dim)], seeds)
                note = over if seeds_of(method, seeds) == seeds else ""
                rows.append(row(dataset, name, layer, dim, "Spearman", *found, note))
        for layer, dim, other, ours, others, note in differences():
            (a, a_draws), (b, b_draws) = (mean_of(dataset, side, seeds) for side in (ours, others))
            words = "; ".join(filter(None, [note, over]))
            metric = f"Spearman minus {other}"
            rows.append(row(dataset, "fixed", layer, dim, metric, a - b, a_draws - b_draws, words))
    return rows


# --- latency ------------------------------------------------------------------------------------


Run = Callable[[dict[str, Any]], Any]  # what encodes one batch of tokens


def latency() -> list[dict[str, Any]]:
    """Processor time of encoders of l layers over that of all 6: one thread, tokens ready."""
    torch.set_num_threads(1)
    whole = TextEncoder("all-MiniLM-L6-v2", device="cpu")
    layers = Layers(whole.model)
    ways: dict[str, dict[int, Run]] = {
        "exported": {layer: _in_torch(layers.cut(layer)) for layer in LAYERS},
        "exported_onnx": {layer: _in_onnx(layer) for layer in LAYERS},
    }
    texts = scored_pairs("stsb", "test")[0][:32]
    turns = 4 if TRY else 41
    rows = []
    for method, runs in ways.items():
        for batch in (1, 32):
            starts = range(0, len(texts), batch)
            tokens = [whole.model.preprocess(texts[at : at + batch]) for at in starts]
            each: dict[int, list[float]] = {layer: [] for layer in LAYERS}
            for turn in range(turns):
                for layer in LAYERS if turn % 2 else LAYERS[::-1]:
                    each[layer].append(_seconds(runs[layer], tokens))
            spent = {layer: np.array(times[1:]) for layer, times in each.items()}
            for layer in LAYERS:
                ratios = spent[layer] / spent[N]
                rows.append(
                    {
                        "dataset": "stsb",
                        "method": method,
                        "layer": layer,
                        "dim": 384,
                        "metric": f"encoder time, batch {batch}",
                        "p50_ms": 1000 * float(np.median(spent[layer])) / len(tokens),
                        "ratio": float(np.median(ratios)),
                        "low": float(np.quantile(ratios, 0.25)),
                        "high": float(np.quantile(ratios, 0.75)),
                        "ratio_to": f"{N} layers",
                        "value": float(np.median(ratios)) * N / layer,
                        "n": len(ratios),
                        "threads": 1,
                        "note": "processor time; value: the ratio over l/6; quartiles of turns; "
                        "the embedding layer and the pooling are paid at every depth",
                    }
                )
    return rows


def _in_torch(encoder: Any) -> Run:
    return lambda tokens: encoder(dict(tokens))


def _in_onnx(layer: int) -> Run:
    import onnxruntime

    from nestvec.encoders.onnx import export_onnx

    file = _frame.cache_folder(NAME) / f"layers-{layer}.onnx"
    shorter = TextEncoder("all-MiniLM-L6-v2", device="cpu", layer=layer)
    shorter.space.check_same(export_onnx(shorter, file))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options)
    names = [one.name for one in session.get_inputs()]
    return lambda tokens: session.run(None, {name: tokens[name].numpy() for name in names})


def _seconds(run: Run, tokens: list[dict[str, Any]]) -> float:
    with torch.inference_mode():
        started = time.process_time()
        for batch in tokens:
            run(batch)
        return time.process_time() - started


def main() -> None:
    global TRY
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0", help="e.g. 0,1,2")
    parser.add_argument("--once", default="", help="methods with the first seed alone, e.g. ese")
    parser.add_argument("--part", choices=("grid", "latency"), help="nothing is written")
    parser.add_argument("--train-only", action="store_true", help="train what is not kept yet")
    parser.add_argument("--candidates", action="store_true", help="compare settings, on dev splits")
    parser.add_argument("--some", default=",".join(CANDIDATES), help="which candidates")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to train")
    parser.add_argument("--try", action="store_true", dest="tried", help="64 pairs, few rows")
    chosen = parser.parse_args()
    seeds = [int(seed) for seed in chosen.seeds.split(",")]
    TRY = chosen.tried
    ONCE.update(filter(None, chosen.once.split(",")))
    if chosen.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif chosen.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA here: leave --device out")
    if chosen.candidates:
        compare_candidates(seeds, chosen.some.split(","))
        return
    if chosen.train_only:
        train_all(seeds)
        return
    meta = _frame.meta(
        seeds=seeds,
        data=["snli_devtest", "multi30k_captions", "stsb", "sick"],
        model="all-MiniLM-L6-v2",
        precision=PRECISION,
        recipe={"rate": PAIR_RATE, "batch": PAIR_BATCH, "fixed": {OURS: CANDIDATES[OURS]}},
        first_seed_alone=sorted(ONCE),
    )
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "grid": lambda: grid(seeds),
        "latency": latency,
    }
    only = chosen.part or ("grid" if TRY else None)
    if only is None:
        meta["trained_on"] = trained_on(seeds)
    _training.run_parts(NAME, parts, meta, only=only)


if __name__ == "__main__":
    main()
