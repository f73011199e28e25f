"""How well ranked pairs give relative poses: the two protocols under which queries are judged.

Of each query's first k ranked pairs, the one whose pose has most inliers is taken (`taken`), and the larger of that
pose's rotation and translation error is the query's error.

| protocol | threshold of the estimator |
| --- | --- |
| `fixed` | one, chosen beforehand |
| `paper` | of several, the one with the best AUC@5 ON THE TEST SET, for each estimator and k: optimistic |

Beside the queries, all listed pairs are judged one by one under the same protocols. What is judged, and how, follows
from what is known, never from whether an estimate succeeded:

| true pose of the query | the pair it takes | the query is |
| --- | --- | --- |
| known | none: no pair has a pose, or it has no pairs | judged, error infinite: failed |
| known | joins images of different worlds | judged, error infinite: its pose is an invention (unrelated) |
| known | has a true relative pose | judged by its error |
| known | has none: the other image's pose is unknown, or there is no baseline | unjudged |
| unknown | any, or none | unjudged |
| (its intrinsics are unknown) | none can have a pose | left out |

| truth of the pair | its pose | the pair is |
| --- | --- | --- |
| a relative pose, or that there is none (different worlds) | none | judged, error infinite: failed |
| that there is none (different worlds) | estimated | judged, error infinite: unrelated |
| a relative pose | estimated | judged by its error |
| unknown, or without a baseline | any, or none | unjudged |
| (the query's intrinsics are unknown) | none | left out |
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vop.metrics import pose_auc
from vop.pose.listed import Listed, queries_of
from vop.pose.results import AUC_THRESHOLDS, COUNTS, MEAN, POOLED, RESULTS, SCORES, case_of, rows_of
from vop.schema import PoseConfig

POSES = pa.schema(
    [
        ("image0", pa.string()),  # the first of the two names in sorted order
        ("image1", pa.string()),
        ("estimator", pa.string()),
        ("threshold", pa.float32()),  # pixels of the original images
        ("matches", pa.int32()),
        ("inliers", pa.int32()),
        ("rotation_error", pa.float32()),  # degrees; null: no pose, or its truth is unknown
        ("translation_error", pa.float32()),  # degrees; null also without a true baseline
        ("unrelated", pa.bool_()),  # the images belong to different worlds: no pose of theirs is true
        ("truth", pa.bool_()),  # a pose can be judged: `unrelated`, or the true one is known and has a baseline
        ("reason", pa.string()),  # why there is no pose; null: there is one
    ]
)
LOW = (1 << 32) - 1


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` found.

    results: table of `RESULTS`. errors: sorted pose errors of the judged queries of all scenes (n,) float64, degrees,
    inf for failures, by (protocol, estimator, k).
    """

    results: pa.Table
    errors: dict[tuple[str, str, int | None], np.ndarray]

    @property
    def judged(self) -> bool:
        """Whether the truth is known of anything at all."""
        return pc.max(self.results["judged"]).as_py() > 0

    def curves(self, k: int | None) -> list[tuple[str, np.ndarray]]:
        """Cumulative error curves of the queries at one k: (label, sorted errors); error i has recall (i + 1) / n.

        None where no query is judged.
        """
        used = {case_of(row): row["threshold_px"] for row in rows_of(self.results, MEAN) if row["unit"] == "query"}
        return [
            (f"{estimator}, {protocol}, {used[protocol, estimator, 'query', k]:g} px", errors)
            for (protocol, estimator, at), errors in self.errors.items()
            if at == k and len(errors)
        ]


def thresholds(config: PoseConfig) -> list[float]:
    """All thresholds that the protocols need poses for, ascending, pixels."""
    return sorted({*config.thresholds, config.threshold})


def evaluate(ranked: pa.Table, poses: pa.Table, config: PoseConfig, queries: pa.Table | None = None) -> Evaluation:
    """Judge ranked pairs by their relative poses, under both protocols.

    Args:
        ranked: query, database, rank (from 0), and scene (of the query) unless `queries` is given. A pair that both
            images list is judged from both sides.
        poses: `POSES`, a row for every unordered pair that is ranked, estimator and one of `thresholds`; other rows
            are passed over.
        queries: query, scene, known (bool: whether the query's intrinsics are known) and truth (bool: whether its true
            pose is known; without this column, of all). Those without pairs count too. null: those of `ranked`, all
            known and with truth.

    Raises `ValueError` for poses that lack a column, for ranked pairs without poses, and for ranked queries that
    `queries` lacks.
    """
    missing = [name for name in POSES.names if name not in poses.column_names]
    if missing:
        raise ValueError(
            f"the poses lack the columns {missing}: were they written by another version? Run relative-pose again; "
            "features and matches are kept"
        )
    listed = Listed.of(ranked, queries_of(ranked) if queries is None else queries)
    found = _Found(poses, listed)
    cases = [("query", k) for k in (*dict.fromkeys(config.ks), None)] + [("pair", None)]
    rows, errors = [], {}
    for estimator in config.estimators:
        tried = {}
        for threshold in thresholds(config):
            outcomes = found.outcomes(estimator, threshold)
            tried[threshold] = {case: _judge(outcomes, listed, *case) for case in cases}
        for unit, k in cases:
            for protocol, threshold in _protocols({at: tried[at][unit, k][0] for at in tried}, config):
                scored, sorted_errors = tried[threshold][unit, k]
                case = {"unit": unit, "k": k, "protocol": protocol, "estimator": estimator, "threshold_px": threshold}
                rows += [case | row for row in scored]
                if unit == "query":
                    errors[protocol, estimator, k] = sorted_errors
    return Evaluation(pa.Table.from_pylist(rows, schema=RESULTS), errors)


