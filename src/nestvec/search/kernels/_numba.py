"""The kernels, compiled by numba: nogil and single-threaded; callers bring the threads.

Every function here has a twin of the same name in `_numpy`, slow and obvious, which the tests hold
it to; those that only call others have to find what the others do. Scores are whole numbers, so
both agree exactly; ties go to the lower row.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic as _numba_intrinsic

from nestvec.search.kernels._numpy import LEVELS, NOTHING, OFFSET, SMALL

intrinsic: Any = _numba_intrinsic  # its first argument is the compiler's, not the caller's

_LINE = 64  # bytes that come together from memory
_TILE_BYTES = 1 << 18  # codes that stay in a core's own cache
_STAMPS = 1 << 16  # queries after which the marks of rows met are cleared
_AHEAD = 4  # rows between asking for a vector and using it
_SMALL = np.float32(SMALL)
_CLOCK = np.int32(time.CLOCK_MONOTONIC)
_FASTMATH = {"reassoc", "contract", "nsz"}  # sums may be reordered; NaN and Inf stay what they are


def _compiled(function: Callable[..., Any]) -> Any:
    """Compile, with a cache on disk where there is a folder for one."""
    function = inspect.unwrap(function)  # type checks around it, in tests, are not to be compiled
    options: dict[str, Any] = {"nogil": True, "fastmath": _FASTMATH, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba's way to say that no folder can be written
        _say_that_nothing_is_cached()
        return njit(**options)(function)


def _say_that_nothing_is_cached() -> None:
    global _said
    if not _said:
        _said = True
        warnings.warn(
            "no folder can be written to, so search kernels are compiled again in every process "
            "(some seconds). Set NUMBA_CACHE_DIR to a folder that can.",
            RuntimeWarning,
            stacklevel=4,
        )


_said = False


@intrinsic
def _prefetch(typingctx: Any, array: Any, at: Any) -> Any:
    """Ask for the cache line of ``array.ravel()[at]``, and do not wait for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        made = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = builder.gep(made.data, [arguments[1]])
        pointer = ir.IntType(8).as_pointer()
        whole = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, whole, whole, whole])
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        one = ir.Constant(whole, 1)
        address = builder.bitcast(place, pointer)
        # Reading, likely to be read again, data.
        builder.call(call, [address, ir.Constant(whole, 0), ir.Constant(whole, 3), one])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


def _has_vnni() -> bool:
    features = llvm.get_host_cpu_features()
    return bool(features.get("avx512vnni") and features.get("avx512vl"))


