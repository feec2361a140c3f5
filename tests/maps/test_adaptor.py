"""The adaptor makes prefixes better, and its guard keeps it from making anything worse."""

import subprocess
import sys
from typing import cast

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from nestvec.errors import DataError, SpaceError, SpaceMismatchError
from nestvec.maps import MatryoshkaAdaptor, PrincipalRotation, load_map, samples
from nestvec.maps.guard import closeness_kept
from nestvec.space import Embeddings, Space

QUICK = {"max_steps": 30, "batch_size": 64, "gallery_size": 256, "supervised_steps": 30}


@parametrize_with_checks(
    [MatryoshkaAdaptor(max_steps=3), MatryoshkaAdaptor(max_steps=3, kind="residual")]
)
def test_scikit_learn_accepts(estimator, check):
    check(estimator)


def topics(rng, n=600, dim=48, n_topics=60):
    """Unit rows around topic centres that lie in a subspace the first dimensions do not show.

    A strong direction that all rows share, as encoders have, wastes a short prefix.
    """
    centres = rng.normal(size=(n_topics, 20)) @ rng.normal(size=(20, dim))
    rows = centres[rng.integers(n_topics, size=n)] + 1.5 * rng.normal(size=(n, dim))
    rows += 8 * rng.normal(size=dim)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def retrieval(rng, n_queries=80):
    """Documents, queries near one of them each, and (query, document) pairs."""
    docs = topics(rng)
    which = rng.integers(len(docs), size=n_queries)
    noise = rng.normal(size=(n_queries, docs.shape[1])) * 0.05
    asks = (docs[which] + noise).astype(np.float32)
    return docs, asks, np.column_stack([np.arange(n_queries), which])


def embeddings(array, prefix="d", **more):
    unit = array / np.linalg.norm(array, axis=1, keepdims=True)
    space = Space.declared("model", dim=array.shape[1], **more)
    return Embeddings(unit, space, [f"{prefix}{i}" for i in range(len(array))])


@pytest.fixture(scope="module")
def fitted():
    rows = topics(np.random.default_rng(0), n=900)[:600]
    return MatryoshkaAdaptor(dims=(4, 8, 16, 48), max_steps=150, learning_rate=0.01).fit(rows)


def test_the_learned_map_beats_rotation_and_truncation_on_new_rows(fitted):
    rows = topics(np.random.default_rng(0), n=900)
    fresh = rows[600:]
    score = closeness_kept(fresh, rows[:600], (4, 8, 16, 48))
    rotation = PrincipalRotation().fit(rows[:600])
    learned = np.array(score(fitted.transform))
    assert fitted.guard_.winner == "learned"
    assert learned[:2].mean() > np.mean(score(rotation.transform)[:2]) + 0.01
    assert learned[:2].mean() > np.mean(score(lambda x: x)[:2]) + 0.1
    assert learned[-1] > 0.95


def test_guard_says_what_won_and_by_how_much(fitted):
    guard = fitted.guard_
    assert set(guard.scores) == {"unchanged", "rotation", "learned"}
    assert guard.scores["unchanged"][-1] == pytest.approx(1)
    assert guard.winner == max(guard.scores, key=guard.score)
    said = guard.sentence()
    assert said.startswith("learned map kept: held-out closeness kept@10 0.")
    assert f"{guard.score('rotation'):.3f} (rotation)" in said
    assert f"{guard.score('unchanged'):.3f} (unchanged)" in said
    assert said.endswith("weighted equally over 4, 8, 16, 48")


def test_vectors_that_are_nested_already_are_left_unchanged(rng):
    nested = rng.normal(size=(400, 32)) * np.geomspace(1, 1e-3, 32)
    fitted = MatryoshkaAdaptor(dims=(8, 32), **QUICK, learning_rate=0.5).fit(nested)
    assert fitted.guard_.winner != "learned"  # that learning rate makes anything worse
    kept = fitted.guard_.scores
    assert max(kept["unchanged"][0], kept["rotation"][0]) > kept["learned"][0]


def test_validation_decides_against_the_label_free_score(rng):
    """Pairs whose scores are the plain prefix's own cosines: only unchanged vectors are right."""
    x = topics(rng)
    first, second = x[:200], x[200:400]
    a, b = (v[:, :4] / np.linalg.norm(v[:, :4], axis=1, keepdims=True) for v in (first, second))
    judged = MatryoshkaAdaptor(dims=(4,), **QUICK).fit(
        x, validation=(first, second, (a * b).sum(1))
    )
    assert judged.guard_.criterion == "Spearman"
    assert judged.guard_.winner == "unchanged"
    np.testing.assert_allclose(judged.transform(x), x, atol=1e-6)


