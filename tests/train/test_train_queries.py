"""The query side is trained alone: by its definition, in the Space of documents that are kept."""

import math
from typing import Any

import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch", reason="nestvec[fit]")
pytest.importorskip("sentence_transformers", reason="nestvec[text]")
pytest.importorskip("accelerate", reason="nestvec[text]")

import tiny_model  # noqa: E402  # behind importorskip
from safetensors.torch import load_file  # noqa: E402

import nestvec as nv  # noqa: E402
from nestvec.corpus import Texts  # noqa: E402
from nestvec.errors import (  # noqa: E402
    DataError,
    ModelError,
    SpaceMismatchError,
    TrainingError,
)
from nestvec.train import DynamicNegatives, Settings, train_queries  # noqa: E402
from nestvec.train import dynamic as dynamic_module  # noqa: E402
from nestvec.train.dynamic import lambda_weights, ranked  # noqa: E402
from nestvec.train.text import TextTrainer  # noqa: E402

DIMS = (4, 8)
QUICK: dict[str, Any] = {"batch_size": 13, "epochs": 20, "learning_rate": 3e-3, "save_every": 30}


# --- the loss ----------------------------------------------------------------------------------


def test_weights_are_what_ndcg_would_change_by():
    """Two relevant documents, of grades 2 and 1, at places 3 and 1; wrong ones at 2 and 4."""
    gains, ranks = torch.tensor([[2.0, 1.0]]), torch.tensor([[3, 1]])
    got = lambda_weights(gains, ranks, torch.tensor([2, 4]))[0]
    ideal = 2 / math.log2(2) + 1 / math.log2(3)

    def ndcg(ranking):
        return sum(g / math.log2(place + 1) for place, g in enumerate(ranking, 1)) / ideal

    now = ndcg([1, 0, 2, 0])
    want = [
        [abs(ndcg([1, 2, 0, 0]) - now), abs(ndcg([1, 0, 0, 2]) - now)],
        [abs(ndcg([0, 1, 2, 0]) - now), abs(ndcg([0, 0, 2, 1]) - now)],
    ]
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6)


@pytest.mark.parametrize("block", [7, 1000], ids=["in-blocks", "at-once"])
def test_search_is_exact_and_places_are_those_of_the_ranking(rng, monkeypatch, block):
    monkeypatch.setattr(dynamic_module, "_ROWS_AT_ONCE", block)
    queries, docs = (torch.from_numpy(rng.normal(size=(n, 8))).float() for n in (5, 40))
    relevant = torch.tensor([[3, 0], [39, 7], [0, 1], [14, 20], [6, 7]])
    found, places = ranked(queries, docs, relevant, 12)
    for row in range(5):
        scores = [
            sum(a * b for a, b in zip(queries[row].tolist(), d, strict=True)) for d in docs.tolist()
        ]
        order = sorted(range(40), key=lambda doc: -scores[doc])
        assert found[row].tolist() == order[:12]
        assert places[row].tolist() == [order.index(doc) + 1 for doc in relevant[row].tolist()]


def by_loops(queries, docs, relevant, dim, *, k, scale):
    total = 0.0
    docs = [oracle.unit(doc[:dim]) for doc in docs]
    for query, own in zip(queries, relevant, strict=True):
        asked = oracle.unit(query[:dim])
        scores = [sum(a * b for a, b in zip(asked, doc, strict=True)) for doc in docs]
        order = sorted(range(len(docs)), key=lambda doc: -scores[doc])
        place = {doc: n for n, doc in enumerate(order, 1)}
        ideal = sum(
            g / math.log2(n + 1) for n, g in enumerate(sorted(own.values(), reverse=True), 1)
        )
        for right, gain in own.items():
            for wrong in [doc for doc in order if doc not in own][:k]:
                change = abs(1 / math.log2(1 + place[right]) - 1 / math.log2(1 + place[wrong]))
                cost = math.log1p(math.exp(scale * (scores[wrong] - scores[right])))
                total += gain * change / ideal * cost
    return total / len(queries)


