"""Relative representations: two encoders meet in the similarities to shared anchors, untrained."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from nestvec.errors import DataError
from nestvec.maps import samples
from nestvec.maps.base import FittedMap
from nestvec.maps.guard import unit
from nestvec.space import Embeddings, Space

Matrix = NDArray[np.float32]


class AnchorMap(FittedMap):
    """Describe a vector by its cosines with anchors: the same texts for every encoder.

    Whatever two encoders do differently (turn, stretch evenly), a text's similarities to the
    anchors stay much the same, so vectors of both may be compared there. Both sides have to be
    mapped: `anchor_maps` fits one map for each.

    Parameters
    ----------
    n_anchors
        Dims of the result; at most the rows of the sample.
    dims : sequence of int, optional
        Nesting dims; by default the number of anchors halved down to 16.
    whiten
        Subtract the sample's mean and even out its directions before the cosines, or they are
        mostly about what all texts share.

    Attributes
    ----------
    chosen_ : (n_anchors,) int64
        Rows of the sample that are anchors, in order: each is the farthest from all before it, so
        every prefix of the result rests on anchors that are spread out.
    dims_, n_features_in_, content_hash

    Notes
    -----
    The paper takes anchors at random, unordered, and whitens nothing.

    References
    ----------
    Moschella et al., Relative representations enable zero-shot latent space communication, ICLR
    2023, arXiv:2209.15430. Gonzalez, Clustering to minimize the maximum intercluster distance,
    1985: the farthest-point order.
    """

    _kind = "anchor_map"
    chosen_: NDArray[np.int64]
    meeting_: str
    _arrays_: dict[str, Matrix]

    def __init__(self, n_anchors: Any = 256, dims: Any = None, *, whiten: Any = True) -> None:
        self.n_anchors = n_anchors
        self.dims = dims
        self.whiten = whiten

    def fit(self, X: Any, y: Any = None, *, chosen: Any = None) -> AnchorMap:
        """Take anchors from a sample.

        Parameters
        ----------
        X : (n, dim) array or Embeddings
            The sample, by this encoder.
        chosen : (n_anchors,) int, optional
            Rows to take, in order; by default the farthest-point order of these rows.
        """
        samples.refuse_lengths(X)
        rows = unit(self._take(X, reset=True, allow_zero_rows=True))
        k = min(int(self.n_anchors), len(rows))
        if k < 1:
            raise DataError(f"n_anchors={self.n_anchors}: pass 1 or more.")
        self._set_dims(self.dims, k)
        self.chosen_ = farthest_first(rows, k) if chosen is None else np.asarray(chosen, np.int64)
        dim = rows.shape[1]
        plain = np.eye(dim, dtype=np.float32)
        self._arrays_ = {"mean": np.zeros(dim, np.float32), "whitening": plain}
        if self.whiten:
            self._arrays_ = _whitening(rows)
        self._arrays_["anchors"] = self._seen(rows[self.chosen_])
        self.meeting_ = _key([self])
        return self

    def _seen(self, rows: Matrix) -> Matrix:
        centred = np.subtract(unit(rows), self._arrays_["mean"])
        return unit(centred @ self._arrays_["whitening"])

    def _map(self, rows: Matrix) -> Matrix:
        return self._seen(rows) @ self._arrays_["anchors"].T

    def _space(self, old: Space) -> Space:
        return Space(
            fingerprint=f"anchors:{self.meeting_}",
            dim=len(self._arrays_["anchors"]),
            nesting_dims=self.dims_,
            model=f"{len(self._arrays_['anchors'])} anchors",
        )

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return self._arrays_

    def _about(self) -> dict[str, Any]:
        n = len(self._arrays_["anchors"])
        return {"n_features_out": n, "meeting": self.meeting_, "chosen": self.chosen_.tolist()}

    def _restore(self, arrays: dict[str, NDArray[Any]], about: dict[str, Any]) -> None:
        dim = self.n_features_in_
        shapes = {name: array.shape for name, array in arrays.items()}
        wanted = {"mean": (dim,), "whitening": (dim, dim), "anchors": (len(about["chosen"]), dim)}
        if shapes != wanted:
            raise ValueError("the arrays do not fit together")
        self._arrays_ = arrays
        self.meeting_ = str(about["meeting"])
        self.chosen_ = np.array(about["chosen"], dtype=np.int64)


def anchor_maps(*sides: Any, **settings: Any) -> list[AnchorMap]:
    """Fit one `AnchorMap` for each encoder, all leading to one Space.

    Parameters
    ----------
    sides : Embeddings or (n, dim) arrays, two or more
        The same texts by each encoder: paired by ids if all have them, else row by row. Anchors
        are chosen by the first.
    settings
        Those of `AnchorMap`.

    Returns
    -------
    list of AnchorMap
        In the order of the sides. Their Space is made from the anchors of all of them, so vectors
        of other anchors, or of another set of encoders, are never compared with these.

    Examples
    --------
    >>> old = np.random.default_rng(0).normal(size=(40, 8))
    >>> new = old @ np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0]
    >>> to_old, to_new = anchor_maps(old, new, n_anchors=16)
    >>> bool(np.allclose(to_old.transform(old), to_new.transform(new), atol=1e-4))
    True
    """
    if len(sides) < 2:
        raise DataError(f"{len(sides)} side given; anchors join two encoders or more.")
    first = sides[0]
    if all(isinstance(side, Embeddings) and side.has_ids for side in sides):
        shared = set.intersection(*(set(side.ids.tolist()) for side in sides))
        order = [i for i in first.ids.tolist() if i in shared]
        if not order:
            raise DataError("the sides share no id; encode the same texts under the same ids.")
        sides = tuple(side[side.rows_of(order)] for side in sides)
    sizes = [len(side) for side in sides]
    if len(set(sizes)) > 1:
        raise DataError(f"sides of {sizes} rows do not pair up: row i of all is one text.")
    maps = [AnchorMap(**settings).fit(sides[0])]
    maps += [AnchorMap(**settings).fit(side, chosen=maps[0].chosen_) for side in sides[1:]]
    meeting = _key(maps)
    for one in maps:
        one.meeting_ = meeting
    return maps


def farthest_first(rows: Matrix, k: int) -> NDArray[np.int64]:
    """Return k row numbers: first the row nearest to the mean, then always the farthest from all.

    Rows are unit vectors; ties go to the lower row.
    """
    chosen = np.empty(k, np.int64)
    chosen[0] = int(np.argmax(rows @ rows.mean(axis=0)))
    nearest = rows @ rows[chosen[0]]
    for at in range(1, k):
        nearest[chosen[:at]] = np.inf  # never twice
        chosen[at] = int(np.argmin(nearest))
        np.maximum(nearest, rows @ rows[chosen[at]], out=nearest)
    return chosen


def _whitening(rows: Matrix) -> dict[str, Matrix]:
    """Return the mean and the symmetric matrix that evens out the sample's directions.

    With as much again of the mean variance on every direction, so that those of few rows are not
    blown up.
    """
    mean = rows.mean(axis=0)
    values, axes = eigh(
        np.cov((rows - mean).astype(np.float64).T, bias=True).reshape(len(mean), -1)
    )
    values = values.clip(min=0)
    floor = max(float(values.mean()), 1e-12)
    whitening = (axes / np.sqrt((values + floor) / floor)) @ axes.T
    return {"mean": mean, "whitening": whitening.astype(np.float32)}


def _key(maps: list[AnchorMap]) -> str:
    digests = sorted(hashlib.sha256(m._arrays_["anchors"].tobytes()).hexdigest() for m in maps)
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
