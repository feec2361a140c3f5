"""Queries a second at equal recall: our structures beside other libraries'.

    python benchmarks/search.py [--sets docs,real1m] [--peers pgvector_hnsw,...]

Every (set, peer) runs in a process of its own beside faiss' HNSW32 (ours beside its
HNSW32-SQ8 + refine, too), in turns; its figures are kept, so that a run that was interrupted goes
on. Knobs are chosen on half of the queries: for each option of a peer the least width at which
recall@10 reaches the target, then the quickest of those. The other half is scored.

One thread: one query a call, by processor time (pgvector: by the clock). Two threads: all queries
in a call, by the clock.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import _databases
import _frame
import numpy as np
from _galleries import SETS
from _peers import PEERS

NAME = "search"
TARGETS = (0.95, 0.99)
TURNS = 5
LEAST_S = 0.1  # of batches, so that the clock can tell
TUNED = "ratio while tuning"  # left out of the result file
BASE, BAR = "faiss_hnsw32", "faiss_hnsw32_sq8_refine"
SOURCES = [Path(__file__).parent / name for name in ("_galleries.py", "_peers.py", "search.py")]
LARGE = {  # on sets but `docs`, only the bars and who came next to them there
    "peers": (BASE, BAR, "faiss_ivf_flat", "scann", "svs_vamana"),
    "sets": ("captions_mrl", "real1m", "syn1m", "clusters768", "clusters1536"),
}


def digest_of(files: list[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:10]


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([np.isin(t, f).mean() for f, t in zip(found, truth, strict=True)]))


def one_by_one(peer: Any, queries: np.ndarray, setting: Any) -> float:
    """Processor seconds a query, one query a call, one thread."""
    time.sleep(0.02)  # for threads of the batch before, which wait busily for a while
    search = peer.searcher(*setting, 1)
    singles = [queries[row : row + 1] for row in range(len(queries))]
    started = peer.clock()
    for query in singles:
        search(query)
    return (peer.clock() - started) / len(queries)


def in_a_batch(peer: Any, queries: np.ndarray, setting: Any) -> float:
    """Seconds by the clock a query, all in one call, two threads."""
    search = peer.searcher(*setting, 2)
    started, times = time.perf_counter(), 0
    while times == 0 or time.perf_counter() < started + LEAST_S:
        search(queries)
        times += 1
    return (time.perf_counter() - started) / times / len(queries)


def least_width(peer: Any, option: Any, queries: np.ndarray, truth: np.ndarray, target: float):
    """The least width that reaches the target, or None."""
    widths = peer.widths()
    low, high = 0, len(widths)
    while low < high:
        middle = (low + high) // 2
        if recall(peer.searcher(widths[middle], option, 1)(queries), truth) >= target:
            high = middle
        else:
            low = middle + 1
    return widths[low] if low < len(widths) else None


def tuned(peer: Any, queries: np.ndarray, truth: np.ndarray, target: float) -> Any:
    """The quickest setting that reaches the target, or None."""
    reach = []
    for option in peer.options:
        width = least_width(peer, option, queries, truth, target)
        if width is not None:
            seconds = min(one_by_one(peer, queries, (width, option)) for _ in range(3))
            reach.append((seconds, (width, option)))
    return min(reach)[1] if reach else None


def kept_setting(name: str, tune: Callable[[], Any], *, keep: bool) -> Any:
    """What was tuned: rivals meet all others at the same setting."""
    file = _frame.cache_folder(NAME) / f"tuned-{name}-{digest_of(SOURCES)}.json"
    if keep and file.is_file():
        return json.loads(file.read_text())
    found = tune()
    if keep:
        file.write_text(json.dumps(found))
    return found


def cell(set_name: str, peer_name: str) -> list[dict[str, Any]]:
    gallery = SETS[set_name]()
    truth = gallery.truth()
    half = len(gallery.queries) // 2
    tuning, scoring = slice(0, half), slice(half, None)
    place = _frame.cache_folder(NAME)
    rivals = (BASE, BAR) if peer_name.startswith("nestvec") else (BASE,)
    made = {
        name: PEERS[name](gallery, place / f"{set_name}-{name}")
        for name in dict.fromkeys([*rivals, peer_name])
    }
    queries, wanted = gallery.queries[scoring], truth[scoring]
    peer, rows = made[peer_name], []
    for target in TARGETS:
        settings = {
            name: kept_setting(
                f"{set_name}-{name}-{target}",
                partial(tuned, one, gallery.queries[tuning], truth[tuning], target),
                keep=name in rivals,
            )
            for name, one in made.items()
        }
        row = {
            "dataset": set_name,
            "method": peer_name,
            "metric": "QPS at recall@10",
            "target_recall": target,
            "n": len(queries),
            "bytes_per_vector": round(peer.bytes_per_vector, 1),
            "build_s": round(peer.build_s, 1),
        }
        if settings[peer_name] is not None and BAR in rivals:
            bar, ours = (
                min(one_by_one(made[name], gallery.queries[tuning], settings[name]) for _ in "123")
                for name in (BAR, peer_name)
            )
            row[TUNED] = bar / ours
        setting = settings[peer_name]
        if setting is None:
            rows.append({**row, "note": f"{peer.version()}: target not reached"})
            continue
        got = {n: recall(made[n].searcher(*settings[n], 1)(queries), wanted) for n in made}
        said = str(peer.plan(*setting)) if hasattr(peer, "plan") else f"width, option {setting}"
        seconds: dict[tuple[str, int], list[float]] = {}
        for turn in range(TURNS + 1):
            for name, one in made.items():
                for threads, timed in ((1, one_by_one), (2, in_a_batch)):
                    took = timed(one, queries, settings[name])
                    if turn:  # the first one warms up
                        seconds.setdefault((name, threads), []).append(took)
        for threads in (1, 2):
            for rival in rivals:
                ours, base = (np.array(seconds[name, threads]) for name in (peer_name, rival))
                rows.append(
                    {
                        **row,
                        "threads": threads,
                        "recall": got[peer_name],
                        "qps": round(1 / float(np.median(ours)), 1),
                        "ratio": float(np.median(base / ours)),
                        "ratio_to": rival,
                        "note": f"{peer.version()}; {said}; recall of {rival} {got[rival]:.4f}",
                    }
                )
    return rows


def kept(set_name: str, peer_name: str) -> list[dict[str, Any]]:
    """The figures of one cell, from the cache or from a process of its own."""
    sources = list(SOURCES)
    if peer_name in _databases.NAMES:
        sources.append(Path(_databases.__file__))
    if peer_name.startswith("nestvec"):
        sources += sorted((_frame.ROOT / "src/nestvec/search").rglob("*.py"))
    file = _frame.cache_folder(NAME) / f"{set_name}-{peer_name}-{digest_of(sources)}.json"
    if not file.is_file():
        print(f"  {set_name} {peer_name} ...", flush=True)
        command = [sys.executable, __file__, "--cell", set_name, peer_name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"  {set_name} {peer_name} failed: {done.returncode}", flush=True)
            return []
        file.write_text(done.stdout.splitlines()[-1])
    return json.loads(file.read_text())


def chosen_by_tuning(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of our variants the one that a user would take: the quickest on the tuning queries."""
    ours = [row for row in rows if row["method"].startswith("nestvec") and TUNED in row]
    found = []
    for kind in dict.fromkeys((row["dataset"], row["target_recall"]) for row in ours):
        some = [row for row in ours if (row["dataset"], row["target_recall"]) == kind]
        best = max(some, key=lambda row: row[TUNED])["method"]
        found += [{**row, "method": "nestvec"} for row in some if row["method"] == best]
    return found


