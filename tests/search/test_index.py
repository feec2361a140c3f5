"""An index finds what an exact search of the same rows finds, whatever was written in between."""

import shutil
import threading

import numpy as np
import pyarrow as pa
import pytest

import nestvec as nv
from nestvec._checks import normalise
from nestvec.errors import DataError, PlanError, SpaceMismatchError, StorageError
from nestvec.search import engine
from nestvec.search.cascade import Plan
from nestvec.search.exact import top_k
from nestvec.search.index import Index
from nestvec.search.store import Batch

DIM = 32
SPACE = nv.Space.declared("things", dim=DIM, nesting_dims=(8, 16, DIM))
WIDE = {
    "exact": "exact 32@10",
    "codes": "exact 32:int8@100 > 32@10",
    "graph": "graph(ef=200) 32:int8@100 > 32@10",
    "lists": "lists(probes=100000) 32:int8@100 > 32@10",
    "three stages": "exact 8:int8@10000 > 16:int8@3000 > 32@10",
}


def rows(n, seed=0):
    rng = np.random.default_rng(seed)
    return normalise((rng.normal(size=(n, DIM)) * np.arange(1, DIM + 1) ** -0.3).astype(np.float32))


def embeddings(vectors, ids=None):
    return nv.Embeddings(vectors, SPACE, ids=ids)


@pytest.fixture
def vectors():
    return rows(1000)


@pytest.fixture
def queries():
    return rows(20, seed=1)


@pytest.fixture
def index(tmp_path, vectors):
    return Index.create(tmp_path / "a.nest", embeddings(vectors), durability="process")


@pytest.mark.parametrize("plan", WIDE.values(), ids=WIDE)
def test_a_plan_that_drops_nothing_is_exact_search(index, vectors, queries, plan):
    wanted, scores = top_k(queries, vectors, 10)
    hits = index.search(queries, plan=plan)
    np.testing.assert_array_equal(hits.ids, wanted)
    np.testing.assert_allclose(hits.scores, scores, atol=1e-6)


def test_one_query_alone_finds_what_it_finds_among_many(index, queries):
    for some in ("32@10", "8@10"):
        many = index.search(queries, plan=some)
        for line in range(3):
            alone = index.search(queries[line], plan=some)
            np.testing.assert_array_equal(alone.ids[0], many.ids[line])
            np.testing.assert_allclose(alone.scores[0], many.scores[line], atol=1e-6)


def test_without_a_plan_every_row_is_scored(index, vectors, queries):
    np.testing.assert_array_equal(index.search(queries, 7).ids, top_k(queries, vectors, 7)[0])


def test_dims_searches_the_normalised_prefix(index, vectors, queries):
    wanted, scores = top_k(normalise(queries[:, :8]), normalise(vectors[:, :8]), 10)
    hits = index.search(queries, dims=8)
    np.testing.assert_array_equal(hits.ids, wanted)
    np.testing.assert_allclose(hits.scores, scores, atol=1e-6)


def test_one_query_may_be_a_vector(index, vectors):
    hits = index.search(vectors[3])
    assert hits.ids.shape == (1, 10)
    assert next(iter(hits))[0] == (3, pytest.approx(1))


@pytest.mark.parametrize("structure", ["exact", "graph(ef=40)", "lists(probes=3)"])
def test_each_stage_chooses_from_what_the_one_before_passed_on(index, queries, structure):
    hits = index.search(queries, plan=f"{structure} 8:int8@60 > 16:int8@30 > 32@10")
    first, second, last = hits._found.shortlists
    for q in range(len(queries)):
        assert set(last[q]) <= set(second[q]) <= set(first[q])
        assert set(hits._found.rows[q]) == set(last[q])


def test_explain_says_where_each_answer_stood(index, queries):
    hits = index.search(queries, plan="exact 8:int8@60 > 32@10")
    said = hits.explain(3)
    assert [stage["stage"] for stage in said["stages"]] == ["8:int8@60", "32@10"]
    assert [stage["rows_scored"] for stage in said["stages"]] == [1000, 60]
    first = hits._found.shortlists[0][3]
    for number, answer in enumerate(said["answers"], start=1):
        assert answer["place"]["32@10"] == number
        assert first[answer["place"]["8:int8@60"] - 1] == answer["id"]


