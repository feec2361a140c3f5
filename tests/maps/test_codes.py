"""Codes say back what they were given, to within half a step."""

import subprocess
import sys

import numpy as np
import pytest

from nestvec.errors import DataError, DimensionError
from nestvec.maps.codes import (
    binary_decode,
    binary_encode,
    int8_decode,
    int8_encode,
    int8_scale,
    quarter_steps,
    quarters,
)


def test_int8_is_within_half_a_step_of_every_number(rng):
    x = rng.normal(size=(200, 13)).astype(np.float32)
    scale = int8_scale(x)
    codes = int8_encode(x, scale)
    assert codes.dtype == np.int8
    assert (np.abs(int8_decode(codes, scale) - x) <= scale / 2 * 1.001).all()


def test_two_bits_more_are_within_an_eighth_of_a_step(rng):
    x = rng.normal(size=(200, 16)).astype(np.float32)
    x[:, 3] = 0
    scale = int8_scale(x)
    codes = int8_encode(x, scale)
    steps = quarter_steps(x, scale)
    found = int8_decode(codes, scale) + (2.0 * quarters(x, codes, scale) - 3) * steps
    assert (np.abs(found - x) <= scale / 8 * 1.001).all()
    np.testing.assert_array_equal(found[:, 3], 0)


def test_int8_uses_the_whole_range_and_is_symmetric(rng):
    x = rng.normal(size=(50, 4)).astype(np.float32)
    scale = int8_scale(x)
    codes = int8_encode(x, scale)
    np.testing.assert_array_equal(np.abs(codes.astype(int)).max(axis=0), 127)
    np.testing.assert_array_equal(int8_encode(-x, scale), -codes)


def test_int8_clips_what_lies_beyond_the_gallery():
    scale = int8_scale([[1.0, 1.0]])
    np.testing.assert_array_equal(int8_encode([[5.0, -5.0]], scale), [[127, -127]])


def test_int8_of_a_dead_dimension_is_zero_not_nan():
    x = np.array([[0.5, 0.0], [-0.5, 0.0]], dtype=np.float32)
    scale = int8_scale(x)
    np.testing.assert_array_equal(int8_encode(x, scale)[:, 1], 0)
    np.testing.assert_allclose(int8_decode(int8_encode(x, scale), scale), x, atol=1e-7)


@pytest.mark.parametrize("dim", [1, 7, 8, 9, 64])
def test_binary_decodes_to_the_signs(rng, dim):
    x = rng.normal(size=(20, dim)).astype(np.float32)
    x[0] = 0
    codes = binary_encode(x)
    assert codes.shape == (20, -(-dim // 8))
    np.testing.assert_array_equal(binary_decode(codes, dim), np.where(x >= 0, 1.0, -1.0))


def test_codes_of_another_size_are_refused(rng):
    x = rng.normal(size=(3, 8)).astype(np.float32)
    with pytest.raises(DimensionError, match="8 dims given where 4 are expected"):
        int8_encode(x, int8_scale(x[:, :4]))
    with pytest.raises(DimensionError, match="do not hold 17 dims"):
        binary_decode(binary_encode(x), 17)
    with pytest.raises(DimensionError, match="do not fit a scale of 4 dims"):
        int8_decode(int8_encode(x, int8_scale(x)), int8_scale(x[:, :4]))
    with pytest.raises(DataError, match="one positive number a dimension"):
        int8_encode(x, np.zeros(8, np.float32))


def test_codes_need_no_extra():
    code = (
        "import sys, nestvec.maps.codes; "
        "sys.exit(bool({'sklearn', 'torch', 'scipy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
