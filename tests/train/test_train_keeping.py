"""What was near at full size before training stays near, at every size."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="nestvec[fit]")

from nestvec.errors import DataError  # noqa: E402  # behind importorskip
from nestvec.train import KeepNeighbours, SentenceTransformerLoss  # noqa: E402

DIMS = (2, 4, 8)


@pytest.fixture
def rows(rng):
    return torch.from_numpy(rng.normal(size=(6, 8)))


@pytest.fixture
def start(rng):
    return torch.from_numpy(rng.permuted(rng.normal(size=(6, 8)), axis=0))


def unit(row):
    return np.asarray(row) / np.linalg.norm(row)


def cosines(rows):
    rows = torch.nn.functional.normalize(rows, dim=1)
    return rows @ rows.T


def test_it_is_the_cross_entropy_of_neighbour_distributions(rows, start):
    weights, temperature = (3.0, 2.0, 1.0), 0.1
    by_hand = 0.0
    for dim, weight in zip(DIMS, weights, strict=True):
        for i in range(6):
            others = [j for j in range(6) if j != i]
            before = [math.exp(unit(start[i]) @ unit(start[j]) / temperature) for j in others]
            now = [
                math.exp(unit(rows[i, :dim]) @ unit(rows[j, :dim]) / temperature) for j in others
            ]
            for b, n in zip(before, now, strict=True):
                by_hand -= weight * b / sum(before) * math.log(n / sum(now)) / 6
    loss = KeepNeighbours(DIMS, temperature=temperature, weights=weights)
    assert loss(rows, start).item() == pytest.approx(by_hand, rel=1e-5)


def test_nothing_pulls_at_a_model_that_has_not_moved(rows):
    moving = rows.clone().requires_grad_()
    KeepNeighbours((8,))(moving, rows).backward()
    assert moving.grad is not None
    torch.testing.assert_close(moving.grad, torch.zeros_like(rows), atol=1e-6, rtol=0)


def test_the_start_is_not_trained(rows, start):
    moving, fixed = rows.clone().requires_grad_(), start.clone().requires_grad_()
    KeepNeighbours(DIMS)(moving, fixed).backward()
    assert moving.grad is not None
    assert moving.grad.abs().sum() > 0
    assert fixed.grad is None


def test_the_start_may_be_longer_than_the_rows(rows, start):
    longer = torch.cat([start, start], dim=1)  # the same angles
    loss = KeepNeighbours(DIMS)
    torch.testing.assert_close(loss(rows, longer), loss(rows, start))


def test_rows_that_do_not_fit_are_refused(rows, start):
    with pytest.raises(DataError, match=r"5 rows now and 6 before do not fit"):
        KeepNeighbours(DIMS)(rows[:5], start)
    with pytest.raises(DataError, match=r"3 or more"):
        KeepNeighbours(DIMS)(rows[:2], start[:2])
    with pytest.raises(DataError, match=r"temperature 0"):
        KeepNeighbours(DIMS, temperature=0)


def test_keeping_holds_a_model_where_it_was(tmp_path):
    import tiny_model

    st = pytest.importorskip("sentence_transformers", reason="nestvec[text]")
    texts = [
        " ".join(words) for words in zip(tiny_model.WORDS, tiny_model.WORDS[::-1], strict=True)
    ]
    moved = {}
    folder = tiny_model.build(tmp_path / "m", hidden_dropout_prob=0.0)
    for weight in (0.0, 30.0):
        model = st.SentenceTransformer(str(folder), device="cpu").train()
        before = cosines(model.encode(texts, convert_to_tensor=True))
        loss = SentenceTransformerLoss(
            model,
            lambda rows: cosines(rows).mean(),  # drives all texts apart
            keep=KeepNeighbours((32,), temperature=0.2),
            keep_weight=weight,
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        features = model.preprocess(texts)
        for _ in range(15):
            optimizer.zero_grad()
            loss([dict(features)]).backward()
            optimizer.step()
        after = cosines(model.eval().encode(texts, convert_to_tensor=True))
        moved[weight] = float((after - before).abs().mean())
    assert moved[30.0] < moved[0.0] / 2