def test_loss_is_its_definition_at_every_size(rng):
    queries, docs = rng.normal(size=(4, 8)), rng.normal(size=(30, 8))
    relevant = [{3: 1.0}, {0: 1.0, 7: 2.0}, {29: 1.0}, {5: 3.0, 6: 1.0, 8: 1.0}]
    loss = DynamicNegatives(torch.from_numpy(docs), relevant, DIMS, k=5, scale=6)
    want = sum(by_loops(queries, docs, relevant, dim, k=5, scale=6) for dim in DIMS)
    got = loss(torch.from_numpy(queries), torch.arange(4))
    assert got.item() == pytest.approx(want, rel=1e-5)
    two = loss(torch.from_numpy(queries[[3, 1]]), torch.tensor([3, 1]))
    want = sum(
        by_loops(queries[[3, 1]], docs, [relevant[3], relevant[1]], dim, k=5, scale=6)
        for dim in DIMS
    )
    assert two.item() == pytest.approx(want, rel=1e-5)


def test_gradient_step_takes_the_right_document_up(rng):
    docs = torch.from_numpy(rng.normal(size=(50, 8))).float()
    queries = torch.from_numpy(rng.normal(size=(6, 8))).float().requires_grad_()
    relevant = [{n: 1.0} for n in range(6)]
    loss = DynamicNegatives(docs, relevant, (8,), k=200)
    before = ranked(queries, docs, torch.arange(6)[:, None], 1)[1]
    for _ in range(50):
        (gradient,) = torch.autograd.grad(loss(queries, torch.arange(6)), queries)
        queries = (queries - 0.1 * gradient).detach().requires_grad_()
    unit = torch.nn.functional.normalize(docs, dim=1)
    after = ranked(torch.nn.functional.normalize(queries, dim=1), unit, torch.arange(6)[:, None], 1)
    assert (after[1] == 1).all()
    assert (before > 1).any()


def test_loss_refuses_what_does_not_fit(rng):
    docs = torch.from_numpy(rng.normal(size=(3, 8)))
    with pytest.raises(DataError, match=r"relevant rows \[3\]"):
        DynamicNegatives(docs, [{3: 1.0}], DIMS)
    with pytest.raises(DataError, match=r"relevant rows \[\]"):
        DynamicNegatives(docs, [{}], DIMS)
    with pytest.raises(DataError, match="no negative"):
        DynamicNegatives(docs, [{0: 1.0, 1: 1.0, 2: 1.0}], DIMS)
    with pytest.raises(DataError, match="k 0"):
        DynamicNegatives(docs, [{0: 1.0}], DIMS, k=0)


# --- the training ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model.build(tmp_path_factory.mktemp("tiny") / "m")


@pytest.fixture(scope="module")
def judged(model):
    """Queries in other words: what they ask for cannot be known without training."""
    rng = np.random.default_rng(0)
    words: list[str] = list(tiny_model.WORDS)
    other = dict(zip(words, np.random.default_rng(7).permutation(words).tolist(), strict=True))
    docs = [" ".join(rng.choice(words, 6)) for _ in range(80)]
    asks = [" ".join(other[word] for word in text.split()) for text in docs[:48]]
    vectors = nv.encode(docs, model=str(model), ids=[f"d{n}" for n in range(80)])
    qrels = {f"q{n}": {f"d{n}": 1, "d79": 0} for n in range(48)}
    return vectors, Texts([f"q{n}" for n in range(48)], asks), qrels


@pytest.fixture(scope="module")
def trained(model, judged, tmp_path_factory):
    folder = tmp_path_factory.mktemp("queries") / "q"
    docs, queries, qrels = judged
    options: dict[str, Any] = {"dims": "8,32", "holdout": 0.2, "settings": Settings(**QUICK)}
    before = docs.array.tobytes()
    found = train_queries(model, docs, queries, qrels, folder, **options)
    assert docs.array.tobytes() == before
    return found, options


def test_training_finds_more_and_says_so_at_every_size(trained):
    found, _ = trained
    assert set(found.metrics) == {"hit10@8", "hit10@32"}
    losses = [record["loss"] for record in found.records if "loss" in record]
    assert losses[-1] < 0.9 * losses[0]
    card = (found.folder / "README.md").read_text()
    assert "against 80 frozen documents" in card


def test_queries_live_in_the_documents_space_and_documents_are_refused(trained, model, judged):
    found, _ = trained
    docs, queries, _ = judged
    asks = nv.encode(queries.texts, model=str(found.folder), role="query")
    assert asks.space == docs.space
    assert asks.space.nesting_dims == (8, 32)
    untrained = nv.encode(queries.texts, model=str(model), role="query")
    assert np.abs(asks.array - untrained.array).max() > 0.01
    nv.cascade_search(asks, docs, "32@5")
    with pytest.raises(ModelError, match="encodes queries alone"):
        nv.encode(["wing"], model=str(found.folder))