def peers_for(set_name: str, peers: list[str]) -> list[str]:
    if set_name not in LARGE["sets"]:
        return peers
    return [name for name in peers if name in LARGE["peers"] or name.startswith("nestvec")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sets",
        default=",".join(s for s in SETS if s != "try"),
        help="whose rows are measured anew; those of other sets stay in the result file",
    )
    parser.add_argument(
        "--peers",
        default="",
        help="whose rows are measured anew, all by default; ours are measured together, as one of "
        "them is chosen",
    )
    parser.add_argument("--cell", nargs=2, metavar=("SET", "PEER"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.cell:
        print(json.dumps(cell(*chosen.cell)))
        return
    sets = chosen.sets.split(",")
    peers = chosen.peers.split(",") if chosen.peers else list(PEERS)
    data = ("20newsgroups", "multi30k_captions", "snli_devtest")
    meta = _frame.meta(seeds=[0], data=data, energy={name: SETS[name]().energy() for name in sets})
    rows = [row for name in sets for peer in peers_for(name, peers) for row in kept(name, peer)]
    ours = [name for name in PEERS if name.startswith("nestvec")]
    if {*ours} <= {*peers}:
        rows += chosen_by_tuning(rows)
        peers.append("nestvec")
    elif {*ours} & {*peers}:  # to look at
        for row in rows:
            print(row)
        return
    known = [{key: value for key, value in row.items() if key != TUNED} for row in rows]
    _frame.write(NAME, known, meta, renewed=sets, methods=peers if chosen.peers else None)


if __name__ == "__main__":
    main()
