"""The compatible objectives agree with slow versions of them, and keep what they promise."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="nestvec[fit]")

from torch.nn import functional as F  # noqa: E402  # behind importorskip

from nestvec.encoders.wider import (  # noqa: E402
    BalancedLinear,
    ChangedBasis,
    describe_head,
    head_from,
    wider_linear,
)
from nestvec.errors import DataError, DimensionError  # noqa: E402
from nestvec.train import (  # noqa: E402
    BackwardCompatible,
    BasisTransformation,
    BlockOrthogonal,
    CompatiblePairs,
    NestedClassifier,
    OldClasses,
    OrthogonalCompatible,
)
from nestvec.train.compatible_pairs import WithOld  # noqa: E402

N, CLASSES, OLD = 24, 3, 6


@pytest.fixture
def old():
    torch.manual_seed(0)
    return torch.randn(N, OLD), torch.arange(N) % CLASSES


def rows(dim, seed=1):
    torch.manual_seed(seed)
    return torch.randn(N, dim, requires_grad=True)


def unit(x):
    x = np.asarray(x, dtype=np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def means_by_hand(old, dim):
    """A loop a class: add up unit rows, divide by how many there were."""
    vectors, labels = old
    found = np.zeros((CLASSES, dim))
    for c in range(CLASSES):
        own = [
            unit(v[None, :dim])[0] for v, y in zip(vectors.numpy(), labels, strict=True) if y == c
        ]
        found[c] = sum(own) / len(own)
    return found


def cross_entropy_by_hand(logits, labels, smoothing=0.0):
    total = 0.0
    for row, y in zip(np.asarray(logits, np.float64), labels, strict=True):
        log_share = row - np.log(np.exp(row).sum())
        target = np.full(len(row), smoothing / len(row))
        target[y] += 1 - smoothing
        total -= (target * log_share).sum()
    return total / len(labels)


def logits_by_hand(head, rows):
    state = {name: value.double().numpy() for name, value in head.state_dict().items()}
    return rows @ state["heads.0.weight"].T + state["heads.0.bias"]


def stir(module, seed=2):
    """Move what starts as no change to somewhere."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.5 * torch.randn_like(parameter)


# --- where the old model puts each class ----------------------------------------------------------


@pytest.mark.parametrize("dim", [2, OLD])
def test_old_classes_are_means_of_unit_rows(old, dim):
    found = OldClasses(old[0], old[1], CLASSES, dims=(2, OLD)).means(dim)
    np.testing.assert_allclose(found, means_by_hand(old, dim), atol=1e-6)


def test_a_class_that_the_old_model_never_saw_needs_its_vectors(old):
    with pytest.raises(DataError, match=r"class 3 has no old vector"):
        OldClasses(old[0], old[1], CLASSES + 1)


def test_old_classes_refuse_what_does_not_fit(old):
    vectors, labels = old
    with pytest.raises(DataError, match=r"24 old vectors and \(23,\) labels"):
        OldClasses(vectors, labels[:-1], CLASSES)
    with pytest.raises(DataError, match=r"label 2 of row 2 does not fit 2 classes"):
        OldClasses(vectors, labels, 2)
    with pytest.raises(DimensionError, match=r"nesting dim 7 does not fit"):
        OldClasses(vectors, labels, CLASSES, dims=(2, 7))


# --- BCT ------------------------------------------------------------------------------------------


def test_bct_by_hand(old):
    new, labels = rows(OLD), old[1]
    head = NestedClassifier((OLD,), CLASSES)
    found = BackwardCompatible(head, OldClasses(old[0], old[1], CLASSES), weight=7)(new, labels)
    own = logits_by_hand(head, new.detach().numpy())
    told = unit(new.detach()) @ means_by_hand(old, OLD).T
    want = cross_entropy_by_hand(own, labels) + 7 * cross_entropy_by_hand(told, labels)
    assert float(found.detach()) == pytest.approx(want, rel=1e-5)


def test_rows_that_are_too_short_for_the_old_model_are_refused(old):
    classes = OldClasses(old[0], old[1], CLASSES)
    for objective in (BackwardCompatible, OrthogonalCompatible):
        with pytest.raises(DimensionError, match=r"rows of 4 dims cannot hold an old model of 6"):
            objective(NestedClassifier((4,), CLASSES), classes)


