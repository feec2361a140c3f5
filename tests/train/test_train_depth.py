"""Objectives over layers are sums that can be written out, and train_text trains with them."""

import json
import math
from itertools import product
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="nestvec[fit]")
pytest.importorskip("sentence_transformers", reason="nestvec[text]")
pytest.importorskip("accelerate", reason="nestvec[text]")

import tiny_model  # noqa: E402  # behind importorskip
from sentence_transformers import SentenceTransformer  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from nestvec.corpus.examples import Examples  # noqa: E402
from nestvec.encoders.layers import Layers  # noqa: E402
from nestvec.errors import DataError, DimensionError, TrainingError  # noqa: E402
from nestvec.train import (  # noqa: E402
    ESE,
    CoSENT,
    FixedPairs,
    InfoNCE,
    KeepInDepth,
    KeepNeighbours,
    NestedLoss,
    SentenceTransformerLoss,
    Settings,
    TwoDMSE,
    pairs_of,
    train_text,
)
from nestvec.train.depth import principal_target  # noqa: E402

LAYERS, DIMS = (1, 2, 3), (4, 8, 16)
WORDS = tiny_model.WORDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    still: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    place = tmp_path_factory.mktemp("tiny") / "m"
    return tiny_model.build(place, num_hidden_layers=3, **still)


@pytest.fixture(scope="module")
def model(folder):
    return SentenceTransformer(str(folder), device="cpu")


@pytest.fixture
def columns():
    torch.manual_seed(0)
    return [torch.randn(6, 3, 16, requires_grad=True) for _ in range(2)]


def texts(n, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 4)) for _ in range(n)]


def pairs(n=48):
    first = texts(n)
    other: dict[str, str] = dict(
        zip(WORDS, np.random.default_rng(7).permutation(WORDS).tolist(), strict=True)
    )
    return Examples("pairs", (first, [" ".join(other[w] for w in t.split()) for t in first]))


# --- schedules -----------------------------------------------------------------------------------


def test_a_ladder_rises_from_the_first_layer_and_size_to_the_last_of_both():
    six = tuple(range(1, 7))
    dims = (16, 32, 64, 128, 256, 384)
    found = pairs_of("ladder", six, dims)
    assert set(found) == {*zip(six, dims, strict=True), *((6, d) for d in dims)}
    few = pairs_of("ladder", (2, 4, 6), dims)
    assert [pair for pair in few if pair[0] < 6] == [(2, 16), (4, 64)]
    assert set(pairs_of("edges", (2, 4, 6), dims)) == {*few, (2, 384), (4, 384)}
    assert pairs_of("grid", (2, 6), (8, 16)) == tuple(product((2, 6), (8, 16)))


@pytest.mark.parametrize("pair", [(4, 8), (0, 8), (1, 5)])
def test_a_pair_that_the_model_lacks_is_refused(pair):
    with pytest.raises(
        DataError, match=r"pair \(layer \d, dim \d\) does not fit: layers \(1, 2, 3"
    ):
        pairs_of([pair], LAYERS, DIMS)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(DataError, match="is not one of ladder, edges, grid"):
        pairs_of("random", LAYERS, DIMS)


# --- fixed pairs ---------------------------------------------------------------------------------


def test_fixed_pairs_are_the_written_out_sum(columns):
    loss = FixedPairs(
        InfoNCE(), LAYERS, DIMS, pairs=[(1, 4), (2, 16)], prior_layers_weight=0.5, kl_div_weight=2
    )
    base = InfoNCE()

    def cell(layer, dim):
        a, b = (F.normalize(c[:, layer - 1, :dim], dim=1) for c in columns)
        return base(a, b)

    want = sum(cell(3, dim) for dim in DIMS) + 0.5 * (cell(1, 4) + cell(2, 16))
    every = torch.cat(columns)
    for layer, dim in ((1, 4), (2, 16)):
        want = want + 2 * KeepNeighbours([dim])(every[:, layer - 1], every[:, 2])
    torch.testing.assert_close(loss(*columns), want)


def test_the_last_layer_alone_is_the_nested_loss(columns):
    loss = FixedPairs(InfoNCE(), (3,), DIMS)
    last = [c[:, 2:] for c in columns]
    want = NestedLoss(InfoNCE(), DIMS)(*(c[:, 0] for c in last))
    torch.testing.assert_close(loss(*last), want)


