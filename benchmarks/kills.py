"""Is anything acknowledged ever lost when a process is killed with SIGKILL?

    python benchmarks/kills.py [--kills 200] [--try]

One index lives through all kills. For each a process of its own opens it, writes down what it
begins and what was acknowledged, and is killed while it adds, upserts, deletes, compacts or builds,
after a random part of the time that this usually takes. Then the index is opened: it has to hold
what was acknowledged and nothing else, a write that was in flight whole or not at all, every
vector has to be the one that was written, `check` has to be clean and searches right.

The state is kept after each kill, so that a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import _frame
import numpy as np
import pyarrow as pa

import nestvec as nv
from nestvec._atomic import written_beside
from nestvec.search.exact import top_k
from nestvec.search.index import Index
from nestvec.search.store import Batch

NAME = "kills"
QUESTION = "Is anything acknowledged ever lost when a process is killed with SIGKILL?"
OPERATIONS = ("add", "upsert", "delete", "compact", "build")
DIM, SHORT = 64, 32
SPACE = nv.Space.declared("kills", dim=DIM, nesting_dims=(SHORT, DIM))
PAYLOAD = pa.schema([("value", pa.int64())])
FIRST_ROWS = 6000
SIZES = (1, 40, 400)  # rows of a write
N_STEPS = 30  # of a process that nobody kills
K = 10
PLANS = (  # wide enough to find nearly everything
    f"exact {DIM}@{K}",
    f"exact {SHORT}:int8@1000 > {DIM}@{K}",
    f"graph(ef=400) {DIM}:int8@400 > {DIM}@{K}",
    f"lists(probes=100000) {SHORT}:int8@1000 > {DIM}@{K}",
)
LEAST_RECALL = 0.9
USUAL_S = {"add": 0.05, "upsert": 0.05, "delete": 0.05, "compact": 0.5, "build": 0.5}
KEPT = 9  # durations of each operation

Model = dict[int, int]  # id to value
Step = dict[str, Any]


def vectors(ids: Any, values: Any) -> np.ndarray:
    """Return the vectors that rows have while their values are those."""
    turns = np.random.default_rng(0).uniform(0, 7, size=(2, DIM))
    rows = np.cos(np.outer(ids, turns[0]) + np.outer(values, turns[1]))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


QUERIES = vectors([-1, -2, -3, -4, -5], [0] * 5)


def batch(ids: list[int], value: int) -> Batch:
    return Batch(vectors(ids, [value] * len(ids)), ids, {"value": [value] * len(ids)})


def applied(model: Model, step: Step) -> Model:
    """Return what a step makes of the rows."""
    if step["does"] == "delete":
        return {i: value for i, value in model.items() if i not in set(step["ids"])}
    new: Model = dict.fromkeys(step["ids"], int(step["value"]))
    return model | new


def held(index: Index) -> tuple[Model, int]:
    """Return the rows of an index, and how many of their vectors are not as they were written."""
    found: Model = {}
    wrong = 0
    snapshot = index._home.store.snapshot  # `get` would want to know the ids
    for block in snapshot.scan(["id", "vector", "value"]):
        ids, values = (block.columns[name].to_numpy() for name in ("id", "value"))
        there = block.columns["vector"].flatten().to_numpy().reshape(-1, DIM)
        wrong += int((there != vectors(ids, values)).any(axis=1).sum())
        wrong += len(found.keys() & set(ids.tolist()))  # an id that is there twice
        found |= dict(zip(ids.tolist(), values.tolist(), strict=True))
    return found, wrong


# --- the process that is killed -------------------------------------------------------------------


def write(path: Path, aim: str, seed: int, log: int) -> None:
    """Do what is aimed at again and again, and other things between."""

    def say(**words: Any) -> None:
        os.write(log, (json.dumps(words) + "\n").encode())

    rng = np.random.default_rng(seed)
    index = Index.open(path, durability=["power", "process"][seed % 2])
    model = held(index)[0]
    for number in range(N_STEPS):
        does = aim
        if number % 2 == 1:  # something to compact, and as many rows on the whole
            does = "add" if len(model) < FIRST_ROWS else str(rng.choice(["upsert", "delete"]))
        size = int(rng.choice(SIZES))
        old = rng.permutation(list(model))[:size].tolist()
        new = [max(model, default=0) + 1 + n for n in range(size)]
        ids = {"add": new, "upsert": old[size // 2 :] + new[: size // 2], "delete": old}
        step = {"does": does, "ids": ids.get(does, []), "value": seed * N_STEPS + number}
        if does == "build":  # so that there is something to build
            parts = sorted(path.glob("derived/*/*")) + sorted(path.glob("derived/*"))
            shutil.rmtree(parts[rng.integers(len(parts))], ignore_errors=True)
            index = Index.open(path)
        say(begins=step)
        started = time.perf_counter()
        if does in ("add", "upsert"):
            getattr(index, does)(batch(step["ids"], step["value"]))
        elif does == "delete":
            index.delete(step["ids"])
        elif does == "compact":
            index.compact()
        else:
            index.build("graph", "lists")
            for plan in PLANS[1:]:  # codes are made when a plan asks for them
                index.search(QUERIES, plan=plan)
        say(took=time.perf_counter() - started)
        model = applied(model, step)


def fork_writers(path: Path) -> None:
    """For each line ``aim seed log`` fork a writer, say its number, wait for its end, say how.

    Imports are done once, so that a kill is cheap; nothing of Lance runs before a fork.
    """
    warnings.filterwarnings("ignore", "lance is not fork-safe")
    for line in sys.stdin:
        aim, seed, log = line.split(maxsplit=2)
        pid = os.fork()
        if pid == 0:
            try:
                write(path, aim, int(seed), os.open(log.strip(), os.O_WRONLY | os.O_CREAT))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        print(pid, flush=True)
        status = os.waitpid(pid, 0)[1]
        print("killed" if os.WIFSIGNALED(status) else f"ended by itself: {status}", flush=True)


# --- the process that kills, and looks ------------------------------------------------------------


def said(log: Path) -> list[dict[str, Any]]:
    whole = log.read_text().rpartition("\n")[0] if log.is_file() else ""
    return [json.loads(line) for line in whole.splitlines()]


def has_ended(pid: int) -> bool:
    """Tell whether a process is there no more, or only to be waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def kill_one(writer: Any, aim: str, number: int, log: Path, usual: float) -> None:
    """Let a writer begin what is aimed at, for the first time or a later one, and kill it in it."""
    dice = np.random.default_rng([1, number])
    log.unlink(missing_ok=True)
    writer.stdin.write(f"{aim} {number} {log}\n")
    writer.stdin.flush()
    pid = int(writer.stdout.readline())
    wanted = int(dice.integers(1, 4))
    while sum(words.get("begins", {}).get("does") == aim for words in said(log)) < wanted:
        if has_ended(pid):
            break
        time.sleep(0.002)
    time.sleep(dice.uniform(0, 1.1 * usual))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    end = writer.stdout.readline().strip()
    if end != "killed":
        sys.exit(f"kill {number}: the writer {end}")


