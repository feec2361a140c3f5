"""Passages keep every word, in order, at a length a small model reads; summaries ask for bodies."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestvec.corpus import Texts, docstrings, passages, summary_queries
from nestvec.errors import DataError

words = st.sampled_from("alpha beta gamma delta. epsilon! zeta".split())
texts = st.lists(st.lists(words, max_size=400).map(" ".join), max_size=8).map("\n\n".join)


@given(texts)
def test_no_word_is_lost_and_none_moves(text):
    assert " ".join(passages(text)).split() == text.split()


@given(texts)
def test_no_passage_is_longer_than_a_small_model_reads(text):
    assert all(0 < len(p.split()) < 180 for p in passages(text))


@given(texts)
def test_sentences_of_usual_length_stay_whole(text):
    for passage in passages(text)[:-1]:
        last = passage.split()[-1]
        assert len(passage.split()) >= 80 or last[-1] in ".!"


def test_short_paragraphs_are_joined_and_a_heading_stays_with_its_text():
    text = "# Heading\n\n" + "word " * 100 + "\n\n" + "next " * 90
    first, second = passages(text)
    assert first.startswith("# Heading\nword word")
    assert set(second.split()) == {"next"}


def test_text_without_content_gives_no_passage():
    assert passages(" \n\n\t") == []


BODY = (
    "the boundary layer grows along the plate until it separates from it at some point "
    "further on, where the shear at the wall is gone"
)


def test_a_heading_or_first_sentence_asks_for_the_rest():
    got = summary_queries(
        Texts(
            ["a", "b", "c"],
            [
                f"# Growth of the boundary layer\n{BODY} one",
                f"How does a layer grow along plates? {BODY} two",
                "too short to ask anything",
            ],
        )
    )
    assert got.query_texts == [
        "Growth of the boundary layer",
        "How does a layer grow along plates?",
    ]
    assert got.doc_texts == [f"{BODY} one", f"{BODY} two", "too short to ask anything"]
    assert got.qrels == {"a?": {"a": 1}, "b?": {"b": 1}}


def test_beginnings_that_recur_ask_for_nothing():
    text = f"An introduction to this page\n{BODY}"
    other = f"What a shock wave is about\n{BODY}"
    got = summary_queries(Texts(["a", "b", "c"], [text, text.upper(), other]))
    assert got.query_ids == ["c?"]
    assert got.doc_texts[0] == text


def test_text_that_asks_nothing_says_so():
    with pytest.raises(DataError, match="none of 1 passages begins with a heading"):
        summary_queries(Texts(["a"], ["short"]))


# --- docstrings -----------------------------------------------------------------------------------

SOURCE = '''
"""{module} does things to other things quickly.

{body}
"""

class Thing:
    """A thing that holds {module} and more.

    {body} of the class
    """

    def method(self):
        r"""Do the thing with an invalid \\d escape.

        {body} of the method. Do the thing with an invalid \\d escape.
        """
        def inner():
            """Never seen because it is inside a function.

            {body}
            """

    def short(self):
        """Summary without a body."""

def recurring():
    """This summary stands in every file.

    {body} {module} again
    """

raise SystemExit("imported!")
'''
LONG = "body " * 25


@pytest.fixture
def root(tmp_path):
    for name in ("a", "pkg/__init__", "pkg/b", "tests/c", "pkg/site-packages/d"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SOURCE.format(module=path.stem, body=f"{LONG} {name}"))
    (tmp_path / "broken.py").write_text('"""Docstring of a broken file.\n\nbody"""\ndef (:')
    (tmp_path / "binary.py").write_bytes(b'"""\0\xff"""')
    return tmp_path


def test_summaries_ask_for_bodies_of_files_that_are_never_run(root):
    got = docstrings(roots=[root])
    names = ["a", "a.Thing", "pkg", "pkg.Thing", "pkg.b", "pkg.b.Thing"]
    assert sorted(got.query_ids) == names
    at = got.query_ids.index("a")
    assert got.query_texts[at] == "a does things to other things quickly."
    assert got.qrels["a"] == {"a#1": 1}
    assert got.doc_texts[got.doc_ids.index("a#1")].split()[-1] == "a"


def test_summaries_that_recur_are_left_out(root):
    got = docstrings(roots=[root])
    assert not [q for q in got.query_ids if q.endswith((".recurring", ".method", ".short"))]
    assert len(set(got.query_texts)) == len(got.query_texts) == 6


def test_the_answer_does_not_hold_the_question(root):
    for query, text in zip(*_pairs(docstrings(roots=[root])), strict=True):
        assert query not in text


def _pairs(found):
    by_id = dict(zip(found.doc_ids, found.doc_texts, strict=True))
    answers = [" ".join(by_id[d] for d in found.qrels[q]) for q in found.query_ids]
    return found.query_texts, answers


def test_the_same_seed_finds_the_same_and_another_another():
    first = docstrings(limit=150)
    assert first == docstrings(limit=150)
    assert first.query_ids != docstrings(limit=150, seed=1).query_ids
    assert len(first.doc_ids) == 150
    queries, answers = _pairs(first)
    assert all(q not in a for q, a in zip(queries, answers, strict=True))
    assert all(len(a.split()) >= 20 for a in answers)
    assert len(set(first.doc_texts)) > 0.99 * len(first.doc_texts)


def test_a_python_without_sources_says_so(tmp_path):
    with pytest.raises(DataError, match="no docstrings found"):
        docstrings(roots=[tmp_path])