@intrinsic
def _dot_vnni(typingctx: Any, codes: Any, at: Any, query: Any) -> Any:
    """Sum of codes[at + j] * query[j], 64 products an instruction.

    LLVM does not find ``vpdpbusd`` by itself in the plain loop (half the rate), so it is asked for
    by name. Sizes are multiples of 32.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        rows = context.make_array(kinds[0])(context, builder, arguments[0])
        asked = context.make_array(kinds[2])(context, builder, arguments[2])
        length = builder.extract_value(asked.shape, 0)
        whole, wide = ir.IntType(32), context.get_value_type(types.intp)
        begin = builder.gep(rows.data, [arguments[1]])

        def step(lanes: int, total: Any, offset: Any) -> Any:
            vector = ir.VectorType(whole, lanes)
            name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
            kind = ir.FunctionType(vector, [vector] * 3)
            product = cgutils.get_or_insert_function(builder.module, kind, name)
            loaded = []
            for data in (begin, asked.data):
                place = builder.bitcast(builder.gep(data, [offset]), vector.as_pointer())
                load = builder.load(place)
                load.align = 1
                loaded.append(load)
            return builder.call(product, [total, *loaded])

        def reduced(lanes: int, total: Any) -> Any:
            vector = ir.VectorType(whole, lanes)
            kind = ir.FunctionType(whole, [vector])
            name = f"llvm.vector.reduce.add.v{lanes}i32"
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [total])

        lanes = ir.VectorType(whole, 16)
        sums = cgutils.alloca_once_value(builder, ir.Constant(lanes, [0] * 16))
        n_blocks = builder.lshr(length, ir.Constant(wide, 6))
        with cgutils.for_range(builder, n_blocks) as loop:
            offset = builder.shl(loop.index, ir.Constant(wide, 6))
            builder.store(step(16, builder.load(sums), offset), sums)
        answer = cgutils.alloca_once_value(builder, reduced(16, builder.load(sums)))
        half = builder.and_(length, ir.Constant(wide, 32))
        with builder.if_then(builder.icmp_unsigned("!=", half, ir.Constant(wide, 0))):
            offset = builder.sub(length, ir.Constant(wide, 32))
            rest = step(8, ir.Constant(ir.VectorType(whole, 8), [0] * 8), offset)
            builder.store(builder.add(builder.load(answer), reduced(8, rest)), answer)
        return builder.load(answer)

    return types.int32(codes, types.intp, query), generate


if _has_vnni():

    @_compiled
    def _dot(codes: Any, row: int, query: Any) -> Any:
        return _dot_vnni(codes, np.intp(row) * query.shape[0], query)

else:

    @_compiled
    def _dot(codes: Any, row: int, query: Any) -> Any:
        total = np.int32(0)
        for j in range(query.shape[0]):
            total += np.int32(codes[row, j]) * np.int32(query[j])
        return total


@intrinsic
def _number(typingctx: Any, word: Any) -> Any:
    """Read the float16 or float32 that a word of 16 or 32 bits is."""
    kind = {16: ir.HalfType(), 32: ir.FloatType()}[word.bitwidth]

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = builder.bitcast(arguments[0], kind)
        return builder.fpext(number, ir.FloatType()) if word.bitwidth == 16 else number

    return types.float32(word), generate


# A shortlist under construction is a heap of (score, row) whose root is the worst. Worse means a
# lower score, or the same score and a higher row.


@_compiled
def _worse(score: int, row: int, than_score: int, than_row: int) -> bool:
    return score < than_score or (score == than_score and row > than_row)


@_compiled
def _sift_down(scores: Any, rows: Any, size: int, at: int) -> None:
    score, row = scores[at], rows[at]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and _worse(
            scores[child + 1], rows[child + 1], scores[child], rows[child]
        ):
            child += 1
        if not _worse(scores[child], rows[child], score, row):
            break
        scores[at], rows[at] = scores[child], rows[child]
        at = child
    scores[at], rows[at] = score, row


@_compiled
def _sift_up(scores: Any, rows: Any, at: int) -> None:
    score, row = scores[at], rows[at]
    while at > 0:
        parent = (at - 1) >> 1
        if not _worse(score, row, scores[parent], rows[parent]):
            break
        scores[at], rows[at] = scores[parent], rows[parent]
        at = parent
    scores[at], rows[at] = score, row


@_compiled
def _offer(scores: Any, rows: Any, size: int, score: int, row: int) -> int:
    """Put a row into the shortlist if it belongs there; return how many rows it holds now."""
    if size < scores.shape[0]:
        scores[size], rows[size] = score, row
        _sift_up(scores, rows, size)
        return size + 1
    if _worse(scores[0], rows[0], score, row):
        scores[0], rows[0] = score, row
        _sift_down(scores, rows, size, 0)
    return size


@_compiled
def _sort(scores: Any, rows: Any, size: int) -> None:
    """Order the shortlist best first, in place (heap sort)."""
    end = size
    while end > 1:
        end -= 1
        scores[0], scores[end] = scores[end], scores[0]
        rows[0], rows[end] = rows[end], rows[0]
        _sift_down(scores, rows, end, 0)


@_compiled
def _finish(scores: Any, rows: Any, size: int) -> None:
    _sort(scores, rows, size)
    rows[size:] = NOTHING


@_compiled
def scan(codes: Any, queries: Any, alive: Any, scores: Any, rows: Any) -> None:
    every_row = alive.shape[0] == 0
    sizes = np.zeros(queries.shape[0], np.int64)
    # Some rows at a time, which stay in the cache while all queries look at them.
    tile = max(1, _TILE_BYTES // codes.shape[1])
    for start in range(0, codes.shape[0], tile):
        end = min(start + tile, codes.shape[0])
        for place in range(queries.shape[0]):
            query, best, found = queries[place], scores[place], rows[place]
            size = sizes[place]
            for row in range(start, end):
                if every_row or alive[row]:
                    score = _dot(codes, row, query)
                    if size < best.shape[0] or score > best[0]:
                        size = _offer(best, found, size, score, row)
            sizes[place] = size
    for place in range(queries.shape[0]):
        _finish(scores[place], rows[place], sizes[place])


@_compiled
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
    every_row = alive.shape[0] == 0
    for place in range(queries.shape[0]):
        query, best, found = queries[place], scores[place], rows[place]
        size = 0
        for i in range(probes.shape[1]):
            which = probes[place, i]
            for at in range(starts[which], starts[which + 1]):
                score = _dot(codes, at, query)
                if size == best.shape[0] and score < best[0]:
                    continue
                row = numbers[at]
                if every_row or alive[row]:
                    size = _offer(best, found, size, score, row)
        _finish(best, found, size)


@intrinsic
def _shift(typingctx: Any, array: Any, start: Any, end: Any) -> Any:
    """Move ``array[start:end]`` one place on; LLVM makes a slow loop of the plain one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        made = context.make_array(signature.args[0])(context, builder, arguments[0])
        wide = context.get_value_type(types.intp)
        source = builder.gep(made.data, [arguments[1]])
        target = builder.gep(source, [ir.Constant(wide, 1)])
        width = ir.Constant(wide, signature.args[0].dtype.bitwidth // 8)
        n_bytes = builder.mul(builder.sub(arguments[2], arguments[1]), width)
        cgutils.raw_memmove(builder, target, source, n_bytes, 1)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), generate


