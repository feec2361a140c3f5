"""The cascade agrees with its definition, and ties and batches change nothing."""

import itertools

import numpy as np
import oracle
import pytest

import nestvec as nv
from nestvec.errors import DataError, DimensionError, PlanError, SpaceMismatchError
from nestvec.search.exact import top_k


@pytest.fixture
def vectors(rng):
    return rng.normal(size=(7, 32)).astype(np.float32), rng.normal(size=(60, 32)).astype(np.float32)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary"])
def test_a_cascade_matches_the_definition(vectors, precision):
    queries, gallery = vectors
    stages = [(4, 30, precision), (16, 12, precision), (32, 5, "float32")]
    plan = " > ".join(f"{d}:{p}@{k}" for d, k, p in stages)
    got = nv.cascade_search(queries, gallery, plan)
    np.testing.assert_array_equal(got.rows, oracle.cascade_by_hand(queries, gallery, stages))


def test_a_cascade_that_drops_nothing_is_exact_search(vectors):
    queries, gallery = vectors
    wide = nv.cascade_search(queries, gallery, "4@60 > 32@5")
    exact = nv.cascade_search(queries, gallery, "32@5")
    np.testing.assert_array_equal(wide.rows, exact.rows)
    np.testing.assert_array_equal(wide.scores, exact.scores)


def test_each_stage_is_a_subset_of_the_one_before(vectors):
    queries, gallery = vectors
    got = nv.cascade_search(queries, gallery, "4:binary@30 > 8:int8@12 > 32@5")
    for before, after in itertools.pairwise(got.shortlists):
        assert all(set(a) <= set(b) for a, b in zip(after.tolist(), before.tolist(), strict=True))


def test_a_wider_shortlist_never_loses_recall(vectors):
    queries, gallery = vectors
    exact = nv.cascade_search(queries, gallery, "32@5").rows
    recalls = [
        np.mean(
            [
                len(set(a) & set(b))
                for a, b in zip(
                    nv.cascade_search(queries, gallery, f"4@{n} > 32@5").rows, exact, strict=True
                )
            ]
        )
        for n in (5, 10, 20, 40, 60)
    ]
    assert recalls == sorted(recalls)
    assert recalls[-1] == 5


def test_ties_go_to_the_lower_row_whatever_the_batch(rng):
    row = rng.normal(size=(1, 48)).astype(np.float32)
    gallery = np.repeat(row, 1001, axis=0)  # odd, so that rows fall into different kernel tails
    queries = rng.normal(size=(9, 48)).astype(np.float32)
    got = nv.cascade_search(queries, gallery, "48@8").rows
    np.testing.assert_array_equal(got, np.tile(np.arange(8), (9, 1)))
    for q in range(9):
        np.testing.assert_array_equal(
            nv.cascade_search(queries[q : q + 1], gallery, "48@8").rows[0], got[q]
        )


def test_one_query_scores_as_it_does_in_a_batch(rng):
    queries, gallery = rng.normal(size=(33, 96)), rng.normal(size=(500, 96))
    batch = nv.cascade_search(queries, gallery, "16@50 > 96@10")
    for q in range(33):
        alone = nv.cascade_search(queries[q : q + 1], gallery, "16@50 > 96@10")
        np.testing.assert_array_equal(alone.rows[0], batch.rows[q])
        np.testing.assert_array_equal(alone.scores[0], batch.scores[q])


def test_top_k_finds_what_float64_finds_among_near_ties(rng):
    # rows differ by less than a float32 product can see; only rescoring in float64 ranks them
    base = rng.normal(size=64)
    gallery = (base + 1e-6 * rng.normal(size=(4000, 64))).astype(np.float32)
    queries = rng.normal(size=(5, 64)).astype(np.float32)
    rows, _ = top_k(queries, gallery, 10)
    exact = (queries.astype(np.float64) @ gallery.astype(np.float64).T).astype(np.float32)
    want = np.lexsort((np.broadcast_to(np.arange(4000), exact.shape), -exact), axis=1)[:, :10]
    np.testing.assert_array_equal(rows, want)


def test_cost_is_what_the_cascade_says(vectors):
    queries, gallery = vectors
    got = nv.cascade_search(queries, gallery, "8:int8@20 > 32@5")
    assert got.macs_per_query == 60 * 8 + 20 * 32
    assert got.bytes_per_query == 60 * 8 + 20 * 32 * 4


