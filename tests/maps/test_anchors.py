"""Anchors: encoders that differ by a turn meet exactly; prefixes rest on anchors spread out."""

import numpy as np
import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from nestvec.errors import DataError, FileFormatError, SpaceMismatchError
from nestvec.maps import AnchorMap, anchor_maps, load_map
from nestvec.maps.anchors import farthest_first
from nestvec.maps.guard import unit
from nestvec.search.exact import top_k
from nestvec.space import Embeddings, Space

pytestmark = pytest.mark.usefixtures("one_blas_thread")
OLD, NEW = Space.declared("old", dim=12), Space.declared("new", dim=16)


@parametrize_with_checks([AnchorMap(n_anchors=8)])
def test_scikit_learn_accepts(estimator, check):
    check(estimator)


def rows(rng, n=200, dim=12):
    return unit((rng.normal(size=(n, dim)) * np.linspace(2, 0.5, dim) + 0.5).astype(np.float32))


@pytest.mark.parametrize("whiten", [True, False])
def test_turning_and_scaling_one_side_changes_nothing(whiten, rng):
    old = rows(rng)
    turned = 7 * old @ np.linalg.qr(rng.normal(size=(12, 12)))[0]
    to_old, to_new = anchor_maps(old, turned, n_anchors=32, whiten=whiten)
    np.testing.assert_allclose(to_old.transform(old), to_new.transform(turned), atol=1e-5)


def test_coordinates_are_cosines_with_the_anchors(rng):
    old = rows(rng)
    one = AnchorMap(n_anchors=10, whiten=False).fit(old)
    np.testing.assert_allclose(one.transform(old), old @ old[one.chosen_].T, atol=1e-5)


def test_whitening_is_the_inverse_root_of_the_covariance_with_a_floor(rng):
    old = rows(rng).astype(np.float64)
    one = AnchorMap(n_anchors=10).fit(old)
    covariance = np.cov(old.T, bias=True)
    floor = np.trace(covariance) / 12
    matrix = one._arrays_["whitening"].astype(np.float64)
    np.testing.assert_allclose(
        matrix @ (covariance / floor + np.eye(12)) @ matrix, np.eye(12), atol=1e-4
    )


def test_each_anchor_is_the_farthest_from_all_before_it(rng):
    old = rows(rng, n=60)
    chosen = farthest_first(old, 12)
    assert chosen[0] == np.argmax(old @ old.mean(axis=0))
    for at in range(1, 12):
        nearest = (old @ old[chosen[:at]].T).max(axis=1)
        nearest[chosen[:at]] = np.inf
        assert chosen[at] == np.argmin(nearest)
    assert len(set(farthest_first(np.ones((5, 3), np.float32), 5))) == 5


def test_prefix_is_what_fewer_anchors_give(rng):
    old = rows(rng)
    many, few = (AnchorMap(n_anchors=k).fit(old) for k in (32, 8))
    np.testing.assert_allclose(many.transform(old)[:, :8], few.transform(old), atol=1e-5)


def test_unlike_encoders_of_one_thing_meet(rng):
    thing = rng.normal(size=(500, 8))
    old = Embeddings(unit((thing @ rng.normal(size=(8, 12))).astype("f4")), OLD)
    new = Embeddings(unit((thing @ rng.normal(size=(8, 16))).astype("f4")), NEW)
    to_old, to_new = anchor_maps(old[:300], new[:300], n_anchors=128)
    gallery, asks = to_old.transform(old[300:]), to_new.transform(new[300:])
    gallery.space.check_same(asks.space)
    assert gallery.space.nesting_dims == (16, 32, 64, 128)
    found = top_k(asks.array, gallery.array, 1)[0][:, 0]
    assert (found == np.arange(200)).mean() > 0.5  # chance is 0.005


def test_other_anchors_are_another_space(rng):
    old, new = Embeddings(rows(rng), OLD), Embeddings(rows(rng, dim=16), NEW)
    one, _ = anchor_maps(old, new, n_anchors=16)
    _, other = anchor_maps(old, new, n_anchors=8)
    with pytest.raises(SpaceMismatchError):
        one.transform(old).space.check_same(other.transform(new).space)


def test_sides_are_paired_by_id_and_survive_a_file(rng, tmp_path):
    ids = np.arange(200)
    old, new = Embeddings(rows(rng), OLD, ids), Embeddings(rows(rng, dim=16), NEW, ids)
    shuffled = new[rng.permutation(200)]
    for one, other in zip(anchor_maps(old, new), anchor_maps(old, shuffled), strict=True):
        assert one.content_hash == other.content_hash
        one.save(tmp_path / "map")
        again = load_map(tmp_path / "map")
        assert isinstance(again, AnchorMap)
        side = old if one.n_features_in_ == 12 else new
        found, wanted = again.transform(side), one.transform(side)
        np.testing.assert_array_equal(found.array, wanted.array)
        assert found.space == wanted.space


def test_sides_that_do_not_pair_up_are_refused(rng):
    old = rows(rng)
    with pytest.raises(DataError, match=r"sides of \[200, 100\] rows do not pair up"):
        anchor_maps(old, old[:100])
    with pytest.raises(DataError, match="1 side given"):
        anchor_maps(old)
    with pytest.raises(DataError, match="share no id"):
        anchor_maps(*(Embeddings(old, OLD, [f"{s}{i}" for i in range(200)]) for s in "ab"))
    with pytest.raises(DataError, match="n_anchors=0"):
        AnchorMap(n_anchors=0).fit(old)


def test_damaged_map_is_refused(rng, tmp_path):
    from safetensors.numpy import load_file, save_file

    file = tmp_path / "map/map.safetensors"
    AnchorMap(n_anchors=8).fit(rows(rng)).save(file.parent)
    save_file({**load_file(file), "anchors": np.zeros((3, 12), np.float32)}, file)
    with pytest.raises(FileFormatError, match="do not fit together"):
        load_map(file.parent)
