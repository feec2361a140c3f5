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


@pytest.mark.parametrize("name", ["mine", "synthesize", "train queries"])
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


def test_pairs_are_made_of_a_corpus_and_negatives_with_them(model, beir, tmp_path):
    options = ("--model", model, "--queries", "title", "--n", 12)
    found = said("synthesize", beir, "-o", tmp_path / "pairs.jsonl", *options)
    assert found["kind"] == "pairs"
    assert found["n"] + found["n_without"] == 12
    titles = {json.loads(x)["title"] for x in (beir / "corpus.jsonl").read_text().splitlines()}
    pairs = read_examples(tmp_path / "pairs.jsonl")
    assert set(pairs.texts[0]) <= titles
    assert [p.name for p in tmp_path.iterdir()] == ["pairs.jsonl"]
    run("synthesize", beir, "-o", tmp_path / "same.jsonl", *options)
    assert read_examples(tmp_path / "same.jsonl") == pairs
    assert "is not one of title, summary, lead" in refused(
        "synthesize", beir, "-o", tmp_path / "x.jsonl", "--queries", "best"
    )


def test_corpus_too_small_to_cluster_is_refused(model, tmp_path):
    lines = [json.dumps({"text": f"wing {n} " * 12}) for n in range(7)]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    words = ("synthesize", tmp_path / "few.jsonl", "-o", tmp_path / "p.jsonl", "--model", model)
    assert "7 documents are too few to cluster" in refused(*words, "--queries", "lead")


def test_query_side_is_trained_against_an_index_and_searches_it(model, beir, tmp_path):
    pytest.importorskip("lance", reason="nestvec[index]")
    run("embed", beir, "-o", tmp_path / "docs.safetensors", "--model", model)
    run("index", "create", tmp_path / "docs.nest", tmp_path / "docs.safetensors")
    trained = ("train", "queries", beir, "--model", model, "--max-steps", 2, "--batch-size", 8)
    options = ("--documents", tmp_path / "docs.nest", "-o", tmp_path / "asks", "--holdout", 0.2)
    found = said(*trained, *options, "--dims", "8,32")
    assert set(found["metrics"]) == {"hit10@8", "hit10@32"}
    run("search", tmp_path / "docs.nest", "a wing", "--model", tmp_path / "asks")
    assert "encodes queries alone" in refused(
        "embed", beir, "-o", tmp_path / "d.safetensors", "--model", tmp_path / "asks"
    )
    again = (*trained, "-o", tmp_path / "asks", "--documents", tmp_path / "docs.safetensors")
    assert "another configuration" in refused(*again, "--dims", "16,32")
