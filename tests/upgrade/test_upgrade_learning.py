"""While rows are re-embedded the bridge is learned again, and the better one stays."""

import errno
import fcntl
import threading

import numpy as np
import pytest

import nestvec as nv
from nestvec._checks import normalise
from nestvec.errors import FileFormatError, StorageError
from nestvec.maps import ProcrustesBridge
from nestvec.maps.alignment import Bridge, row_hashes
from nestvec.search.index import Index
from nestvec.search.transition import State, Yardstick
from nestvec.upgrade import Upgrade, backfill, learning

N, LATENT = 1300, 24
OLD, NEW = nv.Space.declared("before", dim=24), nv.Space.declared("after", dim=32)


def world():
    """Rows and queries by two models, of which one is nearly a rotation of the other."""
    rng = np.random.default_rng(0)
    meaning = rng.normal(size=(N + 3000, LATENT))
    sides = []
    for space in (OLD, NEW):
        turned = np.linalg.qr(rng.normal(size=(space.dim, LATENT)))[0].T
        rows = (meaning * rng.uniform(0.5, 1.5, LATENT)) @ turned
        rows += 0.15 * rng.normal(size=rows.shape)
        sides.append(nv.Embeddings(normalise(rows.astype(np.float32)), space, range(len(rows))))
    return sides


OLDS, NEWS = world()
DOCS, QUERIES = NEWS[:N], nv.Embeddings(NEWS.array[N : N + 100], NEW)


@pytest.fixture
def index(tmp_path):
    return Index.create(tmp_path / "x.nest", OLDS[:N], durability="process")


@pytest.fixture
def upgrade(index):
    """Bridged by 48 pairs; 12 rows of the sample put scores on one scale."""
    return Upgrade.start(index, DOCS[np.arange(0, 600, 10)])


def fits(upgrade):
    return upgrade.index._upgrading().state.fit


def seen(upgrade):
    """Hashes of the rows that the bridge in use has learned from."""
    assert isinstance(upgrade.bridge, Bridge)
    return upgrade.bridge.seen_


def learned_rows(upgrade):
    """Rows of the old index that the bridge in use has learned from."""
    upgrading = upgrade.index._upgrading()
    assert upgrading is not None
    return upgrading.known.learned


def bridged_recall(upgrade, bridge):
    """Of the ten that the new model finds among rows that no bridge has seen."""
    rows = np.arange(N + 500, N + 3000)
    true = np.argsort(-(QUERIES.array @ NEWS.array[rows].T), axis=1)[:, :10]
    found = np.argsort(-(bridge.transform(QUERIES).array @ OLDS.array[rows].T), axis=1)[:, :10]
    return np.mean([len({*a} & {*b}) for a, b in zip(true, found, strict=True)]) / 10


def assert_scores(upgrade):
    """Each row by its rule, one scale for all: by the bridge and the sample that are in use."""
    state = upgrade.index._upgrading()
    bridge, known, slope = upgrade.bridge, state.known, upgrade.calibration.slope
    done = done_ids(upgrade)
    hits = upgrade.index.search(QUERIES, 10)
    turned = bridge.transform(QUERIES).array
    for query, old_query, found in zip(QUERIES.array, turned, hits, strict=True):
        best = [
            np.sort(rows @ one)[-20:].mean()
            for rows, one in ((known.new, query), (known.old, old_query))
        ]
        offset = best[0] - slope * best[1]
        score = np.where(
            np.isin(np.arange(N), list(done)),
            DOCS.array @ query,
            slope * (OLDS.array[:N] @ old_query) + offset,
        )
        np.testing.assert_allclose([s for _, s in found], np.sort(score)[::-1][:10], atol=1e-5)


def done_ids(upgrade):
    snapshot = upgrade.index._upgrading().new.snapshot()
    return set(snapshot.read(snapshot.keys().row_ids, ["id"])["id"].to_pylist())


