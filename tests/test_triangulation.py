"""Maps triangulated at known poses, against the exact depth of rendered images and against projections by hand."""

import numpy as np
import pytest

pytest.importorskip("pycolmap", reason="needs the extra localize")

from vop import colmap
from vop.cameras import KnownCamera, load_pycolmap
from vop.datasets import rendered
from vop.geometry import invert, pose_from_rt, project, transform, unproject
from vop.triangulation import EPIPOLAR_ERROR, PosedImage, agreeing, triangulate


def posed_image(name: str, keypoints: np.ndarray, camera: KnownCamera) -> PosedImage:
    size = camera.width, camera.height
    return PosedImage(keypoints.astype(np.float32), colmap.known_camera(camera, size), camera.cam_from_world)


def known(name: str, camera, **more) -> KnownCamera:
    return KnownCamera(name, camera.K, camera.cam_from_world, "w", camera.width, camera.height, **more)


@pytest.fixture(scope="module")
def frames():
    """Frames of one room that see some of the same walls."""
    scene = rendered.scene_for(10)
    return [rendered.render_frame(scene, index, 160, 120, 0, mixed=False) for index in range(4)]


def exact_matches(frames) -> tuple[dict, dict, dict]:
    """Keypoints of every frame, their true world points, and the exact matches of pairs: frame 0's pixels, and where
    the others see them."""
    rng = np.random.default_rng(0)
    first = frames[0]
    points = transform(invert(first.camera.cam_from_world), unproject(first.depth, first.camera.K)).reshape(-1, 3)
    points = points[(first.depth > 0).ravel()][::37]
    keypoints, seen = {}, {}
    for frame in frames:
        pixels = project(transform(frame.camera.cam_from_world, points), frame.camera.K)
        inside = (pixels > 1).all(axis=1) & (pixels < [159, 119]).all(axis=1)
        order = rng.permutation(np.flatnonzero(inside))
        keypoints[frame.name], seen[frame.name] = pixels[order], order
    return keypoints, seen, {frame.name: points[seen[frame.name]] for frame in frames}


def all_pairs(seen: dict):
    names = sorted(seen)
    for i, name0 in enumerate(names):
        for name1 in names[i + 1 :]:
            _, rows0, rows1 = np.intersect1d(seen[name0], seen[name1], return_indices=True)
            yield name0, name1, np.stack([rows0, rows1], axis=1)


def test_points_lie_on_the_surface_and_rows_are_those_of_the_keypoints(frames):
    keypoints, seen, truth = exact_matches(frames)
    images = {frame.name: posed_image(frame.name, keypoints[frame.name], known(frame.name, frame.camera))
              for frame in frames}  # fmt: skip
    found = triangulate(images, all_pairs(seen), 1.0)
    assert sum(len(points.rows) for points in found.values()) > 300
    for name, points in found.items():
        errors = np.linalg.norm(points.xyz - truth[name][points.rows], axis=1)
        assert np.median(errors) < 1e-3  # metres: keypoints are rounded to float32, and rays meet at small angles
        assert (np.diff(points.rows) > 0).all()
    again = triangulate(images, all_pairs(seen), 1.0)
    assert all(np.array_equal(found[name].xyz, again[name].xyz) for name in found)


def test_wrong_matches_make_no_points(frames):
    keypoints, seen, _ = exact_matches(frames)
    images = {frame.name: posed_image(frame.name, keypoints[frame.name], known(frame.name, frame.camera))
              for frame in frames}  # fmt: skip
    rng = np.random.default_rng(1)
    wrong = [(name0, name1, np.stack([rng.permutation(pair[:, 0]), pair[:, 1]], axis=1))
             for name0, name1, pair in all_pairs(seen)]  # fmt: skip
    right = {name: len(points.rows) for name, points in triangulate(images, all_pairs(seen), 1.0).items()}
    left = {name: len(points.rows) for name, points in triangulate(images, wrong, 1.0).items()}
    assert sum(left.values()) < 0.15 * sum(right.values())


def test_distorted_cameras(frames):
    pycolmap = load_pycolmap()
    keypoints, seen, truth = exact_matches(frames)
    images = {}
    for frame in frames:
        fx, cx, cy = frame.camera.K[0, 0], *frame.camera.K[:2, 2]
        params = (fx, cx, cy, 0.08)
        lens = pycolmap.Camera(model="SIMPLE_RADIAL", width=160, height=120, params=list(params))
        rays = (keypoints[frame.name] - [cx, cy]) / fx
        distorted = np.array([lens.img_from_cam(np.append(ray, 1)) for ray in rays])
        assert np.abs(distorted - keypoints[frame.name]).max() > 2
        camera = known(frame.name, frame.camera, model="SIMPLE_RADIAL", params=params)
        images[frame.name] = posed_image(frame.name, distorted, camera)
    found = triangulate(images, all_pairs(seen), 1.0)
    errors = [np.linalg.norm(points.xyz - truth[name][points.rows], axis=1) for name, points in found.items()]
    assert len(np.concatenate(errors)) > 300
    assert np.median(np.concatenate(errors)) < 1e-3


def test_matches_are_checked_against_the_known_pose():
    relative = pose_from_rt(np.eye(3), [-1, 0, 0])  # side by side: epipolar lines are rows
    rays0 = np.array([[0.1, 0.2, 1], [0.1, 0.2, 1], [0.1, 0.2, 1], [np.nan, np.nan, 1]])
    beyond = EPIPOLAR_ERROR / 500
    rays1 = rays0 + np.array([[-0.3, 0, 0], [-0.3, 0.9 * beyond, 0], [-0.3, 1.1 * beyond, 0], [0, 0, 0]])
    assert agreeing(rays0, rays1, relative, 500.0, 500.0).tolist() == [True, True, False, False]
    assert agreeing(rays0, rays1, relative, 500.0, 700.0).tolist() == [True, False, False, False]
    assert not agreeing(rays0, rays1, np.eye(4), 500.0, 500.0).any()  # at the same place nothing can be told


def test_images_without_keypoints_and_worlds_without_a_good_match_make_no_points(frames):
    keypoints, seen, _ = exact_matches(frames)
    first, second, blank = frames[:3]
    images = {frame.name: posed_image(frame.name, keypoints[frame.name], known(frame.name, frame.camera))
              for frame in (first, second)}  # fmt: skip
    images[blank.name] = posed_image(blank.name, np.empty((0, 2)), known(blank.name, blank.camera))
    nothing = [(first.name, blank.name, np.empty((0, 2), np.int32))]
    assert triangulate(images, nothing, 1.0) == {}
    assert triangulate(images, [], 1.0) == {}
    pair = next(all_pairs({name: seen[name] for name in (first.name, second.name)}))
    assert triangulate(images, [*nothing, pair], 1.0).keys() == {first.name, second.name}
