"""Codes, graph and lists find what an exact search finds, or say how near they come."""

import itertools

import faiss
import numpy as np
import pytest

from nestvec._checks import normalise
from nestvec.search.exact import top_k
from nestvec.search.structures import codes as c
from nestvec.search.structures import graph as g
from nestvec.search.structures import lists as li

ALL = np.empty(0, np.bool_)


@pytest.fixture(scope="module")
def gallery():
    """3,000 rows in 40 clusters, 48 dims whose spread falls, as embeddings' does."""
    rng = np.random.default_rng(0)
    spread = np.arange(1, 49) ** -0.5
    centres = rng.normal(size=(40, 48)) * spread
    rows = centres[rng.integers(40, size=3050)] + 1.5 * rng.normal(size=(3050, 48)) * spread
    return normalise(rows.astype(np.float32))


@pytest.fixture(scope="module")
def vectors(gallery):
    return gallery[50:]


@pytest.fixture(scope="module")
def queries(gallery):
    return gallery[:50]


def made(vectors, dim):
    scale = c.scale_of(vectors, dim)
    values = np.empty((len(vectors), c.padded(dim)), np.uint8)
    c.encode(vectors, scale, values)
    return c.Codes(values, scale)


def between(vectors):
    return lambda start, end: np.ascontiguousarray(vectors[start:end])


def recall(found, wanted):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, wanted, strict=True)])


@pytest.mark.parametrize("dim", [8, 32, 33, 48])
def test_products_of_codes_are_cosines_up_to_rounding(vectors, queries, dim):
    some = made(vectors, dim)
    products = some.queries(queries).astype(int) @ (some.values.astype(int) - 128).T
    cosines = normalise(queries[:, :dim]) @ normalise(vectors[:, :dim]).T
    for product, cosine in zip(products, cosines, strict=True):  # a step of each query's own
        step = product @ cosine / (product @ product)
        assert np.abs(step * product - cosine).max() < 0.03


def test_codes_are_the_nearest_steps(vectors):
    some = made(vectors, 16)
    back = (some.values[:, :16].astype(np.float32) - 128) * some.scale
    off = np.abs(back - normalise(vectors[:, :16]))
    assert (off <= 0.5001 * some.scale).all()
    assert (some.values[:, 16:] == 128).all()


def test_a_dimension_that_is_always_zero_is_no_trouble(vectors, queries):
    flat = vectors.copy()
    flat[:, 5] = 0
    some = made(flat, 16)
    assert (some.values[:, 5] == 128).all()
    assert np.isfinite(some.queries(queries)).all()


def test_a_value_beyond_the_sample_is_clipped_and_does_not_wrap():
    values = np.empty((2, 32), np.uint8)
    c.encode(np.array([[1, 0.5], [-1, 0.5]], np.float32), np.full(2, 0.001, np.float32), values)
    np.testing.assert_array_equal(values[:, :2], [[255, 255], [1, 255]])