def test_twice_the_rows_make_a_better_bridge_for_all_who_search(index, upgrade):
    reader = Index.open(index.path)
    first, few = upgrade.bridge, reader.search(QUERIES, 10).scores
    upgrade.backfill(DOCS, max_rows=439)
    assert (upgrade.status().pairs, fits(upgrade)) == (48, 0)  # 499 are done
    upgrade.backfill(DOCS, max_rows=1)
    assert (upgrade.status().pairs, fits(upgrade)) == (400, 1)
    assert upgrade.calibration.n == 100 * 20  # by the fifth that was held out of it
    assert bridged_recall(upgrade, upgrade.bridge) > bridged_recall(upgrade, first) + 0.05
    assert_scores(upgrade)
    hits = reader.search(QUERIES, 10)
    assert not np.allclose(hits.scores, few)
    np.testing.assert_array_equal(hits.scores, index.search(QUERIES, 10).scores)
    names = {path.name for path in (index.path / "upgrade").iterdir()}
    assert names == {
        "backfill.json",
        "bridge-1",
        "lock",
        "made.json",
        "new",
        "sample-1.safetensors",
        "upgrade.json",
    }
    upgrade.backfill(DOCS, max_rows=600)
    assert upgrade.status().pairs == 800
    assert_scores(upgrade)
    upgrade.backfill(DOCS)
    assert upgrade.status().pairs == 800  # nothing is found through it any more
    upgrade.finish()
    assert index.space.space_id == NEW.space_id


def test_a_rollback_knows_nothing_of_it(index, upgrade):
    asked = OLDS[np.arange(N, N + 50)]
    before = index.search(asked, 10)
    upgrade.backfill(DOCS, max_rows=500)
    assert fits(upgrade) == 1
    upgrade.rollback()
    after = index.search(asked, 10)
    np.testing.assert_array_equal(before.ids, after.ids)
    np.testing.assert_array_equal(before.scores, after.scores)
    assert not (index.path / "upgrade").exists()


def test_a_bridge_that_is_the_better_one_stays(index):
    rows = np.arange(N, N + 3000)
    known = ProcrustesBridge().fit(NEWS[rows], OLDS[rows])
    known.seen_ = known.seen_[:100]  # else nothing would be compared before there are as many rows
    upgrade = Upgrade.start(index, DOCS[np.arange(0, 600, 10)], bridge=known)
    upgrade.backfill(DOCS, max_rows=500)
    assert (upgrade.status().pairs, fits(upgrade)) == (400, 0)
    np.testing.assert_array_equal(
        upgrade.bridge.transform(QUERIES).array, known.transform(QUERIES).array
    )


def test_it_is_left_if_told(upgrade):
    upgrade.backfill(DOCS, max_rows=700, learn=False)
    assert (upgrade.status().pairs, fits(upgrade)) == (48, 0)


def test_rows_that_a_bridge_has_learned_from_do_not_speak_for_it(index, monkeypatch):
    """Half of what is done is what the first bridge knows by heart."""
    upgrade = Upgrade.start(index, DOCS[:300])
    spared = []
    better = learning._better
    monkeypatch.setattr(learning, "_better", lambda *of: spared.append(of[2].array) or better(*of))
    learned = seen(upgrade)
    upgrade.backfill(DOCS, max_rows=300)
    assert (len(learned), upgrade.status().pairs) == (240, 480)
    (out,) = spared
    assert len(out) == 120
    assert not np.isin(row_hashes(out), learned).any()
    assert not np.isin(row_hashes(out), seen(upgrade)).any()


def test_rows_that_were_learned_from_are_known_where_vectors_are_rounded(tmp_path, monkeypatch):
    index = Index.create(tmp_path / "x.nest", OLDS[:N], precision="float16", durability="process")
    upgrade = Upgrade.start(index, DOCS[:300])
    known = learned_rows(upgrade)
    assert len(known) == 240
    spared = []
    better = learning._better
    monkeypatch.setattr(learning, "_better", lambda *of: spared.append(of[2].array) or better(*of))
    upgrade.backfill(DOCS, max_rows=300)
    (out,) = spared
    rows = normalise(DOCS.array) @ out.T > 1 - 1e-5  # whichever they are
    ids = np.flatnonzero(rows.any(axis=1))
    assert len(ids) == len(out) == 120
    snapshot = index._home.snapshot()
    assert not np.isin(snapshot.rows_of(ids), known).any()
    again = learned_rows(upgrade)
    assert len(again) == 480
    assert not np.isin(snapshot.rows_of(ids), again).any()


