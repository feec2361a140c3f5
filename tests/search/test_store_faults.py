"""Whatever happens, a store opens at what it last acknowledged, and is never half of anything."""

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
from pathlib import Path

import killing
import lance
import numpy as np
import pytest
import store_writer

from nestvec.errors import FileFormatError, StorageError
from nestvec.search.store import Store, durable

WRITER = Path(__file__).with_name("store_writer.py")
start = functools.partial(killing.start, WRITER)


def create(path, **options):
    options = {"id_type": "int", "payload": store_writer.PAYLOAD} | options
    return Store.create(path, store_writer.SPACE, **options)


@pytest.fixture
def store(tmp_path):
    """Three versions: ten rows, of which one was replaced and one deleted."""
    store = create(tmp_path / "x.nest", durability="process")
    store.append(store_writer.batch(list(range(10)), 1))
    store.upsert(store_writer.batch([3], 2))
    store.delete([7])
    return store


HELD = {i: 1 for i in range(10) if i != 7} | {3: 2}


# --- kill -9 --------------------------------------------------------------------------------------


def killed_again_and_again(path, kills):
    store = create(path)
    model, in_flight, whole = {}, 0, 0
    dice = random.Random(0)
    with start("kills", path) as writer:
        assert writer.stdin
        assert writer.stdout
        for seed in range(1, kills + 1):
            writer.stdin.write(f"{seed} {dice.uniform(0, 200)}\n")
            writer.stdin.flush()
            assert writer.stdout.readline() == "killed\n"
            lines = [json.loads(line) for line in Path(f"{path}.log").read_text().splitlines()]
            begun = None
            for line in lines:
                if "begin" in line:
                    begun = line["begin"]
                elif "done" in line:
                    model, begun = store_writer.apply(model, begun), None
            store = Store.open(path)
            found = store_writer.held(store)
            if begun is not None and found != model:
                in_flight += 1
                model = store_writer.apply(model, begun)
            whole += begun is not None
            assert found == model, f"after kill {seed}, with {begun} in flight"
            report = store.check()
            assert report.ok, report
            assert not report.unverified
            assert report.rows == len(model)
        writer.stdin.close()
    store.compact()
    assert not store.check().waste
    assert store_writer.held(store) == model
    assert {p.name for p in path.iterdir()} <= {
        "nestvec.json",
        "record",
        "checksums",
        "readers",
        "lock",
        "desk",
    }
    assert whole > kills / 2, "too few were killed while they wrote"
    return in_flight


def test_killed_writers_lose_nothing_acknowledged_and_leave_nothing_half(tmp_path):
    killed_again_and_again(tmp_path / "x.nest", 20)


@pytest.mark.slow
def test_two_hundred_killed_writers_lose_nothing(tmp_path):
    # some of these were killed after their version stood, before they could say so
    assert killed_again_and_again(tmp_path / "x.nest", 200) > 0


def test_a_store_killed_in_the_making_stands_whole_or_not_at_all(tmp_path):
    with start("creates", tmp_path / "x") as maker:
        assert maker.stdin
        assert maker.stdout
        dice = random.Random(0)
        for n in range(12):
            maker.stdin.write(f"{n} {dice.uniform(0, 60)}\n")
            maker.stdin.flush()
            maker.stdout.readline()
        maker.stdin.close()
    for n in range(12):
        path = tmp_path / f"x{n}"
        if path.exists():
            assert Store.open(path).check().ok
        else:
            with pytest.raises(StorageError, match="there is no index"):
                Store.open(path)
            create(path)  # and nothing is in the way


# --- power cut ------------------------------------------------------------------------------------

TRACED = "openat,open,creat,link,linkat,rename,renameat,renameat2,unlink,fsync,fdatasync,write"


