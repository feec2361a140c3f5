"""Encode once, slice many: score every method at every size, then resample them together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nestvec._progress import progress
from nestvec.errors import DataError, MissingExtraError, NestvecError
from nestvec.measurement import baselines as ways
from nestvec.measurement import bm25, depth, label_free
from nestvec.measurement.baselines import Candidate
from nestvec.measurement.curve import Curve
from nestvec.measurement.rows import Scored, quality_rows, rank_rows
from nestvec.measurement.tasks import (
    ClassificationTask,
    LabelFreeTask,
    RetrievalTask,
    STSTask,
    Task,
    check_positive,
    unit,
)
from nestvec.search.exact import top_k
from nestvec.space import Embeddings, halving, parse_dims

RANK_ROWS = 25_600  # rows of a gallery whose rank and spectrum are computed, as in RankMe

Matrix = NDArray[np.float32]


def measure(
    docs: Embeddings | ArrayLike | None = None,
    queries: Embeddings | ArrayLike | None = None,
    qrels: Mapping[Any, Mapping[Any, int]] | None = None,
    *,
    dropped: Collection[Any] = (),
    task: RetrievalTask | ClassificationTask | STSTask | LabelFreeTask | None = None,
    dims: Iterable[int] | str | None = None,
    layers: Mapping[int, Any] | None = None,
    maps: Mapping[str, Any] | None = None,
    baselines: bool | Iterable[str] = True,
    texts: tuple[Sequence[str], Sequence[str]] | None = None,
    dataset: str = "",
    metrics: Sequence[str] | None = None,
    k: int = 10,
    n_resamples: int = 2000,
    seed: int = 0,
    show_progress: bool = False,
) -> Curve:
    """Measure what vectors are worth at every size, beside every baseline.

    With ``queries`` and ``qrels`` this is retrieval; without ``qrels`` it is how many of the full
    size's neighbours each size keeps; any other task is given as ``task``.

    Parameters
    ----------
    docs, queries
        Embeddings of one Space (the ids are those of ``qrels``), or two arrays.
    qrels
        Query id -> document id -> grade; a grade > 0 is relevant. Ids are compared as text, so
        integers fit the row numbers of arrays.
    dropped
        Ids that may be judged although ``docs`` lacks them (`RetrievalSet.dropped`); relevant
        ones count against recall.
    task
        A `RetrievalTask`, `ClassificationTask`, `STSTask` or `LabelFreeTask` instead of the three
        above; it carries its own ``k`` and ``metrics``.
    dims
        Sizes to cut to, trained or not: measuring them is the point. By default the Space's
        nesting dims, else the full size halved down to 16. The full size is always measured.
    layers
        Layer -> its two sides, like ``(docs, queries)``, or ``(docs,)``, or the sides of ``task``
        in its order, as `TextEncoder.encode_layers` makes them in one pass: every layer is
        measured at every size, too. The largest number is the whole encoder: its sides are
        ``docs`` and ``queries``, which may be left out. Maps and baselines are of the last layer.
    maps
        Name -> fitted map (``transform`` takes Embeddings to Embeddings): each stands in the
        table under its name. Baselines are computed on the vectors as given.
    baselines
        True: all that the installed extras allow. False: plain truncation only. Or their names,
        among `nestvec.measurement.BASELINE_NAMES`.
    texts
        (texts of the documents, texts of the queries), in their order: adds BM25 and its fusion
        with the full-size vectors. Retrieval only.
    dataset
        A name for the rows.
    metrics
        Retrieval metrics by their ir-measures names; the first is the primary one.
    k
        Cutoff of the default metrics, and number of neighbours.
    n_resamples, seed
        Of the bootstrap. ``seed`` draws everything else too.
    show_progress
        A bar on stderr, a step a method.

    Returns
    -------
    Curve
        Rows with value, 95% interval, paired difference to full size, bytes and multiply-adds.

    Raises
    ------
    SpaceMismatchError
        If the two sides live in two spaces.
    DataError
        If ids of the qrels are unknown, no query has a relevant document, a matrix holds NaN,
        Inf or rows without length, or ``k`` or ``n_resamples`` is below 1.
    MissingExtraError
        If ``nestvec[measure]`` is not installed and retrieval is measured. A baseline whose extra
        is missing is left out, and ``Curve.notes`` says so.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> vectors = rng.normal(size=(200, 32)) / np.arange(1, 33)  # energy in the first dims
    >>> curve = measure(vectors, dims=(8, 16), baselines=False)
    >>> round(curve.get("truncation", 16)["value"], 2)
    0.94
    """
    sides_of = {} if layers is None else depth.checked(layers)
    if sides_of and task is None and docs is None:
        docs, queries = (*list(sides_of.values())[-1], queries)[:2]
    work = _as_task(task, docs, queries, qrels, dropped, metrics, k, seed)
    maps = dict(maps or {})
    names = tuple(n for n in ways.chosen(baselines) if n not in maps)
    taken = sorted({"full", *ways.NAMES[:1], *ways.NAMES[3:]} & set(maps))
    if taken:
        raise DataError(f"maps: {taken[0]!r} is the name of a baseline; choose another.")
    check_positive(n_resamples, "n_resamples")
    if texts is not None:
        _check_texts(work, texts)
    full = work.gallery.dim
    sizes = _sizes(dims, work.gallery)
    cuts = sizes[:-1]
    gallery, asking = unit(work.gallery), unit(work.asking)
    notes = list(work.notes)
    by_words = [n for n in ways.BY_WORDS if n in names]
    if texts is None and by_words and (isinstance(work, RetrievalTask) or baselines is not True):
        notes.append(
            f"{' and '.join(by_words)} not in the table: retrieval with texts=(documents, queries) "
            f"is needed."
        )

    earlier = depth.earlier_sides(work, sides_of) if sides_of else {}
    nested = {"full": (gallery, asking)}  # method -> both sides at full size
    steps: list[tuple[str, Callable[[], Iterator[Candidate]]]] = [
        ("full", partial(ways.prefixes, "full", gallery, asking, (full,)))
    ]
    if "truncation" in names:
        steps.append(("truncation", partial(ways.prefixes, "truncation", gallery, asking, cuts)))
    rotations = [n for n in names if n in ways.ROTATIONS]
    for name in rotations:
        try:
            nested[name] = ways.rotated(name, gallery, asking, seed=seed)
        except MissingExtraError as error:
            notes.append(f"{name} is not in the table: {error}")
            continue
        steps.append((name, partial(ways.prefixes, name, *nested[name], cuts)))
    for name, fitted in maps.items():
        sides = unit(fitted.transform(work.gallery)), unit(fitted.transform(work.asking))
        nested[name] = sides
        own = sorted({*(d for d in sizes if d <= sides[0].shape[1]), sides[0].shape[1]})
        steps.append((name, partial(ways.prefixes, name, *sides, own)))
        if "int8" in names:
            steps.append((name, partial(ways.int8, name, *sides, own)))
        if "binary" in names:
            steps.append((name, partial(ways.binary, name, *sides, own)))
    sides = (gallery, asking)
    more: dict[str, Callable[[], Iterator[Candidate]]] = {
        "int8": partial(ways.int8, "int8", *sides, sizes),
        "binary": partial(ways.binary, "binary", *sides, sizes),
        "product_quantisation": partial(ways.product_quantisation, *sides, sizes),
        "csr": partial(ways.csr, *sides, cuts, seed=seed),
    }
    steps += [(name, more[name]) for name in names if name in more]
    n_first = len(steps)
    for layer_sides in earlier.values():
        steps.append(("full", partial(ways.prefixes, "full", *layer_sides, (full,))))
        steps.append(("truncation", partial(ways.prefixes, "truncation", *layer_sides, cuts)))
    of_step = [None] * n_first + [layer for layer in earlier for _ in range(2)]

    scored: list[Scored] = []
    with progress("measure", len(steps), show=show_progress, unit="methods") as advance:
        for layer, (name, candidates) in zip(of_step, steps, strict=True):
            try:
                scored += [_scored(work, candidate, layer) for candidate in candidates()]
            except NestvecError as error:
                if name not in more:
                    raise
                notes.append(f"{name} is not in the table: {error}")
            advance(1)
    if texts is not None and isinstance(work, RetrievalTask):
        scored += _word_matching(work, texts, by_words, notes)

    rows = quality_rows(work, scored, dataset=dataset, n_resamples=n_resamples, seed=seed)
    sample = _sample(len(gallery), seed)
    if isinstance(work, LabelFreeTask):
        sampled = {method: side[sample] for method, (side, _) in nested.items()}
        rows += rank_rows(sampled, sizes, rotations, dataset=dataset, seed=seed)
    meta = {
        "dataset": dataset,
        "task": type(work).__name__,
        "metric": work.metrics[0],
        "metrics": list(dict.fromkeys(r["metric"] for r in rows)),
        "dims": list(sizes),
        **({"layers": list(sides_of)} if sides_of else {}),
        "deployable": [*(n for n in names if n == "truncation"), *maps],
        "space": work.gallery.space.label,
        "n_gallery": len(gallery),
        "n_resamples": n_resamples,
        "seed": seed,
        "versions": _versions(),
    }
    spectra = {
        name: label_free.spectrum(side[sample]).tolist()
        for name, (side, _) in nested.items()
        if name not in rotations  # a rotation changes no eigenvalue
    }
    curve = Curve(rows, meta, notes, spectra)
    curve.notes += _worth_fitting(curve)
    return curve


def _worth_fitting(curve: Curve) -> list[str]:
    """Say it if the principal rotation, a baseline here, would hold at a smaller size."""
    size = (curve.cut() or {"dim": curve.full_dim})["dim"]
    for row in curve.select():
        if row["method"] == "principal_rotation" and row["dim"] < size and curve.holds(row):
            return [
                f"principal_rotation holds at {row['dim']} dims ({row['metric']} "
                f"{row['value']:.3f}): fit a PrincipalRotation and pass it in maps= to serve it."
            ]
    return []


def _as_task(
    task: Task | None,
    docs: Any,
    queries: Any,
    qrels: Any,
    dropped: Collection[Any],
    metrics: Sequence[str] | None,
    k: int,
    seed: int,
) -> Task:
    if task is not None:
        if dropped or any(given is not None for given in (docs, queries, qrels, metrics)):
            raise DataError("task= carries its own vectors, labels and metrics: pass only those.")
        return task
    if docs is None:
        raise DataError("nothing to measure: pass docs, docs + queries + qrels, or task=.")
    if qrels is None:
        if metrics is not None or dropped:
            name = "dropped" if metrics is None else "metrics"
            raise DataError(f"{name}= is for retrieval, and there are no qrels.")
        return LabelFreeTask(docs, queries, k=k, seed=seed)
    if queries is None:
        raise DataError("qrels are given and queries are not: retrieval needs both.")
    return RetrievalTask(docs, queries, qrels, k, tuple(metrics or ()), dropped)


def _sizes(dims: Iterable[int] | str | None, gallery: Embeddings) -> tuple[int, ...]:
    full = gallery.dim
    if dims is None:
        dims = gallery.space.nesting_dims or halving(full)
    return tuple(sorted({*parse_dims(dims, full=full), full}))


def _sample(n: int, seed: int) -> NDArray[np.int64]:
    if n <= RANK_ROWS:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, RANK_ROWS, replace=False))


def _scored(task: Task, way: Candidate, layer: int | None) -> Scored:
    return Scored(
        way.method,
        way.dim,
        way.precision,
        way.bytes_per_vector,
        (way.macs_each, way.macs_once),
        way.note,
        task.score(way.queries, way.gallery),
        layer,
    )


def _check_texts(task: Task, texts: tuple[Sequence[str], Sequence[str]]) -> None:
    if not isinstance(task, RetrievalTask):
        raise DataError("texts are for BM25, which is a baseline of retrieval only.")
    given, needed = [len(side) for side in texts], [len(task.gallery), task.n_queries]
    if given != needed:
        raise DataError(
            f"texts: {given[0]} documents and {given[1]} queries given for {needed[0]} and "
            f"{needed[1]} vectors; row i of one is row i of the other."
        )


def _word_matching(
    task: RetrievalTask,
    texts: tuple[Sequence[str], Sequence[str]],
    wanted: Sequence[str],
    notes: list[str],
) -> Iterator[Scored]:
    """BM25, and its fusion with the full-size vectors."""
    docs, queries = texts
    if not wanted:
        return
    depth = max(bm25.FUSION_DEPTH, task.depth)
    try:
        asked: list[int] = task.asked.tolist()
        words = bm25.bm25(docs, [queries[row] for row in asked], depth)
    except MissingExtraError as error:
        notes.append(f"{' and '.join(wanted)} are not in the table: {error}")
        return
    full = task.gallery.dim
    if "bm25" in wanted:
        note = "k1=0.9, b=0.4, stemmed"
        yield Scored("bm25", None, None, None, None, note, task.score_ranking(words))
    if "bm25_fusion" in wanted:
        dense, _ = top_k(unit(task.asking), unit(task.gallery), depth)
        fused = bm25.reciprocal_rank_fusion(words, dense, n_docs=len(docs))
        note = f"reciprocal ranks (k=60) of BM25 and the full {full} dims, {depth} each"
        yield Scored("bm25_fusion", full, None, None, None, note, task.score_ranking(fused))


def _versions() -> dict[str, str]:
    found = {}
    for name in ("nestvec", "numpy", "ir-measures", "faiss-cpu", "bm25s", "scikit-learn", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
