"""Poses of queries: localized.parquet, poses.txt for benchmark servers, and how good they are."""

import dataclasses
import itertools

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vop import files, matching
from vop.cameras import Cameras, load_pycolmap
from vop.config import Config, ConfigError
from vop.datasets.benchmark import Benchmark, open_benchmark
from vop.lift import Lift
from vop.localization import ASKED, Localization
from vop.parts import Parts, fingerprint
from vop.pose import localized as results
from vop.query_cameras import read_lists
from vop.run import Run
from vop.stages.localize import localize_queries
from vop.steps import pairs as ranking
from vop.steps.matches import Matched

CAMERAS, LISTED = "cameras.parquet", "listed_cameras.parquet"  # what is known of queries, and what lists say of them
ELSEWHERE = ("intrinsics", "map_neighbours", "min_angle", "written")  # settings that poses do not follow from directly
LOCALIZED, POSES, PARTS = "localized.parquet", "poses.txt", "localized"


def check(config: Config) -> None:
    """Find out before any work whether queries can be localized here. Raises `ConfigError`, and as `matching.check`."""
    ranking.check(config)
    matching.check(config.matching)
    if config.pairs.chosen:
        raise ConfigError("pairs.* chooses among the pairs of one collection: use it with register, here retrieval.k")
    try:
        load_pycolmap()
    except ImportError as error:
        raise ConfigError(f"localize: {error}") from error


def opened(config: Config, job: Run) -> Benchmark:
    """The queries, and the database as far as its geometry is known; cameras of queries go to the run directory.

    Raises `ConfigError` where nothing of the database is known, or poses.txt could not hold the queries, and
    `CamerasError` for a camera that is malformed or lists that name no query.
    """
    benchmark = open_benchmark(config)
    cameras = benchmark.cameras or Cameras.of([])
    cameras.check()
    benchmark = _posed(job, benchmark, cameras) if benchmark.lift is None else _lifted(job, benchmark)
    sets = benchmark.sets
    results.check_written(sets.queries, _rule(config, benchmark))
    lists = (
        None if config.localize.intrinsics is None else read_lists(config.localize.intrinsics, sets.root, sets.queries)
    )
    if lists is not None:
        job.counts["intrinsics"] = {"listed": len(lists.cameras), "of": lists.entries, "unknown": lists.unknown}
    Cameras.of(filter(None, map(cameras.get, sets.queries))).write(job.path(CAMERAS))
    (Cameras.of([]) if lists is None else lists.cameras).write(job.path(LISTED))
    return benchmark


def _posed(job: Run, benchmark: Benchmark, cameras: Cameras) -> Benchmark:
    """Without the database images whose camera or pose is unknown: nothing can be localized by them."""
    known = {camera.name for camera in cameras if camera.K is not None and camera.cam_from_world is not None}
    database = tuple(name for name in benchmark.sets.database if name in known)
    if not database:
        raise ConfigError(
            f"none of {len(benchmark.sets.database)} database images has a known camera and pose: localize needs "
            "cameras=FILE or FOLDER, a COLMAP model or a cameras.json with K, R and t for each image name; see "
            "docs/datasets.md" + (f". {benchmark.withheld}" if benchmark.withheld else "")
        )
    job.counts["database_without_pose"] = len(benchmark.sets.database) - len(database)
    return _of(benchmark, database)


def _lifted(job: Run, benchmark: Benchmark) -> Benchmark:
    """Without the database images that the benchmark brings no geometry of."""
    database = benchmark.sets.database
    lacking = benchmark.lift.lacking(database)
    if len(lacking) == len(database):
        name, reason = next(iter(lacking.items()), ("the database", "no images"))
        raise ConfigError(
            f"none of {len(database)} database images has the geometry that localize needs: {name}: {reason}; "
            "docs/datasets.md says what the benchmark consists of, and where to get it"
        )
    job.counts["database_without_geometry"] = len(lacking)
    return _of(benchmark, tuple(name for name in database if name not in lacking))


def _of(benchmark: Benchmark, database: tuple[str, ...]) -> Benchmark:
    """The benchmark with these of its database images."""
    kept = {*database, *benchmark.sets.queries}
    images = tuple(image for image in benchmark.sets.images if image.name in kept)
    return dataclasses.replace(benchmark, sets=dataclasses.replace(benchmark.sets, images=images, database=database))