def test_the_teacher_gets_no_gradient(columns):
    loss = FixedPairs(InfoNCE(), LAYERS, DIMS, last_layer_weight=0)
    loss(*columns).backward()
    for column in columns:
        assert column.grad[:, :2].abs().max() > 0
        assert column.grad[:, 2].abs().max() == 0


def test_scored_pairs_and_a_teacher_of_other_vectors_fit(columns):
    scores = torch.rand(6)
    found = FixedPairs(CoSENT(), LAYERS, DIMS, n_embeddings=2, kl_div_weight=0)(*columns, scores)
    cells = [CoSENT()(*(F.normalize(c[:, at, :d], dim=1) for c in columns), scores)
             for at, d in product(range(3), DIMS)]  # fmt: skip
    torch.testing.assert_close(found, torch.stack(cells).sum())

    def distance(student, teacher):
        return (student - teacher).square().sum(dim=1).mean()

    teacher = torch.randn(6, 16)
    found = FixedPairs(distance, LAYERS, DIMS, kl_div_weight=0)(columns[0], teacher)
    rows = [distance(F.normalize(columns[0][:, at, :d], dim=1), F.normalize(teacher[:, :d], dim=1))
            for at, d in product(range(3), DIMS)]  # fmt: skip
    torch.testing.assert_close(found, torch.stack(rows).sum())


def test_teacher_and_student_of_unlike_sizes_are_refused(columns):
    loss = FixedPairs(F.mse_loss, LAYERS, DIMS)
    with pytest.raises(DimensionError, match="embeddings of 16 and 24 dims cannot be compared"):
        loss(columns[0], torch.randn(6, 24))


@pytest.mark.parametrize("objective", [FixedPairs, TwoDMSE, ESE])
def test_rows_of_other_layers_are_refused(objective, columns):
    options: dict[str, Any] = {"compression_size": 8} if objective is ESE else {}
    loss = objective(InfoNCE(), (1, 2), DIMS, **options)
    with pytest.raises(DataError, match=r"do not fit the 2 layers \(1, 2\)"):
        loss(*columns)


def test_keeping_in_depth_is_keeping_at_every_layer(columns):
    start = torch.randn(6, 40)
    found = KeepInDepth(LAYERS, [(1, 4), (3, 16), (3, 8)])(columns[0], start)
    want = KeepNeighbours([4])(columns[0][:, 0], start)
    want = want + KeepNeighbours([8, 16])(columns[0][:, 2], start)
    torch.testing.assert_close(found, want)


# --- the published objectives --------------------------------------------------------------------


def test_2dmse_is_four_losses_and_an_alignment(columns):
    loss = TwoDMSE(InfoNCE(), LAYERS, DIMS, generator=torch.Generator().manual_seed(3))
    drawn = torch.Generator().manual_seed(3)
    layer = 1 + int(torch.randint(2, (), generator=drawn))
    dim = DIMS[int(torch.randint(2, (), generator=drawn))]
    want = 0.0
    for at, size in ((3, 16), (3, dim), (layer, 16), (layer, dim)):
        want = want + InfoNCE()(*(F.normalize(c[:, at - 1, :size], dim=1) for c in columns))
    for column in columns:
        teacher, student = ((column[:, at - 1] / 0.3).softmax(dim=1) for at in (3, layer))
        kl = (teacher * (teacher / student).log()).sum(dim=1).mean()
        want = want + 0.3 * kl
    torch.testing.assert_close(loss(*columns), want)


def test_2dmse_draws_every_layer_and_size_but_the_last(columns):
    loss = TwoDMSE(InfoNCE(), LAYERS, DIMS, generator=torch.Generator().manual_seed(0))
    seen = set()
    loss._cell = lambda rows, rest, layer, dim: seen.add((layer, dim)) or torch.zeros(())
    for _ in range(60):
        loss(*columns)
    assert seen == set(product(LAYERS, DIMS))


