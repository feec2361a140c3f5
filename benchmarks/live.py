"""Does an index answer all the time while it is upgraded and killed, and lose nothing?

    python benchmarks/live.py [--rows 200000] [--kills 5] [--try]

An index of 200,000 rows, searched by two processes without a pause, by queries of the old model
and, as soon as it is served, of the new one. Each has one handle, opened before anything begins,
and never opens it again. Meanwhile rows are written, with old vectors and with new ones, and
deleted; and a process upgrades the index: it starts, backfills, finishes, and is killed (kill -9)
once in the start, once in the finish, and otherwise in the backfill, and begun again each time.
Then every row that was acknowledged is looked for in the index, with the vector that the new model
gives it.

A copy of the index is upgraded in part, killed, and rolled back: its answers to queries of the old
model are compared bit by bit with those from before.

Vectors are drawn by seed: 2,000 clusters, seen by two models as two random projections with noise
of their own. The new model's vectors are looked up, at no cost, so the backfill is held to a rate.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import _frame
import numpy as np
import pyarrow as pa

import nestvec as nv
from nestvec.errors import SpaceMismatchError, StorageError
from nestvec.maps.guard import unit
from nestvec.search.index import Index
from nestvec.upgrade import Upgrade

NAME = "live"
QUESTION = "Does an index answer all the time while it is upgraded and killed, and lose nothing?"
LATENT, CLUSTERS, N_QUERIES, K = 48, 2000, 64, 10
OLD = nv.Space.declared("live-old", dim=96)
NEW = nv.Space.declared("live-new", dim=128)
SPACES = {"old": OLD, "new": NEW}
PLAN = "lists(probes=64) 96:int8@100 > 96@10"
SAMPLE = 2000
RATE_S = 30.0  # seconds of a backfill that nobody kills
WRITES_EVERY_S = 1.0
PIECE = 20  # rows of a write


# --- vectors --------------------------------------------------------------------------------------


def meanings(first: int, n: int) -> np.ndarray:
    """Return what rows are about, (n, latent): the same for an id, however many are asked for."""
    centres = np.random.default_rng(1).normal(size=(CLUSTERS, LATENT))
    some = []
    for block in range(first // 1000, (first + n - 1) // 1000 + 1):
        rng = np.random.default_rng([2, block])
        some.append(centres[rng.integers(CLUSTERS, size=1000)] + rng.normal(size=(1000, LATENT)))
    at = first % 1000
    return np.concatenate(some)[at : at + n]


def seen_by(model: str, meaning: np.ndarray, seed: Any) -> np.ndarray:
    """Return the vectors that a model gives to meanings."""
    dim = SPACES[model].dim
    words = np.random.default_rng([3, dim]).normal(size=(LATENT, dim))
    noise = np.random.default_rng(seed).normal(size=(len(meaning), dim))
    return unit((meaning @ words + 2 * noise).astype(np.float32))


def vectors(place: Path, model: str) -> np.ndarray:
    """Return the vectors of all ids that the run may use, mapped from the file made at first."""
    return np.load(place / f"{model}.npy", mmap_mode="r")


def queries(model: str) -> nv.Embeddings:
    """Return the queries of a model: the same meanings in both."""
    return nv.Embeddings(seen_by(model, meanings(10**7, N_QUERIES), [5, 1]), SPACES[model])


# --- processes ------------------------------------------------------------------------------------


def client(path: Path, log: Path, seed: int) -> None:
    """Search until told to end, and write down what was answered and what failed."""
    index = Index.open(path)
    rng = np.random.default_rng(seed)
    asks = {model: queries(model) for model in SPACES}
    index.search(asks["old"], K)
    said: dict[str, Any] = {"searches": {}, "ms": {}, "failed": [], "twice": 0, "short": 0}
    served = {"old"}
    (log.with_suffix(".ready")).touch()
    while not select.select([sys.stdin], [], [], 0.005)[0]:
        model = str(rng.choice(sorted(SPACES)))
        some = rng.choice(N_QUERIES, 4, replace=False)
        started = time.perf_counter()
        try:
            hits = index.search(asks[model][some], K)
        except SpaceMismatchError as error:
            # the new model is not served before the start, the old one not after the finish
            if model in served and not (model == "old" and index.space == NEW):
                said["failed"].append(repr(error))
            continue
        except Exception as error:
            said["failed"].append(repr(error))
            continue
        served.add(model)
        ms = 1000 * (time.perf_counter() - started)
        phase = f"{model}, {phase_of(index)}"
        said["searches"][phase] = said["searches"].get(phase, 0) + 1
        said["ms"].setdefault(phase, []).append(ms)
        said["twice"] += sum(len(set(ids)) < len(ids) for ids in hits.ids.tolist())
        said["short"] += int((hits.ids < 0).any())
    log.write_text(json.dumps(said))


def phase_of(index: Index) -> str:
    if index.space == NEW:
        return "finished"
    return "before" if index.upgrading_to is None else "under upgrade"


def upgrade(path: Path, place: Path, step: str, n: int, log: Path) -> None:
    """Do one step of the upgrade, saying when it begins."""
    index = Index.open(path)
    new = vectors(place, "new")
    log.write_text(step)
    if step == "start":
        ids = np.sort(np.random.default_rng(6).choice(n, SAMPLE, replace=False))
        ids = ids[np.isin(ids, held(index))]
        Upgrade.start(index, nv.Embeddings(new[ids], NEW, ids), column="row")
    elif step == "backfill":
        Upgrade.open(index).backfill(
            lambda rows: new[np.array(rows)], rows_per_second=n / RATE_S, batch_size=512
        )
    elif step == "finish":
        try:
            Upgrade.open(index).finish()
        except StorageError:
            if not Upgrade.complete(index):
                raise


def begun(path: Path, place: Path, step: str, n: int) -> subprocess.Popen:
    """Begin a step in a process of its own, and wait until it does it."""
    log = place / "step.log"
    log.unlink(missing_ok=True)
    words = ["--step", step, "--index", str(path), "--place", str(place), "--rows", str(n)]
    process = subprocess.Popen([sys.executable, __file__, *words, "--log", str(log)])
    while not log.is_file():
        if process.poll() is not None:
            sys.exit(f"{step} ended with {process.returncode} before it began")
        time.sleep(0.005)
    return process


# --- the run --------------------------------------------------------------------------------------


def held(index: Index) -> np.ndarray:
    snapshot = index._home.snapshot()
    return np.array(snapshot.read(snapshot.keys().row_ids, ["id"])["id"].to_pylist())


def made(place: Path, n: int) -> Path:
    """Make the index, and the vectors of both models; kept."""
    path = place / "x.nest"
    if not (place / "made").is_file():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        spare = n + 10_000
        meaning = meanings(0, spare)
        for model in SPACES:
            np.save(place / f"{model}.npy", seen_by(model, meaning, [4, SPACES[model].dim]))
        old = nv.Embeddings(vectors(place, "old")[:n], OLD, np.arange(n))
        index = Index.create(path, old, payload={"row": np.arange(n)})
        index.set_plan(PLAN)
        index.search(queries("old"), K)
        (place / "made").touch()
    return path


class Writer:
    """Writes rows of both models beside the upgrade, and knows what was acknowledged."""

    def __init__(self, path: Path, place: Path, n: int) -> None:
        self.index, self.place = Index.open(path), place
        self.rows = set(range(n))
        self.next, self.n_writes, self.last = n, 0, time.monotonic()
        self.rng = np.random.default_rng(8)

    def write(self, *, force: bool = False) -> None:
        """Write some rows, if it is time."""
        if not force and time.monotonic() - self.last < WRITES_EVERY_S:
            return
        self.last, kind = time.monotonic(), self.n_writes % 3
        self.n_writes += 1
        if kind == 2:
            gone = [int(i) for i in self.rng.choice(sorted(self.rows), PIECE, replace=False)]
            self.index.delete(gone)
            self.rows -= set(gone)
            return
        served = self.index.upgrading_to is not None or self.index.space == NEW
        model = "new" if served and (kind == 1 or self.index.space == NEW) else "old"
        ids = np.arange(self.next, self.next + PIECE)
        rows = nv.Embeddings(vectors(self.place, model)[ids], SPACES[model], ids)
        self.index.add(rows, payload=pa.table({"row": ids}))
        self.rows |= set(ids.tolist())
        self.next += PIECE


def upgraded(path: Path, place: Path, n: int, kills: int) -> dict[str, Any]:
    """Upgrade while it is searched, written to and killed; return what was found."""
    rng = np.random.default_rng(9)
    logs = [place / f"client-{i}.json" for i in range(2)]
    clients = []
    for i, log in enumerate(logs):
        log.unlink(missing_ok=True)
        log.with_suffix(".ready").unlink(missing_ok=True)
        words = ["--client", str(i), "--index", str(path), "--log", str(log)]
        clients.append(
            subprocess.Popen([sys.executable, __file__, *words], stdin=subprocess.PIPE, text=True)
        )
    while not all(log.with_suffix(".ready").is_file() for log in logs):
        time.sleep(0.05)
    writer = Writer(path, place, n)
    aims = ["start", *["backfill"] * (kills - 2), "finish"]
    # where the kill falls within the step, in seconds
    longest = {"start": 3.0, "backfill": RATE_S / kills, "finish": 2.0}
    killed: list[str] = []
    for step in ("start", "backfill", "finish"):
        for aim in [a for a in aims if a == step]:
            process = begun(path, place, step, n)
            until = time.monotonic() + rng.uniform(0.1, 1) * longest[aim]
            while time.monotonic() < until and process.poll() is None:
                if step == "backfill":
                    writer.write()
                time.sleep(0.01)
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                killed.append(step)
            process.wait()
        for attempt in range(9):
            if done(path, step):
                break
            process = begun(path, place, step, n)
            while process.poll() is None:
                if step == "backfill" and not attempt:  # else it would never be done
                    writer.write()
                time.sleep(0.01)
            if process.returncode:
                sys.exit(f"{step} ended with {process.returncode}")
        print(f"{step} done, killed so far: {killed}", flush=True)
    for _ in range(3):
        writer.write(force=True)
    time.sleep(2)  # searches after the end
    for process in clients:
        with contextlib.suppress(BrokenPipeError):
            process.communicate("end\n")
        if process.returncode:
            sys.exit(f"a client ended with {process.returncode}")
    said = [json.loads(log.read_text()) for log in logs]
    return {"clients": said, "killed": killed, "n_writes": writer.n_writes, **looked(path, writer)}


def done(path: Path, step: str) -> bool:
    """Tell whether a step is done: an upgrade is there, no row is pending, the index is new."""
    index = Index.open(path)
    if index.space == NEW:
        return True
    if index.upgrading_to is None or step == "finish":
        return False
    return step == "start" or Upgrade.open(index).status().pending == 0


def looked(path: Path, writer: Writer) -> dict[str, Any]:
    """Look for every row, with the vector that the new model gives it."""
    index = Index.open(path)
    found = index.embeddings()
    ids = found.ids
    right = (found.array == vectors(writer.place, "new")[ids]).all(axis=1)
    hits = Index.open(path).search(queries("new"), K)
    return {
        "acknowledged": len(writer.rows),
        "lost": len(writer.rows - set(ids.tolist())),
        "strange": len(set(ids.tolist()) - writer.rows),
        "wrong": int((~right).sum()),
        "ok": bool(index.check()["ok"]),
        "space": index.space.model,
        "answers": int((hits.ids >= 0).sum()),
    }


def rolled_back(path: Path, place: Path, n: int) -> int:
    """Upgrade a copy half way, kill it, roll it back; count answers that are not as before."""
    index = Index.open(path)
    before = index.search(queries("old"), 100)
    process = begun(path, place, "start", n)
    process.wait()
    process = begun(path, place, "backfill", n)
    time.sleep(RATE_S / 4)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    status = Upgrade.open(path).status()
    print(f"rolling back at {status.sentence}", flush=True)
    Upgrade.open(path).rollback()
    wrong = 0
    for handle in (index, Index.open(path)):
        after = handle.search(queries("old"), 100)
        wrong += int((after.ids != before.ids).sum())
        wrong += int(after.scores.tobytes() != before.scores.tobytes())
    return wrong


def rows_of(found: dict[str, Any], wrong_after_rollback: int, n: int) -> list[dict[str, Any]]:
    said = found["clients"]
    searches: dict[str, int] = {}
    for one in said:
        for phase, count in one["searches"].items():
            searches[phase] = searches.get(phase, 0) + count
    head = {"dataset": f"{n:,} x {OLD.dim} -> {NEW.dim}"}
    killed = ", ".join(f"{step} {found['killed'].count(step)}" for step in SPAN)
    rows: list[dict[str, Any]] = [
        {
            **head,
            "method": "searches by two processes during the upgrade",
            "metric": "failed queries",
            "value": sum(len(one["failed"]) for one in said),
            "n": sum(searches.values()),
            "note": f"of 4 queries each; the upgrading process was killed {len(found['killed'])} "
            f"times ({killed}); answers with a row twice: {sum(o['twice'] for o in said)}, with "
            f"fewer than {K} rows: {sum(o['short'] for o in said)}",
        },
        {
            **head,
            "method": "rows acknowledged, looked for after the finish",
            "metric": "lost rows",
            "value": found["lost"],
            "n": found["acknowledged"],
            "acknowledged": found["acknowledged"],
            "lost": found["lost"],
            "note": f"{found['n_writes']} writes of {PIECE} rows meanwhile (old vectors, new ones, "
            f"deletes); rows that should not be there: {found['strange']}, with another vector "
            f"than the new model's: {found['wrong']}; check clean: {found['ok']}",
        },
        {
            **head,
            "method": "rollback after a killed backfill",
            "metric": "answers that are not byte-equal",
            "value": wrong_after_rollback,
            "n": 2 * N_QUERIES,
        },
    ]
    for phase in sorted(searches):
        ms = np.concatenate([one["ms"].get(phase, []) for one in said])
        rows.append(
            {
                **head,
                "method": f"queries of the {phase}",
                "metric": "ms a search of 4 queries",
                "value": float(np.median(ms)),
                "p50_ms": float(np.median(ms)),
                "p99_ms": float(np.percentile(ms, 99)),
                "n": len(ms),
            }
        )
    return rows


SPAN = ("start", "backfill", "finish")


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--try", dest="trial", action="store_true", help="5,000 rows, no file")
    for hidden in ("--client", "--step", "--index", "--place", "--log"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.client is not None:
        client(Path(asked.index), Path(asked.log), int(asked.client))
        return
    if asked.step is not None:
        upgrade(Path(asked.index), Path(asked.place), asked.step, asked.rows, Path(asked.log))
        return
    n = 5_000 if asked.trial else asked.rows
    meta = _frame.meta(seeds=[1, 2, 3, 4, 5, 6, 8, 9], question=QUESTION)
    started = time.perf_counter()
    place = _frame.cache_folder(f"{NAME}-{n}")
    path = made(place, n)
    for name in ("up", "back"):
        shutil.rmtree(place / f"{name}.nest", ignore_errors=True)
        shutil.copytree(path, place / f"{name}.nest")
    wrong = rolled_back(place / "back.nest", place, n)
    found = upgraded(place / "up.nest", place, n, asked.kills)
    rows = rows_of(found, wrong, n)
    for one in found["clients"]:
        print(*one["failed"][:5], sep="\n")
    for row in rows:
        print(row)
    print(f"{time.perf_counter() - started:.0f} s")
    if not asked.trial:
        _frame.write(NAME, rows, meta)
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
