"""faiss's indexes behind the same door find the same rows."""

import numpy as np
import pytest

from nestvec._checks import normalise
from nestvec.search.exact import top_k
from nestvec.search.structures import peers

N = 2000
ALL = np.empty(0, np.bool_)


@pytest.fixture(scope="module")
def gallery():
    rng = np.random.default_rng(0)
    return normalise((rng.normal(size=(N + 20, 64)) * np.arange(1, 65) ** -0.5).astype(np.float32))


@pytest.fixture(scope="module", params=peers.KINDS)
def peer(request, gallery):
    vectors = gallery[20:]
    arrays = peers.build(request.param, lambda a, b: np.ascontiguousarray(vectors[a:b]), N)
    return peers.Peer(request.param, arrays)


def recall(found, wanted):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, wanted, strict=True)])


def test_a_wide_search_finds_the_neighbours(peer, gallery):
    wanted, _ = top_k(gallery[:20], gallery[20:], 10)
    assert recall(peer.search(gallery[:20], 600, 10_000, ALL), wanted) > 0.99


def test_a_wider_knob_finds_no_less(peer, gallery):
    wanted, _ = top_k(gallery[:20], gallery[20:], 10)
    narrow, wide = (recall(peer.search(gallery[:20], 10, at, ALL), wanted) for at in (1, 10_000))
    assert narrow < wide


def test_only_rows_that_are_alive_are_found(peer, gallery):
    alive = np.random.default_rng(1).random(N) < 0.4
    rows = peer.search(gallery[:20], 400, 10_000, alive)
    assert alive[rows[rows >= 0]].all()
    living = np.flatnonzero(alive)
    wanted = living[top_k(gallery[:20], gallery[20:][alive], 10)[0]]
    assert recall(rows, wanted) > 0.95


def test_more_rows_than_there_are_leave_places_empty(gallery):
    arrays = peers.build("faiss_ivf", lambda a, b: np.ascontiguousarray(gallery[a:b]), 5)
    rows = peers.Peer("faiss_ivf", arrays).search(gallery[:2], 9, 100, ALL)
    assert [sorted(line) for line in rows.tolist()] == [[-1] * 4 + [0, 1, 2, 3, 4]] * 2
