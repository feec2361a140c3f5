"""Embeddings are cut and then re-normalised, keep their ids, and refuse what cannot be compared."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nestvec.errors import DataError, DimensionError, SpaceError
from nestvec.space import Embeddings, Space

FREE = Space.declared("m", dim=32, nesting_dims=(4, 8, 16, 32), normalisation="none")


@pytest.fixture
def vectors(rng):
    return Embeddings(rng.normal(size=(20, 32)), FREE, [f"doc-{i}" for i in range(20)])


@pytest.mark.parametrize("dim", [4, 8, 16])
def test_a_prefix_is_cut_and_then_normalised_row_by_row(vectors, dim):
    got = vectors.prefix(dim)
    for row, full in zip(got.array, vectors.array, strict=True):
        cut = [float(x) for x in full[:dim]]
        length = sum(x * x for x in cut) ** 0.5
        np.testing.assert_allclose(row, [x / length for x in cut], rtol=1e-6)
    assert got.ids.tolist() == vectors.ids.tolist()
    assert got.space.space_id == f"{FREE.space_id}/{dim}"


@given(
    arrays(np.float32, (5, 32), elements=st.floats(0.125, 1024, width=32)),
    st.floats(2**-60, 2**60),
)
def test_a_prefix_of_a_prefix_is_the_prefix_and_no_scale_matters(x, scale):
    vectors = Embeddings(x, FREE)
    want = vectors.prefix(8).array
    np.testing.assert_allclose(vectors.prefix(16).prefix(8).array, want, atol=1e-6)
    scaled = Embeddings((x * np.float64(scale)).astype(np.float32), FREE)
    np.testing.assert_allclose(scaled.prefix(8).array, want, atol=1e-6)


def test_the_full_size_is_not_touched(vectors):
    assert vectors.prefix(32) is vectors


def test_a_prefix_without_direction_names_its_row():
    x = np.ones((3, 32))
    x[1, :8] = 0
    with pytest.raises(DataError, match="row 1 is all zeros at 8 dims"):
        Embeddings(x, FREE).prefix(8)


def test_lengths_that_mean_something_are_not_lost_in_silence(rng):
    dot = Space.declared("m", dim=32, nesting_dims=(8, 32), metric="dot", normalisation="none")
    vectors = Embeddings(rng.normal(size=(3, 32)), dot)
    with pytest.raises(SpaceError, match="would lose their lengths"):
        vectors.prefix(8)
    assert vectors.normalised().prefix(8).dim == 8


def test_normalised_rows_are_another_space(vectors):
    unit = vectors.normalised()
    np.testing.assert_allclose(np.linalg.norm(unit.array, axis=1), 1, atol=1e-6)
    assert unit.space.space_id != FREE.space_id
    assert unit.normalised() is unit


@pytest.mark.parametrize(
    "rows", [slice(2, 9, 3), [5, 1], np.array([5, 1]), 3, -1, np.arange(20) % 2 == 0]
)
def test_rows_are_taken_with_their_ids(vectors, rows):
    taken = vectors[rows]
    np.testing.assert_array_equal(taken.array, np.atleast_2d(vectors.array[rows]))
    assert taken.ids.tolist() == np.atleast_1d(vectors.ids[rows]).tolist()


def test_row_numbers_stay_row_numbers_whatever_becomes_of_the_rows(vectors):
    bare = Embeddings(vectors.array, FREE)
    for some in (bare, bare[5:], bare[3], bare.normalised(), bare.normalised().prefix(4)):
        assert not some.has_ids
    for some in (vectors, vectors[5:], vectors.normalised()):
        assert some.has_ids
    assert bare[5:].ids.tolist() == list(range(5, 20))


def test_iterating_ends_at_the_last_row(vectors):
    assert [one.ids[0] for one in vectors] == vectors.ids.tolist()


def test_rows_of_finds_every_id_in_any_order(vectors, rng):
    rows = rng.permutation(20)
    np.testing.assert_array_equal(vectors.rows_of(vectors.ids[rows]), rows)
    numbered = Embeddings(vectors.array, FREE, rows * 7)
    np.testing.assert_array_equal(numbered.rows_of([7, 0]), [list(rows).index(i) for i in (1, 0)])


def test_rows_of_refuses_an_unknown_id(vectors):
    with pytest.raises(DataError, match="unknown id 'zzz'"):
        vectors.rows_of(["doc-1", "zzz"])
    with pytest.raises(DataError, match="unknown id 99"):
        Embeddings(vectors.array, FREE).rows_of([99])


@pytest.mark.parametrize("ids", [[1.5], ["1"], ["one"]])
def test_rows_of_refuses_ids_of_another_type(vectors, ids):
    with pytest.raises(DataError, match="ids here are integers"):
        Embeddings(vectors.array, FREE).rows_of(ids)


def test_batches_are_all_rows_in_order(vectors):
    np.testing.assert_array_equal(np.concatenate(list(vectors.batches(7))), vectors.array)


def test_vectors_of_another_size_are_not_of_this_space(rng):
    with pytest.raises(DimensionError, match=r"16 dims given for m .32 dims"):
        Embeddings(rng.normal(size=(3, 16)), FREE)


def test_rows_that_are_not_unit_are_not_of_a_unit_space(rng):
    unit = Space.declared("m", dim=32)
    x = Embeddings(rng.normal(size=(5, 32)), FREE).normalised().array.copy()
    Embeddings(x.astype(np.float16), unit)  # the rounding of float16 is forgiven
    x[3] *= 2
    with pytest.raises(DataError, match="row 3 has length 2"):
        Embeddings(x, unit)


def test_one_row_is_enough(rng):
    assert len(Embeddings(rng.normal(size=(1, 32)), FREE).prefix(4)) == 1
