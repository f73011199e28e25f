"""What the report says about relative poses, gathered from a run directory: scores, and queries to look at."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vop.cameras import Cameras, CamerasError, KnownCamera
from vop.config import Config
from vop.features import FeatureStore
from vop.matches import MatchStore, located, matches_of
from vop.pairs import read_parquet
from vop.pose.listed import Listed
from vop.pose.protocols import Evaluation, errors_of, inliers_of, taken
from vop.run import Run
from vop.shards import StoreError
from vop.viz.epipolar import agreeing
from vop.viz.links import Links, drawing_size
from vop.viz.matches import Photo
from vop.viz.photographs import photograph
from vop.viz.pose_report import PosedQuery, PoseReport, ks_of

SHOWN = {  # whether errors are known: the first queries, and two others
    True: ("worst", "second worst", "third worst", "fourth worst", "median", "best"),
    False: ("fewest inliers", "second fewest", "third fewest", "fourth fewest", "median", "most inliers"),
}
TOLERANCE = 3  # times the threshold: what lies farther from a true epipolar line is a false match, not an inexact one
MISSING = (448, 336)  # (width, height) of what stands for a photograph that cannot be read
STORES = {"features": FeatureStore, "matches": MatchStore}


def pose_report(config: Config, run: Run, evaluation: Evaluation) -> PoseReport:
    """The section of a run that estimated relative poses; pictures of its worst, its median and its best queries."""
    estimator, k = config.pose.estimators[0], config.pose.ks[0] if config.pose.ks else None
    cameras, judged = Cameras.read(run.path("cameras.parquet")), evaluation.judged
    poses = read_parquet(run.path("poses.parquet"))
    threshold = pc.equal(poses["threshold"], pa.scalar(config.pose.threshold, pa.float32()))
    poses = poses.filter(pc.and_(threshold, pc.equal(poses["estimator"], estimator)))
    listed, queries = (read_parquet(run.path(name)) for name in ("listed.parquet", "queries.parquet"))
    shown = worst_first(shown_pairs(listed, poses, queries, k), judged)
    sides = [*zip(*(shown[side].to_pylist() for side in ("image0", "image1")), strict=True)]
    pictures = _Pictures(run, cameras, config.pose.threshold)
    return PoseReport(
        results=evaluation.results,
        headline=("fixed", estimator, k),
        judged=judged,
        curves={k: evaluation.curves(k) for k in ks_of(evaluation.results)},
        reasons=run.counts["pairs_without_pose"],
        pairs=run.counts["pairs_matched"] + sum(run.counts["pairs_unmatched"].values()),
        queries=[
            pictures.posed(why, shown.slice(row, 1).to_pylist()[0])
            for why, row in illustrated(sides, config.report.queries, SHOWN[judged])
        ],
    )


def shown_pairs(ranked: pa.Table, poses: pa.Table, queries: pa.Table, k: int | None) -> pa.Table:
    """For every query with pairs the one that it is judged by, or without any pose its best ranked one.

    Args:
        ranked: query, database, rank.
        poses: a row for each of these pairs, unordered, by one estimator and threshold.
        queries: as in `vop.pose.protocols.evaluate`; those whose camera is unknown are left out.
        k: pairs of a query that count; None: all.

    Returns:
        query, database, rank, query_truth (whether its true pose is known) and the columns of `poses`; by scene, query.
    """
    listed = Listed.of(ranked, queries)
    at, row = listed.positions(poses["image0"], poses["image1"]), np.empty(len(listed.keys), int)
    row[at[at >= 0]] = np.flatnonzero(at >= 0)
    best, first = taken(listed, inliers_of(poses)[row], k), listed.bounds[:-1]
    asking = np.flatnonzero(listed.bounds[1:] > first)
    best = np.where(best < 0, first, best)[asking]
    pairs, found = ranked.take(pa.array(listed.rows[best])), poses.take(pa.array(row[listed.pair[best]]))
    named = {name: pairs[name] for name in ("query", "database", "rank")} | {"query_truth": listed.truth[asking]}
    return pa.table(named | {name: found[name] for name in found.column_names})


def worst_first(shown: pa.Table, judged: bool) -> pa.Table:
    """Pairs of `shown_pairs`, that of the worst query first: by pose error where any is known, else by inliers.

    Of failures the one with most inliers comes first: the boldest invention. Queries that cannot be judged beside
    others that can are left out.
    """
    inliers, matches = inliers_of(shown), shown["matches"].to_numpy()
    if not judged:
        return shown.take(pa.array(np.lexsort([matches, inliers])))
    error = np.where(inliers < 0, np.inf, np.maximum(*errors_of(shown)))
    order = np.lexsort([-matches, -inliers, -error])
    return shown.take(pa.array(order[(~np.isnan(error) & shown["query_truth"].to_numpy())[order]]))


def illustrated(pairs: Sequence[object], count: int, names: Sequence[str]) -> list[tuple[str, int]]:
    """Why (of `names`) and which queries are shown, `count` at most: mostly the worst, then the median and the best.

    `pairs` are those that the queries are judged by, the worst first. A pair is shown once, whichever image asks.
    """
    first = sorted({pair: row for row, pair in reversed([*enumerate(pairs)])}.values())
    count = min(count, len(first), len(names))
    ends = [(names[-2], len(first) // 2), (names[-1], len(first) - 1)][2 - min(2, max(0, count - 1)) :]
    worst = [*zip(names, range(max(1, len(first) // 2)), strict=False)][: count - len(ends)]
    return [(why, first[place]) for why, place in [*worst, *ends]]


class _Pictures:
    """Reads what is drawn of a query."""

    def __init__(self, run: Run, cameras: Cameras, threshold: float):
        self.run, self.cameras, self.threshold = run, cameras, threshold

    def posed(self, why: str, row: dict) -> PosedQuery:
        """A row of `shown_pairs` with its photographs and its matches."""
        flipped = row["query"] != row["image0"]
        names, known = (row["image0"], row["image1"]), [self.cameras.get(row[f"image{side}"]) for side in (0, 1)]
        try:
            points, sizes = self._matched(*names)
            links = self._links(row, points, sizes, known)
        except StoreError:  # an image in quarantine, or a run whose stores are gone
            links = None
        photos = [self._photo(name) for name in names]
        if flipped:
            photos.reverse()
            links = links and Links(links.right, links.left, links.linked, links.true)
        told = {name: row[name] for name in ("matches", "inliers", "rotation_error", "translation_error", "reason")}
        return PosedQuery(why, *photos, row["rank"] + 1, links=links, unrelated=row["unrelated"], **told)

    def _matched(self, image0: str, image1: str) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
        """The matched keypoints of both images, (m, 2) each, and the sizes of the images."""
        features, matches = (kind.open(self.run.counts[name]) for name, kind in STORES.items())
        wanted = located(features.live([image0, image1]), pa.array([image0]), pa.array([image1]))
        if wanted["row0"].null_count or wanted["row1"].null_count:
            raise StoreError(f"{image0!r} or {image1!r} is in quarantine")
        (shard,), (row,) = matches.locate(wanted)
        (indices,) = matches_of(matches.read_shard(int(shard)).slice(int(row), 1))
        place = wanted.to_pylist()[0]
        seen = [features.read_keypoints(place[f"shard{i}"], np.array([place[f"row{i}"]]))[0] for i in (0, 1)]
        points = [keypoints[indices[:, side]].astype(np.float64) for side, (keypoints, _) in enumerate(seen)]
        return points, [size for _, size in seen]

    def _links(self, row: dict, points: list, sizes: list, known: list[KnownCamera | None]) -> Links:
        linked, true = np.ones(len(points[0]), bool), None
        shares = [each / size for each, size in zip(points, sizes, strict=True)]
        if any(camera is None or camera.K is None for camera in known):
            return Links(*shares, linked, true)
        try:
            fitted = [camera.fitted(*size) for camera, size in zip(known, sizes, strict=True)]
        except CamerasError:  # the reason why the pair has no pose
            return Links(*shares, linked, true)
        straight = (camera.undistorted(each) for camera, each in zip(fitted, points, strict=True))
        seen = *straight, *(camera.K for camera in fitted)
        if row["reason"] is None:
            linked = agreeing(*seen, np.reshape(row["cam1_from_cam0"], (3, 4)), self.threshold)
        if row["unrelated"]:
            true = np.zeros(len(linked), bool)
        elif (pose := self.cameras.relative(row["image0"], row["image1"])) is not None and pose[:3, 3].any():
            true = agreeing(*seen, pose, TOLERANCE * self.threshold)
        return Links(*shares, linked, true)

    def _photo(self, name: str) -> Photo:
        shown, rgb = photograph(self.run.counts["root"], name, MISSING)
        return Photo(shown, rgb, drawing_size(*rgb.shape[1::-1]))
