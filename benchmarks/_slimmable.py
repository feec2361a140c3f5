"""The baseline "slimmable network": one set of weights that runs at several widths.

Yu et al., Slimmable Neural Networks, arXiv:1812.08928. At width ratio r = m/d every layer uses the
first channels of its input and output (plain slices, so a wide network's first channels see all
channels before them and differ from the narrow network's), each width has norms of its own, and
every step trains all widths: the loss is the sum of their cross-entropies. What differs from a
nested embedding: each size is a forward pass of its own, and not a prefix of the largest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestvec.encoders.image_network import small_resnet
from nestvec.space import parse_dims


class _Width:
    """The width that all layers of one network run at now."""

    def __init__(self, dims: tuple[int, ...]) -> None:
        self.dims = dims
        self.choose(dims[-1])

    def choose(self, dim: int) -> None:
        self.place = self.dims.index(dim)

    def of(self, full: int, *, place: int | None = None, unit: int = 1) -> int:
        """Return how many of ``full`` channels are used, in whole units (heads), at least one."""
        ratio = self.dims[self.place if place is None else place] / self.dims[-1]
        return unit * max(1, round(full // unit * ratio))


class _Sliced(nn.Module):
    """A convolution or linear layer of which the first inputs and outputs are used.

    It takes as many inputs as it is given. ``unit=None`` keeps all outputs.
    """

    def __init__(self, whole: nn.Conv2d | nn.Linear, width: _Width, *, unit: int | None) -> None:
        super().__init__()
        self.whole, self.width, self.unit = whole, width, unit

    def forward(self, rows: Tensor) -> Tensor:
        whole = self.whole
        n_out = len(whole.weight)
        if self.unit is not None:
            n_out = self.width.of(n_out, unit=self.unit)
        bias = None if whole.bias is None else whole.bias[:n_out]
        if isinstance(whole, nn.Linear):
            return F.linear(rows, whole.weight[:n_out, : rows.shape[-1]], bias)
        weight = whole.weight[:n_out, : rows.shape[1]]
        return F.conv2d(rows, weight, bias, whole.stride, cast(tuple[int, int], whole.padding))


class _NormOfWidth(nn.ModuleList):
    """One norm a width: batch norms start fresh, layer norms as the given one."""

    def __init__(self, whole: nn.BatchNorm2d | nn.LayerNorm, width: _Width) -> None:
        places = range(len(width.dims))
        if isinstance(whole, nn.BatchNorm2d):
            sizes = [width.of(whole.num_features, place=place) for place in places]
            super().__init__(nn.BatchNorm2d(size, whole.eps, whole.momentum) for size in sizes)
        else:  # LayerNorms stand on the residual, which is not sliced
            super().__init__(copy.deepcopy(whole) for _ in places)
        self.width = width

    def forward(self, rows: Tensor) -> Tensor:
        return self[self.width.place](rows)


def _slim(module: nn.Module, unit_of: Callable[[str], int | None], width: _Width) -> None:
    """Replace all layers below ``module`` by sliced ones, in place."""
    for name, child in list(module.named_modules()):
        above, _, last = name.rpartition(".")
        if isinstance(child, nn.Conv2d | nn.Linear):
            slim: nn.Module = _Sliced(child, width, unit=unit_of(name))
        elif isinstance(child, nn.BatchNorm2d | nn.LayerNorm):
            slim = _NormOfWidth(child, width)
        else:
            continue
        setattr(module.get_submodule(above), last, slim)


class _Slimmable(nn.Module):
    def __init__(self, dims: Sequence[int], n_classes: int) -> None:
        super().__init__()
        self.dims = parse_dims(dims)
        self.width = _Width(self.dims)
        #: rows of any size in dims -> logits, by the first columns of one matrix
        self.classifier = _Sliced(nn.Linear(self.dims[-1], n_classes), self.width, unit=None)

    def _summed(self, embed: Callable[[int], Tensor], labels: Tensor) -> Tensor:
        terms = [F.cross_entropy(self.classifier(embed(dim)), labels) for dim in self.dims]
        return torch.stack(terms).sum()


class SlimmableResNet(_Slimmable):
    """`small_resnet` at several widths: the ratio scales every channel count but the input's.

    The rows of size m are the pooled last channels, of which there are m; so the largest of
    ``dims`` is the last hidden size. Fresh weights.
    """

    def __init__(
        self,
        dims: Sequence[int],
        n_channels: int,
        hidden_sizes: Sequence[int],
        depths: Sequence[int],
        n_classes: int,
        *,
        embedding_size: int = 32,
    ) -> None:
        super().__init__(dims, n_classes)
        if self.dims[-1] != hidden_sizes[-1]:
            raise ValueError(f"dims end at {self.dims[-1]}, hidden_sizes at {hidden_sizes[-1]}")
        self.network = small_resnet(
            n_channels=n_channels,
            hidden_sizes=hidden_sizes,
            depths=depths,
            embedding_size=embedding_size,
        ).backbone
        _slim(self.network, lambda name: 1, self.width)

    def forward(self, pixel_values: Tensor, dim: int) -> Tensor:
        """Return rows (n, dim) of one width."""
        self.width.choose(dim)
        return self.network(pixel_values).pooler_output.flatten(1)

    def loss(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        return self._summed(lambda dim: self(pixel_values, dim), labels)


class SlimmableEncoder(_Slimmable):
    """The last layers of a BERT at several widths, on the hidden states of the layers below.

    The ratio scales attention heads and the inner width of the feed-forward part; the residual
    stays whole. One linear layer after mean pooling has as many outputs as the largest of
    ``dims``; the rows of size m are its first m. It starts as the identity and the layers as
    copies of ``layers``, so untrained the largest size is the given encoder's own mean pooling.

    Parameters
    ----------
    layers
        ``BertLayer`` modules of transformers, in order.
    """

    def __init__(self, layers: Sequence[nn.Module], dims: Sequence[int], n_classes: int) -> None:
        super().__init__(dims, n_classes)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in layers)
        attention = self.layers[0].get_submodule("attention.self")
        head_size = cast(int, attention.attention_head_size)
        hidden_size = cast(nn.Linear, attention.query).in_features
        of_part = {"query": head_size, "key": head_size, "value": head_size}

        def unit_of(name: str) -> int | None:
            *_, part, last = name.split(".")
            return of_part[last] if last in of_part else 1 if part == "intermediate" else None

        _slim(self.layers, unit_of, self.width)
        last = nn.Linear(hidden_size, self.dims[-1])
        nn.init.eye_(last.weight)
        nn.init.zeros_(last.bias)
        self.projection = _Sliced(last, self.width, unit=1)

    def forward(self, hidden: Tensor, mask: Tensor, dim: int) -> Tensor:
        """Return rows (n, dim) of hidden states (n, length, hidden_size).

        ``mask`` (n, length) is 1 for tokens and 0 for padding.
        """
        self.width.choose(dim)
        keep = mask.to(hidden.dtype)
        hide = (1 - keep[:, None, None, :]) * torch.finfo(hidden.dtype).min
        for layer in self.layers:
            hidden = layer(hidden, hide)
        pooled = (hidden * keep[:, :, None]).sum(dim=1) / keep.sum(dim=1, keepdim=True)
        return self.projection(pooled)

    def loss(self, hidden: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        return self._summed(lambda dim: self(hidden, mask, dim), labels)
