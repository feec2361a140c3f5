"""How little memory is enough, at what rate, beside faiss' HNSW32?

    python benchmarks/memory.py [--sets real1m,syn1m] [--methods nestvec_lists,...] [--try]

Every contender is built in a process of its own, which counts the processor seconds of all its
threads and children, and kept on disk. A fresh process opens it and searches, beside a fresh one
with HNSW32: they are asked in turns. The memory of a process is the peak of RssAnon + RssShmem from
its start to its end, libraries included, looked at every few milliseconds from outside; RssFile
(mapped files, which the kernel may drop) is said beside it. Knobs are chosen on half of the
queries; the other half is scored.

For rates with a cold page cache the file of full vectors is dropped from it, and looked for in it,
before a fresh process opens the index.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import hashlib
import itertools
import json
import mmap
import os
import resource
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import _frame
import numpy as np

NAME = "memory"
QUESTION = "How little memory is enough, at what rate, beside faiss' HNSW32?"
TARGETS = (0.95, 0.99)
K = 10
TURNS = 5
COLD_TURNS = 3
SCORED = 1000
WIDTHS = [round(10 * 1.3**i) for i in range(24)]  # 10 ... 4,000; all have 24 settings to try
KEEPS = (4, 8, 16)  # rows reranked, in multiples of k
PREFIX = 0.4  # of the dims, of which lists keep codes
BASE = "faiss_hnsw32"
#: Method: its plans, of a width, a shortlist, a prefix and all dims.
PLANS = {
    "nestvec_lists": "lists(probes={width}) {short}:int8@{keep} > {dim}@10",
    "nestvec_lists_int8": "lists(probes={width}) {dim}:int8@10",
    "nestvec_lists_int10": "lists(probes={width}) {dim}:int10@10",
    "nestvec_graph_int8": "graph(ef={width}) {dim}:int8@10",
}
METHODS = (BASE, *PLANS)
SETS = ("real1m", "syn1m")


def gallery_of(name: str) -> Any:
    from _galleries import SETS as galleries

    return galleries[name]()


# --- a contender, in a process of its own ---------------------------------------------------------


def settings(method: str, dim: int) -> list[Any]:
    if method == BASE:
        return list(WIDTHS)
    short = max(32, int(PREFIX * dim) // 32 * 32)
    text = PLANS[method]
    keeps = [K * keep for keep in KEEPS] if "keep" in text else [K]
    pairs = itertools.product(WIDTHS[:: len(keeps)], keeps)
    return [text.format(width=w, keep=keep, short=short, dim=dim) for w, keep in pairs]


def cpu_seconds() -> float:
    """Processor seconds of this process, all its threads, and the children that ended."""
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def build(set_name: str, method: str, place: Path) -> dict[str, Any]:
    gallery = gallery_of(set_name)
    n, dim = gallery.vectors.shape
    if method == BASE:
        import faiss

        started, clock = cpu_seconds(), time.perf_counter()
        index: Any = faiss.index_factory(dim, "HNSW32,Flat", faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 80
        index.add(gallery.vectors)
        faiss.write_index(index, str(place / "x.faiss"))
    else:
        import nestvec as nv
        from nestvec.errors import PlanError
        from nestvec.search.index import Index

        started, clock = cpu_seconds(), time.perf_counter()
        space = nv.Space.declared(set_name, dim=dim)
        index = Index.create(place / "x.nest", nv.Embeddings(gallery.vectors, space))
        index.build("graph" if "graph" in method else "lists")
        with contextlib.suppress(PlanError):  # the one who searches says so
            index.search(gallery.queries[:2], plan=settings(method, dim)[0])  # makes codes
    return {
        "build_s": cpu_seconds() - started,
        "clock_s": time.perf_counter() - clock,
        "n": n,
        "dim": dim,
    }


class Server:
    """Opens what was built, and does what it is told."""

    def __init__(self, set_name: str, method: str, place: Path) -> None:
        with np.load(place.with_name(f"{set_name}-asked.npz")) as asked:
            self.queries = {part: asked[f"{part}_queries"] for part in ("tuning", "scoring")}
            self.truth = {part: asked[f"{part}_truth"] for part in ("tuning", "scoring")}
        self.dim = self.queries["tuning"].shape[1]
        self.method, self.place = method, place

    def open(self) -> dict[str, Any]:
        if self.method == BASE:
            import faiss

            index: Any = faiss.read_index(str(self.place / "x.faiss"))

            def search(queries: Any, setting: Any, threads: int) -> Any:
                faiss.omp_set_num_threads(threads)
                index.hnsw.efSearch = max(setting, K)
                return index.search(queries, K)[1]

        else:
            from nestvec.search.index import Index

            index = Index.open(self.place / "x.nest")

            def search(queries: Any, setting: Any, threads: int) -> Any:
                return index.search(queries, plan=setting, threads=threads).ids

        self.search: Callable[[Any, Any, int], Any] = search
        return {}

    def recall(self, setting: Any, part: str) -> float:
        found = self.search(self.queries[part], setting, 1)
        pairs = zip(found, self.truth[part], strict=True)
        return float(np.mean([np.isin(want, got).mean() for got, want in pairs]))

    def tune(self) -> dict[str, Any]:
        """For each target the setting that reaches it in the least processor time."""
        tried: list[tuple[float, float, Any]] = []
        for setting in settings(self.method, self.dim):
            if not tried:
                self.recall(setting, "tuning")  # loads what is needed
            started = time.process_time()
            reached = self.recall(setting, "tuning")
            tried.append((time.process_time() - started, reached, setting))
            if len(tried) > len(KEEPS) and min(one[1] for one in tried[-len(KEEPS) :]) > 0.9995:
                break
        best = {}
        for target in TARGETS:
            reach = [one[::2] for one in tried if one[1] >= target]
            best[str(target)] = min(reach, key=lambda one: one[0])[1] if reach else None
        return {"best": best}

    def one_by_one(self, setting: Any) -> dict[str, Any]:
        """Processor seconds a query, one query a call, one thread."""
        queries = self.queries["scoring"]
        started, clock = time.process_time(), []
        for row in range(len(queries)):
            before = time.perf_counter()
            self.search(queries[row : row + 1], setting, 1)
            clock.append(1000 * (time.perf_counter() - before))
        return {
            "seconds": (time.process_time() - started) / len(queries),
            "clock": sum(clock) / 1000 / len(queries),
            "p50_ms": float(np.quantile(clock, 0.5)),
            "p99_ms": float(np.quantile(clock, 0.99)),
        }

    def batch(self, setting: Any) -> dict[str, Any]:
        """Seconds by the clock a query, all in one call, two threads."""
        started = time.perf_counter()
        self.search(self.queries["scoring"], setting, 2)
        return {"seconds": (time.perf_counter() - started) / SCORED}

    def score(self, setting: Any) -> dict[str, Any]:
        return {"recall": self.recall(setting, "scoring")}


def serve(set_name: str, method: str, place: Path) -> None:
    server = Server(set_name, method, place)
    print("{}", flush=True)
    for line in sys.stdin:
        task, *words = json.loads(line)
        try:
            said = getattr(server, task)(*words)
        except ValueError as error:
            if type(error).__name__ != "PlanError":  # the other side has nothing of ours loaded
                raise
            said = {"refused": str(error)}
        print(json.dumps(said), flush=True)


# --- what starts them, and watches ----------------------------------------------------------------


class Process:
    """A contender at the other end of a pipe, whose memory is looked at while it works."""

    def __init__(self, *words: str) -> None:
        command = [sys.executable, __file__, *words]
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.anonymous = self.mapped = 0
        self._answer()
        self.before = self.anonymous  # libraries, queries and truths

    def __call__(self, task: str, *words: Any) -> dict[str, Any]:
        assert self._child.stdin
        self._child.stdin.write(json.dumps([task, *words]) + "\n")
        self._child.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        out = self._child.stdout
        assert out
        while not select.select([out], [], [], 0.005)[0]:
            self._look()
        self._look()
        line = out.readline()
        if not line:
            sys.exit(f"a contender ended with {self._child.wait()}: {self._child.args}")
        return json.loads(line)

    def _look(self) -> None:
        kinds = resident(self._child.pid)
        self.anonymous = max(self.anonymous, kinds["RssAnon"] + kinds["RssShmem"])
        self.mapped = max(self.mapped, kinds["RssFile"])

    def end(self) -> None:
        assert self._child.stdin
        self._child.stdin.close()
        self._child.wait()


def resident(pid: int) -> dict[str, int]:
    """Return the resident bytes of a process by kind, 0 once it is gone."""
    found: dict[str, int] = {"RssAnon": 0, "RssFile": 0, "RssShmem": 0}
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return found
    said = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return {kind: 1024 * int(said.get(kind, 0)) for kind in found}


def share_cached(file: Path) -> float:
    """Return the share of a file's pages that is in the page cache."""
    n_pages = -(-file.stat().st_size // mmap.PAGESIZE)
    pages = (ctypes.c_ubyte * n_pages)()
    with file.open("rb") as handle:
        mapped = np.memmap(handle, np.uint8, "r")
        size = ctypes.c_size_t(mapped.nbytes)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mincore(ctypes.c_void_p(mapped.ctypes.data), size, pages):
            raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in bytes(pages)) / n_pages


