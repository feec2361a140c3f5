"""What the training benchmarks share: runs that are kept and resume, and one way to train.

A run is kept under a hash of its recipe and of the code that trains (comments and docstrings left
out), so an old result is never taken for a new one, and a run that was killed goes on.
"""

from __future__ import annotations

import ast
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import _classify
import _frame
import numpy as np
import torch
from torch import Tensor, nn

from nestvec._atomic import written_beside
from nestvec.classify import choose_thresholds, score_cascade
from nestvec.measurement.bootstrap import resample
from nestvec.train.run import Run
from nestvec.train.settings import Settings
from nestvec.train.trainer import ModuleTrainer

Arrays = dict[str, np.ndarray]


WORDS = ("extra_repr", "get_config_dict")  # methods that say something and do nothing


def code_hash(*files: Path) -> str:
    """Hash what Python would run of these files."""
    digest = hashlib.sha256()
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
                if isinstance(body[0].value, ast.Constant):
                    del body[0]
            if isinstance(node, ast.ClassDef):
                node.body = [one for one in node.body if getattr(one, "name", "") not in WORDS]
        # Python 3.12 adds type_params, empty here: one Python may keep a run that another reads
        digest.update(ast.dump(tree).replace(", type_params=[]", "").encode())
    return digest.hexdigest()[:12]


def trained_by(*modules: str) -> str:
    """Hash the modules of nestvec.train that decide what a run learns."""
    return code_hash(*(_frame.ROOT / f"src/nestvec/train/{name}.py" for name in modules))


CLASSIFIES = trained_by("objectives", "heads")


def kept(
    name: str, recipe: Mapping[str, Any], make: Callable[[Path], Arrays], *, code: str = CLASSIFIES
) -> Arrays:
    """Return what ``make(folder)`` returned for this recipe, now or in an earlier run.

    ``folder`` is for whatever ``make`` wants to find again after a kill.
    """
    label, place = _place(name, recipe, code)
    file = place.with_suffix(".npz")
    if not file.is_file():
        print(f"  {label} ...", flush=True)
        started = time.perf_counter()
        found = make(place)
        found.setdefault("seconds", np.float64(time.perf_counter() - started))
        with written_beside(file) as scratch:
            np.savez(scratch, **found)
        shutil.rmtree(place, ignore_errors=True)
        print(f"  {label}: {float(found['seconds']):.0f} s", flush=True)
    with np.load(file, allow_pickle=False) as stored:
        return dict(stored)


def is_kept(name: str, recipe: Mapping[str, Any], *, code: str = CLASSIFIES) -> bool:
    """Return whether `kept` would make nothing."""
    return _place(name, recipe, code)[1].with_suffix(".npz").is_file()


def _place(name: str, recipe: Mapping[str, Any], code: str) -> tuple[str, Path]:
    text = json.dumps({**recipe, "code": code}, sort_keys=True)
    keys = ("dataset", "method", "seed", "step")
    label = "-".join(str(recipe[key]) for key in keys if key in recipe)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return label, _frame.cache_folder(name) / f"{label}-{digest}"


