"""Localization without Ray: maps and poses from stores whose scene is known, reasons, resumed runs."""

import dataclasses
import json

import matched_runs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matched_runs import BLANK, LOST, NAMES, POINTS, SIZE

pytest.importorskip("pycolmap", reason="needs the extra localize")

from vop import config, files, localization, map_points, pairs
from vop.cameras import Cameras, KnownCamera, load_pycolmap
from vop.datasets.colmap import POINTS as POINTS_OF_MODELS
from vop.datasets.image_sets import open_image_sets
from vop.datasets.layout import Benchmark
from vop.features import FeatureStore
from vop.lift import Lifted
from vop.localization import Correspondences, QueryPair, covisible, localize, merged
from vop.matches import MatchStore, located
from vop.parts import Parts
from vop.pose import localized as results
from vop.run import Run
from vop.schema import LocalizeConfig
from vop.shards import StoreError
from vop.steps import localization as step
from vop.steps import maps
from vop.steps.matches import Matched

QUERIES, DATABASE = ["a/0.jpg", "b/5.jpg", BLANK, LOST], NAMES[1:5]


@dataclasses.dataclass
class Case:
    """A run whose pairs are matched; everything but `vop.stages` is as in `vop localize`."""

    config: config.Config
    benchmark: Benchmark
    matched: Matched
    listed: pa.Table

    def job(self) -> Run:
        return Run(self.config.output, "localize", quarantined=[(LOST, "torn")])

    def with_settings(self, **settings) -> "Case":
        asked = dataclasses.replace(self.config.localize, **settings)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, localize=asked))


def truth() -> dict[str, KnownCamera]:
    known = {name: matched_runs.camera(i) for i, name in enumerate(NAMES)}
    return {name: KnownCamera(name, c.K, c.cam_from_world, "w", c.width, c.height) for name, c in known.items()}


@pytest.fixture
def case(tmp_path, monkeypatch):
    output = matched_runs.write(tmp_path)
    cfg = config.load(images=str(tmp_path / "images"), output=output, localize={"batch": 2})
    sets = dataclasses.replace(open_image_sets(cfg), queries=tuple(sorted(QUERIES)), database=tuple(DATABASE))
    features, matches = FeatureStore.open(cfg.features_path), MatchStore.open(cfg.matches_path)
    couples = [(query, database) for query, database in matched_runs.LISTED[:-3] if query != LOST]
    listed = pairs.ranked(pa.table({"query": [q for q, _ in couples], "database": [d for _, d in couples]}))
    for module, name in ((step, "localize_queries"), (maps, "triangulate_worlds")):
        monkeypatch.setattr(module, name, lambda config, work, parts: (work(part).to_pylist()[0] for part in parts))
    matched = Matched(features, matches, pairs_of(features, couples), None)
    return Case(cfg, Benchmark(sets, Cameras.of(truth().values())), matched, listed)


def pairs_of(features: FeatureStore, couples) -> pa.Table:
    asked = pairs.unordered(pa.table({"query": [q for q, _ in couples], "database": [d for _, d in couples]}))
    return located(features.live(), asked["image0"].combine_chunks(), asked["image1"].combine_chunks())


def mapped(case: Case) -> map_points.MapPoints:
    """The map of the database images, by the step itself."""
    couples = [(a, b) for a in DATABASE for b in DATABASE if a < b]
    inner = case.job().within(case.config.map_path, "map")
    cameras = {name: known for name, known in truth().items() if name in DATABASE}
    Cameras.of(cameras.values()).write(inner.path(maps.CAMERAS))
    matched = dataclasses.replace(case.matched, pairs=pairs_of(case.matched.features, couples))
    return maps._triangulated(case.config, inner, matched, dict.fromkeys(DATABASE, "w"))


def prepared(case: Case, cameras=None, listed=None) -> Run:
    """The job with the tables that the step `opened` writes."""
    job = case.job()
    Cameras.of((truth() if cameras is None else cameras).values()).write(job.path(step.CAMERAS))
    Cameras.of((listed or {}).values()).write(job.path(step.LISTED))
    return job


def localized(case: Case, lift, **cameras) -> dict[str, dict]:
    table = step.localized(case.config, prepared(case, **cameras), case.benchmark, case.listed, case.matched, lift)
    assert table.schema.equals(results.SCHEMA)
    return {row["query"]: row for row in table.to_pylist()}