def test_index_answers_the_trained_queries_and_is_bit_for_bit_what_it_was(
    trained, model, judged, tmp_path
):
    pytest.importorskip("lance", reason="nestvec[index]")
    found, options = trained
    docs, queries, qrels = judged
    index = nv.Index.create(tmp_path / "i", docs)
    files = {p: p.read_bytes() for p in (tmp_path / "i").rglob("*") if p.is_file()}
    again = train_queries(model, index, queries, qrels, tmp_path / "q", **options)
    for path, content in files.items():
        assert path.read_bytes() == content
    np.testing.assert_array_equal(index.embeddings().array, docs.array)
    assert index.embeddings().ids.tolist() == docs.ids.tolist()
    assert again.metrics == found.metrics  # the same documents in another box
    asks = nv.encode(queries.texts, model=str(again.folder), role="query")
    assert len(nv.Index.open(tmp_path / "i").search(asks, 3)) == 48


def test_same_command_goes_on_and_another_one_is_refused(trained, model, judged):
    found, options = trained
    docs, queries, qrels = judged
    again = train_queries(model, docs, queries, qrels, found.folder, **options)
    assert again.metrics == found.metrics
    with pytest.raises(TrainingError, match="k was 200, now 9"):
        train_queries(model, docs, queries, qrels, found.folder, k=9, **options)
    with pytest.raises(TrainingError, match="documents was"):
        train_queries(model, docs[::-1], queries, qrels, found.folder, **options)


def test_interrupted_training_goes_on_to_the_very_same_weights(
    model, judged, tmp_path, monkeypatch
):
    docs, queries, qrels = judged
    settings = Settings(batch_size=8, max_steps=6, learning_rate=1e-3, save_every=2)
    options: dict[str, Any] = {"dims": "8,32", "holdout": 0, "keep": 1, "settings": settings}
    whole = train_queries(model, docs, queries, qrels, tmp_path / "whole", **options)
    step = TextTrainer.training_step

    def dies(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(TextTrainer, "training_step", dies)
        with pytest.raises(KeyboardInterrupt):
            train_queries(model, docs, queries, qrels, tmp_path / "part", **options)
    again = train_queries(model, docs, queries, qrels, tmp_path / "part", **options)
    weights = [load_file(one.folder / "model.safetensors") for one in (whole, again)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=0)


def test_loss_that_is_no_number_stops_the_training(model, judged, tmp_path):
    docs, queries, qrels = judged
    wild = Settings(batch_size=8, max_steps=9, learning_rate=1e30, warmup=0)
    with pytest.raises(TrainingError, match="training stopped at step"):
        train_queries(model, docs, queries, qrels, tmp_path / "q", settings=wild)


def test_second_round_starts_from_the_first_and_stays_in_the_space(trained, judged, tmp_path):
    found, _ = trained
    docs, queries, qrels = judged
    one = Settings(batch_size=8, max_steps=1)
    more = train_queries(found.folder, docs, queries, qrels, tmp_path / "q", keep=1, settings=one)
    assert nv.encode(["wing"], model=str(more.folder), role="query").space == docs.space


def test_documents_of_another_space_are_refused(trained, model, judged, tmp_path):
    docs, queries, qrels = judged
    other = tiny_model.build(tmp_path / "other", seed=1)
    with pytest.raises(SpaceMismatchError, match="two spaces"):
        train_queries(other, docs, queries, qrels, tmp_path / "q")
    mapped = nv.PrincipalRotation().fit(docs).transform(docs)
    with pytest.raises(SpaceMismatchError):
        train_queries(model, mapped, queries, qrels, tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_bad_input_says_what_would_fit(model, judged, tmp_path):
    docs, queries, qrels = judged
    with pytest.raises(DataError, match="1 unknown query ids"):
        train_queries(model, docs, queries, {**qrels, "x": {"d0": 1}}, tmp_path / "q")
    with pytest.raises(DataError, match="unknown id 'x'"):
        train_queries(model, docs, queries, {**qrels, "q0": {"x": 1}}, tmp_path / "q")
    with pytest.raises(DataError, match="0 queries with a relevant document"):
        train_queries(model, docs, queries, {"q0": {"d0": 0}}, tmp_path / "q")
    with pytest.raises(DataError, match="leaves 1 to train on"):
        train_queries(model, docs, queries, qrels, tmp_path / "q", holdout=0.999)
