"""Galleries to search: real passages, a million made of them, a million of clusters; and queries.

The share of a set's energy in its first dims decides what a prefix is worth, so it is reported with
every figure.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import _frame
import _sets
import numpy as np
from numpy.typing import NDArray

import nestvec as nv
from nestvec._atomic import written_beside
from nestvec.corpus import docstrings
from nestvec.corpus.passages import passages
from nestvec.search.exact import top_k

Vectors = NDArray[np.float32]

N_QUERIES = 4000  # half to tune every peer's knob, half to score


@dataclass
class Gallery:
    """``vectors`` (n, dim) and ``queries`` (m, dim), float32, L2-normalised; dims by weight."""

    name: str
    vectors: Vectors
    queries: Vectors

    def energy(self, dims: tuple[int, ...] = (32, 64, 128)) -> dict[int, float]:
        """Return the share of the squared length in the first dims."""
        squared = np.square(self.vectors[:50_000]).mean(axis=0)
        return {dim: round(float(squared[:dim].sum() / squared.sum()), 3) for dim in dims}

    def truth(self, k: int = 10) -> NDArray[np.int64]:
        """Return the exact neighbours of the queries, from the cache if they are there."""

        def make() -> dict[str, NDArray[np.int64]]:
            step = 100_000
            best_rows = np.empty((len(self.queries), 0), np.int64)
            best = np.empty((len(self.queries), 0), np.float32)
            for start in range(0, len(self.vectors), step):
                rows, scores = top_k(self.queries, self.vectors[start : start + step], k)
                best_rows = np.concatenate([best_rows, rows + start], axis=1)
                best = np.concatenate([best, scores], axis=1)
                order = np.argsort(-best, axis=1, kind="stable")[:, :k]
                best_rows = np.take_along_axis(best_rows, order, axis=1)
                best = np.take_along_axis(best, order, axis=1)
            return {"rows": best_rows}

        return _kept(f"{self.name}-truth-{len(self.queries)}-{k}", make)["rows"]


def _kept(name: str, make: Callable[[], dict[str, NDArray]]) -> dict[str, NDArray]:
    place = _frame.cache_folder("galleries")
    files = {file.name.split(".")[1]: file for file in place.glob(f"{name}.*.npy")}
    if not (place / f"{name}.done").is_file():
        files = {}
        for label, array in make().items():
            files[label] = place / f"{name}.{label}.npy"
            with written_beside(files[label]) as scratch, Path(scratch).open("wb") as file:
                np.save(file, array)
        (place / f"{name}.done").touch()
    return {label: np.load(file, mmap_mode="r") for label, file in files.items()}


def docs(n: int = 50_000) -> Gallery:
    """Passages of docstrings of this machine's Python and of newsgroup posts, by MiniLM."""
    stored = _docs(n)
    return Gallery("docs", np.asarray(stored["vectors"]), np.asarray(stored["queries"]))


def docs_asked(n: int = 50_000) -> tuple[Vectors, list[dict[str, int]]]:
    """Return summary lines of docstrings, embedded, and the rows of `docs` that answer each."""
    stored = _docs(n)
    grades: list[dict[str, int]] = [{} for _ in stored["asked"]]
    for line, row in stored["answers"].tolist():
        grades[line][str(row)] = 1
    return np.asarray(stored["asked"]), grades


def _docs(n: int) -> dict[str, NDArray]:
    def make() -> dict[str, NDArray]:
        found = docstrings(limit=n + N_QUERIES)
        texts = list(found.doc_texts)
        path = _frame.data_folder() / "20newsgroups/train.jsonl.gz"
        with gzip.open(path, "rt", encoding="utf-8") as file:
            posts = [passage for line in file for passage in passages(json.loads(line)["text"])]
        posts = [post for post in dict.fromkeys(posts) if len(post.split()) >= 25]
        texts += posts[: n + N_QUERIES - len(texts)]
        ids = [str(number) for number in range(len(texts))]
        rows = _sets.embed(f"passages-{len(texts)}", texts, ids, "document")
        order = np.random.default_rng(0).permutation(len(texts))
        array = rows.array[order]
        rotation = nv.PrincipalRotation().fit(array[N_QUERIES:])
        rotated = rotation.transform(array)

        place = dict(zip(order.tolist(), range(-N_QUERIES, n), strict=True))  # below 0: a query
        rows_of = {id_: place[at] for at, id_ in enumerate(found.doc_ids)}
        answers = {
            id_: [rows_of[doc] for doc in found.qrels[id_] if rows_of[doc] >= 0]
            for id_ in found.query_ids
        }
        text_of = dict(zip(found.query_ids, found.query_texts, strict=True))
        asking = [id_ for id_ in sorted(answers) if answers[id_]]
        asking = [asking[i] for i in np.random.default_rng(0).permutation(len(asking))[:N_QUERIES]]
        asked = _sets.embed(f"summaries-{n}", [text_of[a] for a in asking], asking, "query")
        pairs = [(line, row) for line, id_ in enumerate(asking) for row in answers[id_]]
        return {
            "queries": rotated[:N_QUERIES],
            "vectors": rotated[N_QUERIES:],
            "asked": rotation.transform(asked.array),
            "answers": np.array(pairs),
        }

    return _kept(f"docs-{n}", make)