def test_explain_calls_every_row_fresh_while_nothing_is_derived(tmp_path, queries):
    index = Index.create(tmp_path / "a.nest", SPACE, durability="process")
    index.search(queries)
    index.add(rows(5), ids=range(5))
    said = index.search(queries, plan="exact 8:int8@60 > 32@10").explain(3)
    assert said["stages"] == [
        {"stage": stage, "rows_scored": n, "ms": 0.0}
        for stage, n in (("8:int8@60", 0), ("32@10", 5))
    ]
    assert len(said["answers"]) == 5
    for answer in said["answers"]:
        assert answer["place"] == {"8:int8@60": "fresh", "32@10": "fresh"}


@pytest.mark.parametrize("plan", WIDE.values(), ids=WIDE)
def test_writes_are_seen_at_once_by_this_and_other_handles(index, queries, plan):
    """A hundred chance writes beside a dictionary, which is searched by hand."""
    other = Index.open(index.path)
    other.search(queries, plan=plan)
    rng = np.random.default_rng(2)
    table = dict(enumerate(rows(1000)))
    for step in range(12):
        known = np.array(list(table))
        gone = rng.choice(known, 5, replace=False)
        index.delete(gone)
        for id_ in gone.tolist():
            del table[id_]
        changed = [*rng.choice(list(table), 4, replace=False).tolist(), 5000 + step, 6000 + step]
        new = rows(len(changed), seed=100 + step)
        index.upsert(Batch(new, changed))
        table |= dict(zip(changed, new, strict=True))
        if step == 6:
            index.compact()
        ids = np.array(sorted(table))
        wanted = ids[top_k(queries, np.array([table[i] for i in ids.tolist()]), 10)[0]]
        for handle in (index, other):
            assert (np.sort(handle.search(queries, plan=plan).ids) == np.sort(wanted)).all()
        assert len(other) == len(table)


def test_compaction_leaves_no_fresh_and_no_dead_rows(index, queries):
    index.search(queries, plan=WIDE["graph"])
    index.upsert(Batch(rows(3, seed=5), [1, 2, 9999]))
    index.delete([7])
    before = index.stats()
    assert (before["fresh_rows"], before["dead_rows"]) == (3, 3)
    index.compact()
    after = index.stats()
    assert (after["fresh_rows"], after["dead_rows"], after["versions"]) == (0, 0, 1)
    assert set(after["structures"]) == set(before["structures"])
    assert len(list((index.path / "derived").iterdir())) == 1


@pytest.mark.parametrize(
    ("plan", "read"),
    [
        ("exact 32@10", []),
        ("exact 8:int8@60 > 16:int8@30 > 32@10", ["codes-16", "codes-8"]),
        ("graph 16:int8@60 > 32@10", ["codes-16", "graph"]),
        ("lists 16:int8@10", ["listed-16", "lists"]),
        ("lists 16:int8@60 > 32:int8@10", ["codes-32", "listed-16", "lists"]),
        ("faiss_hnsw_sq8 32:int8@60 > 32@10", ["faiss_hnsw_sq8"]),
    ],
)
def test_the_parts_of_a_plan_are_those_that_it_makes(index, queries, plan, read):
    index.search(queries, plan=plan)
    assert index._home.view().generation.names() == read == sorted(engine.parts(Plan.parse(plan)))


@pytest.mark.parametrize("changed", [False, True])
def test_compaction_drops_codes_that_the_stored_plan_does_not_read(index, queries, changed):
    index.search(queries, plan=WIDE["lists"])
    index.search(queries, plan=WIDE["three stages"])
    index.set_plan("graph 16:int8@60 > 32@10")
    index.search(queries)
    if changed:
        index.delete([7])
    index.compact()
    wanted = {"vectors", "graph", "lists", "codes-16"}
    assert {path.name for path in index.path.glob("derived/*/*")} == wanted
    assert not index._home.view().generation._loaded
    assert set(index.search(queries).ids[:, 0]) <= set(range(1000))


