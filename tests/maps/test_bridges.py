"""Bridges find what joins two spaces, keep prefixes where asked to, and land in the old Space."""

import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes
from sklearn.linear_model import Ridge
from sklearn.utils.estimator_checks import parametrize_with_checks

from nestvec.errors import (
    DataError,
    FileFormatError,
    SpaceError,
    SpaceMismatchError,
)
from nestvec.maps import (
    DriftBridge,
    LowRankBridge,
    ProcrustesBridge,
    RelaxedBridge,
    RidgeBridge,
    StiffBridge,
    UnchangedBridge,
    load_map,
)
from nestvec.maps.alignment import Bridge, row_hashes
from nestvec.maps.guard import unit
from nestvec.search.exact import top_k
from nestvec.space import Embeddings, Space

LEARNING = [ProcrustesBridge, RidgeBridge, RelaxedBridge, StiffBridge, LowRankBridge]
NESTED = [ProcrustesBridge, RidgeBridge, RelaxedBridge, StiffBridge]
OLD = Space.declared("old", dim=12, nesting_dims=(4, 8, 12))
NEW = Space.declared("new", dim=16, nesting_dims=(4, 8, 16))

pytestmark = pytest.mark.usefixtures("one_blas_thread")


def not_for_vectors(estimator):
    return {"check_dtype_object": "y is vectors, not labels; objects are refused in our own words"}


@parametrize_with_checks(
    [ProcrustesBridge(), RelaxedBridge(alpha=1.0)],
    expected_failed_checks=not_for_vectors,
)
def test_scikit_learn_accepts(estimator, check):
    check(estimator)


def pairs(rng, n=300, n_new=16, n_old=12, noise=0.0):
    """Two encoders of one hidden thing."""
    thing = rng.normal(size=(n, 10)) + 0.5
    new = thing @ rng.normal(size=(10, n_new)) + noise * rng.normal(size=(n, n_new))
    old = thing @ rng.normal(size=(10, n_old)) + noise * rng.normal(size=(n, n_old))
    return unit(new.astype(np.float32)), unit(old.astype(np.float32))


def stamped(rng, **more):
    new, old = pairs(rng, **more)
    ids = [f"doc{i}" for i in range(len(new))]
    return Embeddings(new, NEW, ids), Embeddings(old, OLD, ids)


def test_procrustes_recovers_a_planted_rotation(rng):
    old = unit(rng.normal(size=(200, 12)).astype(np.float32))
    planted = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    found = ProcrustesBridge().fit(old @ planted.T, old)
    np.testing.assert_allclose(found.module_arrays()["linear"], planted, atol=1e-5)
    np.testing.assert_allclose(found.transform(old @ planted.T), old, atol=1e-5)


def test_procrustes_is_that_of_scipy(rng):
    new, old = pairs(rng, n_new=12, noise=0.3)
    by_scipy = orthogonal_procrustes(new.astype(np.float64), old)[0]
    found = ProcrustesBridge().fit(new, old).module_arrays()["linear"]
    np.testing.assert_allclose(found, by_scipy, atol=1e-4)


@pytest.mark.parametrize(("n_new", "n_old"), [(16, 12), (12, 16)], ids=["shorter", "longer"])
def test_procrustes_between_sizes_is_the_best_rotation_of_padded_vectors(rng, n_new, n_old):
    new, old = pairs(rng, n_new=n_new, n_old=n_old, noise=0.3)
    wide = max(n_new, n_old)
    padded_new = np.pad(new, ((0, 0), (0, wide - n_new))).astype(np.float64)
    padded_old = np.pad(old, ((0, 0), (0, wide - n_old)))
    rotation = orthogonal_procrustes(padded_new, padded_old)[0][:n_new, :n_old]
    found = ProcrustesBridge().fit(new, old).module_arrays()["linear"]
    np.testing.assert_allclose(found, rotation, atol=1e-4)
    short = found @ found.T if n_new < n_old else found.T @ found
    np.testing.assert_allclose(short, np.eye(min(n_new, n_old)), atol=1e-5)


def test_directions_that_no_pair_shows_stay_where_they_are(rng):
    new = np.zeros((50, 8), np.float32)
    new[:, :3] = rng.normal(size=(50, 3))
    found = ProcrustesBridge().fit(new, new[:, [1, 2, 0, 3, 4, 5, 6, 7]]).module_arrays()["linear"]
    np.testing.assert_allclose(found[3:, 3:], np.eye(5), atol=1e-5)


def test_ridge_is_the_closed_form(rng):
    new, old = (side.astype(np.float64) for side in pairs(rng, noise=0.3))
    x, y = new - new.mean(axis=0), old - old.mean(axis=0)
    weights = np.linalg.solve(x.T @ x + 0.7 * np.eye(16), x.T @ y)
    found = RidgeBridge(alpha=0.7).fit(new, old).module_arrays()
    np.testing.assert_allclose(found["linear"], weights, atol=1e-5)
    constant = old.mean(axis=0) - new.mean(axis=0) @ weights
    np.testing.assert_allclose(found["intercept"], constant, atol=1e-5)


