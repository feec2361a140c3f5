"""Does the lists plan take 5,000,000 x 384 vectors in under 4 GB, and how soon does it answer?

    python benchmarks/large.py [--rows 5000000] [--precision float16] [--try]

Clustered rows are made by seed, some at a time, and added; full vectors and lists are derived from
them, and the process that builds the lists is killed with SIGKILL when half of the rows have their
list, and started again. Each step is a process of its own, whose memory is looked at from outside:
the peak of RssAnon + RssShmem, with RssFile (mapped files, which the kernel may drop) beside it.
Exact neighbours of the queries are gathered while the rows are made.

The seconds from opening to the first answer are those of the million rows that `memory` indexed
(or of these ones, with --try): with kernels compiled before, and with an empty cache of them.

What was done is kept, so that a run that was interrupted goes on. It needs about 20 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _frame
import numpy as np
from memory import built, resident

import nestvec as nv
from nestvec.search.exact import top_k
from nestvec.search.index import Index
from nestvec.search.store import Batch

NAME = "large"
QUESTION = "Does the lists plan take 5,000,000 x 384 vectors in under 4 GB?"
DIM, SHORT, K = 384, 128, 10
ROWS = 5_000_000
ADDED = 250_000  # rows of a version
AT_ONCE = 25_000  # rows in memory
N_QUERIES = 200
CLUSTERS, INNER = 500, 20
SEED = 0
PROBES, KEEPS = (2, 8, 32, 128), (80, 160)
OPENS = 5
#: Those of the million rows; it is opened with lists.
OPEN_SET, OPEN_METHOD = "real1m", "nestvec_lists"

Matrix = np.ndarray


def plan(probes: int, keep: int) -> str:
    return f"lists(probes={probes}) {SHORT}:int8@{keep} > {DIM}@{K}"


def unit(rows: Matrix) -> Matrix:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def rows_of(number: int, n: int, stream: int = 1) -> Matrix:
    """Return rows of a seed, clusters in clusters whose spectrum falls as 1/i."""
    shape = np.random.default_rng([SEED, 0])
    spread = (np.arange(1, DIM + 1) ** -0.5).astype(np.float32)
    inner = (shape.standard_normal((CLUSTERS, DIM), dtype=np.float32) * spread).repeat(INNER, 0)
    inner += 0.7 * shape.standard_normal(inner.shape, dtype=np.float32) * spread
    rng = np.random.default_rng([SEED, stream, number])
    rows = rng.standard_normal((n, DIM), dtype=np.float32)
    rows *= 0.5 * spread
    rows += inner[rng.integers(len(inner), size=n)]
    return unit(rows)


def queries() -> Matrix:
    return rows_of(0, N_QUERIES, stream=2)


# --- steps, each in a process of its own ----------------------------------------------------------


def add(place: Path, n: int, precision: str) -> dict[str, Any]:
    """Add the rows that are not there, and gather the neighbours."""
    path, asked = place / "x.nest", queries()
    if not path.exists():
        space = nv.Space.declared("large", dim=DIM)
        Index.create(path, space, id_type="int", precision=precision, durability="process")
    index = Index.open(path, durability="process")
    for start in range(0, n, ADDED):
        best: list[tuple[Matrix, Matrix]] = []
        if len(index) >= min(start + ADDED, n):
            continue

        def batches(
            start: int = start, best: list[tuple[Matrix, Matrix]] = best
        ) -> Iterator[Batch]:
            for at in range(start, min(start + ADDED, n), AT_ONCE):
                some = rows_of(at, min(AT_ONCE, n - at))
                found, scores = top_k(asked, some, K)
                best.append((found + at, scores))
                yield Batch(some, np.arange(at, at + len(some)))
            keep_best(place / f"truth-{start}.npz", best)  # before the rows are acknowledged

        index.add(batches())
        print(f"  {len(index):,} rows", file=sys.stderr, flush=True)
    files = [np.load(file) for file in sorted(place.glob("truth-*.npz"))]
    keep_best(place / "truth.npz", [(file["rows"], file["scores"]) for file in files])
    return {"record_bytes": index._home.store.stats().record_bytes}


def keep_best(file: Path, best: list[tuple[Matrix, Matrix]]) -> None:
    rows, scores = (np.concatenate(part, axis=1) for part in zip(*best, strict=True))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :K]
    rows, scores = (np.take_along_axis(part, order, axis=1) for part in (rows, scores))
    np.savez(file, rows=rows, scores=scores)


def derive(place: Path) -> dict[str, Any]:
    return {"derived_bytes": Index.open(place / "x.nest").stats()["derived_bytes"]}


def build(place: Path) -> dict[str, Any]:
    Index.open(place / "x.nest").build("lists")
    return {}


def encode(place: Path) -> dict[str, Any]:
    Index.open(place / "x.nest").search(queries()[:1], plan=plan(PROBES[0], KEEPS[0]))
    return {}


def search(place: Path) -> dict[str, Any]:
    index, asked = Index.open(place / "x.nest"), queries()
    truth = np.load(place / "truth.npz")["rows"]
    said = []
    for probes in PROBES:
        for keep in KEEPS:
            words = plan(probes, keep)
            ids = index.search(asked, plan=words, threads=1).ids
            shares = [np.isin(want, got).mean() for want, got in zip(truth, ids, strict=True)]
            took = []
            for row in range(N_QUERIES):
                started = time.perf_counter()
                index.search(asked[row : row + 1], plan=words, threads=1)
                took.append(1000 * (time.perf_counter() - started))
            said.append({"plan": words, "recall": float(np.mean(shares)), "ms": took})
    stats = index.stats()
    return {"plans": said, "resident_bytes": stats["resident_bytes"], "rows": stats["rows"]}


def opens(path: Path, dim: int, words: str) -> dict[str, Any]:
    """Say the seconds from opening an index to its first answer."""
    asked = np.ones((1, dim), np.float32)
    started = time.perf_counter()
    Index.open(path).search(asked, plan=words)
    return {"seconds": time.perf_counter() - started}


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    one.__name__: one for one in (add, derive, build, encode, search, opens)
}


# --- what starts them, and watches ----------------------------------------------------------------


def watched(
    step: str,
    *words: Any,
    until: Callable[[], bool] | None = None,
    env: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Run a step in a process of its own; kill it once ``until`` holds; say what it took."""
    command = [sys.executable, __file__, "--step", step, *map(str, words)]
    started, peak, mapped, killed = time.perf_counter(), 0, 0, False
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    while child.poll() is None:
        kinds = resident(child.pid)
        peak = max(peak, kinds["RssAnon"] + kinds["RssShmem"])
        mapped = max(mapped, kinds["RssFile"])
        if until is not None and not killed and until():
            child.kill()
            killed = True
        time.sleep(0.01)
    out = child.communicate()[0]
    if child.returncode and not killed:
        sys.exit(f"{step} failed with {child.returncode}")
    said = {} if killed else json.loads(out.splitlines()[-1])
    clock = time.perf_counter() - started
    return {"clock": clock, "anonymous": peak, "mapped": mapped, "killed": killed, **said}


