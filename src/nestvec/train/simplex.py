"""A classifier that never changes: the corners of a regular simplex, kept for classes to come.

Models that are trained to the same corners, one after the other, put each class in the same place,
so that their vectors may be compared without a thought of each other (d-Simplex).

A simplex as it is usually written has no prefixes: of 100 corners 92 share their first 8 numbers.
Here it is rotated at random, by seed, after which no two prefixes are alike.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.stats import ortho_group
from torch import Tensor, nn

from nestvec._atomic import written_beside
from nestvec.errors import DataError, DimensionError, ModelError
from nestvec.space import parse_dims
from nestvec.train.heads import NestedCrossEntropy
from nestvec.train.objectives import check_labels, cut

_FILE = "simplex.safetensors"


def simplex(n_corners: int, *, seed: int | None = None) -> Tensor:
    """Return the corners (n_corners, n_corners - 1) of a regular simplex, each at length 1.

    Any two have the cosine ``-1 / (n_corners - 1)``. Without ``seed`` they are as published: unit
    vectors and one opposite corner, centred; with it they are rotated at random.

    >>> corners = simplex(4, seed=0)
    >>> (corners @ corners.T).round(decimals=4)[0]
    tensor([ 1.0000, -0.3333, -0.3333, -0.3333])
    """
    if n_corners < 2:
        raise DataError(f"a simplex of {n_corners} corners tells no classes apart: at least 2.")
    n = n_corners - 1
    last = np.full((1, n), (1 - math.sqrt(1 + n)) / n)
    corners = np.concatenate([np.eye(n), last])
    corners -= corners.mean(axis=0)
    corners /= np.linalg.norm(corners, axis=1, keepdims=True)
    if seed is not None and n > 1:
        corners = corners @ ortho_group.rvs(n, random_state=seed)
    return torch.from_numpy(corners).float()


class StationaryClassifier(nn.Module):
    """Class logits from every prefix, by corners that are not trained (d-Simplex).

    ``forward(rows)`` returns ``{dim: logits (n, capacity)}``: the inner product of the prefix with
    the prefix of each corner at length 1. The rows have ``capacity - 1`` dims.

    Parameters
    ----------
    capacity
        Classes there is room for, those to come among them. It cannot be raised later.
    dims
        Sizes; by default the full one alone.
    seed
        Of the rotation.
    normalise
        L2-normalise each prefix first, and multiply by ``scale``. Published are plain rows.

    Notes
    -----
    The corners are the identity of a series of models: `save` writes them beside the model, and
    later models take them from there (`load`). ``basis_id`` is a hash of them.

    Published code hands out corners from the last to the first; any two are at one angle, so that
    class i takes corner i here.

    References
    ----------
    Biondi et al., Stationary Representations: Optimally Approximating Compatibility and
    Implications for Improved Model Replacements, CVPR 2024, arXiv:2405.02581.
    """

    def __init__(
        self,
        capacity: int,
        *,
        dims: Iterable[int] | str | None = None,
        seed: int = 0,
        normalise: bool = False,
        scale: float | int = 10.0,
    ) -> None:
        super().__init__()
        self._take(simplex(capacity, seed=seed))
        self.dims = parse_dims([capacity - 1] if dims is None else dims, full=capacity - 1)
        self.normalise, self.scale = normalise, float(scale)

    def _take(self, corners: Tensor) -> None:
        self.capacity = len(corners)
        self.corners: Tensor
        self.register_buffer("corners", corners)
        self.basis_id = hashlib.sha256(corners.cpu().contiguous().numpy().tobytes()).hexdigest()

    def extra_repr(self) -> str:
        return f"basis={self.basis_id[:12]}, capacity={self.capacity}, dims={self.dims}"

    def forward(self, rows: Tensor) -> dict[int, Tensor]:
        return {dim: self.logits(rows, dim) for dim in self.dims}

    def logits(self, rows: Tensor, dim: int) -> Tensor:
        """Return the logits of any size."""
        if rows.shape[-1] != self.capacity - 1:
            raise DimensionError(
                f"rows of {rows.shape[-1]} dims do not fit {self.capacity} corners, which have "
                f"{self.capacity - 1}: the model's size is the capacity less 1."
            )
        prefix = cut(rows, dim, normalise=self.normalise)
        scale = self.scale if self.normalise else 1.0
        return scale * prefix @ cut(self.corners, dim, normalise=True).T

    def check_classes(self, n_classes: int) -> None:
        """Raise `DataError` unless there is a corner for every class."""
        if n_classes > self.capacity:
            raise DataError(
                f"{n_classes} classes do not fit {self.capacity} corners, which were fixed with "
                f"the first model. A series with more room starts anew, with a larger capacity."
            )

    def save(self, folder: Path | str) -> None:
        """Write the corners into a model folder."""
        about = {
            "dims": json.dumps(self.dims),
            "normalise": json.dumps(self.normalise),
            "scale": json.dumps(self.scale),
            "basis_id": self.basis_id,
        }
        with written_beside(Path(folder) / _FILE) as scratch:
            save_file({"corners": self.corners.cpu().contiguous()}, scratch, about)

    @classmethod
    def load(cls, folder: Path | str) -> StationaryClassifier:
        """Read the corners of a model folder; `ModelError` if none, or if they were changed."""
        path = Path(folder) / _FILE
        if not path.is_file():
            raise ModelError(
                f"{folder} has no {_FILE}: it was not trained to a simplex. Train the first model "
                f"of the series so (objective='simplex'), or use another method."
            )
        try:
            with safe_open(path, framework="pt") as file:
                about, corners = file.metadata(), file.get_tensor("corners")
            made = cls(
                2,
                normalise=json.loads(about["normalise"]),
                scale=json.loads(about["scale"]),
            )
            made._take(corners)
            made.dims = parse_dims(json.loads(about["dims"]), full=made.capacity - 1)
        except Exception as error:  # safetensors has an error class of its own
            raise ModelError(f"{path} is damaged: {str(error).splitlines()[0]}.") from error
        if made.basis_id != about["basis_id"]:
            raise ModelError(f"{path} holds other corners than it says: it was edited or damaged.")
        return made


class StationaryLabels(nn.Module):
    """Cross-entropy at every size with corners that are not trained: the first model of a series.

    ``forward(rows, labels, old=None)``; ``old`` is not looked at.
    """

    def __init__(
        self,
        head: StationaryClassifier,
        *,
        weights: str | Iterable[float | int] = "uniform",
        label_smoothing: float | int = 0.0,
    ) -> None:
        super().__init__()
        self.head = head
        named = weights if isinstance(weights, str) else tuple(weights)
        self.loss = NestedCrossEntropy(weights=named, label_smoothing=float(label_smoothing))

    def forward(self, rows: Tensor, labels: Tensor, old: Tensor | None = None) -> Tensor:
        return self.loss(self.head(rows), labels)


class HigherOrderCompatible(nn.Module):
    """d-Simplex with its higher-order loss: a row lies by its old vector, far from other classes'.

    ``forward(rows, labels, old)``: rows and old vectors (n, capacity - 1) of one batch. The loss is
    ``share * CE + (1 - share) * mean_i(-scale <old_i, new_i> + log sum_j exp(scale <old_i, new_j>
    [y_i != y_j]))`` over unit rows, added up over sizes. Rows of one class are zeroed inside the
    exponential, not left out, so each adds 1 to the sum (as we read the published formula).

    Parameters
    ----------
    labels
        The stationary objective, with the corners of the old model.
    share
        Of the cross-entropy: lambda, 0.1 as published.
    scale
        Inverse temperature: mu, 10 as published.

    References
    ----------
    Biondi et al., arXiv:2405.02581.
    """

    def __init__(
        self, labels: StationaryLabels, *, share: float | int = 0.1, scale: float | int = 10.0
    ) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise DataError(f"share {share!r} of the cross-entropy does not fit: above 0, up to 1.")
        self.labels, self.share, self.scale = labels, float(share), float(scale)

    def extra_repr(self) -> str:
        return f"share={self.share:g}, scale={self.scale:g}"

    def forward(self, rows: Tensor, labels: Tensor, old: Tensor | None = None) -> Tensor:
        own = self.share * self.labels(rows, labels)
        if old is None:
            raise DataError("this objective compares with the old vectors: hand them in as `old`.")
        if old.shape != rows.shape:
            raise DataError(
                f"old vectors {tuple(old.shape)} do not fit rows {tuple(rows.shape)}: models of "
                f"one simplex have one size."
            )
        check_labels(labels, self.labels.head.capacity)
        strange = (labels[:, None] != labels[None, :]).float()
        terms = []
        for dim in self.labels.head.dims:
            new = cut(rows, dim, normalise=True)
            before = cut(old.detach(), dim, normalise=True)
            cosines = self.scale * before @ new.T
            terms.append((torch.logsumexp(cosines * strange, dim=1) - cosines.diagonal()).mean())
        return own + (1 - self.share) * torch.stack(terms).sum()
