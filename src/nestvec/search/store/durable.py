"""Commits that survive a power cut, one writer at a time, and readers that keep their version.

Lance writes and renames but never syncs, so after a power cut its newest manifest may be empty, or
point to data that is not there. Here Lance commits on a desk: a folder beside the record that holds
a link to the newest manifest and nothing else. What it wrote there and in ``data/`` is synced
first, and only then does the manifest appear under the record, by a link that fails if another
writer was faster. A version that can be seen is therefore whole, whatever happens.

Local file systems only. On an object store a put is durable by itself, and Lance's own commit
would take the place of `publish`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nestvec._extras import require
from nestvec.errors import NestvecError, StorageError

lance = require("lance", extra="index", why="an index")

_SUMS = "checksums"
_FSYNCS_AT_ONCE = 8  # file systems commit those that wait together


def manifest_path(record: Path, version: int) -> Path:
    """Return where Lance keeps the manifest of a version."""
    return record / "_versions" / f"{2**64 - 1 - version:020d}.manifest"


def sync(paths: Iterable[Path]) -> None:
    """Make the content of files, and the names in folders, survive a power cut."""
    with ThreadPoolExecutor(_FSYNCS_AT_ONCE) as pool:
        list(pool.map(_sync, paths))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def signature(path: str | os.PathLike[str]) -> tuple[int, int, int] | None:
    """Return what changes whenever a file is replaced by another one; None if there is none."""
    try:
        there = os.stat(path)  # noqa: PTH116
    except FileNotFoundError:
        return None
    return there.st_ino, there.st_mtime_ns, there.st_size


@contextlib.contextmanager
def writer_lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: one writer at a time, in all processes and threads.

    Waits for as long as it takes. A writer that is killed lets go of it.
    """
    with (folder / "lock").open("rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the disk says, in Python or through Lance, into a `StorageError`."""
    try:
        yield
    except NestvecError:
        raise
    except Exception as error:
        # Lance says "(os error 28)" in errors of several types
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise
        raise StorageError(
            f"cannot write {path}: {reason(error)}. Nothing was changed; free some space, see to "
            f"its permissions, or choose another place."
        ) from error


def reason(error: BaseException) -> str:
    """Say what went wrong in a line, without the places in Lance's source."""
    for text in ("No space left on device", "File too large", "Read-only file system"):
        if text in str(error):
            return text[0].lower() + text[1:]
    strerror = error.strerror if isinstance(error, OSError) else None
    line = (strerror or str(error)).strip().split("\n")[0]
    return re.sub(r",? /\S+\.rs:\d+:\d+.*$", "", line).rstrip(". ") or type(error).__name__


# --- commits --------------------------------------------------------------------------------------


def publish(
    folder: Path,
    version: int,
    commit: Callable[[Any], object],
    written: list[Path],
    *,
    power: bool,
) -> None:
    """Let ``commit`` add versions to a link of this one, then put in place what it made.

    Parameters
    ----------
    folder
        The index; its writer lock is held.
    version
        The newest.
    commit
        Called with the dataset on the desk.
    written
        Files under ``record/`` that the new versions need.
    power
        Whether it has to survive a power cut when this returns.
    """
    record = folder / "record"
    desk = folder / "desk"
    try:
        with storage_errors(folder):
            _clear(desk)
            _settle_checksums(folder, version, power=power)
            newest = manifest_path(record, version)
            os.link(newest, manifest_path(desk, version))
            commit(lance.dataset(str(desk)))
            # later versions have smaller names
            made = sorted((desk / "_versions").glob("*.manifest"), reverse=True)
            manifests = [path for path in made if path.name < newest.name]
            transactions = []
            for path in (desk / "_transactions").iterdir():
                transactions.append(record / "_transactions" / path.name)
                os.link(path, transactions[-1])
            sums = {path: checksum(path) for path in (*written, *transactions)}
            sums |= {record / "_versions" / path.name: checksum(path) for path in manifests}
            sums_file = write_checksums(folder, version + len(manifests), sums)
            if power:
                named = [*written, *transactions, sums_file]
                # the record itself, too: a copy may have lost an empty folder, which is made anew
                sync([record, *named, *manifests, *{path.parent for path in named}])
            _link_manifests(folder, manifests)
    finally:
        shutil.rmtree(desk, ignore_errors=True)
    if power:
        try:
            _sync(record / "_versions")
        except OSError as error:
            raise StorageError(
                f"{folder} was written, but the disk does not say that it will survive a power "
                f"cut: {reason(error)}. Look after that disk."
            ) from error


def _link_manifests(folder: Path, manifests: list[Path]) -> None:
    try:
        for path in manifests:
            os.link(path, folder / "record" / "_versions" / path.name)
    except FileExistsError as error:
        raise StorageError(
            f"cannot write {folder}: another program wrote to its record at the same moment "
            f"without its lock. Nothing was changed; do it again, through nestvec only."
        ) from error


def _clear(desk: Path) -> None:
    shutil.rmtree(desk, ignore_errors=True)  # a writer was killed
    (desk / "_versions").mkdir(parents=True)
    (desk / "_transactions").mkdir()


# --- checksums ------------------------------------------------------------------------------------


def checksum(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_checksums(folder: Path, version: int | None = None) -> dict[Path, str]:
    """Return the sha256 of files of the record, as they were written; of one version or of all."""
    files = [folder / _SUMS / f"{version}.sha256"] if version else (folder / _SUMS).glob("*.sha256")
    sums = {}
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # Lance itself wrote that version
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                digest, _, name = line.partition("  ")
                sums[folder / name] = digest
    return sums


def write_checksums(
    folder: Path, version: int, sums: dict[Path, str], *, power: bool = False
) -> Path:
    """Write the file of one version, in one step, and return its path."""
    target = folder / _SUMS / f"{version}.sha256"
    fresh = target.with_suffix(".new")
    lines = (f"{digest}  {path.relative_to(folder)}\n" for path, digest in sums.items())
    fresh.write_text("".join(lines), encoding="utf-8")
    if power:
        _sync(fresh)
    return fresh.replace(target)


def _settle_checksums(folder: Path, version: int, *, power: bool) -> None:
    """Take over what a writer that was killed wrote about versions after the newest.

    Their numbers are given again, and then two files would speak of one manifest. It may have put
    the first of several in place, so what is said of files that are there still holds.
    """
    early = [file for file in (folder / _SUMS).glob("*.sha256") if int(file.stem) > version]
    if not early:
        return
    sums = {}
    for file in early:
        sums |= read_checksums(folder, int(file.stem))
    sums = {file: said for file, said in sums.items() if file.exists()}
    write_checksums(folder, version, sums | read_checksums(folder, version), power=power)
    for file in early:
        file.unlink()


def fold_checksums(folder: Path, version: int, *, power: bool) -> None:
    """Keep the checksums of the files that are there, all in the file of one version."""
    sums = {file: said for file, said in read_checksums(folder).items() if file.exists()}
    kept = write_checksums(folder, version, sums, power=power)
    if power:
        _sync(kept.parent)
    for file in kept.parent.iterdir():
        if file != kept:
            file.unlink()


# --- readers --------------------------------------------------------------------------------------


class Lease:
    """Says that a version is being read, until it is released or its process ends.

    A shared lock on a file named after the version: `is_read` sees it from any process of this
    machine. Who may not write there has none, and reads without that protection.
    """

    def __init__(self, folder: Path, version: int) -> None:
        path = folder / "readers" / str(version)
        self._end: Callable[[], object] | None = None
        while True:
            try:
                path.parent.mkdir(exist_ok=True)
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError:
                return
            fcntl.flock(handle, fcntl.LOCK_SH)
            if os.fstat(handle).st_nlink:
                break
            os.close(handle)  # its last reader has just removed it
        self._end = weakref.finalize(self, _release, handle, path, os.getpid())

    def release(self) -> None:
        if self._end is not None:
            self._end()


def _release(handle: int, path: Path, owner: int) -> None:
    if owner == os.getpid():  # a forked process shares the lock and must not change it
        with contextlib.suppress(OSError):  # others read it: they keep the file
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    os.close(handle)


def is_read(folder: Path, version: int) -> bool:
    """Tell whether anybody reads an old version; the newest can be taken at any moment."""
    path = folder / "readers" / str(version)
    try:
        handle = path.open("rb")
    except FileNotFoundError:
        return False
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        path.unlink(missing_ok=True)
        return False
