"""Hard negatives are what a slow search finds, and never what may be right."""

import json
from typing import Any

import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch", reason="nestvec[fit]")

import nestvec as nv  # noqa: E402  # behind importorskip
from nestvec.corpus import read_examples, write_examples  # noqa: E402
from nestvec.corpus.examples import Examples  # noqa: E402
from nestvec.errors import DataError, FileFormatError, SpaceMismatchError  # noqa: E402
from nestvec.train import NestedLoss, StaticAndRandom, mine_negatives  # noqa: E402

SPACE = nv.Space.declared("made-up", dim=8)
FREE: dict[str, Any] = {"highest_share": None, "near_duplicate": None}


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def made(rng):
    """40 documents, 6 queries, each near its own two; ids are not row numbers."""
    docs = unit(rng.normal(size=(40, 8)))
    queries = unit(docs[:12:2] + docs[1:12:2] + 0.3 * rng.normal(size=(6, 8)))
    doc_ids = [f"d{n}" for n in range(40)]
    query_ids = [f"q{n}" for n in range(6)]
    qrels = {f"q{n}": {f"d{2 * n}": 1, f"d{2 * n + 1}": 2, f"d{20 + n}": 0} for n in range(6)}
    found = nv.RetrievalSet(
        "made",
        doc_ids,
        [f"text of {one}" for one in doc_ids],
        query_ids,
        [f"what is {one}?" for one in query_ids],
        qrels,
    )
    return found, nv.Embeddings(docs, SPACE, doc_ids), nv.Embeddings(queries, SPACE, query_ids)


def mined(made, **settings):
    found, docs, queries = made
    return mine_negatives(found, documents=docs, queries=queries, **settings)


def by_query(examples):
    found: dict[str, set[str]] = {}
    for query, _, negative in zip(*examples.texts, strict=True):
        found.setdefault(query, set()).add(negative)
    return found


def test_negatives_are_the_wrong_ones_among_the_first_of_a_slow_search(made):
    found, docs, queries = made
    got = by_query(mined(made, ranks=(3, 12), n_negatives=40, **FREE).examples)
    for row, query in enumerate(found.query_ids):
        order = sorted(
            range(40),
            key=lambda doc: (
                -sum(a * b for a, b in zip(queries.array[row], docs.array[doc], strict=True))
            ),
        )
        right = {doc for doc, grade in found.qrels[query].items() if grade > 0}
        want = {f"text of d{doc}" for doc in order[2:12] if f"d{doc}" not in right}
        assert got[f"what is {query}?"] == want


def test_what_is_judged_relevant_is_never_a_negative(made):
    got = mined(made, ranks=(1, 40), n_negatives=40, **FREE)
    for query, _, negative in zip(*got.examples.texts, strict=True):
        number = int(query.removeprefix("what is q").removesuffix("?"))
        assert negative not in {f"text of d{2 * number}", f"text of d{2 * number + 1}"}
    assert got.n_pairs == 12
    assert got.n_relevant == 24
    assert len(got.examples) == 12 * 38  # judged with grade 0: a negative as any other


def test_same_text_as_the_right_one_is_left_out_whatever_its_id(made):
    found, docs, queries = made
    texts = [*found.doc_texts]
    texts[30] = texts[0]
    twice = nv.RetrievalSet(
        "twice", found.doc_ids, texts, found.query_ids, found.query_texts, found.qrels
    )
    got = mine_negatives(
        twice, documents=docs, queries=queries, ranks=(1, 40), n_negatives=40, **FREE
    )
    assert texts[0] not in by_query(got.examples)["what is q0?"]


def test_guard_leaves_out_what_scores_nearly_as_the_right_one_or_repeats_it(made):
    found, docs, queries = made
    got = mined(made, ranks=(1, 40), n_negatives=40, highest_share=0.7, near_duplicate=0.5)
    place = {text: row for row, text in enumerate(found.doc_texts)}
    asked = {text: row for row, text in enumerate(found.query_texts)}
    kept = set()
    for query, positive, negative in zip(*got.examples.texts, strict=True):
        q, p, n = (
            queries.array[asked[query]],
            docs.array[place[positive]],
            docs.array[place[negative]],
        )
        assert q @ n <= q @ p - 0.3 * abs(q @ p) + 1e-6
        assert n @ p < 0.5
        kept.add((query, positive, negative))
    assert got.n_too_close > 0
    assert got.n_duplicates > 0
    assert len(kept) == got.n_candidates - got.n_relevant - got.n_too_close - got.n_duplicates


