"""Baselines cost the bytes they say, and score what the codes would score."""

import faiss
import numpy as np
import pytest

from nestvec.errors import DataError
from nestvec.measurement import baselines, bm25
from nestvec.measurement.sparse import SparseCoder
from nestvec.search import cascade_search
from nestvec.space import Embeddings, Space


@pytest.fixture
def sides(rng):
    rows = (rng.normal(size=(600, 48)) / np.arange(1, 49) ** 0.7).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows[:500], rows[500:]


def test_product_quantiser_takes_at_most_the_bytes_of_the_int8_prefix(sides):
    found = list(baselines.product_quantisation(*sides, dims=(4, 9, 16, 48)))
    assert [c.bytes_per_vector for c in found] == [4, 8, 16, 48]
    assert [c.macs_each for c in found] == [4, 8, 16, 48]
    errors = [np.square(c.gallery - sides[0]).sum() for c in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * len(sides[0])  # a byte a dimension leaves nothing to gain


def test_decoded_product_quantiser_scores_what_faiss_scores(sides):
    gallery, queries = sides
    (found,) = baselines.product_quantisation(gallery, queries, dims=(8,))
    index = faiss.IndexPQ(48, 8, 8, faiss.METRIC_INNER_PRODUCT)
    index.pq.cp.niter, index.pq.cp.min_points_per_centroid = 10, 1
    index.train(gallery)
    index.add(gallery)
    scores, rows = index.search(queries, 5)
    decoded = np.take_along_axis(queries @ found.gallery.T, rows, axis=1)
    np.testing.assert_allclose(decoded, scores, atol=1e-4)


def test_small_gallery_gets_a_smaller_quantiser(sides):
    (found,) = baselines.product_quantisation(sides[0][:40], sides[1], dims=(8,))
    assert found.bytes_per_vector == 5  # 8 codes of 5 bits


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_cut_is_what_the_search_serves(sides, precision):
    gallery, queries = sides
    way = {"int8": baselines.int8, "binary": baselines.binary}.get(precision, baselines.prefixes)
    (cut,) = way("x", gallery, queries, (16,))
    space = Space.declared("m", dim=48)
    served = cascade_search(
        Embeddings(queries, space), Embeddings(gallery, space), f"16:{precision}@10",
        allow_untrained=True,
    )  # fmt: skip
    scores = np.take_along_axis(cut.queries @ cut.gallery.T, served.rows, axis=1)
    kth = np.sort(cut.queries @ cut.gallery.T, axis=1)[:, ::-1][:, :10]
    np.testing.assert_allclose(scores, kth, atol=1e-6)


def test_bytes_of_cuts(sides):
    gallery, queries = sides
    bytes_of = {
        way.__name__: [c.bytes_per_vector for c in way("x", gallery, queries, (12, 48))]
        for way in (baselines.prefixes, baselines.int8, baselines.binary)
    }
    assert bytes_of == {"prefixes": [48, 192], "int8": [12, 48], "binary": [2, 6]}


def test_rotation_does_not_change_full_size_scores(sides):
    for name in ("random_rotation", "principal_rotation"):
        gallery, queries = baselines.rotated(name, sides[0], sides[1], seed=0)
        np.testing.assert_allclose(queries @ gallery.T, sides[1] @ sides[0].T, atol=1e-5)


def test_sparse_codes_have_k_active_and_length_one(sides):
    codes = SparseCoder(3, steps=5).fit(sides[0]).transform(sides[1])
    assert codes.shape == (100, 4 * 48)
    assert (np.count_nonzero(codes, axis=1) <= 3).all()
    np.testing.assert_allclose(np.linalg.norm(codes, axis=1), 1, atol=2e-3)


def test_sparse_codes_reconstruct_more_with_more_active(sides):
    gallery, queries = sides
    lost = []
    for active in (2, 8, 24):
        coder = SparseCoder(active, steps=60).fit(gallery)
        guess = coder.latents(queries) @ coder.weight_ + coder.bias_
        lost.append(np.square(guess - queries).sum(axis=1).mean())
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 0.25  # of a length of 1


def test_sparse_codes_learn(sides):
    gallery, queries = sides
    lost = []
    for steps in (1, 100):
        coder = SparseCoder(8, steps=steps).fit(gallery)
        guess = coder.latents(queries) @ coder.weight_ + coder.bias_
        lost.append(np.square(guess - queries).sum(axis=1).mean())
    assert lost[1] < 0.8 * lost[0]


def test_sparse_coder_is_the_same_by_seed(sides):
    one, two = (SparseCoder(4, steps=10, seed=1).fit(sides[0]).transform(sides[1]) for _ in "ab")
    np.testing.assert_array_equal(one, two)


def test_bm25_finds_shared_words_and_nothing_else():
    docs = ["the cat sat", "dogs run fast", "a cat and a dog", "stones"]
    rows = bm25.bm25(docs, ["running dog", "xylophone"], 4)
    assert rows[0].tolist() == [1, 2, -1, -1]
    assert rows[1].tolist() == [-1] * 4


def test_bm25_finds_nothing_in_stop_words():
    rows = bm25.bm25(["the of", "and a", ""], ["cat", "the"], 2)
    assert rows.tolist() == [[-1, -1], [-1, -1]]


def test_fusion_sums_reciprocal_ranks():
    one, two = np.array([[3, 1, -1]]), np.array([[1, 0, 2]])
    # row 1: 1/62 + 1/61; row 3: 1/61; row 0: 1/62; row 2: 1/63
    fused = bm25.reciprocal_rank_fusion(one, two, n_docs=5)
    assert fused.tolist() == [[1, 3, 0]]


def test_unknown_baseline_names_those_that_exist():
    with pytest.raises(DataError, match="'pca' is not one of truncation, random_rotation"):
        baselines.chosen(["truncation", "pca"])
