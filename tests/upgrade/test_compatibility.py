"""AC and AM by hand, and a series of models asked on the galleries before them."""

import numpy as np
import pytest

from nestvec.errors import DataError
from nestvec.maps import ProcrustesBridge
from nestvec.maps.guard import unit
from nestvec.space import Embeddings, Space
from nestvec.upgrade import CompatibilityMatrix, compatibility_matrix


def test_ac_and_am_by_hand():
    found = CompatibilityMatrix(
        [
            [0.50, 9.9, 9.9, 9.9],
            [0.55, 0.60, 9.9, 9.9],
            [0.50, 0.61, 0.70, 9.9],
            [0.40, 0.65, 0.69, 0.80],
        ]
    )
    # (1,0) wins, (2,0) ties, (3,0) loses, (2,1) and (3,1) win, (3,2) loses
    assert found.ac == pytest.approx(3 / 6)
    assert found.am == pytest.approx(
        (0.5 + 0.55 + 0.6 + 0.5 + 0.61 + 0.7 + 0.4 + 0.65 + 0.69 + 0.8) / 10
    )
    np.testing.assert_allclose(
        found.margins,
        [[0, 0, 0, 0], [0.05, 0, 0, 0], [0, 0.01, 0, 0], [-0.1, 0.05, -0.01, 0]],
        atol=1e-12,
    )
    assert found.to_dict()["ac"] == found.ac


@pytest.mark.parametrize(
    "values", [[[1.0]], [[1.0, 2.0]], [[1.0, 0.0], [np.nan, 1.0]]], ids=["one", "wide", "gap"]
)
def test_matrices_that_say_nothing_are_refused(values):
    with pytest.raises(DataError, match="compatibility matrix"):
        CompatibilityMatrix(values)


def series(rng, n_models=3):
    things = rng.normal(size=(60, 8))
    kinds = things[:, :2].argmax(axis=1)
    models = []
    for at in range(n_models):
        turn = np.linalg.qr(rng.normal(size=(8, 8)))[0]
        seen = unit(((things + 0.8 / (at + 1) * rng.normal(size=things.shape)) @ turn).astype("f4"))
        space = Space.declared(f"model-{at}", dim=8)
        models.append((Embeddings(seen[:40], space), Embeddings(seen[40:], space)))
    return models, kinds


def test_series_is_asked_model_by_model(rng):
    models, kinds = series(rng)
    bridges = {
        (i, j): ProcrustesBridge().fit(models[i][0], models[j][0])
        for i in range(3)
        for j in range(i)
    }
    labels = {"doc_labels": kinds[:40], "query_labels": kinds[40:]}
    whole = compatibility_matrix(models, bridges=bridges, **labels, k=3)
    found = whole.values
    by_query = np.zeros((3, 3, 20))
    for i in range(3):
        for j in range(i + 1):
            asks = bridges[i, j].transform(models[i][1]) if j < i else models[i][1]
            order = np.argsort(-(asks.array @ models[j][0].array.T), axis=1)[:, :3]
            by_query[i, j] = (kinds[:40][order] == kinds[40:, None]).mean(axis=1)
            assert found[i, j] == pytest.approx(by_query[i, j].mean())
    draws = rng.integers(20, size=(4000, 20))
    for i, j in ((1, 0), (2, 0), (2, 1)):
        margins = (by_query[i, j] - by_query[j, j])[draws].mean(axis=1)
        low, high = np.percentile(margins, [2.5, 97.5])
        assert (whole.low[i, j], whole.high[i, j]) == pytest.approx((low, high), abs=0.02)
    assert np.triu(whole.low).tolist() == np.triu(whole.high).tolist() == np.zeros((3, 3)).tolist()
    assert whole.to_dict()["margins_low"] == whole.low.tolist()


def test_series_at_a_size_cuts_both_sides(rng):
    models, kinds = series(rng, n_models=2)
    bridge = ProcrustesBridge(dims=(4,), nested=True).fit(models[1][0], models[0][0])
    labels = {"doc_labels": kinds[:40], "query_labels": kinds[40:]}
    cut = compatibility_matrix(models, bridges={(1, 0): bridge}, **labels, k=3, dim=4).values
    asks = unit(bridge.transform(models[1][1]).array[:, :4])
    order = np.argsort(-(asks @ unit(models[0][0].array[:, :4]).T), axis=1)[:, :3]
    assert cut[1, 0] == pytest.approx((kinds[:40][order] == kinds[40:, None]).mean())


def test_one_model_is_no_series(rng):
    with pytest.raises(DataError, match="1 model given"):
        compatibility_matrix(series(rng)[0][:1])
