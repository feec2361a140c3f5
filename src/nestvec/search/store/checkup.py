"""Is everything there, and as it was written? Damage and waste, by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nestvec._extras import require
from nestvec.errors import FileFormatError
from nestvec.search.store import durable
from nestvec.search.store.snapshot import Snapshot, as_matrix

pa = require("pyarrow", extra="index", why="an index")
pc = require("pyarrow.compute", extra="index", why="an index")


@dataclass(frozen=True)
class Report:
    """What a check found.

    Parameters
    ----------
    version, rows
        What was read.
    damage
        Sentences, each naming a file or rows; empty if all is well.
    waste
        Files that no version needs: a write was interrupted. `Store.compact` removes them.
    unverified
        Files without a checksum, because a program other than nestvec wrote them.
    files, bytes
        Number and size of the files of this version.
    """

    version: int
    rows: int
    damage: tuple[str, ...]
    waste: tuple[Path, ...]
    unverified: tuple[Path, ...]
    files: int
    bytes: int

    @property
    def ok(self) -> bool:
        """Whether there is no damage; waste is none."""
        return not self.damage

    def __str__(self) -> str:
        lines = [
            f"version {self.version}: {self.rows:,} rows, {self.files:,} files, "
            f"{self.bytes:,} bytes: {'ok' if self.ok else 'DAMAGED'}"
        ]
        lines += self.damage
        if self.unverified:
            lines.append(
                f"{len(self.unverified)} files have no checksum: nestvec did not write them"
            )
        if self.waste:
            lines.append(f"{len(self.waste)} files of interrupted writes; compact removes them")
        return "\n".join(lines)


def size(path: Path) -> int:
    """Bytes of a file, 0 if it has just been removed."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def files_of(folder: Path, fragments: Iterable[Any]) -> Iterator[Path]:
    """Yield the data and deletion files of fragments (Lance's FragmentMetadata)."""
    record = folder / "record"
    for fragment in fragments:
        for file in fragment.files:
            yield record / "data" / file.path
        if fragment.deletion_file is not None:
            yield record / fragment.deletion_file.path(fragment.id)


def check_manifest(folder: Path, version: int) -> None:
    """Raise `FileFormatError` if the manifest of a version is not as it was written.

    Lance itself notices one in six flipped bits there.
    """
    manifest = durable.manifest_path(folder / "record", version)
    said = durable.read_checksums(folder, version).get(manifest)
    if said is not None and said != durable.checksum(manifest):
        raise FileFormatError(
            f"cannot open {folder}: {manifest} is not as it was written (its checksum differs). "
            f"Restore it from a backup, or remove it to fall back to the version before, which "
            f"lacks the last write."
        )


def check(folder: Path, snapshot: Snapshot) -> Report:
    """Read every file of a version, and all its rows."""
    fragments = snapshot.dataset.get_fragments()
    manifest = durable.manifest_path(folder / "record", snapshot.version)
    files = [manifest, *files_of(folder, (fragment.metadata for fragment in fragments))]
    sums = durable.read_checksums(folder)
    damage = {file: said for file in files if (said := _file_damage(file, sums.get(file)))}
    whole = [f for f in fragments if not damage.keys() & set(files_of(folder, [f.metadata]))]
    said = [f"{file} {what}" for file, what in damage.items()]
    said += _row_damage(snapshot, whole, complete=len(whole) == len(fragments))
    with durable.writer_lock(folder):  # what a writer is writing is no waste
        waste = tuple(sorted(_waste(folder, snapshot)))
    return Report(
        version=snapshot.version,
        rows=snapshot.count,
        damage=tuple(said),
        waste=waste,
        unverified=tuple(file for file in files if file not in sums),
        files=len(files),
        bytes=sum(map(size, files)),
    )


def _file_damage(file: Path, said: str | None) -> str | None:
    try:
        found = durable.checksum(file)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if said is not None and found != said:
        return "is not as it was written (its checksum differs)"
    return None


def _row_damage(snapshot: Snapshot, fragments: list[Any], *, complete: bool) -> list[str]:
    """Read the rows of fragments whose files are whole."""
    said = []
    ids = []
    for fragment in fragments:
        name = fragment.metadata.files[0].path
        try:
            for batch in snapshot.batches(["id", "vector"], [fragment]):
                vectors = as_matrix(batch["vector"])
                wrong = ~np.isfinite(vectors).all(axis=1) | ~vectors.any(axis=1)
                if wrong.any():
                    first = batch["id"][int(wrong.argmax())].as_py()
                    said.append(
                        f"data/{name}: the vector of id {first!r} holds NaN or Inf or is all zeros"
                    )
            # apart, because ids that are kept would keep the pages they were read with
            ids += [batch["id"] for batch in snapshot.batches(["id"], [fragment])]
        except FileFormatError as error:
            said.append(f"data/{name} cannot be read ({durable.reason(error.__cause__ or error)})")
    every = pa.chunked_array(ids, type=snapshot.layout.schema.field("id").type)
    counts = pc.value_counts(every)
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    if len(twice):
        said.append(f"{len(twice)} ids stand more than once, like {twice[0].as_py()!r}")
    if complete and not said:
        keys = snapshot.keys()
        rows = {len(every), snapshot.count, len(np.unique(keys.row_ids))}
        if len(rows) > 1:
            said.append(f"the numbers of ids, rows and row ids differ: {sorted(rows)}")
    return said


def _waste(folder: Path, snapshot: Snapshot) -> Iterator[Path]:
    """Yield what no version needs; the writer lock is held."""
    record = folder / "record"
    tracked = snapshot.dataset.tracked_files().read_all()["path"].to_pylist()
    needed = {record / name for name in tracked}
    for name in ("data", "_deletions", "_transactions"):
        for path in (record / name).glob("*"):
            if path not in needed:
                yield path


def remove_waste(folder: Path, snapshot: Snapshot) -> None:
    """Remove what no version, older or newer, needs; the writer lock is held."""
    for path in _waste(folder, snapshot):
        path.unlink(missing_ok=True)
