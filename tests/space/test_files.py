"""What is saved comes back with its stamp; what is damaged, foreign or unstamped says so."""

import gzip
import json
import os
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import nestvec as nv
from nestvec.errors import (
    DataError,
    DimensionError,
    FileFormatError,
    SpaceError,
    SpaceMismatchError,
    StorageError,
)
from nestvec.space import Embeddings, Space, _formats, files

STAMPED = [".safetensors", ".npz", ".parquet", ".arrow", ".feather", ".lance"]
SPACE = Space(
    "abc", 32, document_prompt="d: ", maps=("f00d",), model="m", revision="7", nesting_dims=(8, 32)
)


def _needs(end: str) -> None:
    if end in (".parquet", ".arrow", ".feather", ".lance"):
        pytest.importorskip("lance" if end == ".lance" else "pyarrow", reason="nestvec[index]")


@pytest.fixture(params=STAMPED)
def end(request) -> str:
    _needs(request.param)
    return request.param


@pytest.fixture
def vectors(rng) -> Embeddings:
    x = rng.normal(size=(50, 32))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return Embeddings(x, SPACE, [f"dök/{i}" for i in range(50)])


def _assert_same(a: Embeddings, b: Embeddings) -> None:
    np.testing.assert_array_equal(a.array, b.array)
    np.testing.assert_array_equal(a.ids, b.ids)
    assert a.ids.dtype.kind == b.ids.dtype.kind
    assert a.space.to_dict() == b.space.to_dict()


def _names(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir()]


# --- round trips ----------------------------------------------------------------------------------


def test_save_then_load_is_identity(vectors, end, tmp_path):
    path = vectors.save(tmp_path / f"new folder/x{end}")
    _assert_same(nv.load(path), vectors)


def test_integer_ids_stay_integers(vectors, end, tmp_path):
    numbered = Embeddings(vectors.array, SPACE, np.arange(50) * -(2**40))
    _assert_same(nv.load(numbered.save(tmp_path / f"x{end}")), numbered)


def test_rows_without_ids_come_back_without_ids(vectors, end, tmp_path):
    bare = Embeddings(vectors.array, SPACE)
    again = nv.load(bare.save(tmp_path / f"x{end}"))
    _assert_same(again, bare)
    assert not again.has_ids
    _assert_same(nv.load(bare[3:5].save(tmp_path / f"y{end}")), bare[3:5])
    assert nv.load(vectors.save(tmp_path / f"z{end}")).has_ids


def test_one_row_and_a_cut_space_survive(vectors, end, tmp_path):
    one = vectors[:1].prefix(8)
    _assert_same(nv.load(one.save(tmp_path / f"x{end}")), one)


def test_saving_again_replaces_and_leaves_nothing_beside(vectors, end, tmp_path):
    path = tmp_path / f"x{end}"
    vectors.save(path)
    vectors[:3].save(path)
    _assert_same(nv.load(path), vectors[:3])
    assert _names(tmp_path) == [path.name]


def test_every_format_may_be_read_by_whom_the_umask_says(vectors, end, tmp_path):
    before = os.umask(0o022)
    try:
        path = vectors.save(tmp_path / f"x{end}")
    finally:
        os.umask(before)
    for part in [path, *path.rglob("*")]:
        assert stat.S_IMODE(part.stat().st_mode) == (0o755 if part.is_dir() else 0o644)


def test_a_folder_of_something_else_is_not_replaced(vectors, end, tmp_path):
    path = tmp_path / f"x{end}"
    path.mkdir()
    (path / "thesis.txt").write_text("precious")
    with pytest.raises(StorageError, match=r"'thesis\.txt' in it, which would be lost"):
        vectors.save(path)
    assert (path / "thesis.txt").read_text() == "precious"


def test_a_lance_dataset_with_all_its_parts_is_replaced(vectors, tmp_path):
    lance = pytest.importorskip("lance", reason="nestvec[index]")
    path = vectors.save(tmp_path / "x.lance")
    dataset = lance.dataset(str(path))
    dataset.delete("id = 'dök/3'")
    dataset.create_scalar_index("id", "BTREE")
    dataset.tags.create("first", 1)
    dataset.create_branch("side")
    assert {"_indices", "_deletions", "_refs", "tree"} <= set(_names(path))
    _assert_same(nv.load(vectors.save(path)), vectors)