# --- OCA ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_oca_by_hand(old, smoothing):
    new, labels = rows(OLD + 4), old[1]
    head = NestedClassifier((OLD + 4,), CLASSES)
    loss = OrthogonalCompatible(
        head,
        OldClasses(old[0], old[1], CLASSES),
        scale=6,
        lambdas=(2, 3, 4),
        vectors=5,
        label_smoothing=smoothing,
    )
    stir(loss.rotation)
    found = loss(new, labels, old[0])
    z = unit(new.detach())
    turned = z @ loss.rotation.matrix().detach().numpy().T
    own = 6 * logits_by_hand(head, turned)
    means, prefix = means_by_hand(old, OLD), unit(z[:, :OLD])
    near = np.mean([1 - p @ unit(means[y][None])[0] for p, y in zip(prefix, labels, strict=True)])
    vectors = np.mean(1 - (prefix * unit(old[0])).sum(axis=1))
    want = (
        2 * cross_entropy_by_hand(own, labels, smoothing)
        + 3 * cross_entropy_by_hand(prefix @ means.T, labels)
        + 4 * near
        + 5 * vectors
    )
    assert float(found.detach()) == pytest.approx(want, rel=1e-5)


def test_the_weights_of_oca_are_those_of_its_code_unless_told(old):
    head, classes = NestedClassifier((OLD,), CLASSES), OldClasses(old[0], old[1], CLASSES)
    assert OrthogonalCompatible(head, classes).lambdas == (5, 10, 5)
    with pytest.raises(DataError, match=r"three weights of 0 or more"):
        OrthogonalCompatible(head, classes, lambdas=(1, 2))


def test_classifiers_are_served_without_the_rotation(old):
    head = NestedClassifier((2, OLD, OLD + 4), CLASSES, normalise=True)
    loss = OrthogonalCompatible(head, OldClasses(old[0], old[1], CLASSES), scale=16)
    stir(loss)
    new = F.normalize(rows(OLD + 4).detach(), dim=-1)
    turned, plain = head(loss.rotation(new)), loss.plain_head()(new)
    for dim in head.dims:
        torch.testing.assert_close(plain[dim], 16 * turned[dim], atol=1e-4, rtol=1e-5)


