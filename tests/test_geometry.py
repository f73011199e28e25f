"""Cameras and overlap against results worked out by hand."""

import json
import math

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vop.datasets.posed import (
    OverlapTruth,
    PosedFolder,
    decode_depth,
    encode_depth,
    overlap_truth,
    read_overlap,
    write_cameras,
    write_overlap,
)
from vop.geometry import (
    Camera,
    invert,
    overlap,
    overlap_matrix,
    pixel_centers,
    project,
    relative_pose,
    symmetric_overlap,
    transform,
    unproject,
)

K = np.array([[100.0, 0, 40], [0, 100, 30], [0, 0, 1]])
WIDTH, HEIGHT = 80, 60


def camera_at(x=0.0, y=0.0, z=0.0, K=K, width=WIDTH, height=HEIGHT) -> Camera:
    return Camera.from_rt(K, np.eye(3), [-x, -y, -z], width, height)


def wall(distance: float, width=WIDTH, height=HEIGHT) -> np.ndarray:
    return np.full((height, width), distance, np.float32)


def rotation(axis, angle) -> np.ndarray:
    return cv2.Rodrigues(np.array(axis, float) / np.linalg.norm(axis) * angle)[0]


def test_pixel_centres_lie_at_a_half():
    assert pixel_centers(3, 2)[1, 2].tolist() == [2.5, 1.5]
    points = unproject(wall(2.0), K)
    np.testing.assert_allclose(points[0, 0], [(0.5 - 40) / 100 * 2, (0.5 - 30) / 100 * 2, 2.0])


def test_axes_are_right_down_forward():
    assert project(np.array([[0.1, 0.0, 1.0], [0.0, 0.1, 1.0]]), K).tolist() == [[50.0, 30.0], [40.0, 40.0]]


def test_points_behind_the_camera_have_no_pixel():
    assert np.isnan(project(np.array([[0.1, 0.1, -1.0], [0.0, 0.0, 0.0]]), K)).all()


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_projection_round_trip(seed):
    rng = np.random.default_rng(seed)
    depth = rng.uniform(0.1, 50, (7, 9))
    skewed = np.array([[rng.uniform(5, 50), rng.normal(), 4.2], [0, rng.uniform(5, 50), 3.1], [0, 0, 1]])
    np.testing.assert_allclose(project(unproject(depth, skewed), skewed), pixel_centers(9, 7), atol=1e-9)


