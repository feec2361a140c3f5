"""Slow, obvious versions of everything fast. Nothing here is imported by nestvec."""

import math

import numpy as np
import scipy.stats


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


def ndcg_by_hand(ranking, grades, k):
    """Linear gains, log2(rank + 1) discount, divided by the best order of all judged documents."""

    def dcg(gains):
        return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains[:k], start=1))

    best = dcg(sorted((max(g, 0) for g in grades.values()), reverse=True))
    return dcg([max(grades.get(doc, 0), 0) for doc in ranking]) / best


def recall_by_hand(ranking, grades, k):
    relevant = {doc for doc, grade in grades.items() if grade > 0}
    return len(relevant & set(ranking[:k])) / len(relevant)


def average_precision_by_hand(ranking, grades, k):
    """Precision at each relevant rank <= k, summed, over the number of all relevant documents."""
    relevant = {doc for doc, grade in grades.items() if grade > 0}
    total = 0.0
    for rank, doc in enumerate(ranking[:k], start=1):
        if doc in relevant:
            total += len(relevant & set(ranking[:rank])) / rank
    return total / len(relevant)


def neighbours_by_hand(vectors, k):
    """Nearest other rows by inner product, ties to the lower row."""
    found = []
    for i in range(len(vectors)):
        others = [j for j in range(len(vectors)) if j != i]
        others.sort(key=lambda j: (-float(np.dot(vectors[i], vectors[j])), j))
        found.append(others[:k])
    return found


def rankme_by_hand(matrix):
    sigma = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    return math.exp(-sum(x * math.log(x) for x in p))


def spearman(one, other):
    """Pearson's correlation of the ranks, ties at their mean rank; scipy wrote it out for us."""
    return float(scipy.stats.spearmanr(one, other)[0])  # type: ignore[arg-type]
