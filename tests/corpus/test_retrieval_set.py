"""A retrieval set is whole or says which id is wrong; BEIR folders are read as they are."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from nestvec.corpus import RetrievalSet, Texts, read_beir, read_beir_texts, read_qrels
from nestvec.errors import DataError, FileFormatError, StorageError

DOCS = [
    {"_id": "d1", "title": "Wing", "text": "lift and drag"},
    {"_id": "d2", "title": "", "text": "heat"},
    {"_id": "d3", "title": " ", "text": ""},
    {"_id": "d4", "text": "shock"},
]
QUERIES = [{"_id": "q1", "text": "what lifts"}, {"_id": "q2", "text": "not judged"}]
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td3\t1\nq1\td4\t0\n"


def _write(folder: Path, *, docs=DOCS, queries=QUERIES, qrels=QRELS, gz=False) -> Path:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus", docs), ("queries", queries)):
        data = "\n".join(map(json.dumps, rows)).encode()
        end = ".jsonl.gz" if gz else ".jsonl"
        (folder / f"{name}{end}").write_bytes(gzip.compress(data) if gz else data)
    (folder / "qrels" / "test.tsv").write_text(qrels)
    return folder


@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gz"])
def test_a_beir_folder_is_read_as_it_is(tmp_path, gz):
    got = read_beir(_write(tmp_path / "tiny", gz=gz))
    assert got.name == "tiny"
    assert got.doc_ids == ["d1", "d2", "d4"]
    assert got.doc_texts == ["Wing lift and drag", "heat", "shock"]
    assert (got.query_ids, got.query_texts) == (["q1"], ["what lifts"])


def test_a_document_without_text_is_named_and_its_judgement_stays(tmp_path):
    got = read_beir(_write(tmp_path))
    assert got.dropped == ("d3",)
    assert got.qrels == {"q1": {"d1": 2, "d3": 1, "d4": 0}}


def test_documents_or_all_queries_of_a_beir_folder_are_texts(tmp_path):
    folder = _write(tmp_path)
    documents, queries = read_beir_texts(folder), read_beir_texts(folder, "query")
    assert (documents.ids, documents.texts) == (["d1", "d2", "d4"], read_beir(folder).doc_texts)
    assert queries.ids == ["q1", "q2"]
    with pytest.raises(DataError, match="no text in it"):
        read_beir_texts(_write(tmp_path, docs=[DOCS[2]]))


@pytest.mark.parametrize(
    ("name", "docs", "queries", "judged", "dropped"),
    [
        ("cranfield", 1398, 225, 1837, ("471", "995")),
        ("cisi", 1460, 76, 3114, ()),
        ("scifact", 5183, 300, 339, ()),
        ("npl", 11429, 93, 2083, ()),
    ],
)
def test_the_evaluation_sets_have_their_published_counts(
    data, name, docs, queries, judged, dropped
):
    got = read_beir(data / name)
    assert (len(got.doc_ids), len(got.query_ids), got.dropped) == (docs, queries, dropped)
    assert sum(map(len, got.qrels.values())) == judged


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"qrels": QRELS + "q1\td9\t1\nq1\td8\t1\n"}, DataError, "2 unknown document ids.*'d8'"),
        ({"qrels": QRELS + "q9\td1\t1\n"}, DataError, "1 unknown query ids, e.g. 'q9'"),
        ({"qrels": ""}, DataError, "no judgements"),
        ({"qrels": "q1\td1\t0\n"}, DataError, "no document relevant"),
        ({"qrels": QRELS + "q1\td1\n"}, FileFormatError, "line 5"),
        ({"qrels": QRELS + "q1\td1\thigh\n"}, FileFormatError, "line 5"),
        ({"qrels": QRELS + "q1\td1\t1\n"}, DataError, "line 5 .* a second grade, 1"),
        ({"docs": [*DOCS, DOCS[0]]}, DataError, "'d1' stands twice"),
        ({"docs": [DOCS[2]], "qrels": "q1\td3\t1"}, DataError, "no document with text"),
        ({"docs": [{"text": "x"}]}, FileFormatError, "line 1 has no '_id'"),
        ({"queries": [{"_id": "q1", "text": " "}]}, DataError, "'q1' is judged but has no text"),
    ],
    ids=range(11),
)
def test_a_beir_folder_that_is_wrong_is_one_sentence(tmp_path, change, error, words):
    with pytest.raises(error, match=words) as caught:
        read_beir(_write(tmp_path, **change))
    assert "\n" not in str(caught.value)


def test_missing_parts_are_named(tmp_path):
    _write(tmp_path)
    with pytest.raises(StorageError, match=r"no qrels/dev\.tsv; its splits are: test"):
        read_beir(tmp_path, split="dev")
    (tmp_path / "corpus.jsonl").unlink()
    with pytest.raises(StorageError, match=r"no corpus\.jsonl or corpus\.jsonl\.gz"):
        read_beir(tmp_path)


def test_a_truncated_corpus_is_named(tmp_path):
    path = _write(tmp_path, gz=True) / "corpus.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(FileFormatError, match="truncated or damaged"):
        read_beir(tmp_path)
    _write(tmp_path)
    (tmp_path / "corpus.jsonl").write_text(json.dumps(DOCS[0])[:-3])
    with pytest.raises(FileFormatError, match="line 1 is not JSON"):
        read_beir(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "query-id\tcorpus-id\tscore\nq 1\td1\t2\nq 1\td2\t0\n",
        "q 1\td1\t2\n\nq 1\td2\t0",
        "q 1\t0\td1\t2\nq 1\t0\td2\t0\n",
    ],
    ids=["header", "no-header", "trec-tabs"],
)
def test_qrels_are_read_with_and_without_header(tmp_path, text):
    (tmp_path / "x.tsv").write_text(text)
    assert read_qrels(tmp_path / "x.tsv") == {"q 1": {"d1": 2, "d2": 0}}


def test_trec_qrels_are_read_between_spaces(tmp_path):
    (tmp_path / "x.txt").write_text("1 0 FT911-3 1\n1 0 FT911-4 0\n2 0 FT911-3 2\n")
    assert read_qrels(tmp_path / "x.txt") == {
        "1": {"FT911-3": 1, "FT911-4": 0},
        "2": {"FT911-3": 2},
    }


def test_ids_and_texts_have_to_pair_up():
    with pytest.raises(DataError, match="1 ids for 2 texts"):
        Texts(["a"], ["x", "y"])
    with pytest.raises(DataError, match="2 document ids for 1 texts"):
        RetrievalSet("s", ["a", "b"], ["x"], ["q"], ["y"], {"q": {"a": 1}})
    with pytest.raises(DataError, match="no query with text"):
        RetrievalSet("s", ["a"], ["x"], [], [], {})


def test_the_line_for_people_counts_what_is_there(tmp_path):
    shown = repr(read_beir(_write(tmp_path / "tiny")))
    assert shown == "RetrievalSet('tiny', 3 documents, 1 queries, 3 judgements)"
    assert Counter(shown)["("] == 1