def test_every_query_stands_in_the_table_with_its_pose_or_its_reason(case):
    found = localized(case, mapped(case))
    assert [*found] == sorted(QUERIES)
    for name in ("a/0.jpg", "b/5.jpg"):
        row = found[name]
        assert (row["reason"], row["world"], row["camera"]) == (None, "w", "known camera")
        assert row["rotation_error"] < 0.05
        assert row["translation_error"] < 0.01  # world units, at a depth of 7 and 0.2 pixels of noise
        assert row["inliers"] > 150
        assert (row["width"], row["height"], row["pairs"]) == (*SIZE, 4)
    assert found[BLANK]["reason"] == results.NO_PAIRS  # its only pair is with an image that is not of the database
    assert found[LOST]["reason"] == results.QUARANTINED


def test_points_of_the_map_are_those_of_the_scene_and_rows_those_of_the_features(case):
    lift = mapped(case)
    for name in DATABASE:
        features, shown = matched_runs.local_features(name)
        rows = np.arange(len(features), dtype=np.int32)[::-1]
        found = lift(name, rows, features.keypoints[rows].astype(float))
        known = np.isfinite(found.xyz).all(axis=1)
        assert known.sum() > 150
        assert ((found.ids >= 0) == known).all()
        true = known & (shown[rows] >= 0)
        assert true.sum() >= known.sum() - 3
        errors = np.linalg.norm(found.xyz[true] - POINTS[shown[rows[true]]], axis=1)
        assert np.median(errors) < 0.02
    assert lift.world(DATABASE[0]) == "w"
    assert lift.world("b/5.jpg") is None
    assert np.isnan(lift("b/5.jpg", np.arange(3, dtype=np.int32), np.zeros((3, 2))).xyz).all()


def test_a_finished_map_is_taken_as_it_is_and_one_of_other_settings_is_not(case):
    lift, job = mapped(case), case.job().within("unused", "map")
    before = files.read_bytes(files.join(lift.path, map_points.FILE))
    assert mapped(case) == lift
    assert files.read_bytes(files.join(lift.path, map_points.FILE)) == before
    other = mapped(case.with_settings(min_angle=5.0))
    assert other.made_by != lift.made_by
    with pytest.raises(StoreError, match="made anew"):
        map_points._groups.cache_clear()
        dataclasses.replace(lift, path=lift.path + "/.")(DATABASE[0], np.zeros(1, np.int32), np.zeros((1, 2)))
    assert job.counts == {}


def test_a_pose_in_the_list_projects_the_map_onto_the_keypoints(case):
    pycolmap, lift = load_pycolmap(), mapped(case)
    found = localized(case, lift)
    lines = {line.split()[0]: [float(v) for v in line.split()[1:]]
             for line in files.read_bytes(f"{case.config.output}/poses.txt").decode().splitlines()}  # fmt: skip
    assert [*lines] == ["a/0.jpg", "b/5.jpg"]
    for name, (qw, qx, qy, qz, *t) in lines.items():
        pose = pycolmap.Rigid3d(pycolmap.Rotation3d(np.array([qx, qy, qz, qw])), np.array(t))
        camera = pycolmap.Camera(model=found[name]["model"], width=SIZE[0], height=SIZE[1],
                                 params=found[name]["params"])  # fmt: skip
        features, _ = matched_runs.local_features(name)
        errors = []
        for database in DATABASE:
            first, second = sorted([name, database])
            indices = matched_runs.matches(first, second).indices
            indices = indices if first == name else indices[:, ::-1]
            there = lift(database, indices[:, 1], np.zeros((len(indices), 2)))
            for keypoint, xyz in zip(features.keypoints[indices[:, 0]], there.xyz, strict=True):
                if np.isfinite(xyz).all():
                    errors.append(np.linalg.norm(camera.img_from_cam(pose * xyz) - keypoint))
        assert len(errors) > 300
        assert np.median(errors) < 1


def test_an_interrupted_run_gives_the_same_bytes_and_does_only_what_is_missing(case, monkeypatch):
    lift = mapped(case)
    localized(case, lift)
    output = case.config.output
    whole = {name: files.read_bytes(f"{output}/{name}") for name in ("localized.parquet", "poses.txt")}
    (parts,) = Parts.all_of(output, step.PARTS)
    assert parts.missing(2) == []
    files.remove(f"{parts.path}/000001.parquet")
    files.remove(f"{output}/localized.parquet")
    asked, run = [], step.localize_queries
    monkeypatch.setattr(step, "localize_queries", lambda *given: (asked.append(row) or row for row in run(*given)))
    localized(case, lift)
    assert [row["part"] for row in asked] == [1]
    assert {name: files.read_bytes(f"{output}/{name}") for name in whole} == whole


