"""Make room in a text model: vectors of more dims, of which the first are what they were."""

from __future__ import annotations

from typing import Any

from torch import nn

from nestvec._extras import require
from nestvec.encoders.wider import wider_linear
from nestvec.errors import DimensionError

require("sentence_transformers", extra="train", why="a wider text model")

from sentence_transformers import SentenceTransformer  # noqa: E402  # behind the check above
from sentence_transformers.sentence_transformer import modules  # noqa: E402  # likewise


def widened(model: Any, dim: int) -> SentenceTransformer:
    """Return a ``SentenceTransformer`` of ``dim`` numbers made of another, whose weights it shares.

    A linear layer (a ``Dense`` module, before a last ``Normalize``) is put behind it. It starts as
    a copy: the first numbers are what they were, but for the length of the whole; those behind them
    are mixtures of them, drawn from torch's generator, and wait to be trained.

    Raises
    ------
    DimensionError
        If the model is longer than that already.
    """
    size = model.get_embedding_dimension()
    if size is None or size > dim:
        raise DimensionError(
            f"a model of dim {size} is not widened to {dim}: choose {size} or more."
        )
    chain = list(model)
    last = chain.pop() if type(chain[-1]).__name__ == "Normalize" else None
    layer = wider_linear(size, dim)
    wide = modules.Dense(
        size, dim, bias=False, activation_function=nn.Identity(), init_weight=layer.weight.detach()
    )
    return SentenceTransformer(
        modules=[*chain, wide, *([] if last is None else [last])],
        device=str(model.device),
        prompts=dict(model.prompts),
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name=model.similarity_fn_name,
    )
