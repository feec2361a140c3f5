"""One loss over the rows of all processes, with the gradients of a single process.

Under DistributedDataParallel each process encodes its share of the batch. A contrastive loss wants
the other shares too::

    documents = gathered(model(documents))               # all processes' rows, in rank order
    queries = model(queries)                             # this process's own
    loss = InfoNCE()(queries, documents, offset=row_offset(len(queries)))

Gather both sides and leave ``offset`` out for a loss that needs them whole (symmetric InfoNCE,
`SupervisedContrastive` with gathered labels, `CoSENT`): each process then computes the same loss.
Either way the mean over processes that DistributedDataParallel takes of the gradients is the
gradient of the loss over the global batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nestvec.errors import DataError


def gathered(rows: Tensor) -> Tensor:
    """Return the rows of all processes in rank order; gradients flow back to their owner.

    Parameters
    ----------
    rows
        (n, ...), of the same shape in every process; every process has to call. Labels, too.

    Returns
    -------
    Tensor
        (n * processes, ...); ``rows`` itself if there is one process. In the backward pass a row
        gets the sum of the gradients that all processes have for it.

    Raises
    ------
    DataError
        In every process, if shapes differ: the mean of the processes' losses would no longer be the
        loss of the batch (and the backend would hang, or read beyond the rows).
    """
    if _n_processes() == 1:
        return rows
    # One small message more a call, which an accelerator has to be waited for: a hang costs more.
    own = torch.tensor(rows.shape, device=rows.device)
    shapes = [torch.empty_like(own) for _ in range(_n_processes())]
    dist.all_gather(shapes, own)
    found = [tuple(shape.tolist()) for shape in shapes]
    if len(set(found)) > 1:
        raise DataError(
            f"the processes hold rows of different shapes, by rank {found}. Give each the same "
            f"number: drop_last=True in the loader, or a batch that the processes divide."
        )
    every = _Gathered.apply(rows)
    assert isinstance(every, Tensor)
    return every


def row_offset(n_rows: int) -> int:
    """Return where this process's ``n_rows`` rows begin among the gathered ones."""
    return n_rows * dist.get_rank() if _n_processes() > 1 else 0


def _n_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gathered(torch.autograd.Function):
    # torch.distributed.nn.functional.all_gather does this too, but is deprecated.

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.n_rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(_n_processes())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        start = row_offset(ctx.n_rows)
        return total[start : start + ctx.n_rows]
