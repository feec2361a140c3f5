"""Rank-nested LoRA: one training, any rank after it (DyLoRA), in the LoRA layers of peft.

::

    W x + alpha / b * B[:, :b] A[:b] x        b drawn anew each step, from 1 to the rank

What is drawn, and what a rank means, is here; files are in `nestvec.train.lora_files`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestvec._extras import require
from nestvec.encoders._quiet import quiet
from nestvec.encoders.image_network import evaluating
from nestvec.errors import DataError, DimensionError, ModelError
from nestvec.train.validation import Validate

require("peft", extra="train", why="LoRA")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402  # behind the check above
from peft.tuners import lora as peft_lora  # noqa: E402  # likewise
from peft.tuners.lora.layer import LoraVariant  # noqa: E402  # likewise
from transformers import TrainerCallback  # noqa: E402  # likewise

ADAPTER = "default"  # peft's own name for the one adapter that a model has


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Settings of a low-rank adaptation: what `train_text` and `train_image` take as ``lora=``.

    Parameters
    ----------
    rank
        The largest rank. With ``nested`` every rank from 1 to it can be cut off after training.
    alpha
        Strength: what a rank b adds is multiplied by ``alpha / b``. None takes ``rank``.
    targets
        Ends of the names of the layers that are adapted, like ``("query", "value")``. None takes
        every linear layer (of image networks every plain convolution too) that the vectors depend
        on.
    nested
        Draw the rank of each step. False trains a plain LoRA, which has this one rank.
    frozen
        Let a step of rank b train the b-th row and column alone: the ranks below it stay good.
    dropout
        Share of the layers' input that is left out in training.
    """

    rank: int = 16
    alpha: int | None = None
    targets: Sequence[str] | None = None
    nested: bool = True
    frozen: bool = False
    dropout: float | int = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1 or (self.alpha is not None and self.alpha < 1):
            raise DataError(f"rank {self.rank} and alpha {self.alpha} must be 1 or more.")
        if isinstance(self.targets, str) or (self.targets is not None and not self.targets):
            raise DataError(f"targets {self.targets!r}: give names of layers, like ('query',).")
        if self.frozen and not self.nested:
            raise DataError("frozen is for nested ranks: a plain LoRA has none that could stay.")
        if not 0 <= self.dropout < 1:
            raise DataError(f"dropout {self.dropout!r} is not a share: 0 to below 1.")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, alpha as it will be."""
        return asdict(self) | {"alpha": self.alpha or self.rank}


class NestedRanks(nn.Module):
    """Which rank the LoRA layers of a model use: in training the one that was drawn, else ``rank``.

    ::

        model = peft.get_peft_model(network, peft.LoraConfig(r=16, lora_alpha=16, ...))
        ranks = NestedRanks(model)
        trainer.add_callback(DrawRanks(ranks))       # or ranks.draw() before each step
        ...
        save_lora("my-lora", model)

    Parameters
    ----------
    model
        With LoRA layers of peft, all of one rank: linear layers and convolutions. From now on they
        are nested.
    frozen
        As in `Lora`.
    seed
        Of the draws. The generator's state is part of a checkpoint of nestvec's trainers.

    Raises
    ------
    ModelError
        If the model has no LoRA layers, or some that cannot be nested.

    Notes
    -----
    As in the authors' code the rows above the drawn rank get no gradient, and the optimizer sees
    them all the same: with momentum or weight decay they still move a little.

    References
    ----------
    Valipour et al., DyLoRA, EACL 2023, arXiv:2210.07558; scale ``alpha / b`` as in its code.
    """

    generator: torch.Generator

    def __init__(self, model: nn.Module, *, frozen: bool = False, seed: int = 0) -> None:
        super().__init__()
        layers = lora_layers(model)
        self.largest = layers[0].r[ADAPTER]
        self.frozen = frozen
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn = self._rank = self.largest
        for layer in layers:
            layer.lora_variant[ADAPTER] = _Nested(self)

    def extra_repr(self) -> str:
        return f"largest={self.largest}, frozen={self.frozen}"

    @property
    def rank(self) -> int:
        """The rank that is used outside of training; set it to look at another."""
        return self._rank

    @rank.setter
    def rank(self, rank: int) -> None:
        self._rank = checked_rank(rank, self.largest)

    def draw(self) -> int:
        """Draw the rank of the next step, uniform from 1 to the largest."""
        self.drawn = int(torch.randint(self.largest, (), generator=self.generator)) + 1
        return self.drawn


class DrawRanks(TrainerCallback):
    """Draw a rank before every step of a Trainer of transformers (or sentence-transformers)."""

    def __init__(self, ranks: NestedRanks) -> None:
        self.ranks = ranks

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ranks.draw()


class _Nested(LoraVariant):
    """What peft calls in place of its own ``lora_B(lora_A(x)) * scaling``."""

    def __init__(self, ranks: NestedRanks) -> None:
        self.ranks = ranks

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # peft's is static
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        b = self.ranks.drawn if module.training else self.ranks.rank
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        a, b_columns = down.weight[:b], up.weight[:, :b]
        if self.ranks.frozen and module.training:
            a = torch.cat([a[:-1].detach(), a[-1:]])
            b_columns = torch.cat([b_columns[:, :-1].detach(), b_columns[:, -1:]], dim=1)
        x = module.lora_dropout[active_adapter](x)
        if isinstance(down, nn.Linear):
            added = F.linear(F.linear(x, a), b_columns)
        else:
            added = F.conv2d(F.conv2d(x, a, None, down.stride, down.padding), b_columns)
        return result + added * (module.lora_alpha[active_adapter] / b)


def lora_layers(model: nn.Module) -> list[Any]:
    """Return the LoRA layers of a model that can be nested, or say which cannot."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, peft_lora.LoraLayer) and ADAPTER in module.r
    ]
    if not found:
        raise ModelError(f"the model has no LoRA layers of an adapter {ADAPTER!r}.")
    rank, alpha = (getattr(found[0][1], what)[ADAPTER] for what in ("r", "lora_alpha"))
    for name, layer in found:
        why = ""
        if not isinstance(layer, (peft_lora.Linear, peft_lora.Conv2d)):
            why = f"is a {type(layer).__name__}, neither linear nor a convolution over images"
        elif getattr(layer.get_base_layer(), "groups", 1) > 1:
            why = "is a convolution in groups"
        elif layer.r[ADAPTER] != rank or layer.lora_alpha[ADAPTER] != alpha:
            why = f"has a rank or alpha of its own, not rank {rank} and alpha {alpha}"
        elif layer.use_rslora[ADAPTER] or layer.lora_bias[ADAPTER] or ADAPTER in layer.lora_variant:
            why = "is a variant (rsLoRA, DoRA, with bias, or nested already)"
        if why:
            raise ModelError(f"LoRA layer {name} {why}: it cannot be nested. Target others.")
    return [layer for _, layer in found]


