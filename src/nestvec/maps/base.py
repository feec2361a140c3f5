"""What every map shares: arrays or Embeddings in and out, a content hash, and a folder on disk."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from nestvec import _checks
from nestvec._atomic import make_way, written_beside
from nestvec.errors import FileFormatError, SpaceMismatchError, StorageError
from nestvec.space import Embeddings, Space, halving, parse_dims

_FORMAT_VERSION = 1
_ARRAYS, _ABOUT = "map.safetensors", "map.json"
_MODULES = {
    "principal_rotation": ("nestvec.maps.rotation", "PrincipalRotation"),
    "random_rotation": ("nestvec.maps.rotation", "RandomRotation"),
    "matryoshka_adaptor": ("nestvec.maps.adaptor", "MatryoshkaAdaptor"),
    "unchanged_bridge": ("nestvec.maps.alignment", "UnchangedBridge"),
    "procrustes_bridge": ("nestvec.maps.alignment", "ProcrustesBridge"),
    "ridge_bridge": ("nestvec.maps.alignment", "RidgeBridge"),
    "relaxed_bridge": ("nestvec.maps.alignment", "RelaxedBridge"),
    "stiff_bridge": ("nestvec.maps.alignment", "StiffBridge"),
    "low_rank_bridge": ("nestvec.maps.alignment", "LowRankBridge"),
    "residual_bridge": ("nestvec.maps.residual", "ResidualBridge"),
    "anchor_map": ("nestvec.maps.anchors", "AnchorMap"),
    "drift_bridge": ("nestvec.maps.alignment", "DriftBridge"),
}


_Map = TypeVar("_Map", bound="FittedMap")


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Raise `StorageError` unless a map may be saved there; long work asks before it begins."""
    make_way(Path(folder), (_ABOUT, _ARRAYS))