def test_explain_places_every_answer_in_every_stage(vectors):
    queries, gallery = vectors
    got = nv.cascade_search(queries, gallery, "4@30 > 32@5")
    answer = got.explain(3)[0]
    assert answer["id"] == got.rows[3, 0]
    assert answer["place"] == {
        "4@30": got.shortlists[0][3].tolist().index(got.rows[3, 0]) + 1,
        "32@5": 1,
    }


def test_adaptive_and_funnel_are_the_papers_cascades(vectors):
    queries, gallery = vectors
    adaptive = nv.adaptive_retrieval(queries, gallery, shortlist_dim=4, shortlist=20, k=5)
    funnel = nv.funnel_retrieval(queries, gallery, lowest_dim=4, shortlist=40, k=5)
    assert str(adaptive.plan) == "exact 4@20 > 32@5"
    assert str(funnel.plan) == "exact 4@40 > 8@20 > 16@10 > 32@5"


def test_a_funnel_steps_through_the_nesting_dims_of_the_space(vectors):
    queries, gallery = _stamped(vectors[0]), _stamped(vectors[1])
    got = nv.funnel_retrieval(queries, gallery, lowest_dim=8, shortlist=40, k=5)
    assert str(got.plan) == "exact 8@40 > 32@5"
    with pytest.raises(DimensionError, match="lowest_dim 33 does not fit"):
        nv.funnel_retrieval(queries, gallery, lowest_dim=33)
    with pytest.raises(PlanError, match="dim is a whole number >= 1"):
        nv.adaptive_retrieval(queries, gallery, shortlist_dim=8, rerank_dim=0)


def test_more_rows_asked_than_there_are_returns_them_all(vectors):
    queries, gallery = vectors
    assert nv.cascade_search(queries, gallery[:3], "8@50 > 32@10").rows.shape == (7, 3)


def _stamped(matrix, name="m", **more):
    space = nv.Space.declared(name, dim=32, normalisation="none", nesting_dims=(8, 32), **more)
    return nv.Embeddings(matrix, space, ids=[f"d{i}" for i in range(len(matrix))])


def test_ids_of_the_gallery_come_back(vectors):
    queries, gallery = vectors
    got = nv.cascade_search(_stamped(queries), _stamped(gallery), "8@20 > 32@3")
    assert got.ids[0, 0] == f"d{got.rows[0, 0]}"


def test_two_spaces_are_never_compared(vectors):
    queries, gallery = vectors
    with pytest.raises(SpaceMismatchError, match=r"old .*new .*two spaces.*two models"):
        nv.cascade_search(_stamped(queries, "new"), _stamped(gallery, "old"))


def test_a_plain_array_is_not_compared_with_a_stamped_gallery(vectors):
    with pytest.raises(SpaceMismatchError):
        nv.cascade_search(vectors[0], _stamped(vectors[1]))


def test_sizes_that_are_not_nesting_dims_are_refused_naming_those_that_are(vectors):
    queries, gallery = _stamped(vectors[0]), _stamped(vectors[1])
    with pytest.raises(DimensionError, match=r"nesting dims \(8, 32\)"):
        nv.cascade_search(queries, gallery, "16@20 > 32@3")
    assert nv.cascade_search(queries, gallery, "16@20 > 32@3", allow_untrained=True).rows.shape == (
        7,
        3,
    )


@pytest.mark.parametrize(
    ("plan", "error", "says"),
    [
        ("64@5", DimensionError, "does not fit embeddings of dim 32"),
        ("graph(ef=8) 32@5", PlanError, "structure 'exact' only"),
        ("exact(ef=8) 32@5", PlanError, "has no knobs"),
    ],
)
def test_a_plan_that_cannot_run_says_what_fits(vectors, plan, error, says):
    with pytest.raises(error, match=says):
        nv.cascade_search(vectors[0], vectors[1], plan)


def test_bad_rows_are_named(vectors):
    queries, gallery = vectors
    gallery[17, 3] = np.nan
    with pytest.raises(DataError, match="row 17 holds NaN"):
        nv.cascade_search(queries, gallery, "32@5")
    with pytest.raises(DimensionError, match="31 dims given where 32"):
        nv.cascade_search(queries[:, :31], np.ones((4, 32)), "32@5")


def test_dot_products_of_unnormalised_vectors_are_not_cut(vectors):
    queries, gallery = (_stamped(v, metric="dot") for v in vectors)
    with pytest.raises(DimensionError, match="prefixes are not comparable"):
        nv.cascade_search(queries, gallery, "8@20 > 32@3")
    want = np.argsort(-(vectors[0] @ vectors[1].T), axis=1)[:, :3]
    np.testing.assert_array_equal(nv.cascade_search(queries, gallery, "32@3").rows, want)
