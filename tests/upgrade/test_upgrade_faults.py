"""An upgrade that is killed at any moment leaves an index that is whole, and nothing is lost."""

import functools
import json
import random
import shutil
from pathlib import Path

import killing
import numpy as np
import pytest
import upgrade_writer as w
from upgrade_writer import IDS, begin, create, embed, queries, row

from nestvec.errors import StorageError
from nestvec.search.index import Index
from nestvec.upgrade import Upgrade

start = functools.partial(killing.start, Path(__file__).with_name("upgrade_writer.py"))


# --- kill -9 --------------------------------------------------------------------------------------


def looked_at(path, known, step, seen=()):
    """Compare an index with what was acknowledged; return what it holds."""
    index = Index.open(path)
    found = w.model_of(index), w.held(index)
    named = known[2]  # also by rollbacks of earlier upgrades
    if step is not None and found != known[:2]:
        known = w.applied(known, step, seen)
    assert found == known[:2], f"with {step} in flight"
    model, rows, bridged, done = known
    ids = list(rows)
    stored = dict(zip(ids, index.get(ids, columns=["vector"])["vector"].to_pylist(), strict=True))
    for i in set(ids) - bridged:
        np.testing.assert_array_equal(stored[i], row(model, i, rows[i]))
    upgrade = w.begun_upgrade(index)
    if upgrade is not None:  # what the bridge made of a row is known for such, whatever was killed
        by_bridge = {i for i in ids if not np.array_equal(stored[i], row(model, i, rows[i]))}
        assert by_bridge <= bridged_rows(upgrade) | named
    in_flight = None if step is None else step["does"]
    if upgrade is None:
        assert done is None or in_flight == "rollback"
        done = None
    else:
        true = true_vectors(upgrade)
        assert done is not None or in_flight == "start"
        assert set(true) >= (done or set()) - (set(step["ids"]) if step else set())
        if in_flight not in ("backfill", "fill", "upsert", "start"):
            assert set(true) == done
        for i, vector in true.items():
            np.testing.assert_array_equal(vector, row(model + 1, i, rows[i]))
        assert upgrade.status().done == len(true)
        hits = index.search(queries(model + 1), IDS)
        assert sorted(hits.ids[0][hits.ids[0] >= 0].tolist()) == sorted(rows)
        done = set(true)
    assert index.check()["ok"]
    hits = index.search(queries(model), columns=["text"])
    w.assert_true(hits, queries(model), model)
    return model, rows, bridged, done


def bridged_rows(upgrade):
    """Ids of the rows that a rollback would name."""
    old, new = upgrade.index._upgrading().views()
    sides = upgrade.index._upgrading().sides(old, new)
    return set(old.ids(old.rows_of(sides.keys.at(np.flatnonzero(sides.bridged)))).tolist())


def true_vectors(upgrade):
    """Id to new vector, of the rows that are done."""
    upgrading = upgrade.index._upgrading()
    old, new = upgrading.views()
    sides = upgrading.sides(old, new)
    ids = old.ids(old.rows_of(sides.keys.at(np.flatnonzero(sides.is_done)))).tolist()
    if not ids:
        return {}
    found = Index(upgrading.new).get(ids, columns=["vector"])["vector"].to_pylist()
    return dict(zip(ids, found, strict=True))


def killed_again_and_again(path, kills):
    create(path)
    known = 0, dict.fromkeys(range(IDS), 0), set(), None
    dice = random.Random(0)
    steps = []
    with start("kills", path) as writer, start("watches", path) as watcher:
        assert writer.stdin
        assert writer.stdout
        assert watcher.stdout
        assert watcher.stdout.readline() == "open\n"
        for seed in range(1, kills + 1):
            writer.stdin.write(f"{seed} {dice.randint(2, 6)} {dice.uniform(0, 200)}\n")
            writer.stdin.flush()
            assert writer.stdout.readline() == "killed\n"
            step = None
            for line in map(json.loads, Path(f"{path}.log").read_text().splitlines()):
                if "begin" in line:
                    step = line["begin"]
                    steps.append(step["does"])
                elif "done" in line:
                    known, step = w.applied(known, step, line["seen"]), None
            known = looked_at(path, known, step)
        assert watcher.poll() is None
        out, _ = watcher.communicate("end\n")
        writer.stdin.close()
    answers, model = json.loads(out)
    assert answers > kills
    assert model == known[0] > 0
    assert {"start", "backfill", "finish", "rollback", "upsert"} <= set(steps)
    index = Index.open(path)
    if known[3] is None:
        begin(index)
    upgrade = Upgrade.open(index)
    upgrade.backfill(embed(known[0] + 1), column="text")
    upgrade.finish()
    assert w.held(index) == known[1]
    # nothing is left of what was interrupted
    assert sorted(p.name[:5] for p in index.path.iterdir()) == ["home-", "nestv"]


def test_killed_upgrades_lose_nothing_and_leave_nothing_behind(tmp_path):
    killed_again_and_again(tmp_path / "x.nest", 15)


@pytest.mark.slow
def test_two_hundred_killed_upgrades_lose_nothing(tmp_path):
    killed_again_and_again(tmp_path / "x.nest", 200)


# --- the disk says no -----------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, mounted):
    """A disk of 3 MB, and a function that leaves some kB of it."""
    disk = tmp_path / "small"
    mounted(disk, "-t", "tmpfs", "-o", "size=3m", "none")

    def leave(kilobytes):
        filler = disk / "filler"
        filler.unlink(missing_ok=True)
        if kilobytes is not None:
            free = shutil.disk_usage(disk).free // 1024
            filler.write_bytes(b"x" * ((free - kilobytes) * 1024))

    return disk, leave


def test_on_a_full_disk_each_step_is_refused_and_changes_nothing(small):
    disk, leave = small
    index = create(disk / "x.nest")
    before = index.search(queries(0))
    for free in (4, 20):
        leave(free)
        with pytest.raises(StorageError, match="no space left"):
            begin(index)
        assert not (index.path / "upgrade").exists()
    leave(None)
    upgrade = begin(index)
    leave(4)
    with pytest.raises(StorageError, match="no space left"):
        upgrade.backfill(embed(1), column="text")
    assert upgrade.status().done == 60
    assert index.search(queries(1)).ids.min() >= 0
    leave(None)
    upgrade.backfill(embed(1), column="text")
    for free in (4, 20):
        leave(free)
        with pytest.raises(StorageError, match="no space left"):
            upgrade.finish()
        again = Index.open(index.path)
        np.testing.assert_array_equal(again.search(queries(0)).ids, before.ids)
        assert Upgrade.open(again).status().may_finish
    leave(None)
    assert upgrade.finish() == IDS
    assert sorted(p.name[:5] for p in index.path.iterdir()) == ["home-", "nestv"]
