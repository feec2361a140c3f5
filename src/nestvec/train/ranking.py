"""A loss for scored pairs: put the pairs of a batch in the order of their scores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nestvec.errors import DataError


class CoSENT(nn.Module):
    """Rank scored pairs: log(1 + sum of exp(scale (s_j - s_i)) over score_i > score_j).

    s_i is the inner product of the i-th pair's rows: the cosine, if they are normalised, which
    `NestedLoss` sees to. Only the order of the scores counts, so any scale of them will do (Su,
    CoSENT, 2022; Huang et al., TASLP 2024, doi:10.1109/TASLP.2024.3402087).

    Parameters
    ----------
    scale
        Inverse temperature.

    ``forward(first, second, scores)``: rows (n, dim) and (n, dim), scores (n,), higher for closer.
    Under `NestedLoss` say ``n_embeddings=2``. A batch whose scores are all equal has no order:
    loss 0, gradients 0. Time and memory grow with n squared.
    """

    def __init__(self, *, scale: float | int = 20.0) -> None:
        super().__init__()
        if not scale > 0:
            raise DataError(f"scale {scale!r} must be above 0.")
        self.scale = float(scale)

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"

    def forward(self, first: Tensor, second: Tensor, scores: Tensor) -> Tensor:
        if first.shape != second.shape or scores.shape != first.shape[:1]:
            raise DataError(
                f"rows {tuple(first.shape)} and {tuple(second.shape)} with scores "
                f"{tuple(scores.shape)} do not fit: (n, dim), (n, dim) and (n,) do."
            )
        _check_scores(scores)
        exact = torch.promote_types(first.dtype, torch.float32)
        close = self.scale * (first.to(exact) * second).sum(dim=-1)
        # Zeros, or NaN where a score or an embedding is not finite: no order may hide one.
        close = close + (close - close) + (scores - scores).to(exact)
        too_close = close[None, :] - close[:, None]  # (i, j): j above i
        out_of_place = too_close.masked_fill(scores[:, None] <= scores[None, :], float("-inf"))
        return torch.cat([close.new_zeros(1), out_of_place.flatten()]).logsumexp(dim=0)


def _check_scores(scores: Tensor) -> None:
    # On the CPU only: to look at an accelerator's scores is to wait for it at every step.
    if scores.device.type != "cpu":
        return
    bad = ~torch.isfinite(scores)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise DataError(f"the score of row {row} is {scores[row].item()}. Drop the pair.")
