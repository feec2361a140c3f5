"""Scored pairs are ranked by the loss that CoSENT defines."""

import math

import pytest

torch = pytest.importorskip("torch", reason="nestvec[fit]")

from nestvec.errors import DataError  # noqa: E402  # behind importorskip
from nestvec.train import CoSENT, NestedLoss  # noqa: E402

SCORES = [0.5, 3.0, 0.5, 1.0, 3.0, 2.0]


@pytest.fixture
def pairs():
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(6, 8, generator=draw) for _ in range(2)]


def by_loops(first, second, scores, *, scale):
    cosines = [float(a @ b / a.norm() / b.norm()) for a, b in zip(first, second, strict=True)]
    total = 1.0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if scores[i] > scores[j]:
                total += math.exp(scale * (cosines[j] - cosines[i]))
    return math.log(total)


def test_the_loss_is_its_definition_at_every_size(pairs):
    loss = NestedLoss(CoSENT(scale=7), (2, 8), n_embeddings=2)
    first, second = pairs
    want = sum(by_loops(first[:, :d], second[:, :d], SCORES, scale=7) for d in (2, 8))
    assert loss(first, second, torch.tensor(SCORES).double()).dtype == torch.float32
    assert loss(first, second, torch.tensor(SCORES)).item() == pytest.approx(want, rel=1e-5)


def test_only_the_order_of_the_scores_counts(pairs):
    scores, loss = torch.tensor(SCORES), CoSENT()
    torch.testing.assert_close(loss(*pairs, scores), loss(*pairs, (9 * scores).exp()))
    torch.testing.assert_close(loss(*pairs, scores), loss(*pairs, (2 * scores).long()))


def test_equal_scores_have_no_loss_and_no_gradient(pairs):
    first = pairs[0].requires_grad_()
    loss = CoSENT()(first, pairs[1], torch.ones(6))
    loss.backward()
    assert loss.item() == 0
    assert first.grad is not None
    assert not first.grad.any()


def test_half_precision_rows_are_ranked_in_full_precision(pairs):
    halves, scores = [p.half() for p in pairs], torch.tensor(SCORES)
    loss = CoSENT(scale=1e5)  # beyond what float16 holds
    torch.testing.assert_close(loss(*halves, scores), loss(*(h.float() for h in halves), scores))


def test_a_score_that_is_no_number_is_named(pairs):
    scores = torch.tensor([*SCORES[:4], math.nan, 1.0])
    with pytest.raises(DataError, match="score of row 4 is nan"):
        CoSENT()(*pairs, scores)


def test_scores_that_do_not_pair_with_the_rows_are_refused(pairs):
    for scores in (torch.ones(5), torch.ones(6, 1)):
        with pytest.raises(DataError, match=r"\(n,\) do"):
            CoSENT()(*pairs, scores)
    with pytest.raises(DataError, match="above 0"):
        CoSENT(scale=0)
