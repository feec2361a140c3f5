"""What stands beside trained weights: the sizes in config.json, and a model card with the table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nestvec._atomic import written_beside
from nestvec.space import Space


def declare_dims(folder: Path, dims: Sequence[int], layers: Sequence[int] = ()) -> None:
    """Write ``is_matryoshka`` and ``matryoshka_dimensions`` (vLLM's keys) into config.json.

    Layers that were trained go beside them, as ``matryoshka_layers``.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"is_matryoshka": True, "matryoshka_dimensions": list(dims)}
    config.pop("matryoshka_layers", None)  # of the model that it began from
    if layers:
        config["matryoshka_layers"] = list(layers)
    with written_beside(path) as scratch:
        scratch.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def size_table(metrics: Mapping[str, float], dims: Sequence[int]) -> str:
    """Return a Markdown table, a row a size, of metrics called ``name@dim``, as far as they go.

    >>> print(size_table({"spearman@8": 0.5, "spearman@16": 0.625}, [8, 16]))
    | dim | bytes a vector | spearman |
    | --- | --- | --- |
    | 8 | 32 | 0.500 |
    | 16 | 64 | 0.625 |
    """
    names = list(dict.fromkeys(key.rpartition("@")[0] for key in metrics))
    head = ["dim", "bytes a vector", *names]
    rows = [
        [str(dim), str(4 * dim), *(_shown(metrics.get(f"{name}@{dim}")) for name in names)]
        for dim in dims
    ]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def layer_tables(metrics: Mapping[str, float], dims: Sequence[int], layers: Sequence[int]) -> str:
    """Return Markdown tables, one a metric: a row a layer, a column a size.

    The last layer's metrics are called ``name@dim``, those of the others ``name@layerxdim``.

    >>> print(layer_tables({"top1@8": 0.5, "top1@3x8": 0.25}, [8], [3, 6]))
    top1 by layer (of 6) and dim:
    <BLANKLINE>
    | layer | 8 |
    | --- | --- |
    | 3 | 0.250 |
    | 6 | 0.500 |
    """
    last = layers[-1]
    found = []
    for name in dict.fromkeys(key.rpartition("@")[0] for key in metrics):
        rows = [["layer", *map(str, dims)], ["---"] * (1 + len(dims))]
        for layer in layers:
            at = "" if layer == last else f"{layer}x"
            rows.append([str(layer), *(f"{metrics[f'{name}@{at}{dim}']:.3f}" for dim in dims)])
        lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        found.append(f"{name} by layer (of {last}) and dim:\n\n{lines}")
    return "\n\n".join(found)


def write_card(
    folder: Path,
    *,
    library: str,
    base: str,
    dims: Sequence[int],
    metrics: Mapping[str, float],
    measured_on: str,
    trained_on: str,
    settings: Mapping[str, Any],
    usage: str,
    compatible_with: Space | None = None,
    layers: Sequence[int] = (),
) -> None:
    """Write README.md, a model card as the hub reads it."""
    table = size_table(metrics, dims) if metrics else "Not measured: no validation data was given."
    if layers and metrics:
        table += "\n\n" + layer_tables(metrics, dims, layers)
    how = "\n".join(f"- {key}: {value}" for key, value in settings.items() if value is not None)
    old = ""
    if compatible_with is not None:
        old = f"""
## Compatible with an older model

The first {compatible_with.size} numbers of a vector, L2-normalised, were trained to live in the
space of {compatible_with.label}. `nestvec.upgrade.compatible_prefix(vectors)` makes queries for
its gallery of them; whether they are good enough is for `nestvec.upgrade` to say, on your data.
"""
    text = f"""---
library_name: {library}
tags: [{library}, nestvec, matryoshka, embeddings]
---
# {folder.resolve().name}

A nested (Matryoshka) embedding model: every prefix of its vectors at the sizes
{", ".join(map(str, dims))} is an embedding. Cut, then L2-normalise.

- base: {base}
- trained on: {trained_on}

## Each size

{f"Measured on {measured_on}, after each cut and L2-normalisation." if metrics else ""}

{table}

## Use

{usage}
{old}
## Training

{how}

Made with nestvec, after Matryoshka Representation Learning (Kusupati et al. 2022,
[arXiv:2205.13147](https://arxiv.org/abs/2205.13147)).
"""
    with written_beside(folder / "README.md") as scratch:
        scratch.write_text(text, encoding="utf-8")
