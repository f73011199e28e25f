"""What a finished run matched, written for other programs."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vop import colmap, files, hloc, pairs
from vop import config as configuration
from vop.cameras import Cameras, load_pycolmap
from vop.config import Config, ConfigError
from vop.datasets.benchmark import Benchmark, open_benchmark
from vop.features import FeatureStore, LocalFeatures
from vop.matches import MatchStore, located
from vop.progress import progress
from vop.run import Run
from vop.shards import StoreError
from vop.steps.poses import CAMERAS


@dataclass(frozen=True, eq=False)
class MatchedRun:
    """A finished `vop match`, `vop relative-pose` or `vop localize`.

    listed: query and database of its pair list, as far as they were matched. pairs: image0 and image1 of these, each
    pair once, with `shard` and `row` in the store of matches and `flipped`, whether image1 is the query. images: name,
    shard, row (in the store of features), width and height of the images in them, by shard and row. left_out: how many
    pairs have no matches to export.
    """

    config: Config
    record: Run
    features: FeatureStore
    matches: MatchStore
    listed: pa.Table
    pairs: pa.Table
    images: pa.Table
    left_out: int

    @classmethod
    def open(cls, config: Config) -> "MatchedRun":
        """The run at `output`; `features`, `matches` and `cameras` of the config replace those that it recorded.

        Raises `ConfigError` if there is none, or it matched nothing, and `StoreError` if its stores are gone, changed
        or unfinished.
        """
        if not files.exists(files.join(config.output, "run.json")):
            raise ConfigError(f"no run at output={config.output} (it has no run.json): run `vop match` first")
        record = Run.read(config.output)
        if "pairs_matched" not in record.counts:
            raise ConfigError(
                f"the last run in {config.output} was `vop {record.command}`, which matched no pairs: run `vop match` "
                "or `vop relative-pose` there first"
            )
        recorded = configuration.load([record.path("config.yaml")])
        given = {key: value for key in ("features", "matches", "cameras") if (value := getattr(config, key))}
        recorded = replace(recorded, output=config.output, **given)
        features, matches = FeatureStore.open(recorded.features_path), MatchStore.open(recorded.matches_path)
        matches.check_made_of(features)
        listed = _listed(recorded, record)
        return cls(recorded, record, features, matches, *_matched(features, matches, listed))

    @cached_property
    def benchmark(self) -> Benchmark:
        """The images that the run worked on, and the cameras that its config names."""
        return open_benchmark(self.config)

    def file_of(self, name: str) -> str:
        """Where an image lies."""
        return files.join(self.benchmark.sets.root, name)

    def cameras(self, replaced: bool) -> Cameras | None:
        """The cameras that the run used, unless they are replaced by others; None where none are known."""
        if self.record.command == "relative-pose" and not replaced:
            return Cameras.read(self.record.path(CAMERAS), self.images["name"].to_pylist())
        return self.benchmark.cameras

    def feature_parts(self) -> Iterator[list[tuple[str, LocalFeatures]]]:
        """The features of the images by name, one shard at a time."""
        for number, names, rows in self._image_shards():
            yield list(zip(names, self.features.read(number, rows), strict=True))

    def keypoint_parts(self) -> Iterator[list[tuple[str, np.ndarray]]]:
        """The keypoints (n, 2) of the images by name, one shard at a time."""
        for number, names, rows in self._image_shards():
            found = self.features.read_keypoints(number, rows)
            yield [(name, keypoints) for name, (keypoints, _) in zip(names, found, strict=True)]

    def _image_shards(self) -> Iterator[tuple[int, list[str], np.ndarray]]:
        shards = self.images["shard"].to_numpy()
        for number in np.unique(shards):
            here = self.images.filter(pa.array(shards == number))
            yield int(number), here["name"].to_pylist(), here["row"].to_numpy()

    def match_parts(self) -> Iterator[pa.Table]:
        """The matches of the pairs (image0, image1, matches, scores, flipped), one shard at a time."""
        shards = self.pairs["shard"].to_numpy()
        for number in np.unique(shards):
            here = self.pairs.filter(pa.array(shards == number)).sort_by("row")
            table = self.matches.read_shard(int(number), ["image0", "image1", "matches", "scores"])
            yield table.take(here["row"].combine_chunks()).append_column("flipped", here["flipped"])


def _listed(recorded: Config, record: Run) -> pa.Table:
    """The pair list of a run: the one that it was given, the one that it registered, or its benchmark's own."""
    if recorded.pair_list is not None:
        return pairs.read_given(recorded.pair_list)
    if "pairs" in record.counts:
        chosen = record.path("pair_list.parquet")
        return pairs.read_given(chosen if files.exists(chosen) else record.path("pairs.parquet"))
    query, database = zip(*open_benchmark(recorded).pairs, strict=True)
    return pairs.ranked(pa.table({"query": query, "database": database}))


