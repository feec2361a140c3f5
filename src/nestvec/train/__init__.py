"""Train encoders to be nested: objectives in plain torch, and trainers for texts and images.

The trainers are imported when they are first used, so the objectives need torch alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

from nestvec._extras import require

require("torch", extra="fit", why="nestvec.train")

from nestvec.train.chunked import encode_in_chunks  # noqa: E402  # a missing torch is said first
from nestvec.train.compatible import (  # noqa: E402  # likewise
    OCA_CONFIGURED,
    OCA_PUBLISHED,
    BackwardCompatible,
    BasisTransformation,
    BlockOrthogonal,
    OldClasses,
    OrthogonalCompatible,
)
from nestvec.train.compatible_pairs import CompatiblePairs  # noqa: E402  # likewise
from nestvec.train.depth import (  # noqa: E402  # likewise
    ESE,
    DepthLoss,
    FixedPairs,
    KeepInDepth,
    TwoDMSE,
    pairs_of,
)
from nestvec.train.distillation import ScoreDistillation  # noqa: E402  # likewise
from nestvec.train.distributed import gathered, row_offset  # noqa: E402  # likewise
from nestvec.train.dynamic import DynamicNegatives  # noqa: E402  # likewise
from nestvec.train.heads import (  # noqa: E402  # likewise
    BlockLayerNorm,
    BlockTriangularLinear,
    ClassLabels,
    NestedClassifier,
    NestedCrossEntropy,
)
from nestvec.train.keeping import KeepNeighbours  # noqa: E402  # likewise
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
from nestvec.train.pairwise import StaticAndRandom  # noqa: E402  # likewise
from nestvec.train.ranking import CoSENT  # noqa: E402  # likewise
from nestvec.train.result import Trained, load_classifier  # noqa: E402  # likewise
from nestvec.train.sentence_transformer import SentenceTransformerLoss  # noqa: E402  # likewise
from nestvec.train.settings import Settings  # noqa: E402  # likewise
from nestvec.train.simplex import (  # noqa: E402  # likewise
    HigherOrderCompatible,
    StationaryClassifier,
    StationaryLabels,
    simplex,
)

if TYPE_CHECKING:
    from nestvec.train.image import ShiftAndFlip, train_image
    from nestvec.train.image_text import train_image_text
    from nestvec.train.lora import DrawRanks, Lora, NestedRanks
    from nestvec.train.lora_files import cut_lora, load_lora, save_lora, save_merged
    from nestvec.train.mining import Mined, mine_negatives
    from nestvec.train.query_side import train_queries
    from nestvec.train.synthesis import Synthetic, sample_documents, synthesize
    from nestvec.train.teacher import CrossEncoderTeacher, score_pairs
    from nestvec.train.text import train_text
    from nestvec.train.wider_text import widened

_HOME = {
    "CrossEncoderTeacher": "nestvec.train.teacher",
    "DrawRanks": "nestvec.train.lora",
    "Lora": "nestvec.train.lora",
    "Mined": "nestvec.train.mining",
    "NestedRanks": "nestvec.train.lora",
    "ShiftAndFlip": "nestvec.train.image",
    "Synthetic": "nestvec.train.synthesis",
    "cut_lora": "nestvec.train.lora_files",
    "load_lora": "nestvec.train.lora_files",
    "mine_negatives": "nestvec.train.mining",
    "sample_documents": "nestvec.train.synthesis",
    "save_lora": "nestvec.train.lora_files",
    "save_merged": "nestvec.train.lora_files",
    "score_pairs": "nestvec.train.teacher",
    "synthesize": "nestvec.train.synthesis",
    "train_image": "nestvec.train.image",
    "train_image_text": "nestvec.train.image_text",
    "train_queries": "nestvec.train.query_side",
    "train_text": "nestvec.train.text",
    "widened": "nestvec.train.wider_text",
}

__all__ = [
    "ESE",
    "OCA_CONFIGURED",
    "OCA_PUBLISHED",
    "BackwardCompatible",
    "BasisTransformation",
    "BlockLayerNorm",
    "BlockOrthogonal",
    "BlockTriangularLinear",
    "ClassLabels",
    "CoSENT",
    "CompatiblePairs",
    "CrossEncoderTeacher",
    "DepthLoss",
    "DrawRanks",
    "DynamicNegatives",
    "FixedPairs",
    "HigherOrderCompatible",
    "InfoNCE",
    "KeepInDepth",
    "KeepNeighbours",
    "Lora",
    "Mined",
    "NestedClassifier",
    "NestedCrossEntropy",
    "NestedDistillation",
    "NestedDropout",
    "NestedLoss",
    "NestedMaskedLM",
    "NestedRanks",
    "OldClasses",
    "OrthogonalCompatible",
    "ScoreDistillation",
    "SentenceTransformerLoss",
    "Settings",
    "ShiftAndFlip",
    "StaticAndRandom",
    "StationaryClassifier",
    "StationaryLabels",
    "SupervisedContrastive",
    "Synthetic",
    "Trained",
    "TwoDMSE",
    "best_size",
    "check_labels",
    "cut",
    "cut_lora",
    "encode_in_chunks",
    "gathered",
    "load_classifier",
    "load_lora",
    "mine_negatives",
    "pairs_of",
    "row_offset",
    "sample_documents",
    "save_lora",
    "save_merged",
    "score_pairs",
    "simplex",
    "synthesize",
    "train_image",
    "train_image_text",
    "train_queries",
    "train_text",
    "widened",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
