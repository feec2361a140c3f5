"""What the adaptor is trained for, as functions of cosines. Imported by ``fit`` only: needs torch.

Every loss takes the cosines of a batch of rows against a gallery, at one prefix (`student`) and
at full size before learning (`teacher`), both (rows, gallery). ``hidden`` marks a row's own place
in the gallery, which must not count.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

_NEVER = -1e4  # a logit whose softmax is 0, without the NaN that -inf times 0 would bring


def neighbour_distribution(teacher: Tensor, hidden: Tensor, temperature: float) -> Tensor:
    """Return the share of attention each gallery row gets at full size, rows summing to 1."""
    return (teacher / temperature).masked_fill(hidden, _NEVER).softmax(dim=1)


def neighbour_loss(student: Tensor, scale: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Cross-entropy of the prefix's neighbour distribution with the target's.

    The target is that of full size (self-distillation as in Starbucks, arXiv 2410.13230; the
    gradient is that of the KL divergence) or the labels' (then this is InfoNCE, arXiv 1807.03748).
    ``scale`` is the inverse temperature of the prefix and is learned: short prefixes have larger
    cosines, and what counts is their order.
    """
    logits = (student * scale).masked_fill(hidden, _NEVER)
    return -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()


def topk_loss(student: Tensor, teacher: Tensor, hidden: Tensor, k: int) -> Tensor:
    """Mean ``|cosine at full size - cosine of the prefix|`` over the nearest (2407.20243)."""
    near = teacher.masked_fill(hidden, -2.0).topk(min(k, teacher.shape[1] - 1), dim=1).indices
    return (student.gather(1, near) - teacher.gather(1, near)).abs().mean()


def pair_loss(student: Tensor, teacher: Tensor, hidden: Tensor) -> Tensor:
    """Mean ``|cosine at full size - cosine of the prefix|`` over all pairs (2407.20243)."""
    return (student - teacher).masked_fill(hidden, 0.0).abs().mean()


def reconstruction_loss(mapped: Tensor, start: Tensor) -> Tensor:
    """Mean over rows of ``sum |mapped - start|``: how far the map has moved (2407.20243)."""
    return (mapped - start).abs().sum(dim=1).mean()


def prefix_cosines(rows: Tensor, gallery: Tensor, dim: int) -> Tensor:
    """Cosines of the first ``dim`` numbers, (rows, gallery)."""
    return F.normalize(rows[:, :dim], dim=1) @ F.normalize(gallery[:, :dim], dim=1).T
