"""What does fitting the principal rotation cost, on more rows than one would load?

1,000,000 x 768 float32 on disk (unit rows, power-law spectrum, made once from a seed). Each
contender runs in a process of its own, every round runs all of them in turn, and the file is
dropped from the page cache before each, so the rate includes reading it; imports are not counted.
Memory is the peak of RssAnon: what the process itself holds, mapped file pages left out. All find
the basis; ``energy_share`` is the share of the squared length of 10,000 fresh rows that its first
64 axes hold.

``--rows`` and ``--rounds`` make it smaller (then nothing is written), ``--keep`` keeps the file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _frame
import numpy as np

QUESTION = "What does fitting the principal rotation cost, on more rows than one would load?"
DIM = 768
BLOCK = 8192
SEED = 0
FRESH = 10_000
SHARE_AT = 64  # dims
ROWS = 1_000_000
INCREMENTAL_ROWS = 100_000  # it takes seconds a block; its rate does not depend on how many

OURS = "principal_rotation"
NOTES = {
    OURS: "memory map, in blocks",
    "numpy_blocks": "memory map, X.T @ X in blocks as float64, eigh",
    "numpy_whole": "np.load, X.T @ X as float32, eigh as float64",
    "sklearn_pca": "np.load, PCA(svd_solver='covariance_eigh'); centred",
    "sklearn_incremental_pca": (
        f"memory map, IncrementalPCA(batch_size={BLOCK}) of {INCREMENTAL_ROWS:,} rows; centred"
    ),
}


def main() -> None:
    """Measure every contender in turn and write the result file."""
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="keep the file of vectors")
    parser.add_argument("--contender", choices=NOTES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    path = _frame.cache_folder("rotation_fit") / f"{asked.rows}x{DIM}-seed{SEED}.npy"
    if asked.contender:
        print(json.dumps(contend(asked.contender, path)))
        return
    meta = _frame.meta(seeds=[SEED], question=QUESTION, block=BLOCK)
    make(path, asked.rows)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in NOTES}
    for _ in range(asked.rounds):
        for name in NOTES:
            runs[name].append(measured(name, path))
            print(name, runs[name][-1], flush=True)
    if not asked.keep:
        path.unlink()
    rows = [row for name in NOTES for row in rows_of(name, runs, asked.rows)]
    if asked.rows == ROWS:
        _frame.write("rotation_fit", rows, meta)


def make(path: Path, n: int) -> None:
    """Write the vectors, unless they are there."""
    if path.exists():
        return
    part = path.with_suffix(".part")
    whole = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=(n, DIM))
    for start, block in zip(range(0, n, BLOCK), blocks(SEED), strict=False):
        whole[start : start + BLOCK] = block[: n - start]
    whole.flush()
    part.rename(path)


def blocks(seed: int) -> Iterator[np.ndarray]:
    """Yield blocks of unit rows whose i-th principal axis has variance of about 1/i."""
    basis = np.linalg.qr(np.random.default_rng(SEED).normal(size=(DIM, DIM)))[0]
    scaled = (basis / np.sqrt(np.arange(1, DIM + 1))).astype(np.float32).T  # row i: axis i
    rng = np.random.default_rng([SEED, seed])
    while True:
        block = rng.standard_normal((BLOCK, DIM), dtype=np.float32) @ scaled
        yield block / np.linalg.norm(block, axis=1, keepdims=True)


def contend(name: str, path: Path) -> dict[str, float]:
    """Fit one contender, in this process; return seconds and the energy share."""
    fit = CONTENDERS[name]()
    started = time.perf_counter()
    axes, n = fit(path)  # (dim, dim): one axis a row, largest first; and the rows it saw
    seconds = time.perf_counter() - started
    fresh = np.concatenate([b for b, _ in zip(blocks(SEED + 1), range(2), strict=False)])[:FRESH]
    share = float(np.square(fresh @ axes[:SHARE_AT].T).sum() / np.square(fresh).sum())
    return {"seconds": seconds, "rows_per_second": n / seconds, "energy_share": share}


Fit = Callable[[Path], tuple[Any, int]]


def principal_rotation() -> Fit:
    from nestvec.maps import PrincipalRotation

    def fit(path: Path) -> tuple[Any, int]:
        rows = np.load(path, mmap_mode="r")
        return PrincipalRotation(batch_size=BLOCK).fit(rows).components_, len(rows)

    return fit


def numpy_blocks() -> Fit:
    def fit(path: Path) -> tuple[Any, int]:
        rows = np.load(path, mmap_mode="r")
        moment = np.zeros((DIM, DIM))
        for start in range(0, len(rows), BLOCK):
            block = rows[start : start + BLOCK].astype(np.float64)
            moment += block.T @ block
        return np.linalg.eigh(moment / len(rows))[1].T[::-1].astype(np.float32), len(rows)

    return fit


def numpy_whole() -> Fit:
    def fit(path: Path) -> tuple[Any, int]:
        rows = np.load(path)
        moment = (rows.T @ rows).astype(np.float64)
        return np.linalg.eigh(moment / len(rows))[1].T[::-1].astype(np.float32), len(rows)

    return fit


def sklearn_pca() -> Fit:
    from sklearn.decomposition import PCA

    def fit(path: Path) -> tuple[Any, int]:
        rows = np.load(path)
        return PCA(svd_solver="covariance_eigh").fit(rows).components_, len(rows)

    return fit


def sklearn_incremental_pca() -> Fit:
    from sklearn.decomposition import IncrementalPCA

    def fit(path: Path) -> tuple[Any, int]:
        rows = np.load(path, mmap_mode="r")[:INCREMENTAL_ROWS]
        return IncrementalPCA(batch_size=BLOCK).fit(rows).components_, len(rows)

    return fit


CONTENDERS = {
    contender.__name__: contender
    for contender in (
        principal_rotation,
        numpy_blocks,
        numpy_whole,
        sklearn_pca,
        sklearn_incremental_pca,
    )
}


def measured(name: str, path: Path) -> dict[str, float]:
    """Run one contender in a process of its own; add the peak of its RssAnon, in bytes."""
    with path.open("rb") as file:  # off the page cache, so that all read from disk
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    rows = path.name.partition("x")[0]
    child = subprocess.Popen(
        [sys.executable, __file__, "--contender", name, "--rows", rows],
        stdout=subprocess.PIPE,
        text=True,
    )
    peak = 0
    while child.poll() is None:
        peak = max(peak, anonymous_bytes(child.pid))
        time.sleep(0.005)
    printed, _ = child.communicate()
    if child.returncode:
        sys.exit(f"{name} failed with {child.returncode}")
    return {**json.loads(printed), "rss_bytes": peak}


def anonymous_bytes(pid: int) -> int:
    """Return RssAnon of a process now, 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
    return 1024 * int(found[0]) if found else 0