@_compiled
def _meet(links: Any, at: int, codes: Any, seen: Any, stamp: int, fresh: Any) -> Any:
    """Collect the neighbours of a row that were not met yet, and ask for their codes."""
    n = 0
    for j in range(links.shape[1]):
        row = links[at, j]
        if row < 0:
            break
        fresh[n] = row  # whether it is new cannot be foreseen, so nothing branches on it
        n += np.int64(seen[row] != stamp)
        seen[row] = stamp
    for i in range(n):
        for byte in range(0, codes.shape[1], _LINE):
            _prefetch(codes, np.intp(fresh[i]) * codes.shape[1] + byte)
    return n


@_compiled
def _descend(
    upper: Any, level_starts: Any, upper_rows: Any, down: Any, codes: Any, query: Any
) -> Any:
    """Go from each row to its best neighbour until none is better, level by level."""
    at = np.int64(0)
    for level in range(level_starts.shape[0] - 2, -1, -1):
        start = level_starts[level]
        best = _dot(codes, upper_rows[start + at], query)
        moved = True
        while moved:
            moved = False
            here = at
            for j in range(upper.shape[1]):
                other = upper[start + here, j]
                if other < 0:
                    break
                score = _dot(codes, upper_rows[start + other], query)
                if score > best:
                    best, at, moved = score, np.int64(other), True
        at = np.int64(down[start + at])
    return at