def _matched(features: FeatureStore, matches: MatchStore, listed: pa.Table) -> tuple[pa.Table, pa.Table, pa.Table, int]:
    """listed, pairs, images and left_out of a `MatchedRun`."""
    live, asked = features.live(), pairs.unordered(listed)
    known = live["name"].combine_chunks()
    usable = asked.filter(
        pc.and_(
            pc.and_(*(pc.is_in(asked[side], known) for side in ("image0", "image1"))),
            pc.not_equal(asked["image0"], asked["image1"]),
        )
    )
    wanted = located(live, usable["image0"].combine_chunks(), usable["image1"].combine_chunks())
    if matches.is_imported:
        wanted = wanted.filter(pa.array(matches.holds(wanted)))
    shards, rows = matches.locate(wanted)
    receipts = matches.receipts()
    unfinished = set(shards.tolist()) - receipts.keys()
    if unfinished:
        raise StoreError(f"{len(unfinished)} shards of {matches.path} are not matched yet: run `vop match` again")
    failed = {(number, bad["row"]) for number, each in receipts.items() for bad in each["quarantined"]}
    whole = [place not in failed for place in zip(shards.tolist(), rows.tolist(), strict=True)]
    found = wanted.select(["image0", "image1"])
    found = found.append_column("shard", pa.array(shards)).append_column("row", pa.array(rows)).filter(pa.array(whole))
    if not found.num_rows:
        raise StoreError(f"none of {asked.num_rows} pairs was matched: run.json says why")
    listed = _of(listed, found)
    found = found.append_column("flipped", _flipped(listed, found))
    names = pa.concat_arrays([found[side].combine_chunks() for side in ("image0", "image1")]).unique()
    images = live.filter(pc.is_in(live["name"], names)).select(["name", "shard", "row", "width", "height"])
    images = images.sort_by([("shard", "ascending"), ("row", "ascending")])
    return listed, found, images, asked.num_rows - found.num_rows


def _of(listed: pa.Table, found: pa.Table) -> pa.Table:
    """query and database of those listed pairs that are among those found, in the order of the list."""
    sides = [listed[side].combine_chunks() for side in ("query", "database")]
    keyed = pa.table({"image0": pc.min_element_wise(*sides), "image1": pc.max_element_wise(*sides)})
    keyed = keyed.append_column("position", pa.array(np.arange(listed.num_rows)))
    kept = keyed.join(found.select(["image0", "image1"]), ["image0", "image1"], join_type="left semi")
    return listed.take(kept["position"].combine_chunks().sort()).select(["query", "database"])


def _flipped(listed: pa.Table, found: pa.Table) -> pa.Array:
    """Whether pairs (image0, image1) are listed the other way round only, (n,) bool."""
    pair = ["image0", "image1"]
    straight = listed.rename_columns(pair).group_by(pair, use_threads=False).aggregate([])
    straight = straight.append_column("listed", pa.array(np.ones(straight.num_rows, bool)))
    numbered = found.select(pair).append_column("position", pa.array(np.arange(found.num_rows)))
    joined = numbered.join(straight, pair, join_type="left outer").sort_by("position")
    return pc.is_null(joined["listed"]).combine_chunks()


def check(config: Config) -> None:
    """Find out before any work whether the export can be written. Raises `ConfigError`."""
    asked = {key: value for key in ("hloc", "colmap") if (value := getattr(config.export, key)) is not None}
    if not asked:
        raise ConfigError("export-matches needs export.hloc=FOLDER or export.colmap=FILE, what to write")
    if "colmap" in asked:
        try:
            load_pycolmap()
        except ImportError as error:
            raise ConfigError(f"export.colmap: {error}") from error


def to_hloc(config: Config, job: Run, run: MatchedRun) -> None:
    """features.h5, matches.h5 and pairs.txt in the folder `export.hloc`."""
    folder = config.export.hloc
    hloc.check_names(run.images["name"].to_pylist())
    keypoints: dict[str, int] = {}
    with job.step("hloc"):
        with progress(hloc.FEATURES, run.images.num_rows, 0, "images") as bar:
            for written in hloc.write_features(files.join(folder, hloc.FEATURES), run.feature_parts()):
                keypoints |= written
                bar.update(len(written))
        with progress(hloc.MATCHES, run.pairs.num_rows, 0, "pairs") as bar:
            for written in hloc.write_matches(files.join(folder, hloc.MATCHES), run.match_parts(), keypoints):
                bar.update(written)
        pairs.write_hloc(files.join(folder, hloc.PAIRS), [run.listed])
    job.counts["hloc"] = {"path": folder, "images": run.images.num_rows, "pairs": run.pairs.num_rows}


def to_colmap(config: Config, job: Run, run: MatchedRun) -> None:
    """A COLMAP database at `export.colmap`, its pairs verified; `cameras` of the config replace those of the run."""
    with job.step("colmap"):
        cameras, verified = dict(_cameras(run, run.cameras(config.cameras is not None))), 0
        with colmap.database(config.export.colmap) as db:
            ids = colmap.add_images(db, cameras)
            with progress("keypoints", len(ids), 0, "images") as bar:
                for written in colmap.add_keypoints(db, ids, run.keypoint_parts()):
                    bar.update(written)
            with progress("verify", run.pairs.num_rows, 0, "pairs") as bar:
                for written, good in colmap.add_matches(db, ids, run.match_parts(), config.pose.seed):
                    verified += good
                    bar.update(written)
    counts = {"path": config.export.colmap, "images": len(ids), "pairs": run.pairs.num_rows, "verified": verified}
    job.counts["colmap"] = counts | {"cameras": dict(Counter(each.source for each in cameras.values()))}


def _cameras(run: MatchedRun, known: Cameras | None) -> Iterator[tuple[str, colmap.ImageCamera]]:
    """The cameras of the images by name; only an image of which none is known is looked for on the disk."""
    given = {} if known is None else {camera.name: camera for camera in known}
    for image in run.images.to_pylist():
        name, size = image["name"], (image["width"], image["height"])
        yield name, colmap.camera_of(given.get(name), size, partial(run.file_of, name))
