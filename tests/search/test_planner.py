"""The planner finds the cheapest plan that holds, proves it on other queries, or says why not."""

import numpy as np
import pytest

import nestvec as nv
from nestvec._checks import normalise
from nestvec.errors import DataError
from nestvec.search import planner, trials
from nestvec.search.cascade import Plan
from nestvec.search.exact import top_k
from nestvec.search.index import Index
from nestvec.search.planner import Measured, _frontier
from nestvec.search.store import Batch

DIM = 48
SPACE = nv.Space.declared("things", dim=DIM, nesting_dims=(16, DIM))


def rows(n, seed):
    """Points of a low-dimensional sheet and some noise: near neighbours, as real vectors have."""
    rng = np.random.default_rng(seed)
    turn = np.random.default_rng(99).normal(size=(10, DIM))
    found = rng.normal(size=(n, 10)) @ turn + 0.5 * rng.normal(size=(n, DIM))
    return normalise((found * np.arange(1, DIM + 1) ** -0.4).astype(np.float32))


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planner") / "a.nest"
    return Index.create(folder, nv.Embeddings(rows(6000, 0), SPACE), durability="process")


@pytest.fixture(scope="module")
def fresh():
    return rows(2000, 2)


@pytest.fixture(scope="module")
def planned(index):
    return index.plan(rows(1000, 1), recall=0.95, keep=False)


def recall(index, queries, plan, k=10):
    wanted, _ = top_k(queries, rows(6000, 0), k)
    found = index.search(queries, k, plan=plan).ids
    return np.mean([len(set(a) & set(b)) / k for a, b in zip(found, wanted, strict=True)])


def test_the_certified_plan_holds_on_fresh_queries(index, planned, fresh):
    assert recall(index, fresh, planned.plan) >= 0.95


