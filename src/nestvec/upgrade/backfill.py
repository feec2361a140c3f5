"""Re-embed pending rows in the background, some at a time, each piece durable when it is counted.

Nothing else remembers how far it came: a row is done when the new index holds its vector, keyed to
the version of the row that was embedded. So a backfill that was killed is begun again and goes on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nestvec._atomic import written_beside
from nestvec._extras import require
from nestvec._progress import progress
from nestvec.errors import StorageError
from nestvec.search.index import Index
from nestvec.search.store import Batch, durable
from nestvec.search.transition import FOLDER
from nestvec.search.upgrading import Upgrading, keyed
from nestvec.space import Embeddings
from nestvec.upgrade import learning
from nestvec.upgrade.order import pending_rows
from nestvec.upgrade.sources import NewVectors

pa = require("pyarrow", extra="index", why="an index")

_log = logging.getLogger(__name__)

PACE = "backfill.json"
MADE = "made.json"  # digest of vectors that were given -> version of the index at that time
_ROWS_AN_ORDER = 20_000  # rows are ordered anew after as many, or a tenth: writes go on meanwhile
_ROWS_A_PIECE = 8192
_S_A_PIECE = 2.0  # what a kill can cost
_FRAGMENTS = 64  # pieces of the new index before they are joined


def backfill(
    index: Index,
    upgrading: Upgrading,
    vectors: NewVectors,
    *,
    order: str,
    traffic: Mapping[Any, float | int] | None,
    queries: Embeddings | None,
    learn: bool,
    seed: int,
    batch_size: int,
    rows_per_second: float | int | None,
    max_rows: int | None,
    show_progress: bool,
) -> int:
    """Re-embed until no row is pending that ``vectors`` can make; return how many were."""
    # made vectors fit rows as they were when they were first given, and none written since
    newest = None
    if vectors.is_made:
        newest = _first_given(upgrading.home.path, vectors.digest(), index.version)
    blank: dict[int, Any] = {}  # row id -> id
    sides = upgrading.sides(*upgrading.views())
    n_pending = int(np.count_nonzero(~sides.is_done))
    total = n_pending if max_rows is None else min(n_pending, max_rows)
    with progress("backfill", total, show=show_progress, unit="rows") as advance:
        pieces = _Pieces(upgrading, order, rows_per_second, advance)
        while max_rows is None or pieces.n < max_rows:
            old, new = upgrading.views()
            sides = upgrading.sides(old, new)
            keys = sides.keys
            with pieces.not_counted():
                rows = pending_rows(
                    order, index, upgrading, old, new, traffic=traffic, queries=queries, seed=seed
                )
            if newest is not None:
                rows = rows[keys.updated[rows] <= newest]
            if blank:
                rows = rows[~np.isin(keys.row_ids[rows], [*blank])]
            if vectors.is_made and len(rows):
                rows = rows[vectors.has(old.ids(old.rows_of(keys.at(rows))))]
            at_once = [max(_ROWS_AN_ORDER if queries is None else 1, n_pending // 10)]
            if max_rows is not None:
                at_once.append(max_rows - pieces.n)
            if learn:
                at_once.append(learning.rows_until(upgrading, old, new))
            rows = rows[: min(at_once)]
            if not len(rows):
                break
            size = batch_size if rows_per_second is None else min(batch_size, rows_per_second)
            size = max(1, int(size))
            try:
                for start in range(0, len(rows), size):
                    some = rows[start : start + size]
                    table = old.snapshot.read(keys.row_ids[some], vectors.columns)
                    says = vectors.can_embed(table)
                    if not says.all():
                        ids = table["id"].filter(pa.array(~says)).to_pylist()
                        blank.update(zip(keys.row_ids[some[~says]].tolist(), ids, strict=True))
                        table, some = table.filter(pa.array(says)), some[says]
                    if not len(some):
                        continue
                    made = keyed(vectors(table), keys.at(some), sides.bridged[some])
                    pieces.add(made, len(some))
            finally:  # also when it is interrupted: what is made is kept
                pieces.flush()
            with pieces.not_counted():
                if learn and _learned(upgrading, seed, pieces.n):
                    pieces.upgrading = upgrading = index._upgrading() or upgrading
        if blank:
            some = ", ".join(map(str, [*blank.values()][:5])) + ", ..." * (len(blank) > 5)
            _log.warning(
                "%s: %s rows have nothing to embed in the column %r, and stay pending: %s",
                *(index.path, f"{len(blank):,}", vectors.column, some),
            )
        return pieces.n


def _learned(upgrading: Upgrading, seed: int, n_done: int) -> bool:
    try:
        return learning.again(upgrading, seed=seed)
    except StorageError as error:
        raise StorageError(
            f"{n_done:,} rows were embedded and are kept; then the bridge was to be learned again, "
            f"and could not be written ({durable.reason(error.__cause__ or error)}). Free some "
            f"space and begin the backfill again, or leave that out with learn=False."
        ) from error


def _first_given(root: Path, digest: str, version: int) -> int:
    """Return the version of the index at which vectors were first given; this one if it is now."""
    file = root / FOLDER / MADE
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if digest not in known:
        known[digest] = version
        with written_beside(file) as scratch:
            scratch.write_text(json.dumps(known) + "\n", encoding="utf-8")
    return known[digest]


class _Pieces:
    """Vectors on their way into the new index, which takes them some thousand at a time."""

    def __init__(
        self, upgrading: Upgrading, order: str, rows_per_second: float | int | None, advance: Any
    ) -> None:
        self.upgrading, self.advance = upgrading, advance
        self.order, self.limit = order, rows_per_second
        self.n = self.n_held = 0
        self.held: list[Batch] = []
        self.started = self.flushed = time.monotonic()

    @contextlib.contextmanager
    def not_counted(self) -> Iterator[None]:
        """Leave out of the pace what is no embedding; a rate would else be made up for at once."""
        began = time.monotonic()
        yield
        self.started += time.monotonic() - began

    def add(self, piece: Batch, n: int) -> None:
        self.held.append(piece)
        self.n_held += n
        if self.limit is not None:
            ahead = (self.n + self.n_held) / self.limit - (time.monotonic() - self.started)
            time.sleep(max(0.0, ahead))
        if self.n_held >= _ROWS_A_PIECE or time.monotonic() - self.flushed >= _S_A_PIECE:
            self.flush()

    def flush(self) -> None:
        held, n, self.held, self.n_held = self.held, self.n_held, [], 0
        if not held:
            return
        new = self.upgrading.new
        self.upgrading.fill(held)
        self.n += n
        self.flushed = time.monotonic()
        self.advance(n)
        self._say_pace()
        with new.written() as store:
            if len(store.snapshot.dataset.get_fragments()) > _FRAGMENTS:
                store.compact()

    def _say_pace(self) -> None:
        seconds = self.flushed - self.started
        said = {"order": self.order, "rows": self.n, "seconds": seconds, "limit": self.limit}
        with written_beside(self.upgrading.home.path / FOLDER / PACE) as scratch:
            scratch.write_text(json.dumps(said) + "\n", encoding="utf-8")


def pace(root: Path) -> dict[str, Any]:
    """Return what the last backfill said of itself: nothing if there was none."""
    try:
        return json.loads((root / FOLDER / PACE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
