"""Every layer at every size: each cell is what that layer's vectors alone are worth."""

import json

import numpy as np
import pytest

import nestvec as nv
from nestvec.errors import DataError, DimensionError
from nestvec.measurement import STSTask

pytest.importorskip("ir_measures", reason="nestvec[measure]")

DIMS = (4, 8)
QUICK = {"dims": DIMS, "baselines": False, "n_resamples": 50}


@pytest.fixture(scope="module")
def layers():
    """Three layers of 40 documents and 30 queries of 16 numbers, the later the less noise."""
    rng = np.random.default_rng(0)
    truth, asked = rng.normal(size=(40, 16)), rng.permutation(40)[:30]
    found = {}
    for layer, noise in ((1, 2.0), (2, 1.0), (3, 0.5)):
        sides = (truth + noise * rng.normal(size=(40, 16)),
                 truth[asked] + noise * rng.normal(size=(30, 16)))  # fmt: skip
        found[layer] = tuple(
            nv.Embeddings(
                side, nv.Space(fingerprint="x", dim=16, layer=layer, normalisation="none")
            )
            for side in sides
        )
    return found, {q: {int(d): 1} for q, d in enumerate(asked)}


def test_each_cell_is_the_measure_of_its_layer_alone(layers):
    sides, qrels = layers
    curve = nv.measure(qrels=qrels, layers=sides, **QUICK)
    assert curve.meta["layers"] == [1, 2, 3]
    for layer, (docs, queries) in sides.items():
        alone = nv.measure(docs, queries, qrels, **QUICK)
        for dim in (*DIMS, 16):
            method = "full" if dim == 16 else "truncation"
            got = curve.get(method, dim, layer=layer)
            assert got["value"] == pytest.approx(alone.get(method, dim)["value"], abs=1e-12)
            assert got["layer"] == (None if layer == 3 else layer)
    docs, queries = sides[3]
    last = nv.measure(docs, queries, qrels, **QUICK)
    assert [row["dim"] for row in curve.select()] == [row["dim"] for row in last.select()]
    assert curve.verdict() == last.verdict()


def test_differences_are_to_the_full_size_of_the_last_layer(layers):
    sides, qrels = layers
    curve = nv.measure(qrels=qrels, layers=sides, **QUICK)
    full = curve.get("full")["value"]
    for row in curve.select(layer=1):
        assert row["difference"] == pytest.approx(row["value"] - full)


def test_without_labels_a_layer_keeps_neighbours_of_the_last(layers):
    sides = {layer: (docs,) for layer, (docs, _) in layers[0].items()}
    curve = nv.measure(layers=sides, **QUICK)
    rows = {layer: docs.normalised().array for layer, (docs,) in sides.items()}
    near = {}
    for layer, x in rows.items():
        scores = x @ x.T
        np.fill_diagonal(scores, -np.inf)
        near[layer] = np.argsort(-scores, axis=1)[:, :10]
    want = np.mean([len({*a} & {*b}) / 10 for a, b in zip(near[1], near[3], strict=True)])
    assert curve.get("full", layer=1)["value"] == pytest.approx(want)
    assert curve.get("full", layer=3)["value"] == 1.0


def test_a_task_of_pairs_has_layers_too(layers):
    pairs = {layer: (docs[:30], queries) for layer, (docs, queries) in layers[0].items()}
    gold = np.random.default_rng(1).normal(size=30)
    curve = nv.measure(task=STSTask(*pairs[3], gold), layers=pairs, **QUICK)
    alone = nv.measure(task=STSTask(*pairs[2], gold), **QUICK)
    want = alone.get("truncation", 4)["value"]
    assert curve.get("truncation", 4, layer=2)["value"] == pytest.approx(want, abs=1e-12)


def test_the_table_and_the_report_show_the_grid_with_its_costs(layers, tmp_path):
    rich = pytest.importorskip("rich.console")
    sides, qrels = layers
    curve = nv.measure(qrels=qrels, layers=sides, **QUICK)
    console = rich.Console(width=100, record=True, file=(tmp_path / "x").open("w"))
    console.print(curve.layer_table())
    text = console.export_text()
    assert "1/3" in text
    assert f"{curve.get('truncation', 4, layer=2)['value']:.3f}" in text
    again = nv.Curve.from_json(curve.to_json(tmp_path / "curve.json"))
    assert again.layer_grid() == curve.layer_grid()
    assert {layer: set(cells) for layer, cells in again.layer_grid()} == {
        layer: {4, 8, 16} for layer in (1, 2, 3)
    }
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    assert "by layer</h2>" in curve.report(tmp_path / "r.html").read_text()


def test_layers_that_do_not_fit_are_refused(layers):
    sides, qrels = layers
    docs, queries = sides[3]
    with pytest.raises(DataError, match=r"layers \[0, 3\] do not fit"):
        nv.measure(qrels=qrels, layers={0: sides[1], 3: sides[3]}, **QUICK)
    with pytest.raises(DataError, match="is to come with its two sides"):
        nv.measure(qrels=qrels, layers={1: docs, 3: sides[3]}, **QUICK)
    other = {1: (docs[::-1], queries), 3: sides[3]}
    with pytest.raises(DataError, match="are not those of the last layer"):
        nv.measure(qrels=qrels, layers=other, **QUICK)
    short = [side.prefix(8, allow_untrained=True) for side in sides[1]]
    with pytest.raises(DimensionError, match="has vectors of 8 dims and the last layer of 16"):
        nv.measure(qrels=qrels, layers={1: short, 3: sides[3]}, **QUICK)


def test_the_command_measures_every_layer_in_one_pass(tmp_path):
    pytest.importorskip("torch", reason="nestvec[text]")
    pytest.importorskip("sentence_transformers", reason="nestvec[text]")
    import tiny_model
    from typer.testing import CliRunner

    from nestvec.cli import app

    model = tiny_model.build(tmp_path / "tiny")
    rng = np.random.default_rng(1)
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    docs = [{"_id": f"d{i}", "text": " ".join(rng.choice(tiny_model.WORDS, 9))} for i in range(40)]
    asks = [{"_id": f"q{i}", "text": docs[i]["text"][:30]} for i in range(10)]
    for name, rows in (("corpus", docs), ("queries", asks)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    judged = "\n".join(f"q{i}\td{i}\t1" for i in range(10))
    (folder / "qrels/test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}\n")
    words = ["measure", folder, "--model", model, "--layers", "1", "--work", tmp_path / "work",
             "--dims", "8", "--baselines", "none", "--json"]  # fmt: skip
    CliRunner().invoke(app, [str(word) for word in words])
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert "40 of them from an earlier run" in done.stderr
    rows = json.loads(done.stdout)["rows"]
    found = {(row["layer"], row["dim"]) for row in rows if row["metric"] == "nDCG@10"}
    assert found == {(None, 8), (None, 32), (1, 8), (1, 32)}
    done = CliRunner().invoke(app, ["measure", str(tmp_path / "x.npz"), "--layers", "all"])
    assert done.exit_code == 2
    assert "is for BEIR folders" in done.stderr