def looked_at(path: Path, model: Model, log: Path, number: int) -> tuple[Model, dict[str, Any]]:
    """Compare the index with what was acknowledged; return what it holds, and the findings."""
    step: Step | None = None
    durations = []
    for words in said(log):
        if "begins" in words:
            step = words["begins"]
        elif step is not None:
            model = applied(model, step)
            durations.append((step["does"], words["took"]))
            step = None
    after = model if step is None else applied(model, step)
    index = Index.open(path)
    found, wrong = held(index)
    touched = [i for i in model.keys() | after.keys() if model.get(i) != after.get(i)]
    n_done = sum(found.get(i) == after.get(i) for i in touched)
    result = after if touched and n_done == len(touched) else model
    strange = sum(found.get(i) != result.get(i) for i in found.keys() | result.keys())
    half = int(0 < n_done < len(touched))
    return found, {
        "durations": durations,
        "in_flight": None if step is None else step["does"],
        "went_through": bool(touched) and result is after,
        "acknowledged": len(model),
        "lost": wrong + (0 if half else strange),
        "half": half,
        "unclean": int(not index.check()["ok"]),
        "wrong_searches": wrong_searches(index, found, number),
    }


def wrong_searches(index: Index, model: Model, number: int) -> int:
    """Count plans of two that do not find what is nearest, or give a score that is not true."""
    ids = np.array(sorted(model))
    gallery = vectors(ids, [model[i] for i in ids.tolist()])
    nearest, best = top_k(QUERIES, gallery, K)
    wrong = 0
    for plan in (PLANS[0], PLANS[1 + number % 3]):
        hits = index.search(QUERIES, plan=plan)
        at = np.searchsorted(ids, hits.ids)
        true = np.array_equal(ids[np.minimum(at, len(ids) - 1)], hits.ids) and np.allclose(
            hits.scores, np.einsum("qd,qkd->qk", QUERIES, gallery[at]), atol=1e-5
        )
        if plan is PLANS[0]:
            good = np.allclose(hits.scores, best, atol=1e-5)
        else:
            shares = [np.isin(a, b).mean() for a, b in zip(hits.ids, ids[nearest], strict=True)]
            good = np.mean(shares) >= LEAST_RECALL
        wrong += not (true and good)
    return wrong


