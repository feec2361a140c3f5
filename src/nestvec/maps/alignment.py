"""Bridges: maps from a new model's vectors to where an old model's vectors lie, from pairs.

All of them take directions to directions: rows are L2-normalised before and after, as cosines ask.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import svd
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.utils.validation import check_is_fitted

from nestvec import _checks
from nestvec.errors import DataError, SpaceError
from nestvec.maps import samples
from nestvec.maps.base import FittedMap
from nestvec.maps.guard import Guard, unit
from nestvec.space import Embeddings, Space, parse_dims

Matrix = NDArray[np.float32]
_Made = TypeVar("_Made", bound="Bridge")
#: Penalties tried, as shares of the mean eigenvalue of the new rows' second moment.
_PENALTIES = tuple(10.0**p for p in np.arange(-3, 2.1, 0.5))
_STIFFNESS = 1 / 30  # penalty of a `StiffBridge` for each pair
_UNSEEN = 1e-9  # of the largest singular value: what decides only where the pairs say nothing


class Bridge(FittedMap):
    """Base of the bridges: `fit` on pairs, and from then on new vectors compare with old ones.

    ``transform`` of Embeddings gives Embeddings *of the old Space* (the same ``space_id``), because
    that is what a bridge is for: they may be compared with the old gallery and with nothing else.
    The bridge they came through stands beside it, in ``space.via``.

    A subclass learns ``_arrays_`` in ``_learn``: ``linear`` (dim_new, dim_old) and maybe
    ``intercept`` (dim_old,).

    Attributes
    ----------
    space_, target_ : Space or None
        Where new vectors come from and where they are taken to; None if plain arrays were fitted.
    guard_ : Guard or None
        How the bridge was chosen, if `nestvec.upgrade.fit` chose it.
    seen_ : (n,) uint64
        Hashes of the rows it was fitted on (`row_hashes`), so that nobody judges it by them.
    dims_
        Sizes the old vectors may be cut to.
    n_features_in_, content_hash
    """

    target_: Space | None
    guard_: Guard | None
    seen_: NDArray[np.uint64]
    _arrays_: dict[str, Matrix]

    def fit(self: _Made, X: Any, y: Any) -> _Made:
        """Learn from pairs: row ``i`` of both sides is one text, encoded by both models.

        Parameters
        ----------
        X : (n, dim_new) array or Embeddings
            Vectors of the new model (or of whatever side is to be moved).
        y : (n, dim_old) array or Embeddings
            Vectors of the old model, the space that stays. If both sides have ids, they must agree.

        Raises
        ------
        DataError
            If the sides do not pair up, or hold NaN or Inf.
        SpaceError
            If either Space compares by dot product of vectors whose lengths mean something.
        """
        rows = unit(self._take(X, reset=True, allow_zero_rows=True))
        old = self._take_old(X, y, len(rows))
        self._set_sizes(old.shape[1])
        self.guard_ = None
        self.seen_ = np.unique(row_hashes(rows))
        self._arrays_ = self._learn(rows, unit(old))
        return self

    def _take_old(self, X: Any, y: Any, n: int) -> Matrix:
        if y is None:
            raise ValueError(
                f"requires y to be passed, but the target y is None: {type(self).__name__}.fit(X, "
                f"y) takes the new vectors and, row for row, the old ones."
            )
        samples.refuse_lengths(X)
        samples.refuse_lengths(y)
        self.target_ = replace(y.space, via=()) if isinstance(y, Embeddings) else None
        old = np.asarray(y.array if isinstance(y, Embeddings) else y)
        if old.ndim == 1:
            old = old[:, None]  # scikit-learn's way to pass one target
        old = _checks.as_matrix(old, name="y", allow_zero_rows=True)
        if len(old) != n:
            raise DataError(
                f"{n} new rows and {len(old)} old rows do not pair up: row i of both is one text."
            )
        if isinstance(X, Embeddings) and isinstance(y, Embeddings) and X.has_ids and y.has_ids:
            differ = X.ids.astype(str) != y.ids.astype(str)
            if differ.any():
                row = int(np.argmax(differ))
                raise DataError(
                    f"the sides do not pair up: row {row} is {X.ids[row].item()!r} on the new "
                    f"side and {y.ids[row].item()!r} on the old one. nestvec.upgrade.fit(old=, "
                    f"new=) pairs rows by their ids."
                )
        return old

    def _set_sizes(self, full: int) -> None:
        known = self.target_.nesting_dims if self.target_ is not None else ()
        dims = getattr(self, "dims", None)
        dims = known if dims is None else dims
        self.dims_ = tuple(sorted({*parse_dims(dims, full=full), full})) if dims else (full,)

    def _learn(self, X: Matrix, Y: Matrix) -> dict[str, Matrix]:
        raise NotImplementedError  # each bridge has its own

    def _map(self, rows: Matrix) -> Matrix:
        return unit(self._apply(unit(rows)))

    def _apply(self, rows: Matrix) -> Matrix:
        mapped = rows @ self._arrays_["linear"]
        if "intercept" in self._arrays_:
            mapped += self._arrays_["intercept"]
        return mapped

    def _space(self, old: Space) -> Space:
        if self.target_ is None:
            raise SpaceError(
                "this bridge was fitted on plain arrays, so it does not know in which Space the "
                "old vectors live. Fit it on Embeddings of both sides, or pass .array."
            )
        return replace(self.target_, via=(*old.via, self.content_hash))

    def transform(self, X: Any) -> Any:
        """Map new vectors to where the old ones lie.

        Parameters
        ----------
        X : (n, dim_new) array or Embeddings
            From the new Space. A bridge fitted with ``nested=True`` also takes Embeddings cut to
            one of its sizes, and gives old vectors of that size.

        Returns
        -------
        (n, dim_old) float32 array, rows of length 1, or Embeddings of the old Space

        Raises
        ------
        SpaceMismatchError
            If X lives in another Space than the bridge was fitted on.
        SpaceError
            If X is Embeddings and the bridge was fitted on arrays.
        """
        check_is_fitted(self)
        if isinstance(X, Embeddings) and self._is_prefix(X.space):
            return self.at(X.dim).transform(X)
        return super().transform(X)

    def _is_prefix(self, given: Space) -> bool:
        return (
            getattr(self, "nested", False)
            and self.space_ is not None
            and given.cut is not None
            and given.size < self.n_features_in_
            and replace(given, cut=self.space_.cut).space_id == self.space_.space_id
        )

    def at(self: _Made, dim: int) -> _Made:
        """Return the bridge between the first ``dim`` numbers of both sides; needs ``nested``.

        It is the corner of this one: its output is this bridge's output, cut to ``dim``.
        """
        check_is_fitted(self)
        n_in, n_out = self.n_features_in_, self.dims_[-1]
        sizes = tuple(d for d in self.dims_ if d <= n_in and (d < n_out or n_in == n_out))
        if not getattr(self, "nested", False) or dim not in sizes:
            raise DataError(
                f"this bridge has no part for prefixes of {dim} dims"
                + (f"; it has {sizes}." if getattr(self, "nested", False) else
                   ": fit it with nested=True.")
            )  # fmt: skip
        made = cast(Any, type(self)(**self.get_params()))
        made.n_features_in_, made.dims_ = dim, tuple(d for d in self.dims_ if d <= dim)
        made.space_ = self.space_ and self.space_.prefix(dim, allow_untrained=True)
        made._restore_about(self._about())
        made.seen_ = self.seen_
        made.target_ = self.target_ and self.target_.prefix(dim, allow_untrained=True)
        made._arrays_ = {"linear": self._arrays_["linear"][:dim, :dim].copy()}
        return made

    def module_arrays(self) -> dict[str, Matrix]:
        return dict(self._arrays_)

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {**self._arrays_, "seen": self.seen_}

    def _about(self) -> dict[str, Any]:
        return {
            "n_features_out": self.dims_[-1],
            "target": self.target_.to_dict() if self.target_ else None,
            "guard": self.guard_.to_dict() if self.guard_ else None,
        }

    def _restore(self, arrays: dict[str, NDArray[Any]], about: dict[str, Any]) -> None:
        n_in, n_out = self.n_features_in_, self.dims_[-1]
        arrays = dict(arrays)
        self.seen_ = arrays.pop("seen")
        wanted = self._shapes(n_in, n_out)
        if (
            "linear" not in arrays
            or not set(arrays) <= set(wanted)
            or any(array.shape != wanted[name] for name, array in arrays.items())
        ):
            raise ValueError("the arrays do not fit together")
        self._restore_about(about)
        self._arrays_ = arrays

    def _shapes(self, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes that the arrays of a saved bridge must have; "linear" is needed."""
        return {"linear": (n_in, n_out), "intercept": (n_out,)}

    def _restore_about(self, about: dict[str, Any]) -> None:
        self.target_ = Space.from_dict(about["target"]) if about["target"] else None
        self.guard_ = Guard.from_dict(about["guard"]) if about["guard"] else None

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.target_tags.multi_output = True
        tags.target_tags.single_output = False
        return tags


