"""The generations of an index: which of them fits a version of the record, and which may go."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from nestvec.search import sealed
from nestvec.search.generation import Generation

_log = logging.getLogger(__name__)


class _Stamp(NamedTuple):
    """What the name of a folder says: derived from that version."""

    version: int
    fingerprint: str
    folder: Path


class Derived:
    """The folder ``derived/`` of an index, which several processes use at once."""

    def __init__(self, home: Path, sizes: Iterable[int], *, show_progress: bool = False) -> None:
        self.home = home
        self.sizes = tuple(sizes)
        self.show_progress = show_progress
        self._refused: set[Path] = set()

    def stamps(self) -> list[_Stamp]:
        """Return what is there, newest first; unfinished ones too."""
        found = []
        with contextlib.suppress(OSError):
            for name in os.listdir(self.home):  # noqa: PTH208
                version = name.partition("-")[0]
                if version.isdigit():
                    stamp = name.partition(".")[0]  # its end is .part, and maybe more
                    found.append(_Stamp(int(version), stamp, self.home / name))
        return sorted(found, reverse=True)

    def newest(
        self, snapshot: Any, *, after: int = -1, having: Collection[str] = ()
    ) -> Generation | None:
        """Return the newest generation that fits a snapshot, if there is one.

        ``after`` a version, and ``having`` the structures that are named.
        """
        for stamp in self.stamps():
            if (
                stamp.folder.suffix != ".part"
                and after < stamp.version <= snapshot.version
                and stamp.folder not in self._refused
                and all((stamp.folder / name).is_dir() for name in having)
                and _is_of(stamp, snapshot)
            ):
                try:
                    return Generation.open(stamp.folder, show_progress=self.show_progress)
                except sealed.Damaged as error:
                    _log.warning("%s It is made again from the record.", str(error))
        return None

    def derive(self, snapshot: Any, parts: Iterable[str] = ()) -> Generation:
        """Derive a snapshot and remove what this makes old."""
        found = Generation.derive(
            self.home, snapshot, self.sizes, parts=parts, show_progress=self.show_progress
        )
        self.sweep(found)
        return found

    def sweep(self, kept: Generation) -> None:
        """Remove what is older than a generation, except what anybody has open or derives."""
        if not kept.folder.is_dir():  # it is in memory: the next process may want an older one
            return
        for stamp in self.stamps():
            if stamp.version <= kept.version and stamp.folder != kept.folder:
                with contextlib.suppress(OSError):
                    lock = sealed.locked(stamp.folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    try:
                        sealed.remove(stamp.folder)
                    finally:
                        os.close(lock)

    def discard(self, found: Generation) -> None:
        """Remove a generation in which vectors are damaged, or pass over it from now on."""
        sealed.remove(found.folder)
        if found.folder.exists():  # it may not be removed
            self._refused.add(found.folder)

    def drop_lost(self, stamps: Iterable[_Stamp], newest: Any) -> None:
        """Remove what was derived from versions that the record lost.

        A power cut, or a backup, can take the record back. The numbers of lost versions are then
        given again, to other rows, and what is derived would pass for true.

        Parameters
        ----------
        stamps
            As `stamps` returned them.
        newest
            The newest snapshot, seen after that.
        """
        for stamp in stamps:
            if not _is_of(stamp, newest):
                _log.warning(
                    "%s was derived from a version that the record has lost; it is removed.",
                    stamp.folder,
                )
                sealed.remove(stamp.folder)


def _is_of(stamp: _Stamp, snapshot: Any) -> bool:
    """Tell whether the version is one of a snapshot's; one that was compacted away is."""
    if stamp.version > snapshot.version:
        return False
    return snapshot.fingerprint_of(stamp.version) in (None, stamp.fingerprint)
