"""Two vectors may be compared if and only if their spaces have one id; here is what the id sees."""

import hashlib
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestvec.errors import DimensionError, SpaceError, SpaceMismatchError
from nestvec.space import Space

# beartype draws at random which items it checks, inside the strategies too
pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")

BASE = Space("abc", 384, document_prompt="d: ", query_prompt="q: ", model="m")
NESTED = replace(BASE, nesting_dims=(64, 128, 384))


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "abd"},
        {"document_prompt": ""},
        {"query_prompt": "q:"},
        {"layer": 0},
        {"dim": 383},
        {"normalisation": "none"},
        {"maps": ("x",)},
    ],
    ids=lambda c: next(iter(c)),
)
def test_what_changes_the_vectors_changes_the_id(change):
    assert replace(BASE, **change).space_id != BASE.space_id
    with pytest.raises(SpaceMismatchError):
        BASE.check_same(replace(BASE, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"revision": "1"},
        {"metric": "dot"},
        {"nesting_dims": (64, 384)},
        {"precision": "int8"},
    ],
    ids=lambda c: next(iter(c)),
)
def test_what_only_travels_beside_does_not_change_the_id(change):
    assert replace(BASE, **change).space_id == BASE.space_id
    BASE.check_same(replace(BASE, **change))


def test_the_id_is_the_hash_of_its_parts_and_stays_so():
    text = (
        '{"dim":384,"fingerprint":"abc","layer":null,"maps":[],"normalisation":"l2",'
        '"prompts":["d: ","q: "]}'
    )
    assert BASE.space_id == hashlib.sha256(text.encode()).hexdigest()[:16] == "e9833d11e85288a8"


def test_prompts_do_not_run_into_each_other():
    a = replace(BASE, document_prompt="ab", query_prompt="c")
    b = replace(BASE, document_prompt="a", query_prompt="bc")
    assert a.space_id != b.space_id


def test_the_order_of_maps_matters():
    assert BASE.mapped("x").mapped("y").space_id != BASE.mapped("y").mapped("x").space_id


def test_a_prefix_has_the_id_of_its_parent_and_its_size():
    assert NESTED.prefix(64).space_id == f"{NESTED.space_id}/64"
    assert NESTED.prefix(384) == NESTED
    assert NESTED.prefix(128).prefix(64) == NESTED.prefix(64)
    assert NESTED.prefix(128).nesting_dims == (64, 128)
    assert NESTED.prefix(64).size == 64


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (NESTED.prefix(64), r"cut the longer with prefix\(64\)"),
        (replace(BASE, fingerprint="b"), "two models"),
        (BASE.mapped("feed"), "apply map feed to m"),
        (BASE.mapped("feed").prefix(64, allow_untrained=True), "apply map feed"),
        (replace(BASE, query_prompt="x"), "prompts differ"),
        (replace(BASE, layer=4), "layers None and 4"),
        (replace(BASE, normalisation="none"), "normalised"),
        (replace(BASE, dim=300), "full dims differ: 384 and 300"),
    ],
)
def test_a_mismatch_names_both_spaces_and_what_would_join_them(other, words):
    with pytest.raises(SpaceMismatchError, match=words) as caught:
        NESTED.check_same(other)
    assert NESTED.label in str(caught.value)
    assert other.label in str(caught.value)


def test_two_different_maps_are_not_joined_by_one():
    with pytest.raises(SpaceMismatchError, match="Different maps"):
        BASE.mapped("a").check_same(BASE.mapped("b"))


@pytest.mark.parametrize("dim", [0, -1, 385])
def test_a_prefix_that_does_not_exist_says_what_would_fit(dim):
    with pytest.raises(DimensionError, match=r"dim 384. Choose from 1 to 384.*\(64, 128, 384\)"):
        NESTED.prefix(dim, allow_untrained=True)


def test_a_prefix_between_nesting_dims_names_its_neighbours():
    with pytest.raises(DimensionError, match="Use dim=64 or dim=128, or pass allow_untrained"):
        NESTED.prefix(96)
    assert NESTED.prefix(96, allow_untrained=True).size == 96


def test_a_space_that_is_not_nested_is_not_cut_in_silence():
    with pytest.raises(DimensionError, match="not known to be nested"):
        BASE.prefix(64)


def test_a_map_is_not_applied_to_a_cut_space():
    with pytest.raises(SpaceError, match="Apply the map first, then cut"):
        NESTED.prefix(64).mapped("x")


@pytest.mark.parametrize(
    "values",
    [
        {"fingerprint": ""},
        {"dim": 0},
        {"metric": "l1"},
        {"normalisation": "l1"},
        {"precision": "int4"},
        {"cut": 385},
        {"nesting_dims": (64, 385)},
    ],
)
def test_a_space_that_cannot_be_is_refused(values):
    with pytest.raises(ValueError, match=r"."):
        replace(BASE, **values)


def test_a_declared_space_is_told_apart_by_name_and_revision():
    one = Space.declared("a", dim=8)
    assert one.space_id == Space.declared("a", dim=8).space_id
    assert one.space_id != Space.declared("b", dim=8).space_id
    assert one.space_id != Space.declared("a", dim=8, revision="2").space_id
    with pytest.raises(SpaceError, match="say which model"):
        Space.declared(" ", dim=8)


def test_a_known_model_brings_its_nesting_dims():
    space = Space.declared("nomic-ai/nomic-embed-text-v1.5", dim=768)
    assert space.nesting_dims == (64, 128, 256, 512, 768)


texts = st.text(max_size=8)
spaces = st.builds(
    Space,
    fingerprint=st.text(min_size=1, max_size=8),
    dim=st.integers(4, 4096),
    document_prompt=texts,
    query_prompt=texts,
    layer=st.none() | st.integers(-2, 40),
    normalisation=st.sampled_from(["l2", "none"]),
    maps=st.lists(texts, max_size=3).map(tuple),
    cut=st.none() | st.integers(1, 4),
    model=texts,
    metric=st.sampled_from(["cosine", "dot"]),
    nesting_dims=st.sets(st.integers(1, 4), max_size=3).map(tuple),
)


@given(spaces)
def test_a_stamp_survives_json(space):
    back = Space.from_dict(json.loads(json.dumps(space.to_dict())))
    assert back == space
    assert back.to_dict() == space.to_dict()


@given(spaces, spaces)
def test_ids_agree_exactly_when_spaces_are_equal(a, b):
    assert (a == b) == (a.space_id == b.space_id)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": 385}, "edited or damaged"),
        ({"query_prompt": "x"}, "edited or damaged"),
        ({"stamp_version": 99}, "version 99"),
        ({"stamp_version": None}, "version None"),
    ],
)
def test_an_edited_stamp_is_refused(change, words):
    with pytest.raises(SpaceError, match=words):
        Space.from_dict(BASE.to_dict() | change)


def test_an_incomplete_stamp_is_refused():
    with pytest.raises(SpaceError, match="incomplete"):
        Space.from_dict({"stamp_version": 1})