def test_validation_queries_are_judged_by_ndcg(rng):
    docs, asks, pairs = retrieval(rng)
    fitted = MatryoshkaAdaptor(dims=(4, 48), **QUICK).fit(docs, validation=(asks, pairs))
    assert fitted.guard_.criterion == "nDCG@10"
    assert fitted.guard_.n_held_out == 80


def test_labels_teach_what_unlabelled_rows_cannot_know(rng):
    """The relevant document is the one whose second half agrees, which cosine does not know."""
    docs = rng.normal(size=(300, 16)).astype(np.float32)
    which = rng.integers(300, size=500)
    asks = np.hstack([rng.normal(size=(500, 8)), docs[which, 8:]]).astype(np.float32)
    pairs = np.column_stack([np.arange(400), which[:400]])
    new = asks[400:], np.column_stack([np.arange(100), which[400:]])
    plain = MatryoshkaAdaptor(dims=(8, 16), max_steps=30).fit(docs, validation=new)
    told = MatryoshkaAdaptor(dims=(8, 16), max_steps=30).fit(
        docs, queries=asks[:400], qrels=pairs, validation=new
    )
    assert told.guard_.winner == "learned"
    assert told.guard_.scores["learned"][0] > 0.5
    assert told.guard_.scores["learned"][0] > plain.guard_.scores["learned"][0] + 0.2


def test_qrels_by_id_and_by_row_give_the_same_map(rng):
    docs, asks, pairs = retrieval(rng)
    by_row = MatryoshkaAdaptor(dims=(4, 48), **QUICK).fit(docs, queries=asks, qrels=pairs)
    ids = {f"q{q}": {f"d{d}": 1, "d0": 0} for q, d in pairs}
    by_id = MatryoshkaAdaptor(dims=(4, 48), **QUICK).fit(
        embeddings(docs), queries=embeddings(asks, "q"), qrels=ids
    )
    assert by_id.guard_.criterion == "nDCG@10"
    np.testing.assert_allclose(by_id.transform(docs), by_row.transform(docs), atol=1e-4)


def test_every_second_held_out_query_shares_no_document_with_training(rng):
    docs, asks, pairs = retrieval(rng, n_queries=200)
    labels = samples.read_labels(pairs % [10**9, 40], asks, docs, dim=48)
    examples = samples.Examples(docs, labels=labels)
    parts = samples.split(examples, dims=(4,), fraction=0.2, rng=rng)
    seen = parts.held_in.labels
    assert seen is not None
    held = {tuple(q) for q in labels.queries} - {tuple(q) for q in seen.queries}
    trained = set(np.concatenate(seen.relevant).tolist())
    new = [
        not trained & set(r.tolist())
        for q, r in zip(labels.queries, labels.relevant, strict=True)
        if tuple(q) in held
    ]
    assert sum(new) >= parts.n_held_out / 2


def test_per_size_winners_are_spaces_of_their_own(rng):
    x = topics(rng)
    old = embeddings(x)
    fitted = MatryoshkaAdaptor(dims=(4, 16, 48), choose="per_size", **QUICK).fit(old)
    assert sorted(fitted.maps_) == [4, 16, 48]
    for dim, alone in fitted.maps_.items():
        best = max(fitted.guard_.scores, key=lambda n: fitted.guard_.at(dim).scores[n][0])
        assert alone.guard_.winner == best
        assert alone.transform(old).space.nesting_dims == (dim,)
    full, short = fitted.maps_[48], fitted.maps_[4]
    assert full.guard_.winner == "unchanged"
    assert short.guard_.winner == "learned"
    with pytest.raises(SpaceMismatchError):
        full.transform(old).space.check_same(short.transform(old).space)


