"""Plans that end on codes answer without full vectors, by what the codes stand for."""

import numpy as np
import pytest

import nestvec as nv
from nestvec._checks import normalise
from nestvec.errors import PlanError
from nestvec.search.cascade import Plan
from nestvec.search.exact import top_k
from nestvec.search.index import Index

DIM = 48
SPACE = nv.Space.declared("things", dim=DIM, nesting_dims=(16, DIM))
PLANS = [
    "exact 48:int8@10",
    "graph(ef=400) 48:int8@10",
    "lists(probes=100000) 48:int8@10",
    "exact 16:int8@900 > 48:int8@10",
    "graph(ef=900) 16:int8@900 > 48:int8@10",
    "lists(probes=100000) 16:int8@900 > 48:int8@10",
    "exact 48:int10@10",
    "graph(ef=400) 48:int10@10",
    "lists(probes=100000) 48:int10@10",
    "exact 16:int8@900 > 48:int10@10",
    "lists(probes=100000) 16:int8@900 > 48:int10@10",
    "lists(probes=100000) 48:int8@60 > 48:int10@10",
]


def rows(n, seed=0):
    rng = np.random.default_rng(seed)
    return normalise((rng.normal(size=(n, DIM)) * np.arange(1, DIM + 1) ** -0.3).astype(np.float32))


@pytest.fixture
def index(tmp_path):
    return Index.create(tmp_path / "a.nest", nv.Embeddings(rows(1000), SPACE), durability="process")


def decoded(index, plan):
    generation = index._home.view().generation
    codes = generation.codes(DIM)
    steps = codes.values[:, :DIM].astype(np.float32) - 128
    if "int10" in plan:
        planes = np.unpackbits(generation.rests(DIM).values, axis=1, bitorder="little")
        pairs = planes.reshape(len(planes), -1, 4, 2).transpose(0, 2, 1, 3)
        quarters = (pairs @ [1, 2]).reshape(len(planes), -1)[:, :DIM]
        steps += (quarters - 1.5) / 4
    return (steps * codes.scale).astype(np.float32)


def test_two_bits_more_leave_an_eighth_of_a_step(index):
    generation = index._home.view().generation
    scale = generation.codes(DIM).scale
    for plan, most in ((PLANS[0], 1 / 2), (PLANS[6], 1 / 8)):
        off = np.abs(decoded(index, plan) - rows(1000)) / scale
        assert 0.9 * most < off.max() < 1.01 * most


@pytest.mark.parametrize("plan", PLANS)
def test_answers_are_those_of_an_exact_search_of_decoded_codes(index, plan):
    queries = rows(40, seed=1) * np.float32(5)
    hits = index.search(queries, plan=plan)
    wanted, scores = top_k(normalise(queries), normalise(decoded(index, plan)), 10)
    assert np.mean(hits.ids == wanted) > 0.99  # the shortlist may have lost one
    same = hits.ids == wanted
    np.testing.assert_allclose(hits.scores[same], scores[same], atol=2e-6)


@pytest.mark.parametrize("plan", PLANS)
def test_codes_find_nearly_all_true_neighbours(index, plan):
    queries = rows(40, seed=1)
    hits, wanted = index.search(queries, plan=plan), top_k(queries, rows(1000), 10)
    found = [len(set(a) & set(b)) for a, b in zip(hits.ids.tolist(), wanted[0], strict=True)]
    finer = "int10" in plan
    assert np.mean(found) > (9.9 if finer else 9.8)
    np.testing.assert_allclose(hits.scores, wanted[1], atol=1.5e-3 if finer else 5e-3)


@pytest.mark.parametrize("plan", PLANS)
def test_full_vectors_are_not_read(index, plan):
    wanted = index.search(rows(5, seed=1), plan=plan)
    mirror = index._home.view().generation.mirror
    mirror._words = mirror.vectors = None  # type: ignore[assignment]
    np.testing.assert_array_equal(index.search(rows(5, seed=1), plan=plan).ids, wanted.ids)