def test_a_reader_takes_over_what_has_its_structures_whatever_codes_it_used(index, queries):
    reader = Index.open(index.path)
    reader.search(queries, plan=WIDE["graph"])
    reader.search(queries, plan=WIDE["three stages"])
    index.set_plan(WIDE["graph"])
    index.delete([7])
    index.compact()
    assert reader.stats()["dead_rows"] == 0


def test_stats_count_what_writes_filters_and_walks_hold(index, queries):
    def held():
        return index.stats()["resident_bytes"]

    def told(work):
        before = held()
        work()
        return held() - before

    index.search(queries, plan=WIDE["graph"])
    (scratch,) = index._home.view().generation.graph()._scratches
    graph, codes = index._home.view().generation.graph(), index._home.view().generation.codes(DIM)
    mirror = index._home.view().generation.mirror.resident_bytes
    assert held() == mirror + graph.nbytes + codes.nbytes + sum(part.nbytes for part in scratch)
    assert scratch[0].nbytes == 2 * 1000
    # a byte a row that lives, four a place, and the row that a fragment has no place for
    assert told(lambda: index.delete([7])) == 1000 + 4 * 999
    assert told(lambda: index.search(queries, filter="id < 5")) == 1000


def test_a_reader_goes_on_through_a_compaction(index, queries):
    reader = Index.open(index.path)
    before = reader.search(queries, plan=WIDE["graph"]).ids
    index.delete([999])
    index.compact()
    np.testing.assert_array_equal(
        reader.search(queries, plan=WIDE["graph"]).ids[before != 999], before[before != 999]
    )


def test_text_ids_and_payload_come_back(tmp_path, vectors, queries):
    names = np.array([f"ding-{i}-ü" for i in range(1000)])
    payload = pa.table({"year": np.arange(1000) % 50, "title": names.tolist()})
    index = Index.create(tmp_path / "a", Batch(embeddings(vectors, names), payload=payload))
    index.upsert(Batch(queries[:1], ["new"], pa.table({"year": [7], "title": ["newest"]})))
    hits = index.search(queries, 5, columns=["title", "year"])
    assert hits.payload is not None
    assert hits.ids[0, 0] == "new"
    assert hits.payload[0]["title"][0].as_py() == "newest"
    wanted, _ = top_k(queries[1:], vectors, 5)
    np.testing.assert_array_equal(hits.ids[1:], names[wanted])
    for found, ids in zip(hits.payload[1:], hits.ids[1:], strict=True):
        assert found["title"].to_pylist() == ids.tolist()
    assert index.get(["new", "ding-3-ü"], columns=["year"])["year"].to_pylist() == [7, 3]


@pytest.mark.parametrize("plan", WIDE.values(), ids=WIDE)
@pytest.mark.parametrize("share", [0.9, 0.5, 0.05])
def test_a_filter_is_a_search_of_the_rows_that_pass(tmp_path, queries, plan, share):
    vectors = rows(6000)
    chance = np.random.default_rng(3).random(6000)
    payload = pa.table({"chance": chance})
    ids = np.arange(6000)
    index = Index.create(
        tmp_path / "a", Batch(embeddings(vectors, ids), payload=payload), durability="process"
    )
    index.search(queries)
    index.delete([0, 1, 2])
    passing = ids[(chance < share) & (ids > 2)]
    wanted = passing[top_k(queries, vectors[passing], 10)[0]]
    found = index.search(queries, plan=plan, filter=f"chance < {share}").ids
    kept = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, wanted, strict=True)])
    assert kept >= (0.97 if "graph" in plan else 1.0)
    assert np.isin(found, passing).all()


