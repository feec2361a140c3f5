"""Slow, obvious versions of everything fast. Nothing here is imported by nestvec."""

import math

import numpy as np


def unit(vector):
    length = math.sqrt(sum(float(x) ** 2 for x in vector))
    return [float(x) / length for x in vector]


def stage_values(gallery, dim, precision):
    """The gallery rows as a stage stores them, decoded, by the definition."""
    rows = [unit(row[:dim]) for row in gallery]
    if precision == "float16":
        return [[float(np.float16(np.float32(x))) for x in row] for row in rows]
    if precision == "int8":
        scale = [max(abs(row[j]) for row in rows) / 127 for j in range(dim)]
        return [
            [round(x / s) * s if s else 0.0 for x, s in zip(row, scale, strict=True)]
            for row in rows
        ]
    if precision == "binary":
        return [[1.0 if x >= 0 else -1.0 for x in row] for row in rows]
    return rows


def cascade_by_hand(queries, gallery, stages):
    """Rows of a cascade, pair by pair; stages are (dim, keep, precision)."""
    found = []
    for query in queries:
        alive = list(range(len(gallery)))
        for dim, keep, precision in stages:
            stored = stage_values(gallery, dim, precision)
            asked = unit(query[:dim])
            if precision == "binary":
                asked = [1.0 if x >= 0 else -1.0 for x in asked]
            score = {
                row: sum(a * b for a, b in zip(asked, stored[row], strict=True)) for row in alive
            }
            alive = sorted(alive, key=lambda row: (-np.float32(score[row]), row))[:keep]
        found.append(alive)
    return np.array(found)
