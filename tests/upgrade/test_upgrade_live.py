"""An index under upgrade answers both models, loses nothing, and is always whole: old or new."""

import errno
import fcntl
import hashlib
import shutil
import threading
import time

import numpy as np
import pytest
import upgrade_writer as w
from upgrade_writer import IDS, batch, begin, bridge, create, embed, queries, space, vectors

import nestvec as nv
from nestvec.errors import (
    DataError,
    FileFormatError,
    PlanError,
    SpaceMismatchError,
    StorageError,
)
from nestvec.search import transition
from nestvec.search.index import Index
from nestvec.search.store import Store
from nestvec.upgrade import Upgrade, estimate, order
from nestvec.upgrade.estimating import sample_texts

# a thread that fails is a test that fails
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def index(tmp_path):
    return create(tmp_path / "x.nest")


@pytest.fixture
def upgrade(index):
    return begin(index)


def fill(upgrade, **options):
    model = int(upgrade.space.model.removeprefix("model-"))
    return upgrade.backfill(embed(model), column="text", **options)


def by_hand(index, model, asked, done, bridge, scale, passes, dim=None):
    """Score all rows, each by its own rule, and sort: (id, score) pairs a query.

    Old ones at ``dim``, where the plan ends.
    """

    def old(i, value):
        return w.normalise(w.row(model - 1, i, value)[None, :dim])[0]

    slope = scale.slope if dim is None else dict(scale.slopes)[dim]
    rows = {i: value for i, value in w.held(index).items() if passes(i)}
    old_asked = bridge.transform(asked).array
    answers = []
    for new_query, old_query in zip(asked.array, w.normalise(old_asked[:, :dim]), strict=True):
        # the sample: as good as its best 20 are for the one, they are for the other
        best = [sorted(w.row(model, i, 0) @ new_query for i in range(60))[-20:]]
        best += [sorted(old(i, 0) @ old_query for i in range(60))[-20:]]
        offset = np.mean(best[0]) - slope * np.mean(best[1])
        scored = []
        for i, value in rows.items():
            if i in done:
                score = w.row(model, i, value) @ new_query
            else:
                score = slope * (old(i, value) @ old_query) + offset
            scored.append((i, score))
        answers.append(sorted(scored, key=lambda pair: -pair[1]))
    return answers


def done_ids(upgrade):
    """What the new index holds that is true, found the slow way."""
    new, old = Index(upgrade.index._upgrading().new), upgrade.index
    table = new.get(
        [i for i in w.held(old) if i in _ids(new)], columns=["id", "of_row", "of_version"]
    )
    snapshot = old._home.store.snapshot
    keys = dict(zip(*(k.tolist() for k in snapshot.keys()), strict=True))
    return {row["id"] for row in table.to_pylist() if keys.get(row["of_row"]) == row["of_version"]}


def _ids(index):
    snapshot = index._home.snapshot()
    return set(snapshot.read(snapshot.keys().row_ids, ["id"])["id"].to_pylist())


def assert_as_by_hand(upgrade, k=10, filter=None, passes=lambda i: True, dim=None):
    index = upgrade.index
    model = w.model_of(index) + 1
    asked = queries(model)
    hits = index.search(asked, k, filter=filter, columns=["text"])
    wanted = by_hand(
        index, model, asked, done_ids(upgrade), upgrade.bridge, upgrade.calibration, passes, dim
    )
    for found, true, texts in zip(hits, wanted, hits.payload, strict=True):
        assert len(found) == min(k, len(true))
        np.testing.assert_allclose(
            [score for _, score in found], [score for _, score in true[:k]], atol=1e-5
        )
        ids = [i for i, _ in found]
        assert len(set(ids)) == len(ids), "a row twice"
        true_scores = dict(true)
        for (i, score), text in zip(found, texts["text"].to_pylist(), strict=True):
            assert true_scores[i] == pytest.approx(score, abs=1e-5)
            assert text.split()[0] == str(i)
    return hits


# --- searching ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "dim"),
    [(None, None), ("graph(ef=300) 16:int8@200 > 16@10", None), ("8@10", 8)],
)
def test_old_and_new_rows_are_scored_each_by_its_rule_and_merged(index, plan, dim):
    if plan:
        index.set_plan(plan)
    upgrade = begin(index)
    for more in (0, 40, 70):
        if more:
            assert fill(upgrade, max_rows=more) == more
        assert_as_by_hand(upgrade, dim=dim)
        assert_as_by_hand(upgrade, k=IDS + 5, dim=dim)
        every_third = {"filter": "id % 3 = 0", "passes": lambda i: i % 3 == 0}
        assert_as_by_hand(upgrade, k=4, **every_third, dim=dim)
    fill(upgrade)
    hits = assert_as_by_hand(upgrade)
    every = vectors(1, range(IDS), 0)
    np.testing.assert_array_equal(
        hits.ids, np.argsort(-(queries(1).array @ every.array.T), axis=1)[:, :10]
    )


