"""Mining, synthesis and training of the query side, from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sentence_transformers", reason="nestvec[text]")
pytest.importorskip("accelerate", reason="nestvec[train]")

import tiny_model  # behind importorskip
from typer.testing import CliRunner

from nestvec.cli import app
from nestvec.corpus import read_examples


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model.build(tmp_path_factory.mktemp("tiny") / "built")


@pytest.fixture(scope="module")
def beir(tmp_path_factory) -> Path:
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("beir")
    (folder / "qrels").mkdir()
    docs = [
        {
            "_id": f"d{i}",
            "title": " ".join(rng.choice(tiny_model.WORDS, 5)),
            "text": " ".join(rng.choice(tiny_model.WORDS, 22)),
        }
        for i in range(60)
    ]
    queries = [{"_id": f"q{i}", "text": docs[i]["text"][:30]} for i in range(20)]
    for name, rows in (("corpus", docs), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    labels = "\n".join(f"q{i}\td{i}\t1" for i in range(20))
    (folder / "qrels/train.tsv").write_text(f"query-id\tcorpus-id\tscore\n{labels}\n")
    return folder


def run(*words, code=0):
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == code, done.output
    return done


def said(*words):
    return json.loads(run(*words, "--json").stdout)


def refused(*words):
    done = run(*words, code=2)
    assert done.stdout == ""
    return " ".join(done.stderr.split())


@pytest.mark.parametrize("name", ["mine"])
def test_help_shows_examples(name):
    assert f"nestvec {name} " in run(*name.split(), "--help").output.partition("Examples:")[2]


def test_mined_triplets_are_trained_on(model, beir, tmp_path):
    hard = tmp_path / "hard.jsonl"
    options = ("--model", model, "--highest-share", 0, "--near-duplicate", 0)
    found = said("mine", beir, "-o", hard, *options, "--n-negatives", 2)
    assert found["n"] == 2 * found["n_pairs"] == 40
    assert [p.name for p in tmp_path.iterdir()] == ["hard.jsonl"]
    examples = read_examples(hard)
    assert examples.kind == "triplets"
    again = said("mine", beir, "-o", tmp_path / "again.jsonl", *options, "--n-negatives", 2)
    assert again["n_candidates"] == found["n_candidates"]
    assert read_examples(tmp_path / "again.jsonl") == examples
    trained = ("train", "text", hard, "-o", tmp_path / "m", "--model", model)
    run(*trained, "--max-steps", 2, "--batch-size", 8)


def test_mining_says_what_does_not_fit(model, beir, tmp_path):
    out = ("-o", tmp_path / "h.jsonl", "--model", model)
    assert "give two places, like 1-100" in refused("mine", beir, *out, "--ranks", "5")
    assert "ending in .jsonl" in refused("mine", beir, "-o", tmp_path / "h.csv")
    assert "its splits are: train" in refused("mine", beir, *out, "--split", "test")
