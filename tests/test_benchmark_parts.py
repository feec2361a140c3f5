"""The parts the training benchmarks share: scoring, corruptions and the slimmable baseline."""

from __future__ import annotations

import _classify
import numpy as np
import pytest


def clusters(rng, n: int, *, n_classes: int = 4, dim: int = 12, noise: float = 0.3):
    centres = np.random.default_rng(7).normal(size=(n_classes, dim))
    labels = np.arange(n) % n_classes
    rows = centres[labels] + noise * rng.normal(size=(n, dim))
    return rows.astype(np.float32), labels


def nearest_by_hand(train, labels, test, dim, *, skip_own=False):
    found = []
    for at, row in enumerate(test):
        cosines = [
            -np.inf
            if skip_own and at == other
            else row[:dim] @ t[:dim] / np.linalg.norm(row[:dim]) / np.linalg.norm(t[:dim])
            for other, t in enumerate(train)
        ]
        found.append(labels[int(np.argmax(cosines))])
    return np.array(found)


def test_1nn_is_that_of_its_definition(rng):
    train, labels = clusters(rng, 40, noise=2)
    test, truth = clusters(rng, 30, noise=2)
    got = _classify.score(train, labels, test, truth, 5, kinds=["1nn"])
    expected = nearest_by_hand(train, labels, test, 5) == truth
    np.testing.assert_array_equal(got["1nn"], expected)
    assert 0 < expected.mean() < 1


def test_leave_one_out_never_finds_the_row_itself(rng):
    rows, labels = clusters(rng, 40, noise=2)
    rows[1] = rows[0]  # duplicates of different classes find each other
    expected = nearest_by_hand(rows, labels, rows, 5, skip_own=True) == labels
    np.testing.assert_array_equal(_classify.leave_one_out_1nn(rows, labels, 5), expected)
    assert not _classify.leave_one_out_1nn(rows, labels, 5)[:2].any()


def test_what_follows_the_prefix_and_the_length_of_a_row_count_for_nothing(rng):
    (train, labels), (test, truth) = clusters(rng, 80, noise=1), clusters(rng, 30, noise=1)
    got = _classify.score(train, labels, test, truth, 6)
    train, test = 4 * train, test / 4
    train[:, 6:], test[:, 6:] = 9, -9
    again = _classify.score(train, labels, test, truth, 6)
    for kind in _classify.KINDS:
        np.testing.assert_array_equal(got[kind], again[kind])
        assert got[kind].dtype == bool


def test_linear_head_learns_what_can_be_separated_and_guesses_otherwise(rng):
    (train, labels), (test, truth) = clusters(rng, 80), clusters(rng, 40)
    assert _classify.score(train, labels, test, truth, 12)["linear_head"].all()
    shuffled = rng.permutation(labels)
    assert _classify.score(train, shuffled, test, truth, 12)["linear_head"].mean() < 0.6


def test_row_of_zeros_is_counted_and_does_not_stop_the_run(rng):
    (train, labels), (test, truth) = clusters(rng, 40), clusters(rng, 20)
    train[3, :8] = test[5, :8] = 0
    got = _classify.score(train, labels, test, truth, 8)
    assert got["1nn"][5] == (labels[0] == truth[5])  # equally far from all: the lowest row


def test_csr_codes_tell_clusters_apart_with_two_active(rng):
    (train, labels), (test, truth) = clusters(rng, 200, noise=0.2), clusters(rng, 40, noise=0.2)
    got = _classify.csr_correct(train, labels, test, truth, 2)
    assert set(got) == set(_classify.KINDS)
    assert got["1nn"].mean() > 0.9
    assert got["linear_head"].mean() > 0.9


def test_sparse_and_dense_linear_head_agree(rng, monkeypatch):
    labels = np.arange(60) % 3
    codes = np.zeros((60, 40), np.float32)
    codes[np.arange(60), labels] = 1
    codes[np.arange(60), rng.integers(3, 40, 60)] = 1
    sparse = _classify.linear_head(codes, labels, codes)
    monkeypatch.setattr(_classify, "csr_array", np.asarray)
    np.testing.assert_array_equal(sparse, _classify.linear_head(codes, labels, codes))


def test_principal_rotation_keeps_cosines_and_packs_them_into_the_prefix(rng):
    train, test = (clusters(rng, n, dim=12)[0] for n in (60, 20))
    turned = _classify.rotations(train, test)["principal_rotation"]
    before, after = (
        _classify.unit_prefix(a, 12) @ _classify.unit_prefix(b, 12).T
        for a, b in ((test, train), turned[::-1])
    )
    np.testing.assert_allclose(after, before, atol=1e-5)
    assert np.square(turned[1][:, :4]).sum() > 0.9 * np.square(turned[1]).sum()


def test_random_features_are_the_same_columns_in_an_order_by_seed(rng):
    train, test = (clusters(rng, n)[0] for n in (60, 20))
    ours = _classify.rotations(train, test, seed=1)["random_features"]
    columns = [int(np.flatnonzero((train == c[:, None]).all(axis=0))[0]) for c in ours[0].T]
    assert sorted(columns) == list(range(12))
    np.testing.assert_array_equal(ours[1], test[:, columns])
    again = _classify.rotations(train, test, seed=1)["random_features"]
    other = _classify.rotations(train, test, seed=2)["random_features"]
    np.testing.assert_array_equal(again[0], ours[0])
    assert (other[0] != ours[0]).any()


def test_paired_difference_is_in_points_and_of_the_mean_over_seeds():
    a = [np.array([1, 1, 1, 0], bool), np.array([1, 1, 0, 0], bool)]
    b = [np.array([1, 0, 0, 0], bool)]
    value, low, high = _classify.paired(a, b)
    assert value == pytest.approx(100 * (0.625 - 0.25))
    assert low <= value <= high


def test_rows_that_both_get_alike_leave_no_doubt(rng):
    a = rng.random((3, 500)) < 0.7
    value, low, high = _classify.paired(list(a), list(a[::-1]))
    assert max(abs(value), abs(low), abs(high)) < 1e-9


def test_interval_of_the_difference_has_the_width_theory_gives(rng):
    a, b = rng.random(2000) < 0.8, rng.random(2000) < 0.7
    value, low, high = _classify.paired([a], [b])
    wide = 2 * 1.96 * 100 * np.std(a.astype(float) - b) / np.sqrt(2000)
    assert high - low == pytest.approx(wide, rel=0.1)
    assert value == pytest.approx((low + high) / 2, abs=0.3)