# --- orthogonal maps ------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [(12,), (2, 5, 12)], ids=["one block", "nested"])
def test_an_orthogonal_map_stays_one_while_it_is_trained(dims):
    turn = BlockOrthogonal(dims)
    torch.testing.assert_close(turn.matrix(), torch.eye(12))
    goal, start = rows(12, seed=3).detach(), rows(12, seed=4).detach()
    optimizer = torch.optim.AdamW(turn.parameters(), lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        (turn(start) - goal).square().mean().backward()
        optimizer.step()
    matrix = turn.matrix().detach()
    assert (matrix - torch.eye(12)).abs().max() > 0.3  # it moved
    assert (matrix.T @ matrix - torch.eye(12)).abs().max() < 1e-5
    turned = turn(start)
    torch.testing.assert_close(turned @ turned.T, start @ start.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(turned, start @ matrix.T)


def test_a_block_wise_map_keeps_prefixes():
    turn = BlockOrthogonal((2, 5, 12))
    stir(turn)
    whole, other = rows(12).detach(), rows(12, seed=5).detach()
    other[:, :5] = whole[:, :5]  # alike up to 5, then not
    torch.testing.assert_close(turn(whole)[:, :5], turn(other)[:, :5])
    torch.testing.assert_close(turn(whole)[:, :5].norm(dim=1), whole[:, :5].norm(dim=1))
    one = BlockOrthogonal((12,))
    stir(one)
    assert (one(whole)[:, :5] - one(other)[:, :5]).abs().max() > 0.1
    with pytest.raises(DimensionError, match=r"7 dims do not fit a map of 12"):
        turn(whole[:, :7])


# --- BT2 ------------------------------------------------------------------------------------------


def basis(in_dim=10, dim=8, extra=3):
    torch.manual_seed(6)
    made = ChangedBasis(in_dim, OLD, dim, extra=extra, scale=2)
    stir(made)
    return made


def test_a_change_of_basis_by_hand():
    layer, x = basis(), rows(10).detach()
    found = layer(x).detach().numpy()
    h = x @ layer.features.weight.detach().T
    p = unit(h[:, :8])
    o = np.maximum(h.numpy(), 0) @ layer.added.weight.detach().numpy().T
    o = unit(o + layer.added.bias.detach().numpy())
    new, before = (
        m.weight.detach().numpy().astype(float) for m in (layer.new_basis, layer.old_basis)
    )
    both = np.concatenate([o, 2 * p @ new.T], axis=1)
    want = np.concatenate([both[:, :OLD] @ before.T, both[:, OLD:]], axis=1)
    np.testing.assert_allclose(found, want, atol=1e-5)
    for matrix in (new, before):
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(len(matrix)), atol=1e-5)


def test_a_change_of_basis_loses_nothing():
    layer, x = basis(), rows(10).detach()
    found = layer(x)
    said = F.normalize(layer.features(x)[:, :8], dim=1)
    torch.testing.assert_close(layer.new_part(found), said, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.norm(dim=1), torch.full((N,), 5.0).sqrt())  # 1 + 2 * 2
    torch.testing.assert_close(layer.fixed()(x), found)
    assert not any("original" in name for name in layer.fixed().state_dict())


@pytest.mark.parametrize("sizes", [(10, 6, 2, 3), (10, 6, 8, 7), (10, 6, 8, 0)])
def test_sizes_that_make_no_basis_are_refused(sizes):
    in_dim, old_dim, dim, extra = sizes
    with pytest.raises(DimensionError, match=r"does not fit: 1 <= extra"):
        ChangedBasis(in_dim, old_dim, dim, extra=extra)


@pytest.mark.parametrize("with_independent", [False, True])
def test_bt2_by_hand(old, with_independent):
    layer, labels = basis(), old[1]
    head = NestedClassifier((8,), CLASSES)
    loss = BasisTransformation(layer, head, OldClasses(old[0], old[1], CLASSES, dims=(2, OLD)))
    x, independent = rows(10).detach(), rows(8, seed=7).detach()
    found = loss(layer(x), labels, old[0], independent if with_independent else None)
    v, p = layer(x).detach().numpy(), unit(layer.features(x).detach()[:, :8])
    want = cross_entropy_by_hand(logits_by_hand(head, p), labels)
    for dim in (2, OLD):
        prefix = unit(v[:, :dim])
        want += 10 / 2 * cross_entropy_by_hand(prefix @ means_by_hand(old, dim).T, labels)
        want += 5 / 2 * np.mean(1 - (prefix * unit(old[0][:, :dim])).sum(axis=1))
    if with_independent:
        want += np.mean(1 - (p * unit(independent)).sum(axis=1))
    assert float(found.detach()) == pytest.approx(want, rel=1e-4)


def test_bt2_refuses_sizes_that_do_not_fit(old):
    with pytest.raises(DimensionError, match=r"does not fit classifiers of 9 dims"):
        BasisTransformation(
            basis(), NestedClassifier((9,), CLASSES), OldClasses(old[0], old[1], CLASSES)
        )
    loss = BasisTransformation(
        basis(), NestedClassifier((8,), CLASSES), OldClasses(old[0], old[1], CLASSES)
    )
    with pytest.raises(DataError, match=r"hand them in as `old`"):
        loss(rows(11), old[1])


def test_a_wider_map_starts_as_a_copy():
    torch.manual_seed(0)
    layer, x = wider_linear(5, 8), rows(5).detach()
    torch.testing.assert_close(layer(x)[:, :5], x)
    assert layer(x)[:, 5:].abs().max() > 0.1


def test_a_balanced_map_weighs_what_is_old_and_what_is_new():
    torch.manual_seed(0)
    layer, x = BalancedLinear(12, OLD, 9, balance=1.5), rows(12).detach()
    made = layer(x).detach().numpy()
    old, new = unit(made[:, :OLD]), unit(made[:, OLD:])
    np.testing.assert_allclose(np.linalg.norm(made[:, :OLD], axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(made[:, OLD:], axis=1), 1.5, rtol=1e-5)
    cosines = unit(made) @ unit(made).T
    np.testing.assert_allclose(cosines, (old @ old.T + 2.25 * new @ new.T) / 3.25, atol=1e-6)
    again = head_from(describe_head(layer))
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "sizes", [{"old_dim": 9}, {"old_dim": 0}, {"old_dim": 4, "balance": 0}], ids=str
)
def test_a_balanced_map_needs_both_parts(sizes):
    with pytest.raises(DimensionError, match="do not fit"):
        BalancedLinear(12, out_dim=9, **{"balance": 1.0, **sizes})


# --- pairs ----------------------------------------------------------------------------------------


def info_nce_by_hand(queries, documents, scale=20.0):
    total = 0.0
    for i, q in enumerate(queries):
        scores = [scale * float(q @ d) for d in documents]
        total += np.log(np.sum(np.exp(scores))) - scores[i]
    return total / len(queries)


@pytest.mark.parametrize("n_columns", [2, 3], ids=["pairs", "triplets"])
def test_compatible_pairs_by_hand(n_columns):
    new = [rows(9, seed=i) for i in range(n_columns)]
    before = [rows(OLD, seed=10 + i) for i in range(n_columns)]
    loss = CompatiblePairs((4, 9), (3, OLD), near=2, across=0.5)
    found = loss(*new, old=before)
    n, b = ([x.detach().numpy() for x in side] for side in (new, before))
    want = 0.0
    for dim in (4, 9):
        q, *d = (unit(x[:, :dim]) for x in n)
        want += info_nce_by_hand(q, np.concatenate(d))
    for dim in (3, OLD):
        q, *d = (unit(x[:, :dim]) for x in n)
        before_unit = [unit(x[:, :dim]) for x in b]
        both = zip(np.concatenate([q, *d]), np.concatenate(before_unit), strict=True)
        want += 2 * np.mean([1 - x @ y for x, y in both])
        want += 0.5 * info_nce_by_hand(q, np.concatenate(before_unit[1:]))
    assert float(found.detach()) == pytest.approx(want, rel=1e-4)
    found.backward()
    assert all(x.grad is None for x in before)  # the old model is not trained


def test_old_vectors_are_picked_by_row_number():
    before = [rows(OLD, seed=3).detach(), rows(OLD, seed=4).detach()]
    loss = CompatiblePairs((9,), (OLD,))
    picked = torch.tensor([5, 2, 7])
    new = [rows(9, seed=i)[:3] for i in range(2)]
    found = WithOld(loss, before)(*new, picked)
    want = loss(*new, old=[before[0][[5, 2, 7]], before[1][[5, 2, 7]]])
    torch.testing.assert_close(found, want)


def test_compatible_pairs_refuse_what_does_not_fit():
    with pytest.raises(DimensionError, match=r"rows of 4 dims cannot hold an old model of 6"):
        CompatiblePairs((2, 4), (OLD,))
    loss = CompatiblePairs((9,), (OLD,))
    with pytest.raises(DataError, match=r"\[24, 24\] rows and \[24, 23\] old"):
        loss(rows(9), rows(9), old=[rows(OLD), rows(OLD)[1:]])
    with pytest.raises(DimensionError, match=r"\[6, 5\] dims, by column, do not fit"):
        loss(rows(9), rows(9), old=[rows(OLD), rows(5)])


# --- what the objectives are for ------------------------------------------------------------------


@pytest.mark.parametrize("method", ["oca", "bt2"])
def test_a_trained_prefix_lies_in_the_old_space_at_every_old_size(old, method):
    """Few numbers, many steps: class means, and inner prefixes, are found where they were."""
    _, labels = old
    torch.manual_seed(0)
    vectors = torch.randn(CLASSES, OLD)[labels] + 0.3 * torch.randn(N, OLD)
    classes = OldClasses(vectors, labels, CLASSES, dims=(2, OLD), scale=5)
    x = torch.eye(N)
    if method == "oca":
        net = torch.nn.Linear(N, OLD + 4)
        head = NestedClassifier((2, OLD, OLD + 4), CLASSES, normalise=True)
        loss = OrthogonalCompatible(head, classes, vectors=5)
    else:
        layer = ChangedBasis(12, OLD, 8, extra=3)
        net = torch.nn.Sequential(torch.nn.Linear(N, 12), layer)
        loss = BasisTransformation(layer, NestedClassifier((8,), CLASSES), classes)
    parameters = {id(p): p for m in (net, loss) for p in m.parameters()}.values()
    optimizer = torch.optim.Adam(parameters, lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        loss(net(x), labels, vectors).backward()
        optimizer.step()
    new = net(x).detach()
    for dim in (2, OLD):
        closest = (F.normalize(new[:, :dim], dim=1) @ classes.means(dim).T).argmax(dim=1)
        assert (closest == labels).float().mean() > 0.9, dim
        assert F.cosine_similarity(new[:, :dim], vectors[:, :dim]).mean() > 0.7, dim