def test_a_moved_file_still_opens(vectors, end, tmp_path):
    vectors.save(tmp_path / f"x{end}").rename(tmp_path / f"y{end}")
    _assert_same(nv.load(tmp_path / f"y{end}"), vectors)


def test_the_ending_may_be_upper_case(vectors, tmp_path):
    _assert_same(nv.load(vectors.save(tmp_path / "X.NPZ")), vectors)


@pytest.mark.parametrize("name", ["x.npy", "x.csv", "x.pkl", "x"])
def test_a_format_without_a_stamp_is_not_written(vectors, tmp_path, name):
    with pytest.raises(FileFormatError, match=r"carries no stamp. Choose one of \.safetensors"):
        vectors.save(tmp_path / name)


# --- the stamp ------------------------------------------------------------------------------------


def test_a_stamp_and_what_the_user_says_have_to_agree(vectors, end, tmp_path):
    path = vectors.save(tmp_path / f"x{end}")
    for agreed in (SPACE, "m"):
        assert nv.load(path, space=agreed).space == SPACE
    for other in (replace(SPACE, maps=()), "n"):
        with pytest.raises(SpaceMismatchError, match=str(path)):
            nv.load(path, space=other)


def test_an_edited_stamp_is_refused(vectors, tmp_path):
    path = tmp_path / "x.npz"
    for stamp in (
        json.dumps(SPACE.to_dict() | {"dim": 33}),
        json.dumps([1]),
        "{",
    ):
        np.savez(path, vectors=vectors.array, nestvec=np.array(stamp))
        with pytest.raises(ValueError, match=r"x\.npz: (the|its) stamp"):
            nv.load(path)


def test_vectors_that_do_not_fit_their_stamp_are_refused(vectors, tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, vectors=vectors.array[:, :8], nestvec=np.array(json.dumps(SPACE.to_dict())))
    with pytest.raises(DimensionError, match=r"x\.npz: 8 dims given"):
        nv.load(path)


# --- plain files ----------------------------------------------------------------------------------


def _write_plain(path: Path, array: np.ndarray, ids: list | None) -> None:
    name = path.name
    lists = array.tolist()
    if name.endswith(".npy"):
        np.save(path, array)
    elif name.endswith(".npz"):
        arrays = {"anything": array} | ({} if ids is None else {"ids": np.array(ids)})
        np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
    elif ".jsonl" in name:
        rows = [{"embedding": v} for v in lists]
        rows = rows if ids is None else [r | {"_id": i} for r, i in zip(rows, ids, strict=True)]
        text = "\n".join(map(json.dumps, rows)) + "\n"
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    elif name.endswith(".csv"):
        head = [f"d{i}" for i in range(array.shape[1])]
        table = [head, *([repr(x) for x in row] for row in lists)]
        if ids is not None:
            table = [[str(i), *row] for i, row in zip(["id", *ids], table, strict=True)]
        path.write_text("\n".join(map(",".join, table)))
    else:
        pa = pytest.importorskip("pyarrow", reason="nestvec[index]")
        table = pa.table({"embedding": lists} | ({} if ids is None else {"id": ids}))
        if name.endswith(".parquet"):
            import pyarrow.parquet as pq

            pq.write_table(table, path)
        elif name.endswith(".lance"):
            pytest.importorskip("lance", reason="nestvec[index]").write_dataset(table, str(path))
        else:
            with pa.OSFile(str(path), "wb") as f, pa.ipc.new_stream(f, table.schema) as writer:
                writer.write_table(table)


PLAIN = [".npy", ".npz", ".parquet", ".arrow", ".lance", ".jsonl", ".jsonl.gz", ".csv"]


