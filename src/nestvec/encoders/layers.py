"""The layers of a sentence-transformers model: read them all in one pass, or cut it after one.

Layers are counted 1 to N as people count them: 1 is the first transformer layer, N the last. What
stands before the first layer (``hidden_states[0]`` of transformers) is no layer and never read.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nestvec._extras import require
from nestvec.errors import DataError, ModelError

require("torch", extra="text", why="the layers of a text model")

import torch  # noqa: E402  # a missing torch is said first
from torch import Tensor, nn  # noqa: E402  # likewise

#: Where a transformer keeps its layers, and the norm that it puts behind the last of them.
_STACKS = (
    ("encoder.layer", None),  # BERT, RoBERTa, XLM-RoBERTa, MPNet, ELECTRA, ...
    ("transformer.layer", None),  # DistilBERT
    ("layers", "final_norm"),  # ModernBERT
    ("layers", "norm"),  # Qwen, Llama, Mistral, Gemma
    ("encoder.block", "encoder.final_layer_norm"),  # T5's encoder
)
_PROBE = ["one text", "another text, and longer"]
_TOLERANCE = 1e-3  # relative, between a state that is read and the last of a model cut there


def parse_layers(layers: Iterable[int] | str, n: int) -> tuple[int, ...]:
    """Return layer numbers rising and unique; ``"all"`` and ``"2,4,6"`` are read too.

    >>> parse_layers("4, 2", 6)
    (2, 4)
    """
    if isinstance(layers, str) and layers.strip() == "all":
        return tuple(range(1, n + 1))
    try:
        given: list[Any] = (
            layers.replace(",", " ").split() if isinstance(layers, str) else list(layers)
        )
        found = sorted({int(layer) for layer in given})
        whole = all(int(layer) == float(layer) for layer in given)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"layers {layers!r} are not whole numbers. Write them like 2,4,6, or all."
        ) from error
    if not found or not whole or found[0] < 1 or found[-1] > n:
        raise DataError(
            f"layers {layers!r} do not fit a model of {n} layers: whole numbers from 1, the first "
            f"transformer layer, to {n}, the last (what goes into the first is no layer)."
        )
    return tuple(found)


class Layers:
    """The transformer layers of a ``SentenceTransformer``, which is looked at and left as it is.

    Attributes
    ----------
    n : int
        How many there are.

    Raises
    ------
    ModelError
        If the model keeps its layers in a way that is not known here, or does more between them
        and its output than a norm: this is tried with two short texts, not assumed.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.transformer = getattr(model[0], "auto_model", None)
        place, self._norm = _stack_of(self.transformer)
        self._holder, self._name = place
        self.n = len(self._stack)
        if getattr(model[0], "module_output_name", "token_embeddings") != "token_embeddings":
            raise ModelError(
                "the model's transformer returns whole vectors and not its tokens', so an earlier "
                "layer has nothing to pool."
            )
        self._try()

    @property
    def _stack(self) -> nn.ModuleList:
        return getattr(self._holder, self._name)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Within, the model hands every layer's states to `rows`, which costs their memory."""
        assert self.transformer is not None
        config = self.transformer.config
        before = config.output_hidden_states
        config.output_hidden_states = True
        try:
            yield
        finally:
            config.output_hidden_states = before

    def rows(self, features: Mapping[str, Any], layers: Iterable[int]) -> Tensor:
        """Return (n, n_layers, dim), as if the model ended after each of ``layers``.

        ``features`` are what the model (or its first module) returned within `kept`. A layer 0 is
        taken for what goes into the first layer; `parse_layers` lets none through.
        """
        states = self._states(features)
        beside = {
            name: value
            for name, value in features.items()
            if name not in ("all_layer_embeddings", "sentence_embedding", "token_embeddings")
        }
        found = []
        for layer in layers:
            state = states[layer]
            if self._norm is not None and 0 < layer < self.n:  # the last has passed it
                state = self._norm(state)
            one = {**beside, "token_embeddings": state}
            for module in list(self.model)[1:]:
                one = module(one)
            found.append(one["sentence_embedding"])
        return torch.stack(found, dim=1)

    def cut(self, layer: int) -> Any:
        """Return a model that ends after a layer and shares its weights with this one.

        The layers above are not in it, and its config says how many are left, so what is saved of
        it is a smaller model. Raises `DataError` if there is no such layer.
        """
        (layer,) = parse_layers([layer], self.n)
        weights = {id(one): one for one in (*self.model.parameters(), *self.model.buffers())}
        with self._shortened(layer):  # so that no copy is made of the layers above
            shorter = copy.deepcopy(self.model, weights)
        config = shorter[0].auto_model.config
        if (kinds := getattr(config, "layer_types", None)) is not None:
            config.layer_types = list(kinds)[:layer]
        if (trained := getattr(config, "matryoshka_layers", None)) is not None:
            config.matryoshka_layers = [one for one in trained if one <= layer]
        config.num_hidden_layers = layer
        return shorter

    @contextlib.contextmanager
    def _shortened(self, layer: int) -> Iterator[None]:
        whole = self._stack
        setattr(self._holder, self._name, whole[:layer])
        try:
            yield
        finally:
            setattr(self._holder, self._name, whole)

    def _states(self, features: Mapping[str, Any]) -> tuple[Tensor, ...]:
        states = features.get("all_layer_embeddings") or ()
        if len(states) != self.n + 1:
            raise ModelError(
                f"a {type(self.transformer).__name__} of {self.n} layers returned {len(states)} "
                f"hidden states where {self.n + 1} were expected, so its layers cannot be told."
            )
        return states

    def _try(self) -> None:
        from nestvec.encoders.image_network import evaluating

        layer = max(1, self.n - 1)
        with evaluating(self.model), self.kept():
            features = {
                name: value.to(self.model.device) if isinstance(value, Tensor) else value
                for name, value in self.model.preprocess(_PROBE).items()
            }
            read = self.rows(self.model[0](dict(features)), [layer])[:, 0].float()
            with self._shortened(layer):
                # module by module, as above: a trainer may have wrapped the model's own forward
                out = dict(features)
                for module in self.model:
                    out = module(out)
            cut = out["sentence_embedding"].float()
        off = float((read - cut).abs().max() / cut.abs().max().clamp(min=1e-9))
        if not off <= _TOLERANCE:
            raise ModelError(
                f"layer {layer} of this {type(self.transformer).__name__} is off by {off:.1e} from "
                f"the model cut there: it does more behind its last layer than is known here."
            )


