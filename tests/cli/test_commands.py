"""The command line as a newcomer meets it: text in, nested vectors out, measured and searched."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_model
from typer.testing import CliRunner

import nestvec as nv
from nestvec.cli import app

WORDS = tiny_model.WORDS
NESTVEC = [sys.executable, "-m", "nestvec"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model.build(tmp_path_factory.mktemp("tiny") / "built")


@pytest.fixture(scope="module")
def notes(tmp_path_factory) -> Path:
    """A folder of text: 150 passages, each with a heading that asks for it."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("notes")
    for file in range(3):
        parts = []
        for part in range(50):
            heading = " ".join(rng.choice(WORDS, 6)) + f" {file} {part}"
            parts += [heading, " ".join(rng.choice(WORDS, 90)) + "."]
        (folder / f"{file}.txt").write_text("\n\n".join(parts))
    return folder


@pytest.fixture(scope="module")
def beir(tmp_path_factory) -> Path:
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("beir")
    (folder / "qrels").mkdir()
    docs = [{"_id": f"d{i}", "text": " ".join(rng.choice(WORDS, 12))} for i in range(60)]
    queries = [{"_id": f"q{i}", "text": docs[i]["text"][:30]} for i in range(20)]
    for name, rows in (("corpus", docs), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    labels = "\n".join(f"q{i}\td{i}\t1" for i in range(20))
    for split in ("train", "test"):
        (folder / "qrels" / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{labels}\n")
    return folder


def run(*words, code=0, stdin=None):
    done = CliRunner().invoke(app, [str(w) for w in words], input=stdin)
    assert done.exit_code == code, done.output
    return done


def said(*words, **more):
    return json.loads(run(*words, "--json", **more).stdout)


def refused(*words, **more):
    """Return the one sentence that a refused command prints; nothing else may be printed."""
    done = run(*words, code=2, **more)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def docs(model, beir, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vectors") / "docs.safetensors"
    run("embed", beir, "-o", path, "--model", model)
    return path


@pytest.fixture(scope="module")
def asks(model, beir, docs) -> Path:
    run("embed", beir, "-o", docs.with_name("asks.npz"), "--model", model, "--role", "query")
    return docs.with_name("asks.npz")


@pytest.mark.parametrize(
    "name", ["embed", "fit", "transform", "measure", "search", "export", "demo"]
)
def test_help_shows_examples(name):
    assert f"nestvec {name} " in run(name, "--help").output.partition("Examples:")[2]


def test_text_to_search_in_four_commands(model, notes, tmp_path):
    vectors, nest, nested = tmp_path / "v.safetensors", tmp_path / "nest", tmp_path / "n.parquet"
    embedded = said("embed", notes, "-o", vectors, "--model", model)
    assert embedded["n"] == len(nv.load(vectors)) > 100
    assert embedded["n_cut"] > 0  # the tiny model reads 32 tokens
    fitted = said("fit", vectors, "-o", nest, "--method", "principal", "--dims", "4,8,32")
    assert fitted["dims"] == [4, 8, 32]
    said("transform", vectors, "--map", nest, "-o", nested)
    assert nv.load(nested).space.space_id == fitted["space"]["space_id"]
    texts = nv.read_texts(notes)
    found = said(
        "search", nested, texts.texts[7], "--model", model, "--map", nest,
        "--plan", "8:int8@40 > 32@3", "--texts", notes,
    )  # fmt: skip
    assert found["plan"] == "exact 8:int8@40 > 32@3"
    assert found["macs_per_query"] == embedded["n"] * 8 + 40 * 32
    assert len(found["queries"][0]["hits"]) == 3


def test_fit_with_labels_and_a_guard(docs, asks, beir, tmp_path):
    fitted = said(
        "fit", docs, "-o", tmp_path / "nest", "--dims", "8,32",
        "--queries", asks, "--qrels", beir / "qrels/train.tsv",
    )  # fmt: skip
    assert fitted["guard"]["winner"] in ("unchanged", "rotation", "learned")
    assert nv.load_map(tmp_path / "nest").content_hash == fitted["content_hash"]


def test_measure_takes_every_task(docs, asks, beir, tmp_path):
    rng = np.random.default_rng(0)
    classes = "\n".join(map(str, rng.integers(3, size=60)))
    (tmp_path / "labels.txt").write_text(classes)
    (tmp_path / "scores.txt").write_text("\n".join(map(str, rng.random(60))))
    tasks = {
        "nDCG@10": ["--queries", asks, "--qrels", beir / "qrels/test.tsv"],
        "accuracy_1nn": [
            "--labels", tmp_path / "labels.txt", "--test", docs,
            "--test-labels", tmp_path / "labels.txt",
        ],
        "spearman": ["--second", docs, "--scores", tmp_path / "scores.txt"],
        "neighbour_recall@10": [],
    }  # fmt: skip
    for metric, options in tasks.items():
        found = said("measure", docs, *options, "--baselines", "truncation", "--dims", "8,32")
        assert metric in {row["metric"] for row in found["rows"]}
        assert found["verdict"]


def test_measure_embeds_a_beir_folder_once(model, beir, tmp_path):
    words = ["measure", beir, "--model", model, "--work", tmp_path / "w", "--baselines", "none"]
    run(*words, "-o", tmp_path / "c.csv", "--html", tmp_path / "r.html")
    assert (tmp_path / "c.csv").read_text().startswith("dataset,method,")
    page = (tmp_path / "r.html").read_text()
    assert not re.search(r"(src|href)\s*=\s*.?(https?:)?//|@import|url\(http", page)
    again = run(*words)
    assert "read again" in again.stderr


def test_queries_come_from_stdin_too(model, docs):
    found = said("search", docs, "-", "--model", model, "-k", 2, stdin="wing flow\n\nheat shock\n")
    assert [q["query"] for q in found["queries"]] == ["wing flow", "heat shock"]


def test_the_demo_on_ones_own_folder(model, notes, tmp_path):
    found = said(
        "demo", notes, "-o", tmp_path / "out", "--model", model, "--query", "wing in heat",
    )  # fmt: skip
    page = (tmp_path / "out/report.html").read_text()
    assert found["verdict"].split(":")[0] in page
    assert "wing in heat" in page
    assert found["answers"][0]["hits"]
    assert 0 <= found["cascade"]["recall"] <= 1
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"curve.json", "map", "report.html"}


def test_embed_with_a_map_leaves_only_the_mapped_vectors(model, beir, docs, tmp_path):
    nv.PrincipalRotation().fit(nv.load(docs)).save(tmp_path / "nest")
    run("embed", beir, "-o", tmp_path / "v.npz", "--model", model, "--map", tmp_path / "nest")
    got = nv.load(tmp_path / "v.npz")
    want = nv.load_map(tmp_path / "nest").transform(nv.load(docs))
    assert got.space == want.space
    np.testing.assert_allclose(got.array, want.array, atol=1e-5)
    assert {p.name for p in tmp_path.iterdir()} == {"v.npz", "nest"}


def test_words_follow_the_gallerys_prompts_length_and_cut(model, beir, tmp_path):
    settings = ["--query-prompt", "of the ", "--max-length", 16, "--model", model]
    run("embed", beir, "-o", tmp_path / "v.npz", *settings)
    nv.load(tmp_path / "v.npz").prefix(5, allow_untrained=True).save(tmp_path / "cut.npz")
    words = ["search", tmp_path / "cut.npz", "wing", "--model", model]
    assert "two models" in refused(*words, "--allow-untrained")  # another maximum length
    found = said(*words, "--max-length", 16, "--allow-untrained", "--texts", beir)
    assert len(found["queries"][0]["hits"]) == 10


def test_fit_leaves_a_foreign_folder_alone(docs, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    assert "thesis.txt" in refused("fit", docs, "-o", tmp_path, "--method", "principal")
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_plain_file_is_stamped(tmp_path):
    np.savez(tmp_path / "p.npz", vectors=np.eye(3))
    said("transform", tmp_path / "p.npz", "--model-name", "m", "-o", tmp_path / "s.npz")
    assert nv.load(tmp_path / "s.npz").space.model == "m"


def _vectors(path, values, dim=None):
    space = nv.Space.declared("m", dim=dim or values.shape[1], normalisation="none")
    return nv.Embeddings(values, space).save(path)


def bad_inputs(tmp_path, docs, beir):
    """Command words -> what the sentence has to say."""
    rng = np.random.default_rng(0)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\n\t\n")
    (tmp_path / "none.jsonl").write_text('{"id": 1, "text": ""}\n')
    (tmp_path / "twice.jsonl").write_text('{"id": 1, "text": "a wing"}\n' * 2)
    (tmp_path / "notmodel").mkdir()
    (tmp_path / "few.md").write_text("A heading of five words\n\n" + "wing " * 90)
    for folder in ("a", "b"):
        nv.PrincipalRotation().fit(nv.load(docs)).save(tmp_path / folder / "m")
    (tmp_path / "unknown.tsv").write_text("q\td\ts\nq1\tnowhere\t1\n")
    whole = docs.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    nv.load(docs).save(tmp_path / "x.parquet")
    parquet = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(parquet[: len(parquet) // 2])
    np.save(tmp_path / "plain.npy", rng.normal(size=(30, 8)))
    np.save(tmp_path / "nan.npy", np.where(rng.random((30, 8)) < 0.1, np.nan, 1.0))
    np.save(tmp_path / "zero.npy", np.zeros((3, 8)))
    _vectors(tmp_path / "other.npz", rng.normal(size=(30, 32)))
    asks = tmp_path / "other.npz"
    qrels = beir / "qrels/test.tsv"
    out = ["-o", tmp_path / "o.npz"]
    t = tmp_path
    named = ["--model-name", "m"]
    return [
        (["embed", t / "empty.txt", *out], "empty"),
        (["embed", t / "blank.txt", *out], "no text"),
        (["embed", t / "none.jsonl", *out], "no text"),
        (["embed", t / "nowhere.txt", *out], "nowhere.txt"),
        (["embed", beir, *out, "--model", t / "notmodel"], "not a model folder"),
        (["embed", beir, "-o", t / "o.csv"], "choose one of"),
        (["measure", t / "plain.npy"], "--model-name"),
        (["measure", t / "nan.npy", *named], "NaN"),
        (["measure", t / "zero.npy", *named], "all zeros"),
        (["measure", t / "cut.safetensors"], "truncated, damaged"),
        (["measure", t / "cut.parquet"], "truncated, damaged"),
        (["measure", docs, "--queries", asks], "--qrels"),
        (["measure", docs, "--queries", asks, "--qrels", qrels], "two spaces"),
        (["measure", docs, "--queries", docs, "--qrels", t / "unknown.tsv"], "ids are not among"),
        (["measure", docs, "--dims", "8,99"], "does not fit embeddings of dim 32"),
        (["measure", docs, "--dims", "eight"], "not whole numbers"),
        (["measure", docs, "--baselines", "magic"], "magic"),
        (["measure", docs, "-o", t / "rows.xml"], ".json or .csv"),
        (["fit", docs, "-o", t / "m", "--method", "magic"], "adaptor, principal, random"),
        (["fit", docs, "-o", t / "m", "--queries", asks], "--qrels"),
        (["transform", docs, "-o", t / "o.npz", "--dim", "8"], "not known to be nested"),
        (["transform", docs, "-o", t / "o.npz", "--map", t / "notmodel"], "notmodel"),
        (["search", docs, "--queries", asks], "two spaces"),
        (["search", docs, "--queries", docs, "--plan", "64@5"], "does not fit"),
        (["search", docs, "--queries", docs, "--plan", "lots"], "has no stages"),
        (["search", docs, "words"], "--model"),
        (["demo", t / "empty.txt", "-o", t / "d"], "empty"),
        (["demo", t / "few.md", "-o", t / "d"], "too few to measure on"),
        (["embed", beir, *out, "--map", t / "notmodel"], "notmodel"),
        (["measure", beir, "--queries", asks, "--qrels", qrels], "leave out --queries"),
        (["measure", docs, "--split", "dev"], "--split is for BEIR folders"),
        (["measure", docs, "--map", t / "a/m", "--map", t / "b/m"], "NAME=FOLDER"),
        (["search", t / "plain.npy", "words", *named], "stamped by name"),
        (["transform", docs, "-o", t / "o.safetensors"], "nothing to do"),
    ]


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, docs, beir):
    for words, says in bad_inputs(tmp_path, docs, beir):
        assert says in refused(*words), words
    assert not (tmp_path / "o.npz").exists()


def test_a_refused_command_leaves_the_old_output(docs, tmp_path):
    old = tmp_path / "o.npz"
    _vectors(old, np.eye(3))
    before = old.read_bytes()
    refused("transform", docs, "--dim", "7", "-o", old)
    assert old.read_bytes() == before


def test_control_c_half_way_keeps_what_was_finished(model, tmp_path):
    rng = np.random.default_rng(0)
    lines = [json.dumps({"id": i, "text": " ".join(rng.choice(WORDS, 20))}) for i in range(900)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    words = [
        *NESTVEC, "embed", str(tmp_path / "t.jsonl"), "-o", str(tmp_path / "v.npz"),
        "--model", str(model), "--batch-size", "2", "--json",
    ]  # fmt: skip
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while len(list((tmp_path / "v.npz.partial").glob("*.npy"))) < 3:
        assert time.monotonic() < deadline
        assert child.poll() is None, child.communicate()
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "the same command goes on" in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "v.npz").exists()
    kept = len(list((tmp_path / "v.npz.partial").glob("*.npy")))
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["n"] == 900
    assert f"{kept * 32:,} of them from an earlier run" in done.stderr


def test_a_reader_that_leaves_early_is_no_error(docs):
    line = f"{sys.executable} -m nestvec measure {docs} --json --baselines none | head -c 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_one_sentence_and_keeps_the_old_file(docs, tmp_path, mounted):
    small = tmp_path / "small"
    mounted(small, "-t", "tmpfs", "-o", "size=64k", "none")
    old = _vectors(small / "o.npz", np.eye(3)).read_bytes()
    rng = np.random.default_rng(0)
    big = _vectors(tmp_path / "big.npz", rng.normal(size=(2000, 32)))
    sentence = refused("transform", big, "-o", small / "o.npz", "--dim", "32")
    assert "no space left" in sentence
    assert (small / "o.npz").read_bytes() == old
    assert [p.name for p in small.iterdir()] == ["o.npz"]