class UnchangedBridge(Bridge):
    """Take new vectors as old ones, unchanged: what a fine-tuned model may get away with.

    The baseline of every other bridge. Both sides need one size; it learns nothing, and only a
    comparison on held-out pairs says whether it may be used.
    """

    _kind = "unchanged_bridge"

    def _learn(self, X: Matrix, Y: Matrix) -> dict[str, Matrix]:
        return {"linear": _unchanged(X, Y)}


class ProcrustesBridge(Bridge):
    """Rotate new vectors onto old ones: the bridge with the least freedom, for few pairs.

    ``x @ R`` with orthonormal rows or columns, so that between vectors of one size no angle
    changes. With more dims on one side ``R`` is a rotation of the larger space, cut.

    Parameters
    ----------
    dims : sequence of int, optional
        Sizes for ``nested``; by default the old Space's nesting dims.
    nested
        Rotate each block of dims for itself (a triangular rotation is block-diagonal), so that a
        prefix of the input gives the same prefix of the output.

    Notes
    -----
    ``R = U V'`` of the singular vectors of ``X' Y``. Directions that no pair shows (fewer pairs
    than dims) stay as near to where they are as a rotation allows.

    References
    ----------
    Schönemann, A generalized solution of the orthogonal Procrustes problem, Psychometrika 1966.
    Drift-Adapter, EMNLP 2025, arXiv:2509.23471.
    """

    _kind = "procrustes_bridge"

    def __init__(self, dims: Any = None, *, nested: Any = False) -> None:
        self.dims = dims
        self.nested = nested

    def _learn(self, X: Matrix, Y: Matrix) -> dict[str, Matrix]:
        return {"linear": _rotation(X, Y, self.dims_ if self.nested else (Y.shape[1],))}