def _rule(config: Config, benchmark: Benchmark) -> str:
    return config.localize.written or benchmark.written


def localized(
    config: Config, job: Run, benchmark: Benchmark, listed: pa.Table, matched: Matched, lift: Lift
) -> pa.Table:
    """localized.parquet and poses.txt: a row for every query; finished parts are not localized again.

    How right the poses are goes into the metrics, where true ones are known.
    """
    asked = _asked(config, job, benchmark, listed, matched)
    receipts = matched.matches.receipts()
    parts = Parts(config.output, fingerprint(
        {key: value for key, value in dataclasses.asdict(config.localize).items() if key not in ELSEWHERE},
        results.SCHEMA.names, load_pycolmap().__version__, repr(lift),
        {number: receipts[number]["sha256"] for part in asked for number in part["shard"].drop_null().to_pylist()},
        [[part[name].to_pylist() for name in ("query", "reason", "shard", "row")] for part in asked],
        [matched.features.manifest["features"], *(files.sha256(job.path(name)) for name in (CAMERAS, LISTED))],
    ), PARTS)  # fmt: skip
    queries = [len(part["query"].unique()) for part in asked]
    missing = parts.missing(len(asked))
    now = sum(queries[number] for number in missing)
    work = Localization(config.localize, matched.features, matched.matches, job.path(CAMERAS), job.path(LISTED), lift,
                        benchmark.sets.root, parts)  # fmt: skip
    with job.progress("localize", sum(queries), sum(queries) - now, "queries") as bar:
        for written in localize_queries(config, work, (asked[number] for number in missing)):
            bar.update(written["queries"], bad=written["failed"])
    with job.step("write poses"):
        table = results.judged(pa.concat_tables(parts.read(len(asked))), benchmark.cameras)
        with files.atomic(job.path(LOCALIZED)) as (filesystem, inner):
            pq.write_table(table, inner, filesystem=filesystem, compression="zstd")
        job.counts |= results.write_poses(job.path(POSES), table, _rule(config, benchmark))
        parts.remove(but_these=True)
    job.counts |= {"localized_now": now, "queries_without_pose": results.failures(table)}
    job.counts["pairs_without_points"] = results.faults(table)
    job.metrics |= results.metrics(table)
    return table


def _asked(config: Config, job: Run, benchmark: Benchmark, listed: pa.Table, matched: Matched) -> list[pa.Table]:
    """What each part is to localize, `ASKED`: the matched pairs of every query by rank, or why it has none."""
    shards, rows = matched.matches.locate(matched.pairs)
    places = matched.pairs.select(["image0", "image1"])
    places = places.append_column("shard", pa.array(shards, pa.int32())).append_column(
        "row", pa.array(rows, pa.int32())
    )
    sets = benchmark.sets
    for side, names in (("query", sets.queries), ("database", sets.database)):
        listed = listed.filter(pc.is_in(listed[side], pa.array(names, pa.string())))
    sides = [listed[side].combine_chunks() for side in ("query", "database")]
    listed = listed.append_column("image0", pc.min_element_wise(*sides))
    listed = listed.append_column("image1", pc.max_element_wise(*sides))
    found = listed.join(places, ["image0", "image1"], join_type="inner").select(["query", "rank", "shard", "row"])
    names, bad = pa.array(sorted(sets.queries), pa.string()), pa.array(sorted({name for name, _ in job.quarantined}))
    left = names.filter(pc.invert(pc.is_in(names, found["query"].combine_chunks())))
    reasons = pc.if_else(pc.is_in(left, bad.cast(pa.string())), results.QUARANTINED, results.NO_PAIRS)
    found = found.append_column("reason", pa.nulls(found.num_rows, pa.string()))
    found = pa.concat_tables([found, pa.table({"query": left, "reason": reasons})], promote_options="default")
    found = found.sort_by([("query", "ascending"), ("rank", "ascending")])
    part = pc.index_in(found["query"], names).to_numpy() // config.localize.batch
    found = found.append_column("part", pa.array(part)).select(ASKED.names).cast(ASKED)
    edges = np.flatnonzero(np.diff(part, prepend=-1, append=-1)).tolist()
    return [found.slice(start, stop - start) for start, stop in itertools.pairwise(edges)]