class EveryLayer(nn.Module):
    """The last module of a model whose vector is those of ``layers``, one behind the other."""

    def __init__(self, layers: Layers, chosen: Iterable[int]) -> None:
        super().__init__()
        self.chosen = tuple(chosen)
        self._layers = layers  # no module: the model it reads is not its child

    def forward(self, features: Mapping[str, Any]) -> dict[str, Any]:
        rows = self._layers.rows(features, self.chosen)
        return {"sentence_embedding": rows.flatten(1)}


def reading(layers: Layers, chosen: Iterable[int]) -> Any:
    """Return a SentenceTransformer of the same modules with `EveryLayer` behind; use in `kept`.

    Its ``encode`` gives (n, n_layers * dim) in one forward pass.
    """
    from sentence_transformers import SentenceTransformer

    model = layers.model
    return SentenceTransformer(
        modules=[*model, EveryLayer(layers, chosen)],
        device=str(model.device),
        prompts=dict(model.prompts),
        default_prompt_name=model.default_prompt_name,
    )


def _stack_of(transformer: Any) -> tuple[tuple[Any, str], Any]:
    """Return the module that holds the layers, its attribute's name, and the norm behind them."""
    for layers, norm in _STACKS:
        holder, _, name = layers.rpartition(".")
        home = _at(transformer, holder)
        behind = None if norm is None else _at(transformer, norm)
        found = isinstance(getattr(home, name, None), nn.ModuleList)
        if found and (norm is None or behind is not None):
            return (home, name), behind
    kind = "model without a transformer" if transformer is None else type(transformer).__name__
    known = ", ".join(f"`{layers}`" for layers, _ in _STACKS)
    raise ModelError(
        f"a {kind} keeps no layers where they are looked for ({known}), so it cannot be cut in "
        f"depth. Models built like BERT, RoBERTa, MPNet, DistilBERT, ModernBERT, T5, Qwen or Llama "
        f"can."
    )


def _at(module: Any, path: str) -> Any:
    for name in filter(None, path.split(".")):
        module = getattr(module, name, None)
    return module
