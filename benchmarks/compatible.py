"""Can a new model search the old gallery, and what does that cost the new one?

    python benchmarks/compatible.py [--seeds 0,1,2 [--once oca,hoc]] [--device cuda --jobs 8]
                                    [--train-only] [--try]

A series of four models, each of which knows more classes than the one before, on photos (cifar10:
5, 6, 8, 10 classes) and on drawings (omniglot: 68, 90, 113, 136 characters). Every model is trained
compatible with its predecessor, and the last one also directly with the first. M(i, j) is measured
by instances, not class templates: each test image, as model i sees it, searches all others, as
model j sees them, over all classes, those included that model j never saw; mAP over the whole
ranking, and 1-NN, whether the first has the query's class. The criterion for a step is
M(new, old) - M(old, old): safe if the lower 95% bound is above -0.01, better if above 0.

What a method found with one seed is kept in ``compatible/scored-*.npz``, some hundred kilobytes:
these files are all that ``--train-only`` has to bring back from another machine. It reads
``cifar10/cifar10_10k.npz`` and ``omniglot_small/omniglot_small.npz``. A seed is 56 trainings, of
10 seconds each on a GPU and of three minutes each on one core.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import _frame
import _training
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestvec.corpus.images import read_images
from nestvec.encoders.image_network import ImageNetwork, small_resnet
from nestvec.encoders.wider import BalancedLinear, ChangedBasis, wider_linear
from nestvec.measurement.bootstrap import resample
from nestvec.train import (
    BackwardCompatible,
    BasisTransformation,
    ClassLabels,
    HigherOrderCompatible,
    NestedClassifier,
    OldClasses,
    OrthogonalCompatible,
    Settings,
    ShiftAndFlip,
    StationaryClassifier,
    StationaryLabels,
)
from nestvec.train.compatible import OCA_PUBLISHED, OCA_USUAL

NAME = "compatible"
STEPS: dict[str, tuple[int, ...]] = {"cifar10": (5, 6, 8, 10), "omniglot": (68, 90, 113, 136)}
RECIPES: dict[str, dict[str, Any]] = {
    "cifar10": {"epochs": 12, "batch": 128, "rate": 3e-3, "shift": 4, "flip": True},
    "omniglot": {"epochs": 40, "batch": 64, "rate": 2e-3, "shift": 4, "flip": False},
}
START, EXTRA = 128, 32  # size of the first model, and what each step adds
SIZES = (32, 128, 160, 192, 224)  # those that fit are trained: a Matryoshka model at every step
CAPACITY = 225  # corners of the simplex, of 224 dims: the size of the last model from the start
FROM_OLD = ("bct", "oca", "oca_usual", "bt2", "hoc")  # OCA as published, and as nestvec trains it
METHODS = ("independent", *FROM_OLD[:-1], "simplex", "hoc")
NAMES = {"simplex": "d_simplex", "hoc": "d_simplex_hoc"}
N_TEST, N_TRAIN = 4000, None
TINY = bool(os.environ.get("NESTVEC_TRY"))
if TINY:
    N_TEST, N_TRAIN = 200, 400
    STEPS = {"cifar10": (2, 3, 4, 5), "omniglot": (4, 6, 8, 10)}
    RECIPES = {name: {**recipe, "epochs": 1} for name, recipe in RECIPES.items()}
PRECISION = "bfloat16"
CODE = _training.trained_by("objectives", "heads", "compatible", "simplex") + _training.code_hash(
    _frame.ROOT / "src/nestvec/encoders/wider.py"
)


# --- data -------------------------------------------------------------------------------------


@cache
def data(dataset: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Split -> (images uint8 (n, channels, side, side), class numbers)."""
    if dataset == "omniglot":
        seen = read_images(
            _frame.data_folder() / "omniglot_small/omniglot_small.npz", split="train"
        )
        images, labels = np.asarray(seen.images), np.asarray(seen.labels)
        drawing = np.zeros(len(labels), dtype=int)  # 0..19 of each character
        for label in np.unique(labels):
            drawing[labels == label] = np.arange(20)
        sides = {"train": drawing < 14, "test": drawing >= 14}
        images = images.reshape(len(labels), 1, 35, 35)
        if TINY:
            sides = {name: rows & (labels < max(STEPS[dataset])) for name, rows in sides.items()}
        return {name: (images[rows], labels[rows]) for name, rows in sides.items()}
    file = _frame.data_folder() / "cifar10/cifar10_10k.npz"
    found = {}
    for split, most in (("train", N_TRAIN), ("test", N_TEST)):
        one = read_images(file, split=split)
        images, labels = np.asarray(one.images)[:most], np.asarray(one.labels)[:most]
        found[split] = (np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels)
    return found


