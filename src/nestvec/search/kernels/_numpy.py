"""The kernels in plain numpy: slow, obvious, and what the compiled ones are tested against.

Arguments and answers are those of `_numba`; shortlists come best first, ties to the lower row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

LEVELS = 127  # steps to each side of zero
OFFSET = 128  # what a code adds, so that none is below zero
SMALL = 1e-30  # sums and products of float32 below it may have lost what is smaller
NOTHING = -1  # the row number that fills a shortlist which found too few


def _dots(codes: Any, query: Any) -> Any:
    return codes.astype(np.int32) @ query.astype(np.int32)


def _cosines(vectors: Any, query: Any) -> Any:
    cut = query[: vectors.shape[1]].astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(cut)
    return (vectors @ cut / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def _best(scores: Any, rows: Any, keep: int) -> tuple[Any, Any]:
    order = np.lexsort((rows, -scores))[:keep]
    return scores[order], rows[order]


def _write(found: tuple[Any, Any], scores: Any, rows: Any) -> None:
    n = len(found[0])
    scores[:n], rows[:n], rows[n:] = *found, NOTHING


def scan(codes: Any, queries: Any, alive: Any, scores: Any, rows: Any) -> None:
    every = np.flatnonzero(alive) if len(alive) else np.arange(len(codes))
    for query, some_scores, some_rows in zip(queries, scores, rows, strict=True):
        found = _best(_dots(codes[every], query), every, scores.shape[1])
        _write(found, some_scores, some_rows)


def scan_lists(
    codes: Any,
    starts: Any,
    numbers: Any,
    probes: Any,
    queries: Any,
    alive: Any,
    scores: Any,
    rows: Any,
) -> None:
    for place, query in enumerate(queries):
        spans = [np.arange(starts[p], starts[p + 1]) for p in probes[place]]
        at = np.concatenate(spans) if spans else np.arange(0)
        if len(alive):
            at = at[alive[numbers[at]]]
        found = _best(_dots(codes[at], query), numbers[at], scores.shape[1])
        _write(found, scores[place], rows[place])


def walk(
    links: Any,
    upper: Any,
    level_starts: Any,
    upper_rows: Any,
    down: Any,
    codes: Any,
    queries: Any,
    seen: Any,
    clock: Any,
    scores: Any,
    rows: Any,
) -> None:
    ef = scores.shape[1]
    for query, some_scores, some_rows in zip(queries, scores, rows, strict=True):
        at = 0
        for start in level_starts[-2::-1]:
            best, moved = _dots(codes[upper_rows[start + at]], query), True
            while moved:
                moved = False
                for other in (j for j in upper[start + at] if j >= 0):
                    score = _dots(codes[upper_rows[start + other]], query)
                    if score > best:
                        best, at, moved = score, other, True
            at = down[start + at]
        # (score, row) in the order found: equals stay behind those that came before.
        pool = [(int(_dots(codes[at], query)), int(at))]
        met, done = {int(at)}, set()
        while True:
            waiting = [row for _, row in pool if row not in done]
            if not waiting:
                break
            done.add(waiting[0])
            for row in (int(j) for j in links[waiting[0]] if j >= 0):
                if row not in met:
                    met.add(row)
                    pool.append((int(_dots(codes[row], query)), row))
                    pool = sorted(pool, key=lambda one: -one[0])[:ef]
        found = np.array([s for s, _ in pool]), np.array([r for _, r in pool])
        _write(found, some_scores, some_rows)


def fold(queries: Any, scale: Any, out: Any) -> None:
    for query, some in zip(queries[:, : len(scale)], out, strict=True):
        folded = query * scale
        if np.abs(folded).max() < np.float32(SMALL):
            folded = query.astype(np.float64) * scale
        step = np.abs(folded).max() / folded.dtype.type(LEVELS)
        some[: len(scale)] = np.rint(folded / step) if step > 0 else 0
        some[len(scale) :] = 0


def rescore(codes: Any, queries: Any, shortlists: Any, scores: Any, rows: Any) -> None:
    for place, query in enumerate(queries):
        some = shortlists[place][shortlists[place] >= 0]
        _write(_best(_dots(codes[some], query), some, scores.shape[1]), scores[place], rows[place])


def rescore_decoded(
    codes: Any, scale: Any, places: Any, queries: Any, shortlists: Any, scores: Any, rows: Any
) -> None:
    for asked, query in enumerate(queries):
        some = shortlists[asked][shortlists[asked] >= 0]
        at = places[some] if len(places) else some
        vectors = (codes[at, : len(scale)].astype(np.float64) - OFFSET) * scale
        found = _best(_cosines(vectors, query), some, scores.shape[1])
        _write(found, scores[asked], rows[asked])


def rescore_finer(
    codes: Any,
    rests: Any,
    scale: Any,
    steps: Any,
    places: Any,
    queries: Any,
    shortlists: Any,
    scores: Any,
    rows: Any,
) -> None:
    dim = len(scale)
    for asked, query in enumerate(queries):
        some = shortlists[asked][shortlists[asked] >= 0]
        at = places[some] if len(places) else some
        quarters = np.concatenate([rests[some] >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
        vectors = (codes[at, :dim].astype(np.float64) - OFFSET) * scale
        vectors += (2.0 * quarters[:, :dim] - 3) * steps
        found = _best(_cosines(vectors, query), some, scores.shape[1])
        _write(found, scores[asked], rows[asked])


def rerank(words: Any, sums: Any, queries: Any, shortlists: Any, scores: Any, rows: Any) -> int:
    dim = queries.shape[1]
    vectors = words.view({2: np.float16, 4: np.float32}[words.itemsize])
    for place, query in enumerate(queries):
        some = shortlists[place][shortlists[place] >= 0]
        for row in some:
            if words[row, :dim].sum(dtype=np.uint32) != sums[row]:
                return int(row)
        cut = vectors[some, :dim].astype(np.float64)
        unit = query / np.linalg.norm(query.astype(np.float64))
        lengths = np.linalg.norm(cut, axis=1)
        exact = cut @ unit / np.where(lengths > 0, lengths, 1)
        found = _best(exact.astype(np.float32), some, scores.shape[1])
        _write(found, scores[place], rows[place])
    return NOTHING


def unit(words: Any, sums: Any, size: int, out: Any) -> int:
    wrong = words[:, :size].sum(axis=1, dtype=np.uint32) != sums
    if wrong.any():
        return int(wrong.argmax())
    vectors = words.view({2: np.float16, 4: np.float32}[words.itemsize])
    cut = vectors[:, : out.shape[1]].astype(np.float64)
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    out[:] = cut / np.where(lengths > 0, lengths, 1)
    return NOTHING