@pytest.mark.parametrize("plain", PLAIN)
@pytest.mark.parametrize("with_ids", [False, True], ids=["no-ids", "ids"])
def test_a_plain_file_is_stamped_by_what_the_user_says(rng, tmp_path, plain, with_ids):
    x = rng.normal(size=(7, 5))
    ids = [f"n{i}" for i in range(7)] if with_ids and plain != ".npy" else None
    path = tmp_path / f"x{plain}"
    _write_plain(path, x, ids)
    with pytest.raises(SpaceError, match=r"carries no stamp.*space=.*--model-name NAME"):
        nv.load(path)
    got = nv.load(path, space="some-model")
    np.testing.assert_array_equal(got.array, x.astype(np.float32))
    assert got.ids.tolist() == (ids or list(range(7)))
    assert got.space == Space.declared("some-model", dim=5, normalisation="none")


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int8, np.int64])
def test_plain_numbers_of_any_type_are_read(tmp_path, dtype):
    x = np.arange(1, 13).reshape(3, 4).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    got = nv.load(tmp_path / "x.npy", space="m").array
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, x)


def test_the_name_alone_declares_unit_rows_only_where_they_are(vectors, tmp_path):
    np.save(tmp_path / "x.npy", vectors.array)
    assert nv.load(tmp_path / "x.npy", space="m").space == Space.declared("m", dim=32)


def test_a_declared_unit_space_refuses_other_rows(vectors, tmp_path):
    np.save(tmp_path / "x.npy", vectors.array * 2)
    with pytest.raises(DataError, match=r"x\.npy: row 0 has length 2"):
        nv.load(tmp_path / "x.npy", space=Space.declared("m", dim=32))


def test_a_declared_space_of_another_dim_is_refused(vectors, tmp_path):
    np.save(tmp_path / "x.npy", vectors.array)
    with pytest.raises(DimensionError, match=r"32 dims given for m .33 dims"):
        nv.load(tmp_path / "x.npy", space=Space.declared("m", dim=33))


def test_a_csv_of_numbers_alone_loses_no_row(tmp_path):
    (tmp_path / "x.csv").write_text("1,2\n3,4\n")
    np.testing.assert_array_equal(nv.load(tmp_path / "x.csv", space="m").array, [[1, 2], [3, 4]])


def test_a_csv_from_pandas_loses_its_numbered_header(tmp_path):
    (tmp_path / "x.csv").write_text("0,1\n1,2\n3,4\n")
    np.testing.assert_array_equal(nv.load(tmp_path / "x.csv", space="m").array, [[1, 2], [3, 4]])
    (tmp_path / "x.csv").write_text(",0,1\nr,1,2\ns,3,4\n")
    assert nv.load(tmp_path / "x.csv", space="m").ids.tolist() == ["r", "s"]


@pytest.mark.parametrize("index", ["", "Unnamed: 0"])
def test_an_unnamed_index_beside_named_ids_is_no_dim(tmp_path, index):
    for head in ("id,0,1", "id,a,b", "ID,a,b"):
        (tmp_path / "x.csv").write_text(f"{index},{head}\n7,r,1,2\n8,s,3,4\n")
        got = nv.load(tmp_path / "x.csv", space="m")
        np.testing.assert_array_equal(got.array, [[1, 2], [3, 4]])
        assert got.ids.tolist() == ["r", "s"]


@pytest.mark.parametrize("first", ["0.1,N/A,0.3", "0.1,,0.3", "N/A,N/A,0.3", ",0.2,0.3", "r,1,2"])
def test_a_first_row_with_a_bad_cell_is_no_header(tmp_path, first):
    (tmp_path / "x.csv").write_text(f"{first}\n1,2,3\n4,5,6\n")
    with pytest.raises(FileFormatError, match="line 1 is not a list of numbers"):
        nv.load(tmp_path / "x.csv", space="m")


