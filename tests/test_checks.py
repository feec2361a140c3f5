"""The door lets in what can be compared, converted once, and names the row of what cannot."""

import numpy as np
import pytest

from nestvec import _checks
from nestvec.errors import DataError, DimensionError


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int8, np.int64, np.uint8, ">f4"])
def test_any_number_type_becomes_float32_with_the_same_values(dtype):
    given = np.arange(1, 13).reshape(3, 4).astype(dtype)
    got = _checks.as_matrix(given)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, given.astype(np.float64))


def test_float32_is_not_copied(rng):
    given = rng.normal(size=(5, 3)).astype(np.float32)
    assert np.shares_memory(_checks.as_matrix(given), given)


def test_a_memory_map_stays_mapped(rng, tmp_path):
    np.save(tmp_path / "x.npy", rng.normal(size=(5, 3)).astype(np.float32))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert np.shares_memory(_checks.as_matrix(mapped), mapped)


def test_nested_lists_are_read():
    np.testing.assert_array_equal(_checks.as_matrix([[1, 2], [3, 4]]), [[1, 2], [3, 4]])


def _with(value: float, row: int) -> np.ndarray:
    x = np.ones((70_000, 2))
    x[row, 1] = value
    return x


@pytest.mark.parametrize("row", [0, 65_535, 65_536, 69_999])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_nan_and_inf_are_refused_with_their_row(row, value):
    with pytest.raises(DataError, match=f"row {row} holds NaN or Inf"):
        _checks.as_matrix(_with(value, row))


@pytest.mark.parametrize("row", [0, 65_536])
def test_a_zero_row_is_refused_with_its_number_unless_allowed(row):
    x = _with(0, row)
    x[row] = 0
    with pytest.raises(DataError, match=f"row {row} is all zeros"):
        _checks.as_matrix(x)
    assert not _checks.as_matrix(x, allow_zero_rows=True)[row].any()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "expected a matrix"),
        (np.zeros((0, 4)), "empty"),
        (np.zeros((4, 0)), "empty"),
        ([1.0, 2.0], r"x\[None, :\]"),
        (np.zeros((2, 2, 2)), "expected a matrix"),
        ([[1.0], [1.0, 2.0]], "different lengths"),
        ([["a", "b"]], "expected a matrix of numbers"),
        (np.ones((2, 2), dtype=complex), "expected a matrix of numbers"),
        (np.array([[1, None]], dtype=object), "expected a matrix of numbers"),
    ],
)
def test_what_is_no_matrix_is_refused_in_one_sentence(values, words):
    with pytest.raises(DataError, match=words):
        _checks.as_matrix(values)


def test_the_wrong_dim_says_both_dims():
    with pytest.raises(DimensionError, match="3 dims given where 4 are expected"):
        _checks.as_matrix(np.ones((2, 3)), dim=4)


def test_ids_are_integers_or_strings():
    assert _checks.as_ids([3, 1], 2).dtype == np.int64
    assert _checks.as_ids(np.array([3, 1], dtype=np.uint8), 2).dtype == np.int64
    assert _checks.as_ids(["b", "a"], 2).tolist() == ["b", "a"]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([1, 2, 1], "1 duplicate ids; .* in rows 0 and 2"),
        (["a", "b", "b"], "'b'.* in rows 1 and 2"),
        (["a", "b\ud83d", "c"], "id of row 1, .* holds half of a character"),
        (["a", "b", "c" * 1001], "id of row 2 has 1,001 characters, and 1,000 are the most"),
        (np.array(["a", "c" * 1001, "b"]), "id of row 1 has 1,001"),
        (np.array(["a", "c" * 1001, "b"], dtype=object), "id of row 1 has 1,001"),
        (("a", "b\0", "b"), "id of row 1, 'b.x00', ends in a NUL"),
        ([1, 2], "one id a row"),
        ([1.0, 2.0, 3.0], "integers or strings"),
        (np.array([1, 2, 2**63], dtype=np.uint64), "does not fit int64"),
    ],
)
def test_bad_ids_are_refused_in_one_sentence(ids, words):
    with pytest.raises(DataError, match=words):
        _checks.as_ids(ids, 3)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1.0, 1e30])
def test_rows_of_any_scale_normalise_to_length_one(rng, scale):
    x = (rng.normal(size=(20, 8)) * scale).astype(np.float32)
    lengths = np.linalg.norm(_checks.normalise(x).astype(np.float64), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)


def test_a_row_without_length_cannot_be_normalised():
    with pytest.raises(DataError, match="row 1 is all zeros at 2 dims"):
        _checks.normalise(np.array([[1, 0], [0, 0]], dtype=np.float32))


@pytest.mark.parametrize("row", [0, 65_535, 65_536])
def test_the_first_row_off_unit_length_is_found(row):
    x = np.tile(np.array([1, 0], dtype=np.float32), (65_540, 1))
    assert _checks.row_off_unit(x) is None
    x[row] *= 1.01
    assert _checks.row_off_unit(x) == row
