"""The masked-LM head predicts from every prefix, and looks at the masked places only."""

import pytest

torch = pytest.importorskip("torch", reason="nestvec[fit]")
from torch import nn  # noqa: E402  # behind importorskip
from torch.nn import functional as F  # noqa: E402

from nestvec.errors import DataError, DimensionError  # noqa: E402
from nestvec.train import (  # noqa: E402
    BlockLayerNorm,
    BlockTriangularLinear,
    NestedMaskedLM,
)

DIMS = (2, 4, 8)
LABELS = torch.tensor([[-100, 3, -100, -100], [10, -100, -100, 0]])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def hidden():
    return torch.randn(2, 4, 8, requires_grad=True)


def shaken(head):
    with torch.no_grad():
        for one in head.parameters():
            one.normal_()
    return head


def test_the_loss_is_the_sum_over_sizes_of_the_mean_over_masked_tokens(hidden):
    head = shaken(NestedMaskedLM(DIMS, 11, weights=(3, 2, 1)))
    want = 0.0
    for dim, weight in zip(DIMS, (3, 2, 1), strict=True):
        for place in ((0, 1), (1, 0), (1, 3)):
            scores = head.weight[:, :dim] @ hidden[place][:dim] + head.bias
            want += weight * (torch.logsumexp(scores, 0) - scores[LABELS[place]]).item() / 3
    assert head(hidden, LABELS).item() == pytest.approx(want, rel=1e-5)


def test_one_size_is_the_usual_masked_lm_loss(hidden):
    head = shaken(NestedMaskedLM((8,), 11))
    want = F.cross_entropy(head.logits(hidden, 8).flatten(0, 1), LABELS.flatten())
    torch.testing.assert_close(head(hidden, LABELS), want)


def test_separate_decoders_are_one_linear_layer_a_size(hidden):
    head = NestedMaskedLM(DIMS, 11, tied=False)
    assert sum(p.numel() for p in head.parameters()) == 11 * (2 + 4 + 8) + 3 * 11
    for dim, layer in zip(DIMS, head.decoders, strict=True):
        torch.testing.assert_close(head.logits(hidden, dim), layer(hidden[..., :dim]))


def test_a_tied_head_shares_the_token_embeddings_and_adds_a_bias_only(hidden):
    words = nn.Embedding(11, 8)
    head = NestedMaskedLM(DIMS, 11, embedding=words)
    assert head.weight is words.weight
    assert NestedMaskedLM(DIMS, 11, embedding=words.weight).weight is words.weight
    head(hidden, LABELS).backward()
    assert words.weight.grad is not None
    assert [name for name, _ in head.named_parameters()] == ["bias", "weight"]


def test_only_masked_places_become_logits_and_get_gradients(hidden):
    seen = []

    class Counted(NestedMaskedLM):
        def logits(self, hidden, dim):
            seen.append(hidden.shape)
            return super().logits(hidden, dim)

    Counted(DIMS, 11)(hidden, LABELS).backward()
    assert seen == [(3, 8)] * 3
    assert (hidden.grad.abs().sum(dim=-1) > 0).equal(LABELS != -100)


def test_a_block_triangular_transform_keeps_a_prefix_a_prefix(hidden):
    linear, norm = BlockTriangularLinear(DIMS, DIMS), BlockLayerNorm(DIMS)
    head = shaken(NestedMaskedLM(DIMS, 11))
    want = head.logits(norm(F.gelu(linear(hidden))), 4)
    small = norm.slice(1)(F.gelu(linear.slice(1)(hidden[..., :4])))
    torch.testing.assert_close(head.logits(small, 4), want)


def test_accuracy_is_the_share_of_masked_tokens_predicted_right():
    head = NestedMaskedLM((2, 3), 3)
    with torch.no_grad():
        head.weight.copy_(torch.eye(3))
    hidden = torch.tensor([[[1.0, 0, 0], [0, 1, 0]], [[1, 0, 2], [0, 0, 1]]])
    labels = torch.tensor([[0, 1], [2, -100]])  # two dims cannot see the third token
    assert head.accuracy(hidden, labels) == {2: pytest.approx(2 / 3), 3: 1.0}


def test_a_batch_without_masked_tokens_has_no_loss_and_no_gradient(hidden):
    head = NestedMaskedLM(DIMS, 11)
    loss = head(hidden, torch.full((2, 4), -100))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert head.weight.grad is not None
    assert not head.weight.grad.any()
    with pytest.raises(DataError, match="no token is masked"):
        head.accuracy(hidden, torch.full((2, 4), -100))


@pytest.mark.parametrize("tied", [True, False])
def test_it_learns(tied):
    """Four tokens in two dims: every size can know them, given what stands there."""
    hidden, labels = torch.eye(4).repeat(5, 1)[None], torch.arange(4).repeat(5)[None]
    lift, head = nn.Linear(4, 8), NestedMaskedLM((2, 8), 4, tied=tied)
    optimizer = torch.optim.Adam([*lift.parameters(), *head.parameters()], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        head(lift(hidden), labels).backward()
        optimizer.step()
    assert head.accuracy(lift(hidden), labels) == {2: 1.0, 8: 1.0}


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: NestedMaskedLM(DIMS, 11, embedding=nn.Embedding(11, 6)), DimensionError, "11, 8"),
        (lambda: NestedMaskedLM(DIMS, 11, embedding=torch.ones(11, 8)), DataError, "no nn.Param"),
        (
            lambda: NestedMaskedLM(DIMS, 11, embedding=nn.Embedding(11, 8), tied=False),
            DataError,
            "leave out one",
        ),
        (lambda: NestedMaskedLM(DIMS, 11).logits(torch.ones(1, 16), 9), DimensionError, "beyond"),
        (lambda: NestedMaskedLM(DIMS, 11).logits(torch.ones(1, 4), 8), DimensionError, "dim 4"),
        (
            lambda: NestedMaskedLM(DIMS, 11, tied=False).logits(torch.ones(1, 8), 3),
            DimensionError,
            "no decoder of size 3",
        ),
        (
            lambda: NestedMaskedLM(DIMS, 10)(torch.ones(2, 4, 8), LABELS),
            DataError,
            "label 10 of row 1, 0 does not fit 10 classes: 0 to 9",
        ),
        (
            lambda: NestedMaskedLM(DIMS, 11)(torch.ones(2, 5, 8), LABELS),
            DataError,
            r"\(2, 4\) do not fit hidden states \(2, 5, 8\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_saying_what_would(make, error, says):
    with pytest.raises(error, match=says):
        make()
