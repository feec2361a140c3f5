"""A cascade does what a loop over rows does, and its thresholds are the best there are."""

import itertools

import numpy as np
import pytest

from nestvec.classify import apply_cascade, choose_thresholds, score_cascade
from nestvec.errors import DataError, DimensionError

pytestmark = pytest.mark.usefixtures("one_blas_thread")

DIMS = (8, 16, 64)


def heads(rng, n=400, n_classes=5, dims=DIMS):
    """Probabilities that are the better, and the surer, the larger the size."""
    y = rng.integers(n_classes, size=n)
    hard = rng.exponential(size=(n, 1))
    found = {}
    for d in dims:
        logits = rng.normal(size=(n, n_classes)) * (1 + 3 * hard / np.sqrt(d))
        logits += 5 * np.sqrt(d / dims[-1]) * np.eye(n_classes)[y]
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        found[d] = odds / odds.sum(axis=1, keepdims=True)
    return found, y


def cascade_by_hand(probabilities, thresholds):
    """Walk each row up the sizes; return its class, size and dims multiplied on the way."""
    walked = []
    for row in range(len(next(iter(probabilities.values())))):
        spent = 0
        for d, sure in zip(probabilities, thresholds, strict=True):
            if sure == np.inf:
                continue
            spent += d
            if max(probabilities[d][row]) >= sure or d == max(probabilities):
                walked.append((int(np.argmax(probabilities[d][row])), d, spent))
                break
    return [np.array(column) for column in zip(*walked, strict=True)]


def all_thresholds(probabilities, y, levels):
    """Every combination of levels and of skipped sizes: right answers, dims, accumulated dims."""
    choices = [*levels, np.inf]
    for chosen in itertools.product(choices, repeat=len(probabilities) - 1):
        answer, dim, spent = cascade_by_hand(probabilities, [*chosen, 0])
        yield int((answer == y).sum()), dim.mean(), spent.mean()


@pytest.mark.parametrize("cost", ["stop", "accumulated"])
def test_a_cascade_is_a_walk_up_the_sizes_row_by_row(rng, cost):
    probabilities, y = heads(rng)
    found = choose_thresholds(probabilities, y, cost=cost, tolerance=0.02)
    fresh, truth = heads(rng)
    for said, right, report in (
        (probabilities, y, found),
        (fresh, truth, score_cascade(fresh, truth, found.thresholds)),
    ):
        answer, dim, spent = cascade_by_hand(said, found.thresholds)
        got, place = apply_cascade(said, found.thresholds)
        np.testing.assert_array_equal(got, answer)
        np.testing.assert_array_equal(np.array(DIMS)[place], dim)
        assert report.accuracy == pytest.approx((answer == right).mean())
        assert report.expected_dim == pytest.approx(dim.mean())
        assert report.accumulated_dim == pytest.approx(spent.mean())
        np.testing.assert_allclose(report.shares, [(dim == d).mean() for d in DIMS])
        alone = [(said[d].argmax(axis=1) == right).mean() for d in DIMS]
        np.testing.assert_allclose(report.accuracies, alone)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("cost", ["stop", "accumulated"])
def test_no_thresholds_of_the_grid_are_cheaper_at_that_accuracy(seed, cost):
    probabilities, y = heads(np.random.default_rng(seed), n=60)
    levels = np.linspace(0, 1, 7)
    met = list(all_thresholds(probabilities, y, levels))
    for tolerance in (0, 0.02, 0.1):
        found = choose_thresholds(
            probabilities, y, tolerance=tolerance, margin=0, cost=cost, grid=7
        )
        needed = (found.full_accuracy - tolerance) * len(y) - 1e-6
        best = min(m[1 if cost == "stop" else 2] for m in met if m[0] >= needed)
        assert (found.expected_dim if cost == "stop" else found.accumulated_dim) <= best + 1e-9
        assert found.accuracy >= found.full_accuracy - tolerance - 1e-9