class RidgeBridge(Bridge):
    """Predict old vectors from new ones by least squares: the affine bridge.

    Parameters
    ----------
    dims : sequence of int, optional
        Sizes for ``nested``; by default the old Space's nesting dims.
    alpha : float, optional
        Penalty on the weights; by default chosen from a grid by leave-one-out error.
    intercept
        Add a constant vector; not with ``nested``, where a prefix has a length of its own.
    nested
        Make the map block-triangular: each block of old dims is predicted from the new dims up to
        its end. Then a prefix of the input suffices for the same prefix of the output, and as the
        blocks are fitted one by one, none of the sizes pays for another.

    Attributes
    ----------
    alphas_ : tuple of float
        The penalty of each block (one if not nested).

    References
    ----------
    Drift-Adapter, EMNLP 2025, arXiv:2509.23471, whose affine map has low rank: `LowRankBridge`.
    """

    _kind = "ridge_bridge"

    def __init__(
        self, dims: Any = None, *, alpha: Any = None, intercept: Any = True, nested: Any = False
    ) -> None:
        self.dims = dims
        self.alpha = alpha
        self.intercept = intercept
        self.nested = nested

    def _prior(self, X: Matrix, Y: Matrix, sizes: tuple[int, ...]) -> Matrix:
        """Return what the weights are drawn to."""
        return np.zeros((X.shape[1], Y.shape[1]), np.float32)

    def _penalty(self, n_pairs: int) -> float | None:
        """Return the penalty, or None to choose it by leave-one-out error."""
        return self.alpha

    def _learn(self, X: Matrix, Y: Matrix) -> dict[str, Matrix]:
        sizes = self.dims_ if self.nested else (Y.shape[1],)
        linear = self._prior(X, Y, sizes)
        rest = Y - X @ linear
        intercept, alphas, start = np.zeros(Y.shape[1], np.float32), [], 0
        with_intercept = bool(self.intercept) and not self.nested
        for stop, n_in in zip(sizes, _reach(sizes, X.shape[1]), strict=True):
            weights, constant, alpha = _ridge(
                X[:, :n_in], rest[:, start:stop], self._penalty(len(X)), with_intercept
            )
            linear[:n_in, start:stop] += weights
            intercept[start:stop] = constant
            alphas.append(alpha)
            start = stop
        self.alphas_ = tuple(alphas)
        return {"linear": linear, "intercept": intercept} if with_intercept else {"linear": linear}

    def _about(self) -> dict[str, Any]:
        return {**super()._about(), "alphas": self.alphas_}

    def _restore_about(self, about: dict[str, Any]) -> None:
        super()._restore_about(about)
        self.alphas_ = tuple(about["alphas"])


