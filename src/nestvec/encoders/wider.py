"""What follows a backbone whose rows are to hold an older model's: wider maps, a change of basis.

They are part of the model that is served, so they are saved in its folder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

from nestvec.errors import DimensionError, ModelError


def orthogonal_linear(dim: int) -> nn.Linear:
    """Return a linear layer that stays orthogonal while it is trained, and starts as no change.

    It is parametrised by Cayley's map, which takes a tenth of the matrix exponential's time.
    """
    layer = nn.Linear(dim, dim, bias=False)
    nn.init.eye_(layer.weight)
    return orthogonal(layer, orthogonal_map="cayley")  # pyright: ignore[reportReturnType]  # the same


class ChangedBasis(nn.Module):
    """Rows of a backbone as an older model's numbers first, and what is new behind them (BT2).

    A linear map of the backbone's rows gives ``h``, of ``dim + old_dim`` numbers. From it come
    ``p = h[:dim]`` and ``o = linear(relu(h))``, of ``extra`` numbers, both at length 1. The row is
    ``[o, scale * P p]`` with its first ``old_dim`` numbers turned by Q: P and Q are orthogonal, so
    nothing of ``p`` is lost, and the loss decides what of it, and of ``o``, the old model's numbers
    are read from.

    Parameters
    ----------
    in_dim
        Size of the backbone's rows.
    old_dim
        Size of the old model.
    dim
        Size of the new one if it stood alone. Rows have ``dim + extra`` numbers.
    extra
        Numbers that are added for what only the old model tells apart.
    scale
        Length of the new part beside the added one.

    References
    ----------
    Zhou et al., BT^2: Backward-compatible Training with Basis Transformation, arXiv:2211.03989.
    """

    def __init__(
        self, in_dim: int, old_dim: int, dim: int, *, extra: int = 32, scale: float | int = 2.0
    ) -> None:
        super().__init__()
        if min(dim, extra) < 1 or not extra <= old_dim <= dim + extra:
            raise DimensionError(
                f"a change of basis to {dim} + {extra} dims, of which the first {old_dim} are the "
                f"old model's, does not fit: 1 <= extra <= old_dim <= dim + extra."
            )
        self.in_dim, self.old_dim, self.dim = in_dim, old_dim, dim
        self.extra, self.scale = extra, float(scale)
        self.out_features = dim + extra
        self.features = wider_linear(in_dim, dim + old_dim)
        self.added = nn.Linear(dim + old_dim, extra)
        self.new_basis = orthogonal_linear(dim)
        self.old_basis = orthogonal_linear(old_dim)

    def extra_repr(self) -> str:
        return f"{self.in_dim} -> {self.dim} + {self.extra}, old {self.old_dim}, x{self.scale:g}"

    def forward(self, rows: Tensor) -> Tensor:
        """Return (n, dim + extra) for the backbone's rows (n, in_dim)."""
        with torch.autocast(rows.device.type, enabled=False):  # in half precision none is a basis
            rows = self.features(rows.to(self.added.weight.dtype))
            added = F.normalize(self.added(rows.relu()), dim=-1)
            new = F.normalize(rows[:, : self.dim], dim=-1)
            both = torch.cat([added, self.scale * self.new_basis(new)], dim=-1)
            return torch.cat([self.old_basis(both[:, : self.old_dim]), both[:, self.old_dim :]], -1)

    def new_part(self, rows: Tensor) -> Tensor:
        """Return ``p`` (n, dim), at length 1, from rows of this layer."""
        old = rows[:, : self.old_dim] @ self.old_basis.weight  # the inverse is the transpose
        both = torch.cat([old, rows[:, self.old_dim :]], dim=-1)
        return both[:, self.extra :] @ self.new_basis.weight / self.scale

    def fixed(self) -> ChangedBasis:
        """Return a copy of plain weights, for use and for disks."""
        made = ChangedBasis(**self.settings())
        made.features.load_state_dict(self.features.state_dict())
        made.added.load_state_dict(self.added.state_dict())
        for name in ("new_basis", "old_basis"):
            weight = getattr(self, name).weight.detach()
            plain = nn.Linear(*weight.shape, bias=False)
            plain.weight = nn.Parameter(weight.cpu().clone())
            setattr(made, name, plain)
        return made.to(self.added.weight.device)

    def settings(self) -> dict[str, Any]:
        """Return what makes one of the same sizes."""
        return {
            "in_dim": self.in_dim,
            "old_dim": self.old_dim,
            "dim": self.dim,
            "extra": self.extra,
            "scale": self.scale,
        }


