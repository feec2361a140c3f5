"""Rotations keep every inner product, and the principal one packs the most into each prefix."""

import numpy as np
import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from nestvec.errors import (
    DataError,
    DimensionError,
    FileFormatError,
    SpaceMismatchError,
    StorageError,
)
from nestvec.maps import PrincipalRotation, RandomRotation, load_map
from nestvec.space import Embeddings, Space

BOTH = pytest.mark.parametrize("kind", [PrincipalRotation, RandomRotation])


@parametrize_with_checks([PrincipalRotation(), RandomRotation(random_state=0)])
def test_scikit_learn_accepts(estimator, check):
    check(estimator)


def skewed(rng, n=300, dim=12):
    return (rng.normal(size=(n, dim)) * np.linspace(3, 0.1, dim) + 0.5).astype(np.float32)


def test_principal_axes_are_the_right_singular_vectors(rng):
    x = skewed(rng)
    fitted = PrincipalRotation(batch_size=64).fit(x)
    _, s, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(np.abs(np.diag(fitted.components_ @ vt.T)), 1, atol=1e-5)
    np.testing.assert_allclose(fitted.explained_energy_, s**2 / len(x), rtol=1e-5)


def test_no_other_rotation_keeps_more_energy_in_a_prefix(rng):
    x = skewed(rng)
    principal = PrincipalRotation().fit(x).transform(x)
    for seed in range(5):
        other = RandomRotation(random_state=seed).fit(x).transform(x)
        for d in (1, 4, 11):
            assert (principal[:, :d] ** 2).sum() >= (other[:, :d] ** 2).sum()


@BOTH
def test_full_size_inner_products_do_not_change_and_rotating_back_is_exact(kind, rng):
    x = skewed(rng)
    fitted = kind().fit(x)
    y = fitted.transform(x)
    np.testing.assert_allclose(y @ y.T, x @ x.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(fitted.inverse_transform(y), x, atol=1e-5)


def test_blocks_and_partial_fits_give_the_same_axes_as_one_pass(rng):
    x = skewed(rng)
    whole = PrincipalRotation(batch_size=1000).fit(x)
    blocks = PrincipalRotation(batch_size=7).fit(x)
    parts = PrincipalRotation()
    for start in range(0, len(x), 50):
        parts.partial_fit(x[start : start + 50])
    assert parts.n_samples_seen_ == len(x)
    np.testing.assert_allclose(blocks.components_, whole.components_, atol=1e-4)
    np.testing.assert_allclose(parts.components_, whole.components_, atol=1e-4)


def test_a_memory_map_is_read_in_place(rng, tmp_path):
    x = skewed(rng)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    np.testing.assert_array_equal(
        PrincipalRotation().fit(mapped).components_, PrincipalRotation().fit(x).components_
    )


def test_signs_are_fixed(rng):
    x = skewed(rng)
    axes = PrincipalRotation().fit(x).components_
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
    assert (largest > 0).all()


def test_a_bad_row_is_named_and_nothing_is_learned_from_its_block(rng):
    x = skewed(rng)
    fitted = PrincipalRotation(batch_size=64).partial_fit(x)
    bad = x.copy()
    bad[70, 3] = np.nan
    with pytest.raises(DataError, match=r"X\[64:128\]: row 6 holds NaN"):
        fitted.partial_fit(bad)
    assert fitted.n_samples_seen_ == len(x)
    np.testing.assert_array_equal(fitted.partial_fit(x).n_samples_seen_, 2 * len(x))


@BOTH
def test_embeddings_come_out_stamped_with_the_map(kind, rng):
    unit = skewed(rng)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    old = Embeddings(unit, Space.declared("m", dim=12), [f"r{i}" for i in range(len(unit))])
    fitted = kind(dims=(2, 6, 12)).fit(old)
    new = fitted.transform(old)
    assert new.space.maps == (fitted.content_hash,)
    assert new.space.nesting_dims == (2, 6, 12)
    assert new.space.space_id != old.space.space_id
    np.testing.assert_array_equal(new.ids, old.ids)
    np.testing.assert_allclose(np.linalg.norm(new.prefix(2).array, axis=1), 1, atol=1e-5)


@BOTH
def test_saved_then_loaded_is_the_same_map(kind, rng, tmp_path):
    x = skewed(rng)
    fitted = kind(dims=(2, 12)).fit(x)
    fitted.save(tmp_path / "map")
    loaded = load_map(tmp_path / "map")
    assert type(loaded) is kind
    assert loaded.content_hash == fitted.content_hash
    assert loaded.dims_ == (2, 12)
    np.testing.assert_array_equal(loaded.transform(x), fitted.transform(x))


def test_a_map_replaces_a_map_and_no_other_folder(rng, tmp_path):
    first, second = (PrincipalRotation(dims=dims).fit(skewed(rng)) for dims in [(2, 12), (4, 12)])
    first.save(tmp_path / "map")
    assert load_map(second.save(tmp_path / "map")).dims_ == (4, 12)
    (tmp_path / "map" / "notes.txt").write_text("precious")
    with pytest.raises(StorageError, match=r"'notes\.txt' in it, which would be lost"):
        first.save(tmp_path / "map")
    assert (tmp_path / "map" / "notes.txt").read_text() == "precious"
    assert load_map(tmp_path / "map").dims_ == (4, 12)


def test_a_loaded_rotation_goes_on_learning(rng, tmp_path):
    x, more = skewed(rng), skewed(rng)
    PrincipalRotation().fit(x).save(tmp_path / "map")
    loaded = PrincipalRotation.load(tmp_path / "map").partial_fit(more)
    whole = PrincipalRotation().fit(np.vstack([x, more]))
    np.testing.assert_allclose(loaded.components_, whole.components_, atol=1e-4)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "map.json").unlink(),
        lambda f: (f / "map.json").write_text("{"),
        lambda f: (f / "map.json").write_text("[]"),
        lambda f: (f / "map.json").write_text('{"format": "nestvec map", "format_version": 1}'),
        lambda f: (f / "map.safetensors").write_bytes(b""),
        lambda f: (f / "map.safetensors").write_bytes((f / "map.safetensors").read_bytes()[:-9]),
        lambda f: (f / "map.safetensors").write_bytes(
            (f / "map.safetensors").read_bytes()[:-2] + b"zz"
        ),
    ],
    ids=["no-json", "half-json", "foreign", "incomplete", "empty", "truncated", "edited"],
)
def test_a_damaged_folder_is_refused(damage, rng, tmp_path):
    PrincipalRotation().fit(skewed(rng)).save(tmp_path / "map")
    damage(tmp_path / "map")
    with pytest.raises(FileFormatError, match="not a whole map"):
        load_map(tmp_path / "map")