def test_the_graph_holds_the_links_that_faiss_made(vectors):
    arrays = g.build(between(vectors), len(vectors))
    index = faiss.IndexHNSWFlat(48, 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = g.EF_CONSTRUCTION
    faiss.omp_set_num_threads(1)
    index.add(np.ascontiguousarray(vectors))
    assert arrays["links"].shape == (len(vectors), 64)
    assert (arrays["links"] >= -1).all()
    assert (arrays["links"] < len(vectors)).all()
    own = np.arange(len(vectors))[:, None]
    assert not (arrays["links"] == own).any()
    starts = arrays["level_starts"]
    heights = faiss.vector_to_array(index.hnsw.levels)
    for level, (start, end) in enumerate(itertools.pairwise(starts), start=1):
        np.testing.assert_array_equal(
            np.sort(arrays["upper_rows"][start:end]), np.flatnonzero(heights > level)
        )
        rows = arrays["upper_rows"][start:end]
        below = arrays["down"][start:end]
        if level > 1:
            below = arrays["upper_rows"][starts[level - 2] + below]
        np.testing.assert_array_equal(below, rows)


def test_a_wide_walk_over_full_codes_finds_the_neighbours(vectors, queries):
    graph, codes = g.Graph(g.build(between(vectors), len(vectors))), made(vectors, 48)
    wanted, _ = top_k(queries, vectors, 10)
    rows = graph.search(codes, codes.queries(queries), 100)
    assert recall([set(r) for r in rows], wanted) > 0.99
    narrow = graph.search(codes, codes.queries(queries), 10)
    assert 0.5 < recall(narrow, wanted) < recall([set(r) for r in rows], wanted)


def test_the_walk_does_what_faiss_does_at_the_same_width(vectors, queries):
    graph, codes = g.Graph(g.build(between(vectors), len(vectors))), made(vectors, 48)
    index = faiss.IndexHNSWFlat(48, 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = g.EF_CONSTRUCTION
    index.add(np.ascontiguousarray(vectors))
    index.hnsw.efSearch = 30
    wanted, _ = top_k(queries, vectors, 10)
    ours = graph.search(codes, codes.queries(queries), 30)
    theirs = index.search(np.ascontiguousarray(queries), 30)[1]
    ours_found, theirs_found = (recall([set(r) for r in rows], wanted) for rows in (ours, theirs))
    assert abs(ours_found - theirs_found) < 0.03


@pytest.mark.parametrize("n", [1, 2, 30])
def test_a_handful_of_rows_makes_a_graph(vectors, queries, n):
    graph, codes = g.Graph(g.build(between(vectors), n)), made(vectors[:n], 48)
    rows = graph.search(codes, codes.queries(queries), 40)
    assert all(set(r) - {-1} == set(range(n)) for r in rows)


def listed(vectors, folder, n_lists, dim):
    """Lists and their codes."""
    arrays = li.build(between(vectors), len(vectors), folder, n_lists=n_lists)
    codes = made(vectors, dim)
    return li.Lists(arrays), c.Codes(codes.values[arrays["numbers"]], codes.scale), arrays


def test_all_lists_probed_are_a_scan_of_the_codes(vectors, queries, tmp_path):
    lists, sorted_codes, _ = listed(vectors, tmp_path, 16, 32)
    rows = lists.search(sorted_codes, queries, 20, 16, ALL)
    codes = made(vectors, 32)
    products = codes.queries(queries).astype(int) @ (codes.values.astype(int) - 128).T
    for found, line in zip(rows, products, strict=True):
        np.testing.assert_array_equal(found, np.lexsort((np.arange(3000), -line))[:20])


def test_each_row_is_in_the_list_of_its_nearest_centroid(vectors, tmp_path):
    _, _, arrays = listed(vectors, tmp_path, 16, 32)
    means = arrays["centroids"]
    np.testing.assert_allclose(np.linalg.norm(means, axis=1), 1, atol=1e-5)
    nearest = (vectors @ means.T).argmax(axis=1)
    for number, (start, end) in enumerate(itertools.pairwise(arrays["starts"])):
        np.testing.assert_array_equal(
            arrays["numbers"][start:end], np.flatnonzero(nearest == number)
        )


def test_of_many_lists_nearly_every_row_is_in_that_of_its_nearest_centroid(vectors, tmp_path):
    """Not all centroids are compared at full size, but those that a prefix finds."""
    _, _, arrays = listed(vectors, tmp_path, 200, 32)
    lists = np.empty(len(vectors), int)
    lists[arrays["numbers"]] = np.repeat(np.arange(200), np.diff(arrays["starts"]))
    nearest = (vectors @ arrays["centroids"].T).argmax(axis=1)
    assert (lists == nearest).mean() > 0.98


def test_a_centroid_is_the_mean_of_its_rows_and_one_without_rows_is_a_row(vectors):
    lists = np.array([0, 2, 0, 2, 2])
    means = li._means(vectors[:5], lists, 4, seed=0)
    for number in (0, 2):
        mean = vectors[:5][lists == number].mean(axis=0)
        np.testing.assert_allclose(means[number], mean / np.linalg.norm(mean), atol=1e-6)
    for number in (1, 3):
        assert np.isclose(vectors[:5] @ means[number], 1).any()


def test_more_probes_find_more(vectors, queries, tmp_path):
    lists, codes, _ = listed(vectors, tmp_path, 64, 48)
    wanted, _ = top_k(queries, vectors, 10)
    found = [
        recall([set(r) for r in lists.search(codes, queries, 30, probes, ALL)], wanted)
        for probes in (1, 4, 64, 1000)
    ]
    assert found[0] < found[1] < found[2] == found[3]
    assert found[2] > 0.99


def test_an_interrupted_build_of_lists_goes_on_where_it_was(vectors, tmp_path, monkeypatch):
    monkeypatch.setattr(li, "_ROWS_AT_ONCE", 500)
    whole = li.build(between(vectors), len(vectors), tmp_path / "whole", n_lists=16)
    asked = []

    sampled = li._SAMPLE_PER_LIST * 16 // li._STRETCH

    def counted(start, end):
        if len(asked) == sampled + 3:  # the sample, then three stretches of rows
            raise KeyboardInterrupt
        asked.append((start, end))
        return np.ascontiguousarray(vectors[start:end])

    with pytest.raises(KeyboardInterrupt):
        li.build(counted, len(vectors), tmp_path / "part", n_lists=16)
    del asked[:]
    again = li.build(counted, len(vectors), tmp_path / "part", n_lists=16)
    assert asked == [(1500, 2000), (2000, 2500), (2500, 3000)]
    for name, array in whole.items():
        np.testing.assert_array_equal(again[name], array)


def test_usual_numbers_of_lists_are_those_of_the_benchmarks():
    assert [li.usual_n_lists(n) for n in (1, 50_000, 1_000_000)] == [4, 512, 4096]
