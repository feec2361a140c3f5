"""A map as the last modules of a `SentenceTransformer`, saved and loaded there.

Made of that library's own ``Dense`` and ``Normalize``: a model saved with them loads anywhere, also
where nestvec is not installed. (A module class of our own would ask every user for
``trust_remote_code=True`` since sentence-transformers 6.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nestvec._extras import require

if TYPE_CHECKING:
    from nestvec.maps.base import FittedMap


def as_modules(fitted: FittedMap, *, normalise: bool = True) -> list[Any]:
    """Return modules for the end of a model: ``SentenceTransformer(modules=[*model, *these])``.

    Parameters
    ----------
    fitted
        Any fitted map of `nestvec.maps`.
    normalise
        End with L2-normalisation. After ``encode(..., truncate_dim=64)`` normalise again, as for
        every prefix: pass ``normalize_embeddings=True``.

    Raises
    ------
    MissingExtraError
        If sentence-transformers is not installed.
    """
    modules = require(
        "sentence_transformers.sentence_transformer.modules",
        extra="text",
        why="A map at the end of a SentenceTransformer",
    )
    torch = require("torch", extra="text", why="A map at the end of a SentenceTransformer")

    def dense(
        weight: NDArray[np.float32], bias: NDArray[np.float32] | None, activation: Any
    ) -> Any:
        n_in, n_out = weight.shape
        made = modules.Dense(n_in, n_out, bias=bias is not None, activation_function=activation)
        with torch.no_grad():
            made.linear.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight.T)))
            if bias is not None:
                made.linear.bias.copy_(torch.from_numpy(bias))
        return made

    arrays = fitted.module_arrays()
    linear = arrays["linear"]
    if "inner" not in arrays:
        chain = [dense(linear, arrays.get("intercept"), torch.nn.Identity())]
        if "intercept" in arrays:
            chain.insert(0, modules.Normalize())  # the constant is meant for rows of length 1
    else:
        # gelu(x) - gelu(-x) = x, so the residual connection fits through the hidden layer.
        eye = np.eye(len(linear), dtype=np.float32)
        bias = np.concatenate([arrays["bias"], np.zeros(2 * len(linear), np.float32)])
        chain = [
            modules.Normalize(),  # the network was trained on rows of length 1
            dense(np.hstack([arrays["inner"], eye, -eye]), bias, torch.nn.GELU()),
            dense(
                np.vstack([arrays["outer"], linear, -linear]),
                arrays.get("intercept"),
                torch.nn.Identity(),
            ),
        ]
    return [*chain, modules.Normalize()] if normalise else chain