@pytest.mark.parametrize("kind", ["linear", "residual"])
def test_saved_then_loaded_is_the_same_map(kind, rng, tmp_path):
    x = topics(rng)
    fitted = MatryoshkaAdaptor(dims=(4, 48), kind=kind, **QUICK).fit(x)
    fitted.save(tmp_path / "map")
    loaded = load_map(tmp_path / "map")
    assert isinstance(loaded, MatryoshkaAdaptor)
    assert loaded.guard_ == fitted.guard_
    assert loaded.content_hash == fitted.content_hash
    assert loaded.get_params() == {**fitted.get_params(), "dims": [4, 48]}  # JSON has no tuples
    np.testing.assert_array_equal(loaded.transform(x), fitted.transform(x))
    assert sorted(p.name for p in (tmp_path / "map").iterdir()) == ["map.json", "map.safetensors"]


def test_the_same_seed_gives_the_same_map(rng):
    x = topics(rng)
    one = MatryoshkaAdaptor(dims=(4,), learning_rate=0.01, max_steps=60).fit(x)
    assert one.guard_.winner == "learned"
    assert cast(MatryoshkaAdaptor, clone(one)).fit(x).content_hash == one.content_hash
    other = MatryoshkaAdaptor(dims=(4,), learning_rate=0.01, max_steps=60, random_state=1).fit(x)
    assert other.content_hash != one.content_hash


def test_lengths_of_rows_do_not_matter_and_rows_come_out_at_length_1(fitted, rng):
    x = topics(rng)
    np.testing.assert_allclose(fitted.transform(x * 7), fitted.transform(x), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(fitted.transform(x), axis=1), 1, atol=1e-6)


def test_vectors_whose_lengths_mean_something_are_refused(rng):
    x = topics(rng) * 3
    space = Space.declared("m", dim=48, normalisation="none", metric="dot")
    with pytest.raises(SpaceError, match="keeps directions only"):
        MatryoshkaAdaptor(**QUICK).fit(Embeddings(x, space))


def test_queries_of_another_space_are_refused(rng):
    docs, asks, pairs = retrieval(rng)
    other = Embeddings(
        embeddings(asks).array, Space.declared("other", dim=48), [f"q{i}" for i in range(80)]
    )
    with pytest.raises(SpaceMismatchError):
        MatryoshkaAdaptor(**QUICK).fit(embeddings(docs), queries=other, qrels=pairs)


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({"kind": "cubic"}, {}, "kind 'cubic' is not one of linear, residual"),
        ({"choose": "all"}, {}, "choose 'all' is not one of"),
        ({"dim_weights": (1, 2, 3)}, {}, "do not fit the sizes"),
        ({"validation_fraction": 1.5}, {}, "between 0 and 1"),
        ({}, {"qrels": np.array([[0, 1]])}, "qrels need queries"),
        ({}, {"queries": np.eye(48), "qrels": np.array([[0, 600]])}, "pair 0 is"),
        ({}, {"queries": np.eye(48), "qrels": {"q": {"d": 1}}}, "need queries and documents with"),
        ({}, {"validation": 3}, "validation is a tuple"),
        ({}, {"validation": (np.eye(48), np.eye(48), [1.0])}, "one score a pair"),
    ],
)
def test_what_does_not_fit_says_what_would(settings, given, message, rng):
    with pytest.raises(DataError, match=message):
        MatryoshkaAdaptor(dims=(4, 48), **QUICK, **settings).fit(topics(rng), **given)


def test_too_few_rows_are_left_unchanged_and_said_so(rng):
    few = rng.normal(size=(10, 8))
    fitted = MatryoshkaAdaptor().fit(few)
    assert fitted.guard_.winner == "unchanged"
    assert "too few rows" in fitted.guard_.sentence()


def test_only_a_sample_is_learned_from_but_every_relevant_document_is_in_it(rng):
    docs, asks, pairs = retrieval(rng)
    fitted = MatryoshkaAdaptor(dims=(4, 48), sample_size=100, **QUICK).fit(
        docs, queries=asks, qrels=pairs
    )
    assert fitted.guard_.criterion == "nDCG@10"


def test_works_in_a_pipeline(rng):
    x = topics(rng)
    pipeline = make_pipeline(PrincipalRotation(), MatryoshkaAdaptor(dims=(4, 48), **QUICK)).fit(x)
    assert pipeline.transform(x).shape == x.shape


def test_transform_needs_no_torch(fitted, tmp_path):
    fitted.save(tmp_path / "map")
    code = (
        "import sys, numpy as np; from nestvec.maps import load_map\n"
        f"load_map({str(tmp_path / 'map')!r}).transform(np.eye(48))\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
