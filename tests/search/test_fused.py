"""A plan in one call finds what its stages find one by one, bit by bit."""

import numpy as np
import pytest

import nestvec as nv
from nestvec._checks import normalise
from nestvec.search import engine
from nestvec.search.cascade import Plan
from nestvec.search.index import Index

DIM = 48
SPACE = nv.Space.declared("things", dim=DIM, nesting_dims=(16, DIM))
PLANS = [
    "graph(ef=30) 48:int8@20 > 48@10",
    "graph(ef=5) 16:int8@20 > 48@10",
    "lists(probes=3) 48:int8@20 > 48@10",
    "lists(probes=100000) 16:int8@200 > 48@7",
    "lists(probes=1) 16:int8@900 > 48@900",
]


def rows(n, seed=0):
    return normalise(np.random.default_rng(seed).normal(size=(n, DIM)).astype(np.float32))


def index_of(path, n, precision="float32"):
    return Index.create(
        path, nv.Embeddings(rows(n), SPACE), precision=precision, durability="process"
    )


def one_by_one(plan, generation, queries, mask):
    planned = engine.Runner(plan, generation)
    assert planned.fused is not None
    planned.fused = None
    return planned(queries, mask)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("n", [1, 40, 1000])
def test_a_fused_plan_is_its_stages_one_by_one(tmp_path, precision, n):
    view = index_of(tmp_path / "a.nest", n, precision)._home.view()
    queries = rows(25, seed=1) * np.float32(3)
    for text in PLANS:
        plan = Plan.parse(text)
        wanted_rows, wanted, short, said = one_by_one(plan, view.generation, queries, view.everyone)
        fused = engine.Runner(plan, view.generation)
        for some in [slice(0, 25), slice(3, 4)]:
            found, scores, lists, told = fused(queries[some], view.everyone)
            np.testing.assert_array_equal(found, wanted_rows[some])
            np.testing.assert_array_equal(
                np.where(found < 0, 0, scores), np.where(found < 0, 0, wanted[some])
            )
            for one, other in zip(lists, short, strict=True):
                np.testing.assert_array_equal(one, other[some])
            for one, other in zip(told, said, strict=True):
                assert {**one, "ms": 0} == {**other, "ms": 0}
                assert one["ms"] > 0


def test_places_that_found_no_row_have_no_score(tmp_path):
    hits = index_of(tmp_path / "a.nest", 1000).search(rows(1, seed=1), plan=PLANS[-1])
    missing = hits.ids == -1
    assert missing.any()
    np.testing.assert_array_equal(np.isnan(hits.scores), missing)


@pytest.mark.parametrize("plan", PLANS[:4])
def test_a_flipped_bit_is_met_and_mended(tmp_path, plan):
    index = index_of(tmp_path / "a.nest", 1000)
    wanted = index.search(rows(1), plan=plan)
    file = next((tmp_path / "a.nest").glob("derived/*/vectors/vectors.npy"))
    index = Index.open(tmp_path / "a.nest")
    index.search(rows(1), plan=plan)
    with file.open("r+b") as handle:  # row 0, which is the first answer
        handle.seek(file.stat().st_size - 1000 * DIM * 4 + 17)
        handle.write(b"\xa5")
    found = index.search(rows(1), plan=plan)
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_array_equal(found.scores, wanted.scores)


def test_every_search_looks_for_a_newer_version(tmp_path):
    index = index_of(tmp_path / "a.nest", 1000)
    assert index.search(rows(1), plan=PLANS[0]).ids[0, 0] == 0
    other = Index.open(tmp_path / "a.nest", durability="process")
    other.delete([0])
    assert index.search(rows(1), plan=PLANS[0]).ids[0, 0] != 0