def run(place: Path, n: int, precision: str) -> dict[str, dict[str, Any]]:
    """Do the steps that are left to do."""
    kept = place / "steps.json"
    done: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.is_file() else {}

    def step(name: str, *words: Any, **more: Any) -> None:
        if name.partition(" ")[0] not in STEPS or name in done:
            return
        print(f"  {name} ...", flush=True)
        done[name] = watched(name.partition(" ")[0], place, *words, **more)
        print(f"  {name}: {done[name]}"[:300], flush=True)
        kept.write_text(json.dumps(done))

    def pieces() -> int:
        return len(list(place.glob("x.nest/derived/*/lists.part/lists-*.npy")))

    step("add", n, precision)
    step("derive")
    step("build killed", until=lambda: pieces() >= max(1, n // 65_536 // 2))
    if not done["build killed"]["killed"]:
        print("  the lists were built before they could be killed", flush=True)
    step("build again")
    step("encode")
    step("search")
    return done


def opening(path: Path, dim: int, words: str) -> dict[str, list[dict[str, Any]]]:
    """Open an index in fresh processes: kernels compiled before, and not."""
    watched("opens", path, dim, words)  # compiles, and warms the page cache
    warm = [watched("opens", path, dim, words) for _ in range(OPENS)]
    cold = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as empty:
            env = {**os.environ, "NUMBA_CACHE_DIR": empty}
            cold.append(watched("opens", path, dim, words, env=env))
    return {"warm": warm, "cold": cold}


def rows(
    done: dict[str, dict[str, Any]], opened: dict[str, Any], n: int, precision: str, open_row: Any
) -> list[dict[str, Any]]:
    common = {"dataset": f"clusters {n:,} x {DIM} {precision}", "method": "nestvec_lists", "n": n}
    notes = {
        "add": 'made and added, durability="process"',
        "derive": "full vectors in a mapped file",
        "build killed": "lists, killed when half of the rows had theirs",
        "build again": "lists, gone on with",
        "encode": f"codes of {SHORT} dims, and a first search",
        "search": "of all plans",
    }
    found = []
    for name, note in notes.items():
        one = done[name]
        if name == "build killed" and not one["killed"]:
            note = "lists, built before they could be killed"
        found.append(
            {
                **common,
                "dim": DIM,
                "metric": f"seconds, {name}",
                "value": round(one["clock"], 1),
                "rss_bytes": one["anonymous"],
                "bytes_per_vector": round(one["anonymous"] / n, 1),
                "note": f"{note}; RssFile up to {one['mapped'] / 1e6:.0f} MB",
            }
        )
    for one in done["search"]["plans"]:
        found.append(
            {
                **common,
                "dim": DIM,
                "metric": "recall@10",
                "recall": one["recall"],
                "qps": round(1000 / float(np.mean(one["ms"])), 1),
                "p50_ms": round(float(np.quantile(one["ms"], 0.5)), 3),
                "p99_ms": round(float(np.quantile(one["ms"], 0.99)), 3),
                "threads": 1,
                "rss_bytes": done["search"]["anonymous"],
                "note": f"{one['plan']}; {N_QUERIES} queries, one a call, by the clock",
            }
        )
    for kernels, runs in opened.items():
        seconds = [run["seconds"] for run in runs]
        processes = float(np.median([run["clock"] for run in runs]))
        found.append(
            {
                **open_row,
                "metric": "seconds from open to first answer",
                "value": round(float(np.median(seconds)), 3),
                "low": round(min(seconds), 3),
                "high": round(max(seconds), 3),
                "rss_bytes": max(run["anonymous"] for run in runs),
                "note": f"kernel cache {kernels}, page cache warm, {len(runs)} fresh processes; "
                f"imports and exit included a process takes {processes:.2f} s",
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--precision", choices=["float32", "float16"], default="float32")
    parser.add_argument("--keep", action="store_true", help="keep the index")
    parser.add_argument(
        "--try", dest="trial", action="store_true", help="150,000 rows, no result file"
    )
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.step:
        name, place, *words = asked.step
        words = [int(word) if word.isdigit() else word for word in words]
        print(json.dumps(STEPS[name](Path(place), *words)))
        return
    n = 150_000 if asked.trial else asked.rows
    meta = _frame.meta(seeds=[SEED], question=QUESTION, rows_at_once=AT_ONCE)
    place = _frame.cache_folder(f"{NAME}-{n}-{asked.precision}")
    started = time.perf_counter()
    done = run(place, n, asked.precision)
    if asked.trial:
        path, words = place / "x.nest", plan(PROBES[0], KEEPS[0])
        open_row = {"dataset": "the same", "method": "nestvec_lists", "n": n, "dim": DIM}
    else:
        folder, took = built(OPEN_SET, OPEN_METHOD)
        path, words = folder / "x.nest", "lists(probes=32) 96:int8@80 > 256@10"
        open_row = {"dataset": OPEN_SET, "method": OPEN_METHOD, "n": took["n"], "dim": took["dim"]}
    found = rows(done, opening(path, open_row["dim"], words), n, asked.precision, open_row)
    for row in found:
        print(row)
    print(f"{time.perf_counter() - started:.0f} s")
    if not asked.keep:
        shutil.rmtree(place)
    if n == ROWS:
        _frame.write(NAME, found, meta)


if __name__ == "__main__":
    main()
