"""Intervals are those of a bootstrap written out by hand, and cover what they should."""

import numpy as np
import oracle
import scipy.stats

from nestvec.measurement.bootstrap import mean, resample, spearman


def test_interval_of_a_mean_is_scipys(rng):
    values = rng.beta(0.4, 0.8, size=(1, 300))
    low, high = resample(values, n_resamples=20_000, seed=1).interval()
    scipys = scipy.stats.bootstrap(
        (values[0],), np.mean, n_resamples=20_000, method="percentile", rng=2
    ).confidence_interval
    np.testing.assert_allclose([low[0], high[0]], [scipys.low, scipys.high], atol=2e-3)


def test_spearman_is_scipys_with_ties(rng):
    gold, values = rng.integers(0, 6, 80), rng.normal(size=(3, 80)).round(1)
    got = spearman(gold)(np.ones((1, 80)), values)[0]
    for row in range(3):
        np.testing.assert_allclose(got[row], oracle.spearman(gold, values[row]))


def test_spearman_of_counts_is_that_of_the_repeated_pairs(rng):
    gold, values = rng.integers(0, 6, 50), rng.normal(size=(1, 50)).round(1)
    counts = rng.multinomial(50, np.full(50, 1 / 50), size=4).astype(np.float64)
    got = spearman(gold)(counts, values)
    for draw, times in enumerate(counts.astype(int)):
        by_hand = oracle.spearman(np.repeat(gold, times), np.repeat(values[0], times))
        np.testing.assert_allclose(got[draw, 0], by_hand)


def test_constant_scores_order_nothing():
    assert spearman([1, 2, 3])(np.ones((1, 3)), np.ones((1, 3)))[0, 0] == 0


def test_interval_covers_the_truth_as_often_as_it_says(rng):
    inside = 0
    for trial in range(300):
        values = rng.exponential(size=(1, 100))
        low, high = resample(values, n_resamples=500, seed=trial).interval()
        inside += low[0] <= 1 <= high[0]
    assert 0.89 <= inside / 300 <= 0.98  # 95% by name; a percentile interval of 100 skewed items


def test_difference_is_paired(rng):
    hard = rng.normal(size=400)  # what makes a query hard is shared by both methods
    values = np.stack([hard, hard + 0.01])
    estimate = resample(values, n_resamples=500)
    low, high = estimate.interval()
    value, diff_low, diff_high = estimate.difference(to=0)
    assert (high - low)[1] > 0.1
    np.testing.assert_allclose([value[1], diff_low[1], diff_high[1]], 0.01, atol=1e-12)


def test_same_seed_draws_the_same_items_for_every_metric(rng):
    values = rng.normal(size=(2, 60))
    both = resample(values, mean, n_resamples=50, seed=3).draws
    one = resample(values[1:], mean, n_resamples=50, seed=3).draws
    np.testing.assert_allclose(both[:, 1], one[:, 0])


def test_resamples_in_blocks_are_the_same_resamples(rng, monkeypatch):
    values = rng.normal(size=(2, 60))
    whole = resample(values, n_resamples=50)
    monkeypatch.setattr("nestvec.measurement.bootstrap._CELLS", 7 * 60)
    np.testing.assert_allclose(resample(values, n_resamples=50).draws, whole.draws)
