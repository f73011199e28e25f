"""The table of known cameras, and finding cameras.json files and COLMAP models that speak of a collection."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import trees

from vop.cameras import Cameras, CamerasError, KnownCamera, load_pycolmap
from vop.config import load
from vop.datasets.benchmark import open_benchmark
from vop.datasets.camera_sources import open_cameras

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def known(name: str, index: int = 0, **changes) -> KnownCamera:
    fields = {
        "K": trees.calibration(index),
        "cam_from_world": trees.pose(index),
        "world": "w",
        "width": 40,
        "height": 30,
    }
    return KnownCamera(name, **(fields | changes))


def test_the_table_keeps_what_it_is_given(tmp_path):
    rows = [
        known("b/2.jpg", 2, model="RADIAL", params=(50.0, 20, 15, -0.1, 0.01)),
        known("a.jpg", K=None, width=None, height=None),
        known("b/1.jpg", 1, cam_from_world=None),
    ]
    Cameras.of(rows).write(str(tmp_path / "new" / "cameras.parquet"))
    read = Cameras.read(str(tmp_path / "new" / "cameras.parquet"))
    assert read.names == ["a.jpg", "b/1.jpg", "b/2.jpg"]
    for row in rows:
        found = read.get(row.name)
        for field in ("world", "width", "height", "model", "params"):
            assert getattr(found, field) == getattr(row, field)
        for field in ("K", "cam_from_world"):
            np.testing.assert_equal(getattr(found, field), getattr(row, field))
    assert read.get("c.jpg") is None
    assert "b/1.jpg" in read and "c.jpg" not in read


def test_a_worker_reads_only_the_row_groups_that_hold_its_names(tmp_path, monkeypatch):
    names = [f"{index:05d}.jpg" for index in range(3000)]
    path = str(tmp_path / "cameras.parquet")
    Cameras.of(known(name, K=None, cam_from_world=None) for name in names).write(path)
    groups = []
    original = pq.ParquetFile.read_row_groups
    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", lambda s, g: groups.append(g) or original(s, g))
    assert Cameras.read(path, ["02500.jpg", "00001.jpg", "none.jpg"]).names == ["00001.jpg", "02500.jpg"]
    assert groups == [[0, 2]]
    assert len(Cameras.read(path, [])) == 0


def test_relative_pose_moves_points_from_one_camera_to_the_other():
    cameras = Cameras.of(
        [known("0", 0), known("1", 1), known("far", 2, world="other"), known("lost", cam_from_world=None)]
    )
    np.testing.assert_allclose(cameras.relative("0", "1"), trees.true_relative(0, 1), atol=1e-12)
    np.testing.assert_allclose(cameras.relative("1", "0"), trees.true_relative(1, 0), atol=1e-12)
    assert cameras.relative("0", "far") is None
    assert cameras.relative("0", "lost") is None
    assert cameras.relative("0", "absent") is None


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"cam_from_world": trees.pose(1) * 2}, "holds no rotation"),
        ({"cam_from_world": np.diag([0.0, 0, 0, 1])}, "holds no rotation"),
        ({"cam_from_world": np.diag([-1.0, 1, 1, 1])}, "determinant -1"),
        ({"cam_from_world": trees.pose(1).T}, "last row of cam_from_world"),
        ({"cam_from_world": np.full((4, 4), np.nan)}, "finite"),
        ({"K": trees.calibration().T}, "is it transposed"),
        ({"K": np.zeros((3, 3))}, "fx, fy above 0"),
        ({"K": np.full((3, 3), np.nan)}, "finite"),
        ({"width": 0}, "at least 1"),
    ],
)
def test_a_malformed_camera_is_refused_by_name_and_costs_no_other(tmp_path, changes, complaint):
    Cameras.of([known("a.jpg"), known("x/7.jpg", 1, **changes)]).write(str(tmp_path / "cameras.parquet"))
    cameras = open_cameras(str(tmp_path / "cameras.parquet"), "/photos", ["a.jpg", "x/7.jpg"])
    np.testing.assert_array_equal(cameras.get("a.jpg").K, trees.calibration())
    assert cameras.worlds == {"a.jpg": "w", "x/7.jpg": "w"}
    for asked in (cameras.check, lambda: cameras.get("x/7.jpg"), lambda: cameras.relative("a.jpg", "x/7.jpg")):
        with pytest.raises(CamerasError, match=rf"camera of 'x/7.jpg': .*{complaint}"):
            asked()


def test_matrices_of_another_shape_are_refused_at_once():
    for changes in ({"K": np.eye(2)}, {"cam_from_world": np.eye(4)[:3]}):
        with pytest.raises(CamerasError, match=r"camera of 'x/7.jpg': .* has shape \(.*\); expected \("):
            known("x/7.jpg", **changes)


def test_two_cameras_of_one_image_are_refused():
    with pytest.raises(CamerasError, match=r"'a.jpg' has two cameras, of the worlds 'castle' and 'door'"):
        Cameras.of([known("a.jpg", world="castle"), known("b.jpg"), known("a.jpg", world="door")])


def test_a_reduced_image_scales_the_calibration():
    camera = known("a.jpg", width=400, height=300).fitted(80, 60)
    np.testing.assert_allclose(camera.K, np.diag([0.2, 0.2, 1]) @ trees.calibration())
    assert (camera.width, camera.height) == (80, 60)
    assert known("a.jpg", width=1001, height=667).fitted(500, 333).width == 500  # sides are rounded
    unsized = known("a.jpg", width=None, height=None).fitted(7, 5)
    np.testing.assert_array_equal(unsized.K, trees.calibration())
    for turned in ((30, 40), (40, 25)):
        with pytest.raises(CamerasError, match="turned or cropped"):
            known("a.jpg", width=400, height=300).fitted(*(10 * side for side in turned))


def test_distortion_is_removed_by_colmaps_formula():
    pytest.importorskip("pycolmap", reason="the extra localize is not installed")
    K = np.array([[50.0, 0, 20], [0, 50, 15], [0, 0, 1]])
    camera = known("a.jpg", K=K, model="SIMPLE_RADIAL", params=(50.0, 20, 15, -0.08))
    plain = np.array([[3.0, 4.0], [20, 15], [39, 28]])
    ray = (plain - [20, 15]) / 50
    distorted = ray * (1 - 0.08 * (ray**2).sum(axis=1, keepdims=True)) * 50 + [20, 15]
    np.testing.assert_allclose(camera.undistorted(distorted), plain, atol=1e-6)
    np.testing.assert_allclose(camera.fitted(20, 15).undistorted(distorted / 2), plain / 2, atol=1e-6)
    np.testing.assert_array_equal(known("a.jpg").undistorted(plain), plain)


def test_another_generation_of_pycolmap_is_refused(monkeypatch):
    pycolmap = pytest.importorskip("pycolmap", reason="the extra localize is not installed")
    monkeypatch.setattr(pycolmap, "__version__", "3.11.1")
    with pytest.raises(ImportError, match=r"pycolmap 3.11.1 is installed, but 4.1 up to 5.*vop\[localize\]"):
        load_pycolmap()


NAMES = ["0000.jpg", "0001.jpg"]


@pytest.mark.parametrize(
    ("cameras", "images", "prefix"),
    [
        ("a/cameras.json", "a", ""),  # beside the images
        ("a/cameras.json", "", "a/"),
        ("a/cameras.json", "a/images", ""),  # the images in images/
        ("calibration/a/cameras.json", "photos", "a/"),  # a tree of its own beside the images
    ],
)
def test_names_are_found_wherever_the_root_lies(tmp_path, cameras, images, prefix):
    trees.cameras_json(tmp_path / cameras, NAMES)
    root = str(tmp_path / images).rstrip("/")
    source = tmp_path / cameras.split("/")[0] if cameras.startswith("calibration") else tmp_path / cameras
    found = open_cameras(str(source), root, [prefix + name for name in NAMES] + ["without.jpg"])
    assert found.names == [prefix + name for name in NAMES]
    assert found.get(f"{prefix}0001.jpg").world == "a"
    np.testing.assert_allclose(found.relative(*found.names), trees.true_relative(0, 1), atol=1e-12)
    with pytest.raises(CamerasError, match=r"no image has a camera: .* holds 2, such as that of '0000.jpg'"):
        open_cameras(str(source), root, ["elsewhere/0000.png"])


def test_scenes_with_equal_file_names_are_worlds_of_their_own(tmp_path):
    for scene in ("castle", "door"):
        trees.cameras_json(tmp_path / scene / "cameras.json", NAMES, sized=scene == "door")
        for name in NAMES:
            trees.picture(tmp_path / scene / "images" / name)
    both = open_benchmark(load([], images=str(tmp_path), cameras=str(tmp_path))).cameras
    assert both.names == [f"{scene}/images/{name}" for scene in ("castle", "door") for name in NAMES]
    assert both.relative("castle/images/0000.jpg", "door/images/0001.jpg") is None
    assert both.get("castle/images/0000.jpg").width is None
    one = open_benchmark(load([], images=str(tmp_path / "door" / "images"), cameras=str(tmp_path))).cameras
    assert [(camera.name, camera.world) for camera in one] == [("0000.jpg", "door"), ("0001.jpg", "door")]


def test_sources_without_cameras_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no cameras at"):
        open_cameras(str(tmp_path / "none"), str(tmp_path), ["a"])
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(CamerasError, match=r"neither cameras.json nor a COLMAP model"):
        open_cameras(str(tmp_path), str(tmp_path), ["a"])
    (tmp_path / "cameras.json").write_text('{"a.jpg": {"K": [[1]], "R": 3}}')
    with pytest.raises(ValueError, match=r"a.jpg in cameras.json lacks \['t'\]"):
        open_cameras(str(tmp_path), str(tmp_path), ["a.jpg"])


def test_a_table_written_earlier_is_a_source(tmp_path):
    Cameras.of([known("a.jpg")]).write(str(tmp_path / "cameras.parquet"))
    assert open_cameras(str(tmp_path / "cameras.parquet"), "/photos", ["a.jpg"]).names == ["a.jpg"]
    with pytest.raises(CamerasError, match=r"such as that of 'a.jpg'.* such as 'b.jpg'"):
        open_cameras(str(tmp_path / "cameras.parquet"), "/photos", ["b.jpg"])


@pytest.mark.skipif(not DATA.exists(), reason=f"no real photographs at {DATA}")
@pytest.mark.parametrize(
    ("images", "cameras", "count", "worlds"),
    [
        ("strecha", "strecha", 66, {"castle-P30", "fountain-P11", "Herz-Jesus-P25"}),
        ("lund_door/images", "lund_door/model", 12, {"model"}),
        ("rgbd_office", "rgbd_office", 93, {"rgbd_office"}),
    ],
)
def test_every_real_photograph_gets_its_camera(images, cameras, count, worlds):
    if cameras.endswith("model"):
        pytest.importorskip("pycolmap", reason="the extra localize is not installed")
    opened = open_benchmark(load([], images=str(DATA / images), cameras=str(DATA / cameras)))
    assert opened.cameras.names == opened.sets.names
    assert len(opened.cameras) == count
    assert {camera.world for camera in opened.cameras} == worlds
