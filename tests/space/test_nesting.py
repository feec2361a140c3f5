"""Sizes a model may be cut to are read, halved, known by name, or taken from its config."""

import json

import pytest

from nestvec.errors import DimensionError, ModelError
from nestvec.space import halving, known_dims, nesting, parse_dims


@pytest.mark.parametrize("dims", ["16,32,64", "64 32, 16", [64, 16, 32, 16]])
def test_sizes_are_read_rising_and_unique(dims):
    assert parse_dims(dims, full=64) == (16, 32, 64)


@pytest.mark.parametrize("dims", ["", "16,x", [], [0, 4], [-1], [65], "1e3", "2.5"])
def test_sizes_that_are_none_are_refused(dims):
    with pytest.raises(DimensionError):
        parse_dims(dims, full=64)


@pytest.mark.parametrize(
    ("full", "sizes"),
    [(768, (16, 32, 64, 128, 256, 512, 768)), (64, (16, 32, 64)), (16, (16,)), (1, (1,))],
)
def test_halving_goes_down_on_powers_of_two(full, sizes):
    assert halving(full) == sizes


def test_every_preset_is_rising():
    for name, dims in nesting.KNOWN_NESTED.items():
        assert dims == parse_dims(dims), name
        assert name == name.lower()


def test_a_model_is_known_with_or_without_its_organisation():
    assert known_dims("openai/text-embedding-3-large") == known_dims("text-embedding-3-large")
    assert known_dims("Qwen/Qwen3-Embedding-0.6B") is not None
    assert known_dims("all-MiniLM-L6-v2") is None


@pytest.mark.parametrize("name", ["config.json", "config_sentence_transformers.json"])
def test_a_config_that_names_sizes_is_read(tmp_path, name):
    (tmp_path / name).write_text(json.dumps({"matryoshka_dimensions": [64, 32]}))
    assert nesting.dims_from_config(tmp_path, full=128) == (32, 64, 128)


def test_a_silent_config_says_nothing(tmp_path):
    assert nesting.dims_from_config(tmp_path, full=128) is None
    (tmp_path / "config.json").write_text("{}")
    assert nesting.dims_from_config(tmp_path, full=128) is None


@pytest.mark.parametrize("text", ["{", '{"matryoshka_dimensions": [256]}'])
def test_a_damaged_config_names_its_file(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        nesting.dims_from_config(tmp_path, full=128)