class BalancedLinear(nn.Module):
    """A linear map whose rows are an older model's numbers at length 1, and new ones at another.

    How much the two parts weigh in the cosine of whole rows is then no accident of training: it is
    ``(cos_old + balance**2 * cos_new) / (1 + balance**2)``. The prefix alone is searched as ever.

    Parameters
    ----------
    in_dim
        Size of the backbone's rows.
    old_dim
        Size of the old model.
    out_dim
        Size of the new one, larger.
    balance
        Length of the new part. 1.4 gives it two thirds.
    """

    def __init__(self, in_dim: int, old_dim: int, out_dim: int, *, balance: float | int) -> None:
        super().__init__()
        if not 0 < old_dim < out_dim or not balance > 0:
            raise DimensionError(
                f"{out_dim} dims, of which {old_dim} are the old model's and the others have "
                f"length {balance:g}, do not fit: there are others, and their length is above 0."
            )
        self.in_dim, self.old_dim, self.balance = in_dim, old_dim, float(balance)
        self.out_features = out_dim
        self.linear = wider_linear(in_dim, out_dim)

    def extra_repr(self) -> str:
        return f"old {self.old_dim} at length 1, the others at {self.balance:g}"

    def forward(self, rows: Tensor) -> Tensor:
        """Return (n, out_dim) for the backbone's rows (n, in_dim)."""
        with torch.autocast(rows.device.type, enabled=False):
            rows = self.linear(rows.to(self.linear.weight.dtype))
            old, new = (
                F.normalize(part, dim=-1)
                for part in (rows[:, : self.old_dim], rows[:, self.old_dim :])
            )
            return torch.cat([old, self.balance * new], dim=-1)

    def settings(self) -> dict[str, Any]:
        """Return what makes one of the same sizes."""
        return {
            "in_dim": self.in_dim,
            "old_dim": self.old_dim,
            "out_dim": self.out_features,
            "balance": self.balance,
        }


def wider_linear(in_dim: int, out_dim: int) -> nn.Linear:
    """Return a linear map whose rows are orthonormal as far as they can be: it starts as a copy.

    The first numbers are those that come in; the ones behind them are mixtures, drawn from torch's
    generator.
    """
    made = nn.Linear(in_dim, out_dim, bias=False)
    nn.init.orthogonal_(made.weight)
    with torch.no_grad():
        n = min(in_dim, out_dim)
        made.weight[:n] = torch.eye(n, in_dim)
    return made


def describe_head(head: nn.Module) -> dict[str, Any]:
    """Return what `head_from` makes a head of the same sizes from; else a `ModelError`."""
    if isinstance(head, ChangedBasis):
        return {"kind": "changed_basis", **head.settings()}
    if isinstance(head, BalancedLinear):
        return {"kind": "balanced_linear", **head.settings()}
    if isinstance(head, nn.Linear) and head.bias is None:
        return {"kind": "linear", "in_dim": head.in_features, "out_dim": head.out_features}
    raise ModelError(
        f"a head of type {type(head).__name__} cannot be saved: a ChangedBasis can, a "
        f"BalancedLinear, and a Linear without bias. Make it a part of the backbone."
    )


def head_from(about: dict[str, Any]) -> nn.Module:
    """Return a head with the sizes that `describe_head` named, to load weights into."""
    settings = {key: value for key, value in about.items() if key != "kind"}
    if about["kind"] == "linear":
        return wider_linear(**settings)
    if about["kind"] == "balanced_linear":
        return BalancedLinear(**settings)
    if about["kind"] == "changed_basis":
        return ChangedBasis(**settings).fixed()
    raise ModelError(f"a head of kind {about['kind']!r} is not known here. Upgrade nestvec.")
