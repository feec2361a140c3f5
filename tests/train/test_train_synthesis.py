"""Pairs are made of a corpus alone: diverse, repeatable, and nothing finds itself by its copy."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="nestvec[fit]")
pytest.importorskip("sklearn", reason="nestvec[fit]")

import nestvec as nv  # behind importorskip
from nestvec.corpus import Texts, query_rule
from nestvec.errors import DataError
from nestvec.train import mine_negatives, sample_documents, synthesize
from nestvec.train.synthesis import shares

SPACE = nv.Space.declared("made-up", dim=16, normalisation="none")
SIZES = (300, 100, 40, 20, 10, 8, 6, 6, 5, 5)


@pytest.fixture
def groups(rng):
    """500 documents in ten groups of very unlike sizes."""
    centres = rng.normal(size=(len(SIZES), 16))
    label = np.repeat(np.arange(len(SIZES)), SIZES)
    return (centres[label] + 0.05 * rng.normal(size=(500, 16))).astype(np.float32), label


def corpus(n=500):
    ids = [f"d{row}" for row in range(n)]
    return Texts(
        ids, [f"word{row} is what this one says. {row} " + "and on " * 15 for row in range(n)]
    )


def test_clustered_sampling_covers_more_groups_than_uniform_sampling(groups):
    vectors, label = groups
    clustered, uniform = [], []
    for seed in range(5):
        rows, _ = sample_documents(vectors, 20, n_clusters=10, seed=seed)
        assert len(rows) == len(set(rows.tolist())) == 20
        clustered.append(len(set(label[rows])))
        drawn = np.random.default_rng(seed).choice(500, 20, replace=False)
        uniform.append(len(set(label[drawn])))
    assert min(clustered) > max(uniform)
    assert np.mean(clustered) >= 9


@pytest.mark.parametrize("n", [1, 7, 30, 200, 500, 900])
def test_shares_follow_the_sizes_and_add_up(n):
    found = shares(SIZES, n)
    assert found.sum() == min(n, 500)
    assert (found <= np.array(SIZES)).all()
    assert (np.diff(found) <= 0).all()  # a larger group never gets less
    if n >= len(SIZES):
        assert found.min() >= 1
    if n == 200:
        np.testing.assert_allclose(found, np.array(SIZES) * 0.4, atol=1.5)


def test_low_temperature_draws_what_is_closest_to_the_centre(groups):
    vectors, _ = groups
    rows, clusters = sample_documents(vectors, 10, n_clusters=10, temperature=1e-6)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for row in rows:
        members = np.flatnonzero(clusters == clusters[row])
        centre = unit[members].mean(axis=0)
        assert unit[row] @ centre >= (unit[members] @ centre).max() - 1e-6


def test_same_seed_makes_the_same_set_and_another_another(groups):
    vectors = nv.Embeddings(groups[0], SPACE)
    sets = [synthesize(corpus(), 50, vectors=vectors, seed=seed) for seed in (3, 3, 4)]
    assert sets[0] == sets[1]
    assert sets[0].examples != sets[2].examples
    assert len(sets[0].examples) == 50
    assert "50 pairs from 500 documents" in sets[0].sentence()


def test_query_is_taken_out_of_its_document_and_others_stay_whole(groups):
    made = synthesize(corpus(), 50, vectors=nv.Embeddings(groups[0], SPACE))
    for query, document in zip(*made.examples.texts, strict=True):
        assert query.startswith("word")
        assert query not in document
    assert len(made.found.doc_ids) == 500
    hard = mine_negatives(
        made.found,
        documents=nv.Embeddings(groups[0], SPACE),
        queries=nv.Embeddings(groups[0][:50], SPACE),
        highest_share=None,
        near_duplicate=None,
    )
    assert len(hard.examples) == 50


def test_function_is_asked_for_the_drawn_documents_alone(groups):
    called = []

    def make(text):
        called.append(text)
        number = int(text.split()[0].removeprefix("word"))
        if number % 3 == 0:
            return None
        return "always the same" if number % 3 == 1 else (f"what of {number}?", "the rest")

    made = synthesize(corpus(), 60, queries=make, vectors=nv.Embeddings(groups[0], SPACE))
    assert len(called) == 60
    assert made.n_without == 60 - len(made.examples)
    assert all(query.startswith("what of") for query in made.examples.texts[0])
    assert set(made.examples.texts[1]) == {"the rest"}
    assert made.n_covered <= made.n_clusters


def test_rules_are_what_they_say():
    abstract = "We show one thing. And then another, " + "word " * 12
    assert query_rule("title")(f"A fine title {abstract}", "A fine title") == (
        "A fine title",
        abstract.strip(),
    )
    twice = f"A fine title A fine title {abstract}"
    assert query_rule("title")(twice, "A fine title") == ("A fine title", abstract.strip())
    assert query_rule("title")(abstract, "") is None
    assert query_rule("title")("A fine title too short", "A fine title") is None
    words = [f"w{n}" for n in range(25)]
    assert query_rule("lead")(" ".join(words), "") == (" ".join(words[:10]), " ".join(words[10:]))
    assert query_rule("lead")(" ".join(words[:15]), "") is None
    with pytest.raises(DataError, match="'best' is not one of title, summary, lead"):
        query_rule("best")


def test_titles_ask_where_there_are_some(groups):
    texts = corpus()
    titles = [f"title of number {row}" if row % 2 else "" for row in range(500)]
    made = synthesize(
        texts, 50, queries="title", titles=titles, vectors=nv.Embeddings(groups[0], SPACE)
    )
    assert all(int(query.split()[-1]) % 2 for query in made.examples.texts[0])


def test_corpus_too_small_or_settings_that_do_not_fit_are_refused(groups):
    vectors, _ = groups
    with pytest.raises(DataError, match="7 documents are too few to cluster"):
        sample_documents(vectors[:7], 3)
    with pytest.raises(DataError, match="n_clusters 300 does not fit 500 documents: 1 to 250"):
        sample_documents(vectors, 20, n_clusters=300)
    with pytest.raises(DataError, match="n 0 must be 1"):
        sample_documents(vectors, 0)
    whole = nv.Embeddings(vectors, SPACE)
    with pytest.raises(DataError, match="needs the titles"):
        synthesize(corpus(), 5, queries="title", vectors=whole)
    with pytest.raises(DataError, match="3 titles for 500 documents"):
        synthesize(corpus(), 5, queries="title", titles=["a"] * 3, vectors=whole)
    with pytest.raises(DataError, match="none gives a query by this rule"):
        synthesize(Texts(corpus().ids, ["short"] * 500), 5, vectors=whole)
    with pytest.raises(DataError, match="gave a query"):
        synthesize(corpus(), 5, queries=lambda text: None, vectors=whole)
    with pytest.raises(DataError, match="returned 3 for document"):
        synthesize(corpus(), 5, queries=lambda text: 3, vectors=whole)  # pyright: ignore[reportArgumentType]  # on purpose
    with pytest.raises(DataError, match="20 vectors for 500 documents"):
        synthesize(corpus(), 5, vectors=nv.Embeddings(vectors[:20], SPACE))
