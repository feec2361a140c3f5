"""A text model cut in depth and width, as a folder that sentence-transformers loads anywhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from nestvec._atomic import make_way, written_beside
from nestvec._extras import require
from nestvec.encoders._quiet import quiet
from nestvec.encoders.fingerprint import fingerprint
from nestvec.encoders.shared_space import files_of_export, stand_for
from nestvec.encoders.text import TextEncoder
from nestvec.errors import ModelError
from nestvec.space import Embeddings, Space

_TEXTS = ["a text", "another one, and longer: words of a text, and some more of them", "the end"]
_TOLERANCE = 1e-5  # between the folder's rows and the whole model's, for rows of length 1


def export_folder(
    model: Any,
    path: str | os.PathLike[str],
    *,
    layer: int | None = None,
    dim: int | None = None,
    allow_untrained: bool = False,
) -> Space:
    """Write a text model that ends after a layer and at a prefix, checked to give the same rows.

    The folder holds modules of sentence-transformers alone (the transformer with ``layer`` layers,
    its pooling, and for ``dim`` a ``Dense`` that keeps the first numbers and a ``Normalize``), so
    it loads without nestvec and without remote code. Its vectors live in the Space of the whole
    model's at that layer and prefix: `TextEncoder` reads so from ``shared_space.json`` there, as
    long as the weights are these.

    Parameters
    ----------
    model
        A `TextEncoder`, or what `encode` makes one of (a folder, a hub id).
    path
        A folder that does not exist, is empty, or is an earlier export, which is replaced.
    layer
        Counted from 1; None keeps all.
    dim
        Cut to this prefix, then L2-normalise.
    allow_untrained
        Accept a prefix that is not a nesting dim.

    Returns
    -------
    Space
        Of the folder's vectors: the model's, at this layer and prefix.

    Raises
    ------
    DataError, DimensionError
        If the model has no such layer or prefix.
    ModelError
        If it is no text model, its layers are not known, or the folder's rows are not its own.
    StorageError
        If ``path`` holds anything that no export wrote.
    """
    from nestvec.encoders import encoder_of

    path = Path(path)
    make_way(path, files_of_export(path))
    encoder = encoder_of(model)
    if not isinstance(encoder, TextEncoder):
        raise ModelError(
            f"a {type(encoder).__name__} cannot be exported to a folder: text models can, and "
            f"image models to a name that ends in .onnx."
        )
    want = _rows(encoder, layer)
    if dim is not None:
        want = want.prefix(dim, allow_untrained=allow_untrained)
    shorter = _chain(encoder, layer, want.space)
    with written_beside(path, ours=files_of_export(path)) as scratch:
        scratch.mkdir()
        with quiet():
            shorter.save_pretrained(str(scratch), create_model_card=False)
        _say_sizes(scratch / "config.json", want.space)
        (scratch / "README.md").write_text(_card(path, want.space, layer), encoding="utf-8")
        made = TextEncoder(scratch, device=str(encoder.model.device))
        names = [place.name for place in scratch.iterdir()]
        stand_for(scratch, fingerprint(made.model), want.space, names)
        _compare(made, want)
    return want.space


def _rows(encoder: TextEncoder, layer: int | None) -> Embeddings:
    if layer is None:
        return encoder.encode(_TEXTS, show_progress=False)
    return encoder.encode_layers(_TEXTS, layers=[layer], show_progress=False)[layer]


def _chain(encoder: TextEncoder, layer: int | None, space: Space) -> Any:
    """Return the model's modules, cut."""
    from nestvec.encoders.layers import Layers

    st = require("sentence_transformers", extra="text", why="exporting a text model")
    modules = st.sentence_transformer.modules
    torch = require("torch", extra="text", why="exporting a text model")
    model = encoder.model if layer is None else Layers(encoder.model).cut(layer)
    chain = list(model)
    full = encoder.space.size
    if space.size < full:
        cut = modules.Dense(full, space.size, bias=False, activation_function=torch.nn.Identity())
        with torch.no_grad():
            cut.linear.weight.copy_(torch.eye(space.size, full))
        chain.append(cut)
    if space.has_unit_rows and type(chain[-1]).__name__ != "Normalize":
        chain.append(modules.Normalize())
    return st.SentenceTransformer(
        modules=chain,
        device=str(model.device),
        prompts={**model.prompts, **encoder.prompts},
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name=model.similarity_fn_name,
    )


def _say_sizes(path: Path, space: Space) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_matryoshka", "matryoshka_dimensions"):
        config.pop(key, None)
    if space.nesting_dims:
        config |= {"is_matryoshka": True, "matryoshka_dimensions": list(space.nesting_dims)}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _card(path: Path, space: Space, layer: int | None) -> str:
    ends = "with all its layers" if layer is None else f"cut after layer {layer}"
    return f"""---
library_name: sentence-transformers
tags: [sentence-transformers, nestvec, matryoshka, embeddings]
---
# {path.resolve().name}

{space.model or "A text model"} {ends}, vectors of {space.size} numbers
{"of length 1" if space.has_unit_rows else ""}: those of the whole model at that layer and prefix.

```python
from sentence_transformers import SentenceTransformer

vectors = SentenceTransformer("{path.resolve().name}").encode(texts)
```

Made by `nestvec export`. For nestvec the vectors live in the space {space.space_id}.
"""


def _compare(made: TextEncoder, want: Embeddings) -> None:
    """Raise `ModelError` unless the folder gives the whole model's rows."""
    got = made.encode(_TEXTS, show_progress=False).array
    off = float(np.abs(got - want.array).max() / max(1.0, float(np.abs(want.array).max())))
    if not off <= _TOLERANCE:
        raise ModelError(
            f"the exported folder's rows are off by {off:.1e} from those of {want.space.label}, so "
            f"it was not written. Something in the model does not survive being saved."
        )