def test_seed_decides_and_another_draws_others(made):
    draws = [mined(made, seed=seed, n_negatives=2, **FREE).examples.texts for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_index_finds_the_same_as_the_vectors(made, tmp_path):
    pytest.importorskip("lance", reason="nestvec[index]")
    found, docs, queries = made
    index = nv.Index.create(tmp_path / "i", docs)
    want = mined(made, ranks=(1, 20), n_negatives=20)
    got = mine_negatives(found, documents=index, queries=queries, ranks=(1, 20), n_negatives=20)
    assert got == want


def test_pairs_are_their_own_gallery(made):
    _, docs, queries = made
    pairs = Examples("pairs", (["a?", "b?", "a?"], ["a", "b", "c"]))
    got = mine_negatives(
        pairs,
        documents=nv.Embeddings(docs.array[:3], SPACE),
        queries=nv.Embeddings(queries.array[:2], SPACE),
        n_negatives=9,
        **FREE,
    )
    assert by_query(got.examples) == {"a?": {"b"}, "b?": {"a", "c"}}


def test_bad_input_says_what_would_fit(made):
    found, docs, queries = made
    with pytest.raises(DataError, match="not places"):
        mined(made, ranks=(0, 5))
    with pytest.raises(DataError, match="n_negatives 0"):
        mined(made, n_negatives=0)
    with pytest.raises(DataError, match="highest_share 2"):
        mined(made, highest_share=2)
    with pytest.raises(DataError, match="no candidate was left for any of 12 pairs"):
        mined(made, near_duplicate=1e-9, highest_share=1e-9, ranks=(1, 2))
    with pytest.raises(DataError, match="these are labelled"):
        mine_negatives(Examples("labelled", (["a"],), np.zeros(1, int), ("x", "y")))
    with pytest.raises(DataError, match="3 vectors of documents for 2"):
        mine_negatives(
            Examples("pairs", (["a?", "b?"], ["a", "b"])),
            documents=nv.Embeddings(docs.array[:3], SPACE),
            queries=nv.Embeddings(queries.array[:2], SPACE),
        )
    other = nv.Embeddings(queries.array, nv.Space.declared("other", dim=8), found.query_ids)
    with pytest.raises(SpaceMismatchError):
        mine_negatives(found, documents=docs, queries=other)


def test_triplets_are_read_again_as_they_were_written(made, tmp_path):
    examples = mined(made, **FREE).examples
    path = write_examples(examples, tmp_path / "hard.jsonl")
    assert read_examples(path) == examples
    scored = Examples("scored", (["a", "b"], ["c", "d"]), np.array([0.5, 1], np.float32))
    again = read_examples(write_examples(scored, tmp_path / "s.jsonl"))
    assert again.texts == scored.texts
    np.testing.assert_array_equal(again.targets, scored.targets)
    labelled = Examples("labelled", (["a", "b"],), np.array([1, 0]), ("x", "y"))
    write_examples(labelled, tmp_path / "l.jsonl")
    lines = (tmp_path / "l.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == ["y", "x"]
    with pytest.raises(FileFormatError, match=r"ending in \.jsonl"):
        write_examples(examples, tmp_path / "hard.csv")


# --- the loss that takes them ------------------------------------------------------------------


def star_by_loops(queries, positives, negatives, *, scale, random_weight):
    def cost(query, right, wrong):
        gap = sum(q * (w - r) for q, w, r in zip(query, wrong, right, strict=True))
        return float(np.log1p(np.exp(scale * gap)))

    hard, random = [], []
    for i, (query, right) in enumerate(zip(queries, positives, strict=True)):
        hard.append(cost(query, right, negatives[i]))
        for j in range(len(queries)):
            if j != i:
                random += [cost(query, right, positives[j]), cost(query, right, negatives[j])]
    return float(np.mean(hard) + random_weight * np.mean(random))


def test_loss_is_its_definition_at_every_size(rng):
    columns = [rng.normal(size=(5, 8)) for _ in range(3)]
    loss = NestedLoss(StaticAndRandom(scale=3, random_weight=0.4), (2, 8))
    want = sum(
        star_by_loops(
            *([oracle.unit(row[:dim]) for row in column] for column in columns),
            scale=3,
            random_weight=0.4,
        )
        for dim in (2, 8)
    )
    got = loss(*(torch.from_numpy(column) for column in columns))
    assert got.item() == pytest.approx(want, rel=1e-9)


def test_without_random_negatives_other_rows_count_for_nothing(rng):
    columns = [torch.from_numpy(rng.normal(size=(5, 8))) for _ in range(3)]
    alone = StaticAndRandom(random_weight=0)
    parts = [alone(*(column[i : i + 1] for column in columns)) for i in range(5)]
    torch.testing.assert_close(alone(*columns), torch.stack(parts).mean())


def test_loss_refuses_what_does_not_fit():
    rows = torch.ones(2, 4)
    with pytest.raises(DataError, match="one positive and one negative a query"):
        StaticAndRandom()(rows, rows, rows[:1])
    with pytest.raises(DataError, match="no random negatives"):
        StaticAndRandom()(rows[:1], rows[:1], rows[:1])
    with pytest.raises(DataError, match="scale 0"):
        StaticAndRandom(scale=0)
