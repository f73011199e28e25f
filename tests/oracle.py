"""The method once more, as slow float64 loops over plain numbers; shares no code with vop."""

import math

import numpy as np


def similarity(a, b):
    return math.fsum(float(u) * float(v) for u, v in zip(a, b, strict=True))


def pair(x, y, radius):
    """A and C of one query image x (P0, E) and one candidate y (P1, E)."""
    sums, counts = [], []
    for patch in x:
        hits = [s for s in (similarity(patch, other) for other in y) if s > 1 - radius]
        sums.append(math.fsum(hits))
        counts.append(len(hits))
    return sums, counts


def scores(x, candidates, radius, weights):
    """{row: score} of one query against {row: patches}, weights over all of them."""
    found = {row: pair(x, y, radius) for row, y in candidates.items()}
    result = {}
    for row, (sums, _) in found.items():
        total = 0.0
        for p in range(len(x)):
            weight = 1.0
            nid = sum(counts[p] for _, counts in found.values())
            ni = sum(1 for _, counts in found.values() if counts[p] > 0)
            if weights == "tfidf":
                weight = max(0.0, nid / len(x) * math.log(len(found) / (ni + 1e-5)))
            if weights == "idf":
                weight = math.log((len(found) + 1) / max(ni, 1))
            total += weight * sums[p]
        result[row] = total
    return result


def ranking(values, k):
    """Rows of {row: score}, best first, ties by row, none without a vote."""
    return [row for row in sorted(values, key=lambda row: (-values[row], row)) if values[row] > 0][:k]


def shortlist(query, globals_by_row, k):
    """The k rows with the largest inner product, as float32, ties by row."""
    values = {row: np.float32(similarity(query, g)) for row, g in globals_by_row.items()}
    return sorted(values, key=lambda row: (-values[row], row))[:k]


def clear_radius(x, y, near):
    """A radius about `near` with no similarity of the unit patches (.., E) close to 1 - radius: rounding is moot."""
    values = np.einsum("pe,se->ps", x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), dtype=np.float64)
    values = np.sort(values[np.abs(values - (1 - near)) < 0.02])
    values = np.concatenate([[1 - near - 0.02], values, [1 - near + 0.02]])
    gap = np.argmax(np.diff(values))
    assert values[gap + 1] - values[gap] > 2e-6, "no clear gap: the test's data are too dense"
    return 1 - (values[gap] + values[gap + 1]) / 2
