"""Poses of localized queries: errors, medians and recalls by hand; poses.txt and the names in it."""

import numpy as np
import pyarrow as pa
import pytest
from scipy.spatial.transform import Rotation

from vop.cameras import Cameras, KnownCamera
from vop.config import ConfigError
from vop.geometry import invert, pose_from_rt, project
from vop.pose.localized import (
    INDOOR,
    NO_PAIRS,
    OUTDOOR,
    RANSAC,
    REASONS,
    RECALLS,
    SCHEMA,
    UNJUDGED,
    center,
    check_written,
    errors,
    failures,
    judged,
    metrics,
    poses_of,
    quaternion,
    write_poses,
)
from vop.schema.localization import WRITTEN

INF = np.inf


def random_pose(seed, at=None):
    rng = np.random.default_rng(seed)
    R = Rotation.random(random_state=seed).as_matrix()
    return pose_from_rt(R, -R @ (rng.normal(size=3) if at is None else at))


def moved(pose, degrees, distance, seed=0):
    """A camera turned by `degrees` about a random axis where it stands, and then carried by `distance`."""
    axis, way = (each / np.linalg.norm(each) for each in np.random.default_rng(seed).normal(size=(2, 3)))
    turned = pose_from_rt(Rotation.from_rotvec(np.radians(degrees) * axis).as_matrix(), [0, 0, 0]) @ pose
    R, at = turned[:3, :3], invert(pose)[:3, 3] + distance * way
    return pose_from_rt(R, -R @ at)


def table_of(rows):
    """Rows (query, pose or reason, world) as a table of `SCHEMA`."""
    blank = dict.fromkeys(SCHEMA.names) | {"inliers": 0, "correspondences": 0, "pairs": 0, "matches": 0}
    lines = []
    for query, pose, world in rows:
        line = blank | {"query": query}
        if isinstance(pose, str):
            lines.append(line | {"reason": pose})
        else:
            lines.append(line | {"world": world, "cam_from_world": pose[:3].ravel().tolist(), "inliers": 50})
    return pa.Table.from_pylist(lines, schema=SCHEMA)


def known(name, pose, world=""):
    return KnownCamera(name, np.diag([500.0, 500, 1]), pose, world)


@pytest.mark.parametrize(("degrees", "distance"), [(0, 0), (1.5, 0.2), (170, 0), (0, 7), (90, 3)])
def test_errors_are_the_angle_and_the_distance_of_centres(degrees, distance):
    for seed in range(5):
        true = random_pose(seed)
        pose = moved(true, degrees, distance, seed)
        for shown in (pose, pose[:3]):
            rotation, translation = errors(shown, "", known("q", true))
            np.testing.assert_allclose((rotation, translation), (degrees, distance), atol=1e-9)


def test_errors_that_are_unknown_or_infinite():
    pose = random_pose(0)
    assert errors(pose, "w", None) == (None, None)
    assert errors(pose, "w", known("q", None, "w")) == (None, None)
    assert errors(None, None, known("q", None, "w")) == (None, None)
    assert errors(None, None, known("q", pose, "w")) == (INF, INF)
    assert errors(pose, "other", known("q", pose, "w")) == (INF, INF)
    assert errors(pose, "w", known("q", pose, "w")) == (0, 0)


def judged_example(moves, failed=0, elsewhere=0, unknown=0):
    """A judged table of queries that are off by `moves` (degrees, distance), and others."""
    rows, truth = [], []
    for number, (degrees, distance) in enumerate(moves):
        true = random_pose(number)
        rows.append((f"a{number}", moved(true, degrees, distance, number), "w"))
        truth.append(known(f"a{number}", true, "w"))
    rows += [(f"b{number}", RANSAC, None) for number in range(failed)]
    rows += [(f"c{number}", random_pose(number), "another") for number in range(elsewhere)]
    truth += [known(f"b{number}", random_pose(number), "w") for number in range(failed)]
    truth += [known(f"c{number}", random_pose(number), "w") for number in range(elsewhere)]
    rows += [(f"d{number}", random_pose(number), "w") for number in range(unknown)]
    return judged(table_of(rows), Cameras.of(truth))


