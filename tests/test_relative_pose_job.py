"""`vop relative-pose` end to end on rendered rooms, against the same steps in a plain loop; and what can go wrong."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import Job, kill_dataset_workers

from vop import config, matching, pairs, pipeline
from vop.datasets import rendered
from vop.datasets.posed import PosedFolder
from vop.geometry import relative_pose
from vop.image import decode
from vop.pose.relative import Estimator
from vop.schema import ClusterConfig, ConfigError
from vop.shards import StoreError

METHOD = {"method": "sift+nn", "max_keypoints": 600, "shard_size": 4, "extractors": 1, "matchers": 1}
ESTIMATORS = ["opencv", "opencv_ransac"]
BLANK, BROKEN, STRANGER, ABSENT = "one/blank.png", "one/broken.jpg", "two/0005.jpg", "one/absent.jpg"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    """Two renderings, each in a world of its own; beside them a blank image, a broken one, and one without a camera."""
    root = tmp_path_factory.mktemp("rooms")
    for seed, world in enumerate(("one", "two")):
        rendered.write(root / world, 6, seed=seed, width=320, height=240, lighting=1.0)
    cameras = json.loads((root / "one" / "cameras.json").read_text())
    cameras["blank.png"] = cameras["broken.jpg"] = cameras["0000.jpg"]
    (root / "one" / "cameras.json").write_text(json.dumps(cameras))
    cameras = json.loads((root / "two" / "cameras.json").read_text())
    del cameras[STRANGER.removeprefix("two/")]
    (root / "two" / "cameras.json").write_text(json.dumps(cameras))
    entry = PosedFolder.open(str(root / "one")).camera("0000.jpg")
    cv2.imwrite(str(root / BLANK), np.full((entry.height, entry.width, 3), 128, np.uint8))
    (root / BROKEN).write_bytes((root / "one/0001.jpg").read_bytes()[:200])
    return root


def names(root):
    return sorted(str(path.relative_to(root)) for path in root.glob("*/????.jpg"))


def read(job, name):
    return Path(job.path(name)).read_bytes()


def write_list(path, listed):
    query, database = zip(*listed, strict=True)
    pq.write_table(pa.table({"query": query, "database": database}), path)


@pytest.fixture(scope="module")
def told(rooms, tmp_path_factory):
    """The job: every pair from both sides, and one for each thing that can be wrong with a pair."""
    folder = tmp_path_factory.mktemp("job")
    everything = names(rooms)
    listed = [(a, b) for a in everything for b in everything if a != b]
    wrong = [(everything[0], BLANK), (everything[0], BROKEN), (everything[0], ABSENT), (everything[0], everything[0])]
    write_list(folder / "pairs.parquet", [*listed, *wrong])
    return config.load(
        images=str(rooms), cameras=str(rooms), pair_list=str(folder / "pairs.parquet"), output=str(folder / "run"),
        matching=METHOD | {"pair_shard_size": 6}, pose={"estimators": ESTIMATORS, "thresholds": [0.5, 3.0]},
        embedding={"max_bad_fraction": 0.5}, report={"queries": 0},
    )  # fmt: skip


@pytest.fixture(scope="module")
def job(told):
    return pipeline.relative_pose(told)


@pytest.fixture(scope="module")
def expected(rooms, told):
    """(estimator, threshold, image0, image1) -> matches and the pose, by the same parts in a plain loop."""
    extract, match = matching.open_extractor(told.matching), matching.open_matcher(told.matching)
    cameras = {}
    for world in ("one", "two"):
        folder = PosedFolder.open(str(rooms / world))
        cameras |= {f"{world}/{name}": camera for name, camera in zip(folder.names, folder.cameras, strict=True)}
    features = {}
    for name in names(rooms):
        rgb = decode((rooms / name).read_bytes())
        features[name] = extract(rgb, rgb.shape[1::-1])
    found = {}
    estimators = {name: Estimator(name, told.pose) for name in told.pose.estimators}
    for i, name0 in enumerate(names(rooms)):
        for name1 in names(rooms)[i + 1 :]:
            (between,) = match([(features[name0], features[name1])])
            points = [features[n].keypoints[between.indices[:, side]] for side, n in enumerate((name0, name1))]
            for estimator, estimate in estimators.items():
                for threshold in (0.5, 1.5, 3.0):
                    known = name0 in cameras and name1 in cameras and len(between) >= 5
                    Ks = [cameras[name].K for name in (name0, name1)] if known else ()
                    pose = estimate(*points, *Ks, threshold) if known else None
                    found[estimator, threshold, name0, name1] = len(between), pose
    return found, cameras


def test_poses_are_those_of_a_plain_loop(job, expected):
    found, cameras = expected
    poses = pq.read_table(job.path("poses.parquet")).to_pylist()
    posed = 0
    for row in poses:
        key = (row["estimator"], round(row["threshold"], 3), row["image0"], row["image1"])
        if key not in found:
            assert row["reason"] is not None
            continue
        matches, pose = found.pop(key)
        assert row["matches"] == matches
        assert (row["reason"] is None) == (pose is not None)
        if pose is None:
            assert row["inliers"] == 0 and row["cam1_from_cam0"] is None and row["rotation_error"] is None
            continue
        posed += 1
        assert row["inliers"] == pose.inliers.sum()
        np.testing.assert_array_equal(np.array(row["cam1_from_cam0"]).reshape(3, 4), pose.cam1_from_cam0[:3])
        assert row["unrelated"] == (row["image0"][:3] != row["image1"][:3])
        if row["unrelated"]:
            assert row["rotation_error"] is None
            continue
        true = relative_pose(cameras[row["image0"]], cameras[row["image1"]])
        turned = pose.cam1_from_cam0[:3, :3].T @ true[:3, :3]
        angle = np.degrees(np.arccos(np.clip((np.trace(turned) - 1) / 2, -1, 1)))
        assert row["rotation_error"] == pytest.approx(angle, abs=1e-3)
    assert not found  # every pair, estimator and threshold has its row
    assert posed > 40


def test_what_has_no_pose_is_counted_by_reason(job, rooms):
    count = len(names(rooms))
    assert job.counts["pairs_unmatched"] == {"an image with itself": 1, "image in quarantine": 1, "unknown image": 1}
    reasons = job.counts["pairs_without_pose"]
    assert reasons["camera missing"] == count - 1
    assert reasons["fewer than 5 matches"] >= 1  # the blank image has no keypoints
    assert {"unknown image", "image in quarantine", "an image with itself"} <= set(reasons)
    assert job.counts["pairs_matched"] == count * (count - 1) // 2 + 1
    assert [name for name, _ in job.quarantined] == [BROKEN]
    summary = job.summary()
    assert "1 pairs not matched: unknown image" in summary
    assert f"no pose      {count - 1} pairs: camera missing" in summary


def test_results_are_written_for_people_and_for_programs(job, told):
    scores = json.loads(read(job, "metrics.json"))
    for estimator in ESTIMATORS:
        for protocol in ("paper", "fixed"):
            for degrees in (5, 10, 20):
                assert 0 <= scores[f"{protocol}/{estimator}/k1/auc@{degrees}"] <= 1
    assert scores["auc@5"] == scores["fixed/opencv/k1/auc@5"]
    assert (scores["estimator"], scores["threshold_px"], scores["protocol"]) == ("opencv", 1.5, "fixed")
    rows = pq.read_table(job.path("results.parquet")).to_pylist()
    assert {row["scene"] for row in rows} == {"one", "two", "(mean)", "(all)"}
    text = read(job, "results.md").decode()
    assert "fixed" in text and "paper" in text and "opencv_ransac" in text
    assert scores["left_out"] == 1  # the query without a camera


def test_the_same_again_computes_nothing(job, told):
    before = {name: read(job, name) for name in ("poses.parquet", "results.parquet", "results.md", "metrics.json")}
    again = pipeline.relative_pose(told)
    assert again.counts["extracted_now"] == again.counts["matched_now"] == again.counts["posed_now"] == 0
    assert {name: read(job, name) for name in before} == before


def test_other_shards_and_a_run_in_two_parts_give_the_same_bytes(job, told, rooms, tmp_path):
    """The pair list comes in two halves, in other shards: the first half is matched once only."""
    listed = pairs.read_given(told.pair_list)
    pq.write_table(listed.slice(0, listed.num_rows // 2), tmp_path / "half.parquet")
    other = dataclasses.replace(
        told, output=str(tmp_path / "run"), pair_list=str(tmp_path / "half.parquet"),
        matching=dataclasses.replace(told.matching, pair_shard_size=9, shard_size=5, batch_pairs=1),
    )  # fmt: skip
    half = pipeline.match(other)
    whole = pipeline.relative_pose(dataclasses.replace(other, pair_list=told.pair_list))
    assert half.counts["matched_now"] + whole.counts["matched_now"] == job.counts["pairs_matched"]
    assert half.counts["extracted_now"] + whole.counts["extracted_now"] == job.counts["extracted_now"]
    poses = [pq.read_table(each.path("poses.parquet")) for each in (job, whole)]
    assert poses[0].equals(poses[1])


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_when(happened, told, folder):
    """Run the job on the Ray of the tests; end it and its workers by SIGKILL as soon as `happened()`."""
    driver = Job("relative-pose", told, folder)
    try:
        driver.wait_until(happened)
    finally:
        driver.kill()
        kill_dataset_workers()


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes that Ray started in /proc")
def test_killed_matching_and_killed_posing_continue_and_leave_the_same_bytes(job, told, local_ray, tmp_path):
    """Killed twice: among the shards of matches, then among the parts of the poses."""
    undisturbed, output = Path(told.output), tmp_path / "run"
    again = dataclasses.replace(told, output=str(output), cluster=ClusterConfig(address=local_ray))
    kill_when(lambda: any((output / "matches").glob("shard-*.json")), again, tmp_path / "first")
    matched = {path.stem for path in (output / "matches").glob("shard-*.json")}
    assert 1 <= len(matched) < len([*(undisturbed / "matches").glob("shard-*.json")])
    kill_when(lambda: any(output.glob("poses-*/[0-9]*.parquet")), again, tmp_path / "second")
    posed = [*output.glob("poses-*/[0-9]*.parquet")]
    assert 1 <= len(posed) < len([*undisturbed.glob("poses-*/[0-9]*.parquet")])

    resumed = pipeline.relative_pose(again)
    assert resumed.counts["extracted_now"] == resumed.counts["matched_now"] == 0
    assert 0 < resumed.counts["posed_now"] < resumed.counts["pairs_matched"] == job.counts["pairs_matched"]
    for folder in ("features", "matches", *(path.name for path in undisturbed.glob("poses-*"))):
        assert bytes_of(output / folder) == bytes_of(undisturbed / folder)
    for name in ("poses.parquet", "results.parquet", "results.md", "metrics.json", "cameras.parquet"):
        assert (output / name).read_bytes() == (undisturbed / name).read_bytes()


def test_a_damaged_shard_of_features_costs_its_pairs_only_and_is_mended(job, told, tmp_path):
    shutil.copytree(told.output, tmp_path / "run")
    damaged = dataclasses.replace(told, output=str(tmp_path / "run"), matches=str(tmp_path / "other"))
    shard = tmp_path / "run" / "features" / "shard-00001.parquet"
    data = bytearray(shard.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4096] = bytes(4096)
    shard.write_bytes(bytes(data))
    broken = pipeline.relative_pose(damaged)
    assert broken.counts["pairs_without_pose"]["features unreadable"] == broken.counts["pairs_failed"] > 0
    assert broken.counts["pairs_failed"] < broken.counts["pairs_matched"]
    assert broken.metrics["judged"] == job.metrics["judged"]
    (tmp_path / "run" / "features" / "shard-00001.json").unlink()  # what the error of a damaged shard advises
    mended = pipeline.relative_pose(damaged)
    assert mended.counts["matched_now"] == broken.counts["pairs_failed"]
    poses = [pq.read_table(each.path("poses.parquet")) for each in (job, mended)]
    assert poses[0].equals(poses[1])


def test_features_of_another_method_are_refused(job, told):
    other = dataclasses.replace(told, matching=dataclasses.replace(told.matching, max_keypoints=100))
    with pytest.raises(StoreError, match="max_keypoints"):
        pipeline.match(other)


def test_names_that_match_nothing_are_refused_with_examples(told, tmp_path):
    write_list(tmp_path / "pairs.parquet", [("somewhere/a.jpg", "somewhere/b.jpg")])
    wrong = dataclasses.replace(told, pair_list=str(tmp_path / "pairs.parquet"), output=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"none of 1 pairs can be matched.*'somewhere/a\.jpg'.*'one/0000\.jpg'"):
        pipeline.match(wrong)


def test_without_cameras_the_job_does_not_start(told):
    with pytest.raises(ConfigError, match="relative-pose needs cameras="):
        pipeline.relative_pose(dataclasses.replace(told, cameras=None))
