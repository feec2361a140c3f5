"""`upgrade.fit` keeps the bridge whose finds are close by its teachers; rows pair up by id."""

import numpy as np
import pytest

import nestvec as nv
from nestvec.errors import DataError
from nestvec.maps import DriftBridge, ProcrustesBridge, RidgeBridge, UnchangedBridge
from nestvec.maps.alignment import Bridge
from nestvec.maps.guard import unit
from nestvec.space import Embeddings, Space

pytestmark = pytest.mark.usefixtures("one_blas_thread")
OLD, NEW = (Space.declared(name, dim=12) for name in ("old", "new"))


def vectors(rng, n=300, dim=12):
    spread = np.linspace(2, 0.3, dim)
    return unit((rng.normal(size=(n, dim)) * spread).astype(np.float32))


def test_rotated_model_gets_a_rotation_and_the_sentence_says_why(rng):
    old = vectors(rng)
    new = old @ np.linalg.qr(rng.normal(size=(12, 12)))[0]
    bridge = nv.upgrade.fit(old=old, new=new)
    assert isinstance(bridge, ProcrustesBridge)
    assert bridge.guard_ is not None
    assert bridge.guard_.score("procrustes") > 0.99 > bridge.guard_.score("unchanged")
    assert bridge.guard_.sentence().startswith(
        "procrustes bridge kept: held-out closeness kept@10 by both models 1.000 against"
    )
    guard = nv.upgrade.fit(old=old, new=new, teacher="old").guard_
    assert guard is not None
    assert guard.sentence().startswith(
        "procrustes bridge kept: held-out closeness kept@10 by the old model 1.000 against"
    )


def test_model_that_did_not_move_is_left_unchanged(rng):
    old = vectors(rng)
    assert isinstance(nv.upgrade.fit(old=old, new=old), UnchangedBridge)


def test_shifted_model_gets_more_than_a_rotation(rng):
    old = vectors(rng, n=800)
    new = old @ np.linalg.qr(rng.normal(size=(12, 12)))[0] + 2 * vectors(rng, n=1)
    bridge = nv.upgrade.fit(old=old, new=new)
    assert not isinstance(bridge, (ProcrustesBridge, UnchangedBridge))


def shared_with(side, found):
    """Share of the ten nearest of the first 200 rows among the next 500, by one model, found."""
    best = np.argsort(-side[:200] @ side[200:700].T, axis=1)[:, :10]
    return np.mean([len(set(a) & set(b)) for a, b in zip(best, found, strict=True)]) / 10


@pytest.mark.parametrize(("moves", "noise"), [("queries", 0.04), ("gallery", 0.002)])
def test_teacher_decides_whose_neighbours_are_found(moves, noise, rng):
    """An old model that sees a few directions, and a new one that sees all of them alike."""
    true = unit(rng.normal(size=(1400, 24)).astype(np.float32))
    old = true * np.geomspace(1, 0.1, 24) + noise * rng.normal(size=true.shape)
    turn = np.linalg.qr(rng.normal(size=(24, 24)))[0]
    new = (true + 0.05 * rng.normal(size=true.shape)) @ turn
    old, new = (unit(side.astype(np.float32)) for side in (old, new))
    found, won = {}, {}
    for teacher in ("new", "old", "both"):
        kinds = ("procrustes", "drift", "stiff", "relaxed", "ridge")
        bridge = nv.upgrade.fit(
            old=old[700:], new=new[700:], teacher=teacher, moves=moves, kinds=kinds
        )
        assert bridge.guard_ is not None
        won[teacher] = bridge.guard_.winner
        if moves == "queries":
            scores = unit(bridge.transform(new[:200])) @ old[200:700].T
        else:
            scores = new[:200] @ unit(bridge.transform(old[200:700])).T
        top = np.argsort(-scores, axis=1)[:, :10]
        found[teacher] = shared_with(new, top), shared_with(old, top)
    assert found["new"][0] > found["old"][0] + 0.08
    assert found["old"][1] > found["new"][1] + 0.08
    if moves == "queries":  # the bridge that is held between the two is neither's
        assert won["both"] == "stiff"
        assert found["old"][0] < found["both"][0] < found["new"][0]
        assert found["new"][1] < found["both"][1] < found["old"][1]


def test_full_size_counts_as_much_as_all_shorter_ones(rng):
    old = vectors(rng)
    guard = nv.upgrade.fit(old=old, new=old[:, ::-1], dims=(4, 8)).guard_
    assert guard is not None
    assert guard.dims == (4, 8, 12)
    assert guard.weights == (0.25, 0.25, 0.5)


def test_fine_tuned_model_gets_its_drift_undone(rng):
    old = vectors(rng, n=80, dim=40)
    change = np.eye(40) + np.outer(*rng.normal(size=(2, 40))) / 20
    kinds = ("unchanged", "procrustes", "drift", "ridge")
    bridge = nv.upgrade.fit(old=old, new=old @ change, kinds=kinds, teacher="old")
    assert isinstance(bridge, DriftBridge)


