"""Where the new vectors of rows come from: an encoder and a column, a function, or a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nestvec.encoders.base import Encoder
from nestvec.errors import DataError
from nestvec.space import Embeddings, Space

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
