"""Our objectives inside sentence-transformers' own Trainer: one loss class, nothing patched.

::

    loss = SentenceTransformerLoss(model, NestedLoss(InfoNCE(), dims))
    SentenceTransformerTrainer(model=model, args=args, train_dataset=pairs, loss=loss).train()
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nestvec.errors import DataError
from nestvec.train.chunked import encode_in_chunks
from nestvec.train.depth import DepthLoss
from nestvec.train.distributed import gathered

if TYPE_CHECKING:
    from nestvec.encoders.layers import Layers


class SentenceTransformerLoss(nn.Module):
    """Call an objective on the embeddings of every text column, then the labels if there are any.

    Parameters
    ----------
    model
        The ``SentenceTransformer``.
    objective
        ``objective(column, column, ..., [labels])``: `NestedLoss` over anything, for instance.
    chunk_size
        Texts that are in memory together (`nestvec.train.encode_in_chunks`); None takes the batch.
    keep
        `KeepNeighbours`, or any objective of (rows, rows before training): added, over all texts of
        the batch, with weight ``keep_weight``. A frozen copy of the model says what was before.
    keep_weight
        0 leaves it out.

    Notes
    -----
    An objective over layers (`nestvec.train.FixedPairs`, for instance) gets every text's vector at
    each of its ``layers``, (n, n_layers, dim), from one forward pass; ``keep`` then does, too.

    Under ``torchrun`` the rows of all processes are gathered first, so a batch shared by several
    processes has the negatives and the gradients of the same batch in one.
    """

    def __init__(
        self,
        model: Any,
        objective: Callable[..., Tensor],
        *,
        chunk_size: int | None = None,
        keep: Callable[[Tensor, Tensor], Tensor] | None = None,
        keep_weight: float | int = 1.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.chunk_size = chunk_size
        self.keep, self.keep_weight = keep, keep_weight
        self.deep: Layers | None = None
        if isinstance(objective, DepthLoss):
            self.deep, self.layers = checked_layers(model, objective), objective.layers
        self.before = None
        if keep is not None:
            self.before = copy.deepcopy(model).eval().requires_grad_(False)

    def forward(
        self, sentence_features: Iterable[Mapping[str, Any]], labels: Tensor | None = None
    ) -> Tensor:
        columns = [dict(features) for features in sentence_features]
        rows = [gathered(self._rows(features)).float() for features in columns]
        with torch.autocast(rows[0].device.type, enabled=False):  # a score needs its digits
            loss = self.objective(*rows, *([] if labels is None else [gathered(labels)]))
        if self.keep is None or self.before is None:
            return loss
        self.before.eval()  # the Trainer may have put every module into training mode
        with torch.no_grad():
            start = [gathered(self.before(dict(f))["sentence_embedding"]).float() for f in columns]
        with torch.autocast(rows[0].device.type, enabled=False):
            return loss + self.keep_weight * self.keep(torch.cat(rows), torch.cat(start))

    def _rows(self, features: Mapping[str, Any]) -> Tensor:
        if self.chunk_size is None:
            return self._encode(features)
        return encode_in_chunks(self._encode, features, self.chunk_size)

    def _encode(self, features: Any) -> Tensor:
        if self.deep is None:
            return self.model(dict(features))["sentence_embedding"]
        with self.deep.kept():
            return self.deep.rows(self.model(dict(features)), self.layers)

    def get_config_dict(self) -> dict[str, Any]:
        """Return what sentence-transformers' model card shows."""
        return {"objective": type(self.objective).__name__, "chunk_size": self.chunk_size}


def checked_layers(model: Any, objective: DepthLoss) -> Layers:
    """Return the layers of a model, or raise if they are not those of an objective."""
    from nestvec.encoders.layers import Layers

    found = Layers(model)
    if objective.layers[-1] != found.n:
        raise DataError(
            f"the objective's layers {objective.layers} do not end with the last of this model, "
            f"{found.n}: it is the teacher of the others."
        )
    return found