@pytest.mark.parametrize("margin", [0, 0.5, 2])
@pytest.mark.parametrize("cost", ["stop", "accumulated"])
def test_what_is_asked_is_kept_and_asking_for_less_never_costs_more(rng, margin, cost):
    probabilities, y = heads(rng)
    last = np.inf
    for tolerance in (0, 0.001, 0.005, 0.01, 0.03, 0.1, 0.5):
        found = choose_thresholds(probabilities, y, tolerance=tolerance, margin=margin, cost=cost)
        assert found.difference >= -tolerance - 1e-9
        spent = found.expected_dim if cost == "stop" else found.accumulated_dim
        assert spent <= last
        last = spent
        answer, _ = apply_cascade(probabilities, found.thresholds)
        full = probabilities[DIMS[-1]].argmax(axis=1) == y
        split = int(((answer == y) != full).sum())
        if found.shares[-1] < 1:
            lowest = found.difference * len(y) - margin * np.sqrt(split + 1)
            assert lowest >= -tolerance * len(y) - 1e-5


def test_a_margin_loses_less_on_fresh_rows(rng):
    lost = {0: [], 0.5: []}
    for _ in range(20):
        probabilities, y = heads(rng, n=200)
        fresh, truth = heads(rng, n=2000)
        for margin, differences in lost.items():
            found = choose_thresholds(probabilities, y, margin=margin)
            report = score_cascade(fresh, truth, found.thresholds, n_resamples=10)
            differences.append(report.difference)
    assert np.mean(lost[0]) < np.mean(lost[0.5]) <= 0.001


def test_the_paper_s_rule_takes_the_smallest_of_the_best_values_of_each_pair(rng):
    probabilities, y = heads(rng)
    found = choose_thresholds(probabilities, y, rule="paper", grid=50)
    for d, larger, got in zip(DIMS, DIMS[1:], found.thresholds, strict=False):
        pair = {d: probabilities[d], larger: probabilities[larger]}
        right = [
            (cascade_by_hand(pair, [t, 0])[0] == y).sum() for t in np.linspace(0, 1, 50)
        ]  # the first of equals is the smallest
        assert got == np.linspace(0, 1, 50)[int(np.argmax(right))]


def test_our_rule_is_never_dearer_than_the_paper_s_at_what_that_loses(rng):
    for _ in range(10):
        probabilities, y = heads(rng)
        paper = choose_thresholds(probabilities, y, rule="paper")
        allowed = max(0.0, -paper.difference)
        ours = choose_thresholds(probabilities, y, margin=0, tolerance=allowed)
        assert ours.expected_dim <= paper.expected_dim
        assert ours.difference >= -allowed - 1e-9


def test_threshold_0_stops_all_at_the_first_size_and_above_1_none_before_the_last(rng):
    probabilities, y = heads(rng)
    first = score_cascade(probabilities, y, [0, 0, 0])
    assert (first.expected_dim, first.accumulated_dim) == (8, 8)
    assert first.accuracy == first.accuracies[0]
    answer, place = apply_cascade(probabilities, [1.01, 1.01, 1.01])
    np.testing.assert_array_equal(answer, probabilities[64].argmax(axis=1))
    assert (place == 2).all()
    last = score_cascade(probabilities, y, [1.01, 1.01, 1.01])
    assert (last.expected_dim, last.accumulated_dim) == (64, 88)
    assert (last.difference, last.difference_low, last.difference_high) == (0, 0, 0)
    skipped = score_cascade(probabilities, y, [np.inf, np.inf, np.inf])
    assert skipped.accumulated_dim == 64


def test_the_interval_is_that_of_the_paired_difference(rng):
    probabilities, y = heads(rng, n=1000)
    found = score_cascade(probabilities, y, [0.6, 0.6, 0])
    answer, _ = apply_cascade(probabilities, [0.6, 0.6, 0])
    each = (answer == y).astype(float) - (probabilities[64].argmax(axis=1) == y)
    assert found.difference == pytest.approx(each.mean())
    low, high = np.array([found.difference_low, found.difference_high], float)
    assert high - low == pytest.approx(2 * 1.96 * each.std() / np.sqrt(len(each)), rel=0.1)
    assert low < found.difference < high


