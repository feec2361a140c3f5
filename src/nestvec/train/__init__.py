"""Objectives for encoders that are still being trained: nested losses and heads, in plain torch."""

from nestvec._extras import require

require("torch", extra="fit", why="nestvec.train")

from nestvec.train.heads import (  # noqa: E402  # a missing torch is said first
    BlockLayerNorm,
    BlockTriangularLinear,
    NestedClassifier,
    NestedCrossEntropy,
)
from nestvec.train.objectives import (  # noqa: E402  # likewise
    InfoNCE,
    NestedDistillation,
    NestedDropout,
    NestedLoss,
    SupervisedContrastive,
    cut,
)

__all__ = [
    "BlockLayerNorm",
    "BlockTriangularLinear",
    "InfoNCE",
    "NestedClassifier",
    "NestedCrossEntropy",
    "NestedDistillation",
    "NestedDropout",
    "NestedLoss",
    "SupervisedContrastive",
    "cut",
]
