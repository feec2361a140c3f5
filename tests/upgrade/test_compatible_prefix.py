"""The prefix of a compatible model's vectors is a vector of the old Space, and of no other."""

import numpy as np
import pytest

import nestvec as nv
from nestvec.errors import SpaceMismatchError
from nestvec.upgrade import compatible_prefix

OLDEST = nv.Space.declared("oldest", dim=3)
OLD = nv.Space.declared("old", dim=5, nesting_dims=(2, 5), compatible_with=OLDEST.to_dict())
NEW = nv.Space.declared("new", dim=8, nesting_dims=(2, 5, 6, 8), compatible_with=OLD.to_dict())


@pytest.fixture
def vectors(rng):
    rows = rng.normal(size=(6, 8))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return nv.Embeddings(rows, NEW, [f"q{i}" for i in range(6)])


@pytest.mark.parametrize("old", [None, OLD, OLDEST], ids=["direct", "named", "two steps back"])
def test_it_is_cut_normalised_and_stamped(vectors, old):
    found = compatible_prefix(vectors, old)
    want = vectors.array[:, : found.dim]
    want = want / np.linalg.norm(want, axis=1, keepdims=True)
    np.testing.assert_allclose(found.array, want, rtol=1e-6)
    assert found.space.space_id == (old or OLD).space_id
    assert found.ids.tolist() == vectors.ids.tolist()


def test_it_searches_the_old_gallery_which_refuses_the_new_vectors(vectors, rng):
    gallery = nv.Embeddings(compatible_prefix(vectors).array[::-1], OLD)
    found = nv.cascade_search(compatible_prefix(vectors), gallery, "2@6 > 5@1")
    assert found.rows[:, 0].tolist() == [5, 4, 3, 2, 1, 0]
    with pytest.raises(SpaceMismatchError, match=r"nestvec\.upgrade\.compatible_prefix"):
        nv.cascade_search(vectors, gallery, "5@1")


def test_what_was_not_trained_to_hold_it_is_refused(vectors):
    with pytest.raises(SpaceMismatchError, match=r"to hold old .*, and other \(5 dims"):
        compatible_prefix(vectors, nv.Space.declared("other", dim=5))
    with pytest.raises(SpaceMismatchError, match=r"to hold no other in its prefix\. Train"):
        compatible_prefix(nv.Embeddings(vectors.array, nv.Space.declared("plain", dim=8)))


def test_a_cut_keeps_the_claim_while_the_old_size_fits(vectors):
    assert compatible_prefix(vectors.prefix(6)).space.space_id == OLD.space_id
    with pytest.raises(SpaceMismatchError, match=r"to hold no other"):
        compatible_prefix(vectors.prefix(2))


def test_a_map_loses_the_claim(vectors):
    turned = nv.RandomRotation(dims=(5, 8), random_state=0).fit(vectors).transform(vectors)
    with pytest.raises(SpaceMismatchError, match=r"to hold no other"):
        compatible_prefix(turned)


def test_the_claim_travels_with_the_file(vectors, tmp_path):
    again = nv.load(vectors.save(tmp_path / "x.npz"))
    assert compatible_prefix(again, OLDEST).space.space_id == OLDEST.space_id


def test_the_claim_is_not_what_makes_a_space(vectors):
    assert NEW.space_id == nv.Space.declared("new", dim=8).space_id
