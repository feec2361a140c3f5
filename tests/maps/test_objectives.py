"""The losses are what their formulas say, against loops that spell them out."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from nestvec.maps import objectives  # noqa: E402  # after the skip


@pytest.fixture
def cosines(rng):
    student, teacher = (torch.from_numpy(rng.uniform(-1, 1, size=(5, 9))) for _ in range(2))
    hidden = torch.zeros(5, 9, dtype=torch.bool)
    hidden[2, 4] = True
    return student, teacher, hidden


def test_neighbour_loss_is_cross_entropy_of_two_softmaxes(cosines):
    student, teacher, hidden = cosines
    got = objectives.neighbour_loss(
        student,
        torch.tensor(10.0),
        objectives.neighbour_distribution(teacher, hidden, 0.1),
        hidden,
    )
    total = 0.0
    for s, t, h in zip(student.numpy(), teacher.numpy(), hidden.numpy(), strict=True):
        p, q = np.exp(t[~h] / 0.1), np.exp(s[~h] * 10)
        total += -(p / p.sum() * np.log(q / q.sum())).sum()
    assert float(got) == pytest.approx(total / 5)


def test_pair_and_topk_losses_are_mean_absolute_differences(cosines):
    student, teacher, hidden = cosines
    s, t, h = student.numpy(), teacher.numpy(), hidden.numpy()
    pairs = np.where(h, 0, np.abs(s - t)).mean()
    assert float(objectives.pair_loss(student, teacher, hidden)) == pytest.approx(pairs)
    near = [
        np.abs(si - ti)[np.argsort(-np.where(hi, -2, ti))[:3]]
        for si, ti, hi in zip(s, t, h, strict=True)
    ]
    assert float(objectives.topk_loss(student, teacher, hidden, 3)) == pytest.approx(np.mean(near))


def test_reconstruction_loss_is_the_mean_l1_distance(rng):
    a, b = rng.normal(size=(2, 4, 6))
    got = objectives.reconstruction_loss(torch.from_numpy(a), torch.from_numpy(b))
    assert float(got) == pytest.approx(np.abs(a - b).sum(axis=1).mean())


@pytest.mark.parametrize("loss", ["neighbour", "topk", "pair", "reconstruction"])
def test_each_loss_alone_trains(loss, rng):
    from nestvec.maps import MatryoshkaAdaptor

    weights = {f"{name}_weight": float(name == loss) for name in ("neighbour", "topk", "pair")}
    fitted = MatryoshkaAdaptor(
        dims=(2, 8), max_steps=10, reconstruction_weight=float(loss == "reconstruction"), **weights
    ).fit(rng.normal(size=(60, 8)))
    assert np.isfinite(fitted.guard_.scores["learned"]).all()
