"""A process that writes to an index, searches it, or derives from it, to be killed or starved."""

import json
import resource
import select
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
from killing import kill_for_each_line, main, say
from store_writer import apply

import nestvec as nv
from nestvec._checks import normalise
from nestvec.search.index import Index
from nestvec.search.store import Batch

DIM = 32
IDS = 3000
SPACE = nv.Space.declared("i", dim=DIM, nesting_dims=(8, 16, DIM))
PAYLOAD = pa.schema([("value", pa.int64())])
PLANS = (
    "exact 32@10",
    "exact 8:int8@3000 > 32@10",
    "graph(ef=300) 32:int8@300 > 32@10",
    "lists(probes=1000) 16:int8@1000 > 32@10",
)
QUERIES = normalise(np.random.default_rng(99).normal(size=(5, DIM)).astype(np.float32))


def vectors(ids, value):
    """The vectors that rows have while their value is that."""
    table = np.random.default_rng(value).normal(size=(IDS, DIM)).astype(np.float32)
    return normalise(table)[ids]


def batch(ids, value):
    return Batch(vectors(ids, value), ids, {"value": [value] * len(ids)})


def all_vectors(model):
    """Ids, and the vector of each, of a dict of id to value."""
    ids = np.array(sorted(model))
    found = np.empty((len(ids), DIM), np.float32)
    values = np.array([model[i] for i in ids.tolist()])
    for value in np.unique(values):
        found[values == value] = vectors(ids[values == value], int(value))
    return ids, found


def assert_true(hits):
    """Every score is that of the vector which the record has for that id in that version."""
    assert hits.payload is not None
    for query, ids, scores, payload in zip(
        QUERIES, hits.ids, hits.scores, hits.payload, strict=True
    ):
        for i, score, value in zip(
            ids.tolist(), scores, payload["value"].to_pylist(), strict=False
        ):
            if i >= 0:
                np.testing.assert_allclose(score, vectors([i], value)[0] @ query, atol=1e-5)
        assert len(set(ids.tolist()) - {-1}) == np.isfinite(scores).sum()


def do(index, step, rng):
    if step["does"] == "upsert":
        index.upsert(batch(step["ids"], step["value"]))
    elif step["does"] == "delete":
        index.delete(step["ids"])
    elif step["does"] == "compact":
        index.compact()
    elif step["does"] == "wipe":  # so that there is something to derive again
        parts = sorted((index.path / "derived").glob(str(rng.choice(["*", "*/*"]))))
        shutil.rmtree(parts[rng.integers(len(parts))])
        Index.open(index.path).search(QUERIES, plan=str(rng.choice(PLANS)))
    else:
        assert_true(index.search(QUERIES, plan=str(rng.choice(PLANS)), columns=["value"]))


def write_for_ever(path, seed, log):
    rng = np.random.default_rng(seed)
    index = Index.open(path, durability=["power", "process"][seed % 2])
    rows = index._home.store.snapshot.read(
        index._home.store.snapshot.keys().row_ids, ["id", "value"]
    )
    model = dict(zip(*(column.to_pylist() for column in rows.columns), strict=True))
    say(log, {"open": index.version})
    for value in range(seed * 1000, (seed + 1) * 1000):
        does = str(rng.choice(["upsert", "delete", "compact", "wipe", "search"]))
        size = int(rng.choice([1, 5, 200]))
        some = rng.permutation(list(model) if does == "delete" else IDS)[:size].tolist()
        if (does == "delete" and len(model) < 500) or (does == "wipe" and value % 1000 == 0):
            continue
        step = {"does": does, "ids": some if does in ("upsert", "delete") else [], "value": value}
        say(log, {"begin": step})
        do(index, step, rng)
        say(log, {"done": value})
        model = apply(model, step)


def watches(path):
    """Search until told to end; say how many answers there were, and of how many versions."""
    index = Index.open(path)
    sys.stdout.write("open\n")
    sys.stdout.flush()
    versions, n = set(), 0
    while not select.select([sys.stdin], [], [], 0.01)[0]:  # the others are to come to something
        hits = index.search(QUERIES, plan=PLANS[n % len(PLANS)], columns=["value"])
        assert_true(hits)
        versions.add(hits.version)
        n += 1
    sys.stdout.write(json.dumps([n, len(versions)]) + "\n")


def searches(path, plan, limit="0"):
    """Search once, if need be where no file may grow beyond a limit; print ids and what stands."""
    if int(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    index = Index.open(path)
    found = [index.search(QUERIES, plan=plan).ids.tolist() for _ in range(2)]
    assert found[0] == found[1]
    sys.stdout.write(json.dumps([found[0], list(index.stats()["structures"])]) + "\n")


def compacts(path):
    Index.open(path).compact()


def holds(path, plan):
    """Print the anonymous memory that opening and searching takes, in bytes."""

    def anonymous():
        words = Path("/proc/self/status").read_text().split()
        return 1024 * int(words[words.index("RssAnon:") + 1])

    queries = np.random.default_rng(0).normal(size=(40, 256)).astype(np.float32)
    Index.open(f"{path}-small").search(queries, plan=plan)  # libraries, compiled kernels
    before = anonymous()
    index = Index.open(path)
    index.search(queries, plan=plan, threads=1)
    sys.stdout.write(f"{anonymous() - before} {index.stats()['resident_bytes']}\n")


if __name__ == "__main__":
    main(
        kills=lambda path: kill_for_each_line(path, write_for_ever),
        watches=watches,
        searches=searches,
        compacts=compacts,
        holds=holds,
    )