def drop(files: Iterable[Path]) -> float:
    """Drop files from the page cache; return the largest share of one that stayed."""
    most = 0.0
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        most = max(most, share_cached(file))
    return most


def ask(set_name: str) -> None:
    """Write down queries and truths: a contender that reads nothing else holds nothing else."""
    gallery = gallery_of(set_name)
    half, truth = len(gallery.queries) // 2, gallery.truth(K)
    parts = {"tuning": slice(SCORED), "scoring": slice(half, half + SCORED)}
    asked = {f"{name}_queries": gallery.queries[part] for name, part in parts.items()}
    asked |= {f"{name}_truth": truth[part] for name, part in parts.items()}
    np.savez(_frame.cache_folder(NAME) / f"{set_name}-asked.npz", **asked)


def sources(*names: str) -> str:
    digest = hashlib.sha256()
    for name in names:
        place = _frame.ROOT / name
        for file in [place] if place.is_file() else sorted(place.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def built(set_name: str, method: str) -> tuple[Path, dict[str, Any]]:
    """Build a contender, unless it stands; return its folder and what the build took."""
    place = _frame.CACHE / NAME / f"{set_name}-{method}"
    room = "src/nestvec/search"
    made_by = "faiss"
    if method != BASE:
        parts = ("structures", "kernels", "generation.py", "mirror.py", "sealed.py")
        made_by = sources(*(f"{room}/{part}" for part in parts))
    kept = place / "build.json"
    if kept.is_file() and (said := json.loads(kept.read_text()))["made_by"] == made_by:
        return place, said
    print(f"  {set_name} {method}: building ...", flush=True)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    command = [sys.executable, __file__, "--build", set_name, method]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    said = {**json.loads(done.stdout.splitlines()[-1]), "made_by": made_by}
    kept.write_text(json.dumps(said))
    return place, said


@functools.cache
def tuning(set_name: str, method: str) -> dict[str, Any]:
    print(f"  {set_name} {method}: choosing its knobs ...", flush=True)
    process = Process("--serve", set_name, method)
    process("open")
    said = process("tune")
    process.end()
    return said


def cell(set_name: str, method: str) -> list[dict[str, Any]]:
    """Measure a contender beside HNSW32."""
    place, took = built(set_name, method)
    base_took = built(set_name, BASE)[1]
    row = {
        "dataset": set_name,
        "method": method,
        "n": took["n"],
        "dim": took["dim"],
        "build_s": round(took["build_s"], 1),
    }
    tuned, base_tuned = tuning(set_name, method), tuning(set_name, BASE)
    if "refused" in tuned:
        return [{**row, "metric": "QPS at recall@10", "note": f"refused: {tuned['refused']}"}]
    rows = [
        {
            **row,
            "metric": "build, processor seconds",
            "value": round(took["build_s"], 1),
            "ratio": took["build_s"] / base_took["build_s"],
            "ratio_to": BASE,
            "note": f"all threads; {took['clock_s']:.0f} s by the clock",
        }
    ]
    for target in TARGETS:
        setting, base_setting = (one["best"][str(target)] for one in (tuned, base_tuned))
        asked = {**row, "target_recall": target}
        if setting is None or base_setting is None:
            rows.append({**asked, "metric": "QPS at recall@10", "note": "target not reached"})
            continue
        rows += measured(set_name, method, setting, base_setting, asked)
        if "> " in str(setting):
            rows.append(cold(set_name, method, place, setting, asked))
        print(f"  {set_name} {method} {target}: {rows[-1]}", flush=True)
    return rows


def measured(
    set_name: str, method: str, setting: Any, base_setting: Any, row: dict[str, Any]
) -> list[dict[str, Any]]:
    ours, base = (Process("--serve", set_name, name) for name in (method, BASE))
    for process in (ours, base):
        process("open")
    recall = ours("score", setting)["recall"]
    base_recall = base("score", base_setting)["recall"]
    took: dict[tuple[str, str], list[float]] = {}
    for _ in range(TURNS):
        for task in ("one_by_one", "batch"):
            for who, process, at in (("ours", ours, setting), ("base", base, base_setting)):
                took.setdefault((task, who), []).append(process(task, at)["seconds"])
    for process in (ours, base):
        process.end()
    rows = []
    for threads, task in ((1, "one_by_one"), (2, "batch")):
        mine, theirs = (np.array(took[task, who]) for who in ("ours", "base"))
        rows.append(
            {
                **row,
                "metric": "QPS at recall@10",
                "threads": threads,
                "recall": recall,
                "qps": round(1 / float(np.median(mine)), 1),
                "ratio": float(np.median(theirs / mine)),
                "ratio_to": BASE,
                "rss_bytes": ours.anonymous,
                "bytes_per_vector": round(ours.anonymous / row["n"], 1),
                "note": f"{setting}; {BASE}: ef {base_setting}, recall {base_recall:.4f}; "
                + ("one query a call, a processor second" if threads == 1 else "a batch"),
            }
        )
    rows.append(
        {
            **row,
            "metric": "resident bytes",
            "value": ours.anonymous,
            "rss_bytes": ours.anonymous,
            "bytes_per_vector": round(ours.anonymous / row["n"], 1),
            "ratio": ours.anonymous / base.anonymous,
            "ratio_to": BASE,
            "note": f"peak of RssAnon + RssShmem of a process that opens and searches; "
            f"{ours.before / 1e6:.0f} MB of it before it opened; RssFile up to "
            f"{ours.mapped / 1e6:.0f} MB; {BASE}: {base.anonymous / 1e6:.0f} MB, "
            f"{base.before / 1e6:.0f} before; {setting}",
        }
    )
    return rows


def cold(
    set_name: str, method: str, place: Path, setting: Any, row: dict[str, Any]
) -> dict[str, Any]:
    files = list(place.glob("x.nest/derived/*/vectors/vectors.npy"))
    runs, stayed, mapped = [], 0.0, 0
    for _ in range(COLD_TURNS):
        stayed = max(stayed, drop(files))
        process = Process("--serve", set_name, method)
        process("open")
        runs.append(process("one_by_one", setting))
        process.end()
        mapped = process.mapped
    middle = {key: float(np.median([run[key] for run in runs])) for key in runs[0]}
    return {
        **row,
        "metric": "QPS at recall@10, cold page cache",
        "threads": 1,
        "qps": round(1 / middle["clock"], 1),
        "p50_ms": round(middle["p50_ms"], 3),
        "p99_ms": round(middle["p99_ms"], 3),
        "note": f"by the clock, the first {SCORED} queries of a fresh process, opening not "
        f"counted; vectors.npy dropped by posix_fadvise before, {100 * stayed:.1f}% of it cached "
        f"by mincore then; RssFile up to {mapped / 1e6:.0f} MB after; {setting}",
    }


def kept(set_name: str, method: str) -> list[dict[str, Any]]:
    """The figures of one cell, from the cache if they are there."""
    digest = sources("benchmarks/memory.py", "src/nestvec/search")
    file = _frame.cache_folder(NAME) / f"{set_name}-{method}-{digest}.json"
    if not file.is_file():
        print(f"  {set_name} {method} ...", flush=True)
        file.write_text(json.dumps(cell(set_name, method)))
    return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument(
        "--sets",
        default=",".join(SETS),
        help="names of _galleries.SETS; rows of other sets stay in the result file",
    )
    some = f"among {', '.join(METHODS)}; rows of others stay"
    parser.add_argument("--methods", default=",".join(METHODS), help=some)
    parser.add_argument(
        "--try", dest="trial", action="store_true", help="a small gallery, no result file"
    )
    for word in ("--build", "--serve"):
        parser.add_argument(word, nargs=2, metavar=("SET", "METHOD"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.build or asked.serve:
        place = _frame.CACHE / NAME / "-".join(asked.build or asked.serve)
        if asked.build:
            print(json.dumps(build(asked.build[0], asked.build[1], place)))
        else:
            serve(asked.serve[0], asked.serve[1], place)
        return
    sets = ["try"] if asked.trial else asked.sets.split(",")
    methods = asked.methods.split(",")
    energy = {name: gallery_of(name).energy() for name in sets}
    meta = _frame.meta(seeds=[0], question=QUESTION, energy=energy)
    for name in sets:
        ask(name)
    rows = [row for name in sets for method in methods for row in kept(name, method)]
    for row in rows:
        print(row)
    if not asked.trial:
        _frame.write(NAME, rows, meta, renewed=sets, methods=methods)


if __name__ == "__main__":
    main()
