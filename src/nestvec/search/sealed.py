"""Folders that are derived from the store: whole or not there, and checked when opened.

A folder is made beside its place under the name ``<name>.part``, by one process at a time, where an
interrupted build finds its finished pieces; then it is synced and renamed. The ``manifest.json`` of
a folder of arrays holds the size and the checksum (XXH3, 128 bits) of every file. What does not fit
it counts as missing: it can be made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec._atomic import sync_folder, sync_tree
from nestvec._extras import require
from nestvec.errors import StorageError

MANIFEST = "manifest.json"
FORMAT = 1
_READ_AT_ONCE = 1 << 20
_WAIT = 0.05  # seconds

Arrays = dict[str, NDArray[Any]]


class Damaged(StorageError):
    """A derived file is missing, cut short or changed; it has to be made again."""


# --- making ---------------------------------------------------------------------------------------


def part_of(folder: Path) -> Path:
    """Return where ``folder`` is made until it is whole."""
    return folder.with_name(folder.name + ".part")


def remove(folder: Path) -> None:
    """Remove a folder if it is there; its name goes first.

    So who is killed on the way leaves nothing that looks like a damaged one.
    """
    gone = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        folder.rename(gone)
    except OSError:  # it is not there, or may not be renamed
        gone = folder
    shutil.rmtree(gone, ignore_errors=True)


def locked(folder: Path, how: int) -> int:
    """Lock a folder (``fcntl.LOCK_SH``, ``LOCK_EX``, ``| LOCK_NB``); the lock ends with the handle.

    Raises `FileNotFoundError` if it is not there, or is renamed or removed by who had the lock.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, how)
        if not os.path.samestat(os.fstat(handle), folder.stat()):
            raise FileNotFoundError(f"{folder} was replaced")
    except BaseException:
        os.close(handle)
        raise
    return handle


@contextlib.contextmanager
def building(folder: Path) -> Iterator[int]:
    """Hold ``<folder>.part``, which is made if need be, and yield its handle.

    Waits for whoever else makes it, so look again whether ``folder`` is there. Raises `OSError` if
    nothing can be written.
    """
    part = part_of(folder)
    handle = None
    while handle is None:
        part.mkdir(exist_ok=True)
        try:
            handle = locked(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            continue
        except BlockingIOError:  # asked again, as it may get its name and stay locked under that
            time.sleep(_WAIT)
    try:
        yield handle
    finally:
        with contextlib.suppress(OSError):  # it stays if there is something to go on from
            part.rmdir()
        os.close(handle)


def put_in_place(folder: Path) -> None:
    """Give ``<folder>.part`` its name, durably; what stands there goes."""
    if folder.exists():
        shutil.rmtree(folder)
    part_of(folder).rename(folder)
    sync_folder(folder.parent)


def seal(
    folder: Path, arrays: Arrays, about: Mapping[str, Any], *, written: Collection[str] = ()
) -> None:
    """Write arrays and a manifest into ``<folder>.part`` and put it in place.

    ``written`` names files there that stay; all others are left from an interrupted build.
    """
    part = part_of(folder)
    for file in part.iterdir():
        if file.name not in written:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    for name, array in arrays.items():
        np.save(part / f"{name}.npy", array, allow_pickle=False)
    files = {
        file.name: {"bytes": file.stat().st_size, "xxh3_128": checksum(file)}
        for file in sorted(part.iterdir())
    }
    text = json.dumps({"format": FORMAT, "about": dict(about), "files": files}, indent=2)
    (part / MANIFEST).write_text(text + "\n", encoding="utf-8")
    sync_tree(part)
    put_in_place(folder)


# --- reading --------------------------------------------------------------------------------------


def load(
    folder: Path, *, mapped: Collection[str] = (), unchecked: Collection[str] = ()
) -> tuple[dict[str, Any], Arrays]:
    """Return what was said when a folder was sealed, and its arrays.

    They are compared with their checksums, except the ``unchecked``, and read into memory, except
    the ``mapped``. Raises `Damaged`, which names the file.
    """
    about, files = _manifest(folder)
    found: Arrays = {}
    for file, said in files.items():
        name = file.name.removesuffix(".npy")
        try:
            if file.stat().st_size != said["bytes"]:
                raise Damaged(f"{file} is cut short.")
            if name not in unchecked and checksum(file) != said["xxh3_128"]:
                raise Damaged(f"{file} has changed since it was written.")
            mode = "r" if name in mapped else None
            found[name] = np.asarray(np.load(file, mmap_mode=mode, allow_pickle=False))
        except Damaged:
            raise
        except Exception as error:  # numpy has many words for a header that it cannot read
            raise Damaged(f"{file} is missing or cannot be read ({error}).") from error
    return about, found


def damaged_files(folder: Path) -> list[str]:
    """Read every file and return the names of those that do not fit the manifest."""
    try:
        _, files = _manifest(folder)
    except Damaged as error:
        return [str(error)]
    return [str(file) for file, said in files.items() if not _fits(file, said["xxh3_128"])]


def _fits(file: Path, said: str) -> bool:
    try:
        return checksum(file) == said
    except OSError:
        return False


def checksum(file: Path) -> str:
    """Return the XXH3 checksum of a file, 32 hexadecimal digits."""
    digest = require("xxhash", extra="index", why="checking an index").xxh3_128()
    with file.open("rb", buffering=0) as handle:
        while block := handle.read(_READ_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def _manifest(folder: Path) -> tuple[dict[str, Any], dict[Path, dict[str, Any]]]:
    file = folder / MANIFEST
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        about, files = found["about"], {folder / name: s for name, s in found["files"].items()}
        written_as = found["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{file} is missing or cannot be read ({error}).") from error
    if written_as != FORMAT:
        raise Damaged(f"{file} is of format {written_as}, not {FORMAT}.")
    return about, files
