"""Index: a durable gallery of one Space, searched by plans."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nestvec._checks import as_matrix
from nestvec._extras import require
from nestvec.errors import DataError, PlanError, SpaceMismatchError
from nestvec.search import engine, planner, trials
from nestvec.search.cascade import Cascade, Plan, Stage
from nestvec.search.given import (
    batches_given,
    check_space,
    is_whole,
    judged,
    known_structures,
    names_of,
    only_stamped,
    opening,
    plan_given,
    returning,
)
from nestvec.search.hits import Hits, with_payload
from nestvec.search.home import Home
from nestvec.search.planner import Planned
from nestvec.search.sealed import Damaged
from nestvec.search.store import Batch, Store, Written, durable
from nestvec.search.store.layout import Ids
from nestvec.search.store.snapshot import as_matrix as as_vectors
from nestvec.search.transition import STATE, tidy
from nestvec.search.view import View
from nestvec.space import Embeddings, Space

if TYPE_CHECKING:
    from nestvec.search.upgrading import Upgrading

pa = require("pyarrow", extra="index", why="an index")

Batches = Batch | Embeddings | Iterable[Batch | Embeddings]


class Index:
    """A gallery of one Space on disk: durable, searched by plans, changed while it is read.

    Every write is one version, whole or not at all, and is on disk when it returns. Searches see
    the newest version, at once: what was written since structures were built is scored beside
    them, and what was deleted is passed over.

    Make one with `Index.create` or `Index.open`.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self._upgrade: tuple[Any, Upgrading | None] = (None, None)

    # --- making and opening ---------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        rows: Batch | Embeddings | Space,
        *,
        payload: Any = None,
        id_type: str | None = None,
        precision: str = "float32",
        durability: str = "power",
        show_progress: bool = False,
    ) -> Index:
        """Make an index at ``path``.

        Parameters
        ----------
        path
            Nothing may stand there, except an empty folder.
        rows
            `Embeddings` (with ids, or they are numbered), a `Batch` of them with payload, or a
            `Space` for an empty index.
        payload
            Columns beside id and vector: a pyarrow.Table or a mapping of columns of as many rows,
            or a pyarrow.Schema.
        id_type
            ``"int"`` or ``"str"``; that of the rows by default.
        precision
            ``"float32"`` or ``"float16"``, of the vectors on disk.
        durability
            ``"power"``: a write that returned survives a power cut. ``"process"``: it survives the
            end of the process, and costs no sync.

        Raises
        ------
        StorageError
            If anything stands at ``path``, or the disk refuses.
        DataError
            If rows do not fit.
        """
        space, batch, schema = opening(rows, payload)
        if id_type is None:
            id_type = "int" if batch is None or is_whole(batch.ids) else "str"
        store = Store.create(
            path,
            space,
            id_type=id_type,
            precision=precision,
            payload=schema,
            durability=durability,
            rows=batch,
        )
        return cls(Home(store, show_progress=show_progress))

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        durability: str = "power",
        show_progress: bool = False,
    ) -> Index:
        """Open an index at its newest version.

        Raises
        ------
        StorageError
            If there is none at ``path``.
        FileFormatError
            If it is damaged, or was written by a newer nestvec.
        """
        return cls(Home.open(path, durability=durability, show_progress=show_progress))

    @property
    def path(self) -> Path:
        """The folder that it was opened at."""
        return self._home.path

    @property
    def show_progress(self) -> bool:
        """Whether long work shows how far it is."""
        return self._home.show_progress

    def __repr__(self) -> str:
        return f"Index({str(self.path)!r}, {len(self):,} rows, version {self.version})"

    def __len__(self) -> int:
        return self._home.snapshot().count

    @property
    def space(self) -> Space:
        """The Space that all vectors live in; an upgrade that is finished changes it."""
        self._home.follow()
        return self._home.store.layout.space

    @property
    def upgrading_to(self) -> Space | None:
        """The Space that an upgrade under way leads to: its queries are answered, too."""
        self._home.follow()
        found = self._upgrading()
        return None if found is None else found.space

    @property
    def schema(self) -> Any:
        """The columns, a pyarrow.Schema: id, vector, then the payload."""
        return self._home.store.layout.schema

    @property
    def version(self) -> int:
        """The newest version."""
        return self._home.snapshot().version

    # --- writing --------------------------------------------------------------------------------

    def add(
        self, rows: Batches | ArrayLike, *, ids: ArrayLike | None = None, payload: Any = None
    ) -> Written:
        """Add rows with new ids, all in one version.

        ``rows`` are `Embeddings` with ids, vectors (n, dim) and ``ids``, a `nestvec.search.Batch`,
        or an iterable of `Embeddings` and batches, which is read to its end before anything is
        locked. Raises `DataError` if an id exists; nothing is written then.
        """
        return self._put("append", batches_given(rows, ids, payload))

    def upsert(
        self, rows: Batches | ArrayLike, *, ids: ArrayLike | None = None, payload: Any = None
    ) -> Written:
        """Add rows, or replace those whose ids exist, all in one version; they are as for `add`."""
        return self._put("upsert", batches_given(rows, ids, payload))

    def delete(self, ids: Ids, *, missing_ok: bool = False) -> Written:
        """Remove rows by their ids, or one by its id, all in one version.

        Raises `DataError` if one does not exist, unless ``missing_ok``; nothing is removed then.
        """
        with self._home.written() as store:
            return store.delete(ids, missing_ok=missing_ok)

    # --- reading --------------------------------------------------------------------------------

    def get(self, ids: Ids, *, columns: str | Iterable[str] = ("id", "vector")) -> Any:
        """Return rows by their ids, or one by its id, as a pyarrow.Table, in the order asked for.

        Raises `DataError` for an id that does not exist.
        """

        def read() -> Any:
            snapshot = self._home.snapshot()
            return snapshot.read(snapshot.rows_of(ids), names_of(columns))

        return self._steadily(read)

    def embeddings(self) -> Embeddings:
        """Return every row of the newest version, in memory, with its id; an empty one raises."""

        def read() -> Embeddings:
            snapshot = self._home.snapshot()
            blocks = [rows.columns for rows in snapshot.scan(("id", "vector"))]
            if not blocks:
                raise DataError(f"{self.path} holds no rows.")
            vectors = [as_vectors(block["vector"]).astype(np.float32) for block in blocks]
            ids = [one for block in blocks for one in block["id"].to_pylist()]
            return Embeddings(np.concatenate(vectors), snapshot.layout.space, ids)

        return self._steadily(read)

    def search(
        self,
        queries: Embeddings | ArrayLike,
        k: int | None = None,
        *,
        plan: Plan | Cascade | Planned | str | None = None,
        cascade: Cascade | str | None = None,
        dims: int | None = None,
        recall: float | int | None = None,
        filter: str | None = None,
        columns: str | Iterable[str] | None = None,
        threads: int | None = None,
    ) -> Hits:
        """Return the nearest rows of each query.

        Parameters
        ----------
        queries : (n_queries, dim), or one of (dim,)
            Embeddings of the index's Space, or an array that you know to be.
        k
            Rows a query; 10, or what the plan returns.
        plan
            What to run: a `Plan`, what `plan` returned, a `Cascade`, or text like
            ``"graph(ef=80) 384:int8@40 > 384@10"``. By default the plan that was stored
            (`set_plan`), else every row is scored at full size.
        cascade
            Scan every row by these stages instead, like ``"64:int8@100 > 384@10"``.
        dims
            Score every row at this prefix size instead.
        recall
            Run the cheapest plan that was certified for this recall when the stored plan was made
            (at its confidence, for all rows alike: a filter may find more or less).
        filter
            SQL condition on id and payload: ``"year >= 2020 AND lang = 'de'"``.
        columns
            Payload columns to return.
        threads
            At most this many; by default all cores, for batches that are worth it.

        Raises
        ------
        SpaceMismatchError
            If the queries are of another Space.
        PlanError
            If the plan does not fit the index, or none was certified for ``recall``.
        DataError
            If queries, filter or columns do not fit.
        """

        def ask() -> Hits:
            view = self._home.view()
            upgrading = self._upgrading_to(queries, view)
            asked = self._queries(queries, view if upgrading is None else upgrading)
            if upgrading is not None and (plan, cascade, dims, recall) != (None,) * 4:
                raise PlanError(
                    f"{self.path} is being upgraded: queries of its new space follow the stored "
                    f"plan where rows have old vectors, and score each row that has a new one. "
                    f"Leave out plan, cascade, dims and recall until the upgrade is finished."
                )
            chosen = self._chosen(plan, cascade, dims, recall, k)
            if upgrading is not None:
                view, found = upgrading.search(chosen, asked, filter, threads)
            else:
                try:
                    found = self._run(chosen, asked, view, filter, threads)
                except Damaged as error:
                    view = self._home.mended(view, error)
                    found = self._run(chosen, asked, view, filter, threads)
            ids = view.ids(found.rows)
            hits = Hits(ids, found.scores, chosen, view.snapshot.version, None, found)
            return hits if columns is None else with_payload(hits, view, names_of(columns))

        return self._steadily(ask)

    # --- plans ----------------------------------------------------------------------------------

    @property
    def plan_stored(self) -> Plan | None:
        """The plan that searches follow."""
        return self._home.kept_plan.read()[0]

    def plan(
        self,
        queries: Embeddings | ArrayLike | None = None,
        *,
        qrels: Mapping[str, Mapping[str, int]] | None = None,
        recall: float | int | None = None,
        ndcg_loss: float | int | None = None,
        ms: float | int | None = None,
        resident_bytes: float | int | None = None,
        k: int = 10,
        confidence: float | int = 0.95,
        structures: Iterable[str] = tuple(engine.STRUCTURES),
        n_queries: int | None = None,
        seed: int = 0,
        keep: bool = True,
    ) -> Planned:
        """Find the cheapest plan that keeps a budget on your data, certify it and store it.

        Parameters
        ----------
        queries : (n, dim), optional
            The more like those to come the better. Half of them choose the plan, the others, which
            took no part in that, certify it. By default rows of the gallery stand in, each passing
            over itself, and the certificate is for queries like them.
        qrels
            Relevant documents of each query, ``{query id: {document id: grade}}``, grades above 0;
            the queries are Embeddings with ids. nDCG@k is measured then, beside recall, with the
            queries that have a relevant document.
        recall
            Share of the ``k`` exact full-size neighbours to find, of each query on average, with
            ``confidence``; the cheapest plan that does is taken. 0.99 if no budget is given.
        ndcg_loss
            In place of ``recall``: how far nDCG@k by ``qrels`` may fall below that of exact
            full-size search, on average, like 0.005.
        ms
            Milliseconds a query may take, asked alone and on one thread; the plan of most recall
            within it.
        resident_bytes
            Bytes a vector may take in memory, everything included.
        structures
            Those to try; ours by default, faiss's (``"faiss_hnsw_sq8"``) where they are named. They
            are built if they are not there.
        n_queries
            At most this many, drawn at random; by default all queries, or 2,000 rows.
        keep
            Store the plan, so that searches follow it.

        Returns
        -------
        Planned
            Where no cheaper plan was certified it is exact search, which scores every row. Its
            ``plan`` is None if that is not within the budget; ``sentence`` says why, and what could
            be. Nothing is stored then.

        Raises
        ------
        DataError
            If a setting does not fit, queries and qrels do not fit together, or there are too few
            queries or rows.
        """
        if recall is None and ndcg_loss is None and ms is None and resident_bytes is None:
            recall = 0.99
        if ndcg_loss is not None and (qrels is None or recall is not None):
            raise DataError(
                "ndcg_loss needs the qrels that it is measured by, and stands in place of recall."
            )
        planner.check(recall, ndcg_loss, confidence, k, n_queries)
        view = self._home.view()
        labels = None
        if qrels is not None:
            queries, labels = judged(queries, qrels)
        asked = None if queries is None else self._queries(queries, view)
        if view.n_fresh > view.everyone.n_derived:  # it would be planned for the fewer
            self._home.renewed(view)

        def find(view: View) -> Planned:
            try:
                drawn = trials.draw(
                    view,
                    asked,
                    k=k,
                    n=n_queries,
                    seed=seed,
                    labels=labels,
                    show_progress=self.show_progress,
                )
                return planner.find(
                    *drawn.halves(),
                    recall=None if recall is None else float(recall),
                    ndcg_loss=None if ndcg_loss is None else float(ndcg_loss),
                    ms=None if ms is None else float(ms),
                    resident_bytes=None if resident_bytes is None else float(resident_bytes),
                    structures=known_structures(structures, engine.KNOWN),
                    confidence=float(confidence),
                    seed=seed,
                    gallery_like=asked is None,
                    show_progress=self.show_progress,
                )
            finally:
                view.release()  # all that was tried is in memory

        view, found = self._home.healed(find)
        if keep and found.plan is not None:
            self.set_plan(found, version=view.snapshot.version)
        return found

    def set_plan(self, plan: Plan | Cascade | Planned | str | None, **about: Any) -> None:
        """Store the plan that searches follow from now on, with what is known about it.

        With what `plan` returned that is its certificate, which ``search(recall=)`` follows.
        """
        if plan is None:
            with durable.storage_errors(self.path):
                self._home.kept_plan.remove()
            return
        chosen = plan_given(plan)
        engine.check(chosen, self._home.view().generation)
        if isinstance(plan, Planned):
            about = {**planner.as_json(plan), **about}
        kept = self._home.kept_plan  # of where the index lives now
        with durable.storage_errors(self.path), durable.writer_lock(kept.folder):
            kept.write(chosen, about)

    def build(self, *names: str) -> None:
        """Build structures now rather than when a plan first asks.

        ``"graph"`` and ``"lists"`` are ours; ``"faiss_hnsw"``, ``"faiss_hnsw_sq8"``,
        ``"faiss_hnsw_panorama"``, ``"faiss_ivf"`` and ``"faiss_ivf_rabitq"`` are faiss's.
        """
        for name in known_structures(names, engine.KNOWN):
            self._home.healed(lambda view, name=name: view.generation.make(name))

    # --- keeping house --------------------------------------------------------------------------

    def compact(self, *, keep_versions: int = 1) -> int:
        """Make the record small again, and derive everything anew from its newest version.

        The structures that stand are built again over all rows, so that none are fresh; searches
        go on meanwhile. Codes that the stored plan does not read go: `plan` leaves those of all
        that it tried. Returns the bytes of the record that became free.
        """
        plan = self.plan_stored
        with self._home.written() as store:
            with store.locked():
                self._home.kept_plan.tidy()
                tidy(store)
            freed = store.compact(keep_versions=keep_versions)
        old = self._home.view()
        names = old.generation.names()
        wanted = {*names} if plan is None else {*engine.KNOWN, *engine.parts(plan)}
        if old.n_fresh or old.n_dead:
            self._home.renewed(old, [name for name in names if name in wanted])
        else:
            old.release()
            for name in {*names} - wanted:
                old.generation.remove(name)
        del old  # what it held may go now
        self._home.derived.sweep(self._home.view().generation)
        with self._home.written() as store:  # the version that this index was reading until now
            return freed + store.compact(keep_versions=keep_versions)

    def check(self) -> dict[str, Any]:
        """Read every file, and say what is damaged.

        Returns ``{"ok", "record", "derived", "new"}``: ``record`` is the store's report,
        ``derived`` the names of derived files that do not fit their checksum. Those are no loss:
        they are made again when they are needed. Removes them, and changes nothing else. ``new``
        is the report of the new vectors while an upgrade is under way, else None.
        """
        report = self._home.store.check()
        upgrading = self._upgrading()
        new = None if upgrading is None else upgrading.new.store.check()
        ok = report.ok and (new is None or new.ok)
        view = self._home.looked(derive=False)
        if view is None:
            return {"ok": ok, "record": report, "derived": [], "new": new}
        generation = view.generation
        damaged = generation.damaged_files()
        if "vectors" in damaged:
            self._home.discard(generation)
        for name in damaged:
            generation.remove(name)
        files = [file for part in damaged.values() for file in part]
        return {"ok": ok and not files, "record": report, "derived": files, "new": new}

    def stats(self) -> dict[str, Any]:
        """Return figures: rows and versions, bytes of record and derived files, resident bytes.

        Changes nothing: ``structures`` are none where nothing was derived yet, and every row is
        fresh.
        """
        view = self._home.looked(derive=False)
        record = self._home.store.stats()
        derived = view.generation.built() if view else {}
        resident = view.generation.resident_bytes() + view.resident_bytes if view else 0
        return {
            "rows": record.rows,
            "version": record.version,
            "versions": record.versions,
            "fresh_rows": view.n_fresh if view else record.rows,
            "dead_rows": view.n_dead if view else 0,
            "dim": self.space.size,
            "precision": self._home.store.layout.precision,
            "durability": record.durability,
            "record_bytes": record.record_bytes,
            "derived_bytes": sum(derived.values()),
            "resident_bytes": resident,
            "structures": derived,
            "plan": None if (plan := self.plan_stored) is None else str(plan),
        }

    # --- inside ---------------------------------------------------------------------------------

    def _put(self, how: str, rows: Any) -> Written:
        self._home.follow()
        if self._home.left is not None:
            rows = only_stamped(rows, self.path, self._home.left)
        upgrading = self._upgrading()
        return self._home.write(how, rows) if upgrading is None else upgrading.put(how, rows)

    def _queries(
        self, queries: Embeddings | ArrayLike, view: View | Upgrading
    ) -> NDArray[np.float32]:
        space = view.space
        if isinstance(queries, Embeddings):
            check_space(space, queries.space, self.path)
            queries = queries.array
        elif self._home.left is not None:
            raise SpaceMismatchError(
                f"{self.path} was upgraded to {space.label} while it was open here, and these "
                f"vectors carry no stamp, so they may be of {self._home.left.label}. Give "
                f"Embeddings, or open the index again."
            )
        array = np.asarray(queries)
        if array.ndim == 1 and array.dtype != object:
            array = array[None]
        if array.shape == (1, space.size) and array.dtype == np.float32:
            if (
                0 < np.vdot(array, array) < np.inf
            ):  # so it is what `as_matrix` looks for, in a tenth
                return np.ascontiguousarray(array)
        return np.ascontiguousarray(as_matrix(array, dim=space.size, name="queries"))

    def _run(
        self,
        plan: Plan,
        asked: NDArray[np.float32],
        view: View,
        filter: str | None,
        threads: int | None,
    ) -> engine.Found:
        mask = view.everyone if filter is None else view.matching(filter)
        return engine.run(plan, asked, view, mask, threads=threads)

    def _chosen(
        self, plan: Any, cascade: Any, dims: int | None, recall: Any, k: int | None
    ) -> Plan:
        if sum(one is not None for one in (plan, cascade, dims, recall)) > 1:
            raise PlanError("plan, cascade, dims and recall each say what to run: give one.")
        if cascade is not None:
            plan = Plan(Cascade.parse(cascade) if isinstance(cascade, str) else cascade)
        if recall is not None:
            return self._home.kept_plan.proven(float(recall), k)
        if dims is not None:
            return Plan(Cascade([Stage(dims, 10 if k is None else k)]))
        chosen = plan_given(plan) if plan is not None else self.plan_stored
        if chosen is None:
            size = self._home.store.layout.space.size
            chosen = Plan(Cascade([Stage(size, 10 if k is None else k)]))
        return chosen if k is None else returning(chosen, k)

    def _steadily(self, work: Callable[[], Any]) -> Any:
        """Do something: once more if an upgrade ended meanwhile, and its files may be gone."""
        before = self._home.store, self._upgrade
        try:
            return work()
        except Exception:
            self._home.follow()
            self._upgrading()
            if before == (self._home.store, self._upgrade):
                raise
            return work()

    def _upgrading(self) -> Upgrading | None:
        """Return the upgrade that is under way, if there is one."""
        stamp = durable.signature(self.path / STATE)
        if stamp != self._upgrade[0]:
            from nestvec.search.upgrading import Upgrading  # its maps import scikit-learn

            with self._home.lock:
                stamp = durable.signature(self.path / STATE)
                if stamp != self._upgrade[0]:  # no other thread was here first
                    before = self._upgrade[1]
                    found = None if stamp is None else Upgrading.open(self._home, before)
                    self._upgrade = stamp, found
        found = self._upgrade[1]
        return found if found is not None and found.is_of(self._home.store) else None

    def _upgrading_to(self, queries: Embeddings | ArrayLike, view: View) -> Upgrading | None:
        """Return the upgrade that is under way if queries are of its new Space, not of this."""
        if not isinstance(queries, Embeddings):
            return None
        space_id = queries.space.space_id
        if space_id == view.space.space_id:
            return None
        found = self._upgrading()
        return found if found is not None and found.space.space_id == space_id else None