def test_a_filter_that_nothing_passes_finds_nothing(index, queries):
    hits = index.search(queries, filter="id > 100000")
    assert (hits.ids == -1).all()
    assert np.isnan(hits.scores).all()
    assert list(hits) == [[]] * len(queries)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("plan", WIDE.values(), ids=WIDE)
def test_a_handful_of_rows_is_enough(tmp_path, queries, n, plan):
    index = Index.create(tmp_path / "a", embeddings(rows(n)), durability="process")
    hits = index.search(queries, plan=plan)
    assert (np.sort(hits.ids[:, :n]) == np.arange(n)).all()
    assert (hits.ids[:, n:] == -1).all()


def test_an_empty_index_finds_nothing_until_rows_come(tmp_path, queries):
    index = Index.create(tmp_path / "a", SPACE)
    assert (index.search(queries).ids == -1).all()
    index.add(embeddings(queries, np.arange(20)))
    assert (index.search(queries).ids[:, 0] == np.arange(20)).all()


def test_float16_halves_the_file_and_finds_the_same(tmp_path, vectors, queries):
    half = Index.create(tmp_path / "a", embeddings(vectors), precision="float16")
    wanted, scores = top_k(queries, vectors, 10)
    hits = half.search(queries, plan=WIDE["graph"])
    np.testing.assert_allclose(hits.scores, scores, atol=1e-3)
    assert (hits.ids == wanted).mean() > 0.95
    bytes_of = half.stats()["structures"]["vectors"]
    assert bytes_of < 1000 * (2 * DIM + 40)


def test_row_numbers_never_replace_or_name_rows_that_are_there(index, queries):
    for write in (index.add, index.upsert):
        for more in (embeddings(queries), [embeddings(queries)], embeddings(queries)[5:]):
            with pytest.raises(DataError, match=r"row numbers would be .* Pass ids="):
                write(more)
    assert (index.version, len(index)) == (2, 1000)
    assert index.upsert(embeddings(queries), ids=np.arange(20)).updated == 20


def test_payload_may_be_a_mapping_wherever_rows_come_in(tmp_path, vectors):
    for name, rows_and_payload in {
        "a": ((Batch(embeddings(vectors[:3]), payload={"year": [1, 2, 3]}),), {}),
        "b": ((embeddings(vectors[:3]),), {"payload": {"year": np.arange(1, 4)}}),
    }.items():
        index = Index.create(tmp_path / name, *rows_and_payload[0], **rows_and_payload[1])
        index.add(vectors[3:5], ids=[3, 4], payload={"year": [4, 5]})
        index.upsert(Batch(vectors[4:6], [4, 5]), payload={"year": [6, 7]})
        got = index.get([0, 3, 4, 5], columns="year")
        assert got.to_pydict() == {"year": [1, 4, 6, 7]}
    with pytest.raises(DataError, match=r"payload: .*Give one value a row"):
        Index.create(tmp_path / "c", embeddings(vectors[:3]), payload={"year": [1], "n": [1, 2]})


def test_one_id_and_one_column_need_no_list(index, vectors):
    np.testing.assert_allclose(index.get(7, columns="vector")["vector"][0].as_py(), vectors[7])
    assert index.search(vectors[:2], 3, columns="id").payload[1]["id"][0].as_py() == 1
    assert index.delete(7).deleted == 1


def test_what_makes_the_rows_holds_no_lock(index):
    """It deletes through the very handle that reads it, and nobody waits for it."""

    def made():
        assert index.delete(3).deleted == 1
        yield Batch(rows(1, seed=7), [5000])
        assert index.delete(4).deleted == 1

    assert index.add(made()).inserted == 1
    assert len(index) == 999


def test_a_writer_that_rests_keeps_no_version_on_disk(index, vectors):
    other = Index.open(index.path, durability="process")
    index.upsert(Batch(vectors[:1], [0]))
    for id_ in range(3):
        other.upsert(Batch(vectors[:1], [id_]))
    other.compact()
    assert len(index) == 1000
    other.compact()
    assert other.stats()["versions"] == 1


