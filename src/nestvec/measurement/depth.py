"""Earlier layers of the encoder that is measured: their vectors on the same items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec.errors import DataError, DimensionError
from nestvec.measurement.tasks import Task, unit

Matrix = NDArray[np.float32]


def checked(layers: Mapping[int, Any]) -> dict[int, Sequence[Any]]:
    """Return the layers rising, or raise for numbers or sides that are none."""
    wrong = [one for one in layers if not isinstance(one, (int, np.integer)) or one < 1]
    if not layers or wrong:
        raise DataError(f"layers {list(layers)} do not fit: at least one, numbers from 1.")
    for layer, sides in layers.items():
        if isinstance(sides, np.ndarray) or not 1 <= len(sides) <= 2 or hasattr(sides, "space"):
            raise DataError(
                f"layers: layer {layer} is to come with its two sides, like (documents, queries), "
                f"or with (documents,) alone."
            )
    return {int(layer): layers[layer] for layer in sorted(layers)}


def earlier_sides(
    task: Any, layers: Mapping[int, Sequence[Any]]
) -> dict[int, tuple[Matrix, Matrix]]:
    """Return (gallery, asking) of every layer but the last, at length 1, as the task has them.

    The largest number is the task's own layer. Raises `DataError` or `DimensionError` if a layer's
    vectors are of other things, or of another size, than the task's.
    """
    *earlier, _ = layers
    names = [field.name for field in fields(task)][:2]
    found = {}
    for layer in earlier:
        other: Task = replace(task, **dict(zip(names, layers[layer], strict=False)))
        for mine, own in ((other.gallery, task.gallery), (other.asking, task.asking)):
            if mine.dim != own.dim:
                raise DimensionError(
                    f"layers: layer {layer} has vectors of {mine.dim} dims and the last layer of "
                    f"{own.dim}; all layers of one encoder have the same."
                )
            if not np.array_equal(mine.ids, own.ids):
                raise DataError(
                    f"layers: the rows of layer {layer} are not those of the last layer: encode "
                    f"the same things in the same order (TextEncoder.encode_layers does)."
                )
        found[layer] = unit(other.gallery), unit(other.asking)
    return found
