"""A scikit-learn classifier over nested embeddings that spends few dims on easy rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit, check_cv
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from nestvec import _checks
from nestvec.classify.report import AdaptiveReport, report_of
from nestvec.classify.thresholds import check_settings, find_thresholds, stops
from nestvec.errors import DataError, ModelError
from nestvec.space import Embeddings, Space, halving, parse_dims

Matrix = NDArray[np.float32]


class AdaptiveClassifier(ClassifierMixin, BaseEstimator):
    """Name each row by the shortest prefix that is sure enough of its class.

    One head a size, fitted on the prefix; a row stops at the first size whose largest probability
    reaches that size's threshold, and larger sizes are computed only for the rows that are left.
    The thresholds are those with the fewest dims at which held-out rows are classified as well as
    at full size.

    Parameters
    ----------
    dims : sequence of int, optional
        Sizes; by default the nesting dims that the Embeddings carry, else the full size halved
        down to 16. The full size is always the last.
    base : scikit-learn classifier with ``predict_proba``, optional
        Cloned for each size. By default `LogisticRegression` with ``C=10``: rows of length 1 are
        small numbers, which the usual ``C=1`` holds back.
    normalise
        L2-normalise each prefix after the cut. A prefix that is all zeros stays so.
    cv : int, float, splitter or iterable of splits
        How thresholds see rows that their heads did not: an int is the number of stratified folds,
        whose out-of-fold probabilities make every row a held-out one at the cost of fitting so
        many more heads; a float is the share held out once. Then the heads are fitted again, on
        all rows.
    tolerance, margin, rule, cost
        See `nestvec.classify.choose_thresholds`.
    random_state
        Seed of the folds.

    Attributes
    ----------
    classes_ : (n_classes,)
    dims_ : tuple of int
    heads_ : list of fitted classifiers, one a size, of class numbers
    thresholds_ : (n_dims,) float64
        Infinity: no row stops there and the size is not computed. The last is 0.
    held_out_ : AdaptiveReport
        What the thresholds were chosen on.
    n_features_in_
    space_
        Where the Embeddings live it was fitted on; None for arrays, which do not say.

    Notes
    -----
    Adaptive classification: Kusupati et al. 2022, arXiv 2205.13147. What we do differently: the
    thresholds are chosen together for the fewest dims rather than one by one for accuracy, with a
    margin for luck, and on out-of-fold rows (``rule="paper"`` has the paper's own).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> y = rng.integers(3, size=300)
    >>> X = rng.normal(size=(300, 32)) + 4 * np.eye(3, 32)[y]
    >>> fitted = AdaptiveClassifier(dims=(4, 32), tolerance=0.02).fit(X, y)
    >>> bool(fitted.score(X, y) > 0.9), bool(fitted.dims_used(X).mean() < 32)
    (True, True)
    """

    n_features_in_: int
    classes_: NDArray[Any]
    dims_: tuple[int, ...]
    heads_: list[Any]
    thresholds_: NDArray[np.float64]
    held_out_: AdaptiveReport
    space_: Space | None

    def __init__(
        self,
        dims: Any = None,
        *,
        base: Any = None,
        normalise: Any = True,
        cv: Any = 5,
        tolerance: Any = 0.0,
        margin: Any = 0.5,
        rule: Any = "sparing",
        cost: Any = "stop",
        random_state: Any = 0,
    ) -> None:
        self.dims = dims
        self.base = base
        self.normalise = normalise
        self.cv = cv
        self.tolerance = tolerance
        self.margin = margin
        self.rule = rule
        self.cost = cost
        self.random_state = random_state

    def fit(
        self, X: Any, y: Any, *, X_holdout: Any = None, y_holdout: Any = None
    ) -> AdaptiveClassifier:
        """Fit a head a size, and choose where rows stop.

        Parameters
        ----------
        X : (n, dim) array or Embeddings
            At full size.
        y : (n,)
            Classes, of any type that can be sorted.
        X_holdout, y_holdout
            Rows to choose the thresholds on, instead of ``cv``.

        Raises
        ------
        DataError
            NaN, Inf; one class; not one label a row; a class with fewer rows than folds; a
            held-out label that training does not have.
        DimensionError
            If a size does not fit.
        SpaceMismatchError
            If the held-out rows live in another Space.
        """
        settings = {name: getattr(self, name) for name in ("rule", "tolerance", "margin", "cost")}
        check_settings(**settings)
        rows = self._take(X, reset=True)
        labels = self._read_classes(y, len(rows))
        self.dims_ = self._sizes(X)
        if (X_holdout is None) != (y_holdout is None):
            raise DataError("X_holdout and y_holdout go together; one of them is missing.")
        if X_holdout is None:
            confidence, hits = self._out_of_fold(rows, labels)
            self.heads_ = [self._fitted(self._cut(rows, d), labels) for d in self.dims_]
        else:
            held = self._take(X_holdout, reset=False)
            truth = self._places(y_holdout, len(held), "y_holdout")
            if (truth < 0).any():
                row = int(np.argmax(truth < 0))
                label = np.asarray(y_holdout)[row].item()
                raise DataError(
                    f"y_holdout: row {row} has the label {label!r}, which no row of y has. Drop "
                    f"such rows."
                )
            self.heads_ = [self._fitted(self._cut(rows, d), labels) for d in self.dims_]
            confidence, hits = self._every_size(held, truth)
        self.thresholds_ = find_thresholds(confidence, hits, self.dims_, **settings)
        place = stops(confidence, self.thresholds_)
        self.held_out_ = report_of(hits, place, self.dims_, self.thresholds_)
        return self

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the class of each row, (n,)."""
        probabilities, _ = self._cascade(X)
        return self.classes_[probabilities.argmax(axis=1)]

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Return (n, n_classes) float64: what the size says at which each row stopped."""
        return self._cascade(X)[0]

    def dims_used(self, X: Any) -> NDArray[np.int64]:
        """Return the size at which each row stopped, (n,) int64."""
        _, place = self._cascade(X)
        return np.array(self.dims_, np.int64)[place]

    def report(self, X: Any, y: Any, *, n_resamples: int = 2000, seed: int = 0) -> AdaptiveReport:
        """Measure on test rows: the cascade beside every size alone, with 95% intervals.

        Computes every size of every row. A label that training does not have counts as wrong.
        """
        check_is_fitted(self)
        rows = self._take(X, reset=False)
        confidence, hits = self._every_size(rows, self._places(y, len(rows), "y"))
        place = stops(confidence, self.thresholds_)
        return report_of(
            hits, place, self.dims_, self.thresholds_, n_resamples=n_resamples, seed=seed
        )

    def _cascade(self, X: Any) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        check_is_fitted(self)
        rows = self._take(X, reset=False)
        found = np.empty((len(rows), len(self.classes_)))
        place = np.empty(len(rows), np.int64)
        left = np.arange(len(rows))
        for k, (dim, head, sure) in enumerate(
            zip(self.dims_, self.heads_, self.thresholds_, strict=True)
        ):
            if not len(left) or np.isinf(sure):
                continue
            said = head.predict_proba(self._cut(rows[left], dim))
            stop = said.max(axis=1) >= sure
            found[left[stop]], place[left[stop]] = said[stop], k
            left = left[~stop]
        return found, place

    def _every_size(
        self, rows: Matrix, truth: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return how sure each head is, and whether it is right, both (n_dims, n)."""
        sizes = zip(self.dims_, self.heads_, strict=True)
        said = [head.predict_proba(self._cut(rows, dim)) for dim, head in sizes]
        confidence = np.stack([p.max(axis=1) for p in said]).astype(np.float64)
        return confidence, np.stack([p.argmax(axis=1) == truth for p in said])

    def _out_of_fold(
        self, rows: Matrix, labels: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return the same of heads that did not see the rows."""
        splits = self._splits(rows, labels)
        confidence, hits = [], []
        for dim in self.dims_:
            cut = self._cut(rows, dim)
            for train, test in splits:
                head = self._fitted(cut[train], labels[train])
                said = head.predict_proba(cut[test])
                confidence.append(said.max(axis=1))
                hits.append(head.classes_[said.argmax(axis=1)] == labels[test])
        shape = (len(self.dims_), -1)
        return (
            np.concatenate(confidence).astype(np.float64).reshape(shape),
            np.concatenate(hits).reshape(shape),
        )

    def _splits(self, rows: Matrix, labels: NDArray[np.int64]) -> list[Any]:
        cv: Any = self.cv
        once = isinstance(cv, float)
        if not once and not isinstance(cv, int | np.integer):
            given: Any = check_cv(cv, labels, classifier=True)
            return list(given.split(rows, labels))
        if not (0 < cv < 1 if once else cv >= 2):
            raise DataError(
                f"cv={cv!r} does not fit: a number of folds from 2, or a share in (0, 1)."
            )
        counts = np.bincount(labels)
        least, needed = int(counts.argmin()), 2 if once else int(cv)
        if counts[least] < needed:
            raise DataError(
                f"y: class {self.classes_[least].item()!r} has {counts[least]} rows, and cv={cv!r} "
                f"needs {needed} of each class. Pass a smaller cv, or X_holdout and y_holdout."
            )
        folds: Any = (
            StratifiedShuffleSplit(1, test_size=cv, random_state=self.random_state)
            if once
            else StratifiedKFold(int(cv), shuffle=True, random_state=self.random_state)
        )
        try:
            return list(folds.split(rows, labels))
        except ValueError as error:  # a share that leaves a class out on one side
            raise DataError(f"cv={cv!r} does not fit these {len(labels)} rows: {error}") from error

    def _fitted(self, cut: Matrix, labels: NDArray[np.int64]) -> Any:
        base = LogisticRegression(C=10, max_iter=1000) if self.base is None else self.base
        if not hasattr(base, "predict_proba"):
            raise ModelError(
                f"base={base!r} has no predict_proba, so it cannot say how sure it is. Wrap it: "
                f"sklearn.calibration.CalibratedClassifierCV(base)."
            )
        head: Any = clone(base)
        return head.fit(cut, labels)

    def _cut(self, rows: Matrix, dim: int) -> Matrix:
        cut = rows[:, :dim]
        if not self.normalise:
            return cut
        lengths = _checks.row_lengths(cut)[:, None]
        return (cut / np.where(lengths > 0, lengths, 1)).astype(np.float32)

    def _sizes(self, X: Any) -> tuple[int, ...]:
        full, dims = self.n_features_in_, self.dims
        if dims is None:
            dims = (X.space.nesting_dims if isinstance(X, Embeddings) else ()) or halving(full)
        return tuple(sorted({*parse_dims(dims, full=full), full}))

    def _take(self, X: Any, *, reset: bool) -> Matrix:
        """Return the matrix of an array or of Embeddings, checked; remember or check the Space."""
        array: Any = X
        space = None
        if isinstance(X, Embeddings):
            array, space = X.array, X.space
        if reset:
            self.space_ = space
        elif space is not None and self.space_ is not None:
            self.space_.check_same(space)
        array = validate_data(self, X=array, reset=reset, dtype="numeric", ensure_all_finite=False)
        if np.iscomplexobj(array):
            raise DataError("Complex data not supported")
        return _checks.as_matrix(array, name="X", allow_zero_rows=True)

    def _read_classes(self, y: Any, n: int) -> NDArray[np.int64]:
        """Learn the classes; return each row's place among them."""
        try:
            labels = column_or_1d(y, warn=True)
            check_classification_targets(labels)
            self.classes_, found = np.unique(labels, return_inverse=True)
        except (TypeError, ValueError) as error:
            raise DataError(f"y: {error}") from error
        if len(labels) != n:
            raise DataError(f"y: {len(labels)} labels for {n} rows; one label a row is needed.")
        if len(self.classes_) < 2:
            raise DataError(
                f"y: one class only ({self.classes_[0].item()!r}); two classes are needed."
            )
        return found

    def _places(self, y: Any, n: int, name: str) -> NDArray[np.int64]:
        """Return each row's place among the classes, -1 for a label that training does not have."""
        labels = np.asarray(y)
        if labels.shape != (n,):
            raise DataError(
                f"{name}: shape {labels.shape} for {n} rows; one label a row is needed."
            )
        seen = np.isin(labels, self.classes_)
        if not seen.any():
            raise DataError(
                f"{name}: no row is of a class that was trained. Labels are like "
                f"{labels[0].item()!r}, and the classes like {self.classes_[0].item()!r}; pass "
                f"labels of the same classes and of one type."
            )
        places = np.full(n, -1, np.int64)
        places[seen] = np.searchsorted(self.classes_, labels[seen])
        return places
