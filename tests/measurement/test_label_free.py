"""Neighbours, RankMe and spectrum follow their definitions and their laws."""

import numpy as np
import oracle
import pytest

from nestvec.measurement import label_free
from nestvec.measurement.nearest import nearest


def unit_rows(rng, n, dim):
    rows = rng.normal(size=(n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_neighbours_are_those_found_by_hand(rng):
    rows = unit_rows(rng, 40, 8)
    found = label_free.neighbours(rows, rows, 5, own=np.arange(40))
    np.testing.assert_array_equal(found, oracle.neighbours_by_hand(rows, 5))


def test_a_row_is_not_its_own_neighbour_even_among_duplicates(rng):
    rows = np.repeat(unit_rows(rng, 4, 8), 6, axis=0)
    found = label_free.neighbours(rows, rows, 3, own=np.arange(24))
    assert not (found == np.arange(24)[:, None]).any()
    np.testing.assert_array_equal(found, oracle.neighbours_by_hand(rows, 3))


def test_recall_is_the_share_of_the_true_neighbours():
    truth, found = np.array([[1, 2, 3, 4], [5, 6, 7, 8]]), np.array([[4, 9, 1, 0], [5, 6, 7, 8]])
    np.testing.assert_allclose(label_free.neighbour_recall(truth, found), [0.5, 1.0])


def test_sparse_rows_are_searched_like_dense_ones(rng):
    gallery = np.where(rng.random((60, 64)) < 0.05, rng.integers(1, 9, (60, 64)), 0)
    gallery = gallery.astype(np.float32)
    by_hand = np.argsort(-(gallery[:9] @ gallery.T), axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(nearest(gallery[:9], gallery, 20), by_hand)


def test_rankme_is_its_definition(rng):
    rows = rng.normal(size=(200, 30)) / np.arange(1, 31)
    got = label_free.rankme(rows.astype(np.float32))
    np.testing.assert_allclose(got, oracle.rankme_by_hand(rows.astype(np.float32)), rtol=1e-5)


@pytest.mark.parametrize("rank", [2, 8, 32])
def test_rankme_of_isotropic_rows_of_rank_r_is_r(rng, rank):
    rows = rng.normal(size=(20_000, rank)) @ np.linalg.qr(rng.normal(size=(64, rank)))[0].T
    np.testing.assert_allclose(label_free.rankme(rows.astype(np.float32)), rank, rtol=0.01)


def test_rankme_of_equal_rows_is_one():
    np.testing.assert_allclose(label_free.rankme(np.ones((50, 16), np.float32)), 1, rtol=1e-3)


def test_rankme_does_not_see_scale(rng):
    rows = rng.normal(size=(100, 16)).astype(np.float32)
    np.testing.assert_allclose(label_free.rankme(8 * rows), label_free.rankme(rows), rtol=1e-6)


def test_rankme_interval_is_as_wide_as_fresh_samples_differ(rng):
    scale = 1 / np.arange(1, 17)
    fresh = [
        label_free.rankme((rng.normal(size=(300, 16)) * scale).astype(np.float32))
        for _ in range(60)
    ]
    rows = (rng.normal(size=(300, 16)) * scale).astype(np.float32)
    _, low, high = label_free.jackknife(label_free.rankme_left_out(rows, seed=0))
    assert 0.5 < (high - low) / (2 * 2.093 * np.std(fresh)) < 2


def test_spectrum_is_the_squared_singular_values(rng):
    rows = rng.normal(size=(90, 12)).astype(np.float32)
    shares = np.linalg.svd(rows.astype(np.float64), compute_uv=False) ** 2
    np.testing.assert_allclose(label_free.spectrum(rows), shares / shares.sum(), rtol=1e-6)
