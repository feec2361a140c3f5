"""Two processes that share a batch get the gradients of the one that has all of it."""

import datetime
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="nestvec[fit]")
import torch.distributed as dist  # noqa: E402  # behind importorskip
from torch import nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from nestvec.errors import DataError  # noqa: E402
from nestvec.train import (  # noqa: E402
    CoSENT,
    InfoNCE,
    NestedLoss,
    SupervisedContrastive,
    encode_in_chunks,
    gathered,
    row_offset,
)

DIMS = (2, 4)
N = 8  # rows of the whole batch
draw = torch.Generator().manual_seed(0)
QUERIES, DOCUMENTS, HARD = torch.randn(3, N, 6, generator=draw, dtype=torch.double)
LABELS = torch.tensor([0, 1, 0, 2, 1, 1, 3, 0])
SCORES = torch.rand(N, generator=draw)

if not dist.is_available():
    pytest.skip("torch without torch.distributed", allow_module_level=True)


def own_queries(encode, mine):
    """Own queries against everybody's documents."""
    queries, documents = encode(QUERIES[mine]), gathered(encode(DOCUMENTS[mine]))
    hard = gathered(encode(HARD[mine]))
    loss = NestedLoss(InfoNCE(), DIMS, n_embeddings=3)
    return loss(queries, documents, hard, offset=row_offset(len(queries)))


def symmetric(encode, mine):
    loss = NestedLoss(InfoNCE(symmetric=True), DIMS)
    return loss(gathered(encode(QUERIES[mine])), gathered(encode(DOCUMENTS[mine])))


def in_chunks(encode, mine):
    loss = NestedLoss(InfoNCE(symmetric=True), DIMS)
    sides = (encode_in_chunks(encode, side[mine], 3) for side in (QUERIES, DOCUMENTS))
    return loss(*map(gathered, sides))


def supervised(encode, mine):
    loss = NestedLoss(SupervisedContrastive(), DIMS, n_embeddings=1)
    return loss(gathered(encode(QUERIES[mine])), gathered(LABELS[mine]))


def scored(encode, mine):
    loss = NestedLoss(CoSENT(), DIMS, n_embeddings=2)
    sides = (gathered(encode(side[mine])) for side in (QUERIES, DOCUMENTS))
    return loss(*sides, gathered(SCORES[mine]))


LOSSES = (own_queries, symmetric, in_chunks, supervised, scored)


def encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def measured(loss, encode, mine):
    """Return (loss, every gradient in one row)."""
    found = loss(encode, mine)
    found.backward()
    grads = [p.grad.flatten() for p in encode.parameters()]
    return found.item(), torch.cat(grads)


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    mine = slice(rank * N // 2, (rank + 1) * N // 2)
    found: dict[str, object] = {
        loss.__name__: measured(loss, DistributedDataParallel(encoder()), mine) for loss in LOSSES
    }
    found["rows"] = gathered(QUERIES[mine])
    try:
        gathered(QUERIES[: rank + 1])
    except DataError as error:
        found["uneven"] = str(error)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()  # the first to leave would take the other's connection away
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two real processes measured."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_gradients_and_mean_loss_are_those_of_one_process(ranks, loss):
    value, gradient = measured(loss, encoder(), slice(0, N))
    assert sum(rank[loss.__name__][0] for rank in ranks) / 2 == pytest.approx(value, abs=1e-10)
    for rank in ranks:
        torch.testing.assert_close(rank[loss.__name__][1], gradient, atol=1e-10, rtol=0)


def test_rows_come_in_rank_order(ranks):
    for rank in ranks:
        torch.testing.assert_close(rank["rows"], QUERIES, atol=0, rtol=0)


def test_shares_of_different_size_are_refused_in_every_process(ranks):
    for rank in ranks:
        assert "by rank [(1, 6), (2, 6)]" in rank["uneven"]
        assert "drop_last=True" in rank["uneven"]


def test_one_process_gathers_nothing():
    assert gathered(QUERIES) is QUERIES
    assert row_offset(N) == 0
