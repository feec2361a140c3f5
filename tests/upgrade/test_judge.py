"""The judge calls safe what is safe, not what is wrong, and not what it cannot know."""

import json

import numpy as np
import pytest

import nestvec as nv
from nestvec.errors import DataError, SpaceMismatchError
from nestvec.maps import ProcrustesBridge
from nestvec.maps.guard import unit
from nestvec.measurement import metrics
from nestvec.space import Embeddings, Space
from nestvec.upgrade.judgement import Judgement, _at_size

pytestmark = [
    pytest.mark.usefixtures("one_blas_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
DIM, N_DOCS, N_QUERIES = 24, 400, 500
OLD, NEW = (Space.declared(name, dim=DIM, nesting_dims=(8, 16, DIM)) for name in ("old", "new"))
DOC_IDS = [f"d{i}" for i in range(N_DOCS)]
QUERY_IDS = [f"q{i}" for i in range(N_QUERIES)]


class World:
    """Documents and queries about hidden topics; models see them with more or less noise."""

    def __init__(self, rng, n_queries=N_QUERIES):
        self.rng = rng
        self.spread = np.linspace(1.5, 0.5, DIM)
        self.docs = rng.normal(size=(N_DOCS, DIM)) * self.spread
        self.about = rng.integers(N_DOCS, size=n_queries)
        self.queries = self.docs[self.about]
        self.sample = rng.normal(size=(600, DIM)) * self.spread
        self.query_ids = QUERY_IDS[:n_queries]
        self.qrels = {q: {DOC_IDS[d]: 1} for q, d in zip(self.query_ids, self.about, strict=True)}

    def model(self, space, *, noise=0.5, turn=None):
        """Return documents, queries and sample as a model with this much noise sees them."""
        turn = np.eye(DIM) if turn is None else turn

        def see(things, noise):
            seen = (things + noise * self.rng.normal(size=things.shape)) @ turn
            return unit(seen.astype(np.float32))

        return (
            Embeddings(see(self.docs, 0.1), space, DOC_IDS),
            Embeddings(see(self.queries, noise), space, self.query_ids),
            Embeddings(see(self.sample, 0.1), space),
        )


@pytest.fixture
def world(rng):
    return World(rng)


def rotation(rng):
    return np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]


def judged(old, new, bridge, **more):
    return nv.upgrade.judge(
        old_docs=old[0], old_queries=old[1], new_docs=new[0], new_queries=new[1], bridge=bridge,
        **more,
    )  # fmt: skip


def test_better_model_through_a_bridge_is_safe_and_better(world, rng):
    old = world.model(OLD, noise=1.0)
    new = world.model(NEW, noise=0.5, turn=rotation(rng))
    bridge = nv.upgrade.fit(old=old[2], new=new[2])
    found = judged(old, new, bridge, qrels=world.qrels)
    assert found.verdict == "safe"
    assert found.better
    assert found.sentence().startswith("safe (better): nDCG@10 of new queries on the old gallery")
    assert [size.dim for size in found.sizes] == [DIM, 16, 8]
    assert found.n_queries == N_QUERIES
    gain = found.sizes[0].update_gain
    assert gain is not None
    assert gain.value == pytest.approx(1, abs=0.1)
    assert gain.low <= gain.value <= gain.high
    json.dumps(found.to_dict())


def test_numbers_are_those_of_searching_by_hand(world, rng):
    old = world.model(OLD, noise=0.8)
    new = world.model(NEW, noise=0.8, turn=rotation(rng))
    bridge = nv.upgrade.fit(old=old[2], new=new[2])
    full = judged(old, new, bridge, qrels=world.qrels).sizes[0]
    moved = bridge.transform(new[1]).array

    def by_hand(queries, docs):
        order = np.argsort(-(queries @ docs.T), axis=1)[:, :10]
        rankings = [[DOC_IDS[d] for d in row] for row in order]
        return metrics.per_query(rankings, QUERY_IDS, world.qrels, ["nDCG@10"])["nDCG@10"]

    before, after = by_hand(old[1].array, old[0].array), by_hand(moved, old[0].array)
    assert full.old_old.value == pytest.approx(before.mean())
    assert full.new_old.value == pytest.approx(after.mean())
    assert full.new_new.value == pytest.approx(by_hand(new[1].array, new[0].array).mean())
    assert full.difference.value == pytest.approx((after - before).mean())
    assert full.negative_flips == (after < before - 1e-9).mean()
    assert full.positive_flips == (after > before + 1e-9).mean()
    assert full.at_least < full.difference.value


def test_violation_rates_are_those_of_brute_force(world, rng):
    old, new = world.model(OLD, noise=0.8), world.model(NEW, noise=0.8, turn=rotation(rng))
    bridge = nv.upgrade.fit(old=old[2], new=new[2])
    found = judged(old, new, bridge, qrels=world.qrels).sizes[1]  # cut to 16
    docs = unit(old[0].array[:, :16])
    asks, moved = (unit(q[:, :16]) for q in (old[1].array, bridge.transform(new[1]).array))
    relevant, other = [], []
    for q in range(N_QUERIES):
        for d in range(N_DOCS):
            if world.about[q] == d:
                relevant.append(moved[q] @ docs[d] < asks[q] @ docs[d])
            else:
                other.append(moved[q] @ docs[d] > asks[q] @ docs[d])
    assert found.violations_relevant == pytest.approx(np.mean(relevant), abs=1e-4)
    assert found.violations_other == pytest.approx(np.mean(other), abs=1e-4)


@pytest.mark.parametrize("with_qrels", [True, False], ids=["judged", "label-free"])
@pytest.mark.parametrize("wrong", ["another model", "shuffled pairs", "few pairs"])
def test_bad_upgrades_are_never_safe(wrong, with_qrels, world, rng):
    old = world.model(OLD)
    new = world.model(NEW, turn=rotation(rng))
    sample_old, sample_new = old[2], new[2]
    if wrong == "another model":
        noise = [rng.normal(size=side.array.shape) for side in new]
        new = tuple(
            side.replaced(unit(a.astype(np.float32)), NEW)
            for a, side in zip(noise, new, strict=True)
        )
        sample_new = new[2]
    elif wrong == "shuffled pairs":
        sample_new = sample_new[rng.permutation(len(sample_new))]
    else:
        sample_old, sample_new = sample_old[:12], sample_new[:12]
    bridge = nv.upgrade.fit(old=sample_old.array, new=sample_new.array)
    bridge.space_, bridge.target_ = NEW, OLD
    found = judged(old, new, bridge, qrels=world.qrels if with_qrels else None)
    assert found.verdict == "not safe"
    assert found.sizes[0].new_old.value < found.sizes[0].old_old.value
    assert found.sentence().startswith("not safe: ")


def test_queries_under_the_wrong_ids_are_not_safe(world, rng):
    old, new = world.model(OLD), world.model(NEW, turn=rotation(rng))
    bridge = nv.upgrade.fit(old=old[2], new=new[2])
    permuted = Embeddings(new[1].array[rng.permutation(N_QUERIES)], NEW, QUERY_IDS)
    assert not judged(old, (new[0], permuted), bridge, qrels=world.qrels).safe


def test_gallery_that_answers_nothing_proves_nothing(world, rng):
    old, new = world.model(OLD), world.model(NEW, turn=rotation(rng))
    bridge = nv.upgrade.fit(old=old[2], new=new[2])
    permuted = Embeddings(old[0].array[rng.permutation(N_DOCS)], OLD, DOC_IDS)
    found = judged((permuted, old[1]), new, bridge, qrels=world.qrels)
    assert found.verdict == "not safe"
    assert "find no more in the old gallery of 400 documents than chance" in found.sentence()


@pytest.mark.parametrize(("n_docs", "chance"), [(8, 1.0), (12, 10 / 12), (40, 10 / 40)])
def test_chance_is_that_of_different_documents(n_docs, chance, rng):
    """Of 8 documents the 10 nearest are all: noise finds them, and proves nothing."""
    old, noise = (
        [Embeddings(unit(rng.normal(size=(n, DIM)).astype("f4")), space) for n in (n_docs, 400)]
        for space in (OLD, NEW)
    )
    pairs = [unit(rng.normal(size=(60, DIM)).astype("f4")) for _ in range(2)]
    bridge = ProcrustesBridge().fit(Embeddings(pairs[0], NEW), Embeddings(pairs[1], OLD))
    found = judged(old, noise, bridge)
    assert found.chance == pytest.approx(chance, abs=0.02)
    assert found.verdict == "not safe"
    assert (n_docs == 8) == ("than chance does" in found.sentence())


def test_rounding_is_no_violation(world, rng):
    old = world.model(OLD)
    turn = rotation(rng).astype(np.float32)
    same = tuple(side.replaced(unit(side.array @ turn), NEW) for side in old)
    bridge = ProcrustesBridge().fit(same[2], old[2])
    found = judged(old, same, bridge, qrels=world.qrels)
    full = found.sizes[0]
    assert (full.violations_relevant, full.violations_other) == (0, 0)
    assert full.negative_flips == 0


def test_a_share_of_no_gain_is_not_told(rng):
    """The gain of re-embedding has to be one; the interval is that of a ratio drawn by hand."""
    values = rng.random((3, 400)) * 0.1 + np.array([[0.5], [0.52], [0.54]])
    found = _at_size(8, values, (0.0, 0.0), seed=3).update_gain
    assert found is not None
    draws = np.random.default_rng(0).integers(400, size=(4000, 400))
    old, bridged, new = (side[draws].mean(axis=1) for side in values)
    low, high = np.percentile((bridged - old) / (new - old), [2.5, 97.5])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)
    mean = values.mean(axis=1)
    assert found.value == pytest.approx((mean[1] - mean[0]) / (mean[2] - mean[0]))
    values[2] = values[0] + 0.05 * rng.normal(size=400)
    assert _at_size(8, values, (0.0, 0.0), seed=3).update_gain is None


