"""The method: how many patches of a query vote for each database image, exactly.

Wei et al., "Breaking the Frame: Visual Place Recognition by Overlap Prediction", WACV 2025.

    hit(p, j, s)  <=>  <x[p], y[j][s]> > 1 - r                     strict; r is a cosine distance
    A[p, j] = sum over hits of the similarity, C[p, j] = number of hits
    nid[p] = sum_j C[p, j],  ni[p] = #{j : C[p, j] > 0}            j over the query's candidates, never the query itself
    w[p] = max(0, nid[p] / P * ln(n_candidates / (ni[p] + 1e-5)))
    unweighted U[j] = sum_p A[p, j],  weighted W[j] = sum_p w[p] A[p, j]

`w` needs the counts of ALL candidates, so a shard returns `Votes`, which merge, and scores are made once, after the
merge. Patches are unit vectors; P counts the query's patches that are given, so leave padding out before.
"""

from collections.abc import Sequence

import numpy as np
from numba import njit

from vop.retrieval import kernel
from vop.retrieval.pair_votes import Votes, threshold

RADIUS_IMAGES = 100


def pair_votes(x: np.ndarray, y: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Votes of one image for another: unit patches x (P0, E) and y (P1, E) -> A (P0,) float32, C (P0,) int32.

    In any type of a store. The same pair always gives the same bits, in whatever batch, shard or thread. ValueError if
    E differs.
    """
    found = votes(x, [y], radius)
    return found.sums[0], found.counts[0]


def votes(x: np.ndarray, candidates: Sequence[np.ndarray], radius: float, rows: np.ndarray | None = None) -> Votes:
    """Votes of a query's patches x (P, E) for each candidate's patches (P_j, E), all of them kept.

    rows (n,) are the candidates' database rows, 0 .. n - 1 if not given. The query must not be among the candidates.
    """
    rows = np.arange(len(candidates)) if rows is None else np.asarray(rows, np.int64)
    if len(rows) != len(candidates):
        raise ValueError(f"{len(rows)} rows for {len(candidates)} candidates")
    for y in candidates:
        if y.shape[1] != x.shape[1]:
            raise ValueError(f"patches have width {y.shape[1]}, expected {x.shape[1]}: were both made by one encoder?")
    packed = kernel.stack(np.asarray(x)[None], np.ones((1, len(x)), bool))
    once, one = np.zeros(1, np.int64), np.zeros(1, bool)
    sums, counts = np.zeros((len(rows), len(x)), np.float32), np.zeros((len(rows), len(x)), np.int32)
    for j, place in enumerate(np.argsort(rows)):
        y = kernel.as_bits(np.ascontiguousarray(candidates[place]))[None]
        mask = np.ones(y.shape[:2], bool)
        (_, patch, count, total), _ = kernel.count_hits(packed, y, mask, once, once, one, threshold(radius), True)
        sums[j, patch], counts[j, patch] = total, count
    return Votes(np.sort(rows), sums, counts, len(rows))


def patch_weights(votes: Votes, weights: str) -> np.ndarray:
    """w (P,) float64: how much each query patch counts, from the counts over all the query's candidates.

    weights  "tfidf": the paper's, see the module. "idf": ln((n_candidates + 1) / ni), without the factor nid / P, which
             counts a patch the more the oftener it repeats within an image, as sky and floors do. "none": 1.
    """
    if weights == "none":
        return np.ones(votes.counts.shape[1])
    images = np.count_nonzero(votes.counts, axis=0)
    if weights == "idf":
        return np.log((votes.candidates + 1) / np.maximum(images, 1))
    if weights == "tfidf":
        hits = votes.counts.sum(axis=0, dtype=np.int64)
        return np.maximum(0.0, hits / votes.counts.shape[1] * np.log(max(votes.candidates, 1) / (images + 1e-5)))
    raise ValueError(f"weights are {weights!r}, but must be none, idf or tfidf")


def scores(votes: Votes, weights: str) -> np.ndarray:
    """Scores (n,) float64 of the candidates, in the order of `votes.rows`: sum_p w[p] A[p, j]; see `patch_weights`.

    `votes` must hold the whole merge: the weights depend on every candidate.
    """
    return _weighted_sums(np.ascontiguousarray(votes.sums), patch_weights(votes, weights))


@njit(nogil=True, cache=True)
def _weighted_sums(sums, weights):
    """One sum per row in the order of the patches: library sums choose their order by the array's shape."""
    out = np.zeros(sums.shape[0])
    for j in range(sums.shape[0]):
        for p in range(sums.shape[1]):
            out[j] += weights[p] * np.float64(sums[j, p])
    return out


def best(scores: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """Positions of the at most k best entries, best first; equal scores by database row.

    Only scores above 0 count: an image without a vote overlaps nowhere and is not a result. So the list may be
    shorter than k or empty. (With one candidate every tfidf score is 0 by the formula: ln(1 / 1) = 0.)
    """
    order = np.lexsort((rows, -scores))
    return order[scores[order] > 0][:k]


def radius_sample(images: int, seed: int = 0) -> np.ndarray:
    """Rows, ascending, of the up to 100 images out of `images` from which the automatic radius is estimated."""
    size = min(images, RADIUS_IMAGES)
    return np.sort(np.random.default_rng(seed).choice(images, size, replace=False))


def median_similarity(patches: Sequence[np.ndarray]) -> float:
    """Median (the lower one) of the cosine similarities between patches of the same image, each with itself too.

    patches: per image the unit patches (P_i, E) that are image, not padding.
    """
    similarities = [(x @ x.T).ravel() for x in (np.asarray(x, np.float32) for x in patches)]
    values = np.concatenate(similarities) if similarities else np.empty(0, np.float32)
    if not values.size:
        raise ValueError(
            "no patches to estimate the radius from: the sampled images are empty; give retrieval a radius"
        )
    middle = (values.size - 1) // 2
    return float(np.partition(values, middle)[middle])


def automatic_radius(patches: Sequence[np.ndarray]) -> float:
    """The radius for a collection: `median_similarity` of its `radius_sample`, rounded to 0.1.

    ValueError where that is not inside (0, 1): such descriptors spread too evenly, or have collapsed.
    """
    median = median_similarity(patches)
    radius = round(median, 1)
    if not 0 < radius < 1:
        raise ValueError(
            f"the automatic radius is {radius} (median similarity {median:.4f} between patches of an image), not "
            "inside (0, 1): the patches are nearly orthogonal or nearly all the same; give a radius, for example 0.3"
        )
    return radius
