"""Search libraries behind one door: build once, then answer at a setting of their knobs.

A setting is a width (how much a structure looks at) and an option (most often how many rows are
reranked). Widths are in one fine row for all, and are bisected for each option.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable
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
# In steps of 5%, from 1 to 6,000.
WIDTHS = [*dict.fromkeys(round(1.05**i) for i in range(179))]
Option = Any
Rows = NDArray[np.int64]


class Peer:
    """One method on one gallery.

    ``bytes_per_vector`` counts all that answers are made of, full vectors too where they order
    them, in memory or mapped. ``folder`` is its own, and keeps what was built, with the processor
    seconds that it took.
    """

    package = "faiss-cpu"
    options: tuple[Option, ...] = (1,)
    least = 1  # width
    most = 4000
    clock: Callable[[], float] = staticmethod(time.process_time)
    bytes_per_vector: float
    build_s: float

    def __init__(self, gallery: Gallery, folder: Path) -> None:
        raise NotImplementedError

    def built(self, folder: Path, build: Callable[[], Any], made_by: str = "") -> float:
        """Build, unless that was done by the same code; return the seconds it took then."""
        file = folder / "build_s.json"
        said = json.loads(file.read_text()) if file.is_file() else [0, None]
        if said[1] != made_by:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            started = self.clock()
            build()
            said = [self.clock() - started, made_by]
            file.write_text(json.dumps(said))
        return said[0]

    def widths(self) -> list[int]:
        return [width for width in WIDTHS if self.least <= width <= self.most]

    def searcher(self, width: int, option: Option, threads: int) -> Callable[[Any], Rows]:
        """Return what answers queries (m, dim) with rows (m, k) at a setting."""
        raise NotImplementedError

    @classmethod
    def version(cls) -> str:
        return f"{cls.package} {importlib.metadata.version(cls.package)}"


class Faiss(Peer):
    words = ""
    refined = False

    def __init__(self, gallery: Gallery, folder: Path) -> None:
        n, dim = gallery.vectors.shape
        file = folder / "index.faiss"

        def build() -> None:
            words = self.words.format(n_lists=usual_n_lists(n), pq=dim // 4, dim=dim)
            index = faiss.index_factory(dim, words, faiss.METRIC_INNER_PRODUCT)
            if hasattr(index, "hnsw"):
                index.hnsw.efConstruction = 80
            if not index.is_trained:
                rows = np.random.default_rng(0).permutation(n)[:200_000]
                index.train(gallery.vectors[np.sort(rows)])
            index.add(gallery.vectors)
            faiss.write_index(index, str(file))

        self.build_s = self.built(folder, build)
        self.index = faiss.read_index(str(file))
        self.answering = self.index
        if self.refined:
            self.answering = faiss.IndexRefineFlat(self.index, faiss.swig_ptr(gallery.vectors))
        held = file.stat().st_size
        self.bytes_per_vector = (held + (gallery.vectors.nbytes if self.refined else 0)) / n
        if hasattr(self.index, "hnsw"):
            self.least = K
        else:
            self.lists = faiss.extract_index_ivf(self.index)
            self.most = usual_n_lists(n)

    def searcher(self, width: int, option: Option, threads: int) -> Callable[[Any], Rows]:
        faiss.omp_set_num_threads(threads)
        if hasattr(self.index, "hnsw"):
            self.index.hnsw.efSearch = max(width, round(K * option))
        else:
            self.lists.nprobe = width
        if self.refined:
            self.answering.k_factor = option
        answer = self.answering.search
        return lambda queries: answer(queries, K)[1]


class HNSW32(Faiss):
    words = "HNSW32,Flat"


class HNSW32SQ8(Faiss):
    words, refined, options = "HNSW32,SQ8", True, (1, 1.5, 2, 4)


class IVFFlat(Faiss):
    words = "IVF{n_lists},Flat"


# Vectors come in PCA order, in which some dims weigh much more than others: these two rotate them.


class IVFPQ(Faiss):
    words, refined, options = "OPQ{pq},IVF{n_lists},PQ{pq}x4fs", True, (8, 16, 32, 96)


class RaBitQ(Faiss):
    words, refined, options = "RR{dim},IVF{n_lists},RaBitQ", True, (8, 16, 32, 96)


class USearch(Peer):
    package, least = "usearch", K

    def __init__(self, gallery: Gallery, folder: Path) -> None:
        from usearch.index import Index as Built

        dim = gallery.vectors.shape[1]
        self.index = Built(ndim=dim, metric="ip", dtype="bf16", connectivity=32, expansion_add=80)
        file = folder / "index.usearch"

        def build() -> None:
            self.index.add(np.arange(len(gallery.vectors)), gallery.vectors, threads=2)
            self.index.save(str(file))

        self.build_s = self.built(folder, build)
        if not len(self.index):
            self.index.load(str(file))
        self.bytes_per_vector = self.index.memory_usage / len(gallery.vectors)

    def searcher(self, width: int, option: Option, threads: int) -> Callable[[Any], Rows]:
        self.index.expansion_search = width
        search = self.index.search

        def answer(queries: Any) -> Rows:
            return np.atleast_2d(search(queries, K, threads=threads).keys).astype(np.int64)

        return answer


class HNSWLib(Peer):
    package, least = "hnswlib", K

    def __init__(self, gallery: Gallery, folder: Path) -> None:
        import hnswlib

        n, dim = gallery.vectors.shape
        self.index = hnswlib.Index(space="ip", dim=dim)
        file = folder / "index.hnswlib"

        def build() -> None:
            made = hnswlib.Index(space="ip", dim=dim)
            made.init_index(max_elements=n, ef_construction=80, M=32)
            made.add_items(gallery.vectors, num_threads=2)
            made.save_index(str(file))

        self.build_s = self.built(folder, build)
        self.index.load_index(str(file))
        self.bytes_per_vector = file.stat().st_size / n

    def searcher(self, width: int, option: Option, threads: int) -> Callable[[Any], Rows]:
        self.index.set_ef(width)
        search = self.index.knn_query
        return lambda queries: search(queries, K, num_threads=threads)[0].astype(np.int64)


class SVS(Peer):
    """Vamana at float32: its codecs run on Intel's processors alone."""

    package, least = "scalable-vs", K

    def __init__(self, gallery: Gallery, folder: Path) -> None:
        import svs

        made = []

        def build() -> None:
            settings = svs.VamanaBuildParameters(
                alpha=0.95, graph_max_degree=64, window_size=128, prune_to=60
            )
            made.append(
                svs.Vamana.build(settings, gallery.vectors, svs.DistanceType.MIP, num_threads=2)
            )
            made[0].save(*(str(folder / part) for part in ("config", "graph", "data")))

        self.build_s = self.built(folder, build)
        parts = [str(folder / part) for part in ("config", "graph", "data")]
        n = len(gallery.vectors)
        self.index = svs.Vamana(
            parts[0], svs.GraphLoader(parts[1]), svs.VectorDataLoader(parts[2]),
            svs.DistanceType.MIP, num_threads=1,
        )  # fmt: skip
        self.bytes_per_vector = (
            sum(file.stat().st_size for part in parts[1:] for file in Path(part).iterdir()) / n
        )

    def searcher(self, width: int, option: Option, threads: int) -> Callable[[Any], Rows]:
        self.index.num_threads = threads
        self.index.search_window_size = width
        search = self.index.search
        return lambda queries: search(queries, K)[0].astype(np.int64)