class DriftBridge(RidgeBridge):
    """Undo what a fine-tuning changed: least squares whose weights are drawn to doing nothing.

    For a new model that began as the old one: then few pairs suffice. Both sides need one size.
    Parameters and attributes are those of `RidgeBridge`.

    Notes
    -----
    Minimises ``|X W - Y|^2 + alpha |W - I|^2``.
    """

    _kind = "drift_bridge"

    def _prior(self, X: Matrix, Y: Matrix, sizes: tuple[int, ...]) -> Matrix:
        return _unchanged(X, Y)


class RelaxedBridge(RidgeBridge):
    """A rotation, relaxed: least squares whose weights are drawn to the best rotation, not to 0.

    With few pairs it is nearly `ProcrustesBridge`, with many nearly `RidgeBridge`; how far it
    goes is the penalty, chosen by leave-one-out error. Parameters and attributes are those of
    `RidgeBridge`.

    Notes
    -----
    Minimises ``|X W - Y|^2 + alpha |W - R|^2``, ``R`` the Procrustes rotation: a closed form. The
    paper trains ``W`` by gradients and penalises ``|W' W - I|`` beyond a threshold instead.

    References
    ----------
    Ricci et al., lambda-Orthogonality Regularization for Compatible Representation Learning,
    NeurIPS 2025, arXiv:2509.16664.
    """

    _kind = "relaxed_bridge"

    def _prior(self, X: Matrix, Y: Matrix, sizes: tuple[int, ...]) -> Matrix:
        return _rotation(X, Y, sizes)


class StiffBridge(RelaxedBridge):
    """Least squares held near the best rotation by a fixed penalty.

    `RelaxedBridge` leaves the rotation as far as that predicts old vectors better, and becomes as
    blind as they are to what only a better model tells apart; this one does not go as far.

    Parameters and attributes are those of `RidgeBridge`, but that ``alpha`` is by default a 30th of
    the number of pairs (whose vectors have length 1).

    Notes
    -----
    Minimises ``|X W + c - Y|^2 + alpha |W - R|^2``, ``R`` the Procrustes rotation. The 30th was
    chosen on the pairs of text encoders of ``benchmarks/bridge.py``.
    """

    _kind = "stiff_bridge"

    def _penalty(self, n_pairs: int) -> float | None:
        return n_pairs * _STIFFNESS if self.alpha is None else self.alpha