class FittedMap(TransformerMixin, BaseEstimator):
    """Base of the maps: a scikit-learn transformer that takes one Space to another.

    A subclass names its ``_kind``, gives its learned arrays in ``_arrays``, takes them back in
    ``_restore`` and maps a float32 block in ``_map``.
    """

    _kind: ClassVar[str]
    dims_: tuple[int, ...]
    n_features_in_: int
    space_: Space | None  # where it was fitted; None if on plain arrays, which do not say

    def _arrays(self) -> dict[str, NDArray[Any]]:
        raise NotImplementedError  # each map has its own

    def _about(self) -> dict[str, Any]:
        """Learned facts that are not arrays, as plain JSON values."""
        return {}

    def _restore(self, arrays: dict[str, NDArray[Any]], about: dict[str, Any]) -> None:
        raise NotImplementedError  # each map has its own

    def _map(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        raise NotImplementedError  # each map has its own

    def _space(self, old: Space) -> Space:
        return old.mapped(self.content_hash, nesting_dims=self.dims_)

    def module_arrays(self) -> dict[str, NDArray[np.float32]]:
        """Return the map as arrays: ``x @ linear``, ``+ gelu(x @ inner + bias) @ outer`` if there.

        Bridges may have an ``intercept`` to add, for rows of length 1. For other frameworks;
        `as_modules` is made of these.
        """
        raise NotImplementedError  # each map has its own

    def as_modules(self, *, normalise: bool = True) -> list[Any]:
        """Return the map as modules for the end of a `SentenceTransformer`.

        ``SentenceTransformer(modules=[*model, *fitted.as_modules()])``; save it and load it as any
        model, then ``encode(..., truncate_dim=64, normalize_embeddings=True)``. See
        `nestvec.maps.sentence_transformer.as_modules`.
        """
        from nestvec.maps import sentence_transformer

        check_is_fitted(self)
        return sentence_transformer.as_modules(self, normalise=normalise)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []  # float32 out, whatever came in
        return tags

    def _unstamped(self, X: Any, *, reset: bool) -> Any:
        """Return the array of Embeddings; remember their Space, or check that it is that one."""
        array, space = (X.array, X.space) if isinstance(X, Embeddings) else (X, None)
        if reset:
            self.space_ = space
        elif space is not None and self.space_ is not None:
            _check_fitted_on(self.space_, space)
        return array

    def _take(self, X: Any, *, reset: bool, allow_zero_rows: bool = False) -> NDArray[Any]:
        """Return the matrix of an array or of Embeddings, checked; float32 is not copied."""
        X = validate_data(
            self,
            X=self._unstamped(X, reset=reset),
            reset=reset,
            dtype="numeric",
            ensure_all_finite=False,
        )
        if np.iscomplexobj(X):
            raise ValueError("Complex data not supported")
        return _checks.as_matrix(X, name="X", allow_zero_rows=allow_zero_rows)

    def _set_dims(self, dims: Any, full: int) -> None:
        self.dims_ = halving(full) if dims is None else parse_dims(dims, full=full)

    def transform(self, X: Any) -> Any:
        """Map rows into the nested Space.

        Parameters
        ----------
        X : (n, dim) array or Embeddings
            From the space the map was fitted on, at full size.

        Returns
        -------
        (n, dim) float32 array, or Embeddings
            What came in comes out. Embeddings are stamped: their Space is the old one plus this
            map's `content_hash`, with ``dims_`` as nesting dims, and their rows have length 1 if
            they had it before.

        Raises
        ------
        SpaceMismatchError
            If the map was fitted on Embeddings of another Space.
        """
        check_is_fitted(self)
        if isinstance(X, Embeddings):
            space = self._space(X.space)
            rows = self._map(self._take(X, reset=False))
            return X.replaced(_checks.normalise(rows) if space.has_unit_rows else rows, space)
        return self._map(self._take(X, reset=False, allow_zero_rows=True))

    @property
    def content_hash(self) -> str:
        """16 hex digits of what the map does: its kind and learned arrays, nothing else."""
        check_is_fitted(self)
        digest = hashlib.sha256(self._kind.encode())
        for name, array in sorted(self._arrays().items()):
            digest.update(f"{name}{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the map as ``map.safetensors`` and ``map.json``; `load_map` reads it back.

        Written beside and renamed: a reader sees the old map or the new one, never half of one. A
        folder that holds anything but a map is not replaced: `StorageError`.
        """
        check_is_fitted(self)
        about = {
            "format": "nestvec map",
            "format_version": _FORMAT_VERSION,
            "kind": self._kind,
            "content_hash": self.content_hash,
            "n_features_in": self.n_features_in_,
            "dims": list(self.dims_),
            "space": self.space_.to_dict() if self.space_ else None,
            "settings": self.get_params(deep=False),
            **self._about(),
        }
        text = json.dumps(about, indent=2, default=_plain) + "\n"
        with written_beside(folder, ours=(_ABOUT, _ARRAYS)) as scratch:
            scratch.mkdir()
            save_file(
                {k: np.ascontiguousarray(v) for k, v in self._arrays().items()}, scratch / _ARRAYS
            )
            (scratch / _ABOUT).write_text(text, encoding="utf-8")
        return Path(folder)

    @classmethod
    def load(cls: type[_Map], folder: str | os.PathLike[str]) -> _Map:
        """Read a map of this class that `save` wrote."""
        found = load_map(folder)
        if not isinstance(found, cls):
            raise FileFormatError(
                f"{folder} holds a {type(found).__name__}, not a {cls.__name__}. "
                f"Use nestvec.load_map, which reads every kind."
            )
        return found


def load_map(folder: str | os.PathLike[str]) -> FittedMap:
    """Read a map that ``save`` wrote, of whatever kind.

    Raises
    ------
    FileFormatError
        If the folder is damaged, truncated, or was not written by nestvec.
    StorageError
        If there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StorageError(f"no map at {folder}: the folder does not exist.")
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        arrays = load_file(folder / _ARRAYS)
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(folder, str(error)) from error
    if not isinstance(about, dict) or about.get("format") != "nestvec map":
        raise _damaged(folder, f"{_ABOUT} does not describe a nestvec map")
    if about.get("format_version") != _FORMAT_VERSION:
        raise FileFormatError(
            f"{folder} has map format {about.get('format_version')!r}; this nestvec reads "
            f"{_FORMAT_VERSION}. Upgrade nestvec."
        )
    try:
        module, name = _MODULES[about["kind"]]
        made = getattr(importlib.import_module(module), name)(**about["settings"])
        made.n_features_in_ = int(about["n_features_in"])
        made.space_ = Space.from_dict(about["space"]) if about["space"] else None
        full = int(about.get("n_features_out", made.n_features_in_))
        made.dims_ = parse_dims(about["dims"], full=full)
        made._restore(arrays, about)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(folder, repr(error)) from error
    if made.content_hash != about.get("content_hash"):
        raise _damaged(folder, "its arrays do not hash to the content hash it states")
    return cast(FittedMap, made)


def _check_fitted_on(fitted: Space, given: Space) -> None:
    if fitted.space_id != given.space_id:
        raise SpaceMismatchError(
            f"this map was fitted on {fitted.label}, and these vectors live in {given.label}. "
            f"Fit a map on vectors of their space, or encode them with that of the map."
        )


def _damaged(folder: Path, why: str) -> FileFormatError:
    return FileFormatError(
        f"{folder} is not a whole map: {why}. A map folder holds {_ABOUT} and {_ARRAYS}, both "
        f"written by save(); restore it from a copy or fit again."
    )


def _plain(value: Any) -> Any:
    """JSON for the NumPy values that settings may hold."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.random.RandomState | np.random.Generator):
        return None  # a generator's state is not a setting; the arrays hold what it led to
    raise TypeError(f"setting {value!r} cannot be saved as JSON")
