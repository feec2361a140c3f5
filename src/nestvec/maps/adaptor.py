"""MatryoshkaAdaptor: a map, learned from frozen vectors alone, that makes them nested."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf
from sklearn.base import clone
from sklearn.utils import check_random_state

from nestvec._extras import require
from nestvec._progress import progress
from nestvec.errors import DataError
from nestvec.maps import guard as guards
from nestvec.maps import samples
from nestvec.maps.base import FittedMap
from nestvec.maps.rotation import PrincipalRotation
from nestvec.space import Space

Matrix = NDArray[np.float32]
_FEWEST_ROWS = 20  # below this nothing can be held out


class MatryoshkaAdaptor(FittedMap):
    """Make frozen vectors nested: every prefix a good embedding, full size kept.

    A linear or residual map that begins at the principal rotation and is trained at all nesting
    dims together, so that each prefix sees the neighbours that full size sees. With relevant
    (query, document) pairs a second stage moves queries towards their documents. What is kept is
    the best of {unchanged, rotation, learned} on held-out data; ``guard_`` says which, and by how
    much.

    Parameters
    ----------
    dims : sequence of int, optional
        Nesting dims; by default the full size halved down to 16.
    kind : {"linear", "residual"}
        ``x @ W``, or that plus a network with one hidden layer.
    dim_weights : sequence of float, optional
        What each size counts, in training and in the guard's choice; equally by default.
    whitening
        Axis ``i`` of the rotation starts scaled by ``energy_i ** -whitening``: a little takes
        weight from the few directions that all texts share. At 0 the map starts at the rotation
        itself and full size is its own teacher.
    temperature
        Of the teacher's neighbour distribution; lower looks at fewer neighbours.
    neighbour_weight, topk_weight, pair_weight, reconstruction_weight
        Weights of the losses (`nestvec.maps.objectives`).
    k
        Neighbours in the top-k loss.
    hidden_units
        Width of the residual network; the full size by default.
    max_steps, patience, learning_rate, batch_size, gallery_size
        Training: steps at most, steps without a better held-out score after which it ends, Adam's
        rate, rows that ask in a step, rows they are compared with.
    supervised_steps, supervised_learning_rate, label_share, label_weight
        The second stage: its steps, Adam's rate, the share of labelled queries in a batch, and how
        much of a query's target is its label (the rest is full size's opinion, which keeps scarce
        labels from being learned by heart).
    sample_size
        Rows to learn from, drawn at random if there are more. Relevant documents are always in.
    validation_fraction
        Share held out: of the rows, half for early stopping and half for the guard; of labelled
        queries, all for both, and half of them share no relevant document with training. What is
        kept is then made again from everything, for as many steps.
    choose : {"one", "per_size"}
        ``"per_size"`` also makes ``maps_``, the winner of each size. They are different Spaces:
        their prefixes cannot be compared with one another.
    random_state
        Seed of the sample, the split and the batches.
    verbose
        Show progress.

    Attributes
    ----------
    guard_ : Guard
        The held-out scores at each size, the winner, and a ``sentence()``.
    n_steps_ : int
        Steps of training that the learned map took until its best held-out score.
    maps_ : dict of int to MatryoshkaAdaptor
        Only with ``choose="per_size"``.
    dims_, n_features_in_, content_hash

    Notes
    -----
    The paper's losses are the top-k, pairwise and reconstruction ones; ours by default is the
    neighbour distribution's cross-entropy with a learned temperature for each size, from the whole
    gallery instead of a small batch. Rows are L2-normalised before and after: direction is all
    that counts (a zero row of an array stays zero). One map serves queries and documents.

    References
    ----------
    Yoon et al., Matryoshka-Adaptor, EMNLP 2024, arXiv:2407.20243. Kusupati et al., Matryoshka
    Representation Learning, NeurIPS 2022, arXiv:2205.13147.
    """

    _kind = "matryoshka_adaptor"

    def __init__(
        self,
        dims: Any = None,
        *,
        kind: Any = "linear",
        dim_weights: Any = None,
        whitening: Any = 0.05,
        temperature: Any = 0.04,
        neighbour_weight: Any = 1.0,
        topk_weight: Any = 0.0,
        pair_weight: Any = 0.0,
        reconstruction_weight: Any = 0.0,
        k: Any = 100,
        hidden_units: Any = None,
        max_steps: Any = 600,
        patience: Any = 300,
        learning_rate: Any = 3e-3,
        batch_size: Any = 256,
        gallery_size: Any = 2048,
        supervised_steps: Any = 300,
        supervised_learning_rate: Any = 2e-3,
        label_share: Any = 0.25,
        label_weight: Any = 0.8,
        sample_size: Any = 20_000,
        validation_fraction: Any = 0.15,
        choose: Any = "one",
        random_state: Any = 0,
        verbose: Any = False,
    ) -> None:
        self.dims = dims
        self.kind = kind
        self.dim_weights = dim_weights
        self.whitening = whitening
        self.temperature = temperature
        self.neighbour_weight = neighbour_weight
        self.topk_weight = topk_weight
        self.pair_weight = pair_weight
        self.reconstruction_weight = reconstruction_weight
        self.k = k
        self.hidden_units = hidden_units
        self.max_steps = max_steps
        self.patience = patience
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.gallery_size = gallery_size
        self.supervised_steps = supervised_steps
        self.supervised_learning_rate = supervised_learning_rate
        self.label_share = label_share
        self.label_weight = label_weight
        self.sample_size = sample_size
        self.validation_fraction = validation_fraction
        self.choose = choose
        self.random_state = random_state
        self.verbose = verbose

    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        queries: Any = None,
        qrels: Any = None,
        validation: Any = None,
    ) -> MatryoshkaAdaptor:
        """Learn from a sample of documents, and from queries where there are some.

        Parameters
        ----------
        X : (n, dim) array or Embeddings
            Documents. A zero row of an array has no direction: nothing is learned from it.
        queries : (m, dim) array or Embeddings, optional
            Queries like those to come. Without ``qrels`` they only show where queries lie.
        qrels : dict of dict, or (n_pairs, 2) int array, optional
            What is relevant: ``{query id: {document id: grade}}`` for Embeddings, or rows
            (query, document). Makes the fit supervised.
        validation : tuple, optional
            Labelled data for the guard's choice, not used in training: ``(queries, qrels)`` over
            the documents of ``X``, compared by nDCG@10, or ``(first, second, scores)``, pairs with
            a similarity score, compared by Spearman correlation.

        Raises
        ------
        DataError
            NaN or Inf; relevance that names what is not there.
        SpaceMismatchError
            If queries and documents are Embeddings of two spaces.
        MissingExtraError
            If torch is not installed.
        """
        self._check_settings()
        matrix = self._take(X, reset=True, allow_zero_rows=True)
        samples.refuse_lengths(X)
        dim = matrix.shape[1]
        self._set_dims(self.dims, dim)
        rng = np.random.default_rng(check_random_state(self.random_state).randint(2**31 - 1))
        if len(matrix) < _FEWEST_ROWS:
            candidates = {"unchanged": _identity(dim)}
            self.guard_ = guards.Guard("none", 0, self.dims_, self._weights(), {}, "unchanged")
            self.n_steps_ = 0
        else:
            free = labels = None
            if qrels is not None and queries is None:
                raise DataError("qrels need queries: pass fit(X, queries=..., qrels=...).")
            if qrels is not None:
                labels = samples.read_labels(qrels, queries, X, dim=dim)
            elif queries is not None:
                free = samples.unit_rows(queries, X, name="queries", dim=dim)
            judged = None
            if isinstance(validation, tuple) and len(validation) == 2:
                judged = samples.read_labels(validation[1], validation[0], X, dim=dim)
            given = [found for found in (labels, judged) if found is not None]
            chosen = samples.draw(len(matrix), self.sample_size, given, rng)
            rows = guards.unit(np.asarray(matrix[chosen]))
            moved = None if labels is None else labels.moved(chosen)
            parts = samples.split(
                samples.Examples(rows, free, moved),
                dims=self.dims_,
                fraction=self.validation_fraction,
                rng=rng,
            )
            if judged is not None:
                parts = samples.judged_by_queries(parts, judged.moved(chosen), rows, self.dims_)
            elif validation is not None:
                parts = samples.judged_by_pairs(parts, validation, X, self.dims_, dim=dim)
            candidates = self._compare(parts, rng)
        self._arrays_ = candidates[self.guard_.winner]
        if self.choose == "per_size":
            self.maps_ = {d: self._alone(d, candidates) for d in self.dims_}
        return self

    def _compare(
        self, parts: samples.Split, rng: np.random.Generator
    ) -> dict[str, dict[str, Matrix]]:
        """Judge maps made from the held-in part; return the same made from everything."""
        trained, steps = self._learn(parts.held_in, parts.stop, rng)
        self.guard_ = guards.judge(
            {name: partial(_apply, arrays) for name, arrays in trained.items()},
            parts.judge,
            criterion=parts.criterion,
            n_held_out=parts.n_held_out,
            dims=self.dims_,
            weights=self._weights(),
        )
        self.n_steps_ = sum(steps)
        # What is kept learns from the held-out part too, for as long as was found to be best.
        return self._learn(parts.everything, None, rng, steps)[0]

    def _learn(
        self,
        examples: samples.Examples,
        scorer: guards.Scorer | None,
        rng: np.random.Generator,
        stop_at: tuple[int, int] = (0, 0),
    ) -> tuple[dict[str, dict[str, Matrix]], tuple[int, int]]:
        """Return the arrays of every candidate, and the steps of the two stages.

        With a scorer each stage ends at its best held-out score, without one after ``stop_at``.
        """
        require("torch", extra="fit", why="Fitting a MatryoshkaAdaptor")
        from nestvec.maps import learn

        rotation = PrincipalRotation().fit(examples.rows)
        axes = np.ascontiguousarray(rotation.components_.T)
        energy = rotation.explained_energy_
        # The floor keeps directions that no row has from being blown up.
        scale = np.maximum(energy, 1e-3 * energy.mean()) ** -float(self.whitening)
        start = (axes * (scale / scale[0])).astype(np.float32)
        recipe = learn.Recipe(
            dims=self.dims_,
            dim_weights=tuple(w * len(self.dims_) for w in self._weights()),
            temperature=self.temperature,
            neighbour_weight=self.neighbour_weight,
            topk_weight=self.topk_weight,
            pair_weight=self.pair_weight,
            reconstruction_weight=self.reconstruction_weight,
            k=self.k,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            gallery_size=self.gallery_size,
            max_steps=self.max_steps,
            patience=self.patience,
        )

        def held_out(arrays: dict[str, Matrix]) -> float:
            assert scorer is not None
            return float(np.dot(scorer(partial(_apply, arrays)), self._weights()))

        def stage(recipe: learn.Recipe, stop: int, **more: Any) -> tuple[dict[str, Matrix], int]:
            with progress("adaptor", recipe.max_steps, show=self.verbose, unit="steps") as advance:
                return learn.learn(
                    examples.rows,
                    start,
                    recipe,
                    hidden_units=(self.hidden_units or len(start)) * (self.kind == "residual"),
                    rng=rng,
                    held_out=held_out,
                    stop_at=None if scorer is not None else stop,
                    advance=advance,
                    **more,
                )

        found, first = stage(recipe, stop_at[0], unlabelled=examples.unlabelled)
        second = 0
        if examples.labels is not None:
            recipe = replace(
                recipe,
                max_steps=self.supervised_steps,
                patience=self.supervised_steps,
                learning_rate=self.supervised_learning_rate,
            )
            labelled = learn.Labelled(
                examples.labels.queries,
                examples.labels.relevant,
                self.label_share,
                self.label_weight,
            )
            found, second = stage(recipe, stop_at[1], labelled=labelled, begin=found)
        candidates = {
            "unchanged": _identity(len(axes)),
            "rotation": {"linear": axes},
            "learned": found,
        }
        return candidates, (first, second)

    def _check_settings(self) -> None:
        for name, value, allowed in (
            ("kind", self.kind, ("linear", "residual")),
            ("choose", self.choose, ("one", "per_size")),
        ):
            if value not in allowed:
                raise DataError(f"{name} {value!r} is not one of {', '.join(allowed)}.")
        if not 0 < self.validation_fraction < 1:
            raise DataError(
                f"validation_fraction {self.validation_fraction!r} must lie between 0 and 1."
            )

    def _weights(self) -> tuple[float, ...]:
        """Return what each size counts, summing to 1."""
        if self.dim_weights is None:
            return (1 / len(self.dims_),) * len(self.dims_)
        weights = np.asarray(self.dim_weights, dtype=float)
        if weights.shape != (len(self.dims_),) or (weights < 0).any() or not weights.sum():
            raise DataError(
                f"dim_weights {self.dim_weights!r} do not fit the sizes {self.dims_}: one number "
                f">= 0 a size, not all 0."
            )
        return tuple((weights / weights.sum()).tolist())

    def _alone(self, dim: int, candidates: dict[str, dict[str, Matrix]]) -> MatryoshkaAdaptor:
        alone: Any = cast(Any, clone(self)).set_params(dims=(dim,), dim_weights=None, choose="one")
        alone.n_features_in_, alone.dims_ = self.n_features_in_, (dim,)
        alone.space_ = self.space_
        alone.guard_, alone.n_steps_ = self.guard_.at(dim), self.n_steps_
        alone._arrays_ = candidates[alone.guard_.winner]
        return alone

    def _space(self, old: Space) -> Space:
        return old.mapped(self.content_hash, nesting_dims=self.dims_, normalisation="l2")

    def _map(self, rows: Matrix) -> Matrix:
        return guards.unit(_apply(self._arrays_, guards.unit(rows)))

    def module_arrays(self) -> dict[str, Matrix]:
        return dict(self._arrays_)

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return self._arrays_

    def _about(self) -> dict[str, Any]:
        return {"guard": self.guard_.to_dict(), "n_steps": self.n_steps_}

    def _restore(self, arrays: dict[str, NDArray[Any]], about: dict[str, Any]) -> None:
        dim = self.n_features_in_
        if arrays["linear"].shape != (dim, dim) or len(arrays) not in (1, 4):
            raise ValueError("the arrays do not fit together")
        self._arrays_ = arrays
        self.guard_ = guards.Guard.from_dict(about["guard"])
        self.n_steps_ = int(about["n_steps"])


def _identity(dim: int) -> dict[str, Matrix]:
    return {"linear": np.eye(dim, dtype=np.float32)}


def _apply(arrays: dict[str, Matrix], rows: Matrix) -> Matrix:
    """Apply learned arrays to unit rows: ``x @ linear + gelu(x @ inner + bias) @ outer``."""
    mapped = rows @ arrays["linear"]
    if "inner" in arrays:
        inside = rows @ arrays["inner"] + arrays["bias"]
        mapped += (inside * (0.5 * (1 + erf(inside / np.sqrt(2))))).astype(np.float32) @ arrays[
            "outer"
        ]
    return mapped
