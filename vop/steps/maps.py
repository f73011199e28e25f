"""The map of a database: pairs of its images, their matches, and the points triangulated from these at known poses."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vop import files, map_points, pairs
from vop.cameras import Cameras, load_pycolmap
from vop.config import Config, ConfigError
from vop.datasets import colmap
from vop.datasets.benchmark import Benchmark
from vop.datasets.camera_sources import open_points
from vop.map_points import MapPoints, Triangulation
from vop.parts import Parts, fingerprint
from vop.run import Run
from vop.schema import PairsConfig
from vop.stages.localize import triangulate_worlds
from vop.steps import embeddings, matches
from vop.steps import pairs as ranking
from vop.steps.matches import Matched
from vop.store import EmbeddingStore
from vop.triangulation import EPIPOLAR_ERROR

CAMERAS, WORLDS = "cameras.parquet", "worlds"  # in the folder of the map: its cameras, its unfinished parts
BY_POINTS, BY_OVERLAP = "shared points", "predicted overlap"


def mapped(config: Config, job: Run, benchmark: Benchmark) -> MapPoints:
    """The map of the database at `config.map_path`; one of the same images, cameras and settings is taken as it is.

    The database is of images with known cameras (`vop.steps.localization.opened` sees to it).
    """
    names = benchmark.sets.database
    known = Cameras.of(benchmark.cameras.get(name) for name in names)
    made = job.within(config.map_path, "map")
    with job.writing(config.map_path):
        known.write(made.path(CAMERAS))
        listed = _listed(config, job, made, benchmark, known.worlds)
        matched = matches.matched(config, made, benchmark.sets, listed)
        found = _triangulated(config, made, matched, known.worlds)
    kept = ("pairs_by", "pairs_matched", "matched_now", "extracted_now", "triangulated_now")
    job.counts["map"] = {"path": config.map_path} | map_points.counted(config.map_path)
    job.counts["map"] |= {key: made.counts[key] for key in kept}
    job.quarantined += [each for each in made.quarantined if each not in job.quarantined]
    return found


def _listed(config: Config, job: Run, made: Run, benchmark: Benchmark, worlds: dict[str, str]) -> pa.Table:
    """Pairs of database images of one world: by shared points where a world's models have any, else by overlap."""
    names, number = benchmark.sets.database, config.localize.map_neighbours
    with made.step("points"):
        points = colmap.POINTS.empty_table()
        if config.cameras is not None:
            points = open_points(config.cameras, benchmark.sets.root, names)
        elif benchmark.points is not None:
            points = benchmark.points()
        listed = _within(colmap.covisible(points, names, number), worlds)
    told = {worlds[name] for name in pc.unique(listed["query"]).to_pylist()}
    rest = [name for name in names if worlds[name] not in told]
    made.counts["pairs_by"] = [*([BY_POINTS] if told else []), *([BY_OVERLAP] if rest else [])]
    if len(rest) > 1:
        listed = pa.concat_tables([listed, _within(_ranked(config, job, made, benchmark, rest), worlds)])
    if not listed.num_rows:
        raise ConfigError(
            f"no two of {len(names)} database images can be paired, which it takes to triangulate points: is any "
            "overlap predicted between images of one world (retrieval.radius, localize.map_neighbours)?"
        )
    return listed


def _within(listed: pa.Table, worlds: dict[str, str]) -> pa.Table:
    sides = ([worlds[name] for name in listed[side].to_pylist()] for side in ("query", "database"))
    return listed.filter(pa.array([world0 == world1 for world0, world1 in zip(*sides, strict=True)], pa.bool_()))


def _ranked(config: Config, job: Run, made: Run, benchmark: Benchmark, names: Sequence[str]) -> pa.Table:
    """The pairs of these images by predicted overlap, found by a search of its own in the folder of the map."""
    retrieval = dataclasses.replace(config.retrieval, k=config.localize.map_neighbours)
    asked = dataclasses.replace(config, output=config.map_path, retrieval=retrieval, pairs=PairsConfig())
    if "embedded_now" in job.counts:  # ranking the queries has brought the store up to date
        store = EmbeddingStore.open(config.store_path)
        made.counts["root"] = benchmark.sets.root
    else:
        store = embeddings.embedded(config, made, benchmark.sets)
    database = store.select(names)
    ranking.paired(asked, made, database, database)
    return pairs.read_parquet(made.path("pairs.parquet")).select(["query", "database", "rank"])


def _triangulated(config: Config, made: Run, matched: Matched, worlds: dict[str, str]) -> MapPoints:
    """map.parquet: worlds that are finished are not triangulated again."""
    asked = _by_world(matched, worlds)
    receipts = matched.matches.receipts()
    shards = sorted({number for part in asked for number in part["shard"].to_pylist()})
    by = fingerprint(
        [config.localize.min_angle, EPIPOLAR_ERROR, load_pycolmap().__version__, map_points.MAP.names],
        {number: receipts[number]["sha256"] for number in shards},
        [[part["shard"].to_pylist(), part["row"].to_pylist()] for part in asked],
        [matched.features.manifest["features"], files.sha256(made.path(CAMERAS))],
    )
    made.counts["triangulated_now"] = 0
    if map_points.made_by(config.map_path) == by:
        return MapPoints(config.map_path, by)
    parts = Parts(config.map_path, by, WORLDS)
    images = [len(_names(part)) for part in asked]
    missing = parts.missing(len(asked))
    made.counts["triangulated_now"] = sum(images[number] for number in missing)
    work = Triangulation(config.localize.min_angle, matched.features, matched.matches, made.path(CAMERAS), parts)
    with made.progress("triangulate", sum(images), sum(images) - made.counts["triangulated_now"], "images") as bar:
        for written in triangulate_worlds(
            config, work, (asked[number].select(["part", "shard", "row"]) for number in missing)
        ):
            bar.update(written["images"])
    with made.step("write"):
        tables = list(parts.read(len(asked)))
        there = {name for table in tables for name in table["name"].to_pylist()}
        tables.append(map_points.pointless([name for name in worlds if name not in there], worlds))
        found = map_points.write(config.map_path, pa.concat_tables(tables), by)
        parts.remove()
    return found


def _by_world(matched: Matched, worlds: dict[str, str]) -> list[pa.Table]:
    """The matched pairs of each world: part, shard, row (in the store of matches), image0, image1; by shard and row."""
    shards, rows = matched.matches.locate(matched.pairs)
    table = matched.pairs.select(["image0", "image1"])
    table = table.append_column("shard", pa.array(shards)).append_column("row", pa.array(rows))
    numbers = {world: number for number, world in enumerate(sorted(set(worlds.values())))}
    part = np.array([numbers[worlds[name]] for name in table["image0"].to_pylist()])
    found = []
    for number in np.unique(part):
        mine = table.filter(pa.array(part == number)).sort_by([("shard", "ascending"), ("row", "ascending")])
        found.append(mine.append_column("part", pa.array([len(found)] * mine.num_rows)))
    return found


def _names(part: pa.Table) -> set[str]:
    return {*part["image0"].to_pylist(), *part["image1"].to_pylist()}