def test_intrinsics_are_those_of_lists_then_known_then_guessed(case):
    lift, bad = mapped(case), dataclasses.replace(truth()["a/0.jpg"], width=100, height=300)
    wide = dataclasses.replace(truth()["b/5.jpg"], K=np.diag([900.0, 900, 1]) @ truth()["b/5.jpg"].K)
    found = localized(case, lift, cameras={"a/0.jpg": bad, "b/5.jpg": wide}, listed={"b/5.jpg": truth()["b/5.jpg"]})
    assert found["a/0.jpg"]["reason"] == results.MISFIT
    assert (found["b/5.jpg"]["reason"], found["b/5.jpg"]["camera"]) == (None, "list")
    guessed = localized(case.with_settings(focal=600 / 640, refine_focal=True), lift, cameras={})
    assert guessed["a/0.jpg"]["camera"] == "guess"
    assert guessed["a/0.jpg"]["translation_error"] < 0.05
    assert guessed["a/0.jpg"]["params"][0] != 600
    unknown = localized(case.with_settings(focal=None), lift, cameras={})
    assert unknown["a/0.jpg"]["reason"] == results.NO_CAMERA


def test_features_that_cannot_be_read_are_a_reason(case):
    lift = mapped(case)
    for name in files.listing(case.config.features_path):
        if name.endswith(".parquet") and name.startswith("shard"):
            files.remove(f"{case.config.features_path}/{name}")
    assert localized(case, lift)["a/0.jpg"]["reason"] == results.UNREADABLE


class Places:
    """A lift of keypoints whose place in the world is given: {name: (world, xyz (n, 3), ids (n,))}."""

    def __init__(self, known: dict):
        self.known = known

    def __call__(self, name, rows, points):
        _, xyz, ids = self.known[name]
        return Lifted(np.asarray(xyz, float)[rows], np.asarray(ids, np.int64)[rows])

    def world(self, name):
        return self.known[name][0]


def constructed(count: int = 60):
    """Keypoints (n, 2) of a query, its camera, and the points they show."""
    camera = load_pycolmap().Camera(model="SIMPLE_PINHOLE", width=640, height=480, params=[500.0, 320, 240])
    xyz = np.random.default_rng(3).uniform([-2, -1.5, 4], [2, 1.5, 8], (count, 3))
    return (500 * xyz[:, :2] / xyz[:, 2:] + [320, 240]).astype(np.float32), camera, xyz


def pair(name: str, rows, count: int = 60) -> QueryPair:
    rows = np.asarray(rows, np.int32)
    return QueryPair(name, np.stack([rows, rows], axis=1), np.zeros((count, 2), np.float32))


ROWS = np.arange(60)


def test_each_reason_of_a_pose_that_fails():
    keypoints, camera, xyz = constructed()
    asked, rng = LocalizeConfig(), np.random.default_rng(0)

    def reason(known, rows=ROWS):
        return localize([pair("d", rows)], keypoints, camera, Places({"d": known}), asked)["reason"]

    assert localize([], keypoints, camera, Places({}), asked)["reason"] == results.FEW_MATCHES
    assert reason(("w", np.full((60, 3), np.nan), ROWS)) == results.NO_POINTS
    assert reason((None, xyz, ROWS)) == results.NO_POINTS  # an image without a world
    assert reason(("w", np.repeat(xyz[:1], 60, axis=0), ROWS)) == results.RANSAC
    assert reason(("w", rng.uniform(-9, 9, (60, 3)), ROWS)) == results.FEW_INLIERS
    found = localize([pair("d", ROWS)], keypoints, camera, Places({"d": ("w", xyz, ROWS)}), asked)
    assert "reason" not in found
    assert np.allclose(np.reshape(found["cam_from_world"], (3, 4)), np.eye(4)[:3], atol=1e-5)
    assert (found["inliers"], found["correspondences"], found["world"]) == (60, 60, "w")


def test_a_point_that_several_images_see_counts_once_and_one_without_identity_each_time():
    one = Correspondences(np.array([0, 1, 1]), np.array([7, 8, 9]), np.zeros((3, 3)))
    two = Correspondences(np.array([0, 1, 2]), np.array([7, 9, -1]), np.ones((3, 3)))
    three = Correspondences(np.array([2]), np.array([-1]), np.full((1, 3), 2.0))
    found = merged([one, two, three])
    assert [*zip(found.rows, found.ids, found.xyz[:, 0], strict=True)] == [
        *[(0, 7, 0), (1, 8, 0), (1, 9, 0), (2, -1, 1), (2, -1, 2)]
    ]


