"""nestvec upgrade: a bridge is fitted, saved and applied from files."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import nestvec as nv
from nestvec.cli import app
from nestvec.maps.guard import unit

OLD, NEW = (nv.Space.declared(name, dim=12, nesting_dims=(4, 8, 12)) for name in ("old", "new"))


def run(*words, code=0):
    done = CliRunner().invoke(app, ["upgrade", *(str(w) for w in words)])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upgrade-cli")
    rng = np.random.default_rng(0)
    old = unit((rng.normal(size=(400, 12)) * np.linspace(2, 0.3, 12)).astype(np.float32))
    new = old @ np.linalg.qr(rng.normal(size=(12, 12)))[0].astype(np.float32)
    ids = [f"doc{i}" for i in range(400)]
    nv.Embeddings(old, OLD, ids).save(folder / "old.npz")
    nv.Embeddings(new, NEW, ids).save(folder / "new.npz")
    np.save(folder / "bare.npy", new)
    return folder


def test_fit_then_apply_takes_new_vectors_to_the_old_space(folder):
    sample = ["--old", folder / "old.npz", "--new", folder / "new.npz", "-o", folder / "bridge"]
    said = run("fit", *sample).stdout
    assert "procrustes bridge kept: held-out full re-embedding kept@10" in said
    found = json.loads(run("fit", *sample, "--kind", "ridge", "--json").stdout)
    assert found["kind"] == "ridge"
    assert found["to"]["space_id"] == OLD.space_id
    run("fit", *sample)
    run("apply", folder / "new.npz", "--bridge", folder / "bridge", "-o", folder / "moved.npz")
    moved, old = nv.load(folder / "moved.npz"), nv.load(folder / "old.npz")
    old.space.check_same(moved.space)
    np.testing.assert_allclose(moved.array, old.array, atol=1e-4)


def test_vectors_of_another_space_do_not_cross(folder):
    run("fit", "--old", folder / "old.npz", "--new", folder / "new.npz", "-o", folder / "b2")
    words = ["apply", folder / "old.npz", "--bridge", folder / "b2", "-o", folder / "no.npz"]
    assert "this map was fitted on new" in run(*words, code=2).stderr


def test_bad_settings_are_user_errors(folder):
    sample = ["--old", folder / "old.npz", "--new", folder / "new.npz", "-o", folder / "b3"]
    assert "is not one of unchanged" in run("fit", *sample, "--kind", "magic", code=2).stderr
    bare = ["--old", folder / "old.npz", "--new", folder / "bare.npy", "-o", folder / "b3"]
    assert "--model-name" in run("fit", *bare, code=2).stderr


def test_search_across_models_says_what_would_join_them(folder):
    words = ["search", folder / "old.npz", "--queries", folder / "new.npz"]
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == 2
    assert "nestvec upgrade fit --old OLD --new NEW" in " ".join(done.stderr.split())