class Table(nn.Module):
    """Images that stay on the device: picked by row, normalised, augmented, stretched."""

    def __init__(self, images: np.ndarray, shift: int, flip: bool) -> None:
        super().__init__()
        values = images[::7] / 255
        self.mean, self.std = float(values.mean()), float(values.std())
        self.augment = ShiftAndFlip(shift, flip=flip)
        self.images: Tensor
        self.register_buffer("images", torch.from_numpy(images), persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        pixels = (self.images[rows].float() / 255 - self.mean) / self.std
        if self.training:
            pixels = self.augment(pixels)
        return F.interpolate(pixels, size=(64, 64), mode="bilinear", antialias=False)


# --- training ---------------------------------------------------------------------------------


class Task(nn.Module):
    """``forward(rows)`` of row numbers gives the loss; all else lies on the device."""

    def __init__(
        self,
        table: Table,
        network: nn.Module,
        objective: nn.Module,
        labels: np.ndarray,
        beside: list[np.ndarray],
    ) -> None:
        super().__init__()
        self.table, self.network, self.objective = table, network, objective
        self.labels: Tensor
        self.register_buffer("labels", torch.from_numpy(labels), persistent=False)
        self.n_beside = len(beside)
        for at, vectors in enumerate(beside):
            values = torch.from_numpy(vectors.astype(np.float32))
            self.register_buffer(f"beside_{at}", values, persistent=False)

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        found = self.network(self.table(rows))
        more = [getattr(self, f"beside_{at}")[rows] for at in range(self.n_beside)]
        with torch.autocast(found.device.type, enabled=False):
            return {"loss": self.objective(found.float(), self.labels[rows], *more)}


def size_of(method: str, step: int, direct: bool) -> int:
    """Return how long the vectors of a model are."""
    if method in ("simplex", "hoc"):
        return CAPACITY - 1
    if method == "bct":
        return START
    return START + EXTRA * (1 if direct else step - 1)


def old_of(method: str, step: int, direct: bool) -> tuple[str, int, bool] | None:
    """Return (method, step, direct) of the model that one is to be compatible with."""
    if method not in FROM_OLD:
        return None
    if step > 2 and not direct:
        return method, step - 1, False
    return ("simplex" if method == "hoc" else "independent"), 1, False


def sizes(full: int) -> tuple[int, ...]:
    return tuple(sorted({*(size for size in SIZES if size <= full), full}))


def build(
    method: str,
    n_classes: int,
    out: int,
    labels: np.ndarray,
    beside: list[np.ndarray],
    channels: int,
) -> tuple[nn.Module, nn.Module, list[np.ndarray]]:
    """Return the network, the objective, and what the latter is handed beside rows and labels."""
    resnet = small_resnet(n_channels=channels)
    head: nn.Module = wider_linear(resnet.dim, out)
    old, more = beside[:1], beside[:1]
    classes = None
    if old and method != "hoc":
        vectors = torch.from_numpy(old[0].astype(np.float32))
        dims = sizes(old[0].shape[1])
        classes = OldClasses(vectors, torch.from_numpy(labels), n_classes, dims=dims)
    if method in ("simplex", "hoc"):
        corners = StationaryClassifier(CAPACITY, dims=(32, 128, CAPACITY - 1))
        objective: nn.Module = StationaryLabels(corners)
        if method == "hoc":
            objective = HigherOrderCompatible(objective)
    elif method == "independent":
        objective = ClassLabels(NestedClassifier(sizes(out), n_classes))
    elif method == "bt2":
        assert classes is not None
        dim = old[0].shape[1]
        head = basis = ChangedBasis(resnet.dim, dim, dim, extra=EXTRA)
        objective = BasisTransformation(basis, NestedClassifier((dim,), n_classes), classes)
        more = [*old, main_directions(beside[1], dim)]
    else:
        assert classes is not None
        own = NestedClassifier(sizes(out), n_classes, normalise=method != "bct")
        if method == "bct":
            objective = BackwardCompatible(own, classes)
        else:
            options = dict(OCA_PUBLISHED if method == "oca" else OCA_USUAL)
            balance = options.pop("balance")
            if balance is not None:
                head = BalancedLinear(resnet.dim, old[0].shape[1], out, balance=balance)
            objective = OrthogonalCompatible(own, classes, **options)
    return ImageNetwork(resnet.backbone, dim=out, head=head), objective, more


def main_directions(vectors: np.ndarray, dim: int) -> np.ndarray:
    """Return vectors in their ``dim`` main directions: BT2 asks for a model of just that size."""
    rows = vectors.astype(np.float32)
    _, axes = np.linalg.eigh(rows.T @ rows)
    return rows @ axes[:, ::-1][:, :dim]


def trained(
    dataset: str, method: str, seed: int, step: int, direct: bool = False
) -> _training.Arrays:
    """Return the vectors of train and test images, of every class, as a model sees them."""
    recipe = recipe_of(dataset, method, seed, step, direct)

    def make(folder: Path) -> _training.Arrays:
        images, labels = data(dataset)["train"]
        chosen = np.flatnonzero(labels < STEPS[dataset][step - 1])
        beside = []
        before = old_of(method, step, direct)
        if before is not None:
            name, at, one_hop = before
            beside.append(trained(dataset, name, seed, at, one_hop)["train"][chosen])
        if method == "bt2":
            beside.append(trained(dataset, "independent", seed, step)["train"][chosen])
        torch.manual_seed(seed + 100 * step)  # a new model is no copy of the old one's start
        options = RECIPES[dataset]
        out, n_classes = size_of(method, step, direct), STEPS[dataset][step - 1]
        network, objective, more = build(
            method, n_classes, out, labels[chosen], beside, images.shape[1]
        )
        table = Table(images[chosen], options["shift"], options["flip"])
        task = Task(table, network, objective, labels[chosen], more)
        settings = Settings(
            epochs=options["epochs"],
            batch_size=options["batch"],
            learning_rate=options["rate"],
            weight_decay=0.05,
            schedule="cosine",
            precision=PRECISION,
            seed=seed,
            save_every=0.5,
        )
        seconds = _training.train(
            task, len(chosen), lambda rows: {"rows": torch.from_numpy(rows)}, folder, settings
        )
        task.eval()
        found: _training.Arrays = {"seconds": np.float64(seconds)}
        for split in ("train", "test"):
            table.images = torch.from_numpy(data(dataset)[split][0]).to(table.images.device)
            with torch.no_grad():
                rows = torch.arange(len(table.images), device=table.images.device).split(500)
                found[split] = torch.cat([network(table(some)) for some in rows]).cpu().numpy()
            found[split] = found[split].astype(np.float16)
        return found

    return _training.kept(NAME, recipe, make, code=CODE)


def recipe_of(dataset: str, method: str, seed: int, step: int, direct: bool) -> dict[str, Any]:
    before = old_of(method, step, direct)
    return {
        "dataset": dataset,
        "method": method,
        "seed": seed,
        "step": step,
        "direct": direct,
        "old": before and recipe_of(dataset, before[0], seed, *before[1:]),
        "classes": STEPS[dataset],
        "sizes": [START, EXTRA, CAPACITY, *SIZES],
        "n_test": N_TEST,
        "precision": PRECISION,
        **RECIPES[dataset],
    }


def follow(dataset: str, method: str, seed: int) -> None:
    """Train a series, each model from the one before."""
    for step in (2, 3, 4):
        trained(dataset, method, seed, step)


def jobs(runs: list[tuple[str, int, str]]) -> list[list[partial[Any]]]:
    """Return trainings in two rounds: those that know no other, longest first, and the others."""
    alone = sorted({(d, m, s) for d, s, _ in runs for m in ("independent", "simplex")})
    first = [partial(trained, *one, step) for step in (4, 3, 2, 1) for one in alone]
    others = [(d, m, s) for d, s, m in runs if m in FROM_OLD]
    then = [partial(follow, *one) for one in others]
    return [first, then + [partial(trained, *one, 4, True) for one in others]]


# --- scoring ----------------------------------------------------------------------------------


def search(
    queries: np.ndarray, gallery: np.ndarray, labels: np.ndarray, dim: int, device: str
) -> dict[str, np.ndarray]:
    """Return AP and 1-NN of each query among all other images, by cosine of prefixes."""
    q, g = (
        F.normalize(torch.from_numpy(side[:, :dim].astype(np.float32)).to(device), dim=1)
        for side in (queries, gallery)
    )
    y = torch.from_numpy(labels).to(device)
    ap, first = [], []
    ranks = torch.arange(1, len(y), device=device)
    for some in torch.arange(len(y), device=device).split(1000):
        scores = q[some] @ g.T
        scores[torch.arange(len(some), device=device), some] = -9.0  # itself, the last of all
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :-1]
        right = (y[order] == y[some, None]).float()
        precision = right.cumsum(dim=1) / ranks
        ap.append((precision * right).sum(dim=1) / right.sum(dim=1))
        first.append(right[:, 0])
    return {"mAP": torch.cat(ap).cpu().numpy(), "1-NN": torch.cat(first).cpu().numpy()}