@pytest.mark.parametrize("plan", [None, "32@10", "16@10", "8@10"])
def test_neither_side_crowds_out_the_other_whatever_size_the_plan_ends_at(tmp_path, rng, plan):
    """Answers come from rows that are done as often as they truly lie there."""
    dim, n = 64, 1200
    things = rng.normal(size=(n + 200, dim)) * np.exp(-np.arange(dim) / 10)
    turn = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    old, new = (nv_unit(rows) for rows in (things, things @ turn))
    old_space = nv.Space.declared("old", dim=dim, nesting_dims=(8, 16, 32, dim))
    spaces = [old_space, nv.Space.declared("new", dim=dim)]
    index = Index.create(tmp_path / "x", nv.Embeddings(old[:n], spaces[0], np.arange(n)))
    if plan:
        index.set_plan(plan)
    some = rng.permutation(n)[: n // 2]
    Upgrade.start(index, nv.Embeddings(new[some], spaces[1], some))
    hits = index.search(nv.Embeddings(new[n:], spaces[1]), 10)
    true = np.argsort(-(new[n:] @ new[:n].T), axis=1)[:, :10]
    found, there = (np.isin(ids, some).mean() for ids in (hits.ids, true))
    assert found == pytest.approx(there, abs=0.05)


def test_a_row_is_found_by_what_was_written_last(index, upgrade):
    fill(upgrade, max_rows=50)
    done = sorted(done_ids(upgrade))
    index.upsert(batch(0, done[:5], 1))  # their new vectors are void
    assert upgrade.status().done == 105
    assert_as_by_hand(upgrade)
    index.delete(done[5:9])
    assert upgrade.status().rows == IDS - 4
    assert_as_by_hand(upgrade)
    index.add(batch(0, done[5:6], 2))  # an id that comes back is another row
    assert done[5] not in done_ids(upgrade)
    assert_as_by_hand(upgrade)
    index.compact()
    assert_as_by_hand(upgrade)
    assert fill(upgrade) == upgrade.status().done - 101
    assert_as_by_hand(upgrade)


def test_queries_of_the_old_space_are_answered_as_before(index):
    index.set_plan("graph(ef=50) 16:int8@40 > 16@10")
    before = index.search(queries(0))
    upgrade = begin(index)
    for _ in range(2):
        hits = Index.open(index.path).search(queries(0))
        np.testing.assert_array_equal(hits.ids, before.ids)
        np.testing.assert_array_equal(hits.scores, before.scores)
        fill(upgrade)


def test_one_query_and_many_find_the_same(index, upgrade):
    fill(upgrade, max_rows=60)
    asked = queries(1, 70)
    many = index.search(asked, 5)
    for row in (0, 33, 69):
        one = index.search(asked[row : row + 1], 5)
        np.testing.assert_array_equal(one.ids[0], many.ids[row])


def test_answers_say_what_each_side_did(index, upgrade):
    hits = index.search(queries(1), 30)
    for answer in hits.explain(1)["answers"]:
        (stage,) = answer["place"]
        assert stage == ("new 24@30" if answer["id"] < 60 else "16@30")
    said = index.search(queries(1), 3).explain(1)
    assert [stage["stage"] for stage in said["stages"]] == ["16@3", "new 24@3"]
    assert [stage["rows_scored"] for stage in said["stages"]] == [IDS - 60, 60]


def test_text_ids_work_alike(tmp_path):
    ids = [f"row {i}" for i in range(IDS)]
    old = nv.Embeddings(vectors(0, range(IDS), 0).array, space(0), ids)
    new = nv.Embeddings(vectors(1, range(IDS), 0).array, space(1), ids)
    index = Index.create(tmp_path / "x.nest", old, durability="process")
    upgrade = Upgrade.start(index, new[np.arange(30)])
    upgrade.backfill(new, order="traffic", traffic={"row 100": 3, "row 7": 9, "gone": 5})
    assert upgrade.status().pending == 0
    assert upgrade.finish() == IDS
    np.testing.assert_array_equal(
        index.search(new[np.arange(5)], 1).ids[:, 0], [f"row {i}" for i in range(5)]
    )


# --- writing --------------------------------------------------------------------------------------


def test_rows_of_the_new_space_may_be_written(index, upgrade):
    index.upsert(batch(1, [3, 150], 5))
    index.add(
        nv.Embeddings(vectors(1, [9], 6).array, space(1), [7777]),
        payload={"text": ["9 6"]},
    )
    status = upgrade.status()
    assert (status.rows, status.done, status.bridged) == (IDS + 1, 60 - 1 + 2 + 1, 3)
    # their own vectors find them
    hits = index.search(vectors(1, [3, 150], 5), 1)
    np.testing.assert_array_equal(hits.ids[:, 0], [3, 150])
    np.testing.assert_allclose(hits.scores, 1, atol=1e-6)
    # and for old queries they are where the bridge puts them
    bridged = upgrade.bridge.transform(vectors(1, [3], 5))
    stored = np.array(index.get([3])["vector"].to_pylist())
    np.testing.assert_allclose(stored, bridged.array, atol=1e-6)
    assert sorted(upgrade.rollback().tolist()) == [3, 150, 7777]
    assert len(index) == IDS + 1


def test_one_write_may_bring_rows_of_both_spaces(index, upgrade):
    done = index.upsert(iter([batch(0, [1, 2], 4), batch(1, [3, 4], 4), batch(0, [5], 4)]))
    assert done.updated == 5
    assert {3, 4} <= done_ids(upgrade)
    assert not {1, 2, 5} & done_ids(upgrade)
    assert upgrade.status().bridged == 2
    assert_as_by_hand(upgrade)


def test_a_write_that_is_refused_writes_to_neither_side(index, upgrade):
    versions = index.version, index._upgrading().new.snapshot().version
    with pytest.raises(DataError, match="id 3 exists"):
        index.add(batch(1, [3], 5))
    with pytest.raises(DataError, match="payload"):
        index.upsert(vectors(1, [3], 5))
    with pytest.raises(SpaceMismatchError):
        index.upsert(batch(2, [3], 5))
    assert (index.version, index._upgrading().new.snapshot().version) == versions


def half_done(index, error, monkeypatch):
    """Write three rows of the new space, one as new; whatever takes their new vectors raises."""
    index.delete([199])

    def raises(*words):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("nestvec.search.upgrading.Upgrading._new_rows", raises)
        index.upsert(iter([batch(1, [3, 150], 5), batch(0, [4], 4), batch(1, [199], 6)]))


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (OSError(errno.ENOSPC, "full"), StorageError, "3 rows were written .* were not .full"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["disk", "Ctrl-C"],
)
def test_rows_whose_new_vectors_were_not_written_are_known(
    index, upgrade, monkeypatch, error, raised, said
):
    with pytest.raises(raised, match=said):
        half_done(index, error, monkeypatch)
    assert w.held(index) == dict.fromkeys(range(IDS), 0) | {3: 5, 150: 5, 4: 4, 199: 6}
    for seen in (upgrade, Upgrade.open(index.path)):
        assert (seen.status().bridged, seen.status().done) == (3, 60 - 2)
    assert not {3, 150, 199, 4} & done_ids(upgrade)
    hits = index.search(vectors(1, [3, 150], 5), 1)  # by the bridge, there and back
    np.testing.assert_array_equal(hits.ids[:, 0], [3, 150])
    index.upsert(batch(0, [150], 7))  # this one by the old model, all of it
    fill(upgrade)  # the other two have their new vectors now, and bridged old ones still
    status = upgrade.status()
    assert (status.pending, status.bridged) == (0, 2)
    assert sorted(upgrade.rollback().tolist()) == [3, 199]


def test_rows_that_were_half_written_may_be_written_again(index, upgrade, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        half_done(index, KeyboardInterrupt(), monkeypatch)
    index.upsert(iter([batch(1, [3, 150], 5), batch(1, [199], 6)]))
    assert {3, 150, 199} <= done_ids(upgrade)
    assert upgrade.status().bridged == 3
    assert_as_by_hand(upgrade)


def test_a_refused_write_leaves_no_row_half_written(index, upgrade, monkeypatch):
    with pytest.raises(DataError, match="exists"):
        index.add(batch(1, [3], 5))
    index.upsert(batch(0, [3], 7))  # of the version that the refused one would have had
    assert upgrade.status().bridged == 0


def test_an_upgrade_that_ends_while_rows_come_refuses_them(index, upgrade):
    def rows():
        yield batch(1, [3], 5)
        upgrade.rollback()

    with pytest.raises(StorageError, match=r"was ended while .* Nothing was written"):
        index.upsert(rows())
    assert w.held(index) == dict.fromkeys(range(IDS), 0)


# --- backfilling ----------------------------------------------------------------------------------


def test_a_vector_that_is_written_meanwhile_is_not_overwritten(index, upgrade):
    """A row changes while the backfill holds what it was: by the new model, and by the old."""
    ahead = Index.open(index.path)
    known, rows = embed(1), []

    def source(texts):
        if not rows:
            rows.extend(int(text.split()[0]) for text in texts)
            ahead.upsert(iter([batch(1, rows[:2], 5), batch(0, rows[2:3], 5)]))
        return known(texts)

    upgrade.backfill(source, column="text", learn=False)
    status = upgrade.status()
    assert (status.pending, status.bridged) == (0, 2)
    hits = index.search(vectors(1, rows[:3], 5), 1)
    np.testing.assert_array_equal(hits.ids[:, 0], rows[:3])
    np.testing.assert_allclose(hits.scores, 1, atol=1e-6)
    assert sorted(upgrade.rollback().tolist()) == sorted(rows[:2])


def asked_for(upgrade, **options):
    """The ids in the order in which they are embedded."""
    seen = []

    def noted(texts):
        seen.extend(int(text.split()[0]) for text in texts)
        return embed(1)(texts)

    upgrade.backfill(noted, column="text", **options)
    return seen


def test_by_traffic_what_is_asked_for_most_comes_first(upgrade):
    traffic = {i: (i * 37) % 101 for i in range(60, 160)} | {3: 10**6, 12345: 10**6}
    seen = asked_for(upgrade, order="traffic", traffic=traffic, batch_size=16)
    assert sorted(seen) == list(range(60, IDS))  # the sample was done before
    counts = [traffic.get(i, 0) for i in seen]
    assert counts == sorted(counts, reverse=True)


def test_by_traffic_what_is_like_that_comes_next(upgrade):
    seen = asked_for(upgrade, traffic={3: 5, 70: 2})  # the first is done already
    assert seen[0] == 70
    rows = np.stack([w.row(0, i, 0) for i in range(IDS)])
    likeness = {i: np.exp((rows[i] @ rows[[3, 70]].T - 1) / 0.1) @ [5, 2] for i in range(IDS)}
    np.testing.assert_allclose(
        [likeness[i] for i in seen[1:]], sorted((likeness[i] for i in seen[1:]), reverse=True)
    )


def test_by_queries_what_stands_high_in_their_answers_comes_first(index, upgrade):
    """Each as often as it is asked, by 1 / place; after each tenth they are asked again."""
    log = nv.Embeddings(queries(1).array[[0, 1, 1, 1, 4]], space(1))
    for done in (60, 72, 84):
        hits = index.search(queries(1)[np.array([0, 1, 4])], 100)
        worth = dict.fromkeys(range(IDS), 0.0)
        for answers, count in zip(hits.ids.tolist(), (1, 3, 1), strict=True):
            for place, i in enumerate(answers, 1):
                worth[i] += count / place
        held = done_ids(upgrade)
        assert len(held) == done
        wanted = sorted((-worth[i], i) for i in range(IDS) if i not in held and worth[i])
        seen = asked_for(upgrade, queries=log, max_rows=12)
        np.testing.assert_allclose([-worth[i] for i in seen], [v for v, _ in wanted[: len(seen)]])


def test_queries_are_asked_again_as_rows_get_done(index, upgrade, monkeypatch):
    asked = []
    found_by = order.found_by
    monkeypatch.setattr(order, "found_by", lambda *of: asked.append(1) or found_by(*of))
    assert fill(upgrade, queries=queries(1)) == 140
    assert len(asked) == 10


def test_at_random_the_seed_says_the_order(tmp_path):
    orders = []
    for n, seed in enumerate((1, 1, 2)):
        upgrade = begin(create(tmp_path / f"{n}.nest"))
        orders.append(asked_for(upgrade, seed=seed))
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == list(range(60, IDS))


def test_by_bridge_error_what_is_missed_most_comes_first(tmp_path):
    """Rows of one corner of the space are bridged at random, the others without error."""
    rng = np.random.default_rng(0)
    array = rng.normal(size=(300, 16))
    corner = rng.permutation(300)[:90]
    array[corner, 0] += 12
    old = nv.Embeddings(nv_unit(array), space(0), range(300))
    new = nv_unit(array @ np.linalg.qr(rng.normal(size=(16, 16)))[0])
    new[corner] += rng.normal(size=(90, 16)) / 2
    other = nv.Space.declared("turned", dim=16)
    new = nv.Embeddings(nv_unit(new), other, range(300))
    index = Index.create(tmp_path / "x.nest", old, durability="process")
    fitted = w.ProcrustesBridge().fit(new, old)
    upgrade = Upgrade.start(index, new[rng.permutation(300)[:100]], bridge=fitted)
    before = done_ids_of(upgrade)
    upgrade.backfill(new, order="bridge_error", max_rows=50)
    chosen = done_ids_of(upgrade) - before
    assert len(chosen & set(corner.tolist())) > 45


def test_rows_that_the_bridge_itself_made_say_nothing_of_what_it_misses(tmp_path):
    """Their miss is 0: with 100 of them in the corner that is bridged worst, it came last."""
    rng = np.random.default_rng(0)
    array = rng.normal(size=(500, 16))
    corner = np.arange(200)
    array[corner, 0] += 12
    old = nv.Embeddings(nv_unit(array), space(0), range(500))
    turned = nv_unit(array @ np.linalg.qr(rng.normal(size=(16, 16)))[0])
    turned[corner] += rng.normal(size=(200, 16)) / 2
    new = nv.Embeddings(nv_unit(turned), nv.Space.declared("turned", dim=16), range(500))
    index = Index.create(tmp_path / "x.nest", old, durability="process")
    sample = np.r_[0:20, 400:500]
    upgrade = Upgrade.start(index, new[sample], bridge=w.ProcrustesBridge().fit(new, old))
    index.upsert(new[corner[20:120]])
    before = done_ids_of(upgrade)
    upgrade.backfill(new, order="bridge_error", max_rows=60, learn=False)
    chosen = done_ids_of(upgrade) - before
    assert len(chosen & set(corner.tolist())) > 50


def test_counts_of_no_id_of_the_index_are_refused(upgrade):
    with pytest.raises(
        DataError, match=r"none of the 2 ids of the traffic .* begin with '7', .* 0"
    ):
        fill(upgrade, order="traffic", traffic={"7": 5, "8": 1})
    assert upgrade.status().done == 60


def nv_unit(array):
    return w.normalise(array.astype(np.float32))


def done_ids_of(upgrade):
    return _ids(Index(upgrade.index._upgrading().new))


def test_made_vectors_hold_for_rows_as_they_were_when_first_given(index, upgrade):
    made = vectors(1, range(IDS), 0)
    upgrade.backfill(made, max_rows=40)
    index.upsert(batch(0, [3, 150], 5))
    upgrade.backfill(made)  # as it is typed again
    assert upgrade.status().pending == 2
    assert not {3, 150} & done_ids(upgrade)
    Upgrade.open(index.path).backfill(made)
    assert upgrade.status().pending == 2
    upgrade.backfill(vectors(1, [3, 150], 5))
    assert upgrade.status().pending == 0
    assert_as_by_hand(upgrade)


def test_rows_without_text_stay_pending_and_are_named(tmp_path, caplog):
    texts: list[str | None] = [f"{i} 0" for i in range(120)]
    texts[5], texts[70], texts[71] = "", " \n", None
    index = Index.create(tmp_path / "x.nest", vectors(0, range(120), 0), payload={"text": texts})
    given = []

    def embed_some(some):
        given.extend(some)
        return embed(1)(some)

    encoder = nv.CallableEncoder(embed_some, name="model-1", dim=space(1).dim)
    sample = nv.Embeddings(vectors(1, range(20, 60), 0).array, encoder.space, range(20, 60))
    upgrade = Upgrade.start(index, sample, column="text")
    assert upgrade.backfill(encoder, batch_size=7) == 77
    assert upgrade.status().pending == 3
    assert len(given) == 77
    assert "3 rows have nothing to embed in the column 'text', and stay pending" in caplog.text
    assert all(f"{i}" in caplog.text for i in (5, 70, 71))
    assert upgrade.backfill(encoder) == 0
    ids, some, _ = sample_texts(index, "text", 120)
    assert len(ids) == len(some) == 117
    assert not {5, 70, 71} & set(ids.tolist())
    with pytest.raises(DataError, match="column 'id' is not one"):
        sample_texts(index, "id", 3)


def test_who_asks_for_the_status_is_in_nobodys_way(index, upgrade):
    with (index.path / "upgrade/lock").open("rb") as asks:
        fcntl.flock(asks, fcntl.LOCK_SH)
        assert not upgrade.status().running
        ends = threading.Timer(0.1, lambda: fcntl.flock(asks, fcntl.LOCK_UN))
        ends.start()
        assert fill(upgrade, max_rows=10) == 10
        fcntl.flock(asks, fcntl.LOCK_EX)
        assert upgrade.status().running
        with pytest.raises(StorageError, match="another process works on the upgrade"):
            fill(upgrade)


def test_what_an_upgrade_lost_is_named_and_the_index_is_whole(index, upgrade):
    before = index.search(queries(0))
    folder = index.path / "upgrade"
    (folder / "lock").unlink()
    assert fill(upgrade, max_rows=10) == 10  # that one is made again
    shutil.rmtree(folder / "new")
    opened = Index.open(index.path)
    np.testing.assert_array_equal(opened.search(queries(0)).ids, before.ids)
    for does in (lambda: Upgrade.open(opened), lambda: opened.search(queries(1)), opened.check):
        with pytest.raises(FileFormatError, match=r"or remove .*upgrade, which takes the upgrade"):
            does()
    shutil.rmtree(folder)
    assert Index.open(index.path).check()["ok"]


def test_damaged_new_vectors_are_found_and_not_finished(index, upgrade):
    fill(upgrade)
    file = max((index.path / "upgrade/new/record/data").iterdir(), key=lambda p: p.stat().st_size)
    bits = bytearray(file.read_bytes())
    bits[len(bits) // 3] ^= 128
    file.write_bytes(bits)
    found = index.check()
    assert not found["ok"]
    assert found["record"].ok
    assert str(file) in found["new"].damage[0]
    with pytest.raises(FileFormatError, match=r"new vectors are damaged: .*" + file.name):
        upgrade.finish()
    upgrade.rollback()
    assert index.check()["ok"]


def test_an_estimate_embeds_each_row_of_the_sample_once_and_times_no_warming_up(index):
    given = []

    def source(texts):
        if not given:
            time.sleep(0.5)
        given.extend(texts)
        return embed(1)(texts)

    found = estimate(index, source, column="text", space=space(1), sample_size=150)
    assert len(given) == len(set(given)) == found.sampled == 150
    assert found.rows_per_second > 150 / 0.5
    assert found.rows == IDS


def test_a_rate_is_kept(upgrade):
    started = time.monotonic()
    assert fill(upgrade, rows_per_second=100, max_rows=60) == 60
    assert 0.5 < time.monotonic() - started < 3
    status = upgrade.status()
    assert status.rows_per_second is not None
    assert status.rows_per_second <= 105
    assert status.seconds_left == pytest.approx(80 / status.rows_per_second)
    assert "through the bridge: about 1 s at" in status.sentence


def test_what_was_made_is_kept_when_the_source_fails_or_is_interrupted(upgrade):
    for error in (ValueError, KeyboardInterrupt):
        calls = []

        def failing(texts, error=error, calls=calls):
            calls.append(texts)
            if len(calls) == 3:
                raise error
            return embed(1)(texts)

        before = upgrade.status().done
        with pytest.raises(error):
            upgrade.backfill(failing, column="text", batch_size=10)
        assert upgrade.status().done == before + 20
        assert not upgrade.status().running
    assert_as_by_hand(upgrade)


def test_rows_that_change_while_they_are_embedded_are_embedded_again(index, upgrade):
    def slow(texts):
        if index.version == 2:
            Index.open(index.path).upsert(batch(0, [100, 199], 1))
        return embed(1)(texts)

    assert upgrade.backfill(slow, column="text", batch_size=500) == IDS - 60 + 2
    assert upgrade.status().pending == 0
    hits = index.search(vectors(1, [100, 199], 1), 1)
    np.testing.assert_array_equal(hits.ids[:, 0], [100, 199])


def test_vectors_that_are_made_are_for_rows_as_they_were(index, upgrade):
    """Those that are written meanwhile have other texts; those that are not in the file wait."""
    made = vectors(1, range(150), 0)
    assert upgrade.backfill(made) == 90
    assert upgrade.status().pending == 50
    assert_as_by_hand(upgrade)


def test_many_pieces_are_joined(index, upgrade, monkeypatch):
    monkeypatch.setattr("nestvec.upgrade.backfill._S_A_PIECE", 0)
    monkeypatch.setattr("nestvec.upgrade.backfill._FRAGMENTS", 5)
    fill(upgrade, batch_size=10)
    store = index._upgrading().new.store
    store.refresh()
    assert len(store.snapshot.dataset.get_fragments()) <= 6
    assert_as_by_hand(upgrade)


# --- the end --------------------------------------------------------------------------------------


def files(path):
    return {
        str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in path.rglob("*")
        if p.is_file() and "readers" not in p.parts
    }


def test_a_rollback_leaves_every_byte_as_it_was(index):
    before = index.search(queries(0)), files(index.path)
    upgrade = begin(index)
    fill(upgrade, max_rows=50)
    index.search(queries(1))
    assert len(upgrade.rollback()) == 0
    after = index.search(queries(0))
    np.testing.assert_array_equal(after.ids, before[0].ids)
    np.testing.assert_array_equal(after.scores, before[0].scores)
    assert files(index.path) == before[1]
    with pytest.raises(SpaceMismatchError, match="nestvec upgrade start"):
        index.search(queries(1))
    with pytest.raises(StorageError, match="no upgrade"):
        upgrade.status()
    begin(index)  # and it can be begun again


def test_what_is_finished_is_an_index_of_the_new_space(index, upgrade):
    reader, writer = Index.open(index.path), Index.open(index.path)
    reader.search(queries(0))
    index.delete([4, 60])
    index.upsert(batch(0, [7], 3))
    fill(upgrade)
    assert upgrade.finish() == IDS - 2
    assert [p.name for p in sorted(index.path.iterdir())] == [
        index._home.store.path.name,
        "nestvec.json",
    ]
    fresh = Index.open(index.path)
    for one in (index, reader, fresh):
        assert one.space == space(1)
        table = one.get(sorted(w.held(one)), columns=["id", "text", "vector"])
        assert len(table) == IDS - 2
        for row in table.to_pylist():
            i, value = map(int, row["text"].split())
            assert row["id"] == i
            assert value == (3 if i == 7 else 0)
            np.testing.assert_array_equal(row["vector"], vectors(1, [i], value).array[0])
        np.testing.assert_array_equal(one.search(queries(1)).ids, index.search(queries(1)).ids)
    with pytest.raises(SpaceMismatchError, match="two spaces"):
        reader.search(queries(0))
    with pytest.raises(SpaceMismatchError, match="carry no stamp"):
        reader.search(np.ones((1, 24)))
    with pytest.raises(SpaceMismatchError, match="carry no stamp"):
        writer.upsert(np.ones((1, 24)), ids=[3], payload={"text": ["3 0"]})
    with pytest.raises(SpaceMismatchError, match="two spaces"):
        writer.upsert(batch(0, [3], 1))
    assert fresh.search(np.ones((1, 24))).ids.shape == (1, 10)
    writer.upsert(batch(1, [3], 1))
    writer.delete([8])
    assert writer.check()["ok"]
    assert len(reader) == IDS - 3


def test_an_upgraded_index_can_be_upgraded_again(index):
    for model in (1, 2, 3):
        upgrade = begin(index)
        assert_as_by_hand(upgrade)
        fill(upgrade)
        upgrade.finish()
        assert index.space == space(model)
        index.compact()
        assert sorted(p.name[:5] for p in index.path.iterdir()) == ["home-", "nestv"]
    hits = Index.open(index.path).search(vectors(3, [1, 2], 0), 1)
    np.testing.assert_array_equal(hits.ids[:, 0], [1, 2])


def test_float16_and_payload_stay_what_they_are(tmp_path):
    index = Index.create(
        tmp_path / "x.nest",
        batch(0, range(50), 0),
        precision="float16",
        durability="process",
    )
    upgrade = begin(index)
    fill(upgrade)
    upgrade.finish()
    assert index.schema.field("vector").type.value_type == "halffloat"
    assert index.stats()["precision"] == "float16"
    assert index.get([3], columns=["text"])["text"].to_pylist() == ["3 0"]


def test_a_finish_that_fails_leaves_no_index_behind(index, upgrade, monkeypatch):
    def homes():
        return [p.name for p in index.path.glob("home-*")]

    fill(upgrade)
    for _ in range(2):
        with monkeypatch.context() as patched:
            patched.setattr("nestvec.upgrade.finish.Home", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                upgrade.finish()
        assert homes() == []
    (index.path / "home-1234").mkdir()  # as a kill leaves it
    upgrade.rollback()
    assert homes() == []
    upgrade = begin(index)
    fill(upgrade)
    (index.path / "home-1234").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr("nestvec.upgrade.finish.Home", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            upgrade.finish()
    assert homes() == []
    upgrade.finish()
    assert homes() == [index._home.store.path.name]


def test_rows_without_a_new_vector_are_dropped_only_if_told(index, upgrade):
    with pytest.raises(DataError, match=r"140 of 200 rows have no new vector"):
        upgrade.finish()
    assert upgrade.finish(drop_pending=True) == 60
    assert set(w.held(Index.open(index.path))) == set(range(60))


def test_a_writer_that_waits_for_the_end_writes_nothing_to_what_is_left(index, upgrade):
    """It has checked its rows for the old Space, and waits for the lock."""
    fill(upgrade)
    other = Index.open(index.path)
    begun = other._home.store
    upgrade.finish()
    with pytest.raises(StorageError, match="was upgraded to another space"):
        begun.append(batch(0, [100], 9))
    with pytest.raises(StorageError, match="was upgraded to another space"):
        begun.delete([100])
    assert len(index) == IDS


@pytest.mark.parametrize("broken", ["point_to", "tidy", "create", "search"])
def test_a_finish_that_broke_off_is_completed_by_the_next(index, upgrade, monkeypatch, broken):
    fill(upgrade)

    def dies(*words, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if broken == "create":
            patched.setattr(Store, "create", dies)
        elif broken == "search":
            patched.setattr("nestvec.upgrade.finish.Home", dies)
        else:
            patched.setattr(
                f"nestvec.upgrade.{'live' if broken == 'tidy' else 'finish'}.{broken}", dies
            )
        with pytest.raises(KeyboardInterrupt):
            upgrade.finish()
    again = Index.open(index.path)
    assert again.space == space(1 if broken == "tidy" else 0)
    assert again.check()["ok"]
    hits = again.search(queries(1))
    if broken == "tidy":
        again.compact()
    else:
        Upgrade.open(again).finish()
    np.testing.assert_array_equal(again.search(queries(1)).ids, hits.ids)
    assert sorted(p.name[:5] for p in index.path.iterdir()) == ["home-", "nestv"]
    assert again.space == space(1)


def test_a_rollback_that_broke_off_leaves_no_upgrade(index, upgrade, monkeypatch):
    fill(upgrade)

    def dies(*words, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("nestvec.search.transition.shutil.rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            upgrade.rollback()
    with pytest.raises(SpaceMismatchError):
        Index.open(index.path).search(queries(1))
    assert (index.path / "upgrade" / "new").is_dir()
    assert begin(index).status().done == 60  # nothing of the first one is left


# --- errors ---------------------------------------------------------------------------------------


def test_a_third_space_is_refused_during_an_upgrade(index, upgrade):
    with pytest.raises(SpaceMismatchError, match="two spaces"):
        index.search(queries(2))


@pytest.mark.parametrize(
    "how", [{"plan": "16@10"}, {"dims": 16}, {"cascade": "16@10"}, {"recall": 0.9}]
)
def test_a_plan_is_not_chosen_for_two_kinds_of_rows(index, upgrade, how):
    with pytest.raises(PlanError, match="is being upgraded"):
        index.search(queries(1), **how)


def test_there_is_one_upgrade_at_a_time(index, upgrade):
    with pytest.raises(StorageError, match=r"to model-1 .* is under way"):
        begin(Index.open(index.path))


def test_without_an_upgrade_there_is_none_to_open(index):
    with pytest.raises(StorageError, match=r"no upgrade of .* is under way"):
        Upgrade.open(index.path)


def test_a_bridge_has_to_lead_to_the_index(index):
    sample = vectors(1, range(60), 0)
    with pytest.raises(SpaceMismatchError, match="fitted on"):
        Upgrade.start(index, sample, bridge=bridge(2))
    unstamped = w.ProcrustesBridge().fit(np.eye(24), np.eye(24)[:, :16])
    with pytest.raises(nv.errors.SpaceError):
        Upgrade.start(index, sample, bridge=unstamped)
    other = w.ProcrustesBridge().fit(
        sample, nv.Embeddings(vectors(0, range(60), 0).array, nv.Space.declared("z", dim=16))
    )
    with pytest.raises(SpaceMismatchError, match="the index is of model-0"):
        Upgrade.start(index, sample, bridge=other)


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        (lambda: vectors(0, range(60), 0), "nothing to upgrade"),
        (lambda: nv.Embeddings(vectors(1, range(60), 0).array, space(1)), "needs ids"),
        (
            lambda: nv.Embeddings(vectors(1, range(60), 0).array, space(1), range(9970, 10030)),
            "unknown id",
        ),
        (lambda: vectors(1, range(10), 0), "too few"),
        (
            lambda: nv.Embeddings(vectors(1, range(60), 77).array[::-1], space(1), range(60)),
            "say nothing",
        ),
    ],
    ids=["same space", "no ids", "unknown ids", "few", "noise"],
)
def test_a_sample_has_to_be_of_rows(index, sample, said):
    with pytest.raises(DataError, match=said):
        Upgrade.start(index, sample(), bridge=bridge(1))
    assert not (index.path / "upgrade").exists()


def test_rows_written_since_a_sample_was_read_are_left_out(index):
    sample, version = w.sample_of(index, 1), index.version
    index.upsert(batch(0, [5, 6], 1))
    upgrade = Upgrade.start(index, sample, bridge=bridge(1), version=version)
    assert upgrade.status().done == 58
    assert not {5, 6} & done_ids(upgrade)


def test_an_upgrade_may_begin_with_no_row_that_is_done(index):
    upgrade = begin(index, version=0)
    assert upgrade.status().done == 0
    assert_as_by_hand(upgrade)
    with pytest.raises(DataError, match="none are yet"):
        fill(upgrade, order="bridge_error")
    assert fill(upgrade) == IDS
    assert_as_by_hand(upgrade)


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        (embed(1), {"column": "body"}, "'body' is not one"),
        (embed(1), {}, "None is not one"),
        (embed(1), {"column": "text", "order": "best"}, "'best' is not one of traffic"),
        (embed(1), {"column": "text", "order": "traffic"}, "give it one of the two"),
        (embed(1), {"column": "text", "order": "random", "traffic": {3: 1}}, "other orders none"),
        (embed(1), {"column": "text", "queries": queries(1), "traffic": {3: 1}}, "one of the two"),
        (embed(1), {"column": "text", "queries": queries(0)}, "two spaces"),
        (embed(1), {"column": "text", "traffic": {3: -1}}, "a count is 0 or more"),
        (embed(1), {"column": "text", "rows_per_second": 0}, "more than 0"),
        (embed(0), {"column": "text"}, "dims"),
        (lambda texts: embed(1)(texts)[1:], {"column": "text"}, "vectors for"),
        (lambda texts: embed(1)(texts) * np.nan, {"column": "text"}, "NaN"),
        (vectors(0, range(9), 0), {}, "two spaces"),
        (vectors(1, range(9), 0), {"column": "text"}, "need no column"),
        (nv.Embeddings(vectors(1, range(9), 0).array, space(1)), {}, "need the ids"),
    ],
)
def test_a_backfill_says_what_does_not_fit(upgrade, source, options, said):
    with pytest.raises((DataError, SpaceMismatchError), match=said):
        upgrade.backfill(source, **options)
    assert upgrade.status().done == 60


def test_one_process_at_a_time_works_on_an_upgrade(index, upgrade):
    other = Upgrade.open(index.path)

    def busy(texts):
        assert other.status().running
        for work in (other.finish, other.rollback):
            with pytest.raises(StorageError, match="another process works on"):
                work()
        return embed(1)(texts)

    upgrade.backfill(busy, column="text")
    assert not other.status().running


def test_a_damaged_state_is_named(index, upgrade):
    (index.path / transition.STATE).write_text("{")
    again = Index.open(index.path)
    again.search(queries(0))
    with pytest.raises(FileFormatError, match=r"upgrade.json is damaged"):
        again.search(queries(1))