def test_metrics_by_hand():
    moves = [(1, 0.1), (1.9, 0.24), (3, 0.2), (1, 0.4), (9, 0.2), (9, 4.9), (9.9, 0.9), (11, 0.1)]
    found = metrics(judged_example(moves, failed=1, elsewhere=1, unknown=2))
    assert found == {
        "queries": 12,
        "localized": 11,
        "median_inliers": 50.0,
        "judged": 10,
        "wrong_world": 1,
        "median_rotation_error": 9.0,  # 1 1 1.9 3 9 9 9.9 11 inf inf
        "median_translation_error": 0.32,  # 0.1 0.1 0.2 0.2 0.24 0.4 0.9 4.9 inf inf
        "recall@0.25m_2deg": 0.2,
        "recall@0.5m_5deg": 0.4,
        "recall@5m_10deg": 0.7,
        "recall@0.25m_10deg": 0.4,
        "recall@0.5m_10deg": 0.5,
        "recall@1m_10deg": 0.6,
    }


def test_the_benchmarks_classes():
    assert [*RECALLS] == [*OUTDOOR, *INDOOR]
    assert [*OUTDOOR.values()] == [(0.25, 2), (0.5, 5), (5, 10)]
    assert [*INDOOR.values()] == [(0.25, 10), (0.5, 10), (1, 10)]
    for key, (units, degrees) in RECALLS.items():
        assert key == f"recall@{units:g}m_{degrees}deg"


def test_failures_count_and_medians_may_be_infinite():
    found = metrics(judged_example([(1, 0.1)], failed=1))
    assert (found["median_rotation_error"], found["median_translation_error"]) == (None, None)
    assert found["recall@0.25m_2deg"] == 0.5
    found = metrics(judged_example([(1, 0.1), (2, 0.2)], failed=1))
    assert (found["median_rotation_error"], found["median_translation_error"]) == (2, 0.2)


@pytest.mark.parametrize("truth", [None, Cameras.of([]), Cameras.of([known("a", None)])])
def test_without_truth_nothing_is_judged_and_it_is_said(truth):
    table = judged(table_of([("a", random_pose(1), ""), ("b", NO_PAIRS, None)]), truth)
    assert table["rotation_error"].null_count == 2
    expected = {"queries": 2, "localized": 1, "median_inliers": 50.0, "judged": 0, "unjudged": UNJUDGED}
    assert metrics(table) == expected


def test_tables_of_no_query_and_of_no_pose():
    empty = judged(table_of([]), None)
    assert empty.schema.equals(SCHEMA)
    assert metrics(empty)["queries"] == 0
    table = judged(table_of([("a", NO_PAIRS, None), ("b", RANSAC, None), ("c", RANSAC, None)]), None)
    assert metrics(table)["median_inliers"] is None
    assert failures(table) == {RANSAC: 2, NO_PAIRS: 1}
    assert {*failures(table)} <= {*REASONS}


def read_back(path):
    """Names and poses of a list of poses, read by its description alone."""
    names, poses = [], []
    for line in path.read_text().splitlines():
        name, *values = line.split(" ")
        w, x, y, z, *t = map(float, values)
        names.append(name)
        poses.append(pose_from_rt(Rotation.from_quat([x, y, z, w]).as_matrix(), t))
        assert w >= 0
    return names, np.array(poses)


def test_poses_come_back_and_project_alike(tmp_path):
    half_turns = [pose_from_rt(np.diag(signs).astype(float), [1, 2, 3]) for signs in ([1, -1, -1], [-1, 1, -1])]
    poses = [random_pose(seed) for seed in range(30)] + [np.eye(4), *half_turns]
    rows = [(f"q/{number:02d}.jpg", pose, "") for number, pose in enumerate(poses)]
    rows += [("q/failed.jpg", RANSAC, None)]
    counts = write_poses(str(tmp_path / "poses.txt"), table_of(rows[::-1]), "name")
    names, back = read_back(tmp_path / "poses.txt")
    assert counts == {"poses_txt": len(poses)}
    assert names == [name for name, *_ in rows[:-1]]
    np.testing.assert_array_equal(back[:, :3, 3], np.array(poses)[:, :3, 3])
    np.testing.assert_allclose(back, poses, atol=1e-15)
    K, points = np.array([[3000.0, 0, 2000], [0, 3000, 1500], [0, 0, 1]]), np.random.default_rng(0).normal(size=(50, 3))
    for pose, other in zip(poses, back, strict=True):
        seen, again = (points @ each[:3, :3].T + each[:3, 3] for each in (pose, other))
        np.testing.assert_allclose(project(seen, K), project(again, K), atol=1e-5)
    assert "-0.0 " not in (tmp_path / "poses.txt").read_text()