def series(method: str) -> list[tuple[str, int, bool]]:
    """Return the models of a method's series, from the first to the last."""
    first = "simplex" if method in ("simplex", "hoc") else "independent"
    return [(first, 1, False), *((method, step, False) for step in (2, 3, 4))]


def pairs(method: str) -> list[tuple[str, tuple[str, int, bool], tuple[str, int, bool]]]:
    """Return (key, query model, gallery model) of all that is compared."""
    models = series(method)
    found = [(f"{i + 1}-{j + 1}", models[i], models[j]) for i in range(4) for j in range(i + 1)]
    if method in FROM_OLD:
        last = (method, 4, True)
        found += [("direct-4-1", last, models[0]), ("direct-4-4", last, last)]
    return found


def scored_recipe(dataset: str, seed: int, method: str) -> dict[str, Any]:
    run = recipe_of(dataset, method, seed, 4, False)
    return {"dataset": dataset, "method": f"scored-{method}", "seed": seed, "run": run}


def scored(dataset: str, seed: int, method: str, device: str = "cpu") -> _training.Arrays:
    """``pair/dim/metric`` -> a value a query."""

    def make(_: Path) -> _training.Arrays:
        _, labels = data(dataset)["test"]
        found = {}
        for key, new, old in pairs(method):
            queries, gallery = (
                trained(dataset, name, seed, step, direct)["test"]
                for name, step, direct in (new, old)
            )
            full = min(queries.shape[1], gallery.shape[1])
            for dim in sorted({32, 128, full}):
                one = search(queries, gallery, labels, dim, device)
                name = "full" if dim == full else str(dim)
                for metric, values in one.items():
                    found[f"{key}/{name}/{metric}"] = values.astype(np.float16)
        return found

    return _training.kept(NAME, scored_recipe(dataset, seed, method), make, code=CODE)