def test_ids_in_front_of_numbered_columns_are_a_header(tmp_path):
    (tmp_path / "x.csv").write_text("id,0,1\nr,1,2\n")
    got = nv.load(tmp_path / "x.csv", space="m")
    assert (got.ids.tolist(), got.array.tolist()) == (["r"], [[1, 2]])


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "X.JSONL.GZ", "x.csv"])
def test_text_formats_are_utf8_with_a_mark_in_any_locale(tmp_path, name):
    text = "id,a\nä,1\n" if name == "x.csv" else '{"id": "ä", "vector": [1]}\n'
    data = ("\ufeff" + text).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.lower().endswith("gz") else data)
    code = "import sys, nestvec as nv; print(ascii(nv.load(sys.argv[1], space='m').ids.tolist()))"
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / name)], env=env, capture_output=True, text=True
    )
    assert done.stdout == "['\\xe4']\n", done.stderr


def test_a_safetensors_file_of_one_tensor_is_read(rng, tmp_path):
    from safetensors.numpy import save_file

    x = rng.normal(size=(3, 4))
    save_file({"emb": x}, tmp_path / "x.safetensors")
    got = nv.load(tmp_path / "x.safetensors", space="m")
    np.testing.assert_array_equal(got.array, x.astype(np.float32))


# --- bad files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [p for p in PLAIN if p not in (".csv", ".lance")])
@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.7, 0.95])
def test_a_truncated_plain_file_is_named(rng, tmp_path, plain, share):
    path = tmp_path / f"x{plain}"
    _write_plain(path, rng.normal(size=(50, 32)), None)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises((FileFormatError, DataError), match=r"x\.") as caught:
        nv.load(path, space="m")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("at", [0, 1, 8, 0.1, 0.5, 0.9, -9, -1], ids=str)
def test_a_truncated_stamped_file_is_named(vectors, end, tmp_path, at):
    path = vectors.save(tmp_path / f"x{end}")
    parts = [path]
    if path.is_dir():  # what carries the rows and what says where they are; the rest is hints
        parts = [*path.rglob("*.lance"), *path.rglob("*.manifest")]
        assert len(parts) == 2
    for part in parts:
        whole = part.read_bytes()
        part.write_bytes(whole[: at if isinstance(at, int) else int(at * len(whole))])
        with pytest.raises(FileFormatError, match=r"cannot read .*x\.") as caught:
            nv.load(path)
        assert "\n" not in str(caught.value)
        part.write_bytes(whole)


def test_a_file_that_is_not_what_its_ending_says_is_named(end, tmp_path):
    path = tmp_path / f"x{end}"
    path.write_bytes(b"not this format at all, but long enough to look like something " * 20)
    with pytest.raises(FileFormatError, match=f"not a {end}"):
        nv.load(path, space="m")


def test_a_changed_byte_in_parquet_is_seen(vectors, tmp_path):
    _needs(".parquet")
    path = vectors.save(tmp_path / "x.parquet")
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(FileFormatError, match="CRC"):
        nv.load(path)


