"""Vectors of models that know the same in other words; a process to be killed in an upgrade."""

import functools
import json
import select
import sys

import numpy as np
import pyarrow as pa
from killing import kill_for_each_line, main, say

import nestvec as nv
from nestvec._checks import normalise
from nestvec.maps import ProcrustesBridge
from nestvec.search.index import Index
from nestvec.search.store import Batch
from nestvec.upgrade import Upgrade, fit, learning

IDS = 200
PAYLOAD = pa.schema([("text", pa.string())])
_LATENT = 12
_DIMS = (16, 24)


@functools.cache
def space(model):
    """The Space of model 0, 1, ...; each upgrade leads to the next."""
    dim = _DIMS[model % 2]
    return nv.Space.declared(f"model-{model}", dim=dim, nesting_dims=(8, dim))


@functools.cache
def _table(model, value):
    meaning = np.random.default_rng(value).normal(size=(IDS, _LATENT))
    words = np.random.default_rng([7, model])
    dim = space(model).dim
    own = np.random.default_rng([model, value]).normal(size=(IDS, dim))
    rows = meaning @ words.normal(size=(_LATENT, dim)) + 0.7 * own
    return normalise(rows.astype(np.float32))


def vectors(model, ids, value):
    """The vectors that a model gives to rows while their value is that."""
    return nv.Embeddings(_table(model, value)[np.asarray(ids)], space(model), np.asarray(ids))


def row(model, i, value):
    return _table(model, value)[i]


def texts(ids, value):
    return [f"{i} {value}" for i in ids]


def batch(model, ids, value):
    return Batch(vectors(model, ids, value), payload={"text": texts(ids, value)})


def queries(model, n=7):
    meaning = np.random.default_rng(99).normal(size=(n, _LATENT))
    dim = space(model).dim
    rows = meaning @ np.random.default_rng([7, model]).normal(size=(_LATENT, dim))
    return nv.Embeddings(normalise(rows.astype(np.float32)), space(model))


def embed(model):
    """A function from texts to a model's vectors."""

    def vectors_of(some):
        pairs = [tuple(map(int, text.split())) for text in some]
        return np.stack([_table(model, value)[i] for i, value in pairs])

    return vectors_of


def create(path, n=IDS, durability="process"):
    index = Index.create(path, space(0), id_type="int", payload=PAYLOAD, durability=durability)
    if n:
        index.add(batch(0, list(range(n)), 0))
    return index


def bridge(model):
    """From a model's Space to that of the one before it."""
    old, new = (np.concatenate([_table(m, v) for v in range(900, 906)]) for m in (model - 1, model))
    made = ProcrustesBridge().fit(
        nv.Embeddings(new, space(model)), nv.Embeddings(old, space(model - 1))
    )
    made.seen_ = made.seen_[:20]  # else none would be learned of as few rows as there are here
    return made


def held(index):
    """Id to value, of the record."""
    snapshot = index._home.snapshot()
    rows = snapshot.read(snapshot.keys().row_ids, ["id", "text"])
    values = (int(text.split()[1]) for text in rows["text"].to_pylist())
    return dict(zip(rows["id"].to_pylist(), values, strict=True))


def model_of(index):
    return int(index.space.model.removeprefix("model-"))


def sample_of(index, model, n=60):
    rows = dict(list(held(index).items())[:n])
    array = np.stack([_table(model, value)[i] for i, value in rows.items()])
    return nv.Embeddings(array, space(model), list(rows))


def begin(index, **options):
    new = model_of(index) + 1
    return Upgrade.start(index, sample_of(index, new), bridge=bridge(new), **options)


# --- to be killed ---------------------------------------------------------------------------------


def begun_upgrade(index):
    return Upgrade(index) if index._upgrading() is not None else None