def test_looking_derives_nothing(index, queries):
    assert index.stats()["structures"] == {}
    assert index.stats()["fresh_rows"] == 1000
    assert index.check() == {
        "ok": True,
        "record": index.check()["record"],
        "derived": [],
        "new": None,
    }
    assert not (index.path / "derived").exists()
    index.search(queries)
    assert Index.open(index.path).stats()["fresh_rows"] == 0


def test_a_cascade_scans_every_row_whatever_plan_is_stored(index, queries):
    text = "8:int8@60 > 32@10"
    wanted = index.search(queries, plan=f"exact {text}")
    index.set_plan("graph(ef=30) 32:int8@20 > 32@10")
    for cascade in (text, nv.Cascade.parse(text)):
        found = index.search(queries, cascade=cascade)
        assert found.plan == wanted.plan
        np.testing.assert_array_equal(found.ids, wanted.ids)
    assert index.search(queries, 3, cascade=text).ids.shape == (20, 3)
    with pytest.raises(PlanError, match="plan, cascade, dims and recall"):
        index.search(queries, cascade=text, dims=8)


def test_what_was_planned_is_stored_with_its_certificate(tmp_path, index):
    planned = index.plan(rows(400, seed=5), recall=0.9, structures=["exact"], keep=False)
    assert index.plan_stored is None
    index.set_plan(planned)
    assert index.search(rows(3), recall=0.9).plan == planned.plan


def test_scratch_of_a_killed_set_plan_is_removed(index):
    for write in (lambda: index.set_plan("32@10"), index.compact):
        (index.path / ".plan.json.a8s").mkdir()
        (index.path / ".plan.json.a8s" / "plan.json").write_text("half")
        write()
        assert not list(index.path.glob(".plan.json.*"))


def test_queries_of_another_space_are_refused(index, queries):
    other = nv.Space.declared("other things", dim=DIM)
    with pytest.raises(SpaceMismatchError):
        index.search(nv.Embeddings(queries, other))
    with pytest.raises(SpaceMismatchError):
        index.add(nv.Embeddings(queries, other, ids=np.arange(2000, 2020)))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (np.full((1, DIM), np.nan), "queries"),
        (np.ones((1, 5)), "dim"),
        (np.zeros((1, DIM)), "zero"),
    ],
    ids=["nan", "dim", "zeros"],
)
def test_bad_queries_are_refused(index, bad, says):
    with pytest.raises(DataError, match=says):
        index.search(bad)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ("tree 32@10", "exact, graph, lists, faiss_hnsw"),
        ("graph(depth=3) 32:int8@20 > 32@10", "ef"),
        ("graph(ef=0) 32:int8@20 > 32@10", "1 or more"),
        ("graph(ef=20) 32@10", "32:int8@10"),
        ("exact 12@10", "8, 16, 32"),
        ("exact 64:int8@20 > 64@10", "8, 16, 32"),
        ("exact 32:binary@20 > 32@10", "int8, int10 and float32"),
    ],
)
def test_a_plan_that_does_not_fit_says_what_would(index, queries, plan, says):
    with pytest.raises(PlanError, match=says):
        index.search(queries, plan=plan)


def test_codes_of_an_untrained_size_may_come_first(index, vectors, queries):
    hits = index.search(queries, plan="exact 12:int8@1000 > 32@10")
    np.testing.assert_array_equal(hits.ids, top_k(queries, vectors, 10)[0])


def test_a_stored_plan_is_followed_by_every_handle(index, queries):
    plan = "graph(ef=30) 32:int8@20 > 32@10"
    index.set_plan(plan)
    again = Index.open(index.path)
    assert str(again.search(queries).plan) == plan
    assert str(again.search(queries, 40).plan) == "graph(ef=30) 32:int8@40 > 32@40"
    again.set_plan(None)
    assert str(index.search(queries).plan) == "exact 32@10"


# --- faults -----------------------------------------------------------------------------------


PARTS = ["vectors", "codes-32", "graph", "lists", "listed-32"]