def test_a_pickle_is_never_opened(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(FileFormatError, match="never unpickles"):
        nv.load(tmp_path / "x.npy", space="m")


@pytest.mark.parametrize("name", ["x.pkl", "x", "x.txt"])
def test_an_unknown_ending_says_what_is_read(tmp_path, name):
    (tmp_path / name).write_text("1")
    with pytest.raises(FileFormatError, match=r"not a format for vectors. It reads \.safetensors"):
        nv.load(tmp_path / name)


@pytest.mark.parametrize("plain", [*STAMPED, ".npy", ".jsonl", ".csv"])
def test_a_missing_file_is_a_storage_error(tmp_path, plain):
    with pytest.raises(StorageError, match="there is no such file"):
        nv.load(tmp_path / f"x{plain}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"embedding": [1, 2]}\n{"embedding": [1]}', "line 2 has 1 numbers"),
        ('{"embedding": [1, 2]}\n{"text": "a"}', "line 2 has no"),
        ('{"embedding": [1, "x"]}', "line 1 is not a list of numbers"),
        ('{"embedding": 3}', "line 1 is not a list of numbers"),
        ('{"embedding": {"0": 0.3}}', "line 1 is not a list of numbers .it is a dict"),
        ('{"vector": "123"}', "line 1 is not a list of numbers .it is a str"),
        ('"123"', "line 1 is not a list of numbers .it is a str"),
        ('{"id": 1, "embedding": [1]}\n{"embedding": [2]}', "1 of 2 rows have an id"),
        ('{"id": 1, "embedding": [1]}\n{"id": 1, "embedding": [2]}', "duplicate ids"),
        ('{"embedding": [1, NaN]}', "row 0 holds NaN"),
        ('{"embedding": [0, 0]}', "row 0 is all zeros"),
        ("\n", "no rows"),
        ("[1, 2]\n[1", "delimiter"),
    ],
)
def test_bad_jsonl_names_its_line(tmp_path, text, words):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises((DataError, FileFormatError), match=rf"x\.jsonl: .*{words}"):
        nv.load(tmp_path / "x.jsonl", space="m")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,a,b\n1,2,3\n2,3", "line 3 has 1 numbers"),
        ("id,a,b\n1,2,3\n1,3,4", "duplicate ids"),
        ("a,b\n1,two", "line 2 is not a list of numbers"),
        ("a,b\n", "no rows"),
        ("a,b\n1,nan", "row 0 holds NaN"),
    ],
)
def test_bad_csv_names_its_line(tmp_path, text, words):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises((DataError, FileFormatError), match=rf"x\.csv: .*{words}"):
        nv.load(tmp_path / "x.csv", space="m")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"a": [[1.0], [2.0]], "b": [[1.0], [2.0]]}, "'a', 'b'.* call the one"),
        ({"a": [1.0, 2.0]}, "there are none"),
        ({"a": [[1.0, 2.0], [1.0]]}, "row 0 has 2 numbers, row 1 has 1"),
        ({"a": [[1.0, 2.0], None]}, "row 1 of column 'a' is null"),
        ({"a": [[1.0, 2.0], [None, 1.0]]}, "row 1 holds NaN"),
        ({"a": [[1.0], [2.0]], "id": [1, None]}, "1 ids are null"),
        ({"a": [[1.0], [2.0]], "id": [1, 1]}, "duplicate ids"),
        ({"a": [["x"], ["y"]]}, "expected a matrix of numbers"),
    ],
)
def test_bad_parquet_says_what_is_wrong(tmp_path, columns, words):
    pa = pytest.importorskip("pyarrow", reason="nestvec[index]")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises((DataError, FileFormatError), match=rf"x\.parquet: .*{words}"):
        nv.load(tmp_path / "x.parquet", space="m")


# --- bad disks ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """A file system of 1 MiB."""
    disk = tmp_path_factory.mktemp("small_disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a tmpfs may not be mounted here ({error})")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_sentence_and_the_old_file_stands(vectors, rng, end, small_disk):
    path = small_disk / f"x{end}"
    vectors.save(path)
    big = Embeddings(
        rng.normal(size=(10_000, 32)), Space.declared("m", dim=32, normalisation="none")
    )
    with pytest.raises(StorageError, match=r"no space left on the device. Nothing was changed"):
        big.save(path)
    _assert_same(nv.load(path), vectors)
    assert _names(small_disk) == [path.name]
    path.rename(small_disk / "gone")
    subprocess.run(["rm", "-r", str(small_disk / "gone")], check=True)


def test_a_killed_writer_leaves_the_old_file(vectors, end, tmp_path):
    path = vectors.save(tmp_path / f"x{end}")
    code = (
        "import os, signal, sys; import nestvec as nv; from nestvec import _atomic\n"
        "_atomic._put_in_place = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "nv.load(sys.argv[1])[:3].save(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    _assert_same(nv.load(path), vectors)


def test_every_format_that_is_written_is_read():
    assert set(_formats.WRITERS) <= set(_formats.READERS)
    assert sorted(files.STAMPED) == sorted(STAMPED)


def test_a_plain_npy_is_mapped_not_read(tmp_path):
    np.save(tmp_path / "x.npy", np.eye(4, dtype=np.float32))
    got = nv.load(tmp_path / "x.npy", space="m")
    base = got.array
    while not isinstance(base, np.memmap):
        base = base.base
        assert base is not None
    np.testing.assert_array_equal(got[1:3].array, np.eye(4)[1:3])