def captions_mrl(n: int = 40_000) -> Gallery:
    """Captions of photos by MiniLM trained nested (`train_text`, on other captions too)."""

    def make() -> dict[str, NDArray]:
        from train_text import PAIR_BATCH, PAIR_DIMS, PAIR_RATE, PRECISION, pairs

        from nestvec.corpus.examples import Examples
        from nestvec.encoders import TextEncoder
        from nestvec.train import Settings, train_text

        encoder = TextEncoder(_sets.MODEL).model
        settings = Settings(
            epochs=1, batch_size=PAIR_BATCH, learning_rate=PAIR_RATE, precision=PRECISION, seed=0
        )
        train_text(
            encoder,
            Examples("pairs", pairs()),
            _frame.cache_folder("galleries") / "captions_mrl-encoder",
            dims=PAIR_DIMS,
            holdout=0,
            settings=settings,
        )
        path = _frame.data_folder() / "multi30k_captions/train.jsonl.gz"
        with gzip.open(path, "rt", encoding="utf-8") as file:
            photos = [json.loads(line)["captions"] for line in file]
        texts = list(dict.fromkeys(text for photo in photos[:-N_QUERIES] for text in photo[:2]))
        asked = list(dict.fromkeys(photo[2] for photo in photos[-N_QUERIES:]))
        vectors, queries = (
            encoder.encode(some, batch_size=256, normalize_embeddings=True)
            for some in (texts[:n], asked)
        )
        return {"vectors": vectors, "queries": queries}

    stored = _kept(f"captions_mrl-{n}", make)
    return Gallery("captions_mrl", np.asarray(stored["vectors"]), np.asarray(stored["queries"]))


def real1m(n: int = 1_000_000, dim: int = 256) -> Gallery:
    """A million points between true neighbours of `docs`, with noise of their spectrum."""

    def make() -> dict[str, NDArray]:
        base = docs()
        cut = _unit(base.vectors[:, :dim])
        rng = np.random.default_rng(1)
        near = _kept("docs-neighbours", lambda: {"rows": top_k(cut, cut, 11)[0][:, 1:]})["rows"]
        spread = cut.std(axis=0)
        rows = np.empty((n, dim), np.float32)
        for start in range(0, n, 50_000):
            some = slice(start, min(start + 50_000, n))
            m = some.stop - some.start
            first = rng.integers(len(cut), size=m)
            second = near[first, rng.integers(10, size=m)]
            share = rng.random((m, 1), dtype=np.float32)
            noise = rng.standard_normal((m, dim), dtype=np.float32) * spread
            between = (1 - share) * cut[first] + share * cut[second]
            rows[some] = _unit(between + 0.35 * noise)
        return {"vectors": rows, "queries": _unit(base.queries[:, :dim])}

    stored = _kept(f"real1m-{n}-{dim}", make)
    return Gallery("real1m", np.asarray(stored["vectors"]), np.asarray(stored["queries"]))


def clusters(n: int = 1_000_000, dim: int = 256, *, name: str = "syn1m") -> Gallery:
    """Clusters in clusters (500 of 20) whose spectrum falls as 1/i; queries beside documents."""

    def make() -> dict[str, NDArray]:
        rng = np.random.default_rng(2)
        spread = (np.arange(1, dim + 1) ** -0.5).astype(np.float32)
        outer = rng.standard_normal((500, dim), dtype=np.float32) * spread
        inner = outer.repeat(20, axis=0)
        inner += 0.7 * rng.standard_normal(inner.shape, dtype=np.float32) * spread
        rows = np.empty((n, dim), np.float32)
        for start in range(0, n, 50_000):
            m = min(50_000, n - start)
            noise = rng.standard_normal((m, dim), dtype=np.float32) * spread
            rows[start : start + m] = _unit(inner[rng.integers(len(inner), size=m)] + 0.5 * noise)
        chosen = rows[rng.choice(n, N_QUERIES, replace=False)]
        length = np.linalg.norm(spread)
        noise = rng.standard_normal(chosen.shape, dtype=np.float32) * spread / length
        return {"vectors": rows, "queries": _unit(chosen + 0.3 * noise)}

    stored = _kept(f"{name}-{n}-{dim}", make)
    return Gallery(name, np.asarray(stored["vectors"]), np.asarray(stored["queries"]))


def _unit(rows: Vectors) -> Vectors:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


SETS: dict[str, Callable[[], Gallery]] = {
    "docs": docs,
    "captions_mrl": captions_mrl,
    "real1m": real1m,
    "syn1m": clusters,
    "try": lambda: clusters(20_000, 64, name="try"),  # to see whether a script runs
    "clusters768": lambda: clusters(300_000, 768, name="clusters768"),
    "clusters1536": lambda: clusters(300_000, 1536, name="clusters1536"),
}
