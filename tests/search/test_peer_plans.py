"""Plans over faiss's indexes keep what plans over ours do."""

import numpy as np
import pyarrow as pa
import pytest

import nestvec as nv
from nestvec._checks import normalise
from nestvec.errors import PlanError
from nestvec.search.exact import top_k
from nestvec.search.index import Index
from nestvec.search.store import Batch

DIM = 64
SPACE = nv.Space.declared("things", dim=DIM, nesting_dims=(16, DIM))
WIDE = {
    "faiss_hnsw": "faiss_hnsw(ef=1000) 64@10",
    "faiss_hnsw_sq8": "faiss_hnsw_sq8(ef=1000) 64:int8@40 > 64@10",
    "faiss_hnsw_panorama": "faiss_hnsw_panorama(ef=1000) 64@10",
    "faiss_ivf": "faiss_ivf(probes=100000) 64@10",
    "faiss_ivf_rabitq": "faiss_ivf_rabitq(probes=100000) 64:binary@600 > 64@10",
}


def rows(n, seed=0):
    rng = np.random.default_rng(seed)
    return normalise((rng.normal(size=(n, DIM)) * np.arange(1, DIM + 1) ** -0.5).astype(np.float32))


@pytest.fixture(params=WIDE)
def name(request):
    return request.param


@pytest.fixture
def index(tmp_path):
    batch = Batch(
        nv.Embeddings(rows(1000), SPACE), np.arange(1000), pa.table({"at": np.arange(1000)})
    )
    return Index.create(tmp_path / "a.nest", batch, durability="process")


def share_found(hits, wanted):
    found = [len(set(a) & set(b)) for a, b in zip(hits.ids.tolist(), wanted.tolist(), strict=True)]
    return np.mean(found) / wanted.shape[1]


def test_a_wide_plan_finds_the_neighbours_and_scores_them_exactly(index, name):
    wanted, scores = top_k(rows(20, seed=1), rows(1000), 10)
    hits = index.search(np.float32(3) * rows(20, seed=1), plan=WIDE[name])
    assert share_found(hits, wanted) > 0.99
    same = hits.ids == wanted
    np.testing.assert_allclose(hits.scores[same], scores[same], atol=1e-6)


def test_deleted_rows_are_passed_over_and_new_ones_found(index, name):
    index.search(rows(1), plan=WIDE[name])
    index.delete(np.arange(0, 1000, 3))
    index.add(rows(1, seed=9), ids=[5000], payload={"at": [0]})
    left = np.setdiff1d(np.arange(1000), np.arange(0, 1000, 3))
    hits = index.search(rows(20, seed=1), plan=WIDE[name])
    assert share_found(hits, left[top_k(rows(20, seed=1), rows(1000)[left], 10)[0]]) > 0.97
    assert index.search(rows(1, seed=9), plan=WIDE[name]).ids[0, 0] == 5000


def test_a_filter_is_a_search_of_the_rows_that_pass(index, name, monkeypatch):
    monkeypatch.setattr("nestvec.search.engine._FEW", 0)  # they would all be scored
    wanted = top_k(rows(20, seed=1), rows(1000)[:400], 10)[0]
    hits = index.search(rows(20, seed=1), plan=WIDE[name], filter="at < 400")
    assert hits.ids.max() < 400
    assert share_found(hits, wanted) > 0.97


def test_it_is_built_kept_counted_and_built_again_when_damaged(index, name):
    index.build(name)
    built = index.stats()["structures"][name]
    assert built > 1000
    wanted = index.search(rows(20, seed=1), plan=WIDE[name])
    (file,) = index.path.glob(f"derived/*/{name}/index.npy")
    with file.open("r+b") as handle:
        handle.seek(built // 2)
        handle.write(b"\xa5\x5a\xa5")
    again = Index.open(index.path)
    assert not again.check()["ok"]
    np.testing.assert_array_equal(again.search(rows(20, seed=1), plan=WIDE[name]).ids, wanted.ids)
    assert again.check()["ok"]
    assert again.stats()["structures"][name] > 1000


def test_a_stored_plan_may_name_it(index, name):
    index.set_plan(WIDE[name])
    assert str(Index.open(index.path).search(rows(1)).plan) == WIDE[name]


def test_threads_find_what_one_finds(index, name):
    one, two = (index.search(rows(200, seed=1), plan=WIDE[name], threads=n).ids for n in (1, 2))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ("faiss_hnsw(ef=20) 64:int8@20 > 64@10", r"Write faiss_hnsw\(ef=20\) 64@20\."),
        ("faiss_hnsw_sq8 64@10", r"Write faiss_hnsw_sq8 64:int8@10 > 64@10\."),
        ("faiss_hnsw_sq8 64:int8@10", "64:int8@10 > 64@10"),
        ("faiss_ivf_rabitq 16:binary@40 > 64@10", "64:binary@40 > 64@10"),
        ("faiss_ivf(ef=3) 64@10", "has the knobs probes"),
    ],
)
def test_a_plan_that_does_not_fit_says_what_would(index, plan, says):
    with pytest.raises(PlanError, match=says):
        index.search(rows(1), plan=plan)
