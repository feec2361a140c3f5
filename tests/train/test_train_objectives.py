"""Each objective equals its definition, term by term, and its gradients reach what they should."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="nestvec[fit]")
from torch.nn import functional as F  # noqa: E402  # behind importorskip

from nestvec.errors import DataError, DimensionError  # noqa: E402
from nestvec.train import (  # noqa: E402
    BlockLayerNorm,
    BlockTriangularLinear,
    CoSENT,
    InfoNCE,
    NestedClassifier,
    NestedCrossEntropy,
    NestedDistillation,
    NestedDropout,
    NestedLoss,
    SupervisedContrastive,
    best_size,
    check_labels,
    cut,
)

DIMS = (2, 4, 8)


@pytest.fixture
def draw():
    return torch.Generator().manual_seed(0)


def rows(draw, n=6, dim=8):
    return torch.randn(n, dim, generator=draw)


def test_the_nested_loss_is_the_weighted_sum_over_sizes(draw):
    first, second = rows(draw), rows(draw)
    loss = NestedLoss(InfoNCE(scale=5.0), DIMS, weights=(3.0, 2.0, 1.0))
    by_hand = 0.0
    for dim, weight in zip(DIMS, (3, 2, 1), strict=True):
        a = [r[:dim] / np.linalg.norm(r[:dim]) for r in first.numpy().astype(float)]
        b = [r[:dim] / np.linalg.norm(r[:dim]) for r in second.numpy().astype(float)]
        for i, asked in enumerate(a):
            scores = [5 * float(asked @ other) for other in b]
            by_hand -= weight * (scores[i] - math.log(sum(map(math.exp, scores)))) / len(a)
    assert loss(first, second).item() == pytest.approx(by_hand, rel=1e-5)


def test_the_order_of_sizes_changes_nothing(draw):
    first, second = rows(draw), rows(draw)
    up, down = (NestedLoss(InfoNCE(), dims) for dims in (DIMS, DIMS[::-1]))
    torch.testing.assert_close(up(first, second), down(first, second))


def test_without_normalisation_a_dot_product_stays_one(draw):
    first, second = rows(draw), rows(draw)
    dot = NestedLoss(lambda a, b: (a * b).sum(), (8,), normalise=False)
    torch.testing.assert_close(dot(first, second), (first * second).sum())


def test_inputs_are_never_changed(draw):
    first, second = rows(draw), rows(draw)
    before = first.clone(), second.clone()
    NestedLoss(InfoNCE(), DIMS)(first, second)
    torch.testing.assert_close(first, before[0])
    torch.testing.assert_close(second, before[1])


def test_drawn_sizes_keep_the_full_size_and_the_expected_loss(draw):
    first, second = rows(draw), rows(draw)
    every = NestedLoss(InfoNCE(), DIMS)(first, second).item()
    one = NestedLoss(InfoNCE(), DIMS, n_dims_per_step=2, generator=draw)
    assert all(drawn[-1] == (8, 1.0) for drawn in (one._drawn() for _ in range(20)))
    mean = np.mean([one(first, second).item() for _ in range(400)])
    assert mean == pytest.approx(every, rel=0.03)


def test_labels_pass_through_uncut(draw):
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    loss = NestedLoss(SupervisedContrastive(), DIMS, n_embeddings=1)
    batch = rows(draw)
    terms = [SupervisedContrastive()(cut(batch, d, normalise=True), labels) for d in DIMS]
    torch.testing.assert_close(loss(batch, labels), torch.stack(terms).sum())


def test_symmetric_info_nce_does_not_care_which_side_asks(draw):
    first, second = (F.normalize(rows(draw), dim=1) for _ in range(2))
    loss = InfoNCE(symmetric=True)
    torch.testing.assert_close(loss(first, second), loss(second, first))


def test_hard_negatives_only_raise_the_loss(draw):
    first, second, hard = (F.normalize(rows(draw), dim=1) for _ in range(3))
    assert InfoNCE()(first, second, hard) > InfoNCE()(first, second)


def test_a_learned_scale_gets_a_gradient_and_a_fixed_one_none(draw):
    for learned in (True, False):
        loss = InfoNCE(learned=learned)
        loss(rows(draw).requires_grad_(), rows(draw)).backward()
        assert (loss.log_scale.grad is not None) is learned


def test_supervised_contrastive_matches_the_paper(draw):
    batch = F.normalize(rows(draw), dim=1)
    labels = [0, 0, 0, 1, 1, 2]
    total, counted = 0.0, 0
    for i in range(6):
        partners = [p for p in range(6) if p != i and labels[p] == labels[i]]
        if not partners:
            continue
        counted += 1
        below = sum(math.exp(float(batch[i] @ batch[a]) / 0.1) for a in range(6) if a != i)
        for p in partners:
            above = math.exp(float(batch[i] @ batch[p]) / 0.1)
            total -= math.log(above / below) / len(partners)
    got = SupervisedContrastive()(batch, torch.tensor(labels)).item()
    assert got == pytest.approx(total / counted, rel=1e-4)


def test_a_batch_without_pairs_has_no_loss(draw):
    batch = rows(draw).requires_grad_()
    loss = SupervisedContrastive()(batch, torch.arange(6))
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(batch.grad).all()


def test_distillation_cuts_and_normalises_both_sides_alike(draw):
    teacher = 7 * rows(draw)
    loss = NestedDistillation(DIMS)
    assert loss(0.01 * teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    student = rows(draw)
    want = sum((2 - 2 * F.cosine_similarity(student[:, :d], teacher[:, :d])).mean() for d in DIMS)
    torch.testing.assert_close(loss(student, teacher), want)


def test_the_teacher_is_detached(draw):
    student, teacher = rows(draw).requires_grad_(), rows(draw).requires_grad_()
    NestedDistillation(DIMS)(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_mrl_has_a_head_a_size_and_mrl_e_one_that_is_cut(draw):
    batch, labels = rows(draw), torch.tensor([0, 1, 2, 0, 1, 2])
    separate = NestedClassifier(DIMS, 3)
    tied = NestedClassifier(DIMS, 3, tied=True)
    assert sum(p.numel() for p in separate.parameters()) == 3 * (2 + 4 + 8) + 3 * 3
    assert sum(p.numel() for p in tied.parameters()) == 3 * 8 + 3
    weight, bias = tied.parameters()
    for dim, logits in tied(batch).items():
        torch.testing.assert_close(logits, batch[:, :dim] @ weight[:, :dim].T + bias)
    terms = [F.cross_entropy(separate.logits(batch, d), labels) for d in DIMS]
    torch.testing.assert_close(
        NestedCrossEntropy()(separate(batch), labels), torch.stack(terms).sum()
    )


def test_a_tied_head_takes_sizes_that_were_never_trained_and_separate_heads_refuse(draw):
    batch = rows(draw)
    assert NestedClassifier(DIMS, 3, tied=True).logits(batch, 5).shape == (6, 3)
    with pytest.raises(DimensionError, match="no head of size 5"):
        NestedClassifier(DIMS, 3).logits(batch, 5)
    with pytest.raises(DimensionError, match="size 9 is beyond"):
        NestedClassifier(DIMS, 3, tied=True).logits(rows(draw, dim=10), 9)


def test_a_slice_of_a_nested_network_is_a_smaller_network(draw):
    """Exact to 1e-6 through two layers and a norm (fMRLRec, arXiv:2409.16627)."""
    first = BlockTriangularLinear((3, 5, 10), DIMS)
    norm = BlockLayerNorm(DIMS)
    second = BlockTriangularLinear(DIMS, (1, 2, 6))
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    batch = rows(draw, dim=10)
    whole = second(torch.relu(norm(first(batch))))
    for place, (width, out) in enumerate(zip((3, 5, 10), (1, 2, 6), strict=True)):
        small = second.slice(place)(
            torch.relu(norm.slice(place)(first.slice(place)(batch[:, :width])))
        )
        torch.testing.assert_close(small, whole[:, :out], atol=1e-6, rtol=0)


def test_nested_dropout_keeps_a_geometric_prefix(draw):
    layer = NestedDropout(rate=0.25, generator=draw)
    kept = layer(torch.ones(20_000, 12))
    assert (kept[:, 1:] <= kept[:, :-1]).all()
    assert (kept[:, 0] == 1).all()
    share = kept.mean(dim=0).numpy()
    np.testing.assert_allclose(share, 0.75 ** np.arange(12), atol=0.012)
    layer.eval()
    torch.testing.assert_close(layer(kept), kept)


def test_nested_dropout_draws_anew_for_every_vector(draw):
    layer = NestedDropout(rate=0.25, generator=draw)
    kept = layer(torch.ones(12, 12, 12)).sum(dim=-1)
    assert (kept.std(dim=0) > 0).all()
    assert (kept.std(dim=1) > 0).all()


def test_best_size_is_the_smallest_within_tolerance_of_the_best():
    scores = {32: 0.80, 8: 0.70, 64: 0.81, 16: 0.80}
    assert best_size(scores) == 64
    assert best_size(scores, tolerance=0.015) == 16
    assert best_size({8: 0.5, 16: 0.5}) == 8


def test_queries_of_a_share_are_asked_against_every_document(draw):
    queries, documents = rows(draw), rows(draw)
    loss = InfoNCE(scale=2.0)
    shares = [loss(queries[a : a + 3], documents, offset=a) for a in (0, 3)]
    torch.testing.assert_close(sum(shares) / 2, loss(queries, documents))


NUMBERS = torch.tensor([0, 0, 1, 1, 2, 2])
OBJECTIVES = {
    "info_nce": lambda a, b: InfoNCE()(a, b),
    "symmetric": lambda a, b: InfoNCE(symmetric=True)(b, a),
    "supervised": lambda a, b: SupervisedContrastive()(a, NUMBERS),
    "distillation": lambda a, b: NestedDistillation(DIMS)(a, b),
    "cosent": lambda a, b: CoSENT()(a, b, NUMBERS),
    "nested": lambda a, b: NestedLoss(InfoNCE(), DIMS)(a, b),
    "classes": lambda a, b: NestedCrossEntropy()(NestedClassifier(DIMS, 3)(a), NUMBERS),
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_embedding_that_is_no_number_shows_in_the_loss(draw, name, value):
    first, second = rows(draw), rows(draw)
    first[4, 1] = value
    assert not torch.isfinite(OBJECTIVES[name](first, second))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: NestedLoss(InfoNCE(), ()), DimensionError, "do not fit"),
        (lambda: NestedLoss(InfoNCE(), DIMS, weights="high"), DataError, "uniform, boost_low"),
        (lambda: NestedLoss(InfoNCE(), DIMS, weights=(1.0, 2.0)), DataError, "3 sizes"),
        (lambda: NestedLoss(InfoNCE(), DIMS, n_dims_per_step=4), DataError, "1 to 3"),
        (lambda: NestedLoss(InfoNCE(), (99,))(torch.ones(2, 8)), DimensionError, "99 does not fit"),
        (lambda: BlockTriangularLinear((1, 2), (1, 2, 3)), DimensionError, "do not pair"),
        (lambda: BlockLayerNorm(DIMS)(torch.ones(2, 5)), DimensionError, "5 dims do not end"),
        (lambda: NestedDropout(rate=1.0), DataError, "between 0 and 1"),
        (lambda: NestedLoss(InfoNCE(), (8, 4), weights=(1, 2)), DimensionError, r"as \(4, 8\)"),
        (lambda: NestedLoss(InfoNCE(), "4,4,8", weights=(1, 2, 3)), DimensionError, "each once"),
        (lambda: BlockTriangularLinear((2, 1), (1, 2)), DimensionError, r"as \(1, 2\)"),
        (lambda: InfoNCE()(torch.ones(1, 8), torch.ones(1, 8)), DataError, "without a negative"),
        (lambda: InfoNCE()(torch.ones(3, 8), torch.ones(2, 8)), DataError, "3 queries"),
        (lambda: InfoNCE()(torch.ones(2, 8), torch.ones(4, 8), offset=3), DataError, "document 3"),
        (
            lambda: InfoNCE(symmetric=True)(torch.ones(2, 8), torch.ones(4, 8)),
            DataError,
            "gather the queries too",
        ),
        (
            lambda: SupervisedContrastive()(torch.ones(1, 8), torch.tensor([0])),
            DataError,
            "at least two rows",
        ),
        (
            lambda: SupervisedContrastive()(torch.ones(2, 8), torch.ones(2)),
            DataError,
            "whole number",
        ),
        (lambda: NestedClassifier(DIMS, 1), DataError, "at least 2 are needed"),
        (lambda: best_size({}), DataError, "at least one score"),
        (lambda: best_size({8: math.nan, 16: 0.5}), DataError, "finite"),
        (lambda: check_labels(torch.tensor([0, 1, -1]), 2), DataError, "label -1 of row 2"),
        (
            lambda: NestedCrossEntropy()({8: torch.ones(2, 3)}, torch.tensor([0, 3])),
            DataError,
            "label 3 of row 1 does not fit 3 classes: 0 to 2",
        ),
        (
            lambda: NestedCrossEntropy()({8: torch.ones(2, 3)}, torch.ones(2)),
            DataError,
            r"whole numbers \(n,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_saying_what_would(make, error, says):
    with pytest.raises(error, match=says):
        make()