def test_a_later_format_and_a_missing_folder_say_so(rng, tmp_path):
    PrincipalRotation().fit(skewed(rng)).save(tmp_path / "map")
    about = tmp_path / "map" / "map.json"
    about.write_text(about.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(FileFormatError, match="Upgrade nestvec"):
        load_map(tmp_path / "map")
    with pytest.raises(StorageError, match="does not exist"):
        load_map(tmp_path / "nothing")


def test_loading_as_another_kind_is_refused(rng, tmp_path):
    RandomRotation(random_state=0).fit(skewed(rng)).save(tmp_path / "map")
    with pytest.raises(FileFormatError, match="holds a RandomRotation"):
        PrincipalRotation.load(tmp_path / "map")


def test_a_size_beyond_the_full_one_is_refused(rng):
    with pytest.raises(DimensionError, match="does not fit embeddings of dim 12"):
        PrincipalRotation(dims=(4, 13)).fit(skewed(rng))


def test_content_hash_is_of_what_the_map_does_not_of_its_settings(rng):
    x = skewed(rng)
    one = PrincipalRotation(dims=(4, 12)).fit(x)
    assert PrincipalRotation(dims=(2, 12)).fit(x).content_hash == one.content_hash
    assert RandomRotation(random_state=0).fit(x).content_hash != one.content_hash


def test_a_map_is_not_applied_to_another_space(rng, tmp_path):
    """Same dim, other model: without the check the vectors would come out as nonsense."""

    def stamped(name):
        space = Space.declared(name, dim=8, normalisation="none")
        return Embeddings(rng.normal(size=(40, 8)), space)

    fitted = PrincipalRotation().fit(stamped("old"))
    fitted.save(tmp_path / "map")
    for one in (fitted, load_map(tmp_path / "map")):
        with pytest.raises(SpaceMismatchError, match=r"fitted on old .*live in new"):
            one.transform(stamped("new"))
        with pytest.raises(SpaceMismatchError):
            PrincipalRotation().fit(stamped("old")).partial_fit(stamped("new"))
        one.transform(stamped("old"))
        one.transform(stamped("new").array)  # an array says nothing; its owner decides
