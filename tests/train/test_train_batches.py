"""No text stands twice in a batch if the texts allow it; there are always as many batches."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="nestvec[fit]")

from nestvec.train.batches import BatchesApart  # behind importorskip


def columns(rng, n, n_texts):
    return [[f"{side}{i}" for i in rng.integers(n_texts, size=n)] for side in "ab"]


def texts_of(batch, sides):
    return [side[row] for row in batch for side in sides]


def test_no_text_stands_twice_in_a_batch(rng):
    sides = columns(rng, 400, 150)
    batches = list(BatchesApart(sides, batch_size=20, seed=0))
    assert len(batches) == 20
    used = np.concatenate(batches)
    assert len(set(used.tolist())) == 400
    twice = [len(t) - len(set(t)) for t in (texts_of(batch, sides) for batch in batches)]
    assert sum(n > 0 for n in twice) <= 3  # the last ones take what is left


def test_the_same_text_on_both_sides_counts(rng):
    sides = [[f"t{i}" for i in range(40)], [f"t{(i + 20) % 40}" for i in range(40)]]
    first = next(iter(BatchesApart(sides, batch_size=18, seed=0)))
    texts = texts_of(first, sides)
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize("n_texts", [1, 3, 1000])
def test_there_are_always_as_many_batches(rng, n_texts):
    sampler = BatchesApart(columns(rng, 130, n_texts), batch_size=16, seed=0)
    found = list(sampler)
    assert len(found) == len(sampler) == 8
    assert {len(batch) for batch in found} == {16}
    assert len({row for batch in found for row in batch}) == 128


def test_the_epoch_and_the_seed_draw_the_order(rng):
    sides = columns(rng, 64, 1000)
    one, other = (BatchesApart(sides, batch_size=8, seed=seed) for seed in (0, 1))
    assert list(one) == list(one)
    assert list(one) != list(other)
    before = list(one)
    one.set_epoch(1)
    assert list(one) != before
