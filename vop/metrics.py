"""Scores against known truth that are easy to check by hand: of a retrieval (overlaps) and of relative poses."""

from collections.abc import Mapping, Sequence

import numpy as np

MIN_BASELINE = 1e-6  # world units; what rounding leaves of no translation at all lies below


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


def rotation_error(R: np.ndarray, R_true: np.ndarray) -> np.ndarray:
    """Angle of the rotation between two rotations (..., 3, 3), degrees in [0, 180], float64 (...).

    By the arctangent of its sine and cosine: good to about 1e-14 degrees everywhere, also near 0 and 180.
    """
    difference = np.asarray(R, np.float64) @ np.swapaxes(np.asarray(R_true, np.float64), -1, -2)
    axis = [difference[..., i, j] - difference[..., j, i] for i, j in ((2, 1), (0, 2), (1, 0))]
    sine = np.linalg.norm(np.stack(axis, axis=-1), axis=-1)  # twice the sine and twice the cosine of the angle
    return np.degrees(np.arctan2(sine, np.trace(difference, axis1=-2, axis2=-1) - 1))


def translation_error(t: np.ndarray, t_true: np.ndarray) -> np.ndarray:
    """Angle between the directions of two translations (..., 3), degrees in [0, 90], float64 (...).

    An essential matrix fixes a translation up to its sign, so that an angle a counts as min(a, 180 - a), as in
    SuperGlue, LoFTR and glue-factory. NaN where there is no direction: the true translation is shorter than
    `MIN_BASELINE`, in units of the world, or the estimated one is zero.
    """
    t, t_true = np.broadcast_arrays(np.asarray(t, np.float64), np.asarray(t_true, np.float64))
    sine = np.linalg.norm(np.cross(t, t_true), axis=-1)
    angle = np.degrees(np.arctan2(sine, np.abs((t * t_true).sum(axis=-1))))
    lengths = np.linalg.norm(t, axis=-1), np.linalg.norm(t_true, axis=-1)
    return np.where((lengths[0] > 0) & (lengths[1] >= MIN_BASELINE), angle, np.nan)


def pose_error(pose: np.ndarray, pose_true: np.ndarray) -> np.ndarray:
    """The larger of rotation and translation error of relative poses (..., 4, 4), degrees; NaN without a baseline."""
    rotation = rotation_error(pose[..., :3, :3], pose_true[..., :3, :3])
    return np.maximum(rotation, translation_error(pose[..., :3, 3], pose_true[..., :3, 3]))


def pose_auc(errors: np.ndarray, thresholds: Sequence[float] = (5, 10, 20)) -> list[float]:
    """Area under the curve of recall over pose error, up to each threshold (degrees), divided by it: 0 to 1.

    The rule of the field (SuperGlue's): with the n errors sorted, the curve starts at (0, 0) and runs in straight lines
    through (error i, (i + 1) / n), i from 0, for all errors BELOW the threshold; from the last of them it is horizontal
    to the threshold. So an error at the threshold or beyond counts only in n, as does a failure, which is inf. NaN
    means not judged and is left out of n. Without any error the area is NaN.
    """
    errors = np.asarray(errors, np.float64).ravel()
    errors = np.sort(errors[~np.isnan(errors)])
    if not len(errors):
        return [float("nan")] * len(thresholds)
    areas = []
    for threshold in thresholds:
        below = int(np.searchsorted(errors, threshold, side="left"))
        x = np.concatenate([[0], errors[:below], [threshold]])
        y = np.append(np.arange(below + 1), below) / len(errors)
        areas.append(float(np.trapezoid(y, x) / threshold))
    return areas