@dataclass(frozen=True, eq=False)
class _Outcomes:
    """What came of n pairs or queries with one estimator and threshold.

    matches: (n,), -1 for a query without a pair to take. inliers: (n,), -1 without a pose. rotation, translation: (n,)
    float32 degrees; inf: no pose, or one between different worlds; NaN: cannot be judged. unrelated: (n,) bool, such a
    pose.
    """

    matches: np.ndarray
    inliers: np.ndarray
    rotation: np.ndarray
    translation: np.ndarray
    unrelated: np.ndarray

    def take(self, rows: np.ndarray | slice) -> "_Outcomes":
        return _Outcomes(*(getattr(self, field)[rows] for field in self.__dataclass_fields__))


class _Found:
    """The poses of the listed pairs."""

    def __init__(self, poses: pa.Table, listed: Listed):
        pair = listed.positions(poses["image0"], poses["image1"])
        rows = np.flatnonzero(pair >= 0)
        self.listed, self.pair, self.poses = listed, pair[rows], poses.select(POSES.names[2:]).take(pa.array(rows))

    def outcomes(self, estimator: str, threshold: float) -> _Outcomes:
        """(U + 1,) outcomes in the order of the keys, the last one that of having no pair at all."""
        of_threshold = pc.equal(self.poses["threshold"], pa.scalar(threshold, pa.float32()))
        rows = np.flatnonzero(pc.and_(of_threshold, pc.equal(self.poses["estimator"], estimator)).to_numpy())
        poses, at, count = self.poses.take(pa.array(rows)), self.pair[rows], len(self.listed.keys)
        self._check(at, count, estimator, threshold)
        rotation, translation = errors_of(poses)
        columns = [
            (-1, np.int64, poses["matches"].fill_null(0).to_numpy()),
            (-1, np.int64, inliers_of(poses)),
            (np.inf, np.float32, rotation),
            (np.inf, np.float32, translation),
            (False, bool, pc.and_(poses["reason"].is_null(), poses["unrelated"]).to_numpy()),
        ]
        dense = [np.full(count + 1, empty, dtype) for empty, dtype, _ in columns]
        for array, (_, _, values) in zip(dense, columns, strict=True):
            array[at] = values
        return _Outcomes(*dense)

    def _check(self, at: np.ndarray, count: int, estimator: str, threshold: float) -> None:
        present = np.bincount(at, minlength=count)
        if not present.all():
            low, high = divmod(int(self.listed.keys[np.argmin(present)]), len(self.listed.names))
            raise ValueError(
                f"{(present == 0).sum()} of {count} ranked pairs have no row for {estimator} at {threshold:g} px, the "
                f"first {self.listed.names[low].as_py()!r} and {self.listed.names[high].as_py()!r}: poses must be "
                "estimated for every pair, or say why there is none"
            )


def inliers_of(poses: pa.Table) -> np.ndarray:
    """Inliers of rows of `POSES`, (n,) int64; -1: no pose."""
    return np.where(poses["reason"].is_null().to_numpy(), poses["inliers"].fill_null(0).to_numpy(), -1).astype(np.int64)