class LowRankBridge(Bridge):
    """The affine bridge through few directions: reduced-rank regression.

    Parameters
    ----------
    rank
        Directions of the old space that are predicted; at most its size.
    alpha : float, optional
        As in `RidgeBridge`.

    References
    ----------
    Izenman, Reduced-rank regression for the multivariate linear model, J. Multivariate Analysis
    1975. Drift-Adapter, EMNLP 2025, arXiv:2509.23471.
    """

    _kind = "low_rank_bridge"

    def __init__(self, rank: Any = 64, *, alpha: Any = None) -> None:
        self.rank = rank
        self.alpha = alpha

    def _learn(self, X: Matrix, Y: Matrix) -> dict[str, Matrix]:
        weights, constant, _ = _ridge(X, Y, self.alpha, intercept=True)
        # The directions in which the predictions vary most are the best ones to keep.
        predicted = (X - X.mean(axis=0)) @ weights
        axes = svd(predicted.T @ predicted)[0][:, : int(self.rank)]
        centre = X.mean(axis=0) @ weights + constant
        linear = weights @ axes @ axes.T
        return {"linear": linear, "intercept": centre - X.mean(axis=0) @ linear}


def row_hashes(rows: Matrix) -> NDArray[np.uint64]:
    """Return a hash of each row's direction (n,), coarse enough for most re-encodings to agree."""
    coarse = np.rint(100 * unit(rows)).astype(np.int8)
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in coarse)
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def _unchanged(X: Matrix, Y: Matrix) -> Matrix:
    if X.shape[1] != Y.shape[1]:
        raise DataError(
            f"vectors of {X.shape[1]} dims cannot stand for vectors of {Y.shape[1]} unchanged; "
            f"fit another bridge, like a RelaxedBridge."
        )
    return np.eye(X.shape[1], dtype=np.float32)


def _reach(sizes: tuple[int, ...], n_in: int) -> tuple[int, ...]:
    """Return how many input dims each output block may see: a prefix, and the last one all."""
    return (*(min(size, n_in) for size in sizes[:-1]), n_in)


def _rotation(X: Matrix, Y: Matrix, sizes: tuple[int, ...]) -> Matrix:
    """Return the (block-)orthogonal matrix that takes X nearest to Y."""
    linear = np.zeros((X.shape[1], Y.shape[1]), np.float32)
    start = 0
    for stop, reach in zip(sizes, _reach(sizes, X.shape[1]), strict=True):
        if reach > start:  # beyond the input's last dim there is nothing to rotate
            x, y = X[:, start:reach].astype(np.float64), Y[:, start:stop]
            moment = x.T @ y
            moment += _UNSEEN * np.linalg.norm(moment, 2) * np.eye(*moment.shape)
            left, _, right = svd(moment, full_matrices=False)
            linear[start:reach, start:stop] = left @ right
        start = stop
    return linear


def _ridge(
    X: NDArray[Any], Y: NDArray[Any], alpha: float | None, intercept: bool
) -> tuple[Matrix, Matrix, float]:
    """Return weights (n_in, n_out), constant (n_out,) and the penalty; X and Y as they are."""
    x, y = X.astype(np.float64), Y.astype(np.float64)
    if alpha is None and len(x) > 2:
        scale = max(float((x**2).sum()) / x.shape[1], 1e-12)
        model: Any = RidgeCV([p * scale for p in _PENALTIES], fit_intercept=intercept).fit(x, y)
        alpha = float(model.alpha_)
    else:
        alpha = 1.0 if alpha is None else float(alpha)
        model = Ridge(alpha=alpha, fit_intercept=intercept).fit(x, y)
    coefficients = np.atleast_2d(model.coef_)  # one target comes back flat
    constant = np.broadcast_to(model.intercept_, coefficients.shape[:1])
    return coefficients.T.astype(np.float32), constant.astype(np.float32), alpha