@pytest.mark.parametrize("detach", [True, False])
def test_2dmse_can_let_the_alignment_move_the_teacher(detach, columns):
    loss = TwoDMSE(InfoNCE(), LAYERS, DIMS, detach_teacher=detach)
    loss._alignment(columns[0], 1).backward()
    assert bool(columns[0].grad[:, 2].abs().max() == 0) == detach


def test_2dmse_with_nothing_to_draw_is_refused():
    with pytest.raises(DataError, match="leave nothing to draw"):
        TwoDMSE(InfoNCE(), (3,), DIMS)


def test_ese_is_its_formula(columns, monkeypatch):
    targets = {}

    def target(rows, k):  # of the first call: the random projection decides signs
        key = float(rows.detach().sum())
        return targets.setdefault(key, principal_target(rows, k))

    monkeypatch.setattr("nestvec.train.depth.principal_target", target)
    loss = ESE(InfoNCE(), LAYERS, DIMS, compression_size=4)
    found = loss(*columns)

    def compressed(layer):
        total = InfoNCE()(*(F.normalize(c[:, layer - 1, :4], dim=1) for c in columns))
        for column in columns:
            whole = column[:, layer - 1]
            short, goal = whole[:, :4], target(whole, 4)
            p, q = goal.softmax(dim=1), short.softmax(dim=1)
            total = total + ((short - goal) ** 2).mean() + (p * (p / q).log()).sum(1).mean()
        return total

    want = InfoNCE()(*(F.normalize(c[:, 2], dim=1) for c in columns)) + compressed(3)
    for layer in (1, 2):
        want = want + compressed(layer) / (1 + math.log(1 + layer)) / 2
    torch.testing.assert_close(found, want)


def test_the_target_of_ese_is_that_of_a_full_decomposition(rng):
    rows = rng.normal(size=(9, 8)).astype(np.float32)
    gram = rows.T @ rows / math.sqrt(8)
    gram = np.exp(gram - gram.max(axis=1, keepdims=True))
    left, values, _ = np.linalg.svd(gram / gram.sum(axis=1, keepdims=True))
    got = principal_target(torch.from_numpy(rows), 8).numpy()  # fewer are found by random draws
    np.testing.assert_allclose(np.abs(got), np.abs(rows @ left * values), atol=1e-4)  # signs: free


def test_the_published_codes_quirk_is_kept_under_its_name():
    assert ESE(InfoNCE(), LAYERS, DIMS, compression_size=8).layers == (1, 2, 3)
    quirk = ESE(InfoNCE(), LAYERS, DIMS, compression_size=8, variant="angle")
    assert quirk.layers == (0, 1, 3)  # the layer before the last is never supervised
    with pytest.raises(DataError, match="takes all layers from 1"):
        ESE(InfoNCE(), (2, 3), DIMS, compression_size=8, variant="angle")
    with pytest.raises(DimensionError, match="compression_size 128 does not fit"):
        ESE(InfoNCE(), LAYERS, DIMS)


# --- in an encoder -------------------------------------------------------------------------------


def features(model, n=10):
    return [dict(model.preprocess(texts(n, seed))) for seed in (1, 2)]


@pytest.mark.parametrize("chunk_size", [3, 10])
def test_chunks_have_the_loss_and_gradients_of_the_whole_batch(model, chunk_size):
    found = {}
    for chunks in (None, chunk_size):
        objective = FixedPairs(InfoNCE(), LAYERS, (8, 32))
        loss = SentenceTransformerLoss(model, objective, chunk_size=chunks)
        model.zero_grad()
        value = loss(features(model))
        value.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found[chunks] = value.detach(), gradients
    model.zero_grad()
    torch.testing.assert_close(found[chunk_size][0], found[None][0])
    assert found[chunk_size][1].keys() == found[None][1].keys()
    for name, gradient in found[None][1].items():
        torch.testing.assert_close(found[chunk_size][1][name], gradient, atol=1e-5, rtol=1e-4)


def test_the_angle_variant_reads_what_goes_into_the_first_layer(model):
    objective = ESE(InfoNCE(), LAYERS, (8, 32), compression_size=8, variant="angle")
    assert torch.isfinite(SentenceTransformerLoss(model, objective)(features(model)))