# --- rows -------------------------------------------------------------------------------------

METRICS = ("mAP", "1-NN")
MARGIN = -0.01  # what a safe upgrade may lose
NEXT = ("2-1", "3-2", "4-3", "direct-4-1")  # an upgrade as it is done, from a model to the next


class Rows:
    """Rows of a result file: values by test image, estimated all at once at the end."""

    def __init__(self) -> None:
        self.waiting: list[tuple[dict[str, Any], np.ndarray]] = []

    def add(self, about: dict[str, Any], by_seed: list[np.ndarray]) -> None:
        values = np.mean(by_seed, axis=0)
        self.waiting.append(({**about, "n": len(values)}, values))

    def estimated(self) -> list[dict[str, Any]]:
        """Return the rows: means over test images, with 95% intervals over them."""
        found = {}
        for n in {len(values) for _, values in self.waiting}:
            some = [at for at, (_, values) in enumerate(self.waiting) if len(values) == n]
            one = resample(np.stack([self.waiting[at][1] for at in some]), seed=0)
            found |= dict(zip(some, zip(one.value, *one.interval(), strict=True), strict=True))
        rows = []
        for at, (about, _) in enumerate(self.waiting):
            value, low, high = map(float, found[at])
            verdict = {}
            if "above old/old" in about["metric"]:
                safe = low > MARGIN
                words = "better" if low > 0 else "safe" if safe else "not safe"
                verdict = {"safe": safe, "verdict": words}
            rows.append({**about, "value": value, "low": low, "high": high, **verdict})
        return rows