class Task(nn.Module):
    """An encoder and an objective: ``forward(**inputs, labels)`` gives the loss."""

    def __init__(self, encoder: nn.Module, objective: nn.Module) -> None:
        super().__init__()
        self.encoder, self.objective = encoder, objective

    def forward(self, labels: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        rows = self.encoder(**inputs)
        with torch.autocast(rows.device.type, enabled=False):
            return {"loss": self.objective(rows.float(), labels)}


class Numbers(torch.utils.data.Dataset[int]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, row: int) -> int:
        return row


def train(
    task: nn.Module,
    n_rows: int,
    batch: Callable[[np.ndarray], dict[str, Tensor]],
    folder: Path,
    settings: Settings,
    *,
    head: nn.Module | None = None,
) -> float:
    """Train with nestvec's trainer; return the seconds it took (of the last go, if resumed)."""
    run = Run(folder, {"settings": settings.to_dict()})
    trainer = ModuleTrainer(
        task,
        Numbers(n_rows),
        run,
        settings=settings,
        collate=lambda rows: batch(np.array(rows)),
        head=head,
    )
    started = time.perf_counter()
    trainer.go()
    return time.perf_counter() - started


def side_by_side(jobs: Sequence[Callable[[], Any]], *, n_processes: int = 2) -> None:
    """Run jobs in processes of one thread each: two cores do that faster than one job of two."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started below
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(n_processes, mp_context=context) as pool:
            for done in as_completed([pool.submit(_quietly, job) for job in jobs]):
                done.result()
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _quietly(job: Callable[[], Any]) -> None:
    job()  # what it returns is kept on disk


def accuracy_row(
    dataset: str, method: str, dim: int | None, kind: str, correct: list[np.ndarray], **more: Any
) -> dict[str, Any]:
    """Return the row of one method and size: the mean over seeds, and its interval over rows."""
    estimate = resample(np.mean(correct, axis=0)[None, :].astype(float), seed=0)
    (low,), (high,) = estimate.interval()
    return {
        "dataset": dataset,
        "method": method,
        "dim": dim,
        "metric": f"accuracy ({kind})",
        "value": float(estimate.value[0]),
        "low": float(low),
        "high": float(high),
        "n": len(correct[0]),
        **more,
    }


def difference_row(
    dataset: str,
    names: tuple[str, str],
    dim: int | None,
    kind: str,
    correct: tuple[list[np.ndarray], list[np.ndarray]],
    **more: Any,
) -> dict[str, Any]:
    """Return the first minus the second in points: paired over test rows, seeds averaged."""
    value, low, high = _classify.paired(*correct)
    return {
        "dataset": dataset,
        "method": names[0],
        "dim": dim,
        "metric": f"points above {names[1]} ({kind})",
        "value": value,
        "low": low,
        "high": high,
        "n": len(correct[0][0]),
        **more,
    }


def table(
    dataset: str,
    seeds: list[int],
    methods: Sequence[str],
    scored: Callable[[str, str, int], dict[tuple[int, str], np.ndarray]],
    *,
    kinds: Mapping[str, str],
    trained_dims: Sequence[int],
    separate: Sequence[int],
) -> list[dict[str, Any]]:
    """Return the paper's main table: every method and size, then MRL beside separate models."""
    full = max(trained_dims)
    note = f"mean of seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else ""
    right: dict[tuple[str, int, str], list[np.ndarray]] = {}
    rows = []
    for method in methods:
        name = method.partition("-")[0]
        for dim, kind in scored(dataset, method, seeds[0]):
            right[name, dim, kind] = [scored(dataset, method, seed)[dim, kind] for seed in seeds]
            between = "not a trained size" if name == "mrl" and dim not in trained_dims else ""
            rows.append(
                accuracy_row(
                    dataset,
                    name,
                    dim,
                    kinds[kind],
                    right[name, dim, kind],
                    bytes_per_vector=4 * dim,
                    note="; ".join(filter(None, [between, note])),
                )
            )
    for name in ("mrl", "mrl_e"):
        for kind in {kind for _, _, kind in right}:
            pairs = {
                d: (right[name, d, kind], right["separate", d, kind]) for d in (*separate, full)
            }
            for dim, pair in pairs.items():
                rows.append(
                    difference_row(dataset, (name, "separate"), dim, kinds[kind], pair, note=note)
                )
            short = tuple(
                [
                    np.mean([pairs[d][side][at] for d in separate], axis=0)
                    for at in range(len(seeds))
                ]
                for side in (0, 1)
            )
            words = "; ".join(filter(None, [f"mean of {list(separate)} dims", note]))
            rows.append(
                difference_row(dataset, (name, "separate"), None, kinds[kind], short, note=words)
            )
    return rows


def run_parts(
    name: str,
    parts: Mapping[str, Callable[[], list[dict[str, Any]]]],
    meta: Mapping[str, Any],
    *,
    only: str | None,
) -> None:
    """Run every part and write the result file, or run one part and print it."""
    rows = []
    for part, run in parts.items():
        if only in (None, part):
            print(part, flush=True)
            rows += run()
    if only is None:
        _frame.write(name, rows, meta)
        return
    for row in rows:
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})


def adaptive_rows(
    dataset: str,
    held_out: dict[int, np.ndarray],
    held_labels: np.ndarray,
    fresh: dict[int, np.ndarray],
    labels: np.ndarray,
    seed: int,
) -> list[dict[str, Any]]:
    """Choose thresholds on held-out rows, then say what the cascade does on the test rows."""
    rows = []
    for rule in ("sparing", "paper"):
        chosen = choose_thresholds(held_out, held_labels, rule=rule)
        found = score_cascade(fresh, labels, chosen.thresholds)
        common = {
            "dataset": dataset,
            "method": f"adaptive_{rule}",
            "dim": max(fresh),
            "n": len(labels),
            "seed": seed,
        }
        rows += [
            {**common, "metric": "expected dims", "value": found.expected_dim},
            {**common, "metric": "accumulated dims", "value": found.accumulated_dim},
            {**common, "metric": "accuracy (own head)", "value": found.accuracy},
            {
                **common,
                "metric": "points above full (own head)",
                "value": 100 * found.difference,
                "low": 100 * (found.difference_low or 0.0),
                "high": 100 * (found.difference_high or 0.0),
            },
        ]
    return rows


def softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).double().softmax(dim=1).numpy()