def test_an_objective_of_another_depth_is_refused(model):
    with pytest.raises(DataError, match="do not end with the last of this model, 3"):
        SentenceTransformerLoss(model, FixedPairs(InfoNCE(), (1, 2), (8, 32)))


@pytest.mark.parametrize("depth", ["fixed", "2dmse", "ese"])
def test_training_leaves_a_folder_with_its_layers(depth, folder, tmp_path):
    found = train_text(
        str(folder),
        pairs(),
        tmp_path / "out",
        dims=(8, 32),
        layers="1,2",
        depth=depth,
        holdout=0.25,
        keep=0.5,
        settings=Settings(batch_size=12, learning_rate=1e-3),
    )
    assert found.layers == (1, 2, 3)
    cells = ["8", "32", "1x8", "1x32", "2x8", "2x32"]
    assert set(found.metrics) - {"epoch"} == {f"top1@{cell}" for cell in cells}
    config = json.loads((found.folder / "config.json").read_text())
    assert config["matryoshka_layers"] == [1, 2, 3]
    assert config["matryoshka_dimensions"] == [8, 32]
    card = (found.folder / "README.md").read_text()
    assert "| layer | 8 | 32 |" in card
    assert "nestvec export out -o shorter --layer 1 --dim 32" in card
    assert Layers(SentenceTransformer(str(found.folder), device="cpu")).n == 3


def test_training_in_depth_goes_on_to_the_same_weights(folder, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    from nestvec.train.text import TextTrainer

    options: dict[str, Any] = {
        "dims": (8, 32),
        "layers": [1],
        "depth": "2dmse",
        "holdout": 0,
        "keep": 1.0,
    }
    options["settings"] = Settings(batch_size=8, learning_rate=1e-3, save_every=2)
    whole = train_text(str(folder), pairs(), tmp_path / "whole", **options)
    real = TextTrainer.training_step

    def dies(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(TextTrainer, "training_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train_text(str(folder), pairs(), tmp_path / "again", **options)
    monkeypatch.undo()
    again = train_text(str(folder), pairs(), tmp_path / "again", **options)
    want, got = (load_file(f.folder / "model.safetensors") for f in (whole, again))
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=0, rtol=0)


def test_another_depth_in_the_folder_is_refused(folder, tmp_path):
    options: dict[str, Any] = {"dims": (8, 32), "layers": [1], "holdout": 0}
    options["settings"] = Settings(batch_size=8, max_steps=1)
    train_text(str(folder), pairs(), tmp_path / "out", **options)
    with pytest.raises(TrainingError, match="layers was"):
        train_text(str(folder), pairs(), tmp_path / "out", **{**options, "layers": [2]})


def test_a_loss_that_is_no_number_stops_it(folder, tmp_path):
    def broken(a, b):
        return (a * b).sum() * float("nan")

    objective = FixedPairs(broken, LAYERS, (8, 32))
    with pytest.raises(TrainingError, match="step 1: the loss is nan"):
        train_text(str(folder), pairs(), tmp_path / "out", objective=objective, dims=(8, 32),
                   holdout=0, settings=Settings(batch_size=8))  # fmt: skip


def test_what_cannot_be_trained_in_depth_says_so(folder, tmp_path):
    def train(examples=None, **options):
        return train_text(str(folder), examples or pairs(), tmp_path / "out", **options)

    with pytest.raises(DataError, match=r"layers \[4\] do not fit a model of 3 layers"):
        train(layers=[4])
    with pytest.raises(DataError, match="depth 'random' is not one of fixed, 2dmse, ese"):
        train(layers=[1], depth="random")
    labelled = Examples("labelled", (texts(8),), np.zeros(8, dtype=np.int64), ("a", "b"))
    with pytest.raises(DataError, match="classifiers of its own"):
        train(labelled, layers=[1])
    with pytest.raises(DataError, match="every pair of a layer and a size counts alike"):
        train(layers=[1], weights="boost_low")
    with pytest.raises(DataError, match="takes the last alone"):
        train(layers=[1], objective=NestedLoss(InfoNCE(), (8, 32)))
    with pytest.raises(DataError, match=r"the objective has layers \(1, 2, 3\)"):
        train(layers=[1], objective=FixedPairs(InfoNCE(), LAYERS, (8, 32)))
    assert not (tmp_path / "out").exists()