@pytest.mark.parametrize("n_distinct", [1, 30])
def test_of_many_equal_rows_nothing_is_learned(tmp_path, n_distinct):
    """All that is done is what the bridge knows, or few others: there is nothing to compare by."""
    some = np.r_[np.arange(60), 60 + np.arange(N - 60) % n_distinct]
    old, new = (nv.Embeddings(side.array[some], side.space, range(N)) for side in (OLDS, NEWS))
    index = Index.create(tmp_path / "x.nest", old, durability="process")
    upgrade = Upgrade.start(index, new[np.r_[0:60]])
    assert upgrade.backfill(new) == N - 60
    status = upgrade.status()
    assert (status.pending, fits(upgrade)) == (0, 0)
    assert status.pairs >= 400


def test_equal_rows_are_not_on_both_sides(index, monkeypatch):
    """Each row twice: what is held out would be known by heart."""
    upgrade = Upgrade.start(index, DOCS[np.arange(0, 600, 10)])
    seen_of = []
    monkeypatch.setattr(
        learning, "fit", lambda **of: seen_of.append(of["new"].array) or nv.upgrade.fit(**of)
    )
    better = learning._better
    monkeypatch.setattr(learning, "_better", lambda *of: seen_of.append(of[2].array) or better(*of))
    twice = nv.Embeddings(DOCS.array[np.arange(N) // 2 * 2], NEW, range(N))
    upgrade.backfill(twice, max_rows=440)
    held_in, out = seen_of
    assert 60 < len(out) == len(np.unique(row_hashes(out))) < 90  # a fifth of what differs
    assert len(held_in) > 300
    assert not np.isin(row_hashes(out), row_hashes(held_in)).any()


def test_a_bridge_of_many_pairs_is_not_compared_with_one_of_few(index):
    rows = np.arange(N, N + 3000)
    known = ProcrustesBridge().fit(NEWS[rows], OLDS[rows])
    upgrade = Upgrade.start(index, DOCS[np.arange(0, 600, 10)], bridge=known)
    upgrade.backfill(DOCS, max_rows=700)
    assert (upgrade.status().pairs, fits(upgrade)) == (3000, 0)


class Clock:
    """Time passes by sleeping, and by what else says so."""

    now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_a_rate_is_not_made_up_for_after_a_while_of_learning(upgrade, monkeypatch):
    upgrade.backfill(DOCS, max_rows=400)
    clock, ends = Clock(), []
    add, again = backfill._Pieces.add, learning.again

    def noted(self, piece, n):
        add(self, piece, n)
        ends.append(clock.now)

    def learns(upgrading, *, seed):
        clock.now += 10
        return again(upgrading, seed=seed)

    monkeypatch.setattr(backfill, "time", clock)
    monkeypatch.setattr(backfill._Pieces, "add", noted)
    monkeypatch.setattr(learning, "again", learns)
    upgrade.backfill(DOCS, max_rows=120, rows_per_second=100, batch_size=10)
    assert fits(upgrade) == 1
    steps = np.diff([0, *ends])
    assert len(steps) == 12
    np.testing.assert_allclose(np.delete(steps, 4), 0.1)
    assert steps[4] == pytest.approx(10.1)  # it learned after 40 rows


def test_two_backfills_in_turn_know_of_each_other(index, upgrade, monkeypatch):
    """The second found the upgrade before the first ended, and the lock after it."""
    second = Upgrade.open(index.path)
    flock, first = fcntl.flock, [upgrade]

    def waits(handle, how):
        if first:
            first.pop().backfill(DOCS, max_rows=440)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", waits)
    second.backfill(DOCS, max_rows=500)
    assert (second.status().done, second.status().pairs) == (1000, 800)
    assert_scores(second)
    assert_scores(Upgrade.open(index.path))
    second.rollback()


def test_what_a_kill_left_is_swept(index, upgrade):
    folder = index.path / "upgrade"
    for name in (".bridge-1.abc", "bridge-7"):
        (folder / name).mkdir()
    (folder / ".sample-1.safetensors.abc").mkdir()
    upgrade.backfill(DOCS, max_rows=440)
    names = {path.name for path in folder.iterdir()}
    assert {name for name in names if "bridge" in name or "sample" in name} == {
        "bridge-1",
        "sample-1.safetensors",
    }


def test_threads_that_search_find_one_scale_at_any_moment(index, upgrade):
    """Scores of rows with new vectors are theirs, whatever bridge the others are found through."""
    ends, wrong = threading.Event(), []

    def searches():
        while not ends.is_set():
            hits = index.search(QUERIES[:5], 10)
            for query, found in zip(QUERIES.array, hits, strict=False):
                of = dict(found)
                if len(of) != 10:
                    wrong.append(found)
                sure = [i for i in of if i in first]
                if not np.allclose([of[i] for i in sure], DOCS.array[sure] @ query, atol=1e-5):
                    wrong.append(found)

    first = done_ids(upgrade)
    threads = [threading.Thread(target=searches) for _ in range(2)]
    for thread in threads:
        thread.start()
    upgrade.backfill(DOCS, max_rows=440)
    ends.set()
    for thread in threads:
        thread.join()
    assert fits(upgrade) == 1
    assert not wrong


def test_rows_whose_old_vector_the_bridge_made_teach_it_nothing(index, upgrade):
    index.upsert(DOCS[np.arange(600, 1200)])
    assert upgrade.status().bridged == 600
    upgrade.backfill(DOCS, max_rows=439)
    assert fits(upgrade) == 0
    upgrade.backfill(DOCS, max_rows=1)
    assert (upgrade.status().pairs, fits(upgrade)) == (400, 1)


class Killed(BaseException):
    pass


def test_killed_before_it_is_in_use_the_old_one_serves_and_it_is_learned_again(
    index, upgrade, monkeypatch
):
    def dies(self, file):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(State, "save", dies)
        with pytest.raises(Killed):
            upgrade.backfill(DOCS, max_rows=440)
    again = Upgrade.open(index.path)
    assert (again.status().done, again.status().pairs, fits(again)) == (500, 48, 0)
    assert_scores(again)
    again.backfill(DOCS, max_rows=1)
    assert (again.status().pairs, fits(again)) == (401, 1)
    assert_scores(again)


@pytest.mark.parametrize("what", [Yardstick, State])
def test_on_a_full_disk_the_old_one_serves_and_what_is_embedded_is_kept(
    index, upgrade, monkeypatch, what
):
    def full(self, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(what, "save", full)
        with pytest.raises(StorageError, match=r"440 rows were embedded .*o space .* learn=False"):
            upgrade.backfill(DOCS, max_rows=440)
    again = Upgrade.open(index.path)
    assert (again.status().done, fits(again)) == (500, 0)
    assert_scores(again)
    again.backfill(DOCS, max_rows=1)
    assert fits(again) == 1
    assert_scores(again)
    names = {path.name for path in (index.path / "upgrade").iterdir()}
    assert not {name for name in names if name.startswith(".")}


def test_who_opens_while_it_changes_takes_what_is_in_use(index, upgrade, monkeypatch):
    stale = State.load(index.path / "upgrade/upgrade.json")
    upgrade.backfill(DOCS, max_rows=440)
    load, said = State.load, [stale]
    monkeypatch.setattr(
        State, "load", classmethod(lambda cls, file: said.pop() if said else load(file))
    )
    assert fits(Upgrade.open(index.path)) == 1
    assert not said


def test_a_bridge_that_is_gone_is_named(index, upgrade):
    (index.path / "upgrade/bridge/map.safetensors").unlink()
    with pytest.raises(FileFormatError, match=r"upgrade/bridge"):
        Upgrade.open(index.path)
