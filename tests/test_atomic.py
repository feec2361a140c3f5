"""What stands at a path is the old thing or the new thing, whatever happens in between."""

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nestvec import _atomic
from nestvec._atomic import written_beside
from nestvec.errors import StorageError


def _names(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir()]


def _folder(path, word):
    path.mkdir()
    (path / "inside").mkdir()
    (path / "inside" / "word").write_text(word)


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    target = tmp_path / "new" / "x.txt"
    for word in ("old", "new"):
        with written_beside(target) as scratch:
            scratch.write_text(word)
        assert target.read_text() == word
    assert _names(target.parent) == ["x.txt"]


def test_a_folder_is_replaced_and_nothing_else_is_left(tmp_path):
    target = tmp_path / "x"
    for word in ("old", "new"):
        with written_beside(target, ours=["inside"]) as scratch:
            _folder(scratch, word)
        assert (target / "inside" / "word").read_text() == word
    assert _names(tmp_path) == ["x"]


def test_a_folder_is_replaced_where_names_cannot_be_swapped(tmp_path, monkeypatch):
    monkeypatch.setattr(_atomic, "_exchange", lambda a, b: False)
    test_a_folder_is_replaced_and_nothing_else_is_left(tmp_path)


def test_a_folder_is_never_missing_while_it_is_replaced(tmp_path, monkeypatch):
    target = tmp_path / "x"
    for name, word in (("x", "old"), ("y", "other")):
        _folder(tmp_path / name, word)
    if not _atomic._exchange(target, tmp_path / "y"):
        pytest.skip("this file system has no exchange of names")
    assert (target / "inside" / "word").read_text() == "other"

    def renamed(*names):
        raise AssertionError("a moment with neither")

    monkeypatch.setattr(Path, "rename", renamed)
    with written_beside(target, ours=["inside"]) as scratch:
        _folder(scratch, "new")
    assert (target / "inside" / "word").read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failure_leaves_the_old_file_and_no_scratch(tmp_path, error):
    target = tmp_path / "x"
    target.write_text("old")

    def fail():
        with written_beside(target) as scratch:
            scratch.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert target.read_text() == "old"
    assert _names(tmp_path) == ["x"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_a_storage_error_whoever_says_so(tmp_path, error):
    with (
        pytest.raises(StorageError, match=r"x: no space left on the device. Nothing was changed"),
        written_beside(tmp_path / "x"),
    ):
        raise error
    assert _names(tmp_path) == []


def test_a_file_does_not_replace_a_folder(tmp_path):
    target = tmp_path / "x"
    target.mkdir()
    with (
        pytest.raises(StorageError, match="a folder of that name stands there"),
        written_beside(target) as scratch,
    ):
        scratch.write_text("new")
    assert _names(tmp_path) == ["x"]


@pytest.mark.parametrize("ours", [[], ["map.json"]])
def test_a_folder_that_holds_anything_else_is_refused_before_the_work(tmp_path, ours):
    target = tmp_path / "precious"
    _folder(target, "old")
    (target / "map.json").write_text("")
    with (
        pytest.raises(StorageError, match=r"precious: .*'inside'.* would be lost\. Choose another"),
        written_beside(target, ours=ours),
    ):
        raise AssertionError("the body ran")
    assert (target / "inside" / "word").read_text() == "old"
    assert _names(tmp_path) == ["precious"]


def test_an_empty_folder_is_replaced(tmp_path):
    (tmp_path / "x").mkdir()
    with written_beside(tmp_path / "x") as scratch:
        _folder(scratch, "new")
    assert (tmp_path / "x" / "inside" / "word").read_text() == "new"


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)]
)
def test_what_is_written_may_be_read_by_whom_the_umask_says(tmp_path, umask, file, folder):
    before = os.umask(umask)
    try:
        with written_beside(tmp_path / "x") as scratch:
            _folder(scratch, "new")
            (scratch / "inside" / "word").chmod(0o600)
            (scratch / "inside").chmod(0o700)
    finally:
        os.umask(before)
    written = [tmp_path / "x" / inside for inside in (".", "inside", "inside/word")]
    assert [stat.S_IMODE(p.stat().st_mode) for p in written] == [folder, folder, file]


def test_a_place_that_is_no_folder_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"), written_beside(tmp_path / "file" / "x"):
        pass


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    target = tmp_path / "x"
    target.write_text("old")
    code = (
        "import os, signal, sys; from nestvec._atomic import written_beside\n"
        "with written_beside(sys.argv[1]) as scratch:\n"
        "    scratch.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)])
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == "old"
