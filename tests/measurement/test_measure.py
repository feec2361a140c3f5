"""measure() puts the right numbers in the right rows, and refuses what it cannot measure."""

import csv
import sys

import numpy as np
import oracle
import pytest
from rich.console import Console

from nestvec.errors import (
    DataError,
    DimensionError,
    FileFormatError,
    SpaceError,
    SpaceMismatchError,
)
from nestvec.maps import PrincipalRotation
from nestvec.measurement import (
    ClassificationTask,
    Curve,
    LabelFreeTask,
    RetrievalTask,
    STSTask,
    measure,
)
from nestvec.measurement.curve import KEYS
from nestvec.space import Embeddings, Space

CHEAP = ("truncation", "int8", "binary")
SPACE = Space.declared("made-up", dim=32, normalisation="none")


@pytest.fixture
def found(rng):
    """500 documents, 60 queries near one of them each, energy in the first dims."""
    scale = 1 / np.arange(1, 33) ** 0.5
    docs = rng.normal(size=(500, 32)) * scale
    asked = rng.choice(500, 60, replace=False)
    queries = docs[asked] + 0.35 * rng.normal(size=(60, 32)) * scale
    qrels = {f"q{i}": {f"d{row}": 1, f"d{(row + 1) % 500}": 0} for i, row in enumerate(asked)}
    return (
        Embeddings(docs, SPACE, [f"d{i}" for i in range(500)]),
        Embeddings(queries, SPACE, [f"q{i}" for i in range(60)]),
        qrels,
    )


@pytest.fixture
def curve(found):
    return measure(*found, dims=(4, 16), baselines=CHEAP, dataset="made up")


def test_retrieval_row_is_the_search_judged_by_hand(found, curve):
    docs, queries, qrels = found
    for dim in (4, 16, 32):
        cut = [e.prefix(dim, allow_untrained=True).normalised().array for e in (queries, docs)]
        order = np.argsort(-(cut[0] @ cut[1].T), axis=1, kind="stable")
        by_hand = [
            oracle.ndcg_by_hand([f"d{row}" for row in rows], qrels[f"q{i}"], 10)
            for i, rows in enumerate(order)
        ]
        row = curve.get("full" if dim == 32 else "truncation", dim, "nDCG@10")
        np.testing.assert_allclose(row["value"], np.mean(by_hand), atol=1e-6)
        assert row["low"] <= row["value"] <= row["high"]


def test_every_row_has_every_key_and_its_cost(curve):
    for row in curve.rows:
        assert tuple(row) == KEYS
        assert row["n"] == 60
    cut = curve.get("truncation", 16)
    assert (cut["bytes_per_vector"], cut["macs_per_query"]) == (64, 500 * 16)
    assert curve.get("int8", 16)["bytes_per_vector"] == 16
    assert curve.get("binary", 16)["bytes_per_vector"] == 2


def test_difference_is_value_minus_full(curve):
    for row in curve.rows:
        full = curve.get("full", metric=row["metric"])["value"]
        np.testing.assert_allclose(row["difference"], row["value"] - full, atol=1e-12)
    assert curve.get("full")["difference_low"] == curve.get("full")["difference_high"] == 0


def test_queries_in_another_order_measure_the_same(found, curve):
    docs, queries, qrels = found
    again = measure(docs, queries[::-1], qrels, dims=(4, 16), baselines=CHEAP)
    for row, other in zip(curve.rows, again.rows, strict=True):
        np.testing.assert_allclose(row["value"], other["value"])


def test_same_seed_measures_the_same(found):
    one, two = (
        measure(*found, dims=(8,), baselines=("truncation", "random_rotation", "csr"), seed=3)
        for _ in range(2)
    )
    assert one.rows == two.rows


def test_map_stands_in_the_table_under_its_name(found):
    docs, queries, qrels = found[0].normalised(), found[1].normalised(), found[2]
    rotation = PrincipalRotation().fit(docs)
    with_map = measure(docs, queries, qrels, dims=(8,), maps={"mine": rotation}, baselines=CHEAP)
    baseline = measure(docs, queries, qrels, dims=(8,), baselines=("principal_rotation",))
    np.testing.assert_allclose(
        with_map.get("mine", 8)["value"], baseline.get("principal_rotation", 8)["value"], atol=0.02
    )
    assert with_map.get("mine", 8, precision="int8")["bytes_per_vector"] == 8
    np.testing.assert_allclose(with_map.get("mine", 32)["difference"], 0, atol=1e-9)