def test_quaternions_are_those_of_pycolmap():
    pycolmap = pytest.importorskip("pycolmap")
    for seed in range(20):
        R = random_pose(seed)[:3, :3]
        x, y, z, w = pycolmap.Rotation3d(R).quat
        sign = 1 if w >= 0 else -1
        np.testing.assert_allclose(quaternion(R), sign * np.array([w, x, y, z]), atol=1e-12)


def test_a_pose_read_by_pycolmap_projects_onto_the_same_pixels(tmp_path):
    pycolmap = pytest.importorskip("pycolmap")
    camera = pycolmap.Camera(model="PINHOLE", width=640, height=480, params=[500, 510, 320.5, 240.25])
    pose = moved(np.eye(4), 20, 0.5, 3)
    write_poses(str(tmp_path / "poses.txt"), table_of([("q.jpg", pose, "")]), "name")
    _, *values = (tmp_path / "poses.txt").read_text().split()
    w, x, y, z, *t = map(float, values)
    rigid = pycolmap.Rigid3d(pycolmap.Rotation3d([x, y, z, w]), t)
    points = np.random.default_rng(1).normal([0, 0, 6], size=(40, 3))
    expected = project(points @ pose[:3, :3].T + pose[:3, 3], camera.calibration_matrix())
    np.testing.assert_allclose(camera.img_from_cam(rigid * points), expected, atol=1e-9)


@pytest.mark.parametrize(
    ("written", "expected"),
    [("name", ["a/b/1.jpg", "a/c/2.jpg", "x.jpg"]), ("basename", ["1.jpg", "2.jpg", "x.jpg"]),
     ("folder", ["b/1.jpg", "c/2.jpg", "x.jpg"])],
)  # fmt: skip
def test_names_in_the_list(tmp_path, written, expected):
    rows = [(name, np.eye(4), "") for name in ("x.jpg", "a/c/2.jpg", "a/b/1.jpg")]
    check_written([name for name, *_ in rows], written)
    write_poses(str(tmp_path / "poses.txt"), table_of(rows), written)
    assert read_back(tmp_path / "poses.txt")[0] == expected


def test_two_queries_of_one_name_are_told_before_the_work():
    check_written(["a/b/1.jpg", "a/c/1.jpg", "x/c/1.jpg"], "name")
    with pytest.raises(ConfigError) as error:
        check_written(["a/c/1.jpg", "a/b/1.jpg"], "basename")
    for part in ("'1.jpg': 'a/b/1.jpg' and 'a/c/1.jpg'", "localize.written=name or folder"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match=r"'c/1.jpg': 'a/c/1.jpg' and 'x/c/1.jpg'.*localize\.written=name, or"):
        check_written(["a/c/1.jpg", "x/c/1.jpg"], "folder")
    check_written(["a/b/1.jpg", "a/c/1.jpg"], "folder")
    assert WRITTEN == ("name", "basename", "folder")


def test_names_with_white_space_are_not_written(tmp_path):
    path = tmp_path / "poses.txt"
    path.write_text("of an older run")
    counts = write_poses(str(path), table_of([("my photos/1.jpg", np.eye(4), ""), ("2.jpg", np.eye(4), "")]), "name")
    assert counts == {"poses_txt": "not written: 1 names hold white space, the first 'my photos/1.jpg'"}
    assert not path.exists()
    counts = write_poses(str(path), table_of([("my photos/1.jpg", np.eye(4), "")]), "basename")
    assert read_back(path)[0] == ["1.jpg"]
    assert counts == {"poses_txt": 1}


def test_centres_and_poses_of_a_table():
    poses = np.array([random_pose(seed) for seed in range(4)])
    np.testing.assert_allclose(center(poses[:, :3]), [invert(pose)[:3, 3] for pose in poses], atol=1e-12)
    table = table_of([("a", poses[0], ""), ("b", RANSAC, None)])
    np.testing.assert_array_equal(poses_of(table)[0], poses[0][:3])
    assert np.isnan(poses_of(table)[1]).all()
    assert poses_of(table_of([])).shape == (0, 3, 4)
