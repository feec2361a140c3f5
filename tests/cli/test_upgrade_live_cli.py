"""nestvec upgrade plan ... rollback: an index is upgraded from the command line."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
import typer
from typer.testing import CliRunner

import nestvec as nv
from nestvec.cli import app
from nestvec.cli._upgrade_live import _log_of
from nestvec.search.index import Index
from nestvec.upgrade import Upgrade

OLD, NEW = nv.Space.declared("old", dim=12), nv.Space.declared("new", dim=16)
N = 300


def run(*words, code=0):
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == code, done.output
    return done


def told(*words):
    return json.loads(run(*words, "--json").stdout)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    meaning = rng.normal(size=(N, 8))
    old = unit(meaning @ rng.normal(size=(8, 12)) + 0.3 * rng.normal(size=(N, 12)))
    new = unit(meaning @ rng.normal(size=(8, 16)) + 0.3 * rng.normal(size=(N, 16)))
    ids = np.arange(N)
    payload = {"text": [f"{i}" for i in ids]}
    Index.create(tmp_path / "x.nest", nv.Embeddings(old, OLD, ids), payload=payload)
    nv.Embeddings(old[:9], OLD, ids[:9]).save(tmp_path / "asks-old.npz")
    nv.Embeddings(new[:9], NEW, ids[:9]).save(tmp_path / "asks-new.npz")
    nv.Embeddings(new, NEW, ids).save(tmp_path / "new.npz")
    return tmp_path


def test_an_upgrade_from_beginning_to_end(folder):
    index, new = folder / "x.nest", folder / "new.npz"
    begun = told("upgrade", "start", index, "--vectors", new, "--sample-size", 60)
    assert (begun["done"], begun["pending"], begun["to"]["space_id"]) == (60, 240, NEW.space_id)
    assert begun["calibration"]["slope"] > 0
    found = told("search", index, "--queries", folder / "asks-new.npz", "-k", 3)
    assert len(found["queries"]) == 9
    traffic = folder / "traffic.txt"
    traffic.write_text("".join(f"{i}\t{i}\n" for i in range(N)))
    done = told(
        "upgrade", "backfill", index, "--vectors", new, "--traffic", traffic, "--max-rows", 50
    )
    assert (done["embedded"], done["done"], done["order"]) == (50, 110, "traffic")
    said = run("upgrade", "status", index).stdout
    assert "110 of 300 rows have new vectors (37%)" in said
    assert "140 of" not in said
    refused = run("upgrade", "finish", index, code=2).stderr
    assert "190 of 300 rows have no new vector" in refused
    assert "--drop-pending deletes them" in refused
    words = ["upgrade", "backfill", index, "--vectors", new, "--queries"]
    done = told(*words, folder / "asks-new.npz", "--max-rows", 10, "--no-learn")
    assert (done["embedded"], done["order"], done["pairs"]) == (10, "traffic", 48)
    assert "two spaces" in run(*words, folder / "asks-old.npz", code=2).stderr
    assert (
        "one of the two"
        in run(*words, folder / "asks-new.npz", "--traffic", traffic, code=2).stderr
    )
    assert "finish drops the old ones" in run("upgrade", "backfill", index, "--vectors", new).stdout
    assert told("upgrade", "status", index)["may_finish"]
    assert "300 rows, new" in run("upgrade", "finish", index).stdout
    answers = told("search", index, "--queries", folder / "asks-new.npz", "-k", 1)["queries"]
    assert [one["hits"][0]["id"] for one in answers] == list(range(9))
    assert "two spaces" in run("search", index, "--queries", folder / "asks-old.npz", code=2).stderr
    assert "no upgrade" in run("upgrade", "finish", index, code=2).stderr


def test_what_is_to_be_typed_next_works_as_it_stands(folder):
    index, new = folder / "x.nest", folder / "new.npz"
    begun = run("upgrade", "start", index, "--vectors", new, "--sample-size", 60)
    assert f"next: nestvec upgrade backfill {index} --vectors {new}\n" in begun.stderr
    again = run("upgrade", "start", index, "--model", "none/such", "--column", "text", code=2)
    assert "is under way" in again.stderr  # before a model is loaded
    some = folder / "some.npz"
    rows = nv.load(new)
    rows[np.arange(200)].save(some)
    done = run("upgrade", "backfill", index, "--vectors", some)
    pending = told("upgrade", "status", index)["pending"]
    assert f"has no vectors of the {pending} rows that are pending" in done.stderr
    assert pending > 50
    answers = told("search", index, "--queries", folder / "asks-new.npz")
    assert answers["space"]["space_id"] == NEW.space_id
    assert answers["stages"][-1]["rows_scored"] == N - pending  # also those that are fresh
    said = told("index", "check", index)
    assert said["ok"]
    assert "new vectors of its upgrade" in run("index", "check", index).stdout


def test_a_log_of_queries_counts_how_often_each_was_asked(tmp_path):
    def letters(texts):
        return unit(np.array([[len(text), text.count("a"), 1] for text in texts], float))

    encoder = nv.CallableEncoder(letters, name="letters", dim=3)
    (tmp_path / "log.txt").write_text("a question\nanother\n\na question\na question\n")
    found = _log_of(tmp_path / "log.txt", encoder)
    rows, counts = np.unique(found.array, axis=0, return_counts=True)
    true = letters(["a question", "another"])
    order = np.lexsort(true.T[::-1])
    np.testing.assert_allclose(rows, true[order], atol=1e-6)
    assert counts.tolist() == np.array([3, 1])[order].tolist()
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(typer.Exit):
        _log_of(tmp_path / "none.txt", encoder)


def test_rows_of_the_new_model_are_written_and_a_rollback_names_them(folder):
    index = folder / "x.nest"
    before = told("search", index, "--queries", folder / "asks-old.npz")
    run("upgrade", "start", index, "--vectors", folder / "new.npz", "--sample-size", 60)
    table = pa.table({"id": [3], "text": ["3"]})
    rows = nv.load(folder / "new.npz")
    nv.Embeddings(rows.array[[3]], NEW, [3]).save(folder / "three.npz")
    assert "has no column" in run("index", "upsert", index, folder / "three.npz", code=2).stderr
    Index.open(index).upsert(rows[np.array([3])], payload=table.select(["text"]))
    assert "1 rows were written with new vectors" in run("upgrade", "status", index).stderr
    done = run("upgrade", "rollback", index)
    assert "as before" in done.stdout
    assert "1 rows were written with new vectors" in done.stderr
    assert (
        told("search", index, "--queries", folder / "asks-old.npz")["queries"][8]
        == (before["queries"][8])
    )
    assert "no upgrade" in run("upgrade", "rollback", index, code=2).stderr


def test_a_file_of_new_vectors_is_upserted_during_an_upgrade(folder):
    rows = nv.load(folder / "new.npz")
    Index.create(
        folder / "bare.nest",
        nv.Embeddings(
            rows.array[:, :12] * 1.0,
            nv.Space.declared("cut", dim=12, normalisation="none"),
            rows.ids,
        ),
    )
    index = folder / "bare.nest"
    assert "two spaces" in run("index", "upsert", index, folder / "asks-new.npz", code=2).stderr
    run("upgrade", "start", index, "--vectors", folder / "new.npz", "--sample-size", 60)
    assert told("index", "upsert", index, folder / "asks-new.npz")["updated"] == 9
    assert Upgrade.open(index).status().bridged == 9


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["start"], "--model and --column, or --vectors"),
        (["start", "--vectors", "new.npz", "--model", "m"], "not both"),
        (["start", "--vectors", "asks-old.npz"], "nothing to upgrade"),
        (["start", "--vectors", "asks-new.npz"], "9 rows by both models are too few"),
        (["start", "--model", "m", "--column", "body"], "'body' is not one"),
        (["status"], "no upgrade of"),
        (["backfill", "--vectors", "new.npz"], "no upgrade of"),
        (["rollback"], "nestvec upgrade start begins one"),
    ],
)
def test_what_does_not_fit_is_said(folder, words, said):
    words = [folder / word if word.endswith(".npz") else word for word in words]
    assert said in run("upgrade", words[0], folder / "x.nest", *words[1:], code=2).stderr


def test_a_backfill_of_a_declared_space_needs_its_model(folder):
    run("upgrade", "start", folder / "x.nest", "--vectors", folder / "new.npz")
    assert "give --model" in run("upgrade", "backfill", folder / "x.nest", code=2).stderr


def test_ctrl_c_keeps_what_is_made(folder):
    index = folder / "x.nest"
    run("upgrade", "start", index, "--vectors", folder / "new.npz", "--sample-size", 60)
    words = ["backfill", index, "--vectors", folder / "new.npz", "--rows-per-second", 20]
    words = [sys.executable, "-m", "nestvec", "upgrade", *map(str, words), "--batch-size", "5"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    while Upgrade.open(index).status().done < 70:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130, said
    assert "what is made is kept" in said
    assert 70 <= Upgrade.open(index).status().done < N
    assert run("upgrade", "rollback", index)


@pytest.mark.slow
def test_a_model_upgrades_what_another_made(tmp_path):
    tiny_model = pytest.importorskip("tiny_model")
    models = [tiny_model.build(tmp_path / f"m{seed}", seed=seed) for seed in (0, 1)]
    words = "wing flow heat shock layer plate cone jet lift drag".split()
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 4)) for _ in range(80)]
    docs = nv.encode(texts, model=str(models[0]), role="document")
    index = tmp_path / "x.nest"
    Index.create(index, docs, payload={"text": texts})
    how = ["--model", models[1], "--column", "text"]
    planned = told("upgrade", "plan", index, *how, "--price-per-million", 2)
    assert planned["rows"] == 80
    assert planned["seconds"] > 0
    assert planned["cost"] == pytest.approx(planned["characters"] * 2e-6)
    run("upgrade", "start", index, *how, "--sample-size", 40)
    found = told("search", index, "wing flow", "--model", models[1])
    assert len(found["queries"][0]["hits"]) == 10
    assert "with --model" in run("upgrade", "backfill", index, code=2).stderr
    assert told("upgrade", "backfill", index, "--model", models[1])["pending"] == 0
    run("upgrade", "finish", index)
    found = told("search", index, "wing flow", "--model", models[1])
    assert len(found["queries"][0]["hits"]) == 10
