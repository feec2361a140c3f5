"""Encoders as one ONNX file: raw tensors in, embeddings of a Space out, no Python needed."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nestvec._atomic import written_beside
from nestvec._extras import require
from nestvec.encoders._quiet import quiet
from nestvec.encoders.base import Encoder
from nestvec.encoders.image import ImageEncoder
from nestvec.encoders.text import TextEncoder
from nestvec.errors import FileFormatError, ModelError
from nestvec.space import Space

if TYPE_CHECKING:
    from torch import Tensor, nn

_TOKENS = ("input_ids", "attention_mask", "token_type_ids")  # the usual order
_OUTPUT = "embedding"
_MOST_BYTES = 2**31 - 2**24  # a protobuf file ends at 2 GiB; the graph needs some of it
_TOLERANCE = 1e-4  # between the file and the encoder, for rows of length 1


def export_onnx(
    model: Any,
    path: str | os.PathLike[str],
    *,
    layer: int | None = None,
    dim: int | None = None,
    allow_untrained: bool = False,
) -> Space:
    """Write an encoder to one ``.onnx`` file and check that it returns the encoder's rows.

    The file takes what comes after the tokenizer or the preprocessing: ``input_ids`` and
    ``attention_mask`` (and ``token_type_ids`` where the model has them) int64 (batch, length), or
    ``pixel_values`` float32 (batch, channels, height, width); batch and length are free. Its output
    ``embedding`` is float32 (batch, dim). Put the prompt before a text yourself: it is in the
    stamp. The metadata ``nestvec`` is the stamp of the Space, and ``preprocessing`` says what is
    done to an image, both as JSON.

    Parameters
    ----------
    model
        A `TextEncoder`, an `ImageEncoder`, or what `encode` makes one of (a folder, a hub id).
    path
        Ends in ``.onnx``; a file that stands there is replaced.
    layer
        Of a text model: leave it after this layer, so that the file holds no more of it.
    dim
        Cut to this prefix, then L2-normalise.
    allow_untrained
        Accept a prefix that is not a nesting dim.

    Returns
    -------
    Space
        Of the file's output: the encoder's, or its prefix.

    Raises
    ------
    DimensionError
        If ``dim`` does not fit.
    ModelError
        If the model cannot be exported or weighs over 2 GiB, or the file's rows are not its own.
    MissingExtraError
        If onnx, onnxscript or onnxruntime is not installed.
    """
    from nestvec.encoders import encoder_of

    path = Path(path)
    if path.suffix.lower() != ".onnx":
        raise FileFormatError(f"cannot export to {path}: choose a name that ends in .onnx.")
    for name in ("onnx", "onnxscript", "onnxruntime"):
        require(name, extra="onnx", why="exporting to ONNX")
    encoder = encoder_of(model) if layer is None else encoder_of(model, layer=layer)
    space = encoder.space
    if dim is not None:
        space = space.prefix(dim, allow_untrained=allow_untrained)
    if isinstance(encoder, TextEncoder):
        graph = _of_text(encoder, space)
    elif isinstance(encoder, ImageEncoder):
        graph = _of_images(encoder, space)
    else:
        raise ModelError(
            f"a {type(encoder).__name__} has no network to export: text and image models have."
        )
    weights = sum(p.numel() * p.element_size() for p in graph.module.parameters())
    if weights > _MOST_BYTES:
        raise ModelError(
            f"{encoder.source} weighs {weights / 2**30:.1f} GiB, and one ONNX file holds 2 GiB."
        )
    with written_beside(path) as scratch:
        _write(graph, encoder.source, scratch)
        _compare(graph, encoder, space, scratch)
    return space


class _Graph(NamedTuple):
    module: nn.Module  # tensors in the order of ``samples`` to rows
    samples: dict[str, Tensor]  # to trace it with
    checks: list[tuple[dict[str, Tensor], Any]]  # of other shapes, and what they were made of
    free: dict[int, str]  # names of the axes that any call may choose
    metadata: dict[str, str]


def _of_text(encoder: TextEncoder, space: Space) -> _Graph:
    from torch import Tensor, nn

    model = encoder.model
    prompted = any(encoder.prompts.values())
    if prompted and any(getattr(module, "include_prompt", True) is False for module in model):
        raise ModelError(
            f"{encoder.source} leaves the prompt's tokens out of its pooling, which an ONNX file "
            f"without a tokenizer cannot do."
        )
    found = model.preprocess(["one text", "another text, and longer"])
    names = [name for name in _TOKENS if name in found]
    names += [name for name in found if isinstance(found[name], Tensor) and name not in names]
    constants = {name: value for name, value in found.items() if name not in names}

    class TextGraph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Tensor) -> Tensor:
            features = constants | dict(zip(names, tensors, strict=True))
            return _cut(self.model(features)["sentence_embedding"], space)

    def inputs(texts: list[str]) -> dict[str, Tensor]:
        tensors: Any = model.preprocess([encoder.prompts["document"] + text for text in texts])
        return {name: tensors[name].to(model.device) for name in names}

    others = ["a"], ["words of a text " * n for n in (1, 4, 2)]
    return _Graph(
        TextGraph(),
        samples=inputs(["one text", "another text, and longer"]),
        checks=[(inputs(texts), texts) for texts in others],
        free={0: "batch", 1: "length"},
        metadata=_stamp(space),
    )


def _of_images(encoder: ImageEncoder, space: Space) -> _Graph:
    import torch
    from torch import nn

    class ImageGraph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = encoder.network

        def forward(self, pixel_values: Tensor) -> Tensor:
            return _cut(self.network(pixel_values), space)

    made = encoder.preprocessing
    place = next(encoder.network.parameters(), torch.zeros(1))
    shape = (5, made.size, made.size, made.n_channels)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    def inputs(images: NDArray[np.uint8]) -> dict[str, Tensor]:
        return {"pixel_values": made(images).to(place)}

    return _Graph(
        ImageGraph(),
        samples=inputs(images[:2]),
        checks=[(inputs(some), some) for some in (images[:1], images)],
        free={0: "batch"},
        metadata=_stamp(space) | {"preprocessing": json.dumps(asdict(made))},
    )


def _stamp(space: Space) -> dict[str, str]:
    return {"nestvec": json.dumps(space.to_dict())}


def _cut(rows: Tensor, space: Space) -> Tensor:
    from torch.nn.functional import normalize

    rows = rows[:, : space.size].float()
    return normalize(rows, dim=1) if space.has_unit_rows else rows


def _write(graph: _Graph, source: str, path: Path) -> None:
    import torch

    from nestvec.encoders.image_network import evaluating

    free: Any = tuple(graph.free for _ in graph.samples)
    try:
        with quiet(), evaluating(graph.module):
            program: Any = torch.onnx.export(
                graph.module,
                tuple(graph.samples.values()),
                input_names=list(graph.samples),
                dynamic_shapes=(free,) if len(free) > 1 else free,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter raises what the model's code makes it raise
        reason = (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")
        raise ModelError(f"{source} cannot be exported to ONNX: {reason}.") from error
    made = program.model.graph
    for node in made:
        for value in node.outputs:
            if value.name == _OUTPUT:  # torch calls a lookup so
                value.name = f"{_OUTPUT}_inside"
    made.outputs[0].name = _OUTPUT
    program.model.metadata_props.update(graph.metadata)
    with quiet():
        program.save(str(path))


def _compare(graph: _Graph, encoder: Encoder, space: Space, path: Path) -> None:
    """Raise `ModelError` unless the file gives the encoder's rows."""
    runtime = require("onnxruntime", extra="onnx", why="exporting to ONNX")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    lost = set(graph.samples) - {one.name for one in session.get_inputs()}
    if lost:
        raise ModelError(f"{encoder.source} cannot be exported to ONNX: it does not use {lost}.")
    for tensors, items in graph.checks:
        want = encoder.encode(items, show_progress=False)
        if space.cut is not None:
            want = want.prefix(space.cut, allow_untrained=True)
        arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
        got: Any = session.run([_OUTPUT], arrays)[0]
        off = float(np.abs(got - want.array).max() / max(1.0, float(np.abs(want.array).max())))
        if not off <= _TOLERANCE:
            raise ModelError(
                f"{encoder.source}: the exported file's rows are off by {off:.1e} from the "
                f"encoder's, so it was not written. Something in the model does not follow its "
                f"inputs alone, or ONNX export does not follow it."
            )