def test_relaxed_is_the_minimum_between_rotation_and_least_squares(rng):
    new, old = (side.astype(np.float64) for side in pairs(rng, noise=0.3))
    rotation = ProcrustesBridge().fit(new, old).module_arrays()["linear"]
    weights = np.linalg.solve(new.T @ new + 5 * np.eye(16), new.T @ old + 5 * rotation)
    found = RelaxedBridge(alpha=5.0, intercept=False).fit(new, old).module_arrays()["linear"]
    np.testing.assert_allclose(found, weights, atol=1e-5)
    stiff = RelaxedBridge(alpha=1e9, intercept=False).fit(new, old).module_arrays()["linear"]
    np.testing.assert_allclose(stiff, rotation, atol=1e-5)


def test_stiff_is_relaxed_by_a_thirtieth_of_its_pairs(rng):
    new, old = pairs(rng, noise=0.3)  # 300
    stiff = StiffBridge().fit(new, old)
    assert stiff.alphas_ == (10.0,)
    relaxed = RelaxedBridge(alpha=10.0).fit(new, old)
    np.testing.assert_array_equal(stiff.transform(new), relaxed.transform(new))
    assert StiffBridge(alpha=2.0).fit(new, old).alphas_ == (2.0,)


def test_low_rank_has_its_rank_and_with_all_directions_is_ridge(rng):
    new, old = pairs(rng, noise=0.3)
    few = LowRankBridge(rank=3, alpha=0.1).fit(new, old).module_arrays()["linear"]
    assert np.linalg.matrix_rank(few, tol=1e-4) == 3
    whole = LowRankBridge(rank=12, alpha=0.1).fit(new, old)
    ridge = RidgeBridge(alpha=0.1).fit(new, old)
    np.testing.assert_allclose(whole.transform(new), ridge.transform(new), atol=1e-5)


def test_drift_is_the_minimum_between_nothing_and_least_squares(rng):
    new, old = (side.astype(np.float64) for side in pairs(rng, n_new=12, noise=0.3))
    weights = np.linalg.solve(new.T @ new + 5 * np.eye(12), new.T @ old + 5 * np.eye(12))
    found = DriftBridge(alpha=5.0, intercept=False).fit(new, old).module_arrays()["linear"]
    np.testing.assert_allclose(found, weights, atol=1e-5)
    with pytest.raises(DataError, match="16 dims cannot stand for vectors of 12"):
        DriftBridge().fit(*pairs(rng))


@pytest.mark.parametrize("make", [RidgeBridge, RelaxedBridge, LowRankBridge])
def test_new_queries_find_their_own_row_among_old_ones(make, rng):
    new, old = pairs(rng, n=400)
    bridge = make().fit(new[:300], old[:300])
    found = top_k(bridge.transform(new[300:]), old[300:], 1)[0][:, 0]
    assert (found == np.arange(100)).mean() > 0.97
    unbridged = top_k(new[300:, :12], old[300:], 1)[0][:, 0]
    assert (unbridged == np.arange(100)).mean() < 0.1


@pytest.mark.parametrize("n_new", [16, 12, 10], ids=["longer", "same", "shorter"])
@pytest.mark.parametrize("make", NESTED)
def test_prefix_of_the_output_needs_only_that_prefix_of_the_input(make, n_new, rng):
    new, old = pairs(rng, n_new=n_new, noise=0.3)
    bridge = make(dims=(4, 8), nested=True).fit(new, old)
    assert bridge.dims_ == (4, 8, 12)
    for size in (4, 8):
        other = new.copy()
        other[:, size:] = rng.normal(size=other[:, size:].shape)
        expected = unit(bridge.transform(new)[:, :size])
        # rows are normalised at full size before the map, so only directions can be compared
        np.testing.assert_allclose(
            unit(bridge.transform(other)[:, :size]), expected, atol=1e-4, rtol=1e-3
        )
        corner = bridge.at(size).transform(new[:, :size])
        np.testing.assert_allclose(corner, expected, atol=1e-4, rtol=1e-3)
    if n_new == 12:
        np.testing.assert_allclose(bridge.at(12).transform(new), bridge.transform(new), atol=1e-6)
    else:  # the last block was learned from all new dims, or has more than there are
        with pytest.raises(DataError, match=r"no part for prefixes of 12 dims; it has \(4, 8\)"):
            bridge.at(12)


def test_every_block_of_a_nested_ridge_is_the_ridge_of_that_block(rng):
    new, old = pairs(rng, noise=0.3)
    found = RidgeBridge(dims=(4, 8), alpha=0.3, nested=True).fit(new, old)
    for start, stop, reach in ((0, 4, 4), (4, 8, 8), (8, 12, 16)):
        weights = Ridge(alpha=0.3, fit_intercept=False).fit(new[:, :reach], old[:, start:stop])
        linear = found.module_arrays()["linear"]
        np.testing.assert_allclose(linear[:reach, start:stop], weights.coef_.T, atol=1e-4)
        np.testing.assert_array_equal(linear[reach:, start:stop], 0)


