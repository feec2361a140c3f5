"""Masked language modelling at every prefix of the hidden state.

Kusupati et al., arXiv:2205.13147, section on BERT: the output matrix is tied with the token
embeddings, and size m uses its first m columns (the MRL-E head).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestvec.errors import DataError, DimensionError
from nestvec.train.objectives import Weights, check_labels, cut, weighed_dims

IGNORED = -100  # torch's, and transformers', label of a token that was not masked


class NestedMaskedLM(nn.Module):
    """Predict masked tokens from every prefix of their hidden states; the losses are added up.

    Parameters
    ----------
    dims
        Sizes; the largest is the hidden state's full size.
    vocab_size
        Number of tokens.
    embedding
        The token embeddings, or their weight (vocab_size, dim): shared, not copied. None makes a
        matrix of the head's own. Only with ``tied``.
    tied
        One matrix, of which size m uses the first m columns, and one bias. Otherwise one decoder a
        size.
    weights
        As in `NestedLoss`.

    Notes
    -----
    ``transformers.DataCollatorForLanguageModeling`` masks the tokens and makes the labels.

    BERT's own head begins with a dense layer and a norm over all dims, after which a prefix would
    hold something of every dim. There is none here; where one is wanted, `BlockTriangularLinear`
    and `BlockLayerNorm` before this head keep a prefix a prefix.
    """

    def __init__(
        self,
        dims: Iterable[int] | str,
        vocab_size: int,
        *,
        embedding: nn.Embedding | Tensor | None = None,
        tied: bool = True,
        weights: Weights = "uniform",
    ) -> None:
        super().__init__()
        self.dims, self.weights = weighed_dims(dims, weights)
        self.vocab_size = vocab_size
        self.tied = tied
        if embedding is not None and not tied:
            raise DataError("one decoder a size cannot share an embedding: leave out one of them.")
        if not tied:
            self.decoders = nn.ModuleList(nn.Linear(dim, vocab_size) for dim in self.dims)
            return
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.weight = self._matrix(embedding)

    def _matrix(self, embedding: nn.Embedding | Tensor | None) -> nn.Parameter:
        wanted = (self.vocab_size, self.dims[-1])
        if embedding is None:
            return nn.Parameter(0.02 * torch.randn(wanted))  # as BERT begins
        matrix = embedding.weight if isinstance(embedding, nn.Embedding) else embedding
        n_tokens, width = matrix.shape
        if n_tokens != self.vocab_size or width < self.dims[-1]:
            raise DimensionError(
                f"an embedding matrix {tuple(matrix.shape)} does not fit {self.vocab_size} tokens "
                f"and sizes {self.dims}: it has to be {wanted}, or wider."
            )
        if not isinstance(matrix, nn.Parameter):
            raise DataError("the embedding's weight is no nn.Parameter, so it cannot be shared.")
        return matrix

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the sum over sizes of the mean loss of the masked tokens.

        Parameters
        ----------
        hidden
            (n, length, dim), the encoder's last hidden states.
        labels
            (n, length) int64: the token that stood there, -100 where nothing was masked. A batch
            without a masked token has loss 0.
        """
        rows, tokens = self._masked(hidden, labels)
        n = max(1, len(tokens))  # no masked token: the sum over none, with gradients, not 0 / 0
        total = rows.new_zeros(())
        for dim, weight in zip(self.dims, self.weights, strict=True):
            loss = F.cross_entropy(self.logits(rows, dim), tokens, reduction="sum") / n
            total = total + weight * loss
        return total

    def logits(self, hidden: Tensor, dim: int) -> Tensor:
        """Return (..., vocab_size) logits from the first ``dim`` numbers of each hidden state."""
        prefix = cut(hidden, dim, normalise=False)
        if self.tied:
            if dim > self.dims[-1]:
                raise DimensionError(f"size {dim} is beyond the sizes {self.dims}.")
            return F.linear(prefix, self.weight[:, :dim], self.bias)
        if dim not in self.dims:
            raise DimensionError(f"there is no decoder of size {dim}; the sizes are {self.dims}.")
        return self.decoders[self.dims.index(dim)](prefix)

    @torch.no_grad()
    def accuracy(self, hidden: Tensor, labels: Tensor) -> dict[int, float]:
        """Return the share of masked tokens (0 to 1) that each size predicts right."""
        rows, tokens = self._masked(hidden, labels)
        if not len(tokens):
            raise DataError("no token is masked, so there is nothing to be right about.")
        right = {dim: self.logits(rows, dim).argmax(dim=-1) == tokens for dim in self.dims}
        return {dim: float(hits.double().mean()) for dim, hits in right.items()}

    def _masked(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the masked places only: logits of all would be n * length * vocab_size numbers."""
        if labels.shape != hidden.shape[:-1]:
            raise DataError(
                f"labels {tuple(labels.shape)} do not fit hidden states {tuple(hidden.shape)}: one "
                f"a token, {tuple(hidden.shape[:-1])}."
            )
        check_labels(labels, self.vocab_size, ignore=IGNORED)
        masked = labels != IGNORED
        return hidden[masked], labels[masked]