def test_equal_rows_are_told_in_the_order_they_were_stored(tmp_path):
    twins = np.repeat(rows(50), 12, axis=0)
    index = Index.create(tmp_path / "b.nest", nv.Embeddings(twins, SPACE), durability="process")
    for plan in (PLANS[0], PLANS[2], PLANS[3], PLANS[6], PLANS[8], PLANS[9]):
        hits = index.search(rows(50), plan=plan)
        np.testing.assert_array_equal(hits.ids, np.arange(50)[:, None] * 12 + np.arange(10))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("left", [700, 30, 4])
def test_deleted_rows_are_passed_over_and_new_ones_found(index, plan, left):
    index.search(rows(1), plan=plan)
    index.delete(np.arange(left, 1000))
    index.add(rows(1, seed=9), ids=[5000])
    hits = index.search(rows(20, seed=1), plan=plan)
    assert set(np.unique(hits.ids)) <= {*range(left), 5000, -1}
    assert (hits.ids >= 0).sum(axis=1).tolist() == [min(10, left + 1)] * 20
    assert index.search(rows(1, seed=9), plan=plan).ids[0, 0] == 5000


def test_explain_says_that_codes_answered(index):
    told = index.search(rows(1), plan=PLANS[1]).explain()
    assert [stage["stage"] for stage in told["stages"]] == ["48:int8@10"]
    assert told["stages"][0]["rows_scored"] == 400
    assert told["answers"][3]["place"] == {"48:int8@10": 4}
    told = index.search(rows(1), plan=PLANS[3]).explain()
    assert [stage["stage"] for stage in told["stages"]] == ["16:int8@900", "48:int8@10"]


def test_lists_that_answer_by_codes_hold_them_once(index):
    index.search(rows(1), plan=PLANS[2])
    assert index._home.view().generation.names() == ["listed-48", "lists"]
    for plan in (PLANS[8], PLANS[-1]):
        index.search(rows(1), plan=plan)
        assert index._home.view().generation.names() == ["listed-48", "lists", "rests-48"]


@pytest.mark.parametrize("plan", [PLANS[0], PLANS[6]])
def test_a_dimension_that_is_zero_in_all_rows_says_nothing_of_queries_that_are_not(tmp_path, plan):
    some = rows(300)
    some[:, 20] = 0
    index = Index.create(
        tmp_path / "b.nest", nv.Embeddings(normalise(some), SPACE), durability="process"
    )
    hits = index.search(rows(20, seed=1), plan=plan)
    wanted = top_k(rows(20, seed=1), normalise(some), 10)
    np.testing.assert_allclose(hits.scores, wanted[1], atol=5e-3)


def test_two_bits_more_that_were_damaged_are_made_again(index):
    wanted = index.search(rows(20, seed=1), plan=PLANS[6])
    folder = index._home.view().generation.folder / "rests-48"
    file = max(folder.glob("*.npy"), key=lambda one: one.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert "rests-48" in str(index.check())
    found = Index.open(index.path).search(rows(20, seed=1), plan=PLANS[6])
    np.testing.assert_array_equal(found.ids, wanted.ids)


def test_two_bits_more_are_for_the_last_stage(index):
    with pytest.raises(PlanError, match="Write 16:int8@90 in place of 16:int10@90"):
        index.search(rows(1), plan="exact 16:int10@90 > 48@10")


@pytest.mark.parametrize("plan", ["exact 12:int8@10", "graph 48:int8@90 > 64:int8@10"])
def test_answers_are_of_a_size_that_the_space_has(index, plan):
    with pytest.raises(PlanError, match="16, 48"):
        index.search(rows(1), plan=plan)


def test_a_plan_of_codes_is_stored_and_asked_for_more(index):
    index.set_plan(PLANS[1])
    assert index.search(rows(1), 30).ids.shape == (1, 30)
    assert index.search(rows(1)).plan == Plan.parse(PLANS[1])
