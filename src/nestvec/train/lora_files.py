"""LoRA on disk: peft's two files, a note inside the weights that says whether ranks are nested.

::

    FOLDER/adapter_config.json          as peft writes it; a cut changes r alone
    FOLDER/adapter_model.safetensors    its metadata["nestvec"]: nested, ranks, base, dims
    FOLDER/preprocessor_config.json     of image networks
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nestvec._atomic import written_beside
from nestvec.encoders import ImageEncoder, TextEncoder
from nestvec.encoders._quiet import quiet
from nestvec.encoders.fingerprint import fingerprint, image_fingerprint
from nestvec.encoders.image import is_image_model
from nestvec.encoders.image_network import (
    ImageNetwork,
    Preprocessing,
    load_image_model,
    save_image_model,
)
from nestvec.errors import FileFormatError, ModelError, StorageError
from nestvec.train.card import declare_dims
from nestvec.train.lora import ADAPTER, Attached, checked_rank, nested_ranks, said
from nestvec.train.validation import Validate

# the line above has said what to type where peft is missing
from peft import LoraConfig, PeftModel, get_peft_model_state_dict  # isort: skip

CONFIG, WEIGHTS, PIXELS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "preprocessor_config.json",
)
_OURS = (CONFIG, WEIGHTS, PIXELS)


def save_lora(
    folder: str | os.PathLike[str],
    model: nn.Module,
    *,
    base: str = "",
    dims: tuple[int, ...] = (),
) -> None:
    """Write the LoRA of a peft model as peft reads it, and whether its ranks are nested.

    Parameters
    ----------
    folder
        Gets ``adapter_config.json`` and ``adapter_model.safetensors``.
    model
        What ``peft.get_peft_model`` returned, with `NestedRanks` or without.
    base
        Fingerprint of the model that was adapted: `load_lora` refuses others. "" is any.
    dims
        Sizes of the vectors that were trained.
    """
    if not isinstance(model, PeftModel):
        raise ModelError(f"a {type(model).__name__} is no PeftModel: give what peft returned.")
    config = copy.deepcopy(model.peft_config[ADAPTER])
    assert isinstance(config, LoraConfig)
    config.inference_mode = True
    with quiet():
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    ranks = nested_ranks(model)
    about = {"nested": bool(ranks), "ranks": list(ranks), "base": base, "dims": list(dims)}
    Path(folder).mkdir(parents=True, exist_ok=True)
    _write(Path(folder), config, tensors, about)


def save_adapter(
    folder: Path, adapter: Attached, validate: Validate | None, *, base: str, dims: tuple[int, ...]
) -> str:
    """Write what was trained; return how to use it, and what each rank is worth, for its card."""
    save_lora(folder, adapter.tuned, base=base, dims=dims)
    ranks = adapter.lora.ranks
    smaller = max((one for one in ranks if one <= ranks[-1] // 4), default=ranks[0])
    some = f", rank={smaller}" if len(ranks) > 1 else ""
    return f"""A LoRA of the base model: {said(ranks)}.

