"""Bring a new model's queries and an old gallery into one Space, however they may be joined."""

from __future__ import annotations

from typing import Any

from nestvec.space import Embeddings
from nestvec.upgrade.prefix import compatible_prefix


def crossed(
    docs: Embeddings, queries: Embeddings, bridge: Any = None
) -> tuple[Embeddings, Embeddings]:
    """Return documents and queries that may be compared, one of them moved if need be.

    Parameters
    ----------
    docs, queries
        The old gallery and the new model's queries.
    bridge
        A fitted map from either Space to the other. Without one they must share a Space, or the
        new model must have been trained to hold the old one in its prefix.

    Raises
    ------
    SpaceMismatchError
        If nothing joins the two.
    """
    if bridge is not None:
        fitted = bridge.space_
        if fitted is not None and fitted.space_id == docs.space.space_id:
            docs = bridge.transform(docs)
        else:
            queries = bridge.transform(queries)
    elif queries.space.space_id != docs.space.space_id and queries.space.compatible_with:
        queries = compatible_prefix(queries, docs.space)
    docs.space.check_same(queries.space)
    return docs, queries
