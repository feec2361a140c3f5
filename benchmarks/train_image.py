"""Nested image encoders beside separately trained ones, and where they break.

    python benchmarks/train_image.py [--seeds 0,1,2] [--only omniglot]

- omniglot: 136 characters, 16 drawings each to train on and 4 to test; 106 characters never seen.
- cifar10: 10,000 photos; then corrupted ones, a long tail, 40% wrong labels, and captions.

All networks are `small_resnet` of 256 dims from fresh weights. The default (seed 0) run does
everything once; ``--seeds 0,1,2`` repeats omniglot and robustness.
"""

from __future__ import annotations

import argparse
from functools import cache, partial
from pathlib import Path
from typing import Any

import _classify
import _corruptions
import _frame
import _training
import numpy as np
import torch
from _slimmable import SlimmableResNet
from torch import Tensor, nn

from nestvec.corpus.images import Images, read_images
from nestvec.encoders.image_network import ImageNetwork, Preprocessing, small_resnet
from nestvec.train import (
    ClassLabels,
    NestedClassifier,
    NestedDropout,
    Settings,
    ShiftAndFlip,
    best_size,
    train_image_text,
)

NAME = "train_image"
DIMS = (8, 16, 32, 64, 128, 256)
BETWEEN = (12, 24, 48, 96, 192)  # sizes that were not trained
SEPARATE = (8, 32)
SIZE = 64  # images are stretched to it: the ResNet halves twice before its first stage
PRECISION = "bfloat16"
RECIPES: dict[str, dict[str, Any]] = {
    "omniglot": {"epochs": 40, "batch": 64, "rate": 2e-3, "shift": 6, "flip": False},
    "cifar10": {"epochs": 15, "batch": 64, "rate": 2e-3, "shift": 8, "flip": True},
    "cifar10_lt": {"epochs": 40, "batch": 64, "rate": 2e-3, "shift": 8, "flip": True},
    "cifar10_noisy": {"epochs": 25, "batch": 64, "rate": 2e-3, "shift": 8, "flip": True},
}
NOISE = 0.4
CORRUPTIONS, SEVERITY = ("noise", "blur", "jpeg"), 3


# --- data -------------------------------------------------------------------------------------