class ScaNN(Peer):
    package, most, options = "scann", 512, (80, 160, 320, 960)

    def __init__(self, gallery: Gallery, folder: Path) -> None:
        import scann

        n = len(gallery.vectors)

        def build() -> None:
            made = (
                scann.scann_ops_pybind.builder(np.array(gallery.vectors), K, "dot_product")
                .tree(num_leaves=usual_n_lists(n), num_leaves_to_search=32, training_sample_size=n)
                .score_ah(4, anisotropic_quantization_threshold=0.2)
                .reorder(100)
                .build()
            )
            made.serialize(str(folder))

        self.build_s = self.built(folder, build)
        self.index = scann.scann_ops_pybind.load_searcher(str(folder))
        self.index.set_num_threads(2)
        self.most = usual_n_lists(n)
        self.bytes_per_vector = sum(f.stat().st_size for f in folder.glob("*.npy")) / n

    def searcher(self, width: int, option: Option, threads: int) -> Callable[[Any], Rows]:
        index = self.index
        more = {"leaves_to_search": width, "pre_reorder_num_neighbors": option}

        def answer(queries: Any) -> Rows:
            if len(queries) == 1:
                return index.search(queries[0], K, **more)[0][None].astype(np.int64)
            if threads > 1:
                return index.search_batched_parallel(queries, K, **more)[0].astype(np.int64)
            return index.search_batched(queries, K, **more)[0].astype(np.int64)

        return answer


