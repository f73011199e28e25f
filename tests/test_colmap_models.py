"""COLMAP models as a source of cameras and shared points: text and binary, with and without rigs and frames."""

import numpy as np
import pytest

pytest.importorskip("pycolmap", reason="needs the extra localize")

from vop.cameras import load_pycolmap
from vop.datasets import colmap
from vop.datasets.camera_sources import open_cameras, open_points

SIDE = np.array([[1, 0, 0, -0.2], [0, 1, 0, 0], [0, 0, 1, 0.0]])  # right_from_left: 0.2 to the right
NAMES = ["left/0.jpg", "left/1.jpg", "right/0.jpg", "right/1.jpg"]


def turned(angle: float, shift: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s, shift], [0, 1, 0, 0.1], [-s, 0, c, 2 * shift]])


POSES = {f"left/{i}.jpg": turned(0.3 * i, i + 0.5) for i in (0, 1)}
POSES |= {f"right/{i}.jpg": SIDE[:, :3] @ POSES[f"left/{i}.jpg"] + np.array([[0, 0, 0, -0.2], [0] * 4, [0] * 4])
          for i in (0, 1)}  # fmt: skip


def model(rigged: bool):
    """Two stereo pairs as a reconstruction: as frames of one rig that has poses, or as four images with their own."""
    pycolmap = load_pycolmap()
    made = pycolmap.Reconstruction()
    cameras = [
        pycolmap.Camera(model="PINHOLE", width=640, height=480, params=[500, 510, 320, 240], camera_id=1),
        pycolmap.Camera(model="OPENCV", width=640, height=480, params=[450, 450, 315, 245, 0.1, 0, 0, 0], camera_id=2),
    ]
    if rigged:
        rig = pycolmap.Rig(rig_id=1)
        rig.add_ref_sensor(cameras[0].sensor_id)
        rig.add_sensor(cameras[1].sensor_id, pycolmap.Rigid3d(SIDE))
    for camera in cameras:
        (made.add_camera if rigged else made.add_camera_with_trivial_rig)(camera)
    if rigged:
        made.add_rig(rig)
    images = {}
    for number, name in enumerate(NAMES, 1):
        points = [pycolmap.Point2D([10.0 * i + number, 20.0]) for i in range(4)]
        images[name] = pycolmap.Image(name=name, points2D=points, camera_id=1 + (number > 2), image_id=number)
    for frame_id in (1, 2):
        mine = [images[f"left/{frame_id - 1}.jpg"], images[f"right/{frame_id - 1}.jpg"]]
        if rigged:
            frame = pycolmap.Frame(frame_id=frame_id, rig_id=1)
            for image in mine:
                frame.add_data_id(image.data_id)
                image.frame_id = frame_id
            frame.rig_from_world = pycolmap.Rigid3d(POSES[mine[0].name])
            made.add_frame(frame)
            made.register_frame(frame_id)
        for image in mine:
            if rigged:
                made.add_image(image)
            else:
                made.add_image_with_trivial_frame(image, pycolmap.Rigid3d(POSES[image.name]))
    for point, seen in enumerate([(1, 2, 3), (1, 2), (2, 3), (3, 4)]):
        track = pycolmap.Track()
        for image_id in seen:
            track.add_element(image_id, point)
        made.add_point3D(np.array([point, 0.0, 9.0]), track)
    return made


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize(("rigged", "old"), [(True, False), (False, False), (False, True)])
def test_every_form_of_a_model_gives_the_same_cameras_and_points(tmp_path, rigged, text, old):
    folder = tmp_path / "sparse"
    folder.mkdir()
    (model(rigged).write_text if text else model(rigged).write_binary)(str(folder))
    extra = [path for path in folder.iterdir() if path.stem in ("rigs", "frames")]
    assert len(extra) == 2
    for path in extra if old else ():  # COLMAP before 3.12 wrote none
        path.unlink()
    known = open_cameras(str(folder), str(tmp_path / "images"), NAMES)
    assert known.names == NAMES
    for camera in known:
        assert np.allclose(camera.cam_from_world[:3], POSES[camera.name], atol=1e-9)
        assert camera.world == "sparse"
        assert camera.model == (None if "left" in camera.name else "OPENCV")
        assert np.allclose(camera.K[0], [500, 0, 320] if "left" in camera.name else [450, 0, 315])
    points = open_points(str(folder), str(tmp_path / "images"), NAMES).sort_by("name")
    assert points["name"].to_pylist() == NAMES
    assert [len(ids) for ids in points["id"].to_pylist()] == [2, 3, 3, 1]


def test_points_stand_under_the_names_of_the_collection(tmp_path):
    for scene in ("one", "two"):
        (tmp_path / "models" / scene).mkdir(parents=True)
        model(False).write_binary(str(tmp_path / "models" / scene))
    names = [f"{scene}/{name}" for scene in ("one", "two") for name in NAMES[:3]]
    points = open_points(str(tmp_path / "models"), str(tmp_path / "images"), names)
    assert sorted(points["name"].to_pylist()) == sorted([*names, "one/right/1.jpg", "two/right/1.jpg"])
    listed = colmap.covisible(points, names, 5).to_pylist()
    assert {pair["query"].split("/")[0] == pair["database"].split("/")[0] for pair in listed} == {True}
    assert [pair for pair in listed if pair["query"] == "one/left/1.jpg"] == [
        {"query": "one/left/1.jpg", "database": "one/left/0.jpg", "rank": 0},  # both share two points: by name
        {"query": "one/left/1.jpg", "database": "one/right/0.jpg", "rank": 1},
    ]
    assert colmap.covisible(points, names, 1).num_rows == 6
    assert colmap.covisible(colmap.POINTS.empty_table(), names, 1).num_rows == 0
