"""Corners of a simplex: at one angle, no two prefixes alike once rotated, and kept with a model."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="nestvec[fit]")

from safetensors.torch import save_file  # noqa: E402  # behind importorskip

from nestvec.errors import DataError, DimensionError, ModelError  # noqa: E402
from nestvec.train import (  # noqa: E402
    HigherOrderCompatible,
    StationaryClassifier,
    StationaryLabels,
    simplex,
)


@pytest.mark.parametrize("n", [2, 3, 10, 100])
@pytest.mark.parametrize("seed", [None, 3])
def test_any_two_corners_are_at_one_angle(n, seed):
    corners = simplex(n, seed=seed).double()
    cosines = corners @ corners.T
    want = torch.full((n, n), -1 / (n - 1)).fill_diagonal_(1).double()
    torch.testing.assert_close(cosines, want, atol=1e-6, rtol=0)
    assert corners.shape == (n, n - 1)


def twins(corners, dim):
    """How many corners have the direction of another one at this size."""
    unit = corners[:, :dim] / corners[:, :dim].norm(dim=1, keepdim=True)
    distance = torch.cdist(unit.double(), unit.double()).fill_diagonal_(9)
    return int((distance.amin(dim=1) < 1e-4).sum())


def test_without_a_rotation_most_prefixes_are_alike():
    """92 of 100 corners share an 8-dim prefix, 84 a 16-dim one: why there is a rotation."""
    corners = simplex(100)
    assert [twins(corners, dim) for dim in (8, 16, 32, 64)] == [92, 84, 68, 36]
    turned = simplex(100, seed=0)
    assert [twins(turned, dim) for dim in (8, 16, 32, 64)] == [0, 0, 0, 0]


def test_the_seed_decides_the_basis():
    same, other = StationaryClassifier(10, seed=1), StationaryClassifier(10, seed=2)
    assert StationaryClassifier(10, seed=1).basis_id == same.basis_id != other.basis_id


@pytest.mark.parametrize("normalise", [False, True])
def test_logits_by_hand_at_every_size(rng, normalise):
    head = StationaryClassifier(7, dims=(2, 6), normalise=normalise, scale=4)
    rows = rng.normal(size=(5, 6)).astype(np.float32)
    found = head(torch.from_numpy(rows))
    assert list(found) == [2, 6]
    for dim, logits in found.items():
        for row, answer in zip(rows[:, :dim], logits.numpy(), strict=True):
            for corner, value in zip(head.corners.numpy()[:, :dim], answer, strict=True):
                length = 1.0 if not normalise else np.linalg.norm(row) / 4
                want = row @ (corner / np.linalg.norm(corner)) / length
                assert value == pytest.approx(want, abs=1e-5)
    assert not list(head.parameters())  # nothing of it is trained


def test_classes_beyond_the_capacity_are_refused():
    head = StationaryClassifier(5)
    head.check_classes(5)
    with pytest.raises(DataError, match=r"6 classes do not fit 5 corners"):
        head.check_classes(6)
    with pytest.raises(DataError, match=r"label 5 of row 1 does not fit 5 classes"):
        StationaryLabels(head)(torch.randn(2, 4), torch.tensor([0, 5]))
    with pytest.raises(DimensionError, match=r"rows of 5 dims do not fit 5 corners"):
        head(torch.randn(2, 5))
    with pytest.raises(DataError, match=r"at least 2"):
        simplex(1)


def test_the_basis_is_kept_with_the_model_and_looked_at(tmp_path):
    head = StationaryClassifier(9, dims=(2, 8), seed=4, normalise=True, scale=3)
    head.save(tmp_path)
    again = StationaryClassifier.load(tmp_path)
    assert (again.basis_id, again.dims, again.scale) == (head.basis_id, (2, 8), 3)
    rows = torch.randn(3, 8)
    torch.testing.assert_close(again(rows)[2], head(rows)[2])
    about = {"dims": "[8]", "normalise": "false", "scale": "1", "basis_id": head.basis_id}
    save_file({"corners": simplex(9, seed=5)}, tmp_path / "simplex.safetensors", about)
    with pytest.raises(ModelError, match=r"other corners than it says"):
        StationaryClassifier.load(tmp_path)
    (tmp_path / "simplex.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match=r"is damaged"):
        StationaryClassifier.load(tmp_path)
    with pytest.raises(ModelError, match=r"was not trained to a simplex"):
        StationaryClassifier.load(tmp_path / "elsewhere")


def higher_order_by_hand(old, new, labels, scale):
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (old, new)]
    total = 0.0
    for i, y in enumerate(labels):
        inside = [
            np.exp(scale * unit[0][i] @ unit[1][j] * (labels[j] != y)) for j in range(len(labels))
        ]
        total += np.log(sum(inside)) - scale * unit[0][i] @ unit[1][i]
    return total / len(labels)


def test_the_higher_order_loss_by_hand(rng):
    head = StationaryClassifier(7, dims=(3, 6))
    own = StationaryLabels(head)
    old, new = rng.normal(size=(2, 8, 6)).astype(np.float32)
    labels = np.arange(8) % 3
    y = torch.from_numpy(labels)
    found = HigherOrderCompatible(own, share=0.25, scale=4)(
        torch.from_numpy(new), y, torch.from_numpy(old)
    )
    beyond = sum(higher_order_by_hand(old[:, :d], new[:, :d], labels, 4) for d in (3, 6))
    want = 0.25 * float(own(torch.from_numpy(new), y)) + 0.75 * beyond
    assert float(found) == pytest.approx(want, rel=1e-4)


def test_the_higher_order_loss_refuses_what_does_not_fit():
    own = StationaryLabels(StationaryClassifier(7))
    rows, labels = torch.randn(4, 6), torch.tensor([0, 1, 0, 1])
    loss = HigherOrderCompatible(own)
    with pytest.raises(DataError, match=r"hand them in as `old`"):
        loss(rows, labels)
    with pytest.raises(DataError, match=r"old vectors \(4, 5\) do not fit rows \(4, 6\)"):
        loss(rows, labels, torch.randn(4, 5))
    with pytest.raises(DataError, match=r"share 0 of the cross-entropy"):
        HigherOrderCompatible(own, share=0)


def test_two_models_of_one_simplex_agree_without_knowing_each_other():
    """Trained apart from two seeds, each finds its classes in the other's rows, at each size."""
    head = StationaryClassifier(16, dims=(4, 15), seed=0)
    labels = torch.arange(40) % 5
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = torch.nn.Linear(40, 15)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        for _ in range(80):
            optimizer.zero_grad()
            StationaryLabels(head)(net(torch.eye(40)), labels).backward()
            optimizer.step()
        made.append(net(torch.eye(40)).detach())
    for dim in (4, 15):
        a, b = (torch.nn.functional.normalize(rows[:, :dim], dim=1) for rows in made)
        nearest = (a @ b.T).fill_diagonal_(-9).argmax(dim=1)
        assert (labels[nearest] == labels).float().mean() > 0.95