def test_rotated_model_is_safe_without_labels_and_a_better_one_is_not(world, rng):
    old = world.model(OLD)
    turn = rotation(rng).astype(np.float32)
    same = tuple(side.replaced(unit(side.array @ turn), NEW) for side in old)
    bridge = nv.upgrade.fit(old=old[2], new=same[2])
    found = judged(old, same, bridge)
    assert found.metric == "old neighbours kept@10"
    assert found.verdict == "safe"
    assert not found.better
    other = world.model(NEW, noise=0.3, turn=turn)
    assert "Without labels only unchanged answers" in judged(old, other, bridge).sentence()


def test_few_queries_are_never_enough_even_if_nothing_changes(rng):
    world = World(rng, n_queries=200)
    old = world.model(OLD)
    turn = rotation(rng).astype(np.float32)
    same = tuple(side.replaced(unit(side.array @ turn), NEW) for side in old)
    bridge = nv.upgrade.fit(old=old[2], new=same[2])
    found = judged(old, same, bridge, qrels=world.qrels)
    assert found.sizes[0].difference.value == pytest.approx(0, abs=0.005)
    assert found.verdict == "not safe"
    assert "Too few queries" in found.sentence()


def test_bound_holds_at_few_queries_where_a_bootstrap_alone_would_not(rng):
    """Upgrades that lose 3% of queries entirely, judged by 60: safe at most 5 times in 100."""
    wrong_by_both = wrong_by_bootstrap = 0
    for seed in range(60):
        lost = np.random.default_rng(seed).random(60) < 0.03
        values = np.stack([np.ones(60), np.where(lost, 0.0, 1.0), np.ones(60)])
        size = _at_size(8, values, (0.0, 0.0), seed)
        wrong_by_both += size.safe
        wrong_by_bootstrap += size.difference.low > -0.01
    assert wrong_by_both == 0
    assert wrong_by_bootstrap > 3  # 0.97 ** 60 = 16% of samples show no loss at all


