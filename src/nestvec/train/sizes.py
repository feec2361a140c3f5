"""Which sizes are trained: those asked for, and the full one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nestvec.errors import DataError, DimensionError, ModelError
from nestvec.space import halving, parse_dims
from nestvec.train.objectives import dim_weights


def sizes_of(
    full: int | None,
    dims: Iterable[int] | str | None,
    *,
    lowest: int,
    weights: str | Sequence[float | int] = "uniform",
) -> tuple[int, ...]:
    """Return the sizes to train, rising, the full one among them; by default it is halved.

    Raises
    ------
    DimensionError
        If a size is larger than the model.
    DataError
        If ``weights`` do not fit: numbers go with the sizes in rising order, the full one last.
    """
    if not full:
        raise ModelError("the model does not say how long its vectors are.")
    asked = halving(full, lowest=lowest) if dims is None else parse_dims(dims)
    if max(asked) > full:
        raise DimensionError(
            f"size {max(asked)} does not fit a model of dim {full}; choose sizes up to {full}."
        )
    sizes = tuple(sorted({*asked, full}))
    if not isinstance(weights, str) and len(tuple(weights)) != len(sizes):
        raise DataError(
            f"{len(tuple(weights))} weights for {len(sizes)} sizes: give one for each of "
            f"{', '.join(map(str, sizes))}, in this order (the full size is always trained)."
        )
    dim_weights(weights if isinstance(weights, str) else [float(w) for w in weights], len(sizes))
    return sizes