def test_all_baselines_stand_in_one_table(found):
    docs, queries, qrels = found
    texts = [f"word{i} common" for i in range(500)], [f"word{i}" for i in range(60)]
    everything = measure(docs, queries, qrels, dims=(8, 16), texts=texts)
    assert list(dict.fromkeys(r["method"] for r in everything.rows)) == [
        "full", "truncation", "random_rotation", "principal_rotation", "int8", "binary",
        "product_quantisation", "csr", "bm25", "bm25_fusion",
    ]  # fmt: skip
    assert everything.get("csr")["bytes_per_vector"] == 32
    assert everything.get("bm25")["macs_per_query"] is None
    text = printed(everything.table(), width=100)
    assert max(map(len, text.splitlines())) <= 100
    assert "product_quantisation" in text


def test_word_matching_that_finds_nothing_scores_nothing(found):
    docs, queries, qrels = found
    texts = ["the of"] * 500, ["and"] * 60
    names = ("truncation", "bm25", "bm25_fusion")
    got = measure(docs, queries, qrels, dims=(8,), texts=texts, baselines=names)
    assert got.get("bm25")["value"] == 0
    assert got.get("bm25_fusion")["value"] == got.get("full")["value"]


def test_word_matching_without_texts_leaves_a_note(found):
    docs, queries, qrels = found
    got = measure(docs, queries, qrels, dims=(8,), baselines=("bm25",))
    assert got.notes == [
        "bm25 not in the table: retrieval with texts=(documents, queries) is needed."
    ]
    assert measure(docs, dims=(8,), baselines=("bm25",)).notes == got.notes
    everything = measure(docs[:50], queries, {"q0": {str(docs.ids[0]): 1}}, dims=(8,))
    assert any(
        note.startswith("bm25 and bm25_fusion not in the table") for note in everything.notes
    )
    assert measure(docs[:50], dims=(8,)).notes == []


def test_map_whose_name_ends_in_rotation_is_taken_as_it_is(rng):
    class Squeeze:
        def transform(self, vectors):
            return Embeddings(vectors.array / np.arange(1, 33), vectors.space, vectors.ids)

    rows = Embeddings(rng.normal(size=(80, 32)), SPACE)
    got = measure(rows, dims=(8,), maps={"my_rotation": Squeeze()}, baselines=False)
    assert got.spectrum["my_rotation"][0] > 2 * got.spectrum["full"][0]
    assert got.get("my_rotation", 32, "rankme")["value"] < got.get("full", metric="rankme")["value"]


