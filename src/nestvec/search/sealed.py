"""Folders of arrays that are derived from the store: whole or not there, and checked when opened.

A folder is made beside its place under the name ``<name>.part``, where an interrupted build finds
its finished pieces, then synced and renamed. Its ``manifest.json`` holds the size and the checksum
(XXH3, 128 bits) of every file. What does not fit it counts as missing: it can be made again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec._atomic import sync_folder, sync_tree, written_beside
from nestvec._extras import require
from nestvec.errors import StorageError

MANIFEST = "manifest.json"
FORMAT = 1
_READ_AT_ONCE = 1 << 24


class Damaged(StorageError):
    """A derived file is missing, cut short or changed; it has to be made again."""


def part_of(folder: Path) -> Path:
    """Return where ``folder`` is made until it is whole."""
    return folder.with_name(folder.name + ".part")


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Give ``<folder>.part`` its manifest and its name; everything is on disk afterwards."""
    part = part_of(folder)
    files = {
        file.name: {"bytes": file.stat().st_size, "xxh3_128": checksum(file)}
        for file in sorted(part.iterdir())
    }
    text = json.dumps({"format": FORMAT, "about": dict(about), "files": files}, indent=2)
    (part / MANIFEST).write_text(text + "\n", encoding="utf-8")
    sync_tree(part)
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)
    sync_folder(folder.parent)


def about(folder: Path) -> dict[str, Any]:
    """Return what was said when the folder was sealed; `Damaged` if that cannot be read."""
    return _manifest(folder)["about"]


def load(
    folder: Path, names: Iterable[str], *, mapped: Iterable[str] = ()
) -> dict[str, NDArray[Any]]:
    """Read arrays into memory, comparing their checksums; ``mapped`` ones are mapped, not compared.

    Raises `Damaged`, which names the file.
    """
    files = _manifest(folder)["files"]
    found = {}
    for name, is_mapped in [*((n, False) for n in names), *((n, True) for n in mapped)]:
        file = folder / f"{name}.npy"
        said = files.get(file.name)
        if said is None or not file.is_file() or file.stat().st_size != said["bytes"]:
            raise Damaged(f"{file} is missing or cut short.")
        if not is_mapped and checksum(file) != said["xxh3_128"]:
            raise Damaged(f"{file} has changed since it was written: its checksum does not fit.")
        found[name] = np.load(file, mmap_mode="r" if is_mapped else None, allow_pickle=False)
    return found


def damaged_files(folder: Path) -> list[str]:
    """Read every file and return the names of those that do not fit the manifest."""
    try:
        files = _manifest(folder)["files"]
    except Damaged as error:
        return [str(error)]
    return [
        str(folder / name)
        for name, said in files.items()
        if not (folder / name).is_file() or checksum(folder / name) != said["xxh3_128"]
    ]


def checksum(file: Path) -> str:
    """Return the XXH3 checksum of a file, 32 hexadecimal digits."""
    digest = require("xxhash", extra="index", why="checking an index").xxh3_128()
    with file.open("rb", buffering=0) as handle:
        while block := handle.read(_READ_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def write_array(folder: Path, name: str, array: NDArray[Any]) -> None:
    """Write one piece of a folder under construction; a reader never finds half of it."""
    with written_beside(folder / f"{name}.npy") as scratch, scratch.open("wb") as handle:
        np.save(handle, array, allow_pickle=False)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, said = found["files"], found["about"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{folder / MANIFEST} is missing or cannot be read ({error}).") from error
    if found.get("format") != FORMAT:
        raise Damaged(f"{folder / MANIFEST} is of format {found.get('format')}, not {FORMAT}.")
    return {"files": files, "about": said}