def _made_by() -> str:
    """Hash the code that decides what is built."""
    room = Path(nv.__file__).parent / "search"
    files = [*sorted((room / "structures").glob("*.py")), room / "mirror.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:10]


class Nestvec(Peer):
    """An index of ours, ``share`` of the dims in the first stage; options: rows kept, times K."""

    package = "nestvec"
    structure, knob, share = "graph", "ef", 1.0
    options = (1.2, 2, 3, 4)

    def __init__(self, gallery: Gallery, folder: Path) -> None:
        n, dim = gallery.vectors.shape
        self.dim, self.first = dim, max(32, int(dim * self.share) // 32 * 32)
        home, made_by = folder.parent / f"{gallery.name}-nestvec", _made_by()
        path, space = home / "docs.nest", nv.Space.declared(gallery.name, dim=dim)

        def create() -> None:
            rows = nv.Embeddings(gallery.vectors, space)
            made = Index.create(path, rows, durability="process")
            made.search(gallery.queries[:2], 1)  # which derives the file of full vectors

        def build() -> None:
            self.index.build(self.structure)

        def encode() -> None:
            self.searcher(100, self.options[0], 1)(gallery.queries[:2])

        took = self.built(home, create, made_by)
        self.index = Index.open(path, durability="process")
        took += self.built(home / self.structure, build, made_by)
        took += self.built(home / f"{self.structure}-{self.first}", encode, made_by)
        self.build_s = took
        if self.structure == "graph":
            self.least = K
        else:
            self.most = usual_n_lists(n)
        encode()
        self.bytes_per_vector = self.index.stats()["resident_bytes"] / n + 4 * dim

    def plan(self, width: int, option: Option) -> Plan:
        rows = round(K * option)
        if self.structure == "graph":
            width = max(width, rows)
        cascade = f"{self.first}:int8@{rows} > {self.dim}@{K}"
        return Plan.parse(f"{self.structure}({self.knob}={width}) {cascade}")

    def searcher(self, width: int, option: Option, threads: int) -> Callable[[Any], Rows]:
        plan, search = self.plan(width, option), self.index.search
        return lambda queries: search(queries, plan=plan, threads=threads).ids


class Graph(Nestvec):
    pass


class GraphHalf(Nestvec):
    share, options = 0.5, (2, 4, 6, 8)


class GraphThird(Nestvec):
    share, options = 1 / 3, (2, 4, 8, 16)


class Lists(Nestvec):
    structure, knob, share, options = "lists", "probes", 0.5, (2, 4, 6, 8)


class ListsThird(Lists):
    share, options = 1 / 3, (2, 4, 8, 16)


class ListsFull(Lists):
    """The same kernel on full-size codes: what nesting adds is the difference."""

    share, options = 1.0, (1.2, 2, 3, 4)


PEERS: dict[str, type[Peer]] = {
    "faiss_hnsw32": HNSW32,
    "faiss_hnsw32_sq8_refine": HNSW32SQ8,
    "faiss_ivf_flat": IVFFlat,
    "faiss_ivf_pq_refine": IVFPQ,
    "faiss_ivf_rabitq_refine": RaBitQ,
    "usearch": USearch,
    "hnswlib": HNSWLib,
    "svs_vamana": SVS,
    "scann": ScaNN,
    "nestvec_graph": Graph,
    "nestvec_graph_half": GraphHalf,
    "nestvec_graph_third": GraphThird,
    "nestvec_lists_full": ListsFull,
    "nestvec_lists_half": Lists,
    "nestvec_lists_third": ListsThird,
}