def is_nested(model: nn.Module) -> bool:
    """Return whether the LoRA layers of a model are nested."""
    variants = (getattr(module, "lora_variant", {}).get(ADAPTER) for module in model.modules())
    return any(isinstance(variant, _Nested) for variant in variants)


@dataclass(frozen=True)
class Attached:
    """LoRA layers in a network: peft's view of it, and the ranks if they are nested."""

    lora: Lora
    tuned: PeftModel
    ranks: NestedRanks | None
    undo: contextlib.ExitStack

    def join(self, trainer: Any) -> None:
        """Let a trainer of nestvec draw the ranks, and take the draws up again when it resumes."""
        if self.ranks is not None:
            trainer.beside = (*trainer.beside, self.ranks)
            trainer.add_callback(DrawRanks(self.ranks))

    def by_rank(self, validate: Validate) -> dict[int, dict[str, float]]:
        """Return what a validation finds at the largest rank, half of it, and so on down to 1."""
        found: dict[int, dict[str, float]] = {}
        if self.ranks is not None:
            with evaluating(self.tuned):
                rank = self.ranks.largest
                while rank:
                    self.ranks.rank = rank
                    found[rank] = validate()
                    rank //= 2
            self.ranks.rank = self.ranks.largest
        return found

    def remove(self) -> None:
        """Give the network its own layers back."""
        self.undo.close()


def attach(network: nn.Module, lora: Lora, *, seed: int, base: str) -> Attached:
    """Put LoRA layers into a network, in place, and freeze all else.

    What is frozen in it already gets no LoRA. Batch norms are held, too: the means that they would
    gather are no part of an adapter. ``base`` is what the adapter's config names as the model that
    it adapts.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or lora.rank,
        lora_dropout=float(lora.dropout),
        target_modules=_targets(network, lora.targets),
    )
    with quiet():
        tuned = get_peft_model(network, config)  # pyright: ignore[reportArgumentType]  # any module
    assert isinstance(tuned, PeftModel)
    tuned.peft_config[ADAPTER].base_model_name_or_path = base  # peft has put a name of its own
    ranks = NestedRanks(tuned, frozen=lora.frozen, seed=seed) if lora.nested else None
    undo = contextlib.ExitStack()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            held = module.register_forward_pre_hook(_evaluate)
            undo.callback(held.remove)
    undo.callback(lambda: [parameter.requires_grad_(True) for parameter in trained])
    undo.callback(tuned.unload)
    return Attached(lora, tuned, ranks, undo)


def _evaluate(norm: nn.Module, _: Any) -> None:
    norm.eval()  # at each call: trainers put all modules into training mode again and again


def reference(model: Any, name: str) -> str:
    """Return where `load_lora` will find a model again: a folder or its name; "" if in memory."""
    if not isinstance(model, (str, os.PathLike)):
        return ""
    return str(Path(model).resolve()) if Path(model).is_dir() else name


def _targets(network: nn.Module, ends: Sequence[str] | None) -> list[str]:
    """Return the full names of the layers to adapt: those that are trained, and can be."""
    trained = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.requires_grad
    ]
    if ends is None:
        found = [name for name, module in trained if not _special(module)]
        if not found:
            raise ModelError("no linear layer or plain convolution is left that LoRA could adapt.")
        return found
    for end in ends:
        if not any(_ends(name, end) for name, _ in trained):
            known = sorted({name.rpartition(".")[2] for name, _ in trained})
            raise ModelError(
                f"LoRA target {end!r} is no trained linear layer or convolution of this model; "
                f"its layers end in {', '.join(known)}."
            )
    chosen = [(n, m) for n, m in trained if any(_ends(n, end) for end in ends)]
    for name, module in chosen:
        if _special(module):
            raise ModelError(f"LoRA cannot adapt {name}: a convolution in groups or dilated.")
    return [name for name, _ in chosen]


def _ends(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _special(module: nn.Module) -> bool:
    """Whether it is a convolution for which peft's low-rank pair is another operation."""
    if not isinstance(module, nn.Conv2d):
        return False
    return module.groups > 1 or module.dilation != (1, 1) or module.padding_mode != "zeros"


def checked_rank(rank: int, largest: int) -> int:
    """Return a rank that was trained, or raise `DimensionError`."""
    if not 1 <= rank <= largest:
        raise DimensionError(
            f"rank {rank} was not trained: this LoRA is nested from 1 to {largest}. Choose one of "
            f"these, or train a larger one."
        )
    return rank