```python
from nestvec.train import load_lora

encoder = load_lora("{folder.resolve().name}"{some})   # merged into the base model
vectors = encoder.encode(items)
```
{"" if validate is None else _rank_table(adapter.by_rank(validate))}"""


def _rank_table(by_rank: Mapping[int, Mapping[str, float]]) -> str:
    """Return a Markdown table, a row a rank, the smallest first.

    >>> print(_rank_table({2: {"top1@8": 0.5}, 1: {"top1@8": 0.25}}))
    | rank | top1@8 |
    | --- | --- |
    | 1 | 0.250 |
    | 2 | 0.500 |
    """
    if not by_rank:
        return ""
    names = list(by_rank[max(by_rank)])
    rows = [
        [str(rank), *(f"{by_rank[rank][name]:.3f}" for name in names)] for rank in sorted(by_rank)
    ]
    lines = [["rank", *names], ["---"] * (len(names) + 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cut_lora(folder: str | os.PathLike[str], output: str | os.PathLike[str], *, rank: int) -> None:
    """Cut a rank-nested LoRA to a rank: an ordinary LoRA, for all that reads files of peft.

    Parameters
    ----------
    folder
        As `train_text` or `train_image` with ``lora=``, or `save_lora`, left it.
    output
        Folder of the cut LoRA; one that stands there is replaced. It is nested up to ``rank``.
    rank
        Any that was trained.

    Raises
    ------
    ModelError
        If ``folder`` holds no LoRA, or one that is not rank-nested, which would be silently wrong.
    DimensionError
        If the rank was not trained.
    FileFormatError, StorageError
        If its files are damaged, or ``output`` cannot be written.
    """
    folder = Path(folder)
    config, tensors, about = _read(folder, rank)
    with written_beside(output, ours=_OURS) as scratch:
        scratch.mkdir()
        _write(scratch, config, tensors, about)
        if (folder / PIXELS).is_file():
            shutil.copyfile(folder / PIXELS, scratch / PIXELS)


def load_lora(
    folder: str | os.PathLike[str], *, rank: int | None = None, base: Any = None, **settings: Any
) -> TextEncoder | ImageEncoder:
    """Return the encoder of a LoRA at a rank, merged into the model that it adapts.

    Merged, a rank costs nothing, and each rank has a fingerprint of its own: vectors of two ranks
    are of two spaces.

    Parameters
    ----------
    folder
        As `train_text` or `train_image` with ``lora=``, `cut_lora`, `save_lora` or peft left it.
    rank
        Of a rank-nested LoRA any rank that was trained; None takes the largest.
    base
        The model that was adapted: whatever `TextEncoder` or `ImageEncoder` takes; it is not
        changed. None takes what the LoRA names.
    **settings
        Of `TextEncoder` or `ImageEncoder`.

    Raises
    ------
    ModelError
        If ``folder`` holds no LoRA, one that is not rank-nested is to be cut, or it was trained on
        another model than ``base``.
    DimensionError
        If the rank was not trained.
    FileFormatError
        If its files are damaged.
    """
    folder = Path(folder)
    config, tensors, about = _read(folder, rank)
    base = config.base_model_name_or_path if base is None else base
    if not base:
        raise ModelError(f"{folder} does not name the model that it adapts: pass base=.")
    named = isinstance(base, (str, os.PathLike))
    pixels = (folder / PIXELS).is_file()
    if pixels or isinstance(base, ImageNetwork) or (named and is_image_model(base)):
        own = Preprocessing.load(folder) if pixels else None
        if named:
            network, own, _ = load_image_model(base, preprocessing=own)
        elif own is None:
            raise ModelError(f"{folder} has no {PIXELS}: name the folder of the image model.")
        else:
            network = copy.deepcopy(base)
        _check_base(folder, about, image_fingerprint(network, own))
        _merge(network.backbone, config, tensors)
        network.nesting_dims = tuple(about.get("dims", ()))
        return ImageEncoder(network.eval(), preprocessing=own, **settings)
    model = TextEncoder(base).model if named else copy.deepcopy(base)
    _check_base(folder, about, fingerprint(model))
    transformer: Any = model[0].auto_model
    _merge(transformer, config, tensors)
    if about.get("dims"):
        transformer.config.matryoshka_dimensions = about["dims"]
    return TextEncoder(model.eval(), **settings)


def save_merged(encoder: TextEncoder | ImageEncoder, output: str | os.PathLike[str]) -> None:
    """Write what `load_lora` returned as an ordinary model folder, which needs no peft."""
    if isinstance(encoder, ImageEncoder):
        network = encoder.network
        dims = network.nesting_dims or (network.dim,)
        save_image_model(output, network, encoder.preprocessing, dims)
        return
    with written_beside(output) as scratch, quiet():
        encoder.model.save_pretrained(str(scratch), create_model_card=False)
        if encoder.space.nesting_dims:
            declare_dims(scratch, encoder.space.nesting_dims)


def _merge(network: nn.Module, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
    """Add the LoRA to the network's weights, in place, by peft, which reads our files."""
    with tempfile.TemporaryDirectory() as scratch, quiet():
        _write(Path(scratch), config, tensors, {})
        tuned: Any = PeftModel.from_pretrained(network, scratch)  # pyright: ignore[reportArgumentType]  # any module
        tuned.merge_and_unload(safe_merge=True)


def _check_base(folder: Path, about: Mapping[str, Any], found: str) -> None:
    if about.get("base") and about["base"] != found:
        raise ModelError(
            f"{folder} was trained on a model with fingerprint {about['base'][:19]}, and the one "
            f"given has {found[:19]}: on it, its vectors would mean nothing. Pass base=, the model "
            f"that it was trained on."
        )


def _write(
    folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor], about: Mapping[str, Any]
) -> None:
    config.save_pretrained(str(folder))
    with written_beside(folder / WEIGHTS) as scratch:
        state = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(state, scratch, {"format": "pt", "nestvec": json.dumps(dict(about))})


def _read(folder: Path, rank: int | None) -> tuple[LoraConfig, dict[str, Tensor], dict[str, Any]]:
    """Return config, weights and our note of a LoRA, cut to a rank."""
    if not folder.is_dir() or not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} holds no LoRA: it has no {CONFIG}.")
    try:
        config = LoraConfig.from_pretrained(str(folder))
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("nestvec", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError as error:
        raise ModelError(f"{folder} holds no LoRA: it has no {WEIGHTS}.") from error
    except OSError as error:
        raise StorageError(f"cannot read {folder}: {error.strerror or error}.") from error
    except Exception as error:  # safetensors has an error class of its own, peft many
        raise FileFormatError(
            f"the LoRA in {folder} is damaged: {str(error).splitlines()[0]}."
        ) from error
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{folder} holds an adapter of kind {config.peft_type}, which is no LoRA.")
    if rank is None or rank == config.r:
        return config, tensors, about
    if not about.get("nested"):
        raise ModelError(
            f"{folder} holds a LoRA of rank {config.r} that is not rank-nested: cut to rank {rank} "
            f"it would be another model, and nothing would say so. Take its own rank, or train one "
            f"with nestvec train text --lora-rank {config.r}."
        )
    ranks = about.get("ranks") or range(1, config.r + 1)  # older files name none: all were drawn
    checked_rank(rank, ranks)
    if any(value.shape[_side(name)] != config.r for name, value in tensors.items()):
        raise FileFormatError(
            f"the LoRA in {folder} is damaged: its weights do not have the rank {config.r} of its "
            f"{CONFIG}."
        )
    config.r = rank
    about = {**about, "ranks": [one for one in ranks if one <= rank]}
    cut = {name: value.narrow(_side(name), 0, rank) for name, value in tensors.items()}
    return config, cut, about


def _side(name: str) -> int:
    """Which axis of a weight is the rank: (rank, in, ...) of A, (out, rank, ...) of B."""
    return 0 if ".lora_A." in name else 1