@pytest.mark.parametrize(
    ("n", "more"), [(30, {}), (60, {"validation_fraction": 0.9}), (80, {"moves": "gallery"})]
)
def test_few_pairs_get_the_safest_bridge(n, more, rng):
    old = vectors(rng, n=n)
    bridge = nv.upgrade.fit(old=old, new=old, **more)
    assert isinstance(bridge, ProcrustesBridge)
    assert bridge.guard_ is not None
    assert "too few rows to hold any out" in bridge.guard_.sentence()


def test_gallery_may_move_instead_of_the_queries(rng):
    old = vectors(rng)
    new = old @ np.linalg.qr(rng.normal(size=(12, 12)))[0].astype(np.float32)
    ids = np.arange(300)
    stored, fresh = Embeddings(old, OLD, ids), Embeddings(new, NEW, ids)
    bridge = nv.upgrade.fit(old=stored, new=fresh, moves="gallery")
    moved = bridge.transform(stored)
    fresh.space.check_same(moved.space)
    np.testing.assert_allclose(moved.array, new, atol=1e-4)


def test_pairs_are_matched_by_id(rng):
    old = vectors(rng)
    new = old @ np.linalg.qr(rng.normal(size=(12, 12)))[0].astype(np.float32)
    ids = np.array([f"doc{i}" for i in range(300)])
    shuffled = rng.permutation(300)[:250]
    bridge = nv.upgrade.fit(
        old=Embeddings(old, OLD, ids), new=Embeddings(new[shuffled], NEW, ids[shuffled])
    )
    np.testing.assert_allclose(bridge.transform(new), old, atol=1e-4)


def test_choice_survives_a_file(rng, tmp_path):
    old = vectors(rng)
    bridge = nv.upgrade.fit(old=old, new=old[:, ::-1])
    bridge.save(tmp_path / "bridge")
    assert Bridge.load(tmp_path / "bridge").guard_ == bridge.guard_


def test_nested_leaves_the_bridges_that_have_blocks(rng):
    old = vectors(rng)
    bridge = nv.upgrade.fit(old=old, new=old[:, ::-1], nested=True, dims=(4, 8))
    assert isinstance(bridge, (ProcrustesBridge, RidgeBridge))
    assert bridge.nested
    assert bridge.dims_ == (4, 8, 12)
    assert bridge.guard_ is not None
    assert set(bridge.guard_.scores) == {"procrustes", "drift", "stiff", "relaxed", "ridge"}


def test_sample_is_drawn_by_seed(rng):
    old = vectors(rng)
    new = old + 0.1 * vectors(rng)
    one, same, other = (
        nv.upgrade.fit(old=old, new=new, sample_size=100, random_state=seed) for seed in (0, 0, 1)
    )
    assert one.content_hash == same.content_hash != other.content_hash


def test_one_kind_is_fitted_as_asked(rng):
    old = vectors(rng)
    assert isinstance(nv.upgrade.fit(old=old, new=old, kinds=["ridge"]), RidgeBridge)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"kinds": ["magic"]}, "'magic' is not one of unchanged, procrustes"),
        (
            {"kinds": ["low_rank"], "nested": True},
            "none of the kinds low_rank fits here with nested",
        ),
        ({"moves": "both"}, "'both' is not one of queries, gallery"),
        ({"teacher": "all"}, "'all' is not one of both, new, old"),
        ({"validation_fraction": 1.0}, "must lie between 0 and 1"),
        ({"sample_size": 0}, "sample_size is 0; 1 or more"),
    ],
)
def test_bad_settings_say_what_would_fit(more, message, rng):
    old = vectors(rng)
    with pytest.raises(DataError, match=message):
        nv.upgrade.fit(old=old, new=old, **more)


def test_the_only_kind_that_fits_says_so(rng):
    old = vectors(rng)
    found = nv.upgrade.fit(old=old, new=np.c_[old, old], kinds=["drift", "procrustes"]).guard_
    assert found is not None
    assert found.sentence().startswith("procrustes bridge kept: no other was to be compared")


def test_one_pair_at_the_least_is_held_out(rng):
    old = vectors(rng)[:60]
    found = nv.upgrade.fit(old=old, new=old, validation_fraction=0.005).guard_
    assert found is not None
    assert found.n_held_out == 1
    assert np.isfinite([*found.scores.values()]).all()


def test_sides_without_pairs_are_refused(rng):
    old = vectors(rng)
    with pytest.raises(DataError, match="300 old and 200 new vectors do not pair up"):
        nv.upgrade.fit(old=old, new=old[:200])
    mine, yours = (Embeddings(old, OLD, [f"{s}{i}" for i in range(300)]) for s in "ab")
    with pytest.raises(DataError, match="share no id: old has ids like 'a0'"):
        nv.upgrade.fit(old=mine, new=yours)