def test_poses_read_right_to_left():
    camera0 = Camera.from_rt(K, rotation([1, 2, 3], 0.7), [1, 2, 3], WIDTH, HEIGHT)
    camera1 = Camera.from_rt(K, rotation([3, -1, 1], -0.4), [0, -2, 1], WIDTH, HEIGHT)
    world = np.array([0.3, -0.4, 5.0])
    in0, in1 = transform(camera0.cam_from_world, world), transform(camera1.cam_from_world, world)
    np.testing.assert_allclose(transform(relative_pose(camera0, camera1), in0), in1)
    np.testing.assert_allclose(invert(camera0.cam_from_world) @ camera0.cam_from_world, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(transform(camera0.cam_from_world, camera0.center), 0, atol=1e-12)


def test_a_resized_camera_sees_the_same_rays():
    small = camera_at().resized(40, 20)
    point = np.array([0.2, 0.1, 3.0])
    np.testing.assert_allclose(project(point, small.K), project(point, K) * [40 / 80, 20 / 60])


@pytest.mark.parametrize(
    ("R", "message"),
    [(2 * np.eye(3), "no rotation"), (np.diag([1, 1, -1]), "mirrored"), (np.eye(2), "shape|broadcast")],
)
def test_a_pose_that_is_none_is_refused(R, message):
    with pytest.raises(ValueError, match=message):
        Camera.from_rt(K, R, [0, 0, 0], WIDTH, HEIGHT)


@pytest.mark.parametrize("columns", [0, 8, 20, 79, 80])
def test_a_wall_seen_with_a_shift(columns):
    """A fronto-parallel wall at 2 m: moving by `columns` * 2/100 m moves it by exactly that many columns."""
    moved = camera_at(x=columns * 2 / 100)
    expected = (WIDTH - columns) / WIDTH
    assert overlap(wall(2), camera_at(), wall(2), moved) == pytest.approx(expected)
    assert overlap(wall(2), moved, wall(2), camera_at()) == pytest.approx(expected)


def test_a_wall_seen_from_nearer_is_not_symmetric():
    """From 1 m the image shows the middle half of what it shows from 2 m, each way: a quarter of its pixels."""
    far, near = camera_at(), camera_at(z=1)
    assert overlap(wall(2), far, wall(1), near) == pytest.approx(0.25)
    assert overlap(wall(1), near, wall(2), far) == 1.0
    assert symmetric_overlap(wall(1), near, wall(2), far) == pytest.approx(0.25)


@pytest.mark.parametrize(("found", "expected"), [(2.2, 1.0), (2.25, 0.0), (1.83, 1.0), (1.8, 0.0), (0.0, 0.0)])
def test_depth_must_agree_within_a_tenth_of_the_depth_found(found, expected):
    assert overlap(wall(2), camera_at(), wall(found), camera_at()) == expected


def test_only_pixels_with_depth_count():
    half = wall(2)
    half[:, : WIDTH // 2] = 0
    assert overlap(half, camera_at(), wall(2), camera_at()) == 1.0
    assert overlap(wall(2), camera_at(), half, camera_at()) == pytest.approx(0.5)
    assert overlap(wall(0), camera_at(), wall(2), camera_at()) == 0.0


def test_a_camera_that_looks_away_sees_nothing():
    away = Camera.from_rt(K, rotation([0, 1, 0], math.pi), [0, 0, 0], WIDTH, HEIGHT)
    assert overlap(wall(2), camera_at(), wall(2), away) == 0.0


def test_the_matrix_agrees_with_the_pairs():
    rng = np.random.default_rng(0)
    cameras = [camera_at(*rng.uniform(-0.5, 0.5, 2)) for _ in range(4)]
    cameras.append(camera_at(0.1, K=K.copy(), width=60, height=80))
    depths = [wall(2, c.width, c.height) + rng.uniform(0, 0.1, (c.height, c.width)).astype(np.float32) for c in cameras]
    views = list(zip(depths, cameras, strict=True))
    exact = np.array([[symmetric_overlap(*view0, *view1) for view1 in views] for view0 in views])
    full = overlap_matrix(depths, cameras, samples=WIDTH * HEIGHT)
    assert full.dtype == np.float32
    np.testing.assert_allclose(full, exact, atol=1e-7)
    np.testing.assert_allclose(overlap_matrix(depths, cameras, samples=300), exact, atol=0.06)
    np.testing.assert_array_equal(full, full.T)


def test_depth_of_the_wrong_size_is_refused():
    with pytest.raises(ValueError, match=r"image 1 has shape \(60, 40\).*\(60, 80\)"):
        overlap_matrix([wall(1), wall(1, width=40)], [camera_at(), camera_at()])
    with pytest.raises(ValueError, match="1 depth maps for 2 cameras"):
        overlap_matrix([wall(1)], [camera_at(), camera_at()])


def write_folder(path, shifts, depth=True):
    cameras = {f"a/{n}.png": camera_at(x=x) for n, x in enumerate(shifts)}
    write_cameras(path, cameras)
    (path / "a").mkdir()
    for name in cameras:
        cv2.imwrite(str(path / name), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
        if depth:
            (path / name).with_suffix(".depth.png").write_bytes(encode_depth(wall(2)))
    return cameras


def test_a_posed_folder(tmp_path):
    cameras = write_folder(tmp_path, [0, 0.4, 5])
    folder = PosedFolder.open(tmp_path)
    assert folder.names == tuple(cameras)
    np.testing.assert_array_equal(folder.camera("a/1.png").cam_from_world, cameras["a/1.png"].cam_from_world)
    assert folder.image("a/0.png").shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(folder.depth("a/2.png"), wall(2))
    truth = overlap_truth(tmp_path)
    expected = np.array([[1, 0.75, 0], [0.75, 1, 0], [0, 0, 1]])
    np.testing.assert_allclose(truth.matrix, expected, atol=0.02)  # on a grid of samples
    with pytest.raises(KeyError, match=r"missing.png"):
        folder.camera("missing.png")


def test_sizes_come_from_the_images_where_the_file_has_none(tmp_path):
    write_folder(tmp_path, [0])
    entries = json.loads((tmp_path / "cameras.json").read_text())
    for entry in entries.values():
        del entry["width"]
    (tmp_path / "cameras.json").write_text(json.dumps(entries))
    camera = PosedFolder.open(tmp_path).cameras[0]
    assert (camera.width, camera.height) == (WIDTH, HEIGHT)


def test_images_may_lie_in_a_subfolder(tmp_path):
    write_folder(tmp_path, [0])
    (tmp_path / "a").rename(tmp_path / "moved")
    (tmp_path / "images").mkdir()
    (tmp_path / "moved").rename(tmp_path / "images" / "a")
    assert PosedFolder.open(tmp_path).depth("a/0.png")[0, 0] == 2


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no cameras.json"):
        PosedFolder.open(tmp_path)
    write_folder(tmp_path, [0, 1, 2])
    (tmp_path / "a" / "1.depth.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images .*a/1.png.*a/1.depth.png"):
        overlap_truth(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"a/1.png has no depth"):
        PosedFolder.open(tmp_path).depth("a/1.png")
    (tmp_path / "a" / "2.depth.png").write_bytes(encode_depth(wall(2, width=40)))
    with pytest.raises(ValueError, match="40x60 pixels, its image 80x60"):
        PosedFolder.open(tmp_path).depth("a/2.png")
    (tmp_path / "cameras.json").write_text('{"a/0.png": {"K": 1}}')
    with pytest.raises(ValueError, match=r"a/0.png in cameras.json lacks \['R', 't'\]"):
        PosedFolder.open(tmp_path)
    (tmp_path / "cameras.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        PosedFolder.open(tmp_path)


def test_depth_png_round_trip():
    depth = np.array([[0.0, 0.001, 1.2344], [65.535, 65.6, 2.0]])
    decoded = decode_depth(encode_depth(depth))
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded, [[0, 0.001, 1.234], [65.535, 0, 2.0]], rtol=1e-6)


@pytest.mark.parametrize("data", [b"", b"no image", cv2.imencode(".png", np.zeros((4, 4), np.uint8))[1].tobytes()])
def test_what_is_no_depth_map_is_refused(data):
    with pytest.raises(ValueError, match="expected a 16-bit single-channel PNG"):
        decode_depth(data)


def test_overlap_file_round_trip(tmp_path):
    truth = OverlapTruth(("b.jpg", "a.jpg", "lonely.jpg"), np.array([[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]], np.float32))
    write_overlap(tmp_path / "overlap.parquet", truth)
    read = read_overlap(tmp_path / "overlap.parquet")
    assert read.names == truth.names
    np.testing.assert_array_equal(read.matrix.toarray(), truth.matrix)
    table = pq.read_table(tmp_path / "overlap.parquet")
    assert table.column_names == ["query", "database", "overlap"]
    assert table.num_rows == 2
    assert table.schema.field("overlap").type == pa.float32()
    assert overlap_truth(tmp_path).names == overlap_truth(tmp_path / "overlap.parquet").names == truth.names


def test_overlap_files_of_other_origin(tmp_path):
    path = tmp_path / "overlap.parquet"
    pq.write_table(pa.table({"query": ["b"], "database": ["a"], "overlap": [0.25]}), path)
    read = read_overlap(path)
    assert read.names == ("a", "b")
    assert read.matrix.toarray().tolist() == [[1.0, 0.0], [0.25, 1.0]]
    pq.write_table(pa.table({"query": ["b", "b"], "database": ["a", "a"], "overlap": [0.25, 0.5]}), path)
    assert read_overlap(path).matrix[[1], [0]] == 0.25  # the first of several
    pq.write_table(pa.table({"query": ["b"], "database": ["a"]}), path)
    with pytest.raises(ValueError, match="overlap"):
        read_overlap(path)
    with pytest.raises(FileNotFoundError, match="no overlap file"):
        read_overlap(tmp_path / "none.parquet")
