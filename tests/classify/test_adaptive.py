"""The estimator: scikit-learn's rules, the saving, and what it refuses."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

import nestvec as nv
from nestvec.classify import AdaptiveClassifier, choose_thresholds
from nestvec.errors import DataError, DimensionError, ModelError, SpaceMismatchError

pytestmark = pytest.mark.usefixtures("one_blas_thread")

DIMS = (4, 8, 32)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # scikit-learn's own
@parametrize_with_checks([AdaptiveClassifier(cv=2), AdaptiveClassifier(cv=2, normalise=False)])
def test_scikit_learn_accepts(estimator, check):
    check(estimator)


def nested(rng, n=600, n_classes=6, dim=32):
    """Rows whose first dims say the most about their class, in part too little."""
    y = rng.integers(n_classes, size=n)
    centres = np.random.default_rng(5).normal(size=(n_classes, dim)) / np.sqrt(
        np.arange(1, dim + 1)
    )
    return (centres[y] * 2 + rng.normal(size=(n, dim)) * 0.7).astype(np.float32), y


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


class Counting(LogisticRegression):
    """Remembers the shape of all it was asked."""

    asked: list = []  # noqa: RUF012

    def predict_proba(self, X):
        self.asked.append(X.shape)
        return super().predict_proba(X)


@pytest.fixture
def fitted(rng):
    return AdaptiveClassifier(DIMS, tolerance=0.01).fit(*nested(rng))


def test_prediction_is_a_walk_up_the_sizes_row_by_row(rng, fitted):
    X, _ = nested(rng, 100)
    classes, dims, said = fitted.predict(X), fitted.dims_used(X), fitted.predict_proba(X)
    assert len(np.unique(dims)) > 1
    for row, x in enumerate(X):
        d, p = 0, np.zeros(6)
        for d, head, sure in zip(DIMS, fitted.heads_, fitted.thresholds_, strict=True):
            p = head.predict_proba(unit(x[None, :d]))[0]
            if p.max() >= sure or d == DIMS[-1]:
                break
        assert dims[row] == d
        assert classes[row] == fitted.classes_[p.argmax()]
        np.testing.assert_allclose(said[row], p, atol=1e-6)


def test_only_rows_that_did_not_stop_are_computed_at_larger_sizes(rng):
    X, y = nested(rng)
    fitted = AdaptiveClassifier(DIMS, base=Counting(), tolerance=0.05, margin=0).fit(X, y)
    fresh, _ = nested(rng, 200)
    Counting.asked.clear()
    used = fitted.dims_used(fresh)
    computed = [d for d, t in zip(DIMS, fitted.thresholds_, strict=True) if np.isfinite(t)]
    assert Counting.asked == [((used >= d).sum(), d) for d in computed]
    Counting.asked.clear()
    fitted.thresholds_ = np.array([np.inf, 0.0, 0.0])
    fitted.predict(fresh)
    assert Counting.asked == [(200, 8)]


def test_thresholds_come_from_rows_that_their_heads_did_not_see(rng):
    X, y = nested(rng)
    folds = KFold(3)
    fitted = AdaptiveClassifier(DIMS, cv=folds, tolerance=0.01).fit(X, y)
    head = LogisticRegression(C=10, max_iter=1000)
    said = {
        d: cross_val_predict(head, unit(X[:, :d]), y, cv=folds, method="predict_proba")
        for d in DIMS
    }
    expected = choose_thresholds(said, y, tolerance=0.01)
    np.testing.assert_allclose(fitted.thresholds_, expected.thresholds, rtol=1e-4)
    assert fitted.held_out_.shares == expected.shares
    assert fitted.held_out_.difference_low is None
    for d, mine in zip(DIMS, fitted.heads_, strict=True):
        alone = LogisticRegression(C=10, max_iter=1000).fit(unit(X[:, :d]), y).coef_
        np.testing.assert_allclose(mine.coef_, alone, rtol=1e-2, atol=1e-2)


def test_rows_held_out_by_hand_set_the_thresholds(rng):
    (X, y), (held, truth) = nested(rng), nested(rng, 300)
    fitted = AdaptiveClassifier(DIMS, tolerance=0.01).fit(X, y, X_holdout=held, y_holdout=truth)
    said = {
        d: head.predict_proba(unit(held[:, :d]))
        for d, head in zip(DIMS, fitted.heads_, strict=True)
    }
    expected = choose_thresholds(said, truth, tolerance=0.01)
    np.testing.assert_allclose(fitted.thresholds_, expected.thresholds, rtol=1e-4)
    assert fitted.held_out_.shares == expected.shares
    assert AdaptiveClassifier(DIMS, cv=0.25).fit(X, y).held_out_.n == len(X) // 4


def test_a_cascade_is_as_good_as_the_full_size_for_fewer_dims(rng, fitted):
    X, y = nested(rng, 2000)
    found = fitted.report(X, y)
    assert found.accuracy == fitted.score(X, y)
    assert found.expected_dim == fitted.dims_used(X).mean()
    assert found.expected_dim < 24
    assert found.difference > -0.02
    assert found.difference_low < found.difference < found.difference_high


def test_the_same_seed_gives_the_same_thresholds_and_any_labels_will_do(rng):
    X, y = nested(rng)
    names = np.array(["oak", "ash", "elm", "fir", "yew", "box"])
    a, b = (AdaptiveClassifier(DIMS).fit(X, labels) for labels in (names[y], names[y].tolist()))
    np.testing.assert_array_equal(a.thresholds_, b.thresholds_)
    assert set(a.predict(X)) <= set(names)
    assert a.classes_.tolist() == sorted(names)
    assert a.score(X, names[y]) > 0.5


def test_the_paper_s_rule_and_the_accumulated_cost_can_be_asked_for(rng):
    X, y = nested(rng)
    paper = AdaptiveClassifier(DIMS, rule="paper").fit(X, y)
    assert np.isin(paper.thresholds_, np.linspace(0, 1, 100)).all()
    stop, accumulated = (
        AdaptiveClassifier(DIMS, cost=cost, tolerance=0.02).fit(X, y).held_out_
        for cost in ("stop", "accumulated")
    )
    assert accumulated.accumulated_dim <= stop.accumulated_dim
    assert stop.expected_dim <= accumulated.expected_dim


def test_embeddings_bring_their_sizes_and_another_space_is_refused(rng):
    X, y = nested(rng)
    space = nv.Space.declared("m", dim=32, nesting_dims=DIMS)
    fitted = AdaptiveClassifier().fit(nv.Embeddings(unit(X), space), y)
    assert fitted.dims_ == DIMS
    np.testing.assert_array_equal(
        fitted.predict(nv.Embeddings(unit(X), space)), fitted.predict(unit(X))
    )
    other = nv.Embeddings(unit(X), nv.Space.declared("other", dim=32))
    for call in (fitted.predict, fitted.dims_used, lambda x: fitted.report(x, y)):
        with pytest.raises(SpaceMismatchError):
            call(other)
    with pytest.raises(SpaceMismatchError):
        fitted.fit(nv.Embeddings(unit(X), space), y, X_holdout=other, y_holdout=y)


def test_it_stands_at_the_end_of_a_pipeline_behind_a_rotation(rng):
    X, y = nested(rng)
    pipeline = make_pipeline(nv.PrincipalRotation(), AdaptiveClassifier(DIMS)).fit(X, y)
    assert pipeline.score(X, y) > 0.5


def test_a_prefix_of_zeros_goes_on_to_a_larger_size(rng, fitted):
    X, _ = nested(rng, 20)
    X[3, :8] = 0
    assert fitted.dims_used(X)[3] == 32


def test_sizes_are_sorted_once_each_and_the_full_size_is_among_them(rng):
    X, y = nested(rng, 100)
    assert AdaptiveClassifier("16, 4,4").fit(X, y).dims_ == (4, 16, 32)
    assert AdaptiveClassifier().fit(X, y).dims_ == (16, 32)
    with pytest.raises(DimensionError, match="64 does not fit embeddings of dim 32"):
        AdaptiveClassifier((8, 64)).fit(X, y)


def test_labels_that_do_not_fit_are_refused(rng):
    X, y = nested(rng, 60)
    with pytest.raises(DataError, match="one class only"):
        AdaptiveClassifier().fit(X, np.zeros(60, int))
    with pytest.raises(DataError, match="59 labels for 60 rows"):
        AdaptiveClassifier().fit(X, y[:-1])
    rare = np.where(np.arange(60) < 3, "rare", "common")
    with pytest.raises(DataError, match="class 'rare' has 3 rows, and cv=5 needs 5"):
        AdaptiveClassifier().fit(X, rare)
    with pytest.raises(DataError, match=r"cv=1\.5 does not fit"):
        AdaptiveClassifier(cv=1.5).fit(X, y)
    with pytest.raises(DataError, match="one of them is missing"):
        AdaptiveClassifier().fit(X, y, X_holdout=X)
    with pytest.raises(DataError, match="row 2 has the label 9, which no row of y has"):
        AdaptiveClassifier().fit(X, y, X_holdout=X[:3], y_holdout=[0, 1, 9])


def test_a_label_without_training_rows_counts_as_wrong(rng, fitted):
    X, y = nested(rng, 100)
    known = fitted.report(X, y).accuracy
    y[: len(y) // 2] = 77
    assert 0 < fitted.report(X, y).accuracy < known
    with pytest.raises(DataError, match="no row is of a class that was trained"):
        fitted.report(X, y.astype(str))
    with pytest.raises(DataError, match="one label a row"):
        fitted.report(X, y[:-1])


def test_vectors_and_settings_that_do_not_fit_are_refused(rng, fitted):
    X, y = nested(rng, 60)
    bad = X.copy()
    bad[7, 3] = np.nan
    for call in (fitted.predict, lambda x: AdaptiveClassifier().fit(x, y)):
        with pytest.raises(DataError, match="row 7 holds NaN"):
            call(bad)
    with pytest.raises(ModelError, match="no predict_proba"):
        AdaptiveClassifier(base=RidgeClassifier()).fit(X, y)
    with pytest.raises(DataError, match="rule='fast': choose 'sparing' or 'paper'"):
        AdaptiveClassifier(rule="fast").fit(X, y)
    with pytest.raises(DataError, match="cost='time'"):
        AdaptiveClassifier(cost="time").fit(X, y)
