"""Vectors of a compatible model as vectors of the old one: cut, and stamped with the old Space."""

from __future__ import annotations

from dataclasses import replace

from nestvec import _checks
from nestvec.errors import SpaceMismatchError
from nestvec.space import Embeddings, Space


def compatible_prefix(embeddings: Embeddings, old: Space | None = None) -> Embeddings:
    """Return the prefix that lives in the old Space: queries for the old gallery.

    Parameters
    ----------
    embeddings
        Vectors of a model that was trained to be compatible (`nestvec.train.train_text` or
        `train_image` with ``compatible_with``), at full size or cut no shorter than the old one.
    old
        The old gallery's Space, which may be that of the model's predecessor's predecessor, if each
        was trained to be compatible with the one before. None takes the direct predecessor's.

    Returns
    -------
    Embeddings
        The first ``old.size`` numbers, L2-normalised, with the same ids, in the Space ``old``.

    Raises
    ------
    SpaceMismatchError
        If the vectors were not trained to hold that Space. Whether they hold it well enough to be
        served is another question, which `nestvec.upgrade.judge` answers on your data.

    Examples
    --------
    >>> import numpy as np
    >>> old = Space.declared("old", dim=2)
    >>> new = Space.declared("new", dim=3, compatible_with=old.to_dict())
    >>> found = compatible_prefix(Embeddings(np.eye(3)[:2], new))
    >>> found.space == old, found.array.shape
    (True, (2, 2))
    """
    there = _held(embeddings.space)
    wanted = there[0] if old is None and there else old
    match = next((space for space in there if wanted and space.space_id == wanted.space_id), None)
    if match is None:
        held = ", ".join(space.label for space in there) or "no other"
        raise SpaceMismatchError(
            f"{embeddings.space.label} was trained to hold {held} in its prefix"
            + (f", and {wanted.label} is asked for" if wanted else "")
            + ". Train with compatible_with=, or fit a bridge between the two spaces on a sample "
            "encoded by both."
        )
    cut = _checks.normalise(embeddings.array[:, : match.size], name="prefix")
    return embeddings.replaced(cut, replace(match, via=(f"prefix of {embeddings.space.space_id}",)))


def _held(space: Space) -> list[Space]:
    """Return the Spaces that a Space's prefix holds, the newest first."""
    found = []
    stamp = space.compatible_with
    while stamp is not None:
        found.append(Space.from_dict(dict(stamp)))
        stamp = found[-1].compatible_with
    return found
