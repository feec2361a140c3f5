"""What maps and bridges are chosen by."""

import numpy as np
import pytest

from nestvec.maps.guard import closeness, closeness_kept, unit


def slow(true, scores):
    """Closeness by loops over sorted lists."""
    kept = []
    for truth, found in zip(true.tolist(), scores.tolist(), strict=True):
        order = sorted(range(len(found)), key=lambda row: -found[row])[:10]
        mine = sum(truth[row] for row in order) / len(order)
        best = sum(sorted(truth)[-10:]) / 10
        chance = sum(truth) / len(truth)
        kept.append((mine - chance) / (best - chance))
    return sum(kept) / len(kept)


def test_closeness_is_the_mean_true_cosine_of_what_other_scores_find(rng):
    true, scores = rng.normal(size=(2, 7, 40)).astype(np.float32)
    assert closeness(true)(scores) == pytest.approx(slow(true, scores), rel=1e-4)
    assert closeness(true)(true) == pytest.approx(1)
    assert closeness(true)(-true) < 0
    many = rng.normal(size=(2, 400, 300)).astype(np.float32)
    assert closeness(many[0])(many[1]) == pytest.approx(0, abs=0.03)


def test_closeness_kept_is_that_of_prefixes(rng):
    asks, gallery = (unit(rng.normal(size=(n, 12)).astype(np.float32)) for n in (20, 60))
    found = closeness_kept(asks, gallery, (4, 12))(lambda rows: rows)
    prefix = unit(asks[:, :4]) @ unit(gallery[:, :4]).T
    assert found == pytest.approx((slow(asks @ gallery.T, prefix), 1))
