"""A process that writes to a store, and says what it begins and what was acknowledged."""

import json
import os
import resource
import sys

import numpy as np
import pyarrow as pa
from killing import forked, kill_after, kill_for_each_line, main, say

import nestvec as nv
from nestvec.errors import NestvecError
from nestvec.search.store import Batch, Store

DIM = 16
SPACE = nv.Space.declared("m", dim=DIM, normalisation="none")
PAYLOAD = pa.schema([("value", pa.int64())])


def batch(ids, value):
    vectors = np.empty((len(ids), DIM), np.float32)
    vectors[:] = np.reshape(ids, (-1, 1))
    vectors[:, 0] = value + 1
    return Batch(vectors, ids, {"value": [value] * len(ids)})


def apply(model, step):
    """What a step does, to a dict of id to value."""
    if step["does"] == "delete":
        return {i: value for i, value in model.items() if i not in set(step["ids"])}
    return model | dict.fromkeys(step["ids"], step["value"])


def do(store, step):
    if step["does"] == "compact":
        store.compact()
    elif step["does"] == "delete":
        store.delete(step["ids"])
    elif step["does"] == "stream":
        parts = np.array_split(step["ids"], 3)
        store.upsert(batch(part, step["value"]) for part in parts if len(part))
    else:
        getattr(store, step["does"])(batch(step["ids"], step["value"]))


def held(store):
    """Id to value, with every vector looked at."""
    found = {}
    for rows in store.snapshot.scan(["id", "vector", "value"]):
        ids, vectors, values = (
            rows.columns[name].to_pylist() for name in rows.columns.schema.names
        )
        for i, vector, value in zip(ids, vectors, values, strict=True):
            assert vector == [value + 1, *[i] * (DIM - 1)]
            assert i not in found
            found[i] = value
    return found


def write_for_ever(path, seed, log):
    rng = np.random.default_rng(seed)
    store = Store.open(path, durability=["power", "process"][seed % 2])
    model = held(store)
    say(log, {"open": store.version})
    for value in range(seed * 10_000, (seed + 1) * 10_000):
        does = rng.choice(
            ["append", "upsert", "stream", "delete", "compact"], p=[0.2, 0.3, 0.15, 0.2, 0.15]
        )
        size = int(rng.choice([1, 5, 300]))
        old = list(model)
        some = [int(i) for i in rng.permutation(old)[:size]]
        if does in ("append", "upsert", "stream"):
            news = [max(old, default=0) + 1 + n for n in range(size)]
            some = news if does == "append" else some[: size // 2] + news[: size - size // 2]
        if does == "delete" and not some:
            continue
        step = {"does": does, "ids": some if does != "compact" else [], "value": value}
        say(log, {"begin": step})
        do(store, step)
        say(log, {"done": value})
        model = apply(model, step)


def creates(path):
    """Kill a process at some moment of making a store, once for every line ``n ms``."""
    for line in sys.stdin:
        n, ms = line.split()
        pid = forked(lambda n=n: Store.create(f"{path}{n}", SPACE, id_type="int", payload=PAYLOAD))
        kill_after(pid, ms)


def steps(path, durability):
    """One of each, acknowledged on stdout: what a trace looks at."""
    store = Store.open(path, durability=durability)
    for n, step in enumerate(
        [
            {"does": "append", "ids": [1, 2, 3], "value": 1},
            {"does": "upsert", "ids": [2, 4], "value": 2},
            {"does": "stream", "ids": [1, 5, 6], "value": 3},
            {"does": "delete", "ids": [3, 5]},
            {"does": "compact"},
            {"does": "append", "ids": [7], "value": 4},
        ]
    ):
        do(store, step)
        os.write(1, f"acknowledged {n}\n".encode())


def limited(path):
    """Write more than a file may hold here."""
    store = Store.open(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    for write in (store.append, store.upsert):
        try:
            write(batch(list(range(10_000, 20_000)), 1))
        except NestvecError as error:
            sys.stdout.write(f"{type(error).__name__}: {error}\n")


def rounds(path, name, first, count, every):
    """Upsert all of twenty shared ids, and one of our own, again and again; compact at times."""
    store = Store.open(path, durability="process")
    for n in range(int(count)):
        store.upsert(batch([*range(20), int(first) + n], n + int(first)))
        if n % int(every) == 0:
            store.compact()
        sys.stdout.write(f"{name} {n}\n")
        sys.stdout.flush()


def reads(path):
    """Open, and read when told to."""
    store = Store.open(path)
    sys.stdout.write("open\n")
    sys.stdout.flush()
    sys.stdin.readline()
    sys.stdout.write(json.dumps(sorted(held(store).items())) + "\n")


if __name__ == "__main__":
    main(
        kills=lambda path: kill_for_each_line(path, write_for_ever),
        creates=creates,
        steps=steps,
        limited=limited,
        rounds=rounds,
        reads=reads,
    )
