"""What all benchmarks share: a result file each, and in it who measured, on what, with which data.

A benchmark is a script::

    meta = _frame.meta(seeds=[0], data=["scifact"])   # printed first
    rows = [{"dataset": "scifact", "method": "full", "dim": 384, "metric": "nDCG@10", ...}]
    _frame.write("adaptor", rows, meta)
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import numbers
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import joblib

from nestvec._atomic import written_beside

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
CACHE = ROOT / ".cache/benchmarks"
PACKAGES = "numpy scipy scikit-learn torch faiss-cpu sentence-transformers".split()

#: One measurement a row; a key only where it applies.
KEYS = frozenset(
    """
    dataset method dim layer precision metric value low high n seed bytes_per_vector macs_per_query
    qps p50_ms p99_ms recall target_recall ratio ratio_to build_s rss_bytes threads note
    held identical acknowledged lost pair n_pairs share verdict safe truth share_backfilled order
    rank n_certifying
    """.split()
)


def data_folder() -> Path:
    """Return the folder of the evaluation sets, or say how to name it."""
    folder = Path(os.environ.get("NESTVEC_DATA", ROOT / "../shared/data")).resolve()
    if not folder.is_dir():
        sys.exit(f"no evaluation data at {folder}: set NESTVEC_DATA to its folder")
    return folder


def cache_folder(name: str) -> Path:
    """Return (and make) the folder where a benchmark keeps what it can make again."""
    folder = CACHE / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def memory(*rooms: str) -> joblib.Memory:
    """Return a cache of function calls, so that a run that was interrupted resumes.

    ``rooms`` are the packages of nestvec that the cached functions use, e.g. ``"encoders"``: when
    their source changes, the cache starts anew, so an old result is never taken for a new one.
    """
    sources = hashlib.sha256()
    for room in rooms:
        for file in sorted((ROOT / "src/nestvec" / room).rglob("*.py")):
            sources.update(file.read_bytes())
    return joblib.Memory(cache_folder("-".join([*rooms, sources.hexdigest()[:12]])), verbose=0)


def meta(*, seeds: Sequence[int], data: Iterable[str] = (), **more: Any) -> dict[str, Any]:
    """Collect, print and return what makes the run repeatable.

    Parameters
    ----------
    seeds
        Every seed that was used.
    data
        Files or folders below the data folder; each file's sha256 is recorded.
    more
        Further facts of this benchmark, e.g. ``question="..."``.
    """
    found = {
        "command": shlex.join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "threads": threads(),
        "load_before": round(os.getloadavg()[0], 2),  # rates beside a busy neighbour say little
        "seeds": list(seeds),
        "versions": _versions(),
        "data": _checksums(data),
        **more,
    }
    print(json.dumps(found, indent=2), flush=True)
    return found


def write(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    meta: Mapping[str, Any],
    *,
    renewed: Iterable[str] | None = None,
    methods: Iterable[str] | None = None,
) -> Path:
    """Write ``results/<name>.json``; unknown keys, NaN and Inf are refused.

    With ``renewed``, data sets, the rows of other data sets stay as an earlier run wrote them, and
    with ``methods`` those of other methods too; ``meta["of"]`` says of each when, on what and from
    which commit its rows came.
    """
    if renewed is not None:
        some = None if methods is None else [*methods]
        rows, meta = _beside_what_stands(name, rows, meta, [*renewed], some)
    for at, row in enumerate(rows):
        if unknown := set(row) - KEYS:
            raise ValueError(f"row {at} has keys no result file knows: {sorted(unknown)}")
        for key, value in row.items():
            if isinstance(value, numbers.Real) and not math.isfinite(value):
                raise ValueError(f"row {at}: {key} is {value}")
    path = RESULTS / f"{name}.json"
    tidy = ",\n".join("    " + json.dumps(dict(row), default=_plain) for row in rows)
    head = json.dumps(dict(meta), indent=2, default=_plain).replace("\n", "\n  ")
    with written_beside(path) as scratch:
        scratch.write_text(f'{{\n  "meta": {head},\n  "rows": [\n{tidy}\n  ]\n}}\n')
    print(f"{len(rows)} rows: {path.relative_to(ROOT)}")
    return path


def _beside_what_stands(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    meta: Mapping[str, Any],
    renewed: list[str],
    methods: list[str] | None,
) -> tuple[list[Mapping[str, Any]], dict[str, Any]]:
    stands = read(name) if (RESULTS / f"{name}.json").is_file() else {"meta": {}, "rows": []}
    stay = [
        row
        for row in stands["rows"]
        if row["dataset"] not in renewed or (methods is not None and row["method"] not in methods)
    ]
    about = ("command", "commit", "date", "machine", "threads", "load_before", "versions")
    before = {key: stands["meta"][key] for key in about if key in stands["meta"]}
    of = {one: before for one in dict.fromkeys(row["dataset"] for row in stay)}
    known = {row["dataset"] for row in stay}
    of |= {
        one: said
        for one, said in stands["meta"].get("of", {}).items()
        if one.partition(":")[0] in known  # "docs", and "docs: usearch" of one method
    }
    some = "" if methods is None else f": {', '.join(methods)}"
    of |= {f"{one}{some}": {key: meta[key] for key in about} for one in renewed}
    both = {key: {**stands["meta"].get(key, {}), **meta.get(key, {})} for key in ("data", "energy")}
    kept = {key: value for key, value in both.items() if value}
    return [*stay, *rows], {**meta, **kept, "of": of}


def read(name: str) -> dict[str, Any]:
    """Read a result file back: ``{"meta": ..., "rows": [...]}``."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def machine() -> dict[str, Any]:
    """Return the processor, its cores, the memory in bytes and the system."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "ram_bytes": pages * page,
        "system": f"{platform.system()} {platform.machine()}",
    }


def threads() -> int:
    """Return the threads that numpy and its kin may use: OMP_NUM_THREADS, or the cores we have."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ["nestvec", *PACKAGES]:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    return (git("rev-parse", "HEAD") or "unknown") + (
        " with uncommitted changes" if changed else ""
    )


def _checksums(data: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in data:
        place = data_folder() / name
        files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
        if not files:
            raise FileNotFoundError(f"no data file at {place}")
        for file in files:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            found[file.relative_to(data_folder()).as_posix()] = digest
    return found


def _plain(value: Any) -> Any:
    """numpy's scalars as Python's; whatever else does not belong into a result file."""
    return value.item()
