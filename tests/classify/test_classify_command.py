"""The command says what the estimator says, on labels of either form."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import nestvec as nv
from nestvec.cli import app

pytestmark = pytest.mark.usefixtures("one_blas_thread")


def run(*words, code=0):
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture
def files(rng, tmp_path):
    """Vectors and labels to learn from and to test on, each label in three forms."""
    space = nv.Space.declared("m", dim=16, nesting_dims=(4, 16))
    for name, n in (("train", 200), ("test", 80)):
        y = rng.integers(3, size=n)
        x = rng.normal(size=(n, 16)) + 3 * np.eye(3, 16)[y]
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        nv.Embeddings(x, space).save(tmp_path / f"{name}.safetensors")
        (tmp_path / f"{name}.txt").write_text("\n".join(f"class {c}" for c in y))
        rows = [{"text": "t", "label": f"class {c}", "intent": int(c)} for c in y]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / f"{name}.csv").write_text("label\n" + "\n".join(f"class {c}" for c in y))
    return tmp_path


def words(folder, ending="txt"):
    return [
        "classify", folder / "train.safetensors", "--labels", folder / f"train.{ending}",
        "--test", folder / "test.safetensors", "--test-labels", folder / f"test.{ending}",
    ]  # fmt: skip


def test_the_command_reports_what_the_estimator_does(files):
    found = json.loads(run(*words(files), "--tolerance", "0.02", "--json").stdout)
    train, test = (nv.load(files / f"{name}.safetensors") for name in ("train", "test"))
    y, truth = ((files / f"{name}.txt").read_text().splitlines() for name in ("train", "test"))
    fitted = nv.AdaptiveClassifier(tolerance=0.02).fit(train, y)
    expected = {**fitted.report(test, truth).to_dict(), "held_out": fitted.held_out_.to_dict()}
    assert found == expected
    shown = run(*words(files), "--tolerance", "0.02").stdout
    assert f"accuracy {found['accuracy']:.4f} at {found['expected_dim']:.1f} expected" in shown


@pytest.mark.parametrize("more", [("jsonl",), ("csv",), ("jsonl", "--label-column", "intent")])
def test_labels_may_stand_in_a_table(files, more):
    ending, *options = more
    lines = json.loads(run(*words(files), "--json").stdout)
    assert json.loads(run(*words(files, ending), *options, "--json").stdout) == lines
    measured = ["measure", *words(files, ending)[1:], *options, "--baselines", "none", "--json"]
    assert json.loads(run(*measured).stdout)["rows"]


def test_labels_that_are_not_there_are_named(files):
    done = run(*words(files, "jsonl"), "--label-column", "kind", code=2)
    assert "row 1 has no 'kind', only 'text', 'label', 'intent'" in done.output
    assert "is for tables" in run(*words(files), "--label-column", "kind", code=2).output
    (files / "train.jsonl").write_text('{"label": "a"}\n{"label": null}')
    assert "row 2 has no label" in run(*words(files, "jsonl"), code=2).output
    (files / "train.jsonl").write_text('{"label": "a"}\n{')
    assert "line 2 is not JSON" in run(*words(files, "jsonl"), code=2).output
    (files / "train.txt").write_text("a\nb")
    assert "2 labels for 200 rows" in run(*words(files), code=2).output


def test_two_spaces_are_refused(files):
    x = nv.load(files / "test.safetensors").array
    nv.Embeddings(x, nv.Space.declared("n", dim=16)).save(files / "test.safetensors")
    assert "two spaces" in run(*words(files), code=2).output
