"""ResidualBridge: a small network on top of the relaxed rotation. Needs torch in ``fit`` only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf

from nestvec._extras import require
from nestvec.maps.alignment import Bridge, RelaxedBridge

Matrix = NDArray[np.float32]
_CHECKS = 15  # looks at the held-out part in a whole run


class ResidualBridge(Bridge):
    """A network with one hidden layer added to the relaxed rotation, each old dim scaled.

    ``s * (x @ W + b + gelu(x @ V + c) @ U)``, which begins as `RelaxedBridge`, is trained for the
    cosine with the old vectors, and keeps its best step on held-out pairs, which may be the first:
    what cannot be learned from the pairs is not.

    Parameters
    ----------
    hidden_units
        Width of the hidden layer.
    max_steps, learning_rate, batch_size
        Adam's.
    validation_fraction
        Share of the pairs held out for the choice of the step.
    random_state
        Seed of the split, of the hidden layer and of the batches.

    Attributes
    ----------
    n_steps_ : int
        Steps until the best held-out cosine.

    References
    ----------
    Drift-Adapter, EMNLP 2025, arXiv:2509.23471: the residual adapter with diagonal scaling.
    """

    _kind = "residual_bridge"
    n_steps_: int

    def __init__(
        self,
        hidden_units: Any = 128,
        *,
        max_steps: Any = 300,
        learning_rate: Any = 1e-3,
        batch_size: Any = 256,
        validation_fraction: Any = 0.15,
        random_state: Any = 0,
    ) -> None:
        self.hidden_units = hidden_units
        self.max_steps = max_steps
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.validation_fraction = validation_fraction
        self.random_state = random_state

    def _learn(self, X: Matrix, Y: Matrix) -> dict[str, Matrix]:
        torch = require("torch", extra="fit", why="Fitting a ResidualBridge")
        rng = np.random.default_rng(self.random_state)
        order = rng.permutation(len(X))
        n_out = round(len(X) * self.validation_fraction)
        out, held_in = order[:n_out], order[n_out:]
        start = RelaxedBridge().fit(X[held_in], Y[held_in])._arrays_
        size = (X.shape[1], int(self.hidden_units))
        given = {
            **start,
            "inner": rng.normal(size=size).astype(np.float32),
            "bias": np.zeros(size[1], np.float32),
            "outer": np.zeros((size[1], Y.shape[1]), np.float32),  # zero: begins as relaxed
            "scale": np.ones(Y.shape[1], np.float32),
        }
        learned = {name: torch.from_numpy(array.copy()) for name, array in given.items()}
        for one in learned.values():
            one.requires_grad_()
        x, y = torch.from_numpy(X), torch.from_numpy(Y)
        adam = torch.optim.Adam(learned.values(), lr=float(self.learning_rate))
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, int(self.max_steps)))

        def cosine(rows: NDArray[np.int64]) -> Any:
            hidden = torch.nn.functional.gelu(x[rows] @ learned["inner"] + learned["bias"])
            mapped = x[rows] @ learned["linear"] + learned["intercept"] + hidden @ learned["outer"]
            scaled = mapped * learned["scale"]
            return torch.nn.functional.cosine_similarity(scaled, y[rows]).mean()

        def arrays() -> dict[str, Matrix]:
            return {name: one.detach().numpy().copy() for name, one in learned.items()}

        best, best_cosine, self.n_steps_ = arrays(), -np.inf, 0
        every = max(1, int(self.max_steps) // _CHECKS)
        for step in range(int(self.max_steps) + 1):
            if n_out and step % every == 0:
                with torch.no_grad():
                    now = float(cosine(out))
                if now > best_cosine:
                    best, best_cosine, self.n_steps_ = arrays(), now, step
            if step == int(self.max_steps):
                break
            batch = rng.choice(held_in, min(int(self.batch_size), len(held_in)), replace=False)
            adam.zero_grad()
            (-cosine(batch)).backward()
            adam.step()
            falling.step()
        scale = best.pop("scale")
        return {k: v * scale if k in ("linear", "intercept", "outer") else v
                for k, v in best.items()}  # fmt: skip

    def _apply(self, rows: Matrix) -> Matrix:
        inside = rows @ self._arrays_["inner"] + self._arrays_["bias"]
        gelu = inside * (0.5 * (1 + erf(inside * np.float32(np.sqrt(0.5)))))
        return super()._apply(rows) + gelu @ self._arrays_["outer"]

    def _shapes(self, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        width = int(self.hidden_units)
        return {
            "linear": (n_in, n_out),
            "intercept": (n_out,),
            "inner": (n_in, width),
            "bias": (width,),
            "outer": (width, n_out),
        }

    def _about(self) -> dict[str, Any]:
        return {**super()._about(), "n_steps": self.n_steps_}

    def _restore_about(self, about: dict[str, Any]) -> None:
        super()._restore_about(about)
        self.n_steps_ = int(about["n_steps"])
