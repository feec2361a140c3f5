"""Objectives for encoders that are still being trained: nested losses and heads, in plain torch."""

from nestvec._extras import require

require("torch", extra="fit", why="nestvec.train")

from nestvec.train.chunked import encode_in_chunks  # noqa: E402  # a missing torch is said first
from nestvec.train.distributed import gathered, row_offset  # noqa: E402  # likewise
from nestvec.train.heads import (  # noqa: E402  # likewise
    BlockLayerNorm,
    BlockTriangularLinear,
    NestedClassifier,
    NestedCrossEntropy,
)
from nestvec.train.masked_lm import NestedMaskedLM  # noqa: E402  # likewise
from nestvec.train.objectives import (  # noqa: E402  # likewise
    InfoNCE,
    NestedDistillation,
    NestedDropout,
    NestedLoss,
    SupervisedContrastive,
    best_size,
    check_labels,
    cut,
)
from nestvec.train.ranking import CoSENT  # noqa: E402  # likewise

__all__ = [
    "BlockLayerNorm",
    "BlockTriangularLinear",
    "CoSENT",
    "InfoNCE",
    "NestedClassifier",
    "NestedCrossEntropy",
    "NestedDistillation",
    "NestedDropout",
    "NestedLoss",
    "NestedMaskedLM",
    "SupervisedContrastive",
    "best_size",
    "check_labels",
    "cut",
    "encode_in_chunks",
    "gathered",
    "row_offset",
]
