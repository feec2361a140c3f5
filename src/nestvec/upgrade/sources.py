"""Where the new vectors of rows come from: an encoder and a column, a function, or a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nestvec.encoders.base import Encoder
from nestvec.errors import DataError
from nestvec.space import Embeddings, Space

_AT_ONCE = 65_536

Source = Encoder | Embeddings | Callable[[list[Any]], ArrayLike | Embeddings]


def check_column(column: str | None, names: list[str]) -> None:
    """Raise `DataError` unless a column is one of the payload."""
    payload = [name for name in names if name not in ("id", "vector")]
    if column not in payload:
        said = ", ".join(payload) or "none, so embed its rows into a file and give that"
        raise DataError(
            f"column {column!r} is not one that the index keeps beside its vectors; which of them "
            f"holds what is embedded? There are: {said}."
        )


def has_content(values: list[Any]) -> NDArray[np.bool_]:
    """Tell which values are no empty text and not missing, (n,)."""
    said = [bool(one.strip()) if isinstance(one, str) else one is not None for one in values]
    return np.array(said, np.bool_)


class NewVectors:
    """New vectors of rows of an index.

    Parameters
    ----------
    source
        An encoder, which reads texts in ``column``; a function from a list of its values to
        vectors, one a row; or `Embeddings` made before, with the ids of the index.
    column
        The payload column; none for Embeddings.
    space
        The new Space; what comes is of it, or said to be by being an array.
    names
        The columns of the index.
    """

    def __init__(self, source: Source, column: str | None, space: Space, names: list[str]) -> None:
        self.source, self.column, self.space = source, column, space
        self.is_made = isinstance(source, Embeddings)
        if isinstance(source, Embeddings):
            space.check_same(source.space)
            if column is not None:
                raise DataError(f"vectors that are made already need no column {column!r}.")
            if not source.has_ids:
                raise DataError("vectors that are made already need the ids of their rows.")
        else:
            if isinstance(source, Encoder):
                space.check_same(source.space)
            check_column(column, names)

    @property
    def columns(self) -> list[str]:
        """What is read of a row."""
        return ["id"] if self.column is None else ["id", self.column]

    def has(self, ids: NDArray[Any]) -> NDArray[np.bool_]:
        """Tell for which rows there are vectors, (n,)."""
        if isinstance(self.source, Embeddings):
            return np.isin(ids, self.source.ids)
        return np.ones(len(ids), np.bool_)

    def digest(self) -> str:
        """Return what tells made vectors from others: a hash of their ids and numbers."""
        assert isinstance(self.source, Embeddings)
        found = hashlib.blake2b(self.source.ids.tobytes(), digest_size=16)
        for start in range(0, len(self.source), _AT_ONCE):
            found.update(self.source.array[start : start + _AT_ONCE].tobytes())
        return found.hexdigest()

    def can_embed(self, table: Any) -> NDArray[np.bool_]:
        """Tell which rows an encoder takes, (n,): no text has nothing to say."""
        if not isinstance(self.source, Encoder):
            return np.ones(len(table), np.bool_)
        return has_content(table[self.column].to_pylist())

    def __call__(self, table: Any) -> Embeddings:
        """Return the vectors of some rows, with their ids."""
        ids = np.array(table["id"].to_pylist())
        if isinstance(self.source, Embeddings):
            return self.source[self.source.rows_of(ids)]
        return self.of(ids, table[self.column].to_pylist())

    def of(self, ids: NDArray[Any], values: list[Any]) -> Embeddings:
        """Embed the values of the column."""
        assert not isinstance(self.source, Embeddings)
        if isinstance(self.source, Encoder):
            return self.source.encode(values, ids=ids, show_progress=False)
        made = self.source(values)
        if isinstance(made, Embeddings):
            self.space.check_same(made.space)
            made = made.array
        if len(np.asarray(made)) != len(ids):
            raise DataError(
                f"the function returned {len(np.asarray(made))} vectors for {len(ids)} rows; one a "
                f"row is needed, in their order."
            )
        return Embeddings(made, self.space, ids)