def test_sizes_are_safe_down_to_the_first_that_fails(rng):
    def verdict(*changes):
        sizes = []
        for dim, change in zip((32, 16, 8), changes, strict=True):
            old = 0.5 + 0.1 * rng.random(500)
            sizes.append(_at_size(dim, np.stack([old, old + change, old]), (0.0, 0.0), 0))
        return Judgement(tuple(sizes), "nDCG@10", "qrels", 500, 100, 0.0, None, ()).verdict

    assert verdict(0.1, 0.1, 0.1) == "safe"
    assert verdict(0.1, 0.1, -0.1) == "safe at >= 16 dims"
    assert verdict(0.1, -0.1, 0.1) == "safe at >= 32 dims"
    assert verdict(-0.1, 0.1, 0.1) == "not safe"


def test_queries_that_the_bridge_was_fitted_on_are_left_out(world, rng):
    old, new = world.model(OLD), world.model(NEW, turn=rotation(rng))
    bridge = nv.upgrade.fit(old=old[1][:100], new=new[1][:100])
    found = judged(old, new, bridge, qrels=world.qrels)
    assert found.n_queries == N_QUERIES - 100
    assert "100 queries are among the pairs" in found.notes[0]
    with pytest.raises(DataError, match="0 fresh queries"):
        judged(old, new, nv.upgrade.fit(old=old[1], new=new[1]), qrels=world.qrels)


