"""What is derived from one version of the record: full vectors, codes, and structures over them.

::

    docs.nest/derived/<version>-<transaction>/
      vectors/      row-major full vectors, the key and the id of each row (`Mirror`)
      codes-128/    one byte a number of the first 128 (`Codes`), in the order of the vectors
      graph/        links (`Graph`)
      lists/        centroids and the order of the rows by list (`Lists`)
      listed-128/   codes in that order

Everything here can be made again, and is: when it is missing, when its checksum does not fit, when
another version is to be derived. What cannot be written (a folder that is read-only) is kept in
memory.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestvec._progress import progress
from nestvec.errors import StorageError
from nestvec.search import mirror, sealed
from nestvec.search.structures import graph, lists
from nestvec.search.structures.codes import Codes, encode, padded, scale_of

Arrays = dict[str, NDArray[Any]]


class Generation:
    """The derived side of one version; structures are loaded, or built, when they are asked for."""

    def __init__(self, folder: Path, *, show_progress: bool = False) -> None:
        self.folder = folder
        self.show_progress = show_progress
        self.mirror = mirror.Mirror(folder / "vectors")
        self._lock = threading.RLock()
        self._loaded: dict[str, Any] = {}

    @classmethod
    def derive(
        cls, home: Path, snapshot: Any, sizes: Iterable[int], *, show_progress: bool = False
    ) -> Generation:
        """Write the vectors of a snapshot of the store and open them."""
        folder = home / snapshot.fingerprint
        n = snapshot.count
        with progress("full vectors", n, show=show_progress, unit="rows") as advance:
            mirror.build(
                folder / "vectors",
                snapshot.scan(["id", "vector"]),
                n=n,
                layout=snapshot.layout,
                sizes=sizes,
                version=snapshot.version,
                progress=advance,
            )
        return cls(folder, show_progress=show_progress)

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

        def make(part: Path) -> Arrays:
            numbers = self.lists().numbers
            found = self._encode(dim)
            return {**found, "values": found["values"][numbers]}

        return self._get(f"listed-{dim}", make, _as_codes)

    def graph(self) -> graph.Graph:
        """Return the graph over full vectors."""

        def make(part: Path) -> Arrays:
            with self._progress("graph") as advance:
                return graph.build(self.mirror.unit_rows, len(self), progress=advance)

        return self._get("graph", make, graph.Graph)

    def lists(self) -> lists.Lists:
        """Return the inverted lists."""

        def make(part: Path) -> Arrays:
            with self._progress("lists") as advance:
                return lists.build(self.mirror.unit_rows, len(self), part, progress=advance)

        return self._get("lists", make, lists.Lists)

    def built(self) -> dict[str, int]:
        """Return the parts on disk and their bytes."""
        return {
            folder.name: sum(file.stat().st_size for file in folder.iterdir())
            for folder in sorted(self.folder.iterdir())
            if folder.is_dir() and not folder.name.endswith(".part")
        }

    def resident_bytes(self) -> int:
        """Return the bytes of arrays that were loaded into memory (the vectors are mapped)."""
        return self.mirror.resident_bytes + sum(one.nbytes for one in self._loaded.values())

    def damaged_files(self) -> list[str]:
        """Read everything and name what does not fit its checksum."""
        return [name for part in self.built() for name in sealed.damaged_files(self.folder / part)]

    def _encode(self, dim: int) -> Arrays:
        scale = scale_of(self.mirror.sample(), dim)
        values = np.empty((len(self), padded(dim)), np.uint8)
        with self._progress(f"codes of {dim} dims") as advance:
            for start, rows in self.mirror.blocks():
                encode(rows, scale, values[start : start + len(rows)])
                advance(len(rows))
        return {"values": values, "scale": scale}

    def _progress(self, what: str) -> Any:
        return progress(what, len(self), show=self.show_progress, unit="rows")

    def _get(self, name: str, make: Callable[[Path], Arrays], wrap: Callable[[Arrays], Any]) -> Any:
        if name in self._loaded:
            return self._loaded[name]
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = wrap(self._load(name) or self._make(name, make))
            return self._loaded[name]

    def _load(self, name: str) -> Arrays | None:
        folder = self.folder / name
        try:
            return sealed.load(folder, sealed.about(folder)["arrays"])
        except sealed.Damaged:
            return None

    def _make(self, name: str, make: Callable[[Path], Arrays]) -> Arrays:
        folder = self.folder / name
        part = sealed.part_of(folder)
        try:
            part.mkdir(parents=True, exist_ok=True)
        except OSError:  # nothing can be written here
            return make(part)
        arrays = make(part)
        try:
            for kept in part.iterdir():
                kept.unlink()  # what an interrupted build would have gone on from
            for label, array in arrays.items():
                sealed.write_array(part, label, array)
            sealed.seal(folder, {"arrays": list(arrays)})
        except (OSError, StorageError):  # a full disk: it serves from memory
            shutil.rmtree(part, ignore_errors=True)
        return arrays


def _as_codes(arrays: Arrays) -> Codes:
    return Codes(arrays["values"], arrays["scale"])
