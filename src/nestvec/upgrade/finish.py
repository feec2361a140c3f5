"""The last step: an index of the new vectors alone takes the place of the old one, in one moment.

It is made whole in a folder of its own inside the index, and then one small file, the stamp, says
that the index is there. A process that is killed before that moment has changed nothing; after it,
all that is left to do is to remove the old files, which the next `finish` or compaction does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator

import numpy as np

from nestvec._progress import progress
from nestvec.errors import DataError, FileFormatError
from nestvec.search.home import Home
from nestvec.search.store import Batch, Store
from nestvec.search.store.layout import point_to
from nestvec.search.store.snapshot import as_matrix
from nestvec.search.transition import tidy
from nestvec.search.upgrading import Upgrading
from nestvec.search.view import View
from nestvec.space import Embeddings


def finish(upgrading: Upgrading, store: Store, *, drop_pending: bool, show_progress: bool) -> int:
    """Let the index be one of the new Space; the old store is locked. Return its rows."""
    old, new = upgrading.views()
    sides = upgrading.sides(old, new)
    n_pending = int(np.count_nonzero(~sides.is_done))
    n_done = len(sides.is_done) - n_pending
    if n_pending and not drop_pending:
        raise DataError(
            f"{n_pending:,} of {len(sides.is_done):,} rows have no new vector yet. Backfill the "
            f"rest first; or drop_pending=True deletes them from the index."
        )
    report = upgrading.new.store.check()
    if not report.ok:
        raise FileFormatError(
            f"new vectors are damaged: {report.damage[0]}. Restore the file from a backup, or roll "
            f"the upgrade back and begin it again; the index is whole."
        )
    tidy(store)  # what a finish has left that was killed, a whole index each
    layout = store.layout
    home = store.root / f"home-{uuid.uuid4().hex[:8]}"
    try:
        with progress("finish", n_done, show=show_progress, unit="rows") as advance:
            made = Store.create(
                home,
                upgrading.space,
                id_type=layout.id_type,
                precision=layout.precision,
                payload=layout.payload,
                durability=store.durability,
                rows=_rows(upgrading, old, new, advance),
            )
        Home(made, show_progress=show_progress).view()  # so that no search waits for it
    except BaseException:
        shutil.rmtree(home, ignore_errors=True)
        raise
    point_to(store.root, home)
    with contextlib.suppress(OSError):
        os.utime(store.path / "record" / "_versions")  # readers look whether they are behind
    return n_done


def _rows(upgrading: Upgrading, old: View, new: View, advance) -> Iterator[Batch]:
    sides = upgrading.sides(old, new)
    layout = old.snapshot.layout
    at = n_before = 0
    for rows in old.snapshot.scan(["id", *layout.payload.names]):
        n = len(rows.columns)
        done = sides.is_done[at : at + n]
        at += n
        if not done.any():
            continue
        n_done = int(np.count_nonzero(done))
        row_ids = sides.new_row[n_before : n_before + n_done]
        n_before += n_done
        vectors = as_matrix(new.snapshot.read(row_ids, ["vector"])["vector"])
        kept = rows.columns.filter(done)
        yield Batch(
            Embeddings(vectors, upgrading.space),
            kept["id"].to_pylist(),
            kept.select(layout.payload.names),
        )
        advance(n_done)