@_compiled
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
    fresh, reached = np.empty((2, links.shape[1]), np.int32)
    for asked in range(queries.shape[0]):
        clock[0] += 1
        if clock[0] == _STAMPS:
            seen[:] = 0
            clock[0] = 1
        stamp = np.uint16(clock[0])
        query, best, found = queries[asked], scores[asked], rows[asked]
        at = _descend(upper, level_starts, upper_rows, down, codes, query)
        best[0], found[0] = _dot(codes, at, query), at
        seen[at] = stamp
        size, place = 1, 0
        while place < size:
            at = found[place]
            found[place] = ~at  # below zero: its links have been followed
            n_fresh = _meet(links, at, codes, seen, stamp, fresh)
            full = size == ef
            n, worst = 0, best[size - 1]
            for i in range(n_fresh):  # no branch here either
                row = fresh[i]
                score = _dot(codes, row, query)
                reached[n], fresh[n] = score, row
                n += np.int64(not full or score > worst)
            first = size
            for i in range(n):
                score = reached[i]
                if size == ef and score <= best[ef - 1]:
                    continue
                low = 0  # where it belongs: behind equals that came before
                for k in range(size):
                    low += np.int64(best[k] >= score)
                size = min(size + 1, ef)
                _shift(best, low, size - 1)
                _shift(found, low, size - 1)
                best[low], found[low] = score, fresh[i]
                first = min(first, low)
            place = min(place + 1, first)
            while place < size and found[place] < 0:
                place += 1
            if place < size:  # its links are on their way when they are asked for
                for j in range(0, links.shape[1], _LINE // 4):
                    _prefetch(links, np.intp(found[place]) * links.shape[1] + j)
        for i in range(size):
            found[i] = ~found[i]
        found[size:] = NOTHING


@_compiled
def _fold_small(query: Any, scale: Any, folded: Any) -> None:
    """Fold a query whose products float32 cannot hold, or one that is all zeros."""
    dim, largest = scale.shape[0], 0.0
    for j in range(dim):
        largest = max(largest, abs(np.float64(query[j]) * scale[j]))
    step = largest / LEVELS if largest > 0 else 1.0
    for j in range(dim):
        folded[j] = np.int8(np.rint(np.float64(query[j]) * scale[j] / step))
    folded[dim:] = 0


@_compiled
def fold(queries: Any, scale: Any, out: Any) -> None:
    dim = scale.shape[0]
    for place in range(queries.shape[0]):
        query, folded = queries[place], out[place]
        largest = np.float32(0)
        for j in range(dim):
            largest = max(largest, abs(query[j] * scale[j]))
        if largest < _SMALL:
            _fold_small(query, scale, folded)
            continue
        step = largest / np.float32(LEVELS)
        for j in range(dim):
            folded[j] = np.int8(np.rint(query[j] * scale[j] / step))
        folded[dim:] = 0


@_compiled
def rescore(codes: Any, queries: Any, shortlists: Any, scores: Any, rows: Any) -> None:
    n_short = shortlists.shape[1]
    for place in range(queries.shape[0]):
        query, best, found = queries[place], scores[place], rows[place]
        for i in range(n_short):
            if shortlists[place, i] >= 0:
                for byte in range(0, codes.shape[1], _LINE):
                    _prefetch(codes, np.intp(shortlists[place, i]) * codes.shape[1] + byte)
        size = 0
        for i in range(n_short):
            row = shortlists[place, i]
            if row >= 0:
                size = _offer(best, found, size, _dot(codes, row, query), row)
        _finish(best, found, size)


@_compiled
def rescore_decoded(
    codes: Any, scale: Any, places: Any, queries: Any, shortlists: Any, scores: Any, rows: Any
) -> None:
    n_short, dim = shortlists.shape[1], scale.shape[0]
    in_order = places.shape[0] == 0
    weights = np.empty(dim, np.float32)
    for asked in range(queries.shape[0]):
        best, found = scores[asked], rows[asked]
        size, length = 0, 0.0
        for j in range(dim):
            length += np.float64(queries[asked, j]) * queries[asked, j]
        for j in range(dim):
            weights[j] = queries[asked, j] / np.sqrt(length) * scale[j]
        for i in range(n_short):
            row = shortlists[asked, i]
            if row < 0:
                continue
            at = row if in_order else places[row]
            dot, squares = np.float32(0), np.float32(0)
            for j in range(dim):
                steps = np.float32(np.int32(codes[at, j]) - OFFSET)
                dot += weights[j] * steps
                number = scale[j] * steps
                squares += number * number
            score = np.float32(dot / np.sqrt(squares) if squares > 0 else 0.0)
            size = _offer(best, found, size, score, row)
        _finish(best, found, size)


@_compiled
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
    n_short, dim, width = shortlists.shape[1], scale.shape[0], rests.shape[1]
    in_order = places.shape[0] == 0
    unit = np.zeros(4 * width, np.float32)
    whole = np.zeros(4 * width, np.float32)
    half = np.zeros(4 * width, np.float32)
    whole[:dim], half[:dim] = scale, steps
    for asked in range(queries.shape[0]):
        best, found = scores[asked], rows[asked]
        size, length = 0, 0.0
        for j in range(dim):
            length += np.float64(queries[asked, j]) * queries[asked, j]
        for j in range(dim):
            unit[j] = queries[asked, j] / np.sqrt(length)
        for i in range(n_short):
            row = shortlists[asked, i]
            if row < 0:
                continue
            at = row if in_order else places[row]
            dot, squares = np.float32(0), np.float32(0)
            for plane in range(4):
                first, shift = plane * width, np.uint8(2 * plane)
                for j in range(width):
                    quarter = np.int32((rests[row, j] >> shift) & np.uint8(3))
                    number = whole[first + j] * np.float32(
                        np.int32(codes[at, first + j]) - OFFSET
                    ) + half[first + j] * np.float32(2 * quarter - 3)
                    dot += unit[first + j] * number
                    squares += number * number
            score = np.float32(dot / np.sqrt(squares) if squares > 0 else 0.0)
            size = _offer(best, found, size, score, row)
        _finish(best, found, size)


@_compiled
def _cosine(words: Any, row: int, unit: Any) -> Any:
    """Return the cosine of a row whose squares float32 cannot sum; 0 if it has no length."""
    dot, length = 0.0, 0.0
    for j in range(unit.shape[0]):
        number = np.float64(_number(words[row, j]))
        dot += number * unit[j]
        length += number * number
    return np.float32(dot / np.sqrt(length) if length > 0 else 0.0)


@_compiled
def rerank(words: Any, sums: Any, queries: Any, shortlists: Any, scores: Any, rows: Any) -> int:
    n_short, dim = shortlists.shape[1], queries.shape[1]
    line = _LINE // words.itemsize
    unit = np.empty(dim, np.float32)
    for place in range(queries.shape[0]):
        best, found = scores[place], rows[place]
        size, asked = 0, 0.0
        for j in range(dim):
            asked += np.float64(queries[place, j]) * queries[place, j]
        for j in range(dim):
            unit[j] = queries[place, j] / np.sqrt(asked)
        for i in range(-_AHEAD, n_short):
            ahead = i + _AHEAD
            if ahead < n_short and shortlists[place, ahead] >= 0:
                begin = np.intp(shortlists[place, ahead]) * words.shape[1]
                for j in range(0, dim, line):
                    _prefetch(words, begin + j)
            if i < 0 or shortlists[place, i] < 0:
                continue
            row = shortlists[place, i]
            dot, length, total = np.float32(0), np.float32(0), np.uint32(0)
            for j in range(dim):
                number = _number(words[row, j])
                dot += number * unit[j]
                length += number * number
            for j in range(dim):
                total = np.uint32(total + words[row, j])
            if total != sums[row]:
                return row
            score = dot / np.sqrt(length)
            if not _SMALL < length < 1 / _SMALL:
                score = _cosine(words, row, unit)
            size = _offer(best, found, size, score, row)
        _finish(best, found, size)
    return NOTHING


# Whole plans in one call, for a call from the interpreter costs as much as a short walk. They leave
# behind when each stage ended, by the system's clock.

_clock_gettime: Any = types.ExternalFunction(
    "clock_gettime", types.int32(types.int32, types.CPointer(types.int64))
)


@_compiled
def _note(times: Any, at: int) -> None:
    """Write the nanoseconds of now to ``times[at]``."""
    now = np.zeros(2, np.int64)  # seconds, and what is left of one
    _clock_gettime(_CLOCK, now.ctypes)
    times[at] = now[0] * 1_000_000_000 + now[1]


@_compiled
def walk_and_rerank(
    links: Any,
    upper: Any,
    level_starts: Any,
    upper_rows: Any,
    down: Any,
    codes: Any,
    scale: Any,
    words: Any,
    sums: Any,
    seen: Any,
    clock: Any,
    queries: Any,
    walked: Any,
    scores: Any,
    rows: Any,
    keep: int,
    times: Any,
) -> int:
    _note(times, 0)
    folded = np.empty((queries.shape[0], codes.shape[1]), np.int8)
    walk_scores = np.empty(walked.shape, np.int32)
    fold(queries, scale, folded)
    walk(
        links,
        upper,
        level_starts,
        upper_rows,
        down,
        codes,
        folded,
        seen,
        clock,
        walk_scores,
        walked,
    )
    _note(times, 1)
    wrong = rerank(words, sums, queries, walked[:, :keep], scores, rows)
    _note(times, 2)
    return wrong


@_compiled
def scan_lists_and_rerank(
    means: Any,
    means_scale: Any,
    starts: Any,
    numbers: Any,
    codes: Any,
    scale: Any,
    words: Any,
    sums: Any,
    queries: Any,
    listed: Any,
    scores: Any,
    rows: Any,
    n_probes: int,
    times: Any,
) -> int:
    _note(times, 0)
    n = queries.shape[0]
    everyone = np.empty(0, np.bool_)
    folded = np.empty((n, means.shape[1]), np.int8)
    probe_scores, probes = np.empty((n, n_probes), np.int32), np.empty((n, n_probes), np.int32)
    fold(queries, means_scale, folded)
    scan(means, folded, everyone, probe_scores, probes)
    folded = np.empty((n, codes.shape[1]), np.int8)
    listed_scores = np.empty(listed.shape, np.int32)
    fold(queries, scale, folded)
    scan_lists(codes, starts, numbers, probes, folded, everyone, listed_scores, listed)
    _note(times, 1)
    wrong = rerank(words, sums, queries, listed, scores, rows)
    _note(times, 2)
    return wrong


@_compiled
def unit(words: Any, sums: Any, size: int, out: Any) -> int:
    for row in range(words.shape[0]):
        total, length = np.uint32(0), 0.0
        for j in range(size):
            total = np.uint32(total + words[row, j])
        if total != sums[row]:
            return row
        for j in range(out.shape[1]):
            number = np.float64(_number(words[row, j]))
            out[row, j] = number
            length += number * number
        scale = 1 / np.sqrt(length) if length > 0 else 0.0
        for j in range(out.shape[1]):
            out[row, j] *= scale
    return NOTHING
