"""The store is a dict on disk; every row says since when it is what it is."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pytest

import nestvec as nv
from nestvec.errors import (
    DataError,
    DimensionError,
    FileFormatError,
    SpaceMismatchError,
    StorageError,
)
from nestvec.search.store import Batch, Store
from nestvec.search.store.snapshot import as_matrix

SPACE = nv.Space.declared("m", dim=4, normalisation="none")
PAYLOAD = pa.schema([("value", pa.int64()), ("title", pa.string())])


def batch(ids, value=0):
    vectors = [[value + 1, n, 1, 2] for n in range(len(ids))]
    payload = {"value": [value] * len(ids), "title": [f"title of {i}" for i in ids]}
    return Batch(vectors, ids, payload)


def contents(store):
    """Id to (row id, version of last update, vector, value), read through a scan."""
    found = {}
    for rows in store.snapshot.scan(["id", "vector", "value"]):
        columns = (rows.columns[name].to_pylist() for name in ("id", "vector", "value"))
        for key, *row in zip(columns.__next__(), *columns, *rows.keys, strict=True):
            assert key not in found
            found[key] = row
    return found


@pytest.fixture
def store(tmp_path):
    return Store.create(
        tmp_path / "x.nest", SPACE, id_type="str", payload=PAYLOAD, durability="process"
    )


# --- it is a dict ---------------------------------------------------------------------------------


@pytest.mark.parametrize("id_type", ["int", "str"])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_random_writes_leave_what_a_dict_holds(rng, tmp_path, id_type, precision):
    store = Store.create(
        tmp_path / "x.nest",
        SPACE,
        id_type=id_type,
        precision=precision,
        payload=PAYLOAD,
        durability="process",
    )
    named = (lambda n: n) if id_type == "int" else (lambda n: f"d'{n}")
    model, row_ids, since = {}, {}, {}
    for step in range(40):
        some = [named(int(n)) for n in rng.choice(60, size=rng.integers(1, 12), replace=False)]
        does = rng.choice(["append", "upsert", "delete", "compact"], p=[0.3, 0.4, 0.25, 0.05])
        before = store.version
        if does == "append":
            some = [i for i in some if i not in model]
        if does == "delete":
            some = [i for i in some if i in model]
        if does == "compact":
            store.compact()
        elif some:
            vectors = [[step + 1, n, 1, 2] for n in range(len(some))]
            made = batch(some, step)
            done = store.delete(some) if does == "delete" else getattr(store, does)(made)
            news = [i for i in some if i not in model]
            assert done == (
                before + 1,
                len(news),
                (len(some) - len(news)) * (does == "upsert"),
                len(some) * (does == "delete"),
            )
            for n, i in enumerate(some):
                if does == "delete":
                    del model[i], row_ids[i], since[i]
                else:
                    model[i] = (vectors[n], step)
                    since[i] = store.version
        got = contents(store)
        assert {i: (vector, value) for i, (vector, value, _, _) in got.items()} == model
        assert {i: updated for i, (*_, updated) in got.items()} == since
        for i, (_, _, row, _) in got.items():
            assert row_ids.setdefault(i, row) == row  # for life, through upserts and compactions
        assert store.count == len(model)
        fresh = Store.open(store.path).snapshot.keys()
        np.testing.assert_array_equal(np.stack(fresh), np.stack(store.snapshot.keys()))
    assert len(set(row_ids.values())) == len(row_ids)
    assert store.check().ok, store.check()


def test_row_ids_are_never_given_out_twice(store):
    store.append(batch(["a", "b"]))
    first = set(store.snapshot.keys().row_ids.tolist())
    store.delete(["a", "b"])
    store.compact()
    store.append(batch(["a", "b"]))
    assert not first & set(store.snapshot.keys().row_ids.tolist())


def test_keys_stand_in_the_order_of_a_scan(store, monkeypatch):
    monkeypatch.setattr("nestvec.search.store.snapshot._ROWS_AT_ONCE", 7)
    store.append(batch([f"d{n}"], n) for n in range(30))
    store.upsert(batch(["d3", "d17"], 99))
    scanned = [rows.keys for rows in store.snapshot.scan(["id"])]
    got = [np.concatenate(column) for column in zip(*scanned, strict=True)]
    np.testing.assert_array_equal(np.stack(got), np.stack(store.snapshot.keys()))


@pytest.mark.parametrize("at_once", [1, 3, 7, 1000])
def test_keys_are_the_same_however_many_are_read_at_once(store, monkeypatch, at_once):
    for n in range(6):
        store.append(batch([f"d{n}-{i}" for i in range(n + 1)]))
    store.delete(["d3-0", "d5-1", "d5-5"])
    store.upsert(batch(["d2-1", "d4-4"], 99))
    by_row = {
        (int(row), int(updated))
        for rows in store.snapshot.scan(["id"])
        for row, updated in zip(*rows.keys, strict=True)
    }
    monkeypatch.setattr("nestvec.search.store.snapshot._KEYS_AT_ONCE", at_once)
    every = dict(store.snapshot.keys_by_fragment())
    got = [
        pair for keys in every.values() for pair in zip(*(c.tolist() for c in keys), strict=True)
    ]
    assert len(got) == len(by_row) == store.count
    assert set(got) == by_row
    known = set(list(every)[::2])
    again = dict(store.snapshot.keys_by_fragment(known))
    assert list(again) == list(every)
    for mark, keys in again.items():
        if mark in known:
            assert keys is None
        else:
            np.testing.assert_array_equal(np.stack(keys), np.stack(every[mark]))


# --- ids, filters, reading ------------------------------------------------------------------------

NASTY = ["", "'", "''", '"', "\\", "\\'", "%", "_", "a b", "\n", "\t", "日本", "ü", "-- x", "NULL"]


def ids_of(store, rows):
    return store.snapshot.read(rows, ["id"])["id"].to_pylist()


def vectors_of(store, rows):
    return as_matrix(store.snapshot.read(rows, ["vector"])["vector"])


def test_ids_and_row_ids_lead_to_each_other(store):
    store.append(batch(NASTY))
    rows = store.snapshot.rows_of(NASTY[::-1])
    assert ids_of(store, rows) == NASTY[::-1]
    assert store.snapshot.rows_of(NASTY[4:5]) == rows[-5]
    assert store.delete(NASTY[:5]).deleted == 5
    with pytest.raises(DataError, match=r"unknown id '' \(1 in all\)"):
        store.snapshot.rows_of(NASTY[:1] + NASTY[-1:])


def test_many_ids_are_found_as_few_are(tmp_path, rng):
    store = Store.create(tmp_path / "x.nest", SPACE, id_type="int", durability="process")
    ids = rng.permutation(30_000)
    store.append(Batch(rng.normal(size=(30_000, 4)), ids))
    rows = store.snapshot.rows_of(ids[:20_000])
    np.testing.assert_array_equal(rows[:50], store.snapshot.rows_of(ids[:50]))
    assert ids_of(store, rows) == ids[:20_000].tolist()
    with pytest.raises(DataError, match=r"unknown id 30000 \(2 in all\)"):
        store.snapshot.rows_of([*range(20_000), 30_000, -1])


def test_one_id_is_as_good_as_a_list_of_one(store, tmp_path):
    store.append(batch(["a", "b"]))
    numbers = Store.create(tmp_path / "y.nest", SPACE, id_type="int")
    numbers.append(Batch(np.eye(3, 4), [5, 6, 7]))
    for some, one in ((store, "b"), (numbers, 6), (numbers, np.int64(6)), (numbers, np.array(6))):
        assert ids_of(some, some.snapshot.rows_of(one)) == [one]
    assert store.delete("b").deleted == 1
    assert numbers.delete({5, 7}).deleted == 2


def test_a_store_appears_with_its_first_rows(tmp_path):
    def rows():
        assert [p for p in tmp_path.iterdir() if not p.name.startswith(".")] == []
        yield batch(["a", "b"])
        yield batch(["c"])

    made = Store.create(tmp_path / "x.nest", SPACE, id_type="str", payload=PAYLOAD, rows=rows())
    assert (made.version, made.count) == (2, 3)
    assert made.check().ok
    assert not made.check().waste
    assert made.upsert(batch(["c", "d"])) == (3, 1, 1, 0)


def test_first_rows_that_do_not_fit_leave_nothing(tmp_path):
    for rows in (batch(["a", "a"]), iter([batch(["a"]), batch([1])])):
        with pytest.raises(DataError):
            Store.create(tmp_path / "x", SPACE, id_type="str", payload=PAYLOAD, rows=rows)
    assert not list(tmp_path.iterdir())


def test_rows_come_in_the_order_asked_for(store):
    store.append(batch([f"d{n}" for n in range(9)], 5))
    rows = store.snapshot.rows_of(["d7", "d2", "d7"][:2])[[0, 1, 0]]
    assert store.snapshot.read(rows, ["id", "value"]).to_pydict() == {
        "id": ["d7", "d2", "d7"],
        "value": [5, 5, 5],
    }
    assert vectors_of(store, rows)[:, 1].tolist() == [7, 2, 7]
    assert store.snapshot.read([], ["id"]).num_rows == 0


def test_a_dead_row_is_named(store):
    store.append(batch(["a", "b"]))
    row = store.snapshot.rows_of(["a"])
    store.delete(["a"])
    with pytest.raises(DataError, match=r"row 0 does not live in version 3 \(1 such rows\)"):
        store.snapshot.read([row[0], 1], ["id"])


def test_a_filter_finds_what_a_loop_finds(store, rng):
    for step in range(6):
        store.upsert(batch([f"d{n}" for n in rng.choice(40, 9, replace=False)], step))
    got = contents(store)
    for condition, holds in (
        ("value >= 3 AND value < 5", lambda i, v: 3 <= v < 5),
        ("title LIKE '%d1%' OR id = 'd2'", lambda i, v: "d1" in i or i == "d2"),
        ("value > 100", lambda i, v: False),
    ):
        want = {row for i, (_, value, row, _) in got.items() if holds(i, value)}
        assert set(store.snapshot.matching(condition).tolist()) == want


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        ("yeer = 3", r"No field named yeer.*columns are id \(string\), value \(int64\), title"),
        ("value = ", "Expected: an expression"),
        ("", "Expected: an expression"),
        ("title = 'a", "Unterminated string"),
        ("value = 'x'", "filter"),
    ],
)
def test_a_filter_that_cannot_be_read_says_which_columns_there_are(store, condition, says):
    store.append(batch(["a"]))
    with pytest.raises(DataError, match=says) as caught:
        store.snapshot.matching(condition)
    assert ".rs:" not in str(caught.value)


def test_unknown_columns_are_refused_naming_those_there_are(store):
    store.append(batch(["a"]))
    for columns in (["nope"], "id"):
        with pytest.raises(DataError, match=r"not among id, vector, value, title"):
            store.snapshot.read([0], columns)


# --- what is refused, and leaves everything as it was ---------------------------------------------


def _with(**changes):
    good = batch(["n1", "n2"])
    return Batch(**{"vectors": good.vectors, "ids": good.ids, "payload": good.payload} | changes)


OTHER = nv.Space.declared("other", dim=4, normalisation="none")
REFUSED = {
    "exists": (batch(["n", "b"]), DataError, r"id 'b' exists \(1 of 2 ids do\)\. upsert"),
    "twice": (_with(ids=["n", "n"]), DataError, "1 duplicate ids; .*'n'.* stands in rows 0 and 1"),
    "twice in two batches": ([batch(["n"]), batch(["n"])], DataError, "'n' stands in two batches"),
    "int ids": (_with(ids=[1, 2]), DataError, "ids of this index are strings, and 1 is none"),
    "no ids": (_with(ids=None), DataError, "rows without ids"),
    "row numbers": (
        _with(vectors=nv.Embeddings(np.ones((2, 4)), SPACE)[:2], ids=None),
        DataError,
        "row numbers would be the ids of other rows. Pass ids=",
    ),
    "long id": (_with(ids=["n", "x" * 1001]), DataError, "id of row 1 has 1,001 characters"),
    "NUL": (_with(ids=["n", "n\0"]), DataError, "id of row 1, .* ends in a NUL"),
    "NaN": (_with(vectors=[[1, 2, 3, 4], [1, np.nan, 3, 4]]), DataError, "row 1 holds NaN or Inf"),
    "zeros": (_with(vectors=np.eye(2, 4) - np.eye(2, 4)), DataError, "row 0 is all zeros"),
    "dim": (_with(vectors=np.ones((2, 5))), DimensionError, "5 dims given"),
    "space": (nv.Embeddings(np.ones((2, 4)), OTHER), SpaceMismatchError, "two spaces"),
    "array": (np.ones((2, 4)), DataError, "ndarray was given where rows are expected"),
    "no payload": (_with(payload=None), DataError, r"lacks 'value', 'title'"),
    "missing": (_with(payload={"title": ["a", "b"]}), DataError, r"value \(int64\).*lacks 'value'"),
    "extra": (
        _with(payload=batch(["n1", "n2"]).payload | {"x": [1, 2]}),
        DataError,
        "has, beyond them, 'x'",
    ),
    "text for a number": (
        _with(payload={"value": ["1", "2"], "title": ["a", "b"]}),
        DataError,
        "column 'value' does not fit int64",
    ),
    "arrow text for a number": (
        _with(payload=pa.table({"value": ["1", "2"], "title": ["a", "b"]})),
        DataError,
        "column 'value' does not fit int64 .it is string",
    ),
    "number of values": (
        _with(payload={"value": [1], "title": ["a", "b"]}),
        DataError,
        "column 'value' has 1 values for 2 rows",
    ),
    "second batch": (
        [batch(["n1"]), _with(vectors=np.ones((2, 3)))],
        DimensionError,
        "batch 1: 3 dims given",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(store, case):
    rows, error, says = REFUSED[case]
    store.append(batch(["a", "b"]))
    before = sorted(store.path.rglob("*"))
    with pytest.raises(error, match=says):
        store.append(rows)
    if case != "exists":
        with pytest.raises(error, match=says):
            store.upsert(rows)
    assert sorted(store.path.rglob("*")) == before
    assert Store.open(store.path).version == 2


def test_vectors_off_unit_length_are_refused_where_the_space_says_unit(tmp_path):
    store = Store.create(tmp_path / "x.nest", nv.Space.declared("m", dim=4), id_type="int")
    with pytest.raises(DataError, match="row 0 has length 2"):
        store.append(Batch(np.ones((1, 4)), [1]))


@pytest.mark.parametrize(("value", "says"), [(1e5, "is Inf in float16"), (1e-9, "is all zeros in")])
def test_what_float16_cannot_hold_is_refused(tmp_path, value, says):
    store = Store.create(tmp_path / "x.nest", SPACE, id_type="int", precision="float16")
    with pytest.raises(DataError, match=f"row 1 {says}"):
        store.append(Batch([[1, 1, 1, 1], [value] * 4], [1, 2]))


def test_unknown_ids_are_not_deleted_in_silence(store):
    store.append(batch(["a", "b", "c"]))
    with pytest.raises(DataError, match=r"unknown id 'x' \(1 of 2\). Nothing was deleted"):
        store.delete(["a", "x"])
    assert store.count == 3
    assert store.delete(["a", "x"], missing_ok=True).deleted == 1
    assert store.delete(["a", "x"], missing_ok=True) == store.delete([]) == (3, 0, 0, 0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"id_type": "uuid"}, "id_type 'uuid' is not one of int, str"),
        ({"precision": "int8"}, "precision 'int8' is not one of float32, float16"),
        ({"durability": "none"}, "durability 'none' is not one of power, process"),
        ({"payload": pa.schema([("id", pa.int64())])}, "payload column 'id'"),
        ({"payload": pa.schema([("_rowid", pa.int64())])}, "payload column '_rowid'"),
        ({"payload": {"a": "int"}}, "payload is a dict; pass a pyarrow schema"),
    ],
)
def test_an_option_that_does_not_exist_makes_nothing(tmp_path, options, says):
    with pytest.raises(DataError, match=says):
        Store.create(tmp_path / "x.nest", SPACE, **{"id_type": "int"} | options)
    assert not list(tmp_path.iterdir())


# --- streams --------------------------------------------------------------------------------------


def test_a_stream_is_one_version_and_nobody_waits_for_it(store):
    other = Store.open(store.path, durability="process")

    def slow():
        for n in range(5):
            other.upsert(batch([f"other{n}"]))  # would wait for ever if the lock were held
            yield batch([f"d{n}", f"e{n}"], n)

    done = store.append(slow())
    assert (done.version, done.inserted) == (7, 10)
    other.refresh()
    assert other.count == 15


def test_an_empty_stream_writes_nothing(store):
    assert store.append(iter([])).version == store.upsert(iter([])).version == 1


def test_a_stream_that_fails_leaves_no_trace(store):
    before = sorted(store.path.rglob("*"))

    def broken():
        yield batch(["a"])
        raise FileNotFoundError("the user's own file")

    for write in (store.append, store.upsert):
        with pytest.raises(FileNotFoundError, match="the user's own"):
            write(broken())
    assert sorted(store.path.rglob("*")) == before


def test_embeddings_bring_ids_and_space(tmp_path, rng):
    vectors = nv.Embeddings(rng.normal(size=(5, 4)), SPACE, [f"d{n}" for n in range(5)])
    store = Store.create(tmp_path / "x.nest", SPACE, id_type="str")
    store.append(vectors)
    store.upsert([vectors[:2], vectors[3:]])
    rows = store.snapshot.rows_of(vectors.ids)
    np.testing.assert_array_equal(vectors_of(store, rows), vectors.array)
    assert store.layout.space == SPACE


def test_payload_keeps_nulls_and_casts_within_a_family(tmp_path):
    payload = pa.schema([pa.field("n", pa.int64()), pa.field("s", pa.string(), nullable=False)])
    store = Store.create(tmp_path / "x.nest", SPACE, id_type="int", payload=payload)
    given = pa.table(
        {"s": pa.array(["x", "y"], pa.large_string()), "n": pa.array([None, 2], pa.int8())}
    )
    store.append(Batch(np.ones((2, 4)), [1, 2], given))
    rows = store.snapshot.rows_of([1, 2])
    assert store.snapshot.read(rows, ["n", "s"]).to_pydict() == {"n": [None, 2], "s": ["x", "y"]}
    with pytest.raises(DataError, match="'s' has 1 nulls and may have none"):
        store.append(Batch(np.ones((1, 4)), [3], {"n": [1], "s": [None]}))


# --- several handles ------------------------------------------------------------------------------


def test_a_new_id_upserted_from_two_open_handles_is_one_row(store):
    one, two = Store.open(store.path), Store.open(store.path)
    one.upsert(batch(["new"], 1))
    two.upsert(batch(["new"], 2))
    store.refresh()
    assert {i: value for i, (_, value, *_) in contents(store).items()} == {"new": 2}
    with pytest.raises(DataError, match="'new' exists"):
        one.append(batch(["new"]))


def test_threads_that_share_a_store_take_turns(store):
    def write(name):
        for n in range(8):
            store.upsert(batch(["shared", f"{name}{n}"], n))

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.version == 1 + 24
    assert store.count == 1 + 24
    assert store.check().ok


def test_a_writer_is_seen_by_is_newer_then_by_refresh(store):
    writer = Store.open(store.path, durability="process")
    assert not store.is_newer()
    assert not store.refresh()
    for n in range(20):
        writer.upsert(batch(["a"], n))
        assert store.is_newer()
        assert store.version == 1 + n
        assert store.refresh()
        assert not store.is_newer()
        assert contents(store)["a"][1] == n
    writer.append(batch(["b"]))
    writer.append(batch(["c"]))
    writer.compact()  # the version after ours is there no more
    assert store.is_newer()


def test_two_versions_within_a_tick_of_the_clock_are_two(store):
    versions = store.path / "record" / "_versions"
    reader = Store.open(store.path)
    assert not reader.is_newer()
    tick = versions.stat().st_mtime_ns
    store.append(batch(["a"]))
    os.utime(versions, ns=(tick, tick))
    assert reader.is_newer()


def test_a_version_after_a_long_rest_is_seen(store):
    reader, long_ago = Store.open(store.path), 10**18
    os.utime(store.path / "record" / "_versions", ns=(long_ago, long_ago))
    assert not reader.is_newer()
    assert not reader.is_newer()  # by the folder's time alone
    store.append(batch(["a"]))
    assert reader.is_newer()
    assert reader.is_newer()


def test_only_what_has_rested_is_said_to_be_unchanged(store):
    versions, reader = store.path / "record" / "_versions", Store.open(store.path)
    assert not reader.is_newer()
    assert not reader.is_unchanged()  # a second version may share this tick of the clock
    os.utime(versions, ns=(10**18, 10**18))
    assert not reader.is_newer()
    assert reader.is_unchanged()
    store.append(batch(["a"]))
    assert not reader.is_unchanged()
    reader.refresh()
    assert not reader.is_newer()
    os.utime(versions, ns=(10**18, 10**18))
    assert not reader.is_newer()
    shutil.rmtree(versions)
    assert not reader.is_unchanged()


def test_a_process_that_ends_with_an_open_store_says_nothing(store):
    code = f"from nestvec.search.store import Store; kept = Store.open({str(store.path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_asking_for_a_newer_version_takes_microseconds(store):
    def asked():
        begin = time.perf_counter()
        for _ in range(200):
            store.is_newer()
        return (time.perf_counter() - begin) / 200

    assert min(asked() for _ in range(5)) < 100e-6


def test_a_snapshot_does_not_change(store):
    store.append(batch(["a", "b", "c"], 1))
    old = store.snapshot
    before = [rows.columns.to_pydict() for rows in old.scan(["id", "value"])]
    store.upsert(batch(["a", "d"], 2))
    store.delete(["b"])
    store.compact()
    assert [rows.columns.to_pydict() for rows in old.scan(["id", "value"])] == before
    assert old.rows_of(["b"]) == 1
    assert old.count == 3


def test_two_versions_of_one_number_have_two_fingerprints(store, tmp_path):
    store.append(batch(["a"]))
    other = Store.create(tmp_path / "y.nest", SPACE, id_type="str", payload=PAYLOAD)
    other.append(batch(["a"]))
    assert store.version == other.version
    assert store.snapshot.fingerprint != other.snapshot.fingerprint
    assert store.snapshot.fingerprint == Store.open(store.path).snapshot.fingerprint


def test_a_version_that_is_compacted_while_it_is_looked_at_has_no_fingerprint(store, monkeypatch):
    """Not the one of a version that cannot be read: what is derived from that is thrown away."""
    for n in range(3):
        store.upsert(batch(["a"], n))
    snapshot = Store.open(store.path).snapshot
    real = type(snapshot)._fingerprint_of

    def late(self, version):
        store.compact()
        return real(self, version)

    monkeypatch.setattr(type(snapshot), "_fingerprint_of", late)
    assert snapshot.fingerprint_of(2) is None


# --- compaction -----------------------------------------------------------------------------------


def test_compaction_gives_back_the_room_and_keeps_rows_ids_and_versions(store):
    for n in range(12):
        store.upsert(batch([f"d{m}" for m in range(n, n + 20)], n))
    before, stats = contents(store), store.stats()
    assert (stats.fragments, stats.rows, stats.versions) == (12, 31, 13)
    freed = store.compact()
    after = store.stats()
    assert (after.fragments, after.deleted_rows, after.versions) == (1, 0, 1)
    assert freed == stats.record_bytes - after.record_bytes > 0
    assert contents(store) == before
    assert [p.name for p in (store.path / "checksums").iterdir()] == [f"{store.version}.sha256"]
    assert not store.check().unverified
    assert store.compact() == 0
    assert store.check().ok


def test_compaction_keeps_as_many_versions_as_are_wanted(store):
    for n in range(5):
        store.upsert(batch(["a"], n))
    store.compact(keep_versions=3)
    assert store.stats().versions == 3
    with pytest.raises(DataError, match="at least the newest stays"):
        store.compact(keep_versions=0)


def test_a_version_that_is_read_stays_until_nobody_reads_it(store):
    store.append(batch(["a", "b"], 1))
    reader = Store.open(store.path)
    writer = Store.open(store.path)
    for n in range(5):
        writer.upsert(batch(["a"], n))
    writer.compact()
    assert contents(reader)["a"][1] == 1
    assert reader.check().ok  # of the newest
    assert store.snapshot.version == 2
    assert {p.name for p in (store.path / "readers").iterdir()} == {"2", str(writer.version)}
    del reader
    store.refresh()
    writer.compact()
    assert writer.stats().versions == 1


# --- open and create ------------------------------------------------------------------------------


def test_what_stands_at_a_path_is_said(tmp_path, store):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").write_text("")
    for name, error, says in (
        ("nothing", StorageError, "there is no index at"),
        ("empty", StorageError, "empty is an empty folder"),
        ("other", StorageError, "other holds no index"),
        ("file", FileFormatError, "file is a file, and an index is a folder"),
    ):
        with pytest.raises(error, match=says):
            Store.open(tmp_path / name)
    for lost, other in (("nestvec.json", "record"), ("record", "nestvec.json")):
        (store.path / lost).rename(tmp_path / "moved")
        with pytest.raises(FileFormatError, match=rf"x.nest has {other} but no {lost}"):
            Store.open(store.path)
        (tmp_path / "moved").rename(store.path / lost)
    Store.open(store.path)


def test_an_index_is_not_created_over_anything(tmp_path, store):
    store.append(batch(["a"]))
    with pytest.raises(StorageError, match="a folder stands there with 'checksums'"):
        Store.create(store.path, SPACE, id_type="str")
    assert Store.open(store.path).count == 1


def test_a_newer_format_is_refused_with_a_sentence(store):
    path = store.path / "nestvec.json"
    stamp = json.loads(path.read_text())
    path.write_text(json.dumps(stamp | {"format": 2, "written_by": "nestvec 9.1"}))
    with pytest.raises(
        FileFormatError, match=r"newer nestvec \(nestvec 9.1, format 2\).*reads format 1.*pip"
    ):
        Store.open(store.path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "x"}', '{"format": 1}', "{}"])
def test_a_damaged_stamp_is_refused_by_name(store, text):
    (store.path / "nestvec.json").write_text(text)
    with pytest.raises(FileFormatError, match=r"nestvec"):
        Store.open(store.path)


def test_a_stamp_of_another_index_is_refused(tmp_path, store):
    other = Store.create(tmp_path / "y.nest", SPACE, id_type="int")
    (other.path / "nestvec.json").replace(store.path / "nestvec.json")
    with pytest.raises(FileFormatError, match="does not have the columns that"):
        Store.open(store.path)


@pytest.mark.parametrize("name", ["with space", "per%20cent #1?", "日本 é"])
def test_any_name_will_do(tmp_path, name):
    store = Store.create(tmp_path / name, SPACE, id_type="int")
    store.append(Batch(np.ones((2, 4)), [1, 2]))
    store.delete([1])
    store.compact()
    assert Store.open(tmp_path / name).count == 1
    assert store.check().ok


def test_every_step_of_a_life_can_be_reopened(tmp_path):
    path = tmp_path / "x.nest"
    Store.create(path, SPACE, id_type="str", payload=PAYLOAD)
    for n, step in enumerate(itertools.islice(itertools.cycle(["upsert", "compact"]), 6)):
        store = Store.open(path)
        store.compact() if step == "compact" else store.upsert(batch(["a", f"d{n}"], n))
    assert sorted(contents(Store.open(path))) == ["a", "d0", "d2", "d4"]