def test_an_array_with_its_sizes_is_the_mapping(rng):
    probabilities, y = heads(rng)
    stacked = np.stack(list(probabilities.values()))
    assert choose_thresholds(stacked, y, DIMS) == choose_thresholds(probabilities, y)
    some = choose_thresholds(probabilities, y, (8, 64))
    assert some == choose_thresholds(stacked[[0, 2]], y, (8, 64))


def test_ties_all_stop_or_none_do(rng):
    y = rng.integers(2, size=50)
    sure = np.where(y[:, None] == [0, 1], 0.9, 0.1)
    half = sure.copy()
    half[:10] = half[:10, ::-1]  # as sure, and wrong
    found = choose_thresholds({4: half, 8: sure}, y, margin=0)
    assert found.shares == (0, 1)
    assert choose_thresholds({4: half, 8: sure}, y, margin=0, tolerance=0.2).shares == (1, 0)


def test_one_size_is_a_cascade_that_always_answers(rng):
    probabilities, y = heads(rng, dims=(8,))
    assert choose_thresholds(probabilities, y).thresholds == (0,)


def test_a_report_reads_as_a_table_and_as_json(rng):
    probabilities, y = heads(rng)
    found = score_cascade(probabilities, y, [np.inf, 0.7, 0])
    text = str(found)
    assert "skipped" in text
    assert f"{found.expected_dim:.1f} expected dims of 64" in text
    values = found.to_dict()
    assert values["thresholds"] == [None, 0.7, 0]
    assert values["full_accuracy"] == found.accuracies[-1]


LOGITS = {2: [[2.0, -1.0]], 4: [[2.0, -1.0]]}
EVEN = {2: [[0.5, 0.5]] * 3, 4: [[0.9, 0.1]] * 3}


@pytest.mark.parametrize(
    ("given", "y", "message"),
    [
        (LOGITS, [0], "row 0 is no row of probabilities .* Pass the softmax"),
        ({2: [[np.nan, 1.0]]}, [0], "row 0 is no row of probabilities"),
        ({2: [[1.0], [1.0]]}, [0, 0], "one class only"),
        ({2: [[0.5, 0.5]], 4: [[0.5, 0.5]] * 2}, [0], "the same rows and classes"),
        (EVEN, [0, 1], "one label a row"),
        (EVEN, [0, 1, 2], "row 2 has label 2, which is no column"),
        (EVEN, [0, 1, -1], "row 2 has label -1"),
        (EVEN, [0.0, 1.0, 0.0], "expected column numbers from 0 to 1"),
        ({}, [0], "nesting dims"),
    ],
)
def test_what_is_no_probability_or_no_label_is_refused(given, y, message):
    with pytest.raises(DataError, match=message):
        choose_thresholds(given, y)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": -0.1}, r"not in \[0, 1\)"),
        ({"tolerance": 1}, r"not in \[0, 1\)"),
        ({"margin": -1}, "0 or more standard errors"),
        ({"grid": 1}, "at least two"),
        ({"rule": "paper", "tolerance": 0.1}, "the paper's rule knows none"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(settings, message):
    with pytest.raises(DataError, match=message):
        choose_thresholds(EVEN, [0, 0, 1], **settings)


def test_sizes_and_thresholds_that_do_not_fit_are_refused():
    with pytest.raises(DimensionError, match="without their sizes"):
        choose_thresholds(list(EVEN.values()), [0, 0, 0])
    with pytest.raises(DimensionError, match="3 sizes for 2 arrays"):
        choose_thresholds(list(EVEN.values()), [0, 0, 0], (2, 4, 8))
    with pytest.raises(DimensionError, match="no probabilities for 8 dims"):
        choose_thresholds(EVEN, [0, 0, 0], (2, 8))
    for wrong in ([0.5], [np.nan, 0]):
        with pytest.raises(DataError, match="expected 2 numbers"):
            apply_cascade(EVEN, wrong)
    assert score_cascade(EVEN, [0, 1, -1], [0.9, 0]).accuracy == pytest.approx(1 / 3)