def rows_of(dataset: str, seeds_of: dict[str, list[int]]) -> list[dict[str, Any]]:
    labels = data(dataset)["test"][1]
    rows, matrices = Rows(), []
    kept = cache(partial(scored, dataset))

    def values(method: str, key: str, dim: str, metric: str) -> list[np.ndarray]:
        name, plain = f"{key}/{dim}/{metric}", f"{key}/full/{metric}"  # of a size that is the full
        found = [kept(seed, method) for seed in seeds]
        return [one[name if name in one else plain].astype(np.float64) for one in found]

    def less(a: list[np.ndarray], b: list[np.ndarray]) -> list[np.ndarray]:
        return [x - y for x, y in zip(a, b, strict=True)]

    for method in METHODS:
        seeds = seeds_of[method]
        many = len(seeds) > 1
        note = f"mean of seeds {', '.join(map(str, seeds))}" if many else f"seed {seeds[0]}"
        named = {"dataset": dataset, "note": note, "method": NAMES.get(method, method)}
        direct = method in FROM_OLD
        crossed = [f"{i}-{j}" for i in (2, 3, 4) for j in range(1, i)]
        crossed += ["direct-4-1"] if direct else []
        for metric in METRICS:
            for key in ("1-1", "2-2", "3-3", "4-4", *(["direct-4-4"] if direct else [])):
                own = values(method, key, "full", metric)
                rows.add({**named, "pair": key, "metric": f"{metric} of itself"}, own)
                alone = values("independent", key[-3:], "full", metric)
                words = f"points above independent ({metric} of itself)"
                lost = [100 * one for one in less(own, alone)]
                rows.add({**named, "pair": key, "metric": words}, lost)
            for key in crossed:
                last = key[-1]
                for dim in ("full", "128", "32") if key in NEXT else ("full",):
                    about = {**named, "pair": key} | ({} if dim == "full" else {"dim": int(dim)})
                    new = values(method, key, dim, metric)
                    gain = less(new, values(method, f"{last}-{last}", dim, metric))
                    rows.add({**about, "metric": f"{metric} new/old"}, new)
                    words = f"{metric} new/old above old/old"
                    rows.add({**about, "metric": words}, gain)
                    if dim == "full" and key in NEXT:
                        knew, knows = (STEPS[dataset][int(t) - 1] for t in (last, key[-3]))
                        groups = {
                            "old classes": labels < knew,
                            "new classes": (labels >= knew) & (labels < knows),
                            "classes unseen by both": labels >= knows,
                        }
                        for group, chosen in groups.items():
                            if chosen.any():
                                some = [one[chosen] for one in gain]
                                rows.add({**about, "metric": f"{words}, {group}"}, some)
            matrices += matrix_rows(named, partial(values, method), metric)
    return rows.estimated() + matrices


def matrix_rows(named: dict[str, Any], values: Any, metric: str) -> list[dict[str, Any]]:
    """Return average compatibility (strictly above, of 6 pairs) and multi-model accuracy."""
    cells = {
        (i, j): [float(v.mean()) for v in values(f"{i}-{j}", "full", metric)]
        for i in (1, 2, 3, 4)
        for j in range(1, i + 1)
    }
    lower = [(i, j) for i, j in cells if j < i]
    n_seeds = len(cells[1, 1])
    met = [[cells[i, j][s] > cells[j, j][s] for i, j in lower] for s in range(n_seeds)]
    found = {"AC": float(np.mean(met)), "AM": float(np.mean(list(cells.values())))}
    return [{**named, "metric": f"{name} ({metric})", "value": v} for name, v in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0", help="e.g. 0,1,2")
    parser.add_argument("--once", default="", help="of the first seed alone, e.g. oca,hoc")
    parser.add_argument("--only", choices=STEPS, help="one data set; nothing is written")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--trained-on", help="said in the result: where the scored-*.npz were made")
    parser.add_argument("--train-only", action="store_true", help="make the scored-*.npz files")
    parser.add_argument("--try", dest="tiny", action="store_true", help="one epoch; no results")
    chosen = parser.parse_args()
    if chosen.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        parser.error("--device cuda: torch finds none")
    if chosen.tiny and not TINY:  # of the processes that are started below, too
        os.environ["NESTVEC_TRY"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    seeds = [int(seed) for seed in chosen.seeds.split(",")]
    datasets = [chosen.only] if chosen.only else list(STEPS)
    meta: dict[str, Any] = {}
    if not chosen.train_only:
        meta = _frame.meta(
            seeds=seeds,
            data=["omniglot_small", "cifar10"],
            precision=PRECISION,
            recipe={**RECIPES, "classes": STEPS, "sizes": SIZES},
            trained_on=chosen.trained_on or f"{chosen.device} of this machine",
        )
    once = [*filter(None, chosen.once.split(","))]
    if wrong := {*once} - {*METHODS}:
        parser.error(f"--once {', '.join(wrong)}: there are {', '.join(METHODS)}")
    seeds_of = {method: seeds[:1] if method in once else seeds for method in METHODS}
    runs = [(d, s, m) for d in datasets for m, some in seeds_of.items() for s in some]
    todo = [one for one in runs if not _training.is_kept(NAME, scored_recipe(*one), code=CODE)]
    for each in (*jobs(todo), [partial(scored, *one, chosen.device) for one in todo]):
        _training.side_by_side(each, n_processes=chosen.jobs)
    if chosen.train_only:
        return
    rows = [row for dataset in datasets for row in rows_of(dataset, seeds_of)]
    if chosen.only is None and not chosen.tiny:
        _frame.write(NAME, rows, meta)
        return
    for row in rows:
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    main()
