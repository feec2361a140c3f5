"""What is derived from one version of the record: full vectors, codes, and structures over them.

::

    docs.nest/derived/<version>-<transaction>/
      vectors/      row-major full vectors, the key and the id of each row (`Mirror`)
      codes-128/    one byte a number of the first 128 (`Codes`), in the order of the vectors
      graph/        links (`Graph`)
      lists/        centroids and the order of the rows by list (`Lists`)
      listed-128/   codes in that order
      rests-128/    two bits more a number (`Rests`), in the order of the vectors
      faiss_hnsw/   an index of faiss (`Peer`)

Everything here can be made again, and is: when it is missing, when its checksum does not fit, when
another version is to be derived. What cannot be written (the folder is read-only, the disk is full)
is kept in memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nestvec._progress import progress
from nestvec.search import mirror, sealed
from nestvec.search.sealed import Arrays, Damaged
from nestvec.search.structures import graph, lists, peers
from nestvec.search.structures.codes import (
    Codes,
    Rests,
    encode,
    encode_rests,
    padded,
    rests_scale,
    scale_of,
)

_KINDS = ("codes", "listed", "rests", "graph", "lists", *peers.KINDS)


class Generation:
    """The derived side of one version; structures are loaded, or built, when they are asked for.

    As long as it lives its folder stays, unless something in it is damaged.
    """

    def __init__(
        self, vectors: mirror.Mirror, lock: int | None = None, *, show_progress: bool = False
    ) -> None:
        self.mirror = vectors
        self.folder = vectors.folder.parent
        self.show_progress = show_progress
        self._loaded: dict[str, Any] = {}
        self._locks: dict[str, threading.Lock] = {}
        if lock is not None:
            weakref.finalize(self, os.close, lock)

    @classmethod
    def open(cls, folder: Path, *, show_progress: bool = False) -> Generation:
        """Open what was derived; raises `Damaged`."""
        try:
            lock = sealed.locked(folder, fcntl.LOCK_SH)
        except OSError as error:
            raise Damaged(f"{folder} is missing or cannot be read ({error}).") from error
        try:
            vectors = mirror.Mirror.open(folder / "vectors")
        except BaseException:
            os.close(lock)
            raise
        return cls(vectors, lock, show_progress=show_progress)

    @classmethod
    def derive(
        cls,
        home: Path,
        snapshot: Any,
        sizes: Iterable[int],
        *,
        parts: Iterable[str] = (),
        show_progress: bool = False,
    ) -> Generation:
        """Derive a snapshot of the store, with the structures named: they appear together.

        Another process that is about to do the same is waited for. What is left of a derivation
        that was interrupted is gone on from.
        """
        folder = home / snapshot.fingerprint

        def gathered(make: Callable[..., Any], where: Path) -> Any:
            n = snapshot.count
            with progress("full vectors", n, show=show_progress, unit="rows") as advance:
                return make(
                    where / "vectors",
                    snapshot.scan(["id", "vector"]),
                    n=n,
                    layout=snapshot.layout,
                    sizes=sizes,
                    version=snapshot.version,
                    progress=advance,
                )

        with contextlib.ExitStack() as stack:
            part, lock = sealed.part_of(folder), None
            try:
                home.mkdir(exist_ok=True)
                lock = stack.enter_context(sealed.building(folder))
                with contextlib.suppress(Damaged):  # somebody else has made it meanwhile
                    return cls.open(folder, show_progress=show_progress)
                try:
                    vectors = mirror.Mirror.open(part / "vectors")
                except Damaged:
                    gathered(mirror.build, part)
                    vectors = mirror.Mirror.open(part / "vectors")
                made = cls(vectors, os.dup(lock), show_progress=show_progress)
            except OSError:  # nothing can be written here
                if lock is not None:
                    shutil.rmtree(part, ignore_errors=True)
                    lock = None
                made = cls(gathered(mirror.in_memory, folder), show_progress=show_progress)
            for name in parts:
                made.make(name)
                made.release()  # nobody has asked for it yet
            if lock is not None:
                sealed.put_in_place(folder)
                made.folder, made.mirror.folder = folder, folder / "vectors"
                fcntl.flock(lock, fcntl.LOCK_SH)
            return made

    def __len__(self) -> int:
        return len(self.mirror)

    @property
    def version(self) -> int:
        """The version of the record that this was derived from."""
        return self.mirror.version

    def codes(self, dim: int) -> Codes:
        """Return the codes of a prefix size in the order of the vectors."""
        return self._get(f"codes-{dim}", lambda part: self._encode(dim), _as_codes)

    def listed(self, dim: int) -> Codes:
        """Return the codes of a prefix size in the order of the lists."""

        def make(part: Path | None) -> Arrays:
            numbers = self.lists().numbers
            found = self._encode(dim)
            return {**found, "values": found["values"][numbers]}

        return self._get(f"listed-{dim}", make, _as_codes)

    def rests(self, dim: int) -> Rests:
        """Return what the codes of a prefix size leave, in the order of the vectors."""

        def make(part: Path | None) -> Arrays:
            sample = self.mirror.sample(dim)
            scale = scale_of(sample, dim)
            values = np.empty((len(self), padded(dim) // 4), np.uint8)
            coded = np.empty((0, padded(dim)), np.uint8)
            with self._progress(f"two bits more of {dim} dims") as advance:
                for start, rows in self.mirror.blocks(dim):
                    if len(coded) < len(rows):
                        coded = np.empty((len(rows), padded(dim)), np.uint8)
                    encode(rows, scale, coded[: len(rows)])
                    encode_rests(rows, coded, scale, values[start : start + len(rows)])
                    advance(len(rows))
            return {"values": values, "steps": rests_scale(sample, scale)}

        return self._get(f"rests-{dim}", make, lambda found: Rests(found["values"], found["steps"]))

    def graph(self) -> graph.Graph:
        """Return the graph over full vectors."""

        def make(part: Path | None) -> Arrays:
            with self._progress("graph") as advance:
                return graph.build(self.mirror.unit_rows, len(self), progress=advance)

        return self._get("graph", make, graph.Graph)

    def lists(self) -> lists.Lists:
        """Return the inverted lists."""

        def make(part: Path | None) -> Arrays:
            with self._progress("lists") as advance:
                return lists.build(self.mirror.unit_rows, len(self), part, progress=advance)

        return self._get("lists", make, lists.Lists)

    def peer(self, name: str) -> peers.Peer:
        """Return an index of faiss by its name in `peers.KINDS`."""

        def make(part: Path | None) -> Arrays:
            with self._progress(name) as advance:
                return peers.build(name, self.mirror.unit_rows, len(self), progress=advance)

        return self._get(name, make, lambda arrays: peers.Peer(name, arrays))

    def make(self, name: str) -> None:
        """Load or build a structure by its name, ``codes-128``, unless there are no rows."""
        kind, _, dim = name.partition("-")
        if kind in peers.KINDS and len(self):
            self.peer(kind)
        elif kind in _KINDS and len(self):
            getattr(self, kind)(*([int(dim)] if dim else []))

    def names(self) -> list[str]:
        """Return the structures that stand, on disk or in memory."""
        return sorted({*self.built(), *self._loaded} - {"vectors"})

    def built(self) -> dict[str, int]:
        """Return the parts on disk and their bytes."""
        found = {}
        with contextlib.suppress(FileNotFoundError):  # a process that found damage removes it
            for folder in sorted(self.folder.iterdir()):
                kind = folder.name.partition("-")[0]
                if kind in ("vectors", *_KINDS) and folder.suffix != ".part":
                    found[folder.name] = sum(file.stat().st_size for file in folder.iterdir())
        return found

    def resident_bytes(self) -> int:
        """Return the bytes of arrays that were loaded into memory (the vectors are mapped)."""
        held = self.mirror.resident_bytes + sum(one.nbytes for one in [*self._loaded.values()])
        walked = self._loaded.get("graph")
        return held if walked is None else held + walked.scratch_bytes

    def release(self) -> None:
        """Let go of structures that can be loaded from disk again."""
        for name in [*self._loaded]:
            if (self.folder / name).is_dir():
                self._loaded.pop(name, None)

    def damaged_files(self) -> dict[str, list[str]]:
        """Read everything, and name by part what does not fit its checksum."""
        found = {name: sealed.damaged_files(self.folder / name) for name in self.built()}
        return {name: files for name, files in found.items() if files}

    def remove(self, name: str) -> None:
        """Remove a structure from disk; it is made again when it is asked for after that."""
        sealed.remove(self.folder / name)

    def _encode(self, dim: int) -> Arrays:
        scale = scale_of(self.mirror.sample(dim), dim)
        values = np.empty((len(self), padded(dim)), np.uint8)
        with self._progress(f"codes of {dim} dims") as advance:
            for start, rows in self.mirror.blocks(dim):
                encode(rows, scale, values[start : start + len(rows)])
                advance(len(rows))
        return {"values": values, "scale": scale}

    def _progress(self, what: str) -> Any:
        return progress(what, len(self), show=self.show_progress, unit="rows")

    def _get(
        self,
        name: str,
        make: Callable[[Path | None], Arrays],
        wrap: Callable[[Arrays], Any],
    ) -> Any:
        found = self._loaded.get(name)
        if found is None:
            with self._locks.setdefault(name, threading.Lock()):
                found = self._loaded.get(name)
                if found is None:
                    arrays = self._load(name) or self._make(name, make)
                    found = self._loaded[name] = wrap(arrays)
        return found

    def _load(self, name: str) -> Arrays | None:
        with contextlib.suppress(Damaged):
            return sealed.load(self.folder / name)[1]
        return None

    def _make(self, name: str, make: Callable[[Path | None], Arrays]) -> Arrays:
        folder = self.folder / name
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(sealed.building(folder))
            except OSError:  # nothing can be written here
                return make(None)
            arrays = self._load(name)  # another process may have made it meanwhile
            if arrays is None:
                part = sealed.part_of(folder)
                arrays = make(part)
                try:
                    sealed.seal(folder, arrays, {})
                except OSError:  # a full disk: it serves from memory
                    shutil.rmtree(part, ignore_errors=True)
            return arrays


def _as_codes(arrays: Arrays) -> Codes:
    return Codes(arrays["values"], arrays["scale"])
