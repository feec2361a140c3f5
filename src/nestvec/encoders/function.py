"""Any function from texts to vectors as an encoder: an API, a model server, your own code."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nestvec import _checks
from nestvec.encoders.base import Encoder, Items, Role
from nestvec.space import Space


class CallableEncoder(Encoder):
    """Encode with a function of yours.

    Parameters
    ----------
    function
        Takes a list of texts (the prompt already before each), returns ``(len(texts), dim)``.
    name
        Which model the function asks. It is all there is to tell its Space from others', so name
        the model (and its version), not the function.
    dim
        Full size of the vectors; if not given, one word is encoded to find out.
    document_prompt, query_prompt
        Put before every document, every query.
    normalise
        L2-normalise each row.
    batch_size
        Texts given to ``function`` at a time.

    Examples
    --------
    >>> encoder = CallableEncoder(lambda texts: [[len(t), 1.0] for t in texts], name="length")
    >>> encoder.encode(["a", "abc"]).array.round(2)
    array([[0.71, 0.71],
           [0.95, 0.32]], dtype=float32)
    """

    def __init__(
        self,
        function: Callable[[list[str]], ArrayLike],
        *,
        name: str,
        dim: int | None = None,
        document_prompt: str = "",
        query_prompt: str = "",
        normalise: bool = True,
        batch_size: int = 256,
    ) -> None:
        self.function = function
        self.name = name
        self._dim = dim
        self.prompts: dict[Role, str] = {"document": document_prompt, "query": query_prompt}
        self.normalise = normalise
        self.batch_size = batch_size
        self.source = f"function {getattr(function, '__name__', type(function).__name__)}"

    @property
    def space(self) -> Space:
        """Where the vectors live: declared by ``name``."""
        if self._dim is None:
            found = self._vectors(["word"], "document")
            self._dim = _checks.as_matrix(found, name="what the function returned").shape[1]
        return Space.declared(
            self.name,
            dim=self._dim,
            document_prompt=self.prompts["document"],
            query_prompt=self.prompts["query"],
            normalisation="l2" if self.normalise else "none",
        )

    def _vectors(self, texts: list[str], role: Role) -> ArrayLike:
        return self.function([self.prompts[role] + text for text in texts])

    def _lengths(self, texts: Items, role: Role) -> tuple[NDArray[np.int64], int | None]:
        return np.array([len(text) for text in texts]), None
