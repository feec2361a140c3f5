"""nestvec plan by nDCG, and nestvec search for a recall that was proven."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import nestvec as nv
from nestvec._checks import normalise
from nestvec.cli import app

DIM = 32
SPACE = nv.Space.declared("things", dim=DIM, nesting_dims=(8, 16, DIM))


def run(*words, code=0):
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """1,500 rows with text ids, and 300 queries, each beside the row that is relevant to it."""
    folder = tmp_path_factory.mktemp("plan-cli")
    rng = np.random.default_rng(0)
    rows = normalise(rng.normal(size=(1500, DIM)).astype(np.float32))
    asked = (rows[:300] + 0.05 * rng.normal(size=(300, DIM))).astype(np.float32)
    nv.Embeddings(rows, SPACE, ids=[f"d{i}" for i in range(1500)]).save(folder / "docs.npz")
    queries = nv.Embeddings(normalise(asked), SPACE, ids=[f"q{i}" for i in range(300)])
    queries.save(folder / "asks.npz")
    lines = [f"q{i}\td{i}\t1" for i in range(300)]
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "\n".join(lines) + "\n")
    run("index", "create", folder / "a.nest", folder / "docs.npz", "--durability", "process")
    return folder


def test_a_loss_of_ndcg_is_certified_shown_and_stored(folder):
    pytest.importorskip("ir_measures")
    words = ["plan", folder / "a.nest", "--queries", folder / "asks.npz", "--structures", "exact"]
    words += ["--qrels", folder / "qrels.tsv", "--ndcg-loss", 0.05]
    found = json.loads(run(*words, "--json").stdout)
    assert found["budget"] == {"ndcg_loss": 0.05}
    assert found["ndcg_exact"] > 0.99  # each finds the row that it was
    assert found["tested"][0]["ndcg_loss"]["upper"] <= 0.05
    assert nv.Index.open(folder / "a.nest").plan_stored == nv.Plan.parse(found["plan"])
    shown = run(*words, "--dry-run").stdout
    assert "nDCG@10" in shown.splitlines()[0]
    assert "at most 0.05 below that of exact full-size search" in shown


def test_a_search_asks_for_a_recall_that_was_proven(folder):
    words = [folder / "a.nest", "--queries", folder / "asks.npz"]
    planned = json.loads(run("plan", *words, "--recall", 0.95, "--json").stdout)
    proven = {one["plan"]: one["lower"] for one in planned["tested"]}
    for recall in (0.85, 0.95):
        found = json.loads(run("search", *words, "--recall", recall, "--json").stdout)
        assert proven[found["plan"]] >= recall
    said = run("search", *words, "--recall", 0.9999, code=2).stderr
    assert "nestvec plan" in said
    assert "--recall 0.9999" in said


def test_what_contradicts_itself_is_refused(folder):
    index, asks, qrels = folder / "a.nest", folder / "asks.npz", folder / "qrels.tsv"
    labelled = ["plan", index, "--queries", asks, "--qrels", qrels]
    for words, says in [
        (["plan", index, "--qrels", qrels], "give both"),
        (["plan", index, "--queries", asks, "--ndcg-loss", 0.1], "needs --qrels"),
        ([*labelled, "--ndcg-loss", 0.1, "--recall", 0.9], "in place of --recall"),
        ([*labelled, "--ndcg-loss", 3], "is a share"),
        (["search", index, "--queries", asks, "--recall", 0.9, "--dims", 8], "leave out"),
        (["search", folder / "docs.npz", "--queries", asks, "--recall", 0.9], "is for an index"),
    ]:
        assert says in run(*words, code=2).stderr, words
