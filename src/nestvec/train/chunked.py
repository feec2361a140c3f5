"""Large contrastive batches in the memory of a small one, for any loss, nested or not.

Gao et al., Scaling deep contrastive learning batch size under memory limited setup (GradCache),
arXiv:2101.06983.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nestvec.errors import DataError

Features = Tensor | Mapping[str, Any]


def encode_in_chunks(
    encode: Callable[[Any], Tensor], features: Features, chunk_size: int
) -> Tensor:
    """Encode a batch chunk by chunk, keeping the activations of one chunk at a time.

    The loss is taken over all rows at once, so every row is every other's negative. Its gradient at
    the embeddings is then handed back chunk by chunk: each is run again (with the random numbers of
    the first run, so dropout drops the same) and back-propagated before the next.

    Parameters
    ----------
    encode
        From a chunk, of the kind of ``features``, to its embeddings (n, dim), row by row.
    features
        One tensor (n, ...), or a dictionary whose tensors all have n rows; what is no tensor, or
        has no rows, is handed to every chunk as it is. With ``input_ids`` and ``attention_mask``
        each chunk is cut to its longest row: padding on the right that the mask hides anyway.
    chunk_size
        Rows a chunk. A batch that fits one chunk is encoded as usual.

    Returns
    -------
    Tensor
        (n, dim), in the order given.

    Raises
    ------
    DataError
        If ``chunk_size`` is below 1, or the features are empty or differ in rows.

    Notes
    -----
    Costs one more forward pass. The paper keeps the gradient at the embeddings and runs a second
    loop; `torch.utils.checkpoint` does the same inside one ``backward()``, so the loss need not
    know. A layer that mixes rows sees one chunk: BatchNorm normalises by it, and moves its running
    means twice; put it in evaluation mode, or use a norm over features.
    """
    if chunk_size < 1:
        raise DataError(f"chunk_size {chunk_size} does not fit: at least one row a chunk.")
    n = _n_rows(features)
    chunks = [_rows(features, start, start + chunk_size) for start in range(0, n, chunk_size)]
    if len(chunks) == 1:
        return encode(_own(features))
    longest = _longest(features, chunk_size)
    if longest is not None:
        chunks = [_trimmed(chunk, width) for chunk, width in zip(chunks, longest, strict=True)]

    def run(chunk: Features) -> Tensor:
        return encode(_own(chunk))

    return torch.cat([checkpoint(run, chunk, use_reentrant=False) for chunk in chunks])


def _own(features: Features) -> Features:
    """Copy the dictionary: encoders that write into theirs would keep activations alive."""
    return features if isinstance(features, Tensor) else dict(features)


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _n_rows(features: Features) -> int:
    if isinstance(features, Tensor):
        counts = {"features": len(features)} if features.ndim else {}
    else:
        counts = {name: len(value) for name, value in features.items() if _has_rows(value)}
    if not counts or not all(counts.values()):
        raise DataError(f"the features hold no rows ({counts}); at least one is needed.")
    if len(set(counts.values())) > 1:
        raise DataError(f"the features differ in rows: {counts}. Give each tensor all n rows.")
    return next(iter(counts.values()))


def _rows(features: Features, start: int, stop: int) -> Features:
    if isinstance(features, Tensor):
        return features[start:stop]
    return {
        name: value[start:stop] if _has_rows(value) else value for name, value in features.items()
    }


def _longest(features: Features, chunk_size: int) -> list[int] | None:
    """Return the columns each chunk needs, read from an accelerator once, or None if not tokens."""
    if isinstance(features, Tensor) or not {"input_ids", "attention_mask"} <= set(features):
        return None
    mask: Tensor = features["attention_mask"]
    if mask.ndim != 2:
        return None
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    ends = ((mask != 0) * places).amax(dim=1)
    return [max(1, int(end)) for end in torch.stack([c.max() for c in ends.split(chunk_size)])]


def _trimmed(chunk: Features, width: int) -> Features:
    assert not isinstance(chunk, Tensor)
    shape = chunk["attention_mask"].shape
    return {
        name: value[:, :width]
        if isinstance(value, Tensor) and value.shape == shape and not value.is_floating_point()
        else value
        for name, value in chunk.items()
    }
