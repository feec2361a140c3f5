"""A certificate errs as seldom as it says, is as tight as the exact test where there is one."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nestvec.errors import DataError
from nestvec.search.certificate import (
    Bound,
    _capital,
    certify,
    lower_bound,
    n_needed,
)

METHODS = ("betting", "empirical_bernstein", "hoeffding")


def zeros_and_ones(rng, mean, size):
    return (rng.random(size) < mean).astype(float)


def recall_at_10(rng, mean, size, inflation=2.2):
    """Ten neighbours a query, found or missed together: variance 2.2 times binomial."""
    both = 9 / (inflation - 1) - 1
    return rng.binomial(10, rng.beta(mean * both, (1 - mean) * both, size)) / 10


def one_neighbour_missed(rng, mean, size):
    return 1 - 0.1 * (rng.random(size) < 10 * (1 - mean))


def rarely_nothing(rng, mean, size):
    """Mostly just above the mean, now and then 0: the two-point shape that looks the safest."""
    safe = min(1.0, mean + 1 / size[-1])
    return safe * (rng.random(size) < mean / safe)


def constant(rng, mean, size):
    return np.full(size, mean)


def even(rng, mean, size):
    return rng.beta(5 * mean, 5 * (1 - mean), size)


SHAPES = [
    (zeros_and_ones, 0.96),
    (zeros_and_ones, 0.5),
    (zeros_and_ones, 0.1),
    (recall_at_10, 0.95),
    (one_neighbour_missed, 0.97),
    (rarely_nothing, 0.95),
    (constant, 0.97),
    (even, 0.7),
]


def most_misses(n, share=0.05):
    """Exceeded with probability 1e-4 if each of n bounds misses with probability ``share``."""
    return scipy.stats.binom.isf(1e-4, n, share)


def clopper_pearson(successes, n, alpha=0.05):
    return scipy.stats.beta.ppf(alpha, successes, n - successes + 1)


# The slow oracle: the capital of one gambler, value by value, as the notes say it


def capital_by_hand(values, m, level):
    n, begin, w = len(values), 0, level
    while begin < n:
        size = max(1, (n - begin) // 250)
        losses = [1 - v for v in values[:begin]]
        sums = sum(losses)
        variance = sum((loss - sums / begin) ** 2 for loss in losses) if begin else 0.0
        error = math.sqrt((n - begin) * (0.05 + variance) / (0.05 + sums) * (1 - m))
        part = min(1 / m, 4 / error)
        fund = 1.0
        for v in values[begin : begin + size]:
            fund *= 1 + part * (v - m)
        wanted = 0.85 * w * math.sqrt(2 * math.log(1 / w)) / error / part if w else 0.0
        w = min(1.0, max(0.0, w + min(w, wanted) * (fund - 1)))
        begin += size
    return w


@pytest.mark.parametrize("n", [2, 40, 600])
@pytest.mark.parametrize(("shape", "mean"), SHAPES)
def test_the_bound_is_where_a_gambler_stops_to_get_rich(rng, shape, mean, n):
    values = shape(rng, mean, (n,))
    taken = np.random.default_rng(7).permutation(values).tolist()
    found = lower_bound(values, confidence=0.9, seed=7)
    gap = values.mean() - found
    if found > 0:
        assert capital_by_hand(taken, found, 0.1) == pytest.approx(1)
    if gap > 0:
        assert capital_by_hand(taken, found + 0.003 * gap, 0.1) < 1
    if n == 40:  # over a fine grid: rejected up to the bound, and nowhere behind it
        grid = np.linspace(0, values.mean(), 301)[1:-1]
        rich = [capital_by_hand(taken, m, 0.1) >= 1 - 1e-12 for m in grid]
        assert rich == sorted(rich, reverse=True)
        assert np.sum(rich) == pytest.approx(np.sum(grid <= found), abs=1)


# How often it errs


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("shape", "mean"), SHAPES)
def test_the_bound_misses_in_at_most_5_of_100(rng, shape, mean, method):
    draws = shape(rng, mean, (300, 60))
    missed = sum(lower_bound(x, method=method) > mean for x in draws)
    assert missed <= most_misses(300)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "mean"),
    [(zeros_and_ones, 0.99), (zeros_and_ones, 0.95), (recall_at_10, 0.99), (recall_at_10, 0.95),
     (one_neighbour_missed, 0.99), (rarely_nothing, 0.99), (even, 0.9), (zeros_and_ones, 0.01)],
)  # fmt: skip
def test_the_bound_of_1000_queries_misses_in_at_most_5_of_100(rng, shape, mean):
    # the bound is above the mean iff the capital at the mean reaches 1: a third of the work
    at_mean, level = np.array([mean]), np.array([0.05])
    draws = shape(rng, mean, (1000, 1000))
    assert sum(_capital(x, at_mean, level)[0] >= 1 for x in draws) <= most_misses(1000)


def test_neighbours_as_trials_of_their_own_miss_too_often_and_ours_do_not(rng):
    draws = recall_at_10(rng, 0.9, (300, 150))
    pooled = sum(clopper_pearson(round(10 * x.sum()), 1500) > 0.9 for x in draws)
    assert pooled > 300 * 0.10
    assert sum(lower_bound(x) > 0.9 for x in draws) <= most_misses(300)


def test_a_false_plan_is_certified_in_at_most_5_of_100(rng):
    false = 0
    for _ in range(200):
        hard = rng.random(100)  # what makes a query hard is shared by all plans
        found = certify([hard < mean for mean in (0.99, 0.95, 0.9, 0.899, 0.89)], 0.9)
        false += found.n_held > 2
    assert false <= most_misses(200)


# How tight it is


@pytest.mark.parametrize("n", [30, 299, 5000])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_n_ones_say_what_the_exact_test_says(n, confidence):
    exact = (1 - confidence) ** (1 / n)
    found = lower_bound(np.ones(n), confidence=confidence)
    assert exact - 0.002 * (1 - exact) <= found <= exact


@pytest.mark.parametrize("mean", [0.99, 0.9, 0.5, 0.05])
def test_zeros_and_ones_are_bounded_about_as_by_clopper_and_pearson(rng, mean):
    ours, exact = [], []
    for x in zeros_and_ones(rng, mean, (40, 600)):
        ours.append(x.mean() - lower_bound(x))
        exact.append(x.mean() - clopper_pearson(x.sum(), len(x)))
    assert np.mean(ours) <= 1.1 * np.mean(exact)


def test_many_values_are_bounded_about_as_if_their_variance_were_known(rng):
    for shape, mean in [(even, 0.7), (recall_at_10, 0.95), (zeros_and_ones, 0.2)]:
        gaps = [x.mean() - lower_bound(x) for x in shape(rng, mean, (6, 20_000))]
        known = 1.645 * shape(rng, mean, (100_000,)).std() / math.sqrt(20_000)
        assert np.mean(gaps) == pytest.approx(known, rel=0.2)


def test_betting_is_tighter_than_bernstein_and_bernstein_than_hoeffding(rng):
    x = recall_at_10(rng, 0.98, (1000,))
    bounds = [lower_bound(x, method=method) for method in METHODS]
    assert bounds == sorted(bounds, reverse=True)
    gaps = x.mean() - np.array(bounds)
    assert 2 * gaps[0] < gaps[1]


def test_the_closed_forms_are_those_of_the_papers():
    x = [0.5, 1.0] * 50
    variance = 100 / 99 / 16
    bernstein = math.sqrt(2 * variance * math.log(40) / 100) + 7 * math.log(40) / (3 * 99)
    assert lower_bound(x, method="empirical_bernstein") == pytest.approx(0.75 - bernstein)
    hoeffding = math.sqrt(math.log(20) / 200)
    assert lower_bound(x, method="hoeffding") == pytest.approx(0.75 - hoeffding)


# Laws


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]) | st.floats(0, 1), min_size=2, max_size=400)
)
@example([0.0, 2.2250738585072014e-308])
def test_the_bound_is_never_above_the_mean_and_never_rises_with_confidence(values):
    for method in METHODS:
        bounds = [
            lower_bound(values, confidence=c, method=method) for c in (0.05, 0.5, 0.9, 0.99, 0.9999)
        ]
        assert all(0 <= b <= np.mean(values) for b in bounds)
        for looser, tighter in itertools.pairwise(bounds):
            assert tighter <= looser + 0.002 * (np.mean(values) - looser)


@pytest.mark.parametrize("n", [30, 1000, 3000])
def test_capital_never_rises_with_the_mean_bet_on_nor_falls_with_the_start(rng, n):
    for shape, mean in SHAPES:
        x = shape(rng, mean, (n,))
        # most extreme where blocks are largest: all losses first, or all of them last
        for order in (x, np.sort(x), np.sort(x)[::-1]):
            over_means = _capital(order, np.linspace(0.001, 0.999, 400), np.array([0.05]))
            assert (np.diff(over_means) <= 1e-8).all()
            over_starts = _capital(order, np.array([mean * 0.98]), np.linspace(0, 1, 400))
            assert (np.diff(over_starts) >= -1e-8).all()
            assert over_starts[0] == 0
            assert over_starts[-1] == 1


def test_no_bet_is_better_than_fair(rng):
    # all 2**10 outcomes of coins whose mean is the one bet on: the expectation is exact
    mean = 0.7
    outcomes = np.array(list(itertools.product([0.0, 1.0], repeat=10)))
    ends = [_capital(x, np.array([mean]), np.array([0.05]))[0] for x in outcomes]
    chance = np.prod(np.where(outcomes == 1, mean, 1 - mean), axis=1)
    assert np.dot(chance, ends) <= 0.05 + 1e-12
    assert np.dot(chance, np.array(ends) >= 1) > 0.01


def test_the_order_of_the_values_matters_no_more_than_the_seed(rng):
    x = recall_at_10(rng, 0.97, (400,))
    by_seed = [lower_bound(x, seed=seed) for seed in range(20)]
    by_order = [lower_bound(rng.permutation(x)) for _ in range(20)]
    gap = x.mean() - np.mean(by_seed)
    assert np.std(by_seed) < 0.25 * gap
    assert abs(np.mean(by_seed) - np.mean(by_order)) < 0.1 * gap
    assert lower_bound(np.sort(x)) == pytest.approx(np.mean(by_seed), abs=0.5 * gap)
    assert lower_bound(x, seed=3) == by_seed[3]


def test_more_queries_say_more(rng):
    gaps = []
    for n in (50, 200, 800, 3200):
        draws = recall_at_10(rng, 0.97, (20, n))
        gaps.append(np.mean([0.97 - lower_bound(x) for x in draws]))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 5 * gaps[-1]


def test_one_more_perfect_query_does_not_lower_the_bound_on_average(rng):
    before, after = [], []
    for x in recall_at_10(rng, 0.95, (60, 150)):
        before.append(lower_bound(x))
        after.append(lower_bound(np.append(x, 1.0)))
    gap = 0.95 - np.mean(before)
    assert np.mean(after) >= np.mean(before) - 0.03 * gap
    assert (np.array(after) >= np.array(before) - 0.6 * gap).all()


def test_values_too_alike_or_too_small_break_nothing():
    assert lower_bound([0.0] * 50) == 0
    assert lower_bound([1e-300, 0.0, 0.0]) == 0
    assert 0.29 < lower_bound([0.3] * 200) < 0.3
    assert lower_bound(np.append(np.zeros(5000), np.ones(100_000))) > 0.9


# Certificates


def test_testing_stops_at_the_first_plan_that_fails():
    asked = []

    def measured():
        for plan in (1.0, 0.99, 0.9, 1.0):
            asked.append(plan)
            yield np.full(500, plan)

    found = certify(measured(), 0.95)
    assert asked == [1.0, 0.99, 0.9]
    assert (found.n_held, len(found.bounds)) == (2, 3)
    second = np.full(500, 0.99)
    assert found.bounds[1] == Bound(500, second.mean(), lower_bound(second))
    assert found.bounds[2].lower < 0.95 <= found.bounds[1].lower
    assert (found.target, found.confidence) == (0.95, 0.95)


def test_a_certificate_may_hold_none_or_all():
    safe, poor = np.ones(400), np.full(400, 0.5)
    assert certify([poor, safe], 0.99).n_held == 0
    assert certify([safe, safe], 0.99).n_held == 2
    assert certify([safe], 1).n_held == 0  # no number of queries proves a mean of 1
    assert certify([safe], 0.99, method="hoeffding").n_held == 0


@pytest.mark.parametrize(
    ("shape", "mean", "target"),
    [(zeros_and_ones, 0.97, 0.95), (recall_at_10, 0.96, 0.95), (one_neighbour_missed, 0.994, 0.99)],
)
def test_as_many_queries_as_are_said_to_be_needed_do_certify(rng, shape, mean, target):
    variance = float(shape(rng, mean, (200_000,)).var())
    n = n_needed(mean, variance, target)
    assert n is not None
    held = sum(lower_bound(x) >= target for x in shape(rng, mean, (60, n)))
    assert 0.6 <= held / 60 <= 0.97


def test_what_is_needed_is_exact_for_ones_and_nothing_below_the_target():
    assert n_needed(1, 0, 0.99) == 299  # the least n with 0.99**n <= 0.05
    assert n_needed(0.99, 0.005, 0.99) is None
    assert n_needed(0.98, 0.005, 0.99) is None
    assert n_needed(1, 0, 1) is None
    asked = [n_needed(0.97, 0.01, 0.95, power=p) or 0 for p in (0.2, 0.5, 0.8, 0.99)]
    assert 0 < asked[0] < asked[1] < asked[2] < asked[3]


# What is refused


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([0.9, 1.1, 1.0], "value 1 is 1.1, not a number in"),
        ([0.9, -0.1], "value 1 is -0.1"),
        ([1.0, float("nan"), 1.0], r"value 1 is nan, .*\(1 such of 3\)"),
        ([], "0 given; a bound needs at least 2"),
        ([0.5], "1 given; a bound needs at least 2"),
        ([[0.5, 1.0]], "Average over the neighbours"),
        ([[0.5], [0.5, 1.0]], "not one number a query"),
        (["a", "b"], "got dtype <U1"),
        ([None, 1.0], "got dtype object"),
    ],
)
def test_what_is_no_value_in_0_to_1_is_refused(values, says):
    for said in (lower_bound, lambda v: certify([v], 0.5)):
        with pytest.raises(DataError, match=says):
            said(values)


@pytest.mark.parametrize("confidence", [0, 1, 95, -0.1, float("nan")])
def test_a_confidence_outside_0_to_1_is_refused(confidence):
    with pytest.raises(DataError, match=r"Write 0\.95 for 95%"):
        lower_bound([1, 1], confidence=confidence)
    with pytest.raises(DataError, match=r"Write 0\.95 for 95%"):
        n_needed(1, 0, 0.9, power=confidence)


@pytest.mark.parametrize("target", [0, 1.01, 99, float("nan")])
def test_a_target_outside_0_to_1_is_refused_before_any_plan_is_measured(target):
    def measured():
        raise AssertionError("measured")
        yield

    with pytest.raises(DataError, match=r"Write 0\.99 for a mean recall of 99%"):
        certify(measured(), target)


def test_what_else_does_not_fit_is_refused():
    with pytest.raises(DataError, match="no plans given"):
        certify([], 0.9)
    with pytest.raises(DataError, match=r"Pass values\.mean\(\) and values\.var\(\)"):
        n_needed(0.99, 10, 0.95)
    with pytest.raises(DataError, match=r"mean 1\.2 and variance 0 are of no values"):
        n_needed(1.2, 0, 0.95)