def test_what_the_frontier_says_is_what_its_plans_do(index, planned):
    choosing = rows(1000, 1)[np.random.default_rng(0).permutation(1000)[:500]]
    for one in planned.frontier[:: max(1, len(planned.frontier) // 8)]:
        assert recall(index, choosing, one.plan) == pytest.approx(one.recall, abs=1e-9)


def test_nothing_on_the_frontier_is_beaten(planned):
    ms = [one.ms for one in planned.frontier]
    found = [one.recall for one in planned.frontier]
    assert ms == sorted(ms)
    assert found == sorted(set(found))


def test_the_frontier_of_a_handful_is_the_one_made_by_hand():
    plan = Plan.parse("48@10")
    points = [(0.5, 1.0), (0.4, 2.0), (0.9, 3.0), (0.9, 2.5), (1.0, 9.0), (0.2, 0.5)]
    kept = _frontier([Measured(plan, r, ms, 0.0) for r, ms in points])
    assert [(one.recall, one.ms) for one in kept] == [
        (0.2, 0.5),
        (0.5, 1.0),
        (0.9, 2.5),
        (1.0, 9.0),
    ]


def found_by(choosing, certifying, recall=0.9, **more):
    common = {"ms": None, "resident_bytes": None, "structures": ["exact"], "confidence": 0.95}
    return planner.find(choosing, certifying, recall=recall, seed=0, **{**common, **more})


def test_the_certifying_queries_take_no_part_in_choosing(index, fresh):
    """The frontier is the same beside queries that nothing certifies."""
    pool = trials.draw(index._seen(), fresh, k=10, n=1000, seed=0)
    choosing, certifying = pool.subset(np.arange(300)), pool.subset(np.arange(300, 1000))
    hopeless = trials.Trials(index._seen(), fresh[:300], np.full(300, -1), np.zeros((300, 10), int))
    good, bad = found_by(choosing, certifying), found_by(choosing, hopeless)
    assert good.plan is not None
    assert bad.plan is None
    assert good.frontier == bad.frontier


def test_a_subset_of_a_pool_says_what_its_queries_say_alone(index, fresh):
    pool = trials.draw(index._seen(), fresh, k=10, n=1500, seed=0)
    some = np.random.default_rng(0).permutation(1500)[:400]
    alone = pool.subset(some)._apart(some)
    for text in ("graph(ef=20) 48:int8@15 > 48@10", "lists(probes=3) 32:int8@30 > 48@10"):
        plan = Plan.parse(text)
        wanted = alone.recall(plan)  # it is run
        assert 0.5 < wanted.mean() < 1
        pool.walk(plan, 20 if plan.structure == "graph" else 100)
        assert (pool.subset(some).recall(plan) == wanted).all()  # it is read off the walk
        np.testing.assert_array_equal(
            pool.subset(some).walk(plan, 20).places < 15, alone.walk(plan, 20).places < 15
        )


def test_halves_share_no_query_and_nothing_measured(index, fresh):
    one, other = trials.draw(index._seen(), fresh, k=10, n=301, seed=0).halves()
    assert (len(one), len(other)) == (150, 151)
    together = np.concatenate([one._queries, other._queries])
    assert len(np.unique(together, axis=0)) == 301
    assert one._walks is not other._walks
    assert one._answers is not other._answers


def test_it_tests_from_the_safest_to_the_cheapest_and_takes_the_last_that_held(planned):
    times = [one.ms for one in planned.tested]
    assert times == sorted(times, reverse=True)
    held = planned.tested[: planned.certificate.n_held]
    assert planned.plan == held[-1].plan
    assert all(bound.lower >= 0.95 for bound in planned.certificate.bounds[: len(held)])


def test_gallery_rows_stand_in_for_queries_and_do_not_find_themselves(index):
    found = index.plan(recall=0.9, n_queries=600, keep=False)
    assert found.gallery_like
    assert "queries like the gallery's rows" in found.sentence
    # A row that finds itself would make recall@1 at the narrowest plan at least that of others.
    own = index.plan(recall=0.9, n_queries=600, k=1, structures=["graph"], keep=False)
    assert own.frontier[0].recall < 1


def test_a_budget_of_bytes_is_kept(index):
    found = index.plan(rows(600, 1), recall=0.9, resident_bytes=110, keep=False)
    assert found.plan.structure in ("lists", "exact")
    assert all(one.resident_bytes <= 110 for one in found.frontier)


def test_a_budget_of_time_takes_the_most_recall_within_it(index, planned):
    budget = planned.frontier[len(planned.frontier) // 2].ms
    found = index.plan(rows(1000, 1), ms=budget, keep=False)
    chosen = next(one for one in found.frontier if one.plan == found.plan)
    assert chosen.ms <= budget
    assert chosen.recall == max(one.recall for one in found.frontier if one.ms <= budget)


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ({"recall": 0.999999}, "cannot be certified|out of reach"),
        ({"ms": 1e-9}, "No plan answers in"),
        ({"resident_bytes": 1}, "budget of bytes"),
    ],
    ids=["recall", "ms", "bytes"],
)
def test_a_budget_that_cannot_be_met_is_said_plainly(index, budget, says):
    import re

    found = index.plan(rows(300, 1), keep=False, **budget)
    assert found.plan is None
    assert re.search(says, found.sentence)


def test_the_plan_is_stored_and_followed(tmp_path):
    index = Index.create(tmp_path / "a", nv.Embeddings(rows(1500, 0), SPACE), durability="process")
    found = index.plan(rows(400, 1), recall=0.9)
    assert Index.open(tmp_path / "a").plan_stored == found.plan
    assert index.search(rows(3, 2)).plan == found.plan


def test_rows_written_since_count_too(tmp_path):
    index = Index.create(tmp_path / "a", nv.Embeddings(rows(1500, 0), SPACE), durability="process")
    index.search(rows(3, 2))
    index.upsert(Batch(rows(100, 7), np.arange(100)))
    index.delete(np.arange(200, 260))
    found = index.plan(recall=0.9, n_queries=400)
    assert found.plan is not None


@pytest.mark.parametrize("bad", [{"recall": 1.5}, {"recall": 0}, {"confidence": 2}])
def test_shares_beyond_one_are_refused(index, bad):
    with pytest.raises(DataError, match="share"):
        index.plan(rows(300, 1), keep=False, **{"recall": 0.9, **bad})


def test_too_few_queries_are_refused(index):
    with pytest.raises(DataError, match="too few"):
        index.plan(rows(5, 1), recall=0.9)
