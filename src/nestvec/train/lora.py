"""Rank-nested LoRA: one training, any rank after it (DyLoRA), in the LoRA layers of peft.

::

    W x + alpha / b * B[:, :b] A[:b] x        b drawn anew each step

What is drawn, and what a rank means, is here; files are in `nestvec.train.lora_files`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
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
        The largest rank. With ``nested`` every rank from 1 to it can be cut off after training. Of
        several ranks, like ``(1, 2, 4, 8, 16)``, these alone are drawn, each more often, and can be
        cut off.
    alpha
        Strength: what a rank b adds is multiplied by ``alpha / b``. None takes the largest rank.
    targets
        Ends of the names of the layers that are adapted, like ``("query", "value")``. None takes
        every linear layer (of image networks every plain convolution too) that the vectors depend
        on.
    nested
        Draw the rank of each step. False trains a plain LoRA, which has this one rank.
    frozen
        Let a step of rank b train only the rows and columns that the next smaller rank lacks: the
        ranks below it stay good.
    dropout
        Share of the layers' input that is left out in training.
    """

    rank: int | Sequence[int] = 16
    alpha: int | None = None
    targets: Sequence[str] | None = None
    nested: bool = True
    frozen: bool = False
    dropout: float | int = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.rank, Sequence):
            if not all(isinstance(rank, Integral) for rank in self.rank):
                raise DataError(f"rank {self.rank!r}: give whole numbers, like (1, 2, 4, 8, 16).")
            object.__setattr__(self, "rank", tuple(sorted({int(rank) for rank in self.rank})))
            if not self.rank:
                raise DataError("rank (): give the largest rank, or ranks, like (1, 2, 4, 8, 16).")
            if not self.nested:
                raise DataError(f"ranks {self.rank}: a plain LoRA has one. Give its rank alone.")
        if min(self.ranks, default=0) < 1 or (self.alpha is not None and self.alpha < 1):
            raise DataError(f"rank {self.rank} and alpha {self.alpha} must be 1 or more.")
        if isinstance(self.targets, str) or (self.targets is not None and not self.targets):
            raise DataError(f"targets {self.targets!r}: give names of layers, like ('query',).")
        if self.frozen and not self.nested:
            raise DataError("frozen is for nested ranks: a plain LoRA has none that could stay.")
        if not 0 <= self.dropout < 1:
            raise DataError(f"dropout {self.dropout!r} is not a share: 0 to below 1.")

    @property
    def ranks(self) -> tuple[int, ...]:
        """What can be had after training, ascending."""
        if isinstance(self.rank, Sequence):
            return tuple(self.rank)
        return tuple(range(1, self.rank + 1)) if self.nested else (self.rank,)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings, alpha as it will be."""
        rank = list(self.rank) if isinstance(self.rank, Sequence) else self.rank
        return asdict(self) | {"rank": rank, "alpha": self.alpha or max(self.ranks)}


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
    ranks
        That are drawn. None takes every one from 1 to the layers' own.
    frozen
        As in `Lora`.
    seed
        Of the draws. The generator's state is part of a checkpoint of nestvec's trainers.

    Raises
    ------
    ModelError
        If the model has no LoRA layers, or some that cannot be nested.
    DimensionError
        If the layers' rank is not the largest of ``ranks``.

    Notes
    -----
    As in the authors' code the rows above the drawn rank get no gradient, and the optimizer sees
    them all the same: with momentum or weight decay they still move a little.

    References
    ----------
    Valipour et al., DyLoRA, EACL 2023, arXiv:2210.07558; scale ``alpha / b`` as in its code.
    """

    generator: torch.Generator

    def __init__(
        self,
        model: nn.Module,
        *,
        ranks: Sequence[int] | None = None,
        frozen: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        layers = lora_layers(model)
        self.largest = layers[0].r[ADAPTER]
        self.ranks = tuple(range(1, self.largest + 1)) if ranks is None else tuple(sorted({*ranks}))
        if not self.ranks or self.ranks[0] < 1 or self.ranks[-1] != self.largest:
            raise DimensionError(
                f"ranks {self.ranks} do not fit LoRA layers of rank {self.largest}: give some from "
                f"1 to {self.largest}, and {self.largest} itself."
            )
        self.frozen = frozen
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn = self._rank = self.largest
        for layer in layers:
            layer.lora_variant[ADAPTER] = _Nested(self)

    def extra_repr(self) -> str:
        return f"{said(self.ranks)}, frozen={self.frozen}"

    @property
    def rank(self) -> int:
        """The rank that is used outside of training; set it to look at another."""
        return self._rank

    @rank.setter
    def rank(self, rank: int) -> None:
        self._rank = checked_rank(rank, self.ranks)

    def draw(self) -> int:
        """Draw the rank of the next step, uniform over ``ranks``."""
        at = int(torch.randint(len(self.ranks), (), generator=self.generator))
        self.drawn = self.ranks[at]
        return self.drawn

    def below(self, rank: int) -> int:
        """Return the next smaller of ``ranks``, or 0."""
        return max((one for one in self.ranks if one < rank), default=0)


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
            kept = self.ranks.below(b)
            a = torch.cat([a[:kept].detach(), a[kept:]])
            b_columns = torch.cat([b_columns[:, :kept].detach(), b_columns[:, kept:]], dim=1)
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


def nested_ranks(model: nn.Module) -> tuple[int, ...]:
    """Return the ranks that the LoRA layers of a model are nested at; () if they are plain."""
    for module in model.modules():
        variant = getattr(module, "lora_variant", {}).get(ADAPTER)
        if isinstance(variant, _Nested):
            return variant.ranks.ranks
    return ()


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
        """Return what a validation finds at the ranks that were named, or at halves down to 1."""
        found: dict[int, dict[str, float]] = {}
        if self.ranks is not None:
            named = self.lora.rank
            if not isinstance(named, Sequence):
                named = [named >> n for n in range(named.bit_length())]
            with evaluating(self.tuned):
                for rank in named:
                    self.ranks.rank = rank
                    found[rank] = validate()
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
        r=max(lora.ranks),
        lora_alpha=lora.alpha or max(lora.ranks),
        lora_dropout=float(lora.dropout),
        target_modules=_targets(network, lora.targets),
    )
    with quiet():
        tuned = get_peft_model(network, config)  # pyright: ignore[reportArgumentType]  # any module
    assert isinstance(tuned, PeftModel)
    tuned.peft_config[ADAPTER].base_model_name_or_path = base  # peft has put a name of its own
    ranks = None
    if lora.nested:
        ranks = NestedRanks(tuned, ranks=lora.ranks, frozen=lora.frozen, seed=seed)
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


def checked_rank(rank: int, ranks: Sequence[int]) -> int:
    """Return a rank that was trained, or raise `DimensionError`."""
    if rank not in ranks:
        raise DimensionError(
            f"rank {rank} was not trained: this LoRA is nested at {said(ranks)}. Choose one of "
            f"these, or train a LoRA with it."
        )
    return rank


def said(ranks: Sequence[int]) -> str:
    """Return ranks in words.

    >>> said((1, 2, 3, 4)), said((1, 2, 4)), said((4,))
    ('any rank from 1 to 4', 'ranks 1, 2, 4', 'rank 4')
    """
    if len(ranks) > 1 and tuple(ranks) == tuple(range(1, ranks[-1] + 1)):
        return f"any rank from 1 to {ranks[-1]}"
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
