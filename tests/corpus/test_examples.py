"""Texts to train on are read by the names of their columns, and a bad row is named."""

import gzip
import json

import numpy as np
import pytest

from nestvec.corpus.examples import read_examples
from nestvec.errors import DataError, FileFormatError, StorageError


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PAIR = {"anchor": "a wing", "positive": "the lift"}


@pytest.mark.parametrize(
    ("row", "kind", "n_texts"),
    [
        (PAIR, "pairs", 2),
        ({**PAIR, "negative": "a cat"}, "triplets", 3),
        ({"sent1": "a", "sent2": "b", "score": "3.5", "entailment": "x"}, "scored", 2),
        ({"query": "q", "document": "d", "id": 3}, "pairs", 2),
    ],
)
def test_the_columns_say_what_a_file_holds(tmp_path, row, kind, n_texts):
    found = read_examples(jsonl(tmp_path / "x.jsonl", [row, row]))
    assert found.kind == kind
    assert len(found.texts) == n_texts
    assert len(found) == 2


def test_labels_become_numbers_in_sorted_order(tmp_path):
    rows = [{"text": "x", "label": name} for name in ("lift", "drag", "lift")]
    found = read_examples(jsonl(tmp_path / "x.jsonl", rows))
    np.testing.assert_array_equal(found.targets, [1, 0, 1])
    assert found.label_names == ("drag", "lift")


def test_numbers_are_sorted_as_numbers(tmp_path):
    rows = [{"text": "x", "label": number} for number in (10, 9, 2)]
    assert read_examples(jsonl(tmp_path / "x.jsonl", rows)).label_names == ("2", "9", "10")


def test_a_further_file_has_the_numbers_of_the_first(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"text": "x", "label": "lift"}])
    found = read_examples(path, label_names=("drag", "lift"))
    np.testing.assert_array_equal(found.targets, [1])
    with pytest.raises(DataError, match=r"row 1 has the label 'lift', which training did not"):
        read_examples(path, label_names=("drag", "heat"))


def test_columns_can_be_named(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"frage": "q", "antwort": "a"}])
    assert read_examples(path, columns=("frage", "antwort")).texts == (["q"], ["a"])
    with pytest.raises(FileFormatError, match=r"'frage', 'antwort', and none of the usual ones"):
        read_examples(path)
    with pytest.raises(FileFormatError, match=r"columns frage, word do not fit pairs"):
        read_examples(path, columns=("frage", "word"))


def test_a_quote_in_a_tsv_is_a_character(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text('sent1\tsent2\tscore\n"Lift, he said\tdrag"\t1\nb\tc\t2\n')
    found = read_examples(path)
    assert found.texts == (['"Lift, he said', "b"], ['drag"', "c"])
    np.testing.assert_array_equal(found.targets, [1.0, 2.0])


def test_judgements_become_pairs(data):
    found = read_examples(data / "scifact", split="train")
    assert found.kind == "pairs"
    assert len(found) == 919
    assert found.texts[0][0] != found.texts[1][0]


def test_the_sets_of_the_data_folder_are_read(data):
    assert len(read_examples(data / "stsb/train.tsv")) == 5749
    assert len(read_examples(data / "snli_devtest/triplets_dev.tsv")) == 2954
    clinc = read_examples(data / "clinc150/dev.jsonl.gz")
    assert (clinc.kind, len(clinc), len(clinc.label_names)) == ("labelled", 3100, 151)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PAIR, {**PAIR, "positive": "  "}], r"row 2 has no text in 'positive'"),
        ([PAIR, {"anchor": "a"}], r"row 2 has no text in 'positive' \(None\)"),
        ([{"sent1": "a", "sent2": "b", "score": "nan"}], r"row 1: score 'nan' is not a number"),
        ([{"text": "a", "label": "x"}] * 2, r"every row has the label 'x'"),
        ([{"text": "a", "label": None}], r"row 1 has no label"),
        ([], r"no rows"),
    ],
    ids=["blank", "missing", "nan", "one-class", "no-label", "empty"],
)
def test_a_bad_row_is_named(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read_examples(jsonl(tmp_path / "x.jsonl", rows))


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(StorageError, match=r"no such file"):
        read_examples(tmp_path / "none.jsonl")
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(FileFormatError, match=r"give a table"):
        read_examples(tmp_path / "x.txt")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"anchor": "a"}\n' * 999)[:40])
    with pytest.raises(FileFormatError, match=r"truncated or damaged"):
        read_examples(tmp_path / "cut.jsonl.gz")


def test_the_fingerprint_sees_every_value(tmp_path):
    rows = [{"sent1": "a", "sent2": "b", "score": 1}, {"sent1": "c", "sent2": "d", "score": 2}]
    prints = {read_examples(jsonl(tmp_path / "x.jsonl", rows)).fingerprint()}
    for row, key, value in ((0, "sent1", "ab"), (1, "sent2", "e"), (1, "score", 3)):
        changed = [dict(r) for r in rows]
        changed[row][key] = value
        prints.add(read_examples(jsonl(tmp_path / "x.jsonl", changed)).fingerprint())
    assert len(prints) == 4


def test_a_datasets_folder_gives_the_split_that_was_asked_for(tmp_path):
    datasets = pytest.importorskip("datasets", reason="nestvec[train]")
    parts = {
        name: datasets.Dataset.from_list([{"anchor": name, "positive": str(i)} for i in range(n)])
        for name, n in (("train", 5), ("test", 2))
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    assert read_examples(tmp_path / "set").texts[0] == ["train"] * 5
    assert read_examples(tmp_path / "set", split="test").texts[0] == ["test"] * 2
    with pytest.raises(DataError, match=r"no split 'dev'; its splits are: train, test"):
        read_examples(tmp_path / "set", split="dev")


def test_pairs_with_a_label_are_not_taken_for_positives(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"sentence1": "a", "sentence2": "b", "label": 0}])
    with pytest.raises(FileFormatError, match=r"--kind scored --columns sentence1,sentence2,label"):
        read_examples(path)
    assert read_examples(path, kind="pairs").kind == "pairs"
    scored = read_examples(path, kind="scored", columns=("sentence1", "sentence2", "label"))
    np.testing.assert_array_equal(scored.targets, [0.0])
    with pytest.raises(DataError, match=r"kind 'pear' is not one of"):
        read_examples(path, kind="pear")
