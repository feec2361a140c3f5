"""The residual bridge begins as the relaxed one and learns what no straight line can."""

import numpy as np
import pytest
from scipy.special import erf
from sklearn.utils.estimator_checks import parametrize_with_checks

from nestvec.errors import FileFormatError
from nestvec.maps import RelaxedBridge, ResidualBridge
from nestvec.maps.guard import unit
from nestvec.space import Embeddings, Space

pytestmark = pytest.mark.usefixtures("one_blas_thread")


@parametrize_with_checks(
    [ResidualBridge(hidden_units=4, max_steps=2)],
    expected_failed_checks=lambda one: {"check_dtype_object": "y is vectors, not labels"},
)
def test_scikit_learn_accepts(estimator, check):
    check(estimator)


def bent(rng, n=600):
    new = unit(rng.normal(size=(n, 8)).astype(np.float32))
    return new, unit(np.abs(new) @ rng.normal(size=(8, 8)).astype(np.float32) + 0.3 * new)


def test_bent_space_is_followed_where_no_line_can(rng):
    new, old = bent(rng)
    learned = ResidualBridge(64, max_steps=300, learning_rate=0.01).fit(new[:500], old[:500])
    straight = RelaxedBridge().fit(new[:500], old[:500])
    cosine = {
        name: np.einsum("nd,nd->n", bridge.transform(new[500:]), old[500:]).mean()
        for name, bridge in (("learned", learned), ("straight", straight))
    }
    assert cosine["learned"] > cosine["straight"] + 0.05
    assert learned.n_steps_ > 0


def test_without_a_step_it_is_the_relaxed_bridge_of_its_held_in_pairs(rng):
    new, old = bent(rng, n=100)
    bridge = ResidualBridge(8, max_steps=0, validation_fraction=0.2, random_state=0).fit(new, old)
    held_in = np.random.default_rng(0).permutation(100)[20:]
    straight = RelaxedBridge().fit(new[held_in], old[held_in])
    np.testing.assert_allclose(bridge.transform(new), straight.transform(new), atol=1e-5)


def test_map_is_what_its_arrays_say(rng, tmp_path):
    new, old = bent(rng, n=100)
    spaces = Space.declared("new", dim=8), Space.declared("old", dim=8)
    sides = Embeddings(new, spaces[0]), Embeddings(old, spaces[1])
    bridge = ResidualBridge(16, max_steps=20, learning_rate=0.05).fit(*sides)
    a = bridge.module_arrays()
    inside = (new @ a["inner"] + a["bias"]).astype(np.float64)
    gelu = inside * 0.5 * (1 + erf(inside / np.sqrt(2)))
    by_hand = new @ a["linear"] + a["intercept"] + gelu @ a["outer"]
    by_hand /= np.linalg.norm(by_hand, axis=1, keepdims=True)
    np.testing.assert_allclose(bridge.transform(sides[0]).array, by_hand, atol=1e-5)
    bridge.save(tmp_path / "bridge")
    again = ResidualBridge.load(tmp_path / "bridge")
    assert again.n_steps_ == bridge.n_steps_
    np.testing.assert_array_equal(again.transform(sides[0]).array, bridge.transform(sides[0]).array)


def test_same_seed_is_the_same_bridge(rng):
    new, old = bent(rng, n=100)
    one, same, other = (
        ResidualBridge(8, max_steps=5, random_state=seed).fit(new, old) for seed in (0, 0, 1)
    )
    assert one.content_hash == same.content_hash != other.content_hash


def test_damaged_network_is_refused(rng, tmp_path):
    from safetensors.numpy import load_file, save_file

    file = tmp_path / "bridge/map.safetensors"
    ResidualBridge(8, max_steps=0).fit(*bent(rng, n=60)).save(file.parent)
    arrays = load_file(file)
    save_file({**arrays, "bias": np.zeros(3, np.float32)}, file)
    with pytest.raises(FileFormatError, match="do not fit together"):
        ResidualBridge.load(file.parent)