def test_worlds_are_not_mixed_and_the_one_with_most_inliers_wins():
    keypoints, camera, xyz = constructed()
    moved = xyz + np.array([5.0, 0, 0])
    lift = Places({"a": ("one", xyz, ROWS), "b": ("two", moved, ROWS)})
    found = localize([pair("a", ROWS[:20]), pair("b", ROWS)], keypoints, camera, lift, LocalizeConfig())
    assert (found["world"], found["correspondences"], found["inliers"]) == ("two", 60, 60)
    assert np.allclose(found["cam_from_world"][3], -5, atol=1e-4)


def test_with_covisibility_groups_of_images_that_share_points_are_tried_apart():
    keypoints, camera, xyz = constructed()
    lift = Places({"a": ("w", xyz, ROWS), "b": ("w", xyz, ROWS), "far": ("w", xyz + np.array([9.0, 0, 0]), ROWS + 100)})
    several = [pair("a", ROWS[:30]), pair("far", ROWS[:25]), pair("b", ROWS[30:])]
    assert [[each.database for each in group] for group in covisible(several, lift)] == [["a", "b"], ["far"]]
    apart = localize(several, keypoints, camera, lift, LocalizeConfig(covisibility=True))
    together = localize(several, keypoints, camera, lift, LocalizeConfig())
    assert (apart["correspondences"], apart["inliers"]) == (60, 60)
    assert (together["correspondences"], together["inliers"]) == (85, 60)


def test_a_query_of_the_database_side_of_a_pair_is_read_the_right_way_round(case):
    row = localized(case, mapped(case))["b/5.jpg"]  # stands second in all its pairs
    assert row["reason"] is None
    assert row["matches"] == sum(len(matched_runs.matches(name, "b/5.jpg")) for name in DATABASE)
    assert pq.read_table(f"{case.config.output}/localized.parquet").num_rows == len(QUERIES)
    assert json.loads(json.dumps(localization.ASKED.names)) == ["part", "query", "reason", "shard", "row"]


def test_a_pycolmap_of_another_version_is_told_before_any_work(monkeypatch):
    def lacking():
        raise ImportError("pycolmap 3.10 is installed, but 4.1 up to 5 is needed")

    monkeypatch.setattr(step, "load_pycolmap", lacking)
    with pytest.raises(config.ConfigError, match=r"localize: pycolmap 3\.10 is installed"):
        step.check(config.load())


def test_a_database_of_unknown_cameras_is_refused_and_single_unknown_ones_are_left_out(case):
    with pytest.raises(config.ConfigError, match="none of 4 database images has a known camera and pose"):
        step._posed(case.job(), case.benchmark, Cameras.of([]))
    job, first = case.job(), truth()[DATABASE[0]]
    partly = [first, dataclasses.replace(truth()[DATABASE[1]], cam_from_world=None)]
    left = step._posed(job, case.benchmark, Cameras.of(partly)).sets
    assert left.database == (DATABASE[0],)
    assert left.names == sorted([DATABASE[0], *QUERIES])
    assert job.counts["database_without_pose"] == 3


def test_database_images_are_paired_by_shared_points_within_their_world_and_else_by_overlap(case, monkeypatch):
    worlds = dict(zip(DATABASE, ["w", "w", "v", "v"], strict=True))
    points = pa.table({"name": DATABASE[:3], "id": [[1, 2], [2, 3], [1, 2]], "x": [[0.0, 0.0]] * 3,
                       "y": [[0.0, 0.0]] * 3}).cast(POINTS_OF_MODELS)  # fmt: skip
    asked = []

    def ranked(_config, _job, _made, _benchmark, names):
        asked.extend(names)
        return pairs.ranked(pa.table({"query": [names[0]], "database": [names[1]]}))

    monkeypatch.setattr(maps, "_ranked", ranked)
    made = case.job().within("unused", "map")
    benchmark = dataclasses.replace(case.benchmark, points=lambda: points)
    listed = maps._listed(case.config, case.job(), made, benchmark, worlds)
    found = [*zip(listed["query"].to_pylist(), listed["database"].to_pylist(), strict=True)]
    assert found == [(DATABASE[0], DATABASE[1]), (DATABASE[1], DATABASE[0]), (DATABASE[2], DATABASE[3])]
    assert asked == DATABASE[2:]
    assert made.counts["pairs_by"] == [maps.BY_POINTS, maps.BY_OVERLAP]
