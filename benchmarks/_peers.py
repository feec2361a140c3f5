"""Search libraries behind one door: build once, then answer at a setting of their knobs.

Each has as many settings to choose from (`N_SETTINGS`), so that none is tuned more than another.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import shutil
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from _galleries import Gallery
from numpy.typing import NDArray

import nestvec as nv
from nestvec.search.cascade import Plan
from nestvec.search.index import Index
from nestvec.search.structures.lists import usual_n_lists

K = 10
N_SETTINGS = 24
WIDTHS = [round(10 * 1.3**i) for i in range(N_SETTINGS)]  # 10 ... 4,000
REFINES = (2, 4, 8)  # rows reranked, in multiples of k
Setting = Any
Rows = NDArray[np.int64]


class Peer:
    """One method on one gallery; ``bytes_per_vector`` is what it keeps in memory."""

    package = "faiss-cpu"
    bytes_per_vector: float

    def __init__(self, gallery: Gallery, folder: Path) -> None:
        raise NotImplementedError

    def settings(self) -> list[Setting]:
        return list(WIDTHS)

    def search(self, queries: NDArray[np.float32], setting: Setting, threads: int) -> Rows:
        raise NotImplementedError

    @classmethod
    def version(cls) -> str:
        return f"{cls.package} {importlib.metadata.version(cls.package)}"


class Faiss(Peer):
    words = ""
    refined = False

    def __init__(self, gallery: Gallery, folder: Path) -> None:
        n, dim = gallery.vectors.shape
        words = self.words.format(n_lists=usual_n_lists(n), pq=dim // 4)
        self.index = faiss.index_factory(dim, words, faiss.METRIC_INNER_PRODUCT)
        if hasattr(self.index, "hnsw"):
            self.index.hnsw.efConstruction = 80
        if not self.index.is_trained:
            rows = np.random.default_rng(0).permutation(n)[:200_000]
            self.index.train(gallery.vectors[np.sort(rows)])
        self.index.add(gallery.vectors)
        self.answering = self.index
        if self.refined:
            self.answering = faiss.IndexRefineFlat(self.index, faiss.swig_ptr(gallery.vectors))
        held = len(faiss.serialize_index(self.index))
        self.bytes_per_vector = (held + (gallery.vectors.nbytes if self.refined else 0)) / n

    def settings(self) -> list[Setting]:
        if not self.refined:
            return [(width, 1) for width in WIDTHS]
        return list(itertools.product(WIDTHS[:: len(REFINES)], REFINES))

    def search(self, queries: NDArray[np.float32], setting: Setting, threads: int) -> Rows:
        width, refine = setting
        faiss.omp_set_num_threads(threads)
        if hasattr(self.index, "hnsw"):
            self.index.hnsw.efSearch = max(width, K * refine)
        else:
            self.index.nprobe = width
        if self.refined:
            self.answering.k_factor = refine
        return self.answering.search(queries, K)[1]


class HNSW32(Faiss):
    words = "HNSW32,Flat"


class HNSW32SQ8(Faiss):
    words, refined = "HNSW32,SQ8", True


class IVFFlat(Faiss):
    words = "IVF{n_lists},Flat"


class IVFPQ(Faiss):
    words, refined = "IVF{n_lists},PQ{pq}x4fs", True


class RaBitQ(Faiss):
    words, refined = "IVF{n_lists},RaBitQ", True


class USearch(Peer):
    package = "usearch"

    def __init__(self, gallery: Gallery, folder: Path) -> None:
        from usearch.index import Index as Built

        dim = gallery.vectors.shape[1]
        self.index = Built(ndim=dim, metric="ip", dtype="bf16", connectivity=32, expansion_add=80)
        self.index.add(np.arange(len(gallery.vectors)), gallery.vectors, threads=1)
        self.bytes_per_vector = self.index.memory_usage / len(gallery.vectors)

    def search(self, queries: NDArray[np.float32], setting: Setting, threads: int) -> Rows:
        self.index.expansion_search = setting
        found = self.index.search(queries, K, threads=threads)
        return np.atleast_2d(found.keys).astype(np.int64)


class HNSWLib(Peer):
    package = "hnswlib"

    def __init__(self, gallery: Gallery, folder: Path) -> None:
        import hnswlib

        n, dim = gallery.vectors.shape
        self.index = hnswlib.Index(space="ip", dim=dim)
        self.index.init_index(max_elements=n, ef_construction=80, M=32)
        self.index.add_items(gallery.vectors, num_threads=1)
        self.bytes_per_vector = self.index.index_file_size() / n

    def search(self, queries: NDArray[np.float32], setting: Setting, threads: int) -> Rows:
        self.index.set_ef(setting)
        return self.index.knn_query(queries, K, num_threads=threads)[0].astype(np.int64)


class Nestvec(Peer):
    """An index of ours: ``plans`` are made of widths and shortlists."""

    package = "nestvec"
    structure, knob, share = "graph", "ef", 1.0
    keeps: tuple[float, ...] = (1.2, 2, 4)
    last = "float32"

    def __init__(self, gallery: Gallery, folder: Path) -> None:
        n, dim = gallery.vectors.shape
        shutil.rmtree(folder, ignore_errors=True)
        space = nv.Space.declared(gallery.name, dim=dim)
        self.index = Index.create(
            folder, nv.Embeddings(gallery.vectors, space), durability="process"
        )
        self.dim, self.first = dim, max(32, int(dim * self.share) // 32 * 32)
        self.index.build(self.structure)
        self.search(gallery.queries[:2], self.settings()[0], 1)
        self.bytes_per_vector = self.index.stats()["resident_bytes"] / n

    def settings(self) -> list[Setting]:
        last = "" if self.last == "float32" else f":{self.last}"
        found = []
        for width, keep in itertools.product(WIDTHS[:: len(self.keeps)], self.keeps):
            rows = round(K * keep)
            if last and self.first == self.dim:
                stages = f"{self.dim}:int8@{K}"
            else:
                stages = f"{self.first}:int8@{rows} > {self.dim}{last}@{K}"
            if self.structure == "graph":
                width = max(width, rows)
            found.append(Plan.parse(f"{self.structure}({self.knob}={width}) {stages}"))
        return found

    def search(self, queries: NDArray[np.float32], setting: Setting, threads: int) -> Rows:
        return self.index.search(queries, plan=setting, threads=threads).ids


class Graph(Nestvec):
    pass


class GraphPrefix(Nestvec):
    share, keeps = 0.5, (2, 4, 8)


class Lists(Nestvec):
    """Lists of int8 prefixes of a third to a half of the dims."""

    structure, knob, share, keeps = "lists", "probes", 0.4, (4, 8, 16)


class ListsFull(Lists):
    """The same kernel on full-size codes: what nesting adds is the difference."""

    share, keeps = 1.0, (1.2, 2, 4)


PEERS: dict[str, type[Peer]] = {
    "faiss_hnsw32": HNSW32,
    "faiss_hnsw32_sq8_refine": HNSW32SQ8,
    "faiss_ivf_flat": IVFFlat,
    "faiss_ivf_pq_refine": IVFPQ,
    "faiss_ivf_rabitq_refine": RaBitQ,
    "usearch": USearch,
    "hnswlib": HNSWLib,
    "nestvec_graph": Graph,
    "nestvec_graph_prefix": GraphPrefix,
    "nestvec_lists": Lists,
    "nestvec_lists_full": ListsFull,
}
