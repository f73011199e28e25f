"""Scores of a retrieval against known overlaps, as sums that are easy to check by hand."""

from collections.abc import Mapping, Sequence

import numpy as np


def retrieval(
    ranked: Mapping[str, Sequence[str]],
    names: Sequence[str],
    overlap: np.ndarray,
    min_overlap: float,
    database: Sequence[str] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Compare ranked database names per query with the true overlaps.

    `overlap` (N, N) is symmetric over `names`; an image is relevant to a query if their overlap is at least
    `min_overlap`. Images without truth are left out, and so are queries with no relevant database image (their number
    is reported). The database is every name except the query unless given. Keys, for each k:

    - `precision@k`: share of the k first that are relevant (fewer than k retrieved count as wrong), mean over queries;
    - `ceiling@k`: the largest precision@k any ranking can reach, as some queries have fewer than k relevant images;
    - `chance` (once): precision of a random ranking, the same for every k;
    - `recall@k`: share of queries with a relevant image among the k first (the convention of place recognition);
    - `pair_recall@k`: share of all relevant (query, database) pairs that are among the k first.

    Raises `ValueError` if no query has truth.
    """
    index = {name: i for i, name in enumerate(names)}
    columns = np.array([index[name] for name in (database if database is not None else names) if name in index], int)
    sums = {f"{key}@{k}": 0.0 for key in ("precision", "ceiling", "recall", "found") for k in ks}
    evaluated, without, relevant_pairs, chance = 0, 0, 0, 0.0
    for query, retrieved in ranked.items():
        if query not in index:
            continue
        row = index[query]
        candidates = columns[columns != row]
        relevant = int((overlap[row, candidates] >= min_overlap).sum())
        if relevant == 0:
            without += 1
            continue
        hits = np.array([overlap[row, index[name]] >= min_overlap for name in retrieved if name in index], bool)
        evaluated += 1
        relevant_pairs += relevant
        chance += relevant / len(candidates)
        for k in ks:
            found = int(hits[:k].sum())
            sums[f"precision@{k}"] += found / k
            sums[f"ceiling@{k}"] += min(relevant, k) / k
            sums[f"recall@{k}"] += found > 0
            sums[f"found@{k}"] += found
    if not evaluated:
        raise ValueError(
            f"none of {len(ranked)} queries has a database image with a true overlap of at least {min_overlap}: "
            "do the names of the truth match those of the images?"
        )
    scores = {}
    for k in ks:
        for key in ("precision", "ceiling", "recall"):
            scores[f"{key}@{k}"] = sums[f"{key}@{k}"] / evaluated
        scores[f"pair_recall@{k}"] = sums[f"found@{k}"] / relevant_pairs
    scores |= {"chance": chance / evaluated, "queries": evaluated, "queries_without_truth": without}
    return {key: round(float(value), 6) for key, value in scores.items()}
