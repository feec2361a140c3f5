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
    noise = 0.3 * rng.normal(size=(2, 350, 12)).astype(np.float32)
    asks = [f"q{i}" for i in range(350)]
    nv.Embeddings(unit(old[:350] + noise[0]), OLD, asks).save(folder / "asks-old.npz")
    nv.Embeddings(unit(new[:350] + 0.3 * noise[1]), NEW, asks).save(folder / "asks-new.npz")
    lines = [f"q{i}\tdoc{i}\t1" for i in range(350)]
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines) + "\n")
    return folder


def test_fit_then_apply_takes_new_vectors_to_the_old_space(folder):
    sample = ["--old", folder / "old.npz", "--new", folder / "new.npz", "-o", folder / "bridge"]
    said = run("fit", *sample).stdout
    assert "procrustes bridge kept: held-out closeness kept@10 by both models" in said
    said = run("fit", *sample, "--teacher", "old").stdout
    assert "procrustes bridge kept: held-out closeness kept@10 by the old model" in said
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


SIDES = ("old-docs", "old.npz", "old-queries", "asks-old.npz", "new-docs", "new.npz")


def words_of(folder, queries="asks-new.npz"):
    pairs = [*zip(SIDES[::2], SIDES[1::2], strict=True), ("new-queries", queries)]
    return [word for name, file in pairs for word in (f"--{name}", folder / file)]


def test_judge_says_safe_and_exits_with_0(folder):
    pytest.importorskip("ir_measures")
    bridge = folder / "b4"
    run("fit", "--old", folder / "old.npz", "--new", folder / "new.npz", "-o", bridge)
    words = ["judge", *words_of(folder), "--bridge", bridge, "--qrels", folder / "qrels.tsv"]
    said = run(*words).stdout
    assert "safe (better): nDCG@10 of new queries on the old gallery is" in said
    found = json.loads(run(*words, "--json").stdout)
    assert found["safe"]
    assert found["sizes"][0]["dim"] == 12
    assert "95% confidence" in found["sentence"]


def test_judge_says_not_safe_and_exits_with_1(folder):
    bridge = folder / "b5"
    old, new = nv.load(folder / "old.npz"), nv.load(folder / "new.npz")
    nv.upgrade.fit(old=old, new=new.replaced(new.array[::-1], NEW)).save(bridge)  # shuffled
    found = json.loads(run("judge", *words_of(folder), "--bridge", bridge, "--json", code=1).stdout)
    assert found["verdict"] == "not safe"
    assert found["truth"] == "neighbours"


def test_judge_without_a_bridge_cannot_judge_and_exits_with_2(folder):
    said = run("judge", *words_of(folder), code=2).stderr
    assert "nestvec upgrade fit --old OLD --new NEW" in " ".join(said.split())
    assert "cannot be compared" in run("judge", *words_of(folder, "asks-old.npz"), code=2).stderr
