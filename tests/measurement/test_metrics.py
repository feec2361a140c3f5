"""ir-measures, fed with our order, agrees with the definitions written out by hand."""

import numpy as np
import oracle
import pytest

from nestvec.errors import DataError
from nestvec.measurement.metrics import depth, per_query

BY_HAND = {
    "nDCG": oracle.ndcg_by_hand,
    "R": oracle.recall_by_hand,
    "AP": oracle.average_precision_by_hand,
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("k", [1, 5, 10, 50])
def test_metric_is_its_definition(rng, name, k):
    docs = [f"d{i}" for i in range(40)]
    queries = [f"q{i}" for i in range(25)]
    qrels, rankings = {}, []
    for query in queries:
        judged = rng.choice(docs, size=rng.integers(2, 30), replace=False)
        qrels[query] = {str(doc): int(rng.integers(0, 4)) for doc in judged}
        qrels[query][str(judged[0])] = 2
        rankings.append([str(doc) for doc in rng.permutation(docs)[: rng.integers(0, 40)]])
    got = per_query(rankings, queries, qrels, [f"{name}@{k}"])[f"{name}@{k}"]
    by_hand = [BY_HAND[name](r, qrels[q], k) for q, r in zip(queries, rankings, strict=True)]
    np.testing.assert_allclose(got, by_hand, atol=1e-6)
    assert np.ptp(got) > 0  # else nothing was compared


def test_order_that_is_given_is_the_order_that_is_judged():
    # Equal scores would be sorted by id, descending: z before a.
    found = per_query(
        [["a", "z"], ["z", "a"]], ["p", "q"], {"p": {"a": 1}, "q": {"a": 1}}, ["RR@2"]
    )
    np.testing.assert_allclose(found["RR@2"], [1, 0.5])


def test_depth_is_the_largest_cutoff():
    assert depth(["nDCG@10", "R@100", "AP@7"]) == 100


def test_metric_without_a_cutoff_is_refused():
    with pytest.raises(DataError, match="'nDCG' has no cutoff"):
        depth(["nDCG"])


def test_unknown_metric_is_refused():
    with pytest.raises(DataError, match="does not know one of the metrics Shoe@10"):
        per_query([["a"]], ["q"], {"q": {"a": 1}}, ["Shoe@10"])
