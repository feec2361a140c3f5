"""Documents, queries, and which documents answer which query."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from nestvec.errors import DataError

#: query id -> document id -> grade (0 is judged and not relevant)
Qrels = dict[str, dict[str, int]]


@dataclass(frozen=True)
class Texts:
    """Texts and their ids, one id a text, in order."""

    ids: list[str]
    texts: list[str]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.texts):
            raise DataError(f"{len(self.ids)} ids for {len(self.texts)} texts.")
        _check_unique(self.ids, "text")

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class RetrievalSet:
    """What retrieval quality is measured on.

    Parameters
    ----------
    name
        For tables.
    doc_ids, doc_texts
        The gallery, in order; ids unique.
    query_ids, query_texts
        What is asked, in order; ids unique.
    qrels
        query id -> document id -> grade; 0 is judged and not relevant.
    dropped
        Ids of documents without any text, which cannot be embedded and so are not in ``doc_ids``.
        Their judgements stay in ``qrels``: a relevant one counts against recall, as it should,
        because no search over embeddings will find it.

    Raises
    ------
    DataError
        If ids repeat, counts differ, there are no documents or no queries, or the qrels name ids
        that do not exist.
    """

    name: str
    doc_ids: list[str]
    doc_texts: list[str]
    query_ids: list[str]
    query_texts: list[str]
    qrels: Qrels
    dropped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, ids, texts in (
            ("document", self.doc_ids, self.doc_texts),
            ("query", self.query_ids, self.query_texts),
        ):
            if len(ids) != len(texts):
                raise DataError(f"{self.name}: {len(ids)} {what} ids for {len(texts)} texts.")
            if not ids:
                raise DataError(f"{self.name}: no {what} with text in it.")
            _check_unique(ids, what, self.name)
        check_qrels(self.qrels, {*self.doc_ids, *self.dropped}, set(self.query_ids), name=self.name)

    def __repr__(self) -> str:
        judged = sum(map(len, self.qrels.values()))
        return (
            f"RetrievalSet({self.name!r}, {len(self.doc_ids):,} documents, "
            f"{len(self.query_ids):,} queries, {judged:,} judgements)"
        )


def check_qrels(
    qrels: Mapping[str, Mapping[str, int]],
    doc_ids: Collection[str],
    query_ids: Collection[str],
    *,
    name: str = "qrels",
) -> None:
    """Raise `DataError` if qrels name ids that do not exist, or judge nothing."""
    for what, unknown in (
        ("query", [q for q in qrels if q not in query_ids]),
        ("document", sorted({d for row in qrels.values() for d in row if d not in doc_ids})),
    ):
        if unknown:
            raise DataError(
                f"{name}: the qrels name {len(unknown)} unknown {what} ids, e.g. {unknown[0]!r}. "
                f"Use the {what} ids of this corpus, or remove those lines."
            )
    if not any(grade > 0 for row in qrels.values() for grade in row.values()):
        raise DataError(f"{name}: the qrels call no document relevant, so nothing can be measured.")


def _check_unique(ids: Sequence[str], what: str, name: str = "") -> None:
    seen: set[str] = set()
    for row, one in enumerate(ids):
        if one in seen:
            where = f"{name}: " if name else ""
            raise DataError(
                f"{where}{what} id {one!r} stands twice (rows {ids.index(one)} and {row}). "
                f"Ids must be unique."
            )
        seen.add(one)