def traced(path, tmp_path, durability):
    """The calls of `store_writer.steps`, in the order in which they came back."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    if subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True).returncode:
        pytest.skip("strace may not trace here")
    out = tmp_path / f"trace-{durability}"
    watch = ["strace", "-f", "-y", "-s", "40", "-o", out, "-e", f"trace={TRACED}"]
    done = killing.command(WRITER, "steps", path, durability)
    subprocess.run([*watch, *done], check=True, stdout=subprocess.PIPE, env=killing.ENVIRONMENT)
    begun = {}
    for line in out.read_text(errors="replace").splitlines():
        pid, call = line.split(maxsplit=1)
        if call.endswith("<unfinished ...>"):
            begun[pid] = call.removesuffix("<unfinished ...>")
            continue
        if call.startswith("<..."):
            call = begun.pop(pid) + call.partition("resumed>")[2]
        if re.search(r"= -1 E|^---|^\+\+\+", call) is None:
            yield call


def unsynced(calls, record):
    """What was not safe when a write was acknowledged, or when its manifest appeared."""
    files, names, wrong, acknowledged = {}, {}, [], 0  # path to file; path to: name is safe

    def complain(moment, besides=()):
        for path, file in files.items():
            ours = path.startswith(f"{record}/") and not path.startswith(besides)
            if ours and not (file["synced"] and names[path]):
                wrong.append(f"{moment}: {'name' if file['synced'] else 'content'} of {path}")

    for call in calls:
        what = call.partition("(")[0]
        quoted = re.findall(r'"((?:[^"\\]|\\.)*)"', call)
        target = re.match(r"\w+\(\d+<(.*?)>", call)
        if what.startswith("open") and "O_CREAT" in call:
            files[quoted[0]] = files.get(quoted[0]) or {"synced": False}
            names.setdefault(quoted[0], False)
        elif what.startswith(("link", "rename")):
            old, new = quoted[:2]
            if new.startswith(f"{record}/_versions/"):
                complain(f"when {Path(new).name} appeared", besides=(f"{record}/_versions/",))
                if not files[old]["synced"]:
                    wrong.append(f"{new} appeared before it was synced")
            files[new], names[new] = files.get(old, {"synced": True}), False
            if what.startswith("rename"):
                files.pop(old, None)
        elif what.startswith("unlink"):
            files.pop(quoted[0], None)
        elif what in ("fsync", "fdatasync") and target:
            if target[1] in files:
                files[target[1]]["synced"] = True
            for path in names:
                names[path] |= str(Path(path).parent) == target[1]
        elif what == "write" and target:
            if quoted[0].startswith("acknowledged"):
                complain(f"acknowledgement {acknowledged}")
                acknowledged += 1
            elif target[1] in files:
                files[target[1]]["synced"] = False
    assert acknowledged == 6
    assert sum(path.startswith(f"{record}/") for path in names) > 20, "the trace saw too little"
    return wrong


def test_what_was_acknowledged_survives_a_power_cut(tmp_path):
    create(tmp_path / "x.nest")
    calls = traced(tmp_path / "x.nest", tmp_path, "power")
    assert unsynced(calls, tmp_path / "x.nest" / "record") == []


def test_the_trace_sees_where_nothing_is_synced(tmp_path):
    create(tmp_path / "x.nest")
    wrong = unsynced(traced(tmp_path / "x.nest", tmp_path, "process"), tmp_path / "x.nest/record")
    for words in ("acknowledgement 0: content of", "appeared: content of", "before it was synced"):
        assert any(words in line for line in wrong)


# --- the disk says no -----------------------------------------------------------------------------


def test_a_full_disk_is_said_and_nothing_changes(tmp_path, mounted):
    mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=400k", "none")
    store = create(tmp_path / "small" / "x.nest")
    store.append(store_writer.batch(list(range(10)), 1))
    many = store_writer.batch(list(range(5, 10_000)), 2)
    for write in (
        lambda: store.upsert(many),
        lambda: store.upsert(iter([many])),
        lambda: store.append(store_writer.batch(list(range(10, 10_000)), 2)),
    ):
        with pytest.raises(StorageError, match=r"x.nest: no space left on device. Nothing was"):
            write()
        report = Store.open(store.path).check()
        assert (report.ok, report.version, report.rows, report.waste) == (True, 2, 10, ())
    store.upsert(store_writer.batch([3], 2))  # what was left behind is gone, so there is room
    assert Store.open(store.path).count == 10


def test_a_file_that_may_not_grow_is_said_and_nothing_changes(store):
    with start("limited", store.path) as writer:
        out, _ = writer.communicate()
    said = re.findall(r"StorageError: cannot write .*x.nest: file too large. Nothing was", out)
    assert len(said) == 2, out
    report = Store.open(store.path).check()
    assert (report.ok, report.version, report.waste) == (True, 4, ())


def test_a_read_only_folder_is_read_and_not_written(store, tmp_path, mounted):
    mounted(tmp_path / "seen", "--bind", str(tmp_path))
    subprocess.run(["mount", "-o", "remount,ro,bind", tmp_path / "seen"], check=True)
    seen = Store.open(tmp_path / "seen" / "x.nest")
    assert store_writer.held(seen) == HELD
    assert seen.check().ok
    for write in (
        lambda: seen.append(store_writer.batch([77], 1)),
        lambda: seen.append(iter([store_writer.batch([77], 1)])),
        lambda: seen.upsert(store_writer.batch([3], 1)),
        lambda: seen.delete([3]),
        lambda: seen.compact(),
    ):
        with pytest.raises(StorageError, match=r"x.nest: read-only file system. Nothing was"):
            write()
    with pytest.raises(StorageError, match="cannot write"):
        create(tmp_path / "seen" / "y.nest")
    store.upsert(store_writer.batch([88], 1))
    assert seen.refresh()
    assert seen.count == 10


def test_a_disk_that_fails_at_the_very_end_is_said_and_the_version_stays(store, monkeypatch):
    real = durable._sync

    def failing(path):
        if path.name == "_versions":
            raise OSError(5, "Input/output error")
        real(path)

    monkeypatch.setattr(durable, "_sync", failing)
    store.durability = "power"
    with pytest.raises(StorageError, match=r"was written, but the disk does not say .* power cut"):
        store.upsert(store_writer.batch([50], 5))
    monkeypatch.undo()
    again = Store.open(store.path)
    assert again.check().ok
    assert store_writer.held(again) == HELD | {50: 5}


# --- damage ---------------------------------------------------------------------------------------


def needed(store, kind):
    """The files of the newest version that are of a kind."""
    record = store.path / "record"
    if kind == "manifest":
        return [durable.manifest_path(record, store.version)]
    infos = [fragment.metadata for fragment in store.snapshot.dataset.get_fragments()]
    if kind == "data":
        return [record / "data" / file.path for info in infos for file in info.files]
    return [record / info.deletion_file.path(info.id) for info in infos if info.deletion_file]


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("how", [truncated, flipped, Path.unlink], ids=lambda how: how.__name__)
@pytest.mark.parametrize("kind", ["data", "deletions"])
def test_a_damaged_file_is_named(store, kind, how):
    files = needed(store, kind)
    assert files
    for path in files:
        whole = path.read_bytes()
        how(path)
        report = Store.open(store.path).check()
        assert not report.ok
        assert [line.startswith(f"{path} is ") for line in report.damage] == [True], report
        path.write_bytes(whole)
        assert store.check().ok


def test_a_damaged_file_is_said_to_whom_reads_it(store):
    for path in needed(store, "data"):
        truncated(path)
    with pytest.raises(FileFormatError, match=r"x.nest.*`nestvec index check"):
        store_writer.held(Store.open(store.path))


@pytest.mark.parametrize("how", [truncated, flipped, lambda path: path.write_bytes(b"")])
def test_a_damaged_manifest_is_named_when_the_store_is_opened(store, how):
    (manifest,) = needed(store, "manifest")
    how(manifest)
    with pytest.raises(FileFormatError, match=re.escape(str(manifest))):
        Store.open(store.path)


def test_no_flipped_bit_of_a_manifest_goes_unseen(store):
    (manifest,) = needed(store, "manifest")
    whole = manifest.read_bytes()
    for at in range(0, len(whole), 97):
        content = bytearray(whole)
        content[at] ^= 16
        manifest.write_bytes(content)
        with pytest.raises(FileFormatError, match=r"manifest"):
            Store.open(store.path)
    manifest.write_bytes(whole)
    assert Store.open(store.path).check().ok


def test_checksums_are_those_that_sha256sum_reads(store):
    lines = "".join(p.read_text() for p in (store.path / "checksums").iterdir())
    done = subprocess.run(
        ["sha256sum", "--check", "--quiet"], input=lines, text=True, cwd=store.path
    )
    assert done.returncode == 0
    names = [line.partition("  ")[2] for line in lines.splitlines()]
    assert len(names) > 8
    assert len(names) == len(set(names))  # a write reads what it wrote and nothing older


def test_what_another_program_wrote_is_read_and_said(store):
    dataset = lance.dataset(str(store.path / "record"))
    dataset.delete("id = 1")
    assert store.refresh()
    report = store.check()
    assert report.ok
    assert report.unverified
    assert "nestvec did not write them" in str(report)


def test_bad_rows_that_another_program_wrote_are_found(store):
    dataset = lance.dataset(str(store.path / "record"))
    bad = store.layout.table(store_writer.batch([1, 100], 1)).to_pylist()
    bad[1]["vector"][3] = float("nan")
    lance.write_dataset(
        store.layout.schema.empty_table().from_pylist(bad, store.layout.schema),
        dataset,
        mode="append",
    )
    damage = "\n".join(store.check().damage)
    assert "the vector of id 100 holds NaN" in damage
    assert "1 ids stand more than once, like 1" in damage


def test_a_commit_that_fails_leaves_nothing_behind(store):
    sums = store.path / "checksums"
    sums.rename(store.path / "away")  # so that it fails as late as it can
    for write in (
        lambda: store.append(store_writer.batch([70], 7)),
        lambda: store.upsert(store_writer.batch([3, 71], 7)),
        lambda: store.compact(),
    ):
        with pytest.raises(StorageError, match=r"No such file.*Nothing was changed"):
            write()
        assert not (store.path / "desk").exists()
    (store.path / "away").rename(sums)
    assert store.check().waste == ()
    assert store_writer.held(Store.open(store.path)) == HELD


def test_what_a_crash_leaves_is_waste_and_goes_with_the_next_compaction(store):
    lance.fragment.write_fragments(  # as far as a writer that is killed before its commit
        store.layout.table(store_writer.batch([500], 1)), str(store.path / "record")
    )
    (store.path / "record" / "_transactions" / "4-x.txn").write_bytes(b"half")
    (store.path / "record" / "data" / ".tmpAbC").write_bytes(b"half")
    (store.path / "desk" / "_versions").mkdir(parents=True)
    (store.path / "desk" / "_versions" / "0.manifest").write_bytes(b"half")
    report = store.check()
    assert report.ok
    assert len(report.waste) == 3
    store.compact()
    assert store.check().waste == ()
    assert not (store.path / "desk").exists()
    assert store_writer.held(store) == HELD


@pytest.mark.parametrize("linked", [0, 1])
def test_a_commit_of_several_versions_that_breaks_off_is_no_damage(store, monkeypatch, linked):
    """What was written about versions that never came is not said of those with their numbers."""
    for i in range(3):
        store.append(store_writer.batch([800 + i], 1))
    real, made = durable._link_manifests, []

    def dies(folder, manifests):
        made.extend(manifests)
        real(folder, manifests[:linked])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(durable, "_link_manifests", dies)
        with pytest.raises(KeyboardInterrupt):
            store.compact()
    assert len(made) == 2
    store = Store.open(store.path)
    store.append(store_writer.batch([900], 1))
    report = store.check()
    assert report.ok, report
    assert not report.unverified
    assert max(int(file.stem) for file in store.path.glob("checksums/*")) == store.version
    store.compact()
    assert store.check().ok


# --- two at once ----------------------------------------------------------------------------------


def test_two_processes_that_upsert_the_same_ids_leave_one_row_each(tmp_path):
    store = create(tmp_path / "x.nest")
    writers = [
        start("rounds", store.path, name, first, 15, 4)
        for name, first in (("a", 1000), ("b", 2000))
    ]
    said = [writer.communicate()[0].splitlines() for writer in writers]
    assert [len(lines) for lines in said] == [15, 15]
    store.refresh()
    assert store.version > 1 + 30
    found = store_writer.held(store)
    assert set(found) == {*range(20), *range(1000, 1015), *range(2000, 2015)}
    assert len({found[i] for i in range(20)}) == 1
    assert store.check().ok


def test_a_writer_that_does_not_know_the_lock_cannot_be_overwritten(store):
    dataset = store.snapshot.dataset
    rows = store.layout.table(store_writer.batch([60], 6))
    fragments = lance.fragment.write_fragments(rows, dataset)

    def commit(desk):
        lance.dataset(str(store.path / "record")).delete("id = 1")  # at the same moment
        lance.LanceDataset.commit(desk, lance.LanceOperation.Append(fragments), read_version=4)

    with pytest.raises(StorageError, match="another program wrote to its record at the same"):
        durable.publish(store.path, store.version, commit, [], power=False)
    store.refresh()
    assert set(store_writer.held(store)) == set(HELD) - {1}


def test_a_reader_sees_only_whole_versions_during_200_upserts_and_their_compactions(tmp_path):
    store = create(tmp_path / "x.nest", durability="process")
    store.upsert(store_writer.batch(list(range(20)), 0))
    versions, values = [], []
    with start("rounds", store.path, "w", 1000, 200, 7) as writer:
        while writer.poll() is None or store.is_newer():
            if store.is_newer():
                assert store.refresh()
                snapshot = store.snapshot
                keys = snapshot.keys()
                rows = snapshot.rows_of(list(range(20)))
                value = set(snapshot.read(rows, ["value"])["value"].to_pylist())
                assert len(value) == 1, "half of a write was seen"
                assert len(set(keys.updated[np.isin(keys.row_ids, rows)])) == 1
                values.append(value.pop())
                versions.append(snapshot.version)
    assert versions == sorted(versions)
    assert values == sorted(values)
    assert values[-1] == 1199
    assert len(set(values)) > 50
    assert store.check().ok


def test_a_reader_in_another_process_reads_on_through_compactions(store):
    with start("reads", store.path) as reader:
        assert reader.stdout
        assert reader.stdin
        assert reader.stdout.readline() == "open\n"
        for n in range(4):
            store.upsert(store_writer.batch(list(range(10)), n))
            store.compact()
        assert store.stats().versions == 2
        out, _ = reader.communicate("read\n")
    assert dict(json.loads(out)) == HELD
    store.compact()
    assert store.stats().versions == 1


def test_a_reader_that_could_not_say_so_is_told_what_happened(store):
    reader = Store.open(store.path)
    reader.snapshot.lease.release()  # as if it might not write to readers/
    store.upsert(store_writer.batch(list(range(10)), 5))
    store.compact()
    with pytest.raises(StorageError, match=r"version 4 of .* removed by a compaction.* again"):
        store_writer.held(reader)
    reader.refresh()
    assert store_writer.held(reader) == dict.fromkeys(range(10), 5)


def test_a_copy_without_its_empty_folders_works(store, tmp_path):
    store.compact()
    shutil.copytree(store.path, tmp_path / "copy")
    for name in ("readers", "record/_deletions"):
        shutil.rmtree(tmp_path / "copy" / name)
    copy = Store.open(tmp_path / "copy")
    assert copy.check().ok
    copy.delete([3])
    copy.compact()
    assert store_writer.held(copy) == {i: 1 for i in HELD if i != 3}


def test_a_killed_reader_holds_nothing(store):
    with start("reads", store.path) as reader:
        assert reader.stdout
        reader.stdout.readline()
        reader.send_signal(signal.SIGKILL)
        reader.wait()
    store.upsert(store_writer.batch([1], 9))
    store.compact()
    assert store.stats().versions == 1
    assert [p.name for p in (store.path / "readers").iterdir()] == [str(store.version)]
