"""Rotations: the principal one, which packs energy into short prefixes, and a random baseline."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from nestvec import _checks
from nestvec.maps.base import FittedMap


class _Rotation(FittedMap):
    components_: NDArray[np.float32]  # (dim, dim): row i is the i-th new axis

    def _map(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        return rows @ self.components_.T

    def module_arrays(self) -> dict[str, NDArray[np.float32]]:
        return {"linear": np.ascontiguousarray(self.components_.T)}

    def inverse_transform(self, X: Any) -> NDArray[np.float32]:
        """Rotate back, (n, dim) float32: nothing was lost, so this is exact to rounding."""
        check_is_fitted(self)
        return self._take(X, reset=False, allow_zero_rows=True) @ self.components_


class PrincipalRotation(_Rotation):
    """Rotate onto the principal axes, largest energy first, so that prefixes keep the most.

    Uncentred: the axes are the eigenvectors of ``X.T @ X / n``, and nothing is subtracted, so
    every cosine and inner product at full size stays what it was. The prefix of size ``d`` is the
    best rank-``d`` approximation of the rows in the least-squares sense.

    Parameters
    ----------
    dims : sequence of int, optional
        Nesting dims the rotated vectors may be cut to; by default the full size halved down to 16.
    batch_size
        Rows read at a time. A float32 memory map is streamed: memory is
        ``O(dim**2 + batch_size * dim)``.

    Attributes
    ----------
    components_ : (dim, dim) float32
        Row ``i`` is the ``i``-th axis; signs are fixed: the entry largest in magnitude is positive.
    explained_energy_ : (dim,) float64
        Mean squared length of the rows along each axis, falling (the eigenvalues).
    dims_, n_features_in_, n_samples_seen_

    Notes
    -----
    scikit-learn's `PCA` subtracts the mean, which changes every cosine; that is why this is not
    `PCA`. The second moment is summed in float64 over blocks multiplied in float32.
    """

    _kind = "principal_rotation"

    def __init__(self, dims: Any = None, batch_size: Any = 8192) -> None:
        self.dims = dims
        self.batch_size = batch_size

    def fit(self, X: Any, y: Any = None) -> PrincipalRotation:
        """Learn the axes of the rows, reading them in blocks.

        Raises `DataError` for NaN or Inf and `DimensionError` for sizes beyond the full one.
        """
        self._forget()
        self._add(X, first=True)
        self._solve()
        return self

    def partial_fit(self, X: Any, y: Any = None) -> PrincipalRotation:
        """Add a block of rows; the axes are those of all rows seen since `fit` or the beginning."""
        self._add(X, first=not hasattr(self, "_moment"))
        self._solve()
        return self

    def _forget(self) -> None:
        for name in ("_moment", "n_samples_seen_"):
            if hasattr(self, name):
                delattr(self, name)

    def _add(self, X: Any, *, first: bool) -> None:
        array = self._unstamped(X, reset=first)
        # Blocks are converted one at a time below: a float64 memory map must not be copied whole.
        rows: Any = validate_data(
            self,
            X=array,
            reset=first,
            dtype="numeric",
            ensure_all_finite=False,
            accept_sparse=False,
        )
        dim = rows.shape[1]
        self._set_dims(self.dims, dim)
        if first:
            self._moment, self.n_samples_seen_ = np.zeros((dim, dim)), 0
        moment = np.zeros((dim, dim))  # added at the end, so that a bad block changes nothing
        for start in range(0, len(rows), self.batch_size):
            stop = min(start + self.batch_size, len(rows))
            block = _checks.as_matrix(
                rows[start:stop], name=f"X[{start}:{stop}]", allow_zero_rows=True
            )
            moment += block.T @ block
        self._moment += moment
        self.n_samples_seen_ += len(rows)

    def _solve(self) -> None:
        values, axes = eigh(self._moment / self.n_samples_seen_)
        axes = axes.T[::-1]
        largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
        self.components_ = np.ascontiguousarray(axes * np.sign(largest), dtype=np.float32)
        self.explained_energy_ = np.maximum(values[::-1], 0.0)

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {"components": self.components_, "explained_energy": self.explained_energy_}

    def _about(self) -> dict[str, Any]:
        return {"n_samples_seen": self.n_samples_seen_}

    def _restore(self, arrays: dict[str, NDArray[Any]], about: dict[str, Any]) -> None:
        dim = self.n_features_in_
        self.components_ = arrays["components"].reshape(dim, dim)
        self.explained_energy_ = arrays["explained_energy"].reshape(dim)
        self.n_samples_seen_ = int(about["n_samples_seen"])
        # The moment is the axes times their energies, so a loaded rotation can go on learning.
        axes = self.components_.astype(np.float64)
        self._moment = (axes.T * self.explained_energy_) @ axes * self.n_samples_seen_


class RandomRotation(_Rotation):
    """Rotate at random: what a cut is worth when no direction is better than another.

    A baseline. It spreads whatever the model packed into its first dimensions evenly.

    Parameters
    ----------
    dims : sequence of int, optional
        Nesting dims; by default the full size halved down to 16.
    random_state
        Seed, generator or None, as in scikit-learn.

    Attributes
    ----------
    components_ : (dim, dim) float32
        A rotation drawn uniformly (Haar measure).
    dims_, n_features_in_
    """

    _kind = "random_rotation"

    def __init__(self, dims: Any = None, random_state: Any = None) -> None:
        self.dims = dims
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> RandomRotation:
        """Draw the rotation; of the rows only their size is used."""
        dim = self._take(X, reset=True, allow_zero_rows=True).shape[1]
        self._set_dims(self.dims, dim)
        normal = check_random_state(self.random_state).standard_normal((dim, dim))
        q, r = np.linalg.qr(normal)
        # Without the signs of R, QR's axes are not uniform (Mezzadri, math-ph/0609050).
        self.components_ = np.ascontiguousarray((q * np.sign(np.diag(r))).T, dtype=np.float32)
        return self

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {"components": self.components_}

    def _restore(self, arrays: dict[str, NDArray[Any]], about: dict[str, Any]) -> None:
        self.components_ = arrays["components"].reshape(self.n_features_in_, -1)