def usual(findings: list[dict[str, Any]], aim: str) -> float:
    """Return the seconds that an operation took of late."""
    seconds = [s for one in findings for does, s in one["durations"] if does == aim]
    return statistics.median(seconds[-KEPT:]) if seconds else USUAL_S[aim]


def run(place: Path, kills: int) -> list[dict[str, Any]]:
    """Kill as often, or as often as is left to do; return the findings of each kill."""
    path, kept = place / "x.nest", place / "state.json"
    if not kept.is_file():
        shutil.rmtree(place)
        place.mkdir()
        index = Index.create(path, SPACE, id_type="int", payload=PAYLOAD, durability="process")
        index.add(batch(list(range(FIRST_ROWS)), 1))
        index.build("graph", "lists")
        save(kept, dict.fromkeys(range(FIRST_ROWS), 1), [])
    state = json.loads(kept.read_text())
    model, findings = {int(i): value for i, value in state["model"].items()}, state["findings"]
    command = [sys.executable, __file__, "--writer", str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as writer:
        while len(findings) < kills:
            number = len(findings) + 1
            aim = OPERATIONS[number % len(OPERATIONS)]
            log = place / f"{number}.log"
            if not log.is_file():  # or it was killed, and then we were, before we looked
                kill_one(writer, aim, number, log, usual(findings, aim))
            model, found = looked_at(path, model, log, number)
            findings.append({"aim": aim, **found})
            save(kept, model, findings)
            log.unlink()
            shown = {key: value for key, value in found.items() if key != "durations"}
            print(f"{number} {aim} {shown}", flush=True)
    index = Index.open(path)
    index.compact()
    left = [str(p) for p in path.glob("derived/**/*.part")]
    if left or len(list(path.glob("derived/*"))) != 1 or held(index) != (model, 0):
        sys.exit(f"after all kills: something is left or lost, {left}")
    return findings


def save(kept: Path, model: Model, findings: list[dict[str, Any]]) -> None:
    with written_beside(kept) as scratch:
        scratch.write_text(json.dumps({"model": model, "findings": findings}))


def rows_of(findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for aim in (*OPERATIONS, "all"):
        mine = [one for one in findings if aim in (one["aim"], "all")]
        if not mine:
            continue
        flying = [one for one in mine if one["in_flight"] is not None]
        through = sum(one["went_through"] for one in flying)
        writes = sum(one["in_flight"] in ("add", "upsert", "delete") for one in flying)
        whole = f", {through} of {writes} unacknowledged writes found whole, the others not at all"
        rows.append(
            {
                "dataset": f"about {FIRST_ROWS:,} x {DIM}",
                "method": aim,
                "metric": "writes half done",
                "value": sum(one["half"] for one in mine),
                "n": len(mine),
                "acknowledged": sum(one["acknowledged"] for one in mine),
                "lost": sum(one["lost"] for one in mine),
                "note": f"kill -9; acknowledged: rows looked for, summed over kills; "
                f"{len(flying)} of {len(mine)} kills while something was in flight"
                f"{whole if writes else ''}; "
                f"checks not clean: {sum(one['unclean'] for one in mine)}; "
                f"searches wrong: {sum(one['wrong_searches'] for one in mine)}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--try", dest="trial", action="store_true", help="20 kills, no result file")
    parser.add_argument("--writer", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.writer:
        fork_writers(asked.writer)
        return
    kills = 20 if asked.trial else asked.kills
    meta = _frame.meta(seeds=[0], question=QUESTION, sizes=SIZES)
    place = _frame.cache_folder(f"{NAME}-try" if asked.trial else NAME)
    started = time.perf_counter()
    rows = rows_of(run(place, kills))
    for row in rows:
        print(row)
    print(f"{time.perf_counter() - started:.0f} s")
    shutil.rmtree(place)  # the next run starts anew
    if kills >= 200:
        _frame.write(NAME, rows, meta)


if __name__ == "__main__":
    main()
