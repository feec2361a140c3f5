"""The evaluation sets as nestvec sees them: read, embedded once, kept in the cache."""

from __future__ import annotations

import csv
from dataclasses import dataclass

import _frame
import numpy as np

import nestvec as nv
from nestvec.encoders import encoder_of

MODEL = "all-MiniLM-L6-v2"
RETRIEVAL = ("scifact", "cisi", "npl", "cranfield")


@dataclass
class Retrieval:
    """One retrieval set, embedded."""

    name: str
    docs: nv.Embeddings
    queries: nv.Embeddings
    qrels: dict[str, dict[str, int]]
    texts: tuple[list[str], list[str]]
    dropped: tuple[str, ...]


def embed(name: str, texts: list[str], ids: list[str], role: str) -> nv.Embeddings:
    """Embed with the default model, or read what an earlier run kept."""
    folder = _frame.cache_folder("vectors")
    return encoder_of(MODEL).encode_to(
        folder / f"{name}-{role}.safetensors", texts, ids=ids, role=role, reuse=True
    )


def retrieval(name: str, split: str = "test") -> Retrieval:
    """Return a BEIR-layout set with its vectors."""
    found = nv.read_beir(_frame.data_folder() / name, split=split)
    return Retrieval(
        name=name,
        docs=embed(name, found.doc_texts, found.doc_ids, "document"),
        queries=embed(f"{name}-{split}", found.query_texts, found.query_ids, "query"),
        qrels=found.qrels,
        texts=(list(found.doc_texts), list(found.query_texts)),
        dropped=tuple(found.dropped),
    )


def stsb(split: str) -> tuple[nv.Embeddings, nv.Embeddings, np.ndarray]:
    """Return both sides of the STS benchmark's pairs, and their scores in 0..5."""
    path = _frame.data_folder() / "stsb" / f"{split}.tsv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    ids = [str(i) for i in range(len(rows))]
    first = embed(f"stsb-{split}-1", [r["sent1"] for r in rows], ids, "document")
    second = embed(f"stsb-{split}-2", [r["sent2"] for r in rows], ids, "document")
    return first, second, np.array([float(r["score"]) for r in rows])


def unseen_evidence(queries: nv.Embeddings, qrels: dict, train: dict) -> nv.Embeddings:
    """Return the queries none of whose relevant documents any training query names."""
    named = {doc for labels in train.values() for doc, grade in labels.items() if grade > 0}
    keep = [
        row
        for row, query in enumerate(queries.ids.tolist())
        if not any(doc in named for doc, grade in qrels[query].items() if grade > 0)
    ]
    return queries[np.array(keep)]
