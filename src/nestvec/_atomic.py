"""Files are written beside their place, synced, then renamed: a reader never sees half of one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from nestvec.errors import NestvecError, StorageError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # from Linux's fcntl.h and fs.h


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _modes(free: Path) -> tuple[int, int]:
    """Return what a new file and a new folder may be used for here, found by making them.

    Asking for the umask would mean setting it, which other threads would notice.
    """
    free.touch()
    file = free.stat().st_mode
    free.unlink()
    free.mkdir()
    folder = free.stat().st_mode
    free.rmdir()
    return stat.S_IMODE(file), stat.S_IMODE(folder)


def sync_tree(path: Path) -> None:
    """Make a file, or a folder and all that is in it, survive a power cut."""
    for entry in [*(path.rglob("*") if path.is_dir() else ()), path]:
        if entry.is_dir():
            sync_folder(entry)
        else:
            with entry.open("rb") as handle:
                os.fsync(handle.fileno())


def _open_to(path: Path, file_mode: int, folder_mode: int) -> None:
    # Some libraries make files that only their owner reads.
    for entry in [*(path.rglob("*") if path.is_dir() else ()), path]:
        entry.chmod(folder_mode if entry.is_dir() else file_mode)


def _put_in_place(scratch: Path, target: Path) -> None:
    """Rename ``scratch`` to ``target``; an old folder moves to where the scratch was."""
    if not target.is_dir() or target.is_symlink():
        scratch.replace(target)
        return
    if not scratch.is_dir():
        raise IsADirectoryError(None, "a folder of that name stands there", str(target))
    if _exchange(scratch, target):
        return
    old = scratch.with_name("replaced")  # two renames: all that is left where there is no exchange
    target.rename(old)
    try:
        scratch.rename(target)
    except OSError:
        old.rename(target)
        raise


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step, so that no moment has neither; False where there is no such."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    return done == 0


def make_way(target: Path, ours: Collection[str] = ()) -> None:
    """Make the folders above ``target``; raise `StorageError` if what stands there has to stay.

    A folder has to stay if it holds anything whose name is not among ``ours``.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        names = sorted(p.name for p in target.iterdir()) if target.is_dir() else []
    except OSError as error:
        raise StorageError(f"cannot write {target}: {_reason(error)}.") from error
    foreign = [name for name in names if name not in ours]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise StorageError(
            f"cannot write {target}: a folder stands there with {foreign[0]!r}{more} in it, which "
            f"would be lost. Choose another name, or remove that folder yourself."
        )


@contextlib.contextmanager
def written_beside(target: str | os.PathLike[str], *, ours: Collection[str] = ()) -> Iterator[Path]:
    """Yield a scratch path in the target's folder; on success it replaces ``target`` at once.

    Write a file or make a folder at the path that is yielded. If the body fails, the scratch is
    removed and whatever stood at ``target`` is untouched. Disk errors become `StorageError`. A
    folder is replaced only by a folder, and only if it holds nothing but names among ``ours``. What
    is written may be read by whom the umask says, whichever library wrote it.
    """
    target = Path(target)
    make_way(target, ours)
    try:
        scratch_home = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise StorageError(f"cannot write {target}: {_reason(error)}.") from error
    scratch = scratch_home / target.name
    try:
        modes = _modes(scratch)
        yield scratch
        _open_to(scratch, *modes)
        sync_tree(scratch)
        _put_in_place(scratch, target)
        sync_folder(target.parent)
    except NestvecError:
        raise
    except Exception as error:
        # A full disk comes as OSError from Python, as an error of its own from a Rust library.
        if not isinstance(error, OSError) and "No space left" not in str(error):
            raise
        raise StorageError(
            f"cannot write {target}: {_reason(error)}. "
            f"Nothing was changed; free some space or choose another place."
        ) from error
    finally:
        shutil.rmtree(scratch_home, ignore_errors=True)


def _reason(error: Exception) -> str:
    if "No space left" in str(error):
        return "no space left on the device"
    strerror = error.strerror if isinstance(error, OSError) else None
    return (strerror or str(error)).strip().rstrip(".")