def test_old_queries_that_a_moving_gallery_was_fitted_on_are_left_out(world, rng):
    old, new = world.model(OLD), world.model(NEW, turn=rotation(rng))
    bridge = nv.upgrade.fit(old=old[1][:100], new=new[1][:100], moves="gallery")
    found = judged(old, new, bridge, qrels=world.qrels)
    assert found.n_queries == N_QUERIES - 100
    assert "100 queries are among the pairs" in found.notes[0]


def test_gallery_may_be_what_moves(world, rng):
    old = world.model(OLD, noise=1.0)
    new = world.model(NEW, noise=0.5, turn=rotation(rng))
    bridge = nv.upgrade.fit(old=old[2], new=new[2], moves="gallery")
    assert judged(old, new, bridge, qrels=world.qrels).better


def test_compatible_model_needs_no_bridge(world):
    old = world.model(OLD, noise=1.0)
    holds = Space.declared("new", dim=DIM + 4, compatible_with=OLD.to_dict())
    new = [
        Embeddings(unit(np.pad(side.array, ((0, 0), (0, 4)), constant_values=0.1)), holds, side.ids)
        for side in world.model(OLD, noise=0.5)
    ]
    assert judged(old, new, None, qrels=world.qrels).better


def test_classes_may_be_the_truth(world, rng):
    kinds = world.docs[:, :3].argmax(axis=1)
    old = world.model(OLD, noise=1.0)
    new = world.model(NEW, noise=0.2, turn=rotation(rng))
    bridge = nv.upgrade.fit(old=old[2], new=new[2])
    found = judged(old, new, bridge, doc_labels=kinds, query_labels=kinds[world.about])
    assert found.metric == "same class@10"
    assert found.better
    order = np.argsort(-(old[1].array @ old[0].array.T), axis=1)[:, :10]
    by_hand = (kinds[order] == kinds[world.about][:, None]).mean()
    assert found.sizes[0].old_old.value == pytest.approx(by_hand)


def test_documents_are_paired_by_id(world, rng):
    old, new = world.model(OLD), world.model(NEW, turn=rotation(rng))
    bridge = nv.upgrade.fit(old=old[2], new=new[2])
    shuffled = (new[0][rng.permutation(N_DOCS)], new[1][rng.permutation(N_QUERIES)])
    one, other = (judged(old, n, bridge, qrels=world.qrels) for n in (new, shuffled))
    assert one.to_dict() == other.to_dict()


def test_spaces_that_do_not_meet_are_refused(world, rng):
    old, new = world.model(OLD), world.model(NEW)
    with pytest.raises(SpaceMismatchError, match=r"nestvec\.upgrade\.fit"):
        judged(old, new, None)
    bridge = nv.upgrade.fit(old=old[2], new=new[2])
    with pytest.raises(SpaceMismatchError):  # the new side mixes two models
        judged(old, (new[0], old[1]), bridge)
    third = world.model(Space.declared("third", dim=DIM))
    with pytest.raises(SpaceMismatchError):  # the bridge of another upgrade
        judged(old, third, bridge)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"qrels": {"q0": {"d0": 1}}, "doc_labels": [1], "query_labels": [1]}, "not by both"),
        ({"doc_labels": [1] * N_DOCS}, "labels are needed of both sides"),
        ({"doc_labels": [1], "query_labels": [1]}, r"doc_labels: shape \(1,\) for 400 rows"),
        ({"dims": (99,)}, r"dims \[99\] do not fit a gallery of 24"),
        ({"k": 0}, "k=0"),
        ({"qrels": {"q0": {"d0": 1}}}, "1 fresh queries with an answer are left of 500"),
    ],
)
def test_bad_input_says_what_would_fit(more, message, world):
    old, new = world.model(OLD), world.model(NEW)
    bridge = nv.upgrade.fit(old=old[2], new=new[2], kinds=["procrustes"])
    with pytest.raises(DataError, match=message):
        judged(old, new, bridge, **more)


def test_one_model_is_no_upgrade(world):
    old = world.model(OLD)
    with pytest.raises(DataError, match=r"both sides are of old .*no upgrade to judge"):
        judged(old, old, None, qrels=world.qrels)


def test_missing_documents_and_bare_arrays_are_refused(world):
    old, new = world.model(OLD), world.model(NEW)
    bridge = nv.upgrade.fit(old=old[2], new=new[2], kinds=["procrustes"])
    with pytest.raises(DataError, match="1 of the old docs have no vector by the new model"):
        judged(old, (new[0][1:], new[1]), bridge)
    with pytest.raises(DataError, match="old_docs is a ndarray"):
        judged((old[0].array, old[1]), new, bridge)