def errors_of(poses: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Rotation and translation errors by which rows of `POSES` are judged, (n,) float32 degrees.

    inf: no pose, or one between different worlds. NaN: no truth to judge by, with a pose or without.
    """
    posed, truth = poses["reason"].is_null(), poses["truth"].to_numpy()
    comparable = pc.and_not(posed, poses["unrelated"]).to_numpy() & truth
    without = np.where(truth, np.float32(np.inf), np.float32(np.nan))
    rotation, translation = (poses[f"{kind}_error"].to_numpy() for kind in ("rotation", "translation"))
    return np.where(comparable, rotation, without), np.where(comparable, translation, without)


def taken(listed: Listed, inliers: np.ndarray, k: int | None) -> np.ndarray:
    """The pair that each query is judged by: of its first k (None: of all) that with most inliers, ties by rank.

    Args:
        inliers: of every unordered pair, in the order of `listed.keys` (what follows is passed over); -1: no pose.

    Returns:
        (Q,) positions among the R listed pairs, -1 where none of the query's has a pose.
    """
    inliers = inliers[listed.pair]
    eligible = inliers >= 0 if k is None else (inliers >= 0) & (listed.place < k)
    rank = np.where(eligible, inliers << 32 | (LOW - listed.place), -1)
    best, filled = np.full(len(listed.bounds) - 1, -1), listed.bounds[1:] > listed.bounds[:-1]
    if filled.any():
        best[filled] = np.maximum.reduceat(rank, listed.bounds[:-1][filled])
    return np.where(best >= 0, listed.bounds[:-1] + LOW - (best & LOW), -1)


def _of_queries(outcomes: _Outcomes, listed: Listed, k: int | None) -> _Outcomes:
    """The outcomes of the queries (Q,)."""
    pair = np.append(listed.pair, len(listed.keys))  # the last one is that of having no pair
    units = outcomes.take(pair[taken(listed, outcomes.inliers, k)])
    return dataclasses.replace(
        units,
        rotation=np.where(listed.truth, units.rotation, np.float32(np.nan)),
        translation=np.where(listed.truth, units.translation, np.float32(np.nan)),
    )


def _judge(outcomes: _Outcomes, listed: Listed, unit: str, k: int | None) -> tuple[list[dict], np.ndarray]:
    """Scores of every scene, their mean and of all pooled; and the sorted errors of all."""
    bounds, left_out = listed.scene_bounds, listed.left_out[:, 0]
    if unit == "query":
        units = _of_queries(outcomes, listed, k)
    else:
        units, bounds, left_out = outcomes.take(listed.pair), listed.bounds[bounds], listed.left_out[:, 1]
    scenes = [
        {"scene": scene, "left_out": int(out)} | _scores(units.take(slice(start, stop)))
        for scene, out, start, stop in zip(listed.scenes, left_out, bounds[:-1], bounds[1:], strict=True)
    ]
    pooled = {"scene": POOLED, "left_out": int(left_out.sum())} | _scores(units)
    errors = np.maximum(units.rotation, units.translation).astype(np.float64)
    return [*scenes, _mean(scenes), pooled], np.sort(errors[~np.isnan(errors)])


def _scores(units: _Outcomes) -> dict[str, float | int | None]:
    errors = np.maximum(units.rotation, units.translation)
    judged, posed = ~np.isnan(errors), units.inliers >= 0
    scores = {f"auc@{at}": area for at, area in zip(AUC_THRESHOLDS, pose_auc(errors, AUC_THRESHOLDS), strict=True)}
    scores["median_rotation_deg"] = _of(np.median, units.rotation[judged])
    scores["median_translation_deg"] = _of(np.median, units.translation[judged])
    scores["median_inliers"] = _of(np.median, units.inliers[posed])
    scores["mean_matches"] = _of(np.mean, units.matches[units.matches >= 0])
    return {
        "judged": int(judged.sum()),
        "failed": int((judged & ~posed).sum()),
        "unrelated": int((judged & units.unrelated).sum()),
        "unjudged": int((~judged).sum()),
        "unposed": int((~judged & ~posed).sum()),
    } | {key: _defined(value) for key, value in scores.items()}


def _of(statistic: Callable[[np.ndarray], float], values: np.ndarray) -> float:
    return float(statistic(values)) if len(values) else np.nan


def _defined(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _mean(scenes: list[dict]) -> dict[str, object]:
    """Sums of the counts; means of the scores over the scenes in which something was judged."""
    judged = [scene for scene in scenes if scene["judged"]]
    sums = {key: sum(scene[key] for scene in scenes) for key in COUNTS}
    columns = {key: [scene[key] for scene in judged] for key in SCORES}
    means = {
        key: None if None in values or not values else sum(values) / len(values) for key, values in columns.items()
    }
    return {"scene": MEAN} | sums | means


def _protocols(tried: Mapping[float, list[dict]], config: PoseConfig) -> Iterator[tuple[str, float]]:
    """(protocol, threshold); `paper` takes the best mean AUC@5, and of equal ones the smallest threshold."""
    quality = {at: next(row["auc@5"] for row in rows if row["scene"] == MEAN) or 0.0 for at, rows in tried.items()}
    yield "fixed", config.threshold
    if config.thresholds:
        yield "paper", max(sorted(config.thresholds), key=quality.__getitem__)
