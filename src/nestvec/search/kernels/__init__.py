"""The loops that search spends its time in, over integer codes and memory-mapped vectors.

All take a block of queries and write into the arrays they are handed, best first, ties to the lower
row, `NOTHING` where fewer rows were found. They are single-threaded and let go of the interpreter's
lock, so threads come from the caller. Codes are uint8, offset by 128, queries int8; both are padded
to a multiple of 32 dims.

- ``scan(codes, queries, alive, scores, rows)``: every row, or every row that is alive.
- ``scan_lists(codes, starts, numbers, probes, queries, alive, scores, rows)``: the codes of some
  lists; list i holds ``codes[starts[i]:starts[i + 1]]`` of the rows ``numbers[...]``.
- ``walk(links, upper, level_starts, upper_rows, down, codes, queries, seen, clock, scores, rows)``:
  a navigable graph, with as long a list of candidates as ``rows`` is wide.
- ``rescore(codes, queries, shortlists, scores, rows)``: the rows of a shortlist, by their codes.
- ``rescore_decoded(codes, scale, places, queries, shortlists, scores, rows)``: the same by cosine
  of float32 queries with what the codes stand for; the code of a row is ``codes[places[row]]``, or
  ``codes[row]`` where ``places`` is empty.
- ``rescore_finer(codes, rests, scale, steps, places, queries, shortlists, scores, rows)``: with
  what rounding left of each row as well (`Rests`), ``rests[row]``.
- ``fold(queries, scale, out)``: float32 queries into int8 ones, for codes of that scale.
- ``rerank(words, sums, queries, shortlists, scores, rows)``: by cosine with their float32 or
  float16 vectors, handed over as uint32 or uint16 words and cut to the queries' size. The sum of a
  row's words (as far as the queries reach) has to be that of ``sums``: returns a row where it is
  not, else `NOTHING`.
- ``unit(words, sums, size, out)``: rows, L2-normalised, into float32; cut to the width of ``out``,
  and compared with the sums of their first ``size`` words. Returns as ``rerank`` does.
- ``walk_and_rerank``, ``scan_lists_and_rerank``: the same, one after the other, in one call; they
  write the nanoseconds at which the stages began and ended into ``times`` (3,) int64.
"""

from nestvec._extras import require

require("numba", extra="index", why="searching an index")

from nestvec.search.kernels._numba import (  # noqa: E402
    fold,
    rerank,
    rescore,
    rescore_decoded,
    rescore_finer,
    scan,
    scan_lists,
    scan_lists_and_rerank,
    unit,
    walk,
    walk_and_rerank,
)
from nestvec.search.kernels._numpy import NOTHING  # noqa: E402

__all__ = [
    "NOTHING",
    "fold",
    "rerank",
    "rescore",
    "rescore_decoded",
    "rescore_finer",
    "scan",
    "scan_lists",
    "scan_lists_and_rerank",
    "unit",
    "walk",
    "walk_and_rerank",
]
