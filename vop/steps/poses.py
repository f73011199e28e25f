"""Relative poses of matched pairs: poses.parquet, and how good they are by each protocol."""

import itertools
from collections.abc import Collection, Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vop import files
from vop.cameras import Cameras
from vop.config import Config, ConfigError
from vop.datasets.layout import Benchmark
from vop.pairs import read_parquet
from vop.parts import Parts, fingerprint
from vop.pose.protocols import Evaluation, evaluate
from vop.pose.results import markdown, metrics
from vop.pose_estimation import SCHEMA, PoseEstimation, unmatched
from vop.run import Run
from vop.stages.match import estimate_poses
from vop.steps.matches import Matched, places

CAMERAS, POSES = "cameras.parquet", "poses.parquet"
LISTED, QUERIES, RESULTS = "listed.parquet", "queries.parquet", "results.parquet"  # what was judged, and how good it is


def check_cameras(benchmark: Benchmark) -> None:
    """Raise `ConfigError` where no camera is known: without intrinsics matches give no relative pose.

    Raises `CamerasError` for one that is malformed: a file that was misread would count against what is judged.
    """
    if benchmark.cameras is None:
        raise ConfigError(
            "relative-pose needs cameras=FILE or FOLDER: a cameras.json with K and perhaps R and t for each image "
            "name, or a COLMAP model; see docs/datasets.md" + (f". {benchmark.withheld}" if benchmark.withheld else "")
        )
    benchmark.cameras.check()


def posed(config: Config, job: Run, matched: Matched, cameras: Cameras) -> pa.Table:
    """poses.parquet: a row for each pair, estimator and threshold; finished parts are not estimated again."""
    cameras.write(job.path(CAMERAS))
    wanted = places(matched)
    receipts = matched.matches.receipts()
    parts = Parts(
        config.output,
        fingerprint(
            {"estimators": config.pose.estimators, "thresholds": [config.pose.threshold, *config.pose.thresholds]},
            [config.pose.iterations, config.pose.confidence, config.pose.seed, SCHEMA.names],
            [(number, receipts[number]["sha256"], rows.tolist()) for number, rows in wanted],
            [matched.features.manifest["features"], files.sha256(job.path(CAMERAS))],
        ),
        "poses",
    )
    missing = parts.missing(len(wanted))
    total, now = matched.pairs.num_rows, sum(len(wanted[i][1]) for i in missing)
    with job.progress("poses", total, total - now, "pairs") as bar:
        estimation = PoseEstimation(config.pose, matched.features, matched.matches, job.path(CAMERAS), parts)
        for written in estimate_poses(config, estimation, (_part(i, *wanted[i]) for i in missing)):
            bar.update(written["pairs"])
    job.counts["posed_now"] = now
    with job.step("write poses"):
        poses = pa.concat_tables([*parts.read(len(wanted)), _unmatched(config, matched, cameras)]).sort_by(
            [(name, "ascending") for name in ("image0", "image1", "estimator", "threshold")]
        )
        with files.atomic(job.path(POSES)) as (filesystem, inner):
            pq.write_table(poses, inner, filesystem=filesystem, compression="zstd")
        parts.remove(but_these=True)
    job.counts["pairs_without_pose"] = _reasons(poses, config)
    return poses


def judged(config: Config, job: Run, benchmark: Benchmark, listed: pa.Table, poses: pa.Table) -> Evaluation:
    """results.parquet and results.md: how well the listed pairs give relative poses; the headline into the metrics.

    Queries are those of the list; where the list is the ranking of this run, also those that it found no pairs for.
    """
    ranked_here = "pairs" in job.counts and not config.pairs.chosen
    queries = _queries(benchmark, {*listed["query"].to_pylist(), *(benchmark.sets.queries if ranked_here else ())})
    with job.step("evaluate"):
        evaluation = evaluate(listed, poses, config.pose, queries)
        for name, table in ((LISTED, listed), (QUERIES, queries), (RESULTS, evaluation.results)):
            with files.atomic(job.path(name)) as (filesystem, inner):
                pq.write_table(table, inner, filesystem=filesystem)
        files.write_bytes(job.path("results.md"), markdown(evaluation.results).encode())
        job.metrics |= metrics(evaluation.results, config.pose)
    return evaluation


def judged_again(config: Config, job: Run) -> Evaluation:
    """The evaluation of a finished run, from the files of its directory."""
    listed, poses, queries = (read_parquet(job.path(name)) for name in (LISTED, POSES, QUERIES))
    return evaluate(listed, poses, config.pose, queries)


def _queries(benchmark: Benchmark, names: Collection[str]) -> pa.Table:
    """Queries by name: query, scene, and what is known of their cameras: intrinsics (known), true pose (truth)."""
    scenes = {image.name: image.scene for image in benchmark.sets.images}
    names = sorted(names)
    cameras = [benchmark.cameras.get(name) for name in names]
    return pa.table(
        {
            "query": names,
            "scene": [scenes.get(name, "") for name in names],
            "known": [camera is not None and camera.K is not None for camera in cameras],
            "truth": [camera is not None and camera.cam_from_world is not None for camera in cameras],
        }
    )


def _part(number: int, shard: int, rows) -> pa.Table:
    return pa.table({"part": [number] * len(rows), "shard": [shard] * len(rows), "row": rows})


def _unmatched(config: Config, matched: Matched, cameras: Cameras) -> pa.Table:
    rows: Iterator[dict] = itertools.chain.from_iterable(
        unmatched(*(pair[name] for name in ("image0", "image1", "reason")), config.pose, cameras)
        for pair in matched.unmatched.to_pylist()
    )
    return pa.Table.from_pylist([*rows], schema=SCHEMA)


def _reasons(poses: pa.Table, config: Config) -> dict[str, int]:
    """Pairs without a pose by the first estimator at the threshold of the protocol `fixed`, by reason."""
    chosen = pc.and_(
        pc.equal(poses["estimator"], config.pose.estimators[0]),
        pc.equal(poses["threshold"], pa.scalar(config.pose.threshold, pa.float32())),
    )
    reasons = pc.value_counts(poses.filter(pc.and_(chosen, poses["reason"].is_valid()))["reason"]).to_pylist()
    return {each["values"]: each["counts"] for each in sorted(reasons, key=lambda each: -each["counts"])}