def test_missing_extra_leaves_a_note_and_not_an_error(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    got = measure(*found, dims=(8,), baselines=("truncation", "product_quantisation"))
    assert {r["method"] for r in got.rows} == {"full", "truncation"}
    assert any("product_quantisation is not in the table" in n for n in got.notes)
    assert any("pip install 'nestvec[index]'" in n for n in got.notes)


def test_without_labels_the_full_size_neighbours_are_the_truth(rng):
    vectors = rng.normal(size=(80, 32)) / np.arange(1, 33)
    got = measure(vectors, dims=(4, 8), k=5, baselines=CHEAP)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cut = vectors[:, :8] / np.linalg.norm(vectors[:, :8], axis=1, keepdims=True)
    truth, found = oracle.neighbours_by_hand(unit, 5), oracle.neighbours_by_hand(cut, 5)
    kept = np.mean([len({*t} & {*f}) / 5 for t, f in zip(truth, found, strict=True)])
    np.testing.assert_allclose(got.get("truncation", 8)["value"], kept)
    near = np.mean([abs(cut[i] @ cut[j] - unit[i] @ unit[j]) for i in range(80) for j in truth[i]])
    np.testing.assert_allclose(
        got.get("truncation", 8, "distortion_near")["value"], near, atol=1e-6
    )
    rank = oracle.rankme_by_hand(cut)
    np.testing.assert_allclose(got.get("truncation", 8, "rankme")["value"], rank, rtol=1e-4)
    assert got.get("full")["value"] == 1
    assert got.get("full", metric="distortion_random")["value"] == 0
    assert {r["dim"] for r in got.select("rankme_block")} == {4, 8, 32}
    np.testing.assert_allclose(sum(got.spectrum["full"]), 1)


def test_many_documents_are_sampled_and_it_is_said(rng):
    task = LabelFreeTask(rng.normal(size=(1500, 8)))
    got = measure(task=task, dims=(4,), baselines=False)
    assert got.get("truncation", 4)["n"] == 1000
    assert "1,000 of 1,500 documents" in got.notes[0]


def test_classification_counts_right_answers(rng):
    labels = rng.integers(0, 4, 300)
    rows = rng.normal(size=(300, 16)) + 1.5 * np.eye(16)[labels]
    task = ClassificationTask(rows[:200], labels[:200], rows[200:], labels[200:], k=5)
    got = measure(task=task, dims=(4,), baselines=CHEAP)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    order = np.argsort(-(unit[200:] @ unit[:200].T), axis=1)
    one = np.mean(labels[:200][order[:, 0]] == labels[200:])
    np.testing.assert_allclose(got.get("full", metric="accuracy_1nn")["value"], one)
    assert got.get("full", metric="accuracy_5nn")["value"] > one
    assert got.get("full", metric="accuracy_linear_probe")["value"] > 0.6
    assert got.get("full", metric="accuracy_linear_probe")["macs_per_query"] == 4 * 16


def test_tied_vote_goes_to_the_class_that_is_nearest():
    train = np.array([[1, 0], [0.99, 0.1], [0.8, 0.6], [0.7, 0.7]], np.float32)
    test = np.array([[1, 0]], np.float32)
    task = ClassificationTask(train, ["b", "a", "a", "b"], test, ["b"], k=4)
    assert task.score(test, train)["accuracy_4nn"] == [1.0]


def test_sts_is_spearman_of_the_cosine(rng):
    first = rng.normal(size=(150, 16))
    second = first + rng.normal(size=(150, 16)) * rng.uniform(0.2, 3, size=(150, 1))
    cosine = (
        (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    )
    gold = cosine + 0.1 * rng.normal(size=150)
    got = measure(task=STSTask(first, second, gold), dims=(4, 8), baselines=CHEAP)
    np.testing.assert_allclose(got.get("full")["value"], oracle.spearman(cosine, gold), atol=1e-6)
    row = got.get("full")
    assert row["low"] < row["value"] < row["high"]
    assert row["macs_per_query"] == 16


def made(**values):
    """A curve of truncation at 8 and 16 of 32 dims: method_dim=(value, difference_low)."""
    rows = [
        dict.fromkeys(KEYS)
        | {"method": name.split("_")[0], "dim": int(name.split("_")[1]), "metric": "nDCG@10"}
        | {"precision": "float32", "value": value, "difference": value - 0.6}
        | {"difference_low": low, "difference_high": 0.0, "bytes_per_vector": 4, "n": 100}
        for name, (value, low) in values.items()
    ]
    rows.append(rows[0] | {"method": "full", "dim": 32, "value": 0.6, "difference_low": 0.0})
    meta = {"metric": "nDCG@10", "metrics": ["nDCG@10"], "dims": [8, 16, 32], "dataset": ""}
    return Curve(rows, {**meta, "n_gallery": 500, "deployable": ["truncation", "mine"]})


def test_verdict_is_the_smallest_size_that_surely_holds():
    got = made(truncation_8=(0.595, -0.031), truncation_16=(0.58, -0.029), mine_16=(0.59, -0.02))
    assert got.verdict() == "cut to 16 with mine: 2x smaller, nDCG@10 0.590 of 0.600"
    assert got.verdict(tolerance=0.1) == "cut to 8: 4x smaller, nDCG@10 0.595 of 0.600"


def test_verdict_says_so_if_nothing_holds():
    got = made(truncation_8=(0.5, -0.12), truncation_16=(0.58, -0.04))
    assert got.verdict() == (
        "keep all 32 dims: no cut surely holds nDCG@10 within 5%; the nearest, 16, has 0.580 of "
        "0.600 (difference -0.020, 95% interval -0.040 to +0.000)"
    )


def test_few_queries_decide_nothing(found):
    docs, queries, qrels = found
    for n, says in ((1, "too few items, nDCG@10 was scored on 1 and 30"), (29, "scored on 29")):
        few = {q: of for q, of in list(qrels.items())[:n]}
        got = measure(docs, queries, few, dims=(16,), baselines=("truncation", "int8"))
        assert says in got.verdict()
        assert got.verdict().startswith("keep all 32 dims")
        assert got.cut() is None
        assert not any(got.holds(row) for row in got.rows)
    enough = measure(docs, queries, dict(list(qrels.items())[:30]), dims=(31,), baselines=False)
    assert enough.verdict().startswith("cut to 31")


def test_nothing_holds_if_the_full_size_finds_nothing(found):
    docs, queries, _ = found
    farthest = (queries.array @ docs.array.T).argmin(axis=1)
    qrels = {f"q{i}": {f"d{row}": 1} for i, row in enumerate(farthest)}
    got = measure(docs, queries, qrels, dims=(16,), baselines=False)
    assert got.verdict() == (
        "keep all 32 dims: nDCG@10 is 0.000 at the full size, so there is nothing to hold"
    )
    assert not any(got.holds(row) for row in got.rows)


def test_neighbours_that_are_all_other_rows_decide_nothing(rng):
    rows = rng.normal(size=(40, 32))
    got = measure(rows, dims=(16,), k=39, baselines=False)
    assert got.get("truncation", 16)["value"] == 1
    assert "too few items, neighbour_recall@39 among 40 vectors" in got.verdict()
    assert not got.holds(got.get("truncation", 16))


def test_a_row_is_held_against_the_full_value_of_its_own_metric():
    got = made(truncation_16=(0.6, 0.0))
    high, low = (
        [row | {"metric": metric, "difference_low": -0.02} for row in got.rows]
        for metric in ("R@100", "AP@10")
    )
    high[-1]["value"], low[-1]["value"] = 0.9, 0.1
    got.rows += high + low
    assert got.holds(high[0])  # 0.02 of 0.9
    assert not got.holds(low[0])  # 0.02 of 0.1


def test_less_distortion_is_not_quality_that_holds(rng):
    got = measure(rng.normal(size=(80, 32)), dims=(16,), baselines=False)
    for metric in ("distortion_near", "distortion_random"):
        assert not any(got.holds(row) for row in got.select(metric))


def test_verdict_is_not_about_baselines():
    got = made(truncation_16=(0.5, -0.12), rotated_8=(0.6, -0.001))
    assert got.verdict().startswith("keep all 32 dims")


def test_json_round_trip_is_identity(curve, tmp_path):
    again = Curve.from_json(curve.to_json(tmp_path / "curve.json"))
    assert again == curve
    assert again.verdict() == curve.verdict()


def test_file_that_is_no_curve_is_refused(tmp_path):
    path = tmp_path / "curve.json"
    for text in ("", "[]", '{"rows": []}', '{"format": "nestvec curve 99"}'):
        path.write_text(text)
        with pytest.raises(FileFormatError, match=r"curve\.json"):
            Curve.from_json(path)


def test_csv_holds_every_row(curve, tmp_path):
    with curve.to_csv(tmp_path / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(curve.rows)
    assert tuple(rows[0]) == KEYS
    assert float(rows[3]["value"]) == curve.rows[3]["value"]


def test_get_names_what_there_is(curve):
    with pytest.raises(DataError, match="Methods: full, truncation, int8, binary"):
        curve.get("pca", 16)
    with pytest.raises(DataError, match="2 rows of 'truncation' fit"):
        curve.get("truncation")


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (
            lambda q: q | {"q0": {"d999": 1, "d998": 1}},
            r"2 ids are not among the ids of docs.*d998",
        ),
        (lambda q: q | {"x7": {"d1": 1}}, r"1 ids are not among the ids of queries.*x7"),
        (lambda q: {"q1": {"d1": 0}}, "no query has a relevant document"),
        (lambda q: {}, "no query has a relevant document"),
    ],
    ids=["unknown-document", "unknown-query", "no-relevant", "empty"],
)
def test_bad_qrels_are_refused(found, break_it, says):
    docs, queries, qrels = found
    with pytest.raises(DataError, match=says):
        measure(docs, queries, break_it(qrels))


def test_dropped_document_may_be_judged_and_counts_against_recall(found):
    docs, queries, qrels = found
    wider = {q: of | {"empty": 1} for q, of in qrels.items()}
    with pytest.raises(DataError, match=r"1 ids are not among the ids of docs.*empty"):
        measure(docs, queries, wider, dims=(16,), baselines=False)
    got = measure(docs, queries, wider, dropped=("empty", "d1"), dims=(16,), baselines=False)
    plain = measure(docs, queries, qrels, dims=(16,), baselines=False)
    for metric in ("R@10", "R@100"):
        full, before = got.get("full", metric=metric), plain.get("full", metric=metric)
        np.testing.assert_allclose(full["value"], before["value"] / 2)
    assert got.get("full")["value"] < plain.get("full")["value"]
    assert "1 relevant documents were dropped and have no vector (e.g. empty)" in got.notes[0]


def test_integer_ids_are_the_row_numbers(rng):
    rows = rng.normal(size=(50, 16))
    got = measure(rows, rows[:3], {0: {0: 1}, 1: {1: 2}}, dims=(8,), baselines=False)
    assert got.get("full")["value"] == 1
    assert got.get("full")["n"] == 2
    text = measure(rows, rows[:3], {"0": {"0": 1}, "1": {"1": 2}}, dims=(8,), baselines=False)
    assert text.rows == got.rows


def test_query_without_relevant_documents_is_not_asked(found):
    docs, queries, qrels = found
    task = RetrievalTask(docs, queries, qrels | {"q0": {"d1": 0}})
    assert len(task.asking) == 59
    assert task.notes == ["1 queries of the qrels have no relevant document."]


def test_two_spaces_are_not_compared(found):
    docs, queries, qrels = found
    other = Embeddings(queries.array, Space.declared("other", dim=32, normalisation="none"))
    with pytest.raises(SpaceMismatchError):
        measure(docs, Embeddings(other.array, other.space, queries.ids), qrels)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda d, q, r: measure(), DataError, "nothing to measure"),
        (lambda d, q, r: measure(d, None, r), DataError, "retrieval needs both"),
        (lambda d, q, r: measure(d[:1]), DataError, "1 row has no neighbours"),
        (lambda d, q, r: measure(d, q, r, dims=(8, 64)), DimensionError, "64 does not fit"),
        (lambda d, q, r: measure(d, q, r, metrics=["nDCG"]), DataError, "has no cutoff"),
        (lambda d, q, r: measure(d, dropped=("d1",)), DataError, "dropped= is for retrieval"),
        (lambda d, q, r: measure(d, texts=(["a"], ["b"])), DataError, "retrieval only"),
        (lambda d, q, r: measure(d, q, r, texts=(["a"], ["b"])), DataError, "1 documents and 1"),
        (
            lambda d, q, r: measure(d, q, r, texts=(["a"] * 500, ["b"] * 180)),
            DataError,
            "180 queries given for 500 and 60 vectors",
        ),
        (lambda d, q, r: measure(d, q, r, k=0), DataError, "k=0: pass 1 or more"),
        (lambda d, q, r: measure(d, k=0), DataError, "k=0: pass 1 or more"),
        (lambda d, q, r: measure(d, n_resamples=0), DataError, "n_resamples=0: pass 1 or more"),
        (
            lambda d, q, r: ClassificationTask(d, [0, 1] * 250, q, ["0", "1"] * 30),
            DataError,
            "no test row is of a class of train_labels.*like '0'.*like 0",
        ),
        (lambda d, q, r: measure(d, q, r, maps={"int8": None}), DataError, "name of a baseline"),
        (lambda d, q, r: measure(d, task=LabelFreeTask(d)), DataError, "carries its own vectors"),
        (lambda d, q, r: measure(np.full((9, 4), np.nan)), DataError, "row 0 holds NaN"),
        (lambda d, q, r: STSTask(d, d, np.ones(500)), DataError, "all equal"),
        (lambda d, q, r: STSTask(d, q, np.ones(500)), DataError, "500 rows and second 60"),
        (lambda d, q, r: ClassificationTask(d, [0] * 500, q, [0] * 60), DataError, "one class"),
        (lambda d, q, r: ClassificationTask(d, [0, 1], q, [0] * 60), DataError, "train_labels"),
    ],
)  # fmt: skip
def test_bad_input_says_what_is_wrong(found, call, error, says):
    with pytest.raises(error, match=says):
        call(*found)


def test_dot_product_of_unnormalised_vectors_is_not_cut(rng):
    space = Space.declared("dot", dim=8, normalisation="none", metric="dot")
    with pytest.raises(SpaceError, match=r"Call normalised\(\) first"):
        measure(Embeddings(rng.normal(size=(20, 8)), space))


def printed(table, *, width):
    console = Console(width=width, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