@cache
def data(dataset: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Split -> (images uint8, class numbers)."""
    if dataset == "omniglot":
        folder = _frame.data_folder() / "omniglot_small/omniglot_small.npz"
        seen, unseen = (read_images(folder, split=split) for split in ("train", "test"))
        drawing = np.zeros(len(seen), dtype=int)  # 0..19 of each character
        for label in np.unique(seen.labels):
            drawing[seen.labels == label] = np.arange(20)
        late = drawing >= 16
        return {
            "train": (seen.images[~late], seen.labels[~late]),
            "test": (seen.images[late], seen.labels[late]),
            "unseen": (unseen.images, unseen.labels),
        }
    file = _frame.data_folder() / "cifar10/cifar10_10k.npz"
    train, test = (read_images(file, split=split) for split in ("train", "test"))
    found = {"train": (train.images, train.labels), "test": (test.images, test.labels)}
    if dataset == "cifar10_lt":
        with np.load(file) as arrays:
            rows = arrays["lt_idx"]
        found["train"] = (train.images[rows], train.labels[rows])
    if dataset == "cifar10_noisy":
        rng = np.random.default_rng(0)
        labels = train.labels.copy()
        wrong = rng.random(len(labels)) < NOISE
        labels[wrong] = (labels[wrong] + rng.integers(1, 10, wrong.sum())) % 10
        order = rng.permutation(len(labels))  # the last tenth chooses the size: noisy, too
        found["train"] = (train.images[order[:9000]], labels[order[:9000]])
        found["held"] = (train.images[order[9000:]], labels[order[9000:]])
    if dataset == "cifar10":
        for kind in CORRUPTIONS:
            found[kind] = (_corruptions.corrupt(test.images, kind, SEVERITY, seed=0), test.labels)
    return found


@cache
def preprocessing(dataset: str) -> Preprocessing:
    images, _ = data(dataset)["train"]
    n_channels = 1 if images.ndim == 3 or images.shape[-1] == 1 else 3
    values = images.reshape(-1, n_channels)[::97] / 255
    return Preprocessing(SIZE, n_channels, values.mean(0).tolist(), values.std(0).tolist())


@cache
def pixels(dataset: str, split: str) -> Tensor:
    """Preprocessed once, in half precision."""
    images, _ = data(dataset)[split]
    parts = [preprocessing(dataset)(images[i : i + 500]) for i in range(0, len(images), 500)]
    return torch.cat([part.half() for part in parts])


# --- classification ---------------------------------------------------------------------------


class Augmented(nn.Module):
    def __init__(self, network: nn.Module, shift: int, flip: bool, after: nn.Module | None) -> None:
        super().__init__()
        self.augment = ShiftAndFlip(shift, flip=flip)
        self.network, self.after = network, after

    def forward(self, pixel_values: Tensor) -> Tensor:
        if self.training:
            pixel_values = self.augment(pixel_values)
        rows = self.network(pixel_values)
        return rows if self.after is None else self.after(rows)


class Slimmed(nn.Module):
    def __init__(self, n_channels: int, n_classes: int, shift: int, flip: bool) -> None:
        super().__init__()
        self.augment = ShiftAndFlip(shift, flip=flip)
        self.encoder = SlimmableResNet(
            DIMS, n_channels, (32, 64, 128, 256), (1, 1, 1, 1), n_classes
        )

    def forward(self, labels: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        if self.training:
            pixel_values = self.augment(pixel_values)
        return {"loss": self.encoder.loss(pixel_values, labels)}


METHODS: dict[str, dict[str, Any]] = {
    "mrl": {"dims": DIMS},
    "mrl_e": {"dims": DIMS, "tied": True},
    "separate-256": {"dims": (256,)},
    **{f"separate-{dim}": {"dims": (dim,)} for dim in SEPARATE},
    "slimmable": {"dims": DIMS},
    "nested_dropout": {"dims": (256,), "dropout": 0.1},  # of 0.02 and 0.1, by the held-out rows
}


def trained(dataset: str, method: str, seed: int, **more: Any) -> _training.Arrays:
    about, options = METHODS[method], {**RECIPES[dataset], **more}
    recipe = {
        "dataset": dataset,
        "method": method,
        "seed": seed,
        "size": SIZE,
        "precision": PRECISION,
        **about,
        **options,
    }

    def make(folder: Path) -> _training.Arrays:
        inputs, (_, labels) = pixels(dataset, "train"), data(dataset)["train"]
        n_channels, n_classes = inputs.shape[1], int(labels.max()) + 1
        shift, flip = options["shift"], options["flip"]
        torch.manual_seed(seed)
        if method == "slimmable":
            head, task = None, Slimmed(n_channels, n_classes, shift, flip)
            network: Any = task.encoder
        else:
            network = small_resnet(n_channels=n_channels)
            head = NestedClassifier(about["dims"], n_classes, tied=about.get("tied", False))
            rate = about.get("dropout")
            after = NestedDropout(rate=rate) if rate else None
            task = _training.Task(Augmented(network, shift, flip, after), ClassLabels(head))
        settings = Settings(
            epochs=options["epochs"],
            batch_size=options["batch"],
            learning_rate=options["rate"],
            weight_decay=0.05,
            schedule="cosine",
            precision=PRECISION,
            seed=seed,
        )
        seconds = _training.train(
            task,
            len(labels),
            lambda rows: {
                "pixel_values": inputs[rows].float(),
                "labels": torch.from_numpy(labels[rows]),
            },
            folder,
            settings,
        )
        task.eval()
        found: _training.Arrays = {"seconds": np.float64(seconds)}
        for split in data(dataset):
            parts = pixels(dataset, split).split(250)
            with torch.no_grad():
                if method == "slimmable":
                    if split in ("train", "test", "unseen"):
                        for dim in DIMS:
                            rows = torch.cat([network(part.float(), dim) for part in parts])
                            found[f"{split}-{dim}"] = rows.numpy()
                    continue
                rows = torch.cat([network(part.float()) for part in parts])
                found[split] = rows.numpy()
                sizes = head.dims
                if about.get("dropout"):
                    sizes = (1, 2, 4, 6, *DIMS, *BETWEEN)
                for dim in sizes:
                    kept = rows
                    if about.get("dropout"):  # what training saw: zeros behind the prefix
                        kept = rows * (torch.arange(rows.shape[1]) < dim)
                    logits = head.logits(kept, head.dims[-1] if about.get("dropout") else dim)
                    if split != "train":
                        found[f"{split}-logits-{dim}"] = logits.numpy()
        return found

    return _training.kept(NAME, recipe, make)


SCORED = (
    "mrl",
    "mrl_e",
    *(f"separate-{dim}" for dim in (*SEPARATE, 256)),
    "principal_rotation",
    "random_features",
    "csr",
    "slimmable",
)
KIND = {"linear_head": "linear head", "1nn": "1-NN", "unseen": "1-NN, unseen classes"}


@cache
def scored(dataset: str, method: str, seed: int) -> dict[tuple[int, str], np.ndarray]:
    """(size, kind) -> which test rows are right."""
    derived = method in ("principal_rotation", "random_features", "csr")
    base = "separate-256" if derived else method
    stored = trained(dataset, base, seed)
    if method == "csr":
        sizes = SEPARATE
    elif derived:
        sizes = DIMS[:-1]
    elif method == "mrl":
        sizes = tuple(sorted({*DIMS, *BETWEEN}))
    else:
        sizes = METHODS[method]["dims"]
    _, train_labels = data(dataset)["train"]
    _, labels = data(dataset)["test"]

    def sides(split: str, dim: int) -> tuple[np.ndarray, np.ndarray]:
        if method == "slimmable":
            return stored[f"train-{dim}"], stored[f"{split}-{dim}"]
        if derived and method != "csr":
            return _classify.rotations(stored["train"], stored[split], seed=seed)[method]
        return stored["train"], stored[split]

    def make(_: Path) -> _training.Arrays:
        found = {}
        for dim in sizes:
            train, test = sides("test", dim)
            score = _classify.score
            if method == "csr":
                score = partial(_classify.csr_correct, seed=seed)
            right = dict(score(train, train_labels, test, labels, dim))
            if dataset == "omniglot" and method != "csr":
                rows, unseen = sides("unseen", dim)[1], data(dataset)["unseen"][1]
                right["unseen"] = _classify.leave_one_out_1nn(rows, unseen, dim)
            found |= {f"{dim}/{kind}": rows for kind, rows in right.items()}
        return found

    prints = [float(stored[name].sum()) for name in sorted(stored) if name.startswith("test")]
    recipe = {"dataset": dataset, "method": f"scored-{method}", "seed": seed, "sizes": list(sizes)}
    code = _training.code_hash(Path(_classify.__file__)) + str(prints)
    found = _training.kept(NAME, recipe, make, code=code)
    found.pop("seconds")
    return {(int(k.split("/")[0]), k.split("/")[1]): v for k, v in found.items()}


def classification(dataset: str, seeds: list[int]) -> list[dict[str, Any]]:
    left_out = {"nested_dropout", *(["slimmable"] if dataset == "cifar10" else [])}
    methods = [method for method in METHODS if method not in left_out]
    table = [method for method in SCORED if method not in left_out]
    _training.side_by_side([partial(trained, dataset, m, s) for s in seeds for m in methods])
    _training.side_by_side([partial(scored, dataset, m, s) for s in seeds for m in table])
    return _training.table(
        dataset, seeds, table, scored, kinds=KIND, trained_dims=DIMS, separate=SEPARATE
    )


# --- where it might break ---------------------------------------------------------------------


def own_right(
    dataset: str, method: str, split: str, dim: int, seed: int, **more: Any
) -> np.ndarray:
    """Which rows the model's own head of a size gets right."""
    stored = trained(dataset, method, seed, **more)
    return stored[f"{split}-logits-{dim}"].argmax(axis=1) == data(dataset)[split][1]


def robustness(seeds: list[int]) -> list[dict[str, Any]]:
    """Points lost under corruption, MRL's beside those of the separately trained models."""
    methods = ("mrl", *(f"separate-{dim}" for dim in (*SEPARATE, 256)))
    _training.side_by_side([partial(trained, "cifar10", m, s) for s in seeds for m in methods])
    note = f"mean of seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else ""
    rows = []
    for dim in (*SEPARATE, 256):
        for kind in CORRUPTIONS:
            dataset = f"cifar10_{kind}{SEVERITY}"
            lost = {}
            for name, method in (("mrl", "mrl"), ("separate", f"separate-{dim}")):
                clean, dirty = (
                    [own_right("cifar10", method, split, dim, s).astype(float) for s in seeds]
                    for split in ("test", kind)
                )
                lost[name] = [a - b for a, b in zip(clean, dirty, strict=True)]
                rows.append(
                    _training.accuracy_row(dataset, name, dim, "own head", dirty, note=note)
                )
            value, low, high = _classify.paired(lost["mrl"], lost["separate"])
            rows.append(
                {
                    "dataset": dataset,
                    "method": "mrl",
                    "dim": dim,
                    "metric": "points lost beyond separate (own head)",
                    "value": value,
                    "low": low,
                    "high": high,
                    "n": len(lost["mrl"][0]),
                    "note": note,
                }
            )
    return rows


LT = ("mrl", "separate-8", "separate-32", "separate-256")
GROUPS = {"many": (0, 1, 2, 3), "medium": (4, 5, 6), "few": (7, 8, 9)}  # 1000-215, 129-46, 28-10


def long_tail(seed: int) -> list[dict[str, Any]]:
    _training.side_by_side([partial(trained, "cifar10_lt", m, seed) for m in LT])
    _, labels = data("cifar10_lt")["test"]
    rows = []
    for dim in (*SEPARATE, 256):
        right = {
            "mrl": own_right("cifar10_lt", "mrl", "test", dim, seed),
            "separate": own_right("cifar10_lt", f"separate-{dim}", "test", dim, seed),
        }
        for group, classes in {"all": tuple(range(10)), **GROUPS}.items():
            chosen = np.isin(labels, classes)
            some = {name: found[chosen] for name, found in right.items()}
            dataset = f"cifar10_lt_{group}"
            for name, found in some.items():
                rows.append(
                    _training.accuracy_row(dataset, name, dim, "own head", [found], seed=seed)
                )
            rows.append(
                _training.difference_row(
                    dataset,
                    ("mrl", "separate"),
                    dim,
                    "own head",
                    ([some["mrl"]], [some["separate"]]),
                    seed=seed,
                )
            )
    return rows


NOISY_EPOCHS = (25, 60)  # before and after a network has learned the wrong labels by heart


def label_noise(seed: int) -> list[dict[str, Any]]:
    """Nested dropout, cut where the held-out (and noisy) tenth says, beside cross-entropy."""
    names = ("nested_dropout", "separate-256")
    _training.side_by_side(
        [partial(trained, "cifar10_noisy", m, seed, epochs=e) for e in NOISY_EPOCHS for m in names]
    )
    rows = []
    for epochs in NOISY_EPOCHS:
        right = partial(own_right, "cifar10_noisy", seed=seed, epochs=epochs)
        stored = trained("cifar10_noisy", "nested_dropout", seed, epochs=epochs)
        sizes = [int(n.rpartition("-")[2]) for n in stored if n.startswith("held-logits-")]
        held = {dim: right("nested_dropout", "held", dim).mean() for dim in sizes}
        dim = best_size(held)
        ours = right("nested_dropout", "test", dim)
        plain = right("separate-256", "test", 256)
        note = f"{NOISE:.0%} of the training labels are wrong; {epochs} epochs"
        rows += [
            _training.accuracy_row(
                "cifar10_noisy", "nested_dropout", dim, "own head", [ours], seed=seed, note=note
            ),
            _training.accuracy_row(
                "cifar10_noisy", "cross_entropy", 256, "own head", [plain], seed=seed, note=note
            ),
            _training.difference_row(
                "cifar10_noisy",
                ("nested_dropout", "cross_entropy"),
                dim,
                "own head",
                ([ours], [plain]),
                seed=seed,
                note=note,
            ),
        ]
    return rows


# --- captions ---------------------------------------------------------------------------------

CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
TEMPLATES = (
    "a photo of a {}.",
    "a blurry photo of a {}.",
    "a small picture of a {}.",
    "this is a {}.",
    "a close-up of a {}.",
    "there is a {} here.",
    "a {} in the distance.",
    "one {}, seen by chance.",
)
CAPTION_DIMS = (8, 32, 256)
SHUFFLED = 0.3
CAPTIONS = {"epochs": 12, "batch": 128, "rate": 2e-3, "shift": 8, "flip": True}


@cache
def captions() -> list[str]:
    rng = np.random.default_rng(0)
    _, labels = data("cifar10")["train"]
    said = [TEMPLATES[rng.integers(len(TEMPLATES))].format(CLASSES[y]) for y in labels]
    wrong = np.flatnonzero(rng.random(len(said)) < SHUFFLED)
    for row, other in zip(wrong, rng.permutation(wrong), strict=True):
        said[row] = TEMPLATES[rng.integers(len(TEMPLATES))].format(CLASSES[labels[other]])
    return said


def dual(dims: tuple[int, ...], seed: int) -> _training.Arrays:
    method = "dual-mrl" if len(dims) > 1 else f"dual-{dims[0]}"
    recipe = {"dataset": "cifar10", "method": method, "seed": seed, "dims": dims, **CAPTIONS}

    def make(folder: Path) -> _training.Arrays:
        from nestvec.encoders import ImageEncoder, TextEncoder

        images, _ = data("cifar10")["train"]
        torch.manual_seed(seed)
        network = small_resnet()
        if max(dims) < network.dim:  # one trained at that size: a linear map to it at the end
            last = nn.Sequential(network, nn.Linear(network.dim, max(dims)))
            network = ImageNetwork(last, dim=max(dims))
        found = train_image_text(
            network,
            "all-MiniLM-L6-v2",
            Images([str(i) for i in range(len(images))], images),
            captions(),
            folder,
            dims=dims,
            preprocessing=preprocessing("cifar10"),
            augment=ShiftAndFlip(CAPTIONS["shift"], flip=CAPTIONS["flip"]),
            settings=Settings(
                epochs=CAPTIONS["epochs"],
                batch_size=CAPTIONS["batch"],
                learning_rate=CAPTIONS["rate"],
                weight_decay=0.05,
                schedule="cosine",
                precision=PRECISION,
                seed=seed,
            ),
        )
        every = [t.format(c) for c in CLASSES for t in TEMPLATES]
        texts = TextEncoder(found.folder / "text").encode(every)
        encoder = ImageEncoder(network, preprocessing=preprocessing("cifar10"))
        pictures = encoder.encode(data("cifar10")["test"][0])
        return {"images": pictures.array, "captions": texts.array}

    return _training.kept(NAME, recipe, make, code=_training.trained_by("objectives", "image_text"))


def caption_rows(seed: int) -> list[dict[str, Any]]:
    captions()
    runs = [CAPTION_DIMS, *((dim,) for dim in CAPTION_DIMS)]
    _training.side_by_side([partial(dual, dims, seed) for dims in runs])
    _, labels = data("cifar10")["test"]
    rng = np.random.default_rng(1)
    own = labels * len(TEMPLATES) + rng.integers(len(TEMPLATES), size=len(labels))
    rows = []
    for dim in CAPTION_DIMS:
        right: dict[str, dict[str, np.ndarray]] = {}
        for name, dims in (("mrl", CAPTION_DIMS), ("separate", (dim,))):
            stored = dual(dims, seed)
            pictures = _classify.unit_prefix(stored["images"], dim)
            texts = _classify.unit_prefix(stored["captions"], dim)
            classes = texts.reshape(10, len(TEMPLATES), dim).mean(axis=1)
            classes /= np.linalg.norm(classes, axis=1, keepdims=True)
            nearest = np.argsort(-pictures @ texts.T, axis=1)[:, :10]
            right[name] = {
                "zero-shot": (pictures @ classes.T).argmax(axis=1) == labels,
                "image-text recall@10 of 80": (nearest == own[:, None]).any(axis=1),
            }
        for kind in right["mrl"]:
            note = f"{SHUFFLED:.0%} of the captions are shuffled"
            for name, found in right.items():
                rows.append(
                    _training.accuracy_row(
                        "cifar10_captions", name, dim, kind, [found[kind]], seed=seed, note=note
                    )
                )
            rows.append(
                _training.difference_row(
                    "cifar10_captions",
                    ("mrl", "separate"),
                    dim,
                    kind,
                    ([right["mrl"][kind]], [right["separate"][kind]]),
                    seed=seed,
                    note=note,
                )
            )
    return rows


def main() -> None:
    parts = {
        "omniglot": lambda: classification("omniglot", seeds),
        "cifar10": lambda: classification("cifar10", seeds[:1]),
        "robustness": lambda: robustness(seeds),
        "long_tail": lambda: long_tail(seeds[0]),
        "label_noise": lambda: label_noise(seeds[0]),
        "captions": lambda: caption_rows(seeds[0]),
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0", help="of omniglot and robustness, e.g. 0,1,2")
    parser.add_argument("--only", choices=parts, help="one part; nothing is written")
    chosen = parser.parse_args()
    seeds = [int(seed) for seed in chosen.seeds.split(",")]
    meta = _frame.meta(
        seeds=seeds,
        data=["omniglot_small", "cifar10"],
        precision=PRECISION,
        recipe={**RECIPES, "captions": CAPTIONS, "size": SIZE},
    )
    _training.run_parts(NAME, parts, meta, only=chosen.only)


if __name__ == "__main__":
    main()