@pytest.fixture
def built(index, queries):
    for plan in WIDE.values():
        index.search(queries, plan=plan)
    return index


def derived(index, part):
    (folder,) = (index.path / "derived").iterdir()
    return max((folder / part).glob("*.npy"), key=lambda file: file.stat().st_size)


def flip(file, at):
    with file.open("r+b") as handle:
        handle.seek(at)
        byte = handle.read(1)[0]
        handle.seek(at)
        handle.write(bytes([byte ^ 16]))


def answers(path, queries):
    index = Index.open(path)
    return [index.search(queries, plan=plan).ids for plan in WIDE.values()]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", ["deleted", "truncated", "flipped", "manifest"])
def test_damaged_derived_files_are_found_and_made_again(built, vectors, queries, part, damage):
    file = derived(built, part)
    wanted, _ = top_k(queries, vectors, 10)
    if damage == "deleted":
        file.unlink()
    elif damage == "truncated":
        with file.open("r+b") as handle:
            handle.truncate(file.stat().st_size // 2)
    elif damage == "manifest":
        (file.parent / "manifest.json").write_text("{")
    else:
        row_that_is_read = 128 + (int(wanted[0, 0]) * DIM + 3) * 4 + 2
        flip(file, row_that_is_read if part == "vectors" else file.stat().st_size - 5)
    for found in answers(built.path, queries):
        np.testing.assert_array_equal(found, wanted)
    assert Index.open(built.path).check()["ok"]


def test_all_derived_files_may_go(built, vectors, queries):
    shutil.rmtree(built.path / "derived")
    wanted, _ = top_k(queries, vectors, 10)
    for found in answers(built.path, queries):
        np.testing.assert_array_equal(found, wanted)


def test_check_names_what_is_damaged(built):
    file = derived(built, "graph")
    flip(file, 2000)
    found = built.check()
    assert not found["ok"]
    assert found["derived"] == [str(file)]
    assert built.check()["ok"]


def test_a_version_that_was_lost_leaves_nothing_derived(built, queries):
    (folder,) = (built.path / "derived").iterdir()
    folder.rename(folder.with_name("99-lost"))
    reopened = Index.open(built.path)
    reopened.search(queries)
    assert reopened._home.view().generation.folder.name != "99-lost"


def test_a_store_that_is_no_index_says_so(tmp_path):
    with pytest.raises(StorageError, match="no index"):
        Index.open(tmp_path / "nothing")


def test_a_failed_create_leaves_nothing(tmp_path):
    with pytest.raises(DataError):
        Index.create(tmp_path / "a", embeddings(rows(3), np.array([1, 1, 2])))
    assert not (tmp_path / "a").exists()


def searched_while_written(folder, n_searches):
    """Row i always points along axis i; its sign says whether an even version wrote it."""
    axes = np.eye(DIM, dtype=np.float32)
    index = Index.create(folder, embeddings(axes, np.arange(DIM)), durability="process")
    stop, signs = threading.Event(), [1.0]

    def write():
        while not stop.is_set():
            signs.append(-signs[-1])
            index.upsert(Batch(signs[-1] * axes, np.arange(DIM)))

    writer = threading.Thread(target=write)
    writer.start()
    versions = set()
    try:
        for number in range(n_searches):
            hits = index.search(axes[number % DIM], plan=WIDE["graph"])
            real = hits.scores[0]
            # All rows of one version have one sign: a mixture would score both 1 and -1.
            assert hits.ids[0, 0] == number % DIM or real[0] == 0
            assert not ((real == 1).any() and (real == -1).any())
            assert len(set(hits.ids[0].tolist())) == 10
            versions.add(hits.version)
    finally:
        stop.set()
        writer.join()
    assert len(versions) > 3


def test_every_answer_during_upserts_is_of_one_version(tmp_path):
    searched_while_written(tmp_path / "a", 300)


@pytest.mark.slow
def test_ten_thousand_answers_during_upserts_are_of_one_version(tmp_path):
    searched_while_written(tmp_path / "a", 10_000)
