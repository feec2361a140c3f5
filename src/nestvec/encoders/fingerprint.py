"""A model's fingerprint: a hash of what decides its vectors, wherever it was loaded from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

# Keys of a model's config that do not change its vectors: where it came from, how it is run. The
# number format of the weights is hashed with the weights.
_BESIDE = {
    "architectures",
    "dtype",
    "gradient_checkpointing",
    "is_matryoshka",
    "matryoshka_dimensions",
    "matryoshka_layers",
    "nestvec_head",  # its settings and weights are hashed by themselves
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def fingerprint(model: Any) -> str:
    """Return ``sha256:<64 hex digits>`` of a SentenceTransformer's content.

    Hashed are the weights (names, number formats, shapes, bytes), the chain of modules with their
    settings (pooling among them), the transformer's config, the tokenizer, and the length at which
    texts are cut. Not hashed: names, paths, revisions, the device, and whatever encoding changes
    (the tokenizer's truncation and padding state).
    """
    digest = hashlib.sha256()
    digest.update(_canonical(_modules(model)))
    digest.update(_canonical(_tokenizer(getattr(model, "tokenizer", None))))
    digest.update(_canonical(getattr(model, "max_seq_length", None)))
    _add_weights(digest, model.state_dict())
    return f"sha256:{digest.hexdigest()}"


def image_fingerprint(network: Any, preprocessing: Any) -> str:
    """Return ``sha256:<64 hex digits>`` of an image network and its preprocessing.

    Hashed are the weights, the backbone's config (of a module that has none, its class and how
    torch prints it), the head if there is one, and every setting of the preprocessing. Not hashed:
    names, paths, the device.
    """
    backbone = network.backbone
    config = getattr(backbone, "config", None)
    built = repr(backbone) if config is None else _architecture(config)
    digest = hashlib.sha256()
    digest.update(_canonical([type(backbone).__name__, built, asdict(preprocessing)]))
    _add_weights(digest, backbone.state_dict())
    if network.head is not None:
        digest.update(_canonical(repr(network.head)))
        _add_weights(digest, network.head.state_dict())
    return f"sha256:{digest.hexdigest()}"


def _add_weights(digest: Any, state: dict[str, Any]) -> None:
    import torch

    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(_canonical([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _modules(model: Any) -> list[Any]:
    chain = []
    for module in model:
        settings = module.get_config_dict() if hasattr(module, "get_config_dict") else {}
        config = getattr(getattr(module, "auto_model", None), "config", None)
        architecture = _architecture(config) if config is not None else {}
        lower = getattr(module, "do_lower_case", None)
        chain.append([type(module).__name__, settings, architecture, lower])
    return chain


def _architecture(config: Any) -> dict[str, Any]:
    settings = config.to_diff_dict()
    return {k: v for k, v in settings.items() if k not in _BESIDE and not k.startswith("_")}


def _tokenizer(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "to_str"):  # a tokenizers.Tokenizer
        rules = json.loads(backend.to_str())
        return {k: v for k, v in rules.items() if k not in ("truncation", "padding")}
    if hasattr(tokenizer, "get_vocab"):
        return [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map]
    return type(tokenizer).__name__


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode() + b"\n"