def rows_of(name: str, runs: dict[str, list[dict[str, float]]], n: int) -> list[dict[str, Any]]:
    """Return the rows of one contender: its rate, its energy share, and ours beside it."""
    mine = runs[name]
    rates = [run["rows_per_second"] for run in mine]
    row = {"dataset": f"{n:,} x {DIM} float32", "method": name, "n": n, "seed": SEED}
    rate = row | {
        "dim": DIM,
        "metric": "rows_per_second",
        "value": statistics.median(rates),
        "low": min(rates),
        "high": max(rates),
        "build_s": statistics.median(run["seconds"] for run in mine),
        "rss_bytes": max(run["rss_bytes"] for run in mine),
        "threads": _frame.threads(),
        "note": NOTES[name],
    }
    share = row | {
        "dim": SHARE_AT,
        "metric": "energy_share",
        "value": statistics.median(run["energy_share"] for run in mine),
    }
    if name == OURS:
        return [rate, share]
    ratios = [
        ours["rows_per_second"] / theirs["rows_per_second"]  # a peer may fit fewer rows
        for ours, theirs in zip(runs[OURS], mine, strict=True)
    ]
    beside = row | {
        "method": OURS,
        "dim": DIM,
        "metric": "rows_per_second_ratio",
        "ratio": statistics.median(ratios),
        "ratio_to": name,
        "low": min(ratios),
        "high": max(ratios),
    }
    return [rate, share, beside]


if __name__ == "__main__":
    main()