def test_bridged_vectors_live_in_the_old_space_and_say_how_they_came(rng):
    new, old = stamped(rng)
    bridge = RidgeBridge().fit(new, old)
    bridged = bridge.transform(new)
    old.space.check_same(bridged.space)
    assert bridged.space.via == (bridge.content_hash,)
    assert bridged.ids.tolist() == new.ids.tolist()
    assert f"through bridge {bridge.content_hash}" in bridged.space.label
    with pytest.raises(SpaceMismatchError, match=r"nestvec\.upgrade\.fit\(old=\.\.\., new=\.\.\."):
        old.space.check_same(new.space)


def test_provenance_survives_files_and_cuts(rng, tmp_path):
    new, old = stamped(rng)
    bridge = RidgeBridge().fit(new, old)
    bridge.transform(new).save(tmp_path / "bridged.npz")
    again = Embeddings.load(tmp_path / "bridged.npz")
    assert again.prefix(4).space.via == (bridge.content_hash,)
    assert again.space.space_id == old.space.space_id


def test_bridge_refuses_vectors_of_another_space(rng):
    new, old = stamped(rng)
    bridge = RidgeBridge().fit(new, old)
    with pytest.raises(SpaceMismatchError, match="fitted on new"):
        bridge.transform(Embeddings(new.array, Space.declared("other", dim=16)))


def test_bridge_of_arrays_cannot_stamp(rng):
    new, old = pairs(rng)
    with pytest.raises(SpaceError, match="fitted on plain arrays"):
        RidgeBridge().fit(new, old).transform(Embeddings(new, NEW))


@pytest.mark.parametrize("make", NESTED)
def test_cut_vectors_cross_a_nested_bridge_and_arrive_cut(make, rng):
    new, old = stamped(rng, noise=0.3)
    bridge = make(dims=(4, 8), nested=True).fit(new, old)
    cut = bridge.transform(new.prefix(8))
    old.prefix(8).space.check_same(cut.space)
    np.testing.assert_allclose(
        cut.array, bridge.transform(new).prefix(8).array, atol=1e-4, rtol=1e-3
    )
    with pytest.raises(SpaceMismatchError):
        make().fit(new, old).transform(new.prefix(8))


@pytest.mark.parametrize("make", [*LEARNING, DriftBridge, UnchangedBridge])
def test_saving_then_loading_is_identity(make, rng, tmp_path):
    new, old = stamped(rng, n_new=16)
    if make in (DriftBridge, UnchangedBridge):
        old = new.replaced(new.array, Space.declared("old", dim=16))
    bridge = make().fit(new, old)
    bridge.save(tmp_path / "bridge")
    again = Bridge.load(tmp_path / "bridge")
    assert type(again) is make
    assert again.content_hash == bridge.content_hash
    assert again.target_ == bridge.target_
    assert again.space_ == bridge.space_
    assert again.dims_ == bridge.dims_
    np.testing.assert_array_equal(again.seen_, np.unique(row_hashes(new.array)))
    np.testing.assert_array_equal(again.transform(new).array, bridge.transform(new).array)


def test_damaged_arrays_are_refused(rng, tmp_path):
    from safetensors.numpy import save_file

    RidgeBridge().fit(*pairs(rng)).save(tmp_path / "bridge")
    arrays = {"linear": np.eye(3, dtype=np.float32), "seen": np.zeros(1, np.uint64)}
    save_file(arrays, tmp_path / "bridge/map.safetensors")
    with pytest.raises(FileFormatError, match="do not fit together"):
        load_map(tmp_path / "bridge")


def test_sides_that_do_not_pair_up_are_refused(rng):
    new, old = stamped(rng)
    with pytest.raises(DataError, match="300 new rows and 299 old rows do not pair up"):
        RidgeBridge().fit(new, old[:299])
    with pytest.raises(DataError, match="row 0 is 'doc0' on the new side and 'doc299' on the old"):
        RidgeBridge().fit(new, old[np.arange(300)[::-1]])


def test_lengths_that_mean_something_are_refused(rng):
    new, old = pairs(rng)
    dot = Space.declared("dot", dim=12, normalisation="none", metric="dot")
    with pytest.raises(SpaceError, match=r"normalised\(\)"):
        RidgeBridge().fit(new, Embeddings(3 * old, dot))


def test_unchanged_needs_one_size(rng):
    with pytest.raises(DataError, match="16 dims cannot stand for vectors of 12"):
        UnchangedBridge().fit(*pairs(rng))


def test_part_that_was_not_fitted_is_refused(rng):
    new, old = pairs(rng)
    with pytest.raises(DataError, match="nested=True"):
        RidgeBridge().fit(new, old).at(4)
    with pytest.raises(DataError, match=r"it has \(4,\)"):
        RidgeBridge(dims=(4,), nested=True).fit(new, old).at(8)
