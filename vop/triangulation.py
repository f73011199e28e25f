"""The 3D points of a world whose cameras are known: matched keypoints triangulated by COLMAP, poses left as they are.

Matches are checked against the known poses, not against estimated ones: a match is kept where each keypoint lies within
`EPIPOLAR_ERROR` of the epipolar line of the other, in pixels of its own image. The rest is COLMAP's triangulation, on
one thread, because the sums of its bundle adjustment depend on how they are split, and a map must have the same bytes
wherever it is made.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vop import colmap
from vop.cameras import load_pycolmap
from vop.geometry import invert

if TYPE_CHECKING:
    import pycolmap

EPIPOLAR_ERROR = 4.0  # pixels: what COLMAP takes for an inlier of a pair (TwoViewGeometryOptions.ransac.max_error)
SEED = 0


@dataclass(frozen=True, eq=False)
class PosedImage:
    """An image whose camera is known.

    keypoints: (n, 2) float32, pixels, centres at +0.5. camera: of images of this very size. cam_from_world: (4, 4).
    """

    keypoints: np.ndarray
    camera: colmap.ImageCamera
    cam_from_world: np.ndarray


@dataclass(frozen=True, eq=False)
class SeenPoints:
    """What an image sees of the map: m keypoints, by their rows (m,) int32, ascending, the points' ids (m,) int64, from
    1, and where they lie, xyz (m, 3) float64."""

    rows: np.ndarray
    ids: np.ndarray
    xyz: np.ndarray


def triangulate(
    images: Mapping[str, PosedImage], pairs: Iterable[tuple[str, str, np.ndarray]], min_angle: float
) -> dict[str, SeenPoints]:
    """Triangulate the matches of images in one world.

    images: by name. pairs: two names and their matches (m, 2), rows of keypoints. min_angle: smallest angle between two
    rays of a point, degrees. Returns the points that each image sees that sees any.
    """
    with tempfile.TemporaryDirectory(prefix="vop-map-") as folder:
        path = str(Path(folder) / "database.db")
        with colmap.database(path) as db:
            ids = colmap.add_images(db, {name: image.camera for name, image in images.items()})
            for _ in colmap.add_keypoints(db, ids, [((name, image.keypoints) for name, image in images.items())]):
                pass
            _add_pairs(db, ids, images, pairs)
            posed = _posed(db, ids, images)
        output = Path(folder) / "model"
        output.mkdir()
        with _quiet():
            model = load_pycolmap().triangulate_points(posed, path, folder, str(output), options=_options(min_angle))
        return dict(_seen(model, images))


def agreeing(
    rays0: np.ndarray, rays1: np.ndarray, cam1_from_cam0: np.ndarray, focal0: float, focal1: float
) -> np.ndarray:
    """Which matches agree with the relative pose (4, 4) of two images, (m,) bool; none of images at the same place.

    rays: (m, 3) float64, (x/z, y/z, 1) of the matched keypoints; NaN where there is none. focal: pixels.
    """
    E = essential(cam1_from_cam0)
    lines1, lines0 = rays0 @ E.T, rays1 @ E
    product = np.abs((rays1 * lines1).sum(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        error0, error1 = (
            focal * product / np.hypot(lines[:, 0], lines[:, 1])
            for lines, focal in ((lines0, focal0), (lines1, focal1))
        )
    return (error0 <= EPIPOLAR_ERROR) & (error1 <= EPIPOLAR_ERROR)  # False for NaN


def essential(cam1_from_cam0: np.ndarray) -> np.ndarray:
    """The essential matrix (3, 3) of a relative pose: x1 E x0 = 0 for rays x0, x1 to the same point."""
    x, y, z = cam1_from_cam0[:3, 3]
    return np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ cam1_from_cam0[:3, :3]


def _rays(camera: "pycolmap.Camera", keypoints: np.ndarray) -> np.ndarray:
    """(x/z, y/z, 1) of every keypoint, (n, 3); NaN where the camera model has no inverse."""
    points = camera.cam_from_img(keypoints.astype(np.float64)) if len(keypoints) else np.empty((0, 2))
    return np.concatenate([points, np.ones((len(points), 1))], axis=1)


def _add_pairs(db, ids: Mapping[str, int], images: Mapping[str, PosedImage], pairs) -> None:
    pycolmap = load_pycolmap()
    rays = lru_cache(colmap.CACHED_IMAGES)(lambda name: _rays(images[name].camera.camera, images[name].keypoints))
    with pycolmap.DatabaseTransaction(db):
        for name0, name1, matches in pairs:
            relative = images[name1].cam_from_world @ invert(images[name0].cam_from_world)
            focals = (images[name].camera.camera.mean_focal_length() for name in (name0, name1))
            good = agreeing(rays(name0)[matches[:, 0]], rays(name1)[matches[:, 1]], relative, *focals)
            geometry = pycolmap.TwoViewGeometry(
                config=pycolmap.TwoViewGeometryConfiguration.CALIBRATED,
                inlier_matches=matches[good].astype(np.uint32),
                cam2_from_cam1=pycolmap.Rigid3d(relative[:3]),
            )
            db.write_two_view_geometry(ids[name0], ids[name1], geometry)


def _posed(db, ids: Mapping[str, int], images: Mapping[str, PosedImage]) -> "pycolmap.Reconstruction":
    """The model without points: the cameras of the database, and its images at their known poses."""
    pycolmap = load_pycolmap()
    model = pycolmap.Reconstruction()
    for camera in db.read_all_cameras():
        model.add_camera_with_trivial_rig(camera)
    for name, number in ids.items():
        camera_id = db.read_image(number).camera_id
        image = pycolmap.Image(name=name, camera_id=camera_id, image_id=number)
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(images[name].cam_from_world[:3]))
    return model


def _options(min_angle: float) -> "pycolmap.IncrementalPipelineOptions":
    options = load_pycolmap().IncrementalPipelineOptions()
    options.triangulation.min_angle = options.mapper.filter_min_tri_angle = min_angle
    options.triangulation.ignore_two_view_tracks = False  # a database may be sparse, and its poses are trusted
    options.extract_colors = False
    options.num_threads = options.mapper.num_threads = 1
    options.random_seed = options.mapper.random_seed = options.triangulation.random_seed = SEED
    return options


@contextmanager
def _quiet() -> Iterator[None]:
    """Without COLMAP's account of every image, and its warnings that it has no file to take its colours from."""
    log = load_pycolmap().logging
    level, log.minloglevel = log.minloglevel, int(log.ERROR)
    try:
        yield
    finally:
        log.minloglevel = level


def _seen(model: "pycolmap.Reconstruction", images: Mapping[str, PosedImage]) -> Iterator[tuple[str, SeenPoints]]:
    xyz = {number: point.xyz for number, point in model.points3D.items()}
    for image in model.images.values():
        rows = np.array(image.get_observation_point2D_idxs(), np.int64)
        if not len(rows):
            continue
        points = image.get_observation_points2D()
        keypoints = images[image.name].keypoints
        if not np.array_equal(np.array([point.xy for point in points], np.float32), keypoints[rows]):
            raise AssertionError(f"COLMAP has numbered the keypoints of {image.name!r} anew: is another version used?")
        ids = [point.point3D_id for point in points]
        yield image.name, SeenPoints(rows.astype(np.int32), np.array(ids), np.array([xyz[number] for number in ids]))
