"""Files are written beside their place, synced, then renamed: a reader never sees half of one."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nestvec.errors import StorageError


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(path: Path) -> None:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    for folder in {p.parent for p in files}:
        sync_folder(folder)


@contextlib.contextmanager
def written_beside(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a scratch path in the target's folder; on success it replaces ``target`` at once.

    Write a file or make a folder at the path that is yielded. If the body fails, the scratch is removed and whatever stood
    at ``target`` is untouched. Disk errors become `StorageError`.
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch_home = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}.") from error
    scratch = scratch_home / target.name
    try:
        yield scratch
        _sync_tree(scratch)
        if target.is_dir() and not target.is_symlink():
            old = scratch_home / "replaced"
            target.rename(old)
            try:
                scratch.rename(target)
            except OSError:
                old.rename(target)
                raise
        else:
            scratch.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        raise StorageError(
            f"cannot write {target}: {error.strerror or error}. "
            f"Nothing was changed; free some space or choose another place."
        ) from error
    finally:
        shutil.rmtree(scratch_home, ignore_errors=True)
