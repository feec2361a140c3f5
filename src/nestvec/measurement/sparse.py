"""Sparse codes (CSR): a top-k sparse autoencoder over frozen embeddings, as a baseline."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec._extras import require

Matrix = NDArray[np.float32]

_DEAD_AFTER = 30  # steps without being active, as published
_AUXILIARY = 512  # dead latents that explain the residual, as published


class SparseCoder:
    """Encode rows as ``active`` of ``4 * dim`` latents; compare them by inner product.

    ``z = top_k(relu((x - b) W.T + c))`` and ``x' = z W + b`` with one W for both (tied). The loss
    is that of CSR: reconstruction from k and (1/8) from 4k latents, 1/32 of what 512 dead latents
    explain of the residual, and 0.1 of an in-batch contrastive term on the codes.

    Parameters
    ----------
    active
        k, latents kept a row.
    steps, batch_size, learning_rate
        The budget: a CPU baseline of seconds, not the paper's 10 epochs of 4096 at 4e-4. W starts
        from gallery rows instead of noise, which needs fewer steps.
    seed
        Of the start and the batches.

    Notes
    -----
    Codes are L2-normalised, then rounded to float16, so that inner products are cosines.

    References
    ----------
    Wen et al., Beyond Matryoshka: Revisiting Sparse Coding for Adaptive Representation, ICML
    2025, arXiv:2503.01776.
    """

    def __init__(
        self,
        active: int,
        *,
        steps: int = 200,
        batch_size: int = 256,
        learning_rate: float = 3e-3,
        seed: int = 0,
    ) -> None:
        self.active, self.steps, self.batch_size = active, steps, batch_size
        self.learning_rate, self.seed = learning_rate, seed

    def fit(self, gallery: Matrix) -> SparseCoder:
        """Train on the rows of ``gallery`` (n, dim), drawn with replacement."""
        torch = require("torch", extra="fit", why="the baseline csr")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the steps are small: more threads only wait for each other
        try:
            return self._fit(torch, gallery)
        finally:
            torch.set_num_threads(threads)

    def _fit(self, torch: Any, gallery: Matrix) -> SparseCoder:
        F = torch.nn.functional
        n, dim = gallery.shape
        self.hidden = 4 * dim
        k, k_wide = min(self.active, self.hidden), min(4 * self.active, self.hidden)
        rng = np.random.default_rng(self.seed)
        centre = gallery.mean(axis=0)
        start = gallery[rng.integers(n, size=self.hidden)] - centre
        start += 0.01 * rng.standard_normal(start.shape, dtype=np.float32)  # rows drawn twice
        start /= np.linalg.norm(start, axis=1, keepdims=True)
        start *= _best_scale(gallery[: self.batch_size] - centre, start, k)
        W, b, c = (
            torch.tensor(values, requires_grad=True)
            for values in (start, centre, np.zeros(self.hidden, np.float32))
        )
        adam = torch.optim.Adam([W, b, c], lr=self.learning_rate, fused=True)
        asleep = torch.zeros(self.hidden)  # steps since a latent was last active
        for _ in range(self.steps):
            x = torch.from_numpy(gallery[rng.integers(n, size=self.batch_size)])
            latents = torch.relu((x - b) @ W.T + c)
            values, where = latents.topk(k_wide, dim=1)

            def decode(values: Any, where: Any) -> Any:
                return F.embedding_bag(where, W, per_sample_weights=values, mode="sum")

            narrow = decode(values[:, :k], where[:, :k]) + b
            loss = _error(x, narrow) + _error(x, decode(values, where) + b) / 8
            asleep += 1
            asleep[where[:, :k].reshape(-1)] = 0
            dead = (asleep > _DEAD_AFTER).nonzero()[:, 0]
            if len(dead):
                revive, at = latents[:, dead].topk(min(_AUXILIARY, len(dead)), dim=1)
                residual = (x - narrow).detach()
                missed = _error(residual, decode(revive, dead[at]))
                loss = loss + missed / _error(residual, 0 * residual) / 32
            codes = torch.zeros_like(latents).scatter(1, where[:, :k], values[:, :k])
            codes = F.normalize(codes, dim=1)
            alike = F.cross_entropy(codes @ codes.T, torch.arange(len(x)))
            loss = loss + 0.1 * alike
            adam.zero_grad()
            loss.backward()
            adam.step()
        self.weight_, self.bias_, self.shift_ = (p.detach().numpy() for p in (W, b, c))
        return self

    def latents(self, rows: Matrix) -> Matrix:
        """Return the ``active`` largest latents of ``rows``, (n, hidden), all others 0."""
        latents = np.maximum((rows - self.bias_) @ self.weight_.T + self.shift_, 0)
        k = min(self.active, self.hidden)
        keep = np.argpartition(latents, -k, axis=1)[:, -k:]
        kept = np.zeros_like(latents)
        np.put_along_axis(kept, keep, np.take_along_axis(latents, keep, axis=1), axis=1)
        return kept

    def transform(self, rows: Matrix) -> Matrix:
        """Return the codes of ``rows``: `latents` of length 1, rounded to float16."""
        codes = self.latents(rows)
        length = np.linalg.norm(codes, axis=1, keepdims=True)
        codes /= np.where(length > 0, length, 1)
        return codes.astype(np.float16).astype(np.float32)


def _best_scale(rows: Matrix, weight: Matrix, k: int) -> np.float32:
    """Scale of tied weights that reconstructs ``rows`` best: k unit rows alike would overshoot."""
    latents = np.maximum(rows @ weight.T, 0)
    latents[latents < np.partition(latents, -k, axis=1)[:, [-k]]] = 0
    guess = latents @ weight
    return np.sqrt((rows * guess).sum() / np.square(guess).sum())


def _error(x: Any, guess: Any) -> Any:
    """Squared error a row, summed over dims: independent of dim for rows of length 1."""
    return (x - guess).pow(2).sum(dim=1).mean()