def choose(index, upgrade, rng, value):
    """What to do next: a step that can be told, and applied to what is known by `applied`."""
    rows = list(held(index))
    model = model_of(index)
    if upgrade is None:
        does = rng.choice(["start", "start", "upsert", "delete"])
    elif upgrade.status().pending:
        does = rng.choice(["backfill", "backfill", "fill", "upsert", "delete", "rollback"])
    else:
        does = rng.choice(["finish", "finish", "upsert", "rollback"])
    step = {"does": str(does), "value": value, "model": model, "ids": []}
    if does == "upsert":
        # odd values are of the new model, so that who reads can tell them
        new = upgrade is not None and rng.integers(2)
        step |= {"model": model + 1, "value": value + 1} if new else {}
        step["ids"] = [int(i) for i in rng.permutation(IDS)[: rng.choice([1, 30])]]
    elif does == "delete" and len(rows) > IDS // 2:
        step["ids"] = [int(i) for i in rng.permutation(rows)[: rng.choice([1, 20])]]
    elif does == "start":
        step["ids"] = sorted(sample_of(index, model).ids.tolist())
    return step


def do(index, upgrade, step):
    """Do it, and return the ids that were embedded."""
    seen = []

    def noted(texts):
        seen.extend(int(text.split()[0]) for text in texts)
        return embed(step["model"] + 1)(texts)

    if step["does"] == "upsert":
        index.upsert(batch(step["model"], step["ids"], step["value"]))
    elif step["does"] == "delete":
        index.delete(step["ids"])
    elif step["does"] == "start":
        begin(index)
    elif step["does"] == "rollback":
        upgrade.rollback()
    elif step["does"] == "finish":
        upgrade.finish()
    else:
        some = 30 if step["does"] == "backfill" else None
        upgrade.backfill(noted, column="text", max_rows=some, batch_size=10)
    return seen


def applied(known, step, seen):
    """What is known after a step: model, rows {id: value}, of which bridged, of which done."""
    model, rows, bridged, done = known
    ids = set(step["ids"])
    if step["does"] == "upsert":
        rows = rows | dict.fromkeys(step["ids"], step["value"])
        new = step["model"] > model
        bridged = bridged | ids if new else bridged - ids
        done = done if done is None else done | ids if new else done - ids
    elif step["does"] == "delete":
        rows = {i: value for i, value in rows.items() if i not in ids}
        bridged, done = bridged - ids, done if done is None else done - ids
    elif step["does"] == "start":
        done = ids
    elif step["does"] == "rollback":
        done = None
    elif step["does"] == "finish":
        model, bridged, done = model + 1, set(), None
    else:
        done = done | set(seen)
    return model, rows, bridged, done


def write_for_ever(path, seed, log):
    rng = np.random.default_rng(seed)
    learning._FEWEST = 60  # so that a kill may come while a bridge is learned and exchanged
    few = functools.partial(fit, kinds=("procrustes", "stiff"))
    learning.fit = few  # pyright: ignore[reportPrivateImportUsage]  # it is replaced where it is used
    index = Index.open(path, durability=["power", "process"][seed % 2])
    say(log, {"open": index.version})
    for value in range(seed * 1000, (seed + 1) * 1000, 2):
        upgrade = begun_upgrade(index)
        step = choose(index, upgrade, rng, value)
        say(log, {"begin": step})
        say(log, {"done": value, "seen": do(index, upgrade, step)})


def watches(path):
    """Search by the model of the index until told to end; say how many answers, and its model."""
    index = Index.open(path)
    model, n, ends = model_of(index), 0, False
    sys.stdout.write("open\n")
    sys.stdout.flush()
    while not ends:
        ends = bool(select.select([sys.stdin], [], [], 0.01)[0])  # others are to come to something
        asked = queries(model)
        try:
            hits = index.search(asked, columns=["text"])
        except nv.errors.SpaceMismatchError:
            model += 1  # an upgrade was finished: then the next model is answered
            asked = queries(model)
            hits = index.search(asked, columns=["text"])
        assert_true(hits, asked, model)
        n += 1
    sys.stdout.write(json.dumps([n, model]) + "\n")


def assert_true(hits, asked, model):
    """Scores are those of the vectors that a row has by what is said of it."""
    for query, found, texts in zip(asked.array, hits, hits.payload, strict=True):
        assert len({i for i, _ in found}) == len(found)
        for (i, score), text in zip(found, texts["text"].to_pylist(), strict=True):
            own, value = map(int, text.split())
            assert own == i
            if value % 2 == 0:
                np.testing.assert_allclose(score, row(model, i, value) @ query, atol=1e-5)


if __name__ == "__main__":
    main(kills=lambda path: kill_for_each_line(path, write_for_ever), watches=watches)
